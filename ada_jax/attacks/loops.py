"""Loops and checks shared by the attacks. Examples that are no longer attacked cost nothing.

An attack has a `state` (a NamedTuple of arrays [B, ...] with a field `active`) and constant
`examples` (a dict of arrays [B, ...]). `iterate` applies a step to the active examples only,
one microbatch at a time, so a step needs neither masks nor batch sizes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import checks, losses, sharding
from ada_jax.attacks import convolutions
from ada_jax.errors import UserError

LogitsFn = Callable[[jax.Array], jax.Array]
Examples = dict[str, jax.Array]
State = Any  # A NamedTuple of arrays [B, ...], one of them `active`, bool.
Step = Callable[[jax.Array, Examples, State], State]

NORMS = ("linf", "l2")


def iterate(
    step: Step,
    examples: Examples,
    state: State,
    steps: int,
    microbatch: int,
    between: Callable[[State], State] = lambda state: state,
) -> State:
    """Repeats state = step(i, examples, state), i = 0, 1, ..., while any example is active.

    Args:
      step: applied to `microbatch` examples at a time; it may deactivate examples.
      examples: arrays [B, ...].
      state: initial state, arrays [B, ...].
      steps: maximum number of steps.
      microbatch: at most B.
      between: applied to the whole state after steps that deactivate examples; it may deactivate
        more.

    Returns:
      The state; an example's does not change after the example is deactivated.
    """

    size = len(state.active)
    unfinished = lambda carry: (carry[0] < steps) & jnp.any(carry[1].active)  # noqa: E731

    def until_one_ends(carry):
        i, state = carry
        order, count = _active_first(state)
        ordered, state = jax.tree.map(lambda a: a[order], (examples, state))

        def body(carry):
            i, state = carry
            one_step = functools.partial(step, i)
            return i + 1, _on_first(one_step, ordered, state, count, microbatch)

        all_go_on = lambda carry: (carry[0] < steps) & (jnp.sum(carry[1].active) == count)  # noqa: E731
        i, state = lax.while_loop(all_go_on, body, (i, state))
        return i, between(jax.tree.map(lambda a: a[jnp.argsort(order)], state))

    def for_all(carry):
        i, state = carry
        return i + 1, between(_select(state.active, step(i, examples, state), state))

    body = for_all if microbatch == size else until_one_ends
    return lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def on_active(
    step: Callable[[Examples, State], State], examples: Examples, state: State, microbatch: int
) -> State:
    """Applies a step to the active examples, one microbatch at a time.

    Args:
      step: a function of b examples and their state that returns their new state.
      examples: arrays [B, ...].
      state: arrays [B, ...].
      microbatch: b, at most B; with b = B the step is computed for all examples.
    """
    if microbatch == len(state.active):
        return _select(state.active, step(examples, state), state)
    order, count = _active_first(state)
    ordered, state = jax.tree.map(lambda a: a[order], (examples, state))
    state = _on_first(step, ordered, state, count, microbatch)
    return jax.tree.map(lambda a: a[jnp.argsort(order)], state)


def _active_first(state: State) -> tuple[jax.Array, jax.Array]:
    """An order of the examples [B] with the active ones first, and how many are active."""
    return jnp.argsort(~state.active, stable=True), jnp.sum(state.active)


def _on_first(
    step: Callable[[Examples, State], State],
    examples: Examples,
    state: State,
    count: jax.Array,
    microbatch: int,
) -> State:
    """Applies a step to the first `count` examples, one microbatch at a time.

    Slices, not gathers: XLA scatters row by row, as slowly as a small classifier computes.
    """
    last = len(state.active) - microbatch

    def one_group(i, state):
        start = jnp.minimum(i * microbatch, last)
        read = lambda a: lax.dynamic_slice_in_dim(a, start, microbatch)  # noqa: E731
        old = jax.tree.map(read, state)
        # The last group may overlap with the one before.
        new = start + jnp.arange(microbatch) >= i * microbatch
        new = _select(old.active & new, step(jax.tree.map(read, examples), old), old)
        write = lambda a, b: lax.dynamic_update_slice_in_dim(a, b, start, 0)  # noqa: E731
        return jax.tree.map(write, state, new)

    return lax.fori_loop(0, -(-count // microbatch), one_group, state)


def repeat(one_run: Callable[[jax.Array, State], State], runs: int, state: State) -> State:
    """Repeats state = one_run(i, state), i < runs, while any example is active."""
    if runs == 1:  # Without a loop the compiler can drop unused parts of the state.
        return one_run(jnp.int32(0), state)
    unfinished = lambda carry: (carry[0] < runs) & jnp.any(carry[1].active)  # noqa: E731
    body = lambda carry: (carry[0] + 1, one_run(*carry))  # noqa: E731
    return lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


class _Logits(NamedTuple):
    active: jax.Array
    logits: jax.Array


def logits_of(logits_fn: LogitsFn, x: jax.Array, active: jax.Array, microbatch: int) -> jax.Array:
    """Logits [B,K] of the active examples, float32; the others are zero and are not computed.

    Args:
      logits_fn: the classifier, [b,H,W,C] -> [b,K].
      x: images [B,H,W,C].
      active: bool [B].
      microbatch: b.
    """
    classify = lambda e, s: s._replace(logits=logits_fn(e["x"]).astype(jnp.float32))  # noqa: E731
    classes = checks.num_classes(logits_fn, x[:microbatch])
    start = _Logits(active, jnp.zeros_like(x, shape=(len(x), classes)))
    return on_active(classify, {"x": x}, start, microbatch).logits


def zeros(x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Zeros [B] that vary over the same mesh axes as x, inside `jax.shard_map`."""
    return jnp.zeros_like(x, dtype, shape=(len(x),))


def misclassified(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Whether the largest logit is another class's or the logits are not finite, bool [B]."""
    return (jnp.argmax(logits, -1) != y) | checks.not_finite(logits)


def margin(logits: jax.Array, y: jax.Array) -> jax.Array:
    """`losses.margin` [B]; infinite if the logits are not finite."""
    return jnp.where(checks.not_finite(logits), jnp.inf, losses.margin(logits, y))


def attack(function: Callable, gradients: bool = True) -> Callable:
    """Decorates an attack: checks its arguments, and lets images be split over explicit mesh axes.

    Images, logits and epsilon become float32 and labels int32. UserError is raised for a microbatch
    out of range, for a mask that is not bool [B], for images, labels or an epsilon out
    of range that are not traced, and, if the attack needs gradients, for logits that have none.
    Traced images that are out of range, or whose label is, become NaN and count as broken.
    """

    @functools.wraps(function)
    def on_mesh(key, logits_fn, x, y, epsilon, **options):
        check(epsilon, options.get("norm", "linf"))
        if (microbatch := options.get("microbatch")) is not None:
            checks.check_integers(1, microbatch=microbatch)
        x, y = checks.as_images(jnp.asarray(x)), jnp.asarray(y)
        classes = checks.check_labels(y, x, logits_fn, microbatch)
        if (mask := options.get("mask")) is not None:
            options["mask"] = _checked_mask(mask, len(x))
        spec = checks.microbatch_spec(x, microbatch)
        logits_fn = checks.float32_logits(logits_fn, spec, gradients=gradients)
        x, y = checks.nan_if_invalid(x, y, classes), y.astype(jnp.int32)
        options["epsilon"] = checks.float32(epsilon)
        arrays = {name: a for name, a in options.items() if isinstance(a, jax.Array)}

        def run(logits_fn, x, key, y, arrays):
            return function(key, logits_fn, x, y, **options | arrays)

        return sharding.on_mesh(run, logits_fn, x)(x, key, y, arrays)

    return on_mesh


def _checked_mask(mask: Any, count: int) -> jax.Array | np.ndarray:
    """The mask as an array; raises UserError unless it is bool [count]."""
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.shape != (count,) or mask.dtype != bool:
        raise UserError(
            f"mask is {mask.dtype}{list(mask.shape)}: give one bool for each of the {count} images."
        )
    return mask


def prepare(
    logits_fn: LogitsFn, x: jax.Array, mask: jax.Array | None, microbatch: int | None
) -> tuple[LogitsFn, jax.Array, int]:
    """Sets defaults: returns logits_fn without gradients to its closure, mask [B], microbatch."""
    microbatch = min(microbatch or len(x), len(x))
    everything = zeros(x, bool) | True
    mask = everything if mask is None else everything & mask
    return checks.detached(convolutions.faster(logits_fn), x[:microbatch]), mask, microbatch


def check(epsilon: jax.Array | float, norm: str) -> None:
    """Raises UserError for a radius or a norm that is out of range."""
    if norm not in NORMS:
        raise UserError(f"norm={norm!r} is unknown: choose one of {', '.join(NORMS)}.")
    radius = checks.scalar("epsilon", epsilon, 1.0)
    if not 0 < radius < np.inf:
        raise UserError(f"epsilon={epsilon} must be positive and finite (8/255 is common in linf).")
    if norm == "linf" and radius > 1:
        raise UserError(f"epsilon={epsilon} is larger than the range [0, 1]: divide it by 255.")


def _select(condition: jax.Array, new: State, old: State) -> State:
    """Selects new where the condition [B] holds, else old, for every leaf [B, ...]."""
    along = lambda a: condition.reshape(-1, *[1] * (a.ndim - 1))  # noqa: E731
    return jax.tree.map(lambda a, b: jnp.where(along(a), a, b), new, old)
