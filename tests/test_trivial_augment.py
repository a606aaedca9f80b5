"""TrivialAugment against Pillow, operation by operation, and its draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data

from ada_jax.augment import augmix, trivial_augment
from ada_jax.errors import UserError
from tests.conftest import pillow

NAMES = trivial_augment.OPS
INEXACT = ("rotate", "shear_x", "shear_y")  # float64 in Pillow
KEY = jax.random.key(0)


def amount(name: str, magnitude: int, sign: int) -> float:
    """The published one in the wide search space, in Pillow's units."""
    amounts = {
        "posterize": 8 - int(6 * magnitude / 30),
        "rotate": sign * int(135 * magnitude / 30),
        "solarize": 256 - int(256 * magnitude / 30),
        "shear_x": sign * 0.99 * (magnitude / 30),
        "shear_y": sign * 0.99 * (magnitude / 30),
        "translate_x": sign * int(32 * magnitude / 30),
        "translate_y": sign * int(32 * magnitude / 30),
    }
    return amounts.get(name, 0.01 + magnitude * (2.0 - 0.01) / 30)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Parts of a photograph and noise, all magnitudes with both signs: [62,32,32,3]."""
    rng, photo = np.random.default_rng(0), skimage.data.astronaut()
    real = [photo[i : i + 32, j : j + 32] for i, j in rng.integers(0, 480, (48, 2))]
    return np.concatenate([real, rng.integers(0, 256, (14, 32, 32, 3))]).astype(np.uint8)


MAGNITUDE, SIGN = np.arange(62, dtype=np.int32) % 31, np.repeat(np.int32([1, -1]), 31)


@pytest.fixture(scope="module")
def ours(images) -> dict[str, np.ndarray]:
    """Every operation at every magnitude and sign, by one program."""
    ops = ("", *NAMES[1:])
    apply = jax.jit(
        lambda op: augmix.apply_ops(
            jnp.asarray(images, jnp.int32),
            jnp.full(62, op),
            MAGNITUDE,
            SIGN,
            ops=ops,
            amount=trivial_augment.amount,
        )
    )
    return {name: np.asarray(apply(i)) for i, name in enumerate(NAMES)}


@pytest.mark.accelerator
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_is_pillows_at_every_magnitude(name, images, ours):
    amounts = [amount(name, *a) for a in zip(MAGNITUDE.tolist(), SIGN.tolist(), strict=True)]
    theirs = [pillow(name, *a) for a in zip(images, amounts, strict=True)]
    difference = np.abs(ours[name] - np.stack(theirs))
    if name not in INEXACT:
        assert difference.max() == 0
        return
    # Pillow turns images by 90 degrees without interpolation.
    right_angle = (MAGNITUDE == 20) & (name == "rotate")
    assert difference.max() <= 1 and (difference[~right_angle] > 0).mean() <= 1e-3


def test_there_are_fourteen_operations_and_the_extreme_ones_are_the_wide_space_s():
    assert len(set(NAMES)) == 14
    found = {n: float(trivial_augment.amount(n, jnp.int32(30), -1, 32, 32)) for n in NAMES}
    expected = {"rotate": -135, "shear_x": -0.99, "translate_y": -32, "posterize": 2}
    expected |= {"solarize": 0, "color": 2.0, "sharpness": 2.0, "equalize": 0.0}
    assert {n: found[n] for n in expected} == pytest.approx(expected)
    assert float(trivial_augment.amount("contrast", jnp.int32(0), 1, 9, 9)) == np.float32(0.01)


def test_magnitudes_and_signs_are_uniform():
    ramp = jnp.broadcast_to(jnp.arange(1, 65.0)[None, :, None] / 255, (6000, 1, 64, 3))
    f = jax.jit(lambda key: trivial_augment.trivial_augment(key, ramp, ops=("translate_x",)))
    shift = np.round(255 * np.asarray(f(KEY))[:, 0, 32, 0]).astype(int)
    shift = np.where(shift == 0, 32, shift - 33)  # 32 pixels to the right, outside: black
    values, counts = np.unique(np.abs(shift), return_counts=True)
    assert values.tolist() == sorted({32 * m // 30 for m in range(31)})
    assert np.abs(counts / 6000 - 1 / 31).max() < 0.01
    assert np.mean(shift > 0) == pytest.approx(np.mean(shift < 0), abs=0.03)


def test_operations_are_uniform_and_selectable():
    x = jnp.full((3000, 3, 3, 3), 200 / 255)
    ops = ("identity", "solarize", "translate_y", "autocontrast")
    f = jax.jit(lambda key: trivial_augment.trivial_augment(key, x, ops=ops))
    found = np.round(255 * np.asarray(f(KEY)))
    solarized = (found == 55).any((1, 2, 3)).mean()
    shifted = (found == 0).any((1, 2, 3)).mean()
    # 256 - 256 m // 30 is above 200 for seven magnitudes; no shift for one.
    assert solarized == pytest.approx(24 / 31 / 4, abs=0.03)
    assert shifted == pytest.approx(30 / 31 / 4, abs=0.03)
    assert set(np.unique(found)) == {0, 55, 200}


def test_an_example_does_not_depend_on_its_neighbours_and_stays_in_range(images):
    x, key = jnp.float32(images[:16]) / 255, jax.random.split(KEY, 16)
    f = jax.jit(trivial_augment.trivial_augment)
    out = f(key, x)
    np.testing.assert_array_equal(f(key[::-1], x[::-1])[::-1], out)
    np.testing.assert_array_equal(f(KEY, x), out)
    assert out.dtype == jnp.float32 and out.min() >= 0 and out.max() <= 1
    assert np.abs(out - x).mean() > 0.01


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ops": ("blur",)}, "unknown operation 'blur'"),
        ({"ops": ()}, "ops is empty"),
        ({"x": jnp.zeros((1, 8, 8, 1))}, "three channels"),
    ],
)
def test_mistakes_are_told(arguments, said):
    with pytest.raises(UserError, match=said):
        trivial_augment.trivial_augment(KEY, **{"x": jnp.zeros((1, 8, 8, 3)), **arguments})


def test_inside_jit_a_wrong_image_becomes_nan():
    x = jnp.stack([jnp.full((8, 8, 3), 0.5), jnp.full((8, 8, 3), 2.0)])
    f = jax.jit(lambda x: trivial_augment.trivial_augment(KEY, x, ops=("identity", "solarize")))
    assert np.isnan(f(x)).all((1, 2, 3)).tolist() == [False, True]
