"""Random keys: one per example, the same whoever holds the example."""

import jax
import numpy as np
import pytest

from ada_jax import keys
from ada_jax.errors import UserError


def numbers(example_keys) -> np.ndarray:
    return np.asarray(jax.vmap(jax.random.uniform)(example_keys))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_one_key_is_split_and_keys_are_left_alone(make):
    split = keys.per_example(make(0), 5)
    assert len(split) == 5
    assert len(set(numbers(split).tolist())) == 5
    np.testing.assert_array_equal(numbers(keys.per_example(split, 5)), numbers(split))


def test_a_batch_draws_the_same_whole_or_in_parts():
    key = jax.random.key(1)
    whole = numbers(keys.of_positions(key, 0, 8))
    parts = [numbers(keys.of_positions(key, start, 2)) for start in (0, 2, 4, 6)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len(set(whole.tolist())) == 8


@pytest.mark.parametrize("key", [0, np.zeros(2), np.zeros(3, np.uint32), "key"])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(UserError, match=r"is neither a typed random key nor .*: give"):
        keys.per_example(key, 2)


def test_keys_are_one_or_as_many_as_examples():
    with pytest.raises(UserError, match="has 3 for 4 images"):
        keys.per_example(jax.random.split(jax.random.key(0), 3), 4)
    with pytest.raises(UserError, match="has 1 for 4 images: give one key, without a batch axis"):
        keys.per_example(jax.random.split(jax.random.key(0), 1), 4)
    for make in (jax.random.key, jax.random.PRNGKey):
        with pytest.raises(UserError, match="give one key, or one per image"):
            keys.per_example(jax.random.split(make(0), (4, 2)), 4)
