"""Projected gradient ascent with random starts, and MultiTargeted, which aims at every class."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ada_jax import keys, losses
from ada_jax.attacks import geometry, loops
from ada_jax.attacks.apgd import dlr, pick
from ada_jax.attacks.loops import Examples, LogitsFn
from ada_jax.errors import UserError

Memory = tuple[jax.Array, ...]
# From a step's number, the gradient and what was remembered: where to move, what to remember.
Rule = Callable[[jax.Array, jax.Array, Memory], tuple[jax.Array, Memory]]
LossFn = Callable[[jax.Array, Examples], jax.Array]


class _State(NamedTuple):
    active: jax.Array  # Everything is [B, ...].
    x: jax.Array  # The iterate.
    memory: Memory
    worst: jax.Array  # The end of the worst run so far,
    margin: jax.Array  # by how much its best wrong logit exceeds the true one,
    broken: jax.Array  # and whether it is misclassified.
    forward: jax.Array
    backward: jax.Array


def pgd(
    key: jax.Array,
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    epsilon: jax.Array | float,
    *,
    norm: str = "linf",
    loss: str = "ce",
    steps: int = 20,
    step_size: jax.Array | float | None = None,
    restarts: int = 1,
    stop_when_broken: bool = False,
    mask: jax.Array | None = None,
    microbatch: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Projected gradient ascent from uniformly random points of the ball.

    Args:
      key: random key, or one per example [B].
      logits_fn: the classifier, [b,H,W,C] -> [b,K].
      x: images [B,H,W,C], float32 in [0,1].
      y: labels [B], int.
      epsilon: the ball's radius, positive, in units of pixels.
      norm: 'linf' (steps of the gradient's sign) or 'l2' (of the gradient over its norm).
      loss: 'ce', 'dlr' or 'margin'; what is ascended.
      steps: steps of a run.
      step_size: length of a step, in units of pixels; None is 2.5 epsilon / steps.
      restarts: runs, of which the one ending with the largest margin is returned.
      stop_when_broken: whether an example's attack ends with its first misclassified iterate.
      mask: which examples to attack, bool [B]; the others are returned as they are.
      microbatch: examples computed at a time, see `apgd`.

    Returns:
      Images [B,H,W,C] in the ball and in [0,1], the last iterates, whether misclassified or not,
      and, per example [B]: 'broken', the 'margin' (best wrong logit minus true one) and the
      passes it took 'forward' and 'backward'.

    Raises:
      UserError: an argument is out of range.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018).
    """
    loss_fns = {"ce": losses.cross_entropy, "dlr": dlr, "margin": losses.margin}
    if loss not in loss_fns:
        raise UserError(f"loss={loss!r} is unknown: choose one of {', '.join(loss_fns)}.")
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    return _attack(
        key,
        logits_fn,
        x,
        y,
        epsilon,
        norm=norm,
        loss_fn=lambda logits, examples: loss_fns[loss](logits, examples["y"]),
        rule=lambda i, gradient, _: (step_size * geometry.steepest(gradient, norm), ()),
        memory=(),
        steps=steps,
        targets=1,
        restarts=restarts,
        stop_when_broken=stop_when_broken,
        mask=mask,
        microbatch=microbatch,
    )


def multitargeted(
    key: jax.Array,
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    epsilon: jax.Array | float,
    *,
    norm: str = "linf",
    steps: int = 200,
    step_size: float = 0.1,
    restarts: int = 10,
    stop_when_broken: bool = True,
    mask: jax.Array | None = None,
    microbatch: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """MultiTargeted: for every class but the true one, raises its logit above the true one's.

    Adam in the pixels, its step divided by 10 after a half and again after three quarters of the
    steps, from uniformly random points of the ball.

    Args:
      key: random key, or one per example [B].
      logits_fn: the classifier in evaluation mode, [b,H,W,C] -> [b,K]; it must not mix examples.
      x: images [B,H,W,C], float32 in [0,1].
      y: labels [B], int.
      epsilon: the ball's radius, positive, in units of pixels.
      norm: 'linf' or 'l2'.
      steps: steps of a run.
      step_size: Adam's, at first.
      restarts: runs for every class; the one of all that ends with the largest margin is returned.
      stop_when_broken: whether an example's attack ends with its first misclassified iterate.
      mask: which examples to attack, bool [B]; the others are returned as they are.
      microbatch: examples computed at a time, see `apgd`.

    Returns:
      As `pgd`.

    Raises:
      UserError: an argument is out of range.

    Source: Gowal et al., "An alternative surrogate loss for PGD-based adversarial testing" (2019);
    optimiser and step sizes as in the evaluation attack of deepmind-research's
    adversarial_robustness.
    """

    def rule(i, gradient, memory):
        size = (
            step_size * jnp.where(i >= steps // 2, 0.1, 1) * jnp.where(i >= steps * 3 // 4, 0.1, 1)
        )
        return _adam(i, gradient, memory, size)

    return _attack(
        key,
        logits_fn,
        x,
        y,
        epsilon,
        norm=norm,
        loss_fn=lambda z, e: pick(z, e["target"]) - pick(z, e["y"]),
        rule=rule,
        memory=(jnp.zeros_like(x), jnp.zeros_like(x)),
        steps=steps,
        targets=loops.num_classes(logits_fn, x) - 1,
        restarts=restarts,
        stop_when_broken=stop_when_broken,
        mask=mask,
        microbatch=microbatch,
    )


def _attack(
    key: jax.Array,
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    epsilon: jax.Array | float,
    *,
    norm: str,
    loss_fn: LossFn,
    rule: Rule,
    memory: Memory,
    steps: int,
    targets: int,
    restarts: int,
    stop_when_broken: bool,
    mask: jax.Array | None,
    microbatch: int | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Ascends loss_fn by rule in targets x restarts runs and keeps the worst of their ends."""
    logits_fn, mask, microbatch = loops.prepare(logits_fn, x, epsilon, norm, mask, microbatch)
    example_keys = keys.per_example(key, len(x))

    def total(x, examples):
        logits = logits_fn(x).astype(jnp.float32)
        # The sum, not the mean: an example's gradient must not depend on the size of the batch.
        return loss_fn(logits, examples).sum(), loops.misclassified(logits, examples["y"])

    def step(i, examples, state):
        gradient, wrong = jax.grad(total, has_aux=True)(state.x, examples)
        movement, memory = rule(i, gradient, state.memory)
        moved = geometry.project(state.x + movement, examples["x"], epsilon, norm)
        ended = wrong & stop_when_broken
        return state._replace(
            active=~ended,
            x=jnp.where(geometry.along(ended, moved), state.x, moved),
            memory=memory,
            forward=state.forward + 1,
            backward=state.backward + 1,
        )

    def one_run(run, state):
        attacked = mask & ~(state.broken & stop_when_broken)
        run_keys = jax.vmap(lambda k: jax.random.fold_in(k, run))(example_keys)
        start = geometry.in_ball(run_keys, x, epsilon, norm)
        # With ten classes 1 + run // restarts is 1, ..., 9: every class but y in turn.
        target = (y + 1 + run // restarts) % (targets + 1)
        state = state._replace(active=attacked, x=start, memory=memory)
        examples = {"x": x, "y": y, "target": target}
        state = loops.iterate(step, examples, state, steps, microbatch)
        return _keep_worst(logits_fn, y, state, attacked, stop_when_broken, microbatch)

    none = jnp.zeros(len(x), jnp.int32)
    no, lowest = jnp.zeros(len(x), bool), jnp.full(len(x), -jnp.inf)
    state = _State(mask, x, memory, x, lowest, no, none, none)
    state = loops.repeat(one_run, targets * restarts, state)
    info = {"broken": state.broken, "margin": state.margin}
    info |= {"forward": state.forward, "backward": state.backward}
    return lax.stop_gradient((state.worst, info))


def _keep_worst(
    logits_fn: LogitsFn,
    y: jax.Array,
    state: _State,
    attacked: jax.Array,
    stop_when_broken: bool,
    microbatch: int,
) -> _State:
    """Keeps the iterate if its margin is the largest of all runs' ends."""
    logits = loops.logits_of(logits_fn, state.x, attacked, microbatch)
    margin = losses.margin(logits, y)
    worse = attacked & (margin > state.margin)
    broken = jnp.where(worse, loops.misclassified(logits, y), state.broken)
    return state._replace(
        active=attacked & ~(broken & stop_when_broken),
        worst=jnp.where(geometry.along(worse, state.x), state.x, state.worst),
        margin=jnp.where(worse, margin, state.margin),
        broken=broken,
        forward=state.forward + attacked,
    )


def _adam(
    i: jax.Array, gradient: jax.Array, memory: Memory, step_size: jax.Array
) -> tuple[jax.Array, Memory]:
    """Adam's step upwards (Kingma and Ba, 2015), with an epsilon of 1e-9."""
    mean = 0.9 * memory[0] + 0.1 * gradient
    square = 0.999 * memory[1] + 0.001 * gradient**2
    unbiased, unbiased_square = mean / (1 - 0.9 ** (i + 1)), square / (1 - 0.999 ** (i + 1))
    return step_size * unbiased / (jnp.sqrt(unbiased_square) + 1e-9), (mean, square)
