"""Projected gradient ascent with random restarts, and MultiTargeted."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ada_jax import checks, keys, losses
from ada_jax.attacks import geometry, loops
from ada_jax.attacks.apgd import dlr, number_of_targets, pick
from ada_jax.attacks.loops import Examples, LogitsFn
from ada_jax.errors import UserError

Memory = tuple[jax.Array, ...]
# (step number, gradient, optimiser state) -> (movement, optimiser state).
Rule = Callable[[jax.Array, jax.Array, Memory], tuple[jax.Array, Memory]]
LossFn = Callable[[jax.Array, Examples], jax.Array]


class _Run(NamedTuple):
    """The runs of all restarts of all examples, [B * restarts, ...]."""

    active: jax.Array
    x: jax.Array  # The iterate.
    memory: Memory
    ended: jax.Array  # Whether the run stopped at a misclassified iterate.
    forward: jax.Array
    backward: jax.Array


class _State(NamedTuple):
    active: jax.Array  # All arrays are [B, ...].
    worst: jax.Array  # The last iterate of the run with the largest margin so far.
    margin: jax.Array  # Its margin: largest wrong logit minus true one.
    broken: jax.Array  # Whether it is misclassified.
    forward: jax.Array
    backward: jax.Array


@loops.attack
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
      logits_fn: the classifier in evaluation mode, [b,H,W,C] -> [b,K]; it must not mix examples.
      x: images [B,H,W,C] of any floating type, in [0,1].
      y: labels [B], int.
      epsilon: the ball's radius, positive, at most 1 for 'linf', in units of pixel values.
      norm: 'linf' or 'l2'.
      loss: the loss to maximise, 'ce', 'dlr' or 'margin'.
      steps: steps of a run.
      step_size: length of a step along the gradient's sign ('linf') or the normalised gradient
        ('l2'), in units of pixel values; None means 2.5 epsilon / steps.
      restarts: number of runs; the one that ends with the largest margin is returned.
      stop_when_broken: whether to stop an example's attack at its first misclassified iterate.
      mask: the examples to attack, bool [B]; the others are returned unchanged, not 'broken'.
      microbatch: examples computed at a time, which bounds memory; examples that are no longer
        attacked cost nothing. None computes the whole batch until no example is attacked.

    Returns:
      The last iterates [B,H,W,C], in the ball and in [0,1], misclassified or not, and, per example
      [B]: 'broken', the 'margin' (largest wrong logit minus true one) and the numbers of passes
      'forward' and 'backward'.

    Raises:
      UserError: an argument is out of range. Inside `jax.jit` images that are out of range, or
        whose label is, become NaN and count as broken.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018).
    """
    loss_fns = {"ce": losses.cross_entropy, "dlr": dlr, "margin": losses.margin}
    if loss not in loss_fns:
        raise UserError(f"loss={loss!r} is unknown: choose one of {', '.join(loss_fns)}.")
    checks.check_integers(1, steps=steps, restarts=restarts)
    if loss == "dlr":
        number_of_targets(loss, 1, checks.num_classes(logits_fn, x[:microbatch]))
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    checks.check_positive(step_size=step_size)

    def rule(i, gradient, memory):
        return checks.float32(step_size) * geometry.steepest(gradient, norm), memory

    return _attack(
        key,
        logits_fn,
        x,
        y,
        epsilon,
        norm=norm,
        loss_fn=lambda logits, examples: loss_fns[loss](logits, examples["y"]),
        rule=rule,
        memory=(),
        steps=steps,
        targets=1,
        restarts=restarts,
        stop_when_broken=stop_when_broken,
        mask=mask,
        microbatch=microbatch,
    )


@loops.attack
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
    """MultiTargeted: maximises every other class's logit minus the true one's, in turn.

    It runs Adam on the pixels from uniformly random points of the ball. The step size is divided by
    10 after half of the steps and again after three quarters.

    Args:
      key, logits_fn, x, y, epsilon, norm, mask, microbatch: as for `attacks.pgd`.
      steps: steps of a run.
      step_size: Adam's initial step size.
      restarts: runs for every class; of all runs, the one with the largest margin is returned.
      stop_when_broken: whether to stop an example's attack at its first misclassified iterate.

    Returns:
      As `pgd`.

    Raises:
      UserError: an argument is out of range.

    Source: Gowal et al., "An alternative surrogate loss for PGD-based adversarial testing" (2019);
    optimiser and step sizes as in the evaluation attack of deepmind-research's
    adversarial_robustness.
    """
    checks.check_integers(1, steps=steps, restarts=restarts)
    checks.check_positive(step_size=step_size)

    def rule(i, gradient, memory):
        size = (
            step_size * jnp.where(i >= steps // 2, 0.1, 1) * jnp.where(i >= steps * 3 // 4, 0.1, 1)
        )
        return _adam(i, geometry.finite(gradient), memory, checks.float32(size))

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
        targets=checks.num_classes(logits_fn, x[:microbatch]) - 1,
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
    """Maximises loss_fn in targets x restarts runs, and keeps the end with the largest margin.

    All restarts of a target run together, so that the last few examples still fill a microbatch.
    """
    logits_fn, mask, microbatch = loops.prepare(logits_fn, x, mask, microbatch)
    example_keys = keys.of_batch(key, x)
    side_by_side = lambda a: jnp.repeat(a, restarts, 0)  # noqa: E731
    together = lambda a: a.reshape(len(x), restarts, *a.shape[1:])  # noqa: E731

    def total(x, examples):
        logits = logits_fn(x)
        # A sum, not a mean, makes an example's gradient independent of the batch size.
        return loss_fn(logits, examples).sum(), loops.misclassified(logits, examples["y"])

    def step(i, examples, run):
        gradient, wrong = jax.grad(total, has_aux=True)(run.x, examples)
        movement, memory = rule(i, gradient, run.memory)
        moved = geometry.project(run.x + movement, examples["x"], epsilon, norm)
        ended = wrong & stop_when_broken
        return run._replace(
            active=~ended,
            ended=ended,
            x=jnp.where(geometry.along(ended, moved), run.x, moved),
            memory=memory,
            forward=run.forward + 1,
            backward=run.backward + 1,
        )

    def stop_siblings(run):
        return run._replace(active=run.active & ~side_by_side(together(run.ended).any(1)))

    def one_target(i, state):
        numbers = jnp.tile(i * restarts + jnp.arange(restarts, dtype=jnp.int32), len(x))
        run_keys = jax.vmap(jax.random.fold_in)(side_by_side(example_keys), numbers)
        # Every class except y in turn: with ten classes 1 + i is 1, ..., 9.
        examples = {"x": x, "y": y, "target": (y + 1 + i) % (targets + 1)}
        examples = jax.tree.map(side_by_side, examples)
        start = geometry.in_ball(run_keys, examples["x"], epsilon, norm)
        attacked, none = side_by_side(state.active), side_by_side(no_passes)
        run = _Run(attacked, start, jax.tree.map(side_by_side, memory), none > 0, none, none)
        run = loops.iterate(step, examples, run, steps, microbatch, stop_siblings)
        logits = loops.logits_of(logits_fn, run.x, attacked, microbatch)
        run = run._replace(forward=run.forward + attacked)
        state = _keep_worst(state, jax.tree.map(together, run), together(logits), y)
        return state._replace(active=state.active & ~(state.broken & stop_when_broken))

    no_passes = loops.zeros(x, jnp.int32)
    lowest = loops.zeros(x) - jnp.inf
    state = _State(mask, x, lowest, no_passes > 0, no_passes, no_passes)
    state = loops.repeat(one_target, targets, state)
    info = {"broken": state.broken, "margin": state.margin}
    info |= {"forward": state.forward, "backward": state.backward}
    return lax.stop_gradient((state.worst, info))


def _keep_worst(state: _State, run: _Run, logits: jax.Array, y: jax.Array) -> _State:
    """Updates the state with the run [B, restarts, ...] of the largest margin."""
    margins = jax.vmap(loops.margin, (1, None), 1)(logits, y)
    best = jnp.argmax(margins, 1)
    taken = lambda a: a[jnp.arange(len(best)), best]  # noqa: E731
    worse = state.active & (taken(margins) > state.margin)
    wrong = loops.misclassified(taken(logits), y)
    return state._replace(
        worst=jnp.where(geometry.along(worse, state.worst), taken(run.x), state.worst),
        margin=jnp.where(worse, taken(margins), state.margin),
        broken=jnp.where(worse, wrong, state.broken),
        forward=state.forward + run.forward.sum(1, jnp.int32),
        backward=state.backward + run.backward.sum(1, jnp.int32),
    )


def _adam(
    i: jax.Array, gradient: jax.Array, memory: Memory, step_size: jax.Array
) -> tuple[jax.Array, Memory]:
    """Adam's ascent step (Kingma and Ba, 2015), with an epsilon of 1e-9."""
    mean = 0.9 * memory[0] + 0.1 * gradient
    square = 0.999 * memory[1] + 0.001 * gradient**2
    # A Python number to the power of an integer would be float64 under x64.
    bias, bias_of_square = (jnp.float32(decay) ** (i + 1) for decay in (0.9, 0.999))
    unbiased, unbiased_square = mean / (1 - bias), square / (1 - bias_of_square)
    return step_size * unbiased / (jnp.sqrt(unbiased_square) + 1e-9), (mean, square)
