"""Auto-PGD: projected gradient ascent with momentum and an adaptive step size.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (2020), sections 3 and 4.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import checks, keys, losses
from ada_jax.attacks import geometry, loops
from ada_jax.attacks.loops import Examples, LogitsFn
from ada_jax.errors import UserError

LOSSES = ("ce", "dlr", "dlr-targeted", "margin-targeted")
_MOMENTUM = 0.75


class _State(NamedTuple):
    active: jax.Array  # All arrays are [B, ...].
    broken: jax.Array
    adversarial: jax.Array  # The last misclassified iterate, or x.
    x: jax.Array  # The iterate.
    x_old: jax.Array  # The previous iterate.
    x_best: jax.Array  # The iterate of the highest loss in this run.
    gradient_best: jax.Array  # The gradient at x_best.
    loss: jax.Array
    loss_best: jax.Array
    loss_best_at_check: jax.Array
    increases: jax.Array  # Number of increases of the loss since the last checkpoint.
    step_size: jax.Array
    reduced: jax.Array  # Whether the step size was halved at the last checkpoint.
    zero_gradient: jax.Array
    passes: jax.Array


@loops.attack
def apgd(
    key: jax.Array,
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    epsilon: jax.Array | float,
    *,
    norm: str = "linf",
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    rho: float = 0.75,
    stop_when_broken: bool = True,
    mask: jax.Array | None = None,
    microbatch: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Auto-PGD (APGD).

    Args:
      key, logits_fn, x, y, epsilon, norm, mask, microbatch: as for `attacks.pgd`.
      loss: the loss to maximise, 'ce', 'dlr', 'dlr-targeted' or 'margin-targeted' (the target's
        logit minus the label's).
      steps: steps of a run.
      restarts: number of runs, per target if the loss is targeted.
      targets: number of classes that a targeted loss aims at: the classes other than y with the
        largest logits for x. More than K - 1 means all.
      rho: share of steps that must increase the loss, positive; with fewer the step size is halved.
      stop_when_broken: whether to stop an example's attack at its first misclassified iterate;
        otherwise the run goes on and the last misclassified iterate is returned.

    Returns:
      Images [B,H,W,C] in the ball and in [0,1], misclassified or equal to x, and, per example [B]:
      'broken', the numbers of passes 'forward' and 'backward', and 'zero_gradient' (whether the
      gradient vanished at the start of a run).

    Raises:
      UserError: an argument is out of range, or there are too few classes for the loss.
    """
    checks.check_integers(1, steps=steps, restarts=restarts, targets=targets)
    checks.check_positive(rho=rho)
    logits_fn, mask, microbatch = loops.prepare(logits_fn, x, mask, microbatch)
    classes = checks.num_classes(logits_fn, x[:microbatch])
    runs = restarts * number_of_targets(loss, targets, classes)
    example_keys = keys.of_batch(key, x)
    logits = loops.logits_of(logits_fn, x, mask, microbatch)
    ranking = jnp.argsort(-logits, axis=-1)
    evaluate = _evaluation(logits_fn, loss)
    table = _checkpoint_table(steps)

    def step(i, examples, state):
        state, gradient = _observe(i, examples, state, evaluate, stop_when_broken)
        state, gradient = lax.cond(
            table[i] > 0,
            lambda s, g: _checkpoint(s, g, table[i], rho),
            lambda s, g: (s, g),
            *(state, gradient),
        )
        return _move(i, examples, state, gradient, epsilon, norm)

    def one_run(run, state):
        run_keys = jax.vmap(lambda k: jax.random.fold_in(k, run))(example_keys)
        start = geometry.on_sphere(run_keys, x, epsilon, norm)
        state = _restart(state, mask & ~state.broken, start, epsilon)
        target = ranking[:, 1 + run // restarts]
        examples = {"x": x, "y": y, "target": target}
        # One more step, to evaluate the last iterate.
        return loops.iterate(step, examples, state, steps + 1, microbatch)

    state = loops.repeat(one_run, runs, _initial(x, mask, loops.misclassified(logits, y) & mask))
    info = {"broken": state.broken, "forward": state.passes + mask, "backward": state.passes}
    return lax.stop_gradient((state.adversarial, info | {"zero_gradient": state.zero_gradient}))


def checkpoints(steps: int = 100) -> list[int]:
    """The numbers of steps after which the step size may be halved: 22, 41, 57, 70, ..."""
    window, at = max(int(0.22 * steps), 1), 0
    smallest, shorter = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    found = []
    while at + window <= steps:
        at += window
        found.append(at)
        window = max(window - shorter, smallest)
    return found


def dlr(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Difference-of-logits ratio [B], positive if misclassified; needs three classes.

    Source: Croce and Hein (2020), equation 6.
    """
    top = lax.top_k(logits, 3)[0]
    return losses.margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: jax.Array, y: jax.Array, target: jax.Array) -> jax.Array:
    """Targeted difference-of-logits ratio [B], positive if the target's logit exceeds y's.

    It needs four classes.

    Source: Croce and Hein (2020), equation 7.
    """
    top = lax.top_k(logits, 4)[0]
    difference = pick(logits, target) - pick(logits, y)
    return difference / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def pick(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """The logits [B] of the given classes [B]."""
    return jnp.take_along_axis(logits, classes[:, None], axis=-1)[:, 0]


def number_of_targets(loss: str, targets: int, classes: int) -> int:
    """Number of classes that a loss aims at in turn, 1 for an untargeted loss.

    Raises:
      UserError: the loss is unknown or needs more classes.
    """
    if loss not in LOSSES:
        raise UserError(f"loss={loss!r} is unknown: choose one of {', '.join(LOSSES)}.")
    needed = {"dlr": 3, "dlr-targeted": 4}.get(loss, 2)
    if classes < needed:
        raise UserError(
            f"loss={loss!r} needs at least {needed} classes and the classifier has {classes}: "
            "choose another loss."
        )
    return min(targets, classes - 1) if loss.endswith("-targeted") else 1


def _evaluation(logits_fn: LogitsFn, loss: str) -> Callable[[jax.Array, Examples], tuple]:
    """Makes the function from iterates to (loss, whether misclassified, gradient)."""

    def total(x, examples):
        logits, y = logits_fn(x), examples["y"]
        per_example = {
            "ce": lambda: losses.cross_entropy(logits, y),
            "dlr": lambda: dlr(logits, y),
            "dlr-targeted": lambda: dlr_targeted(logits, y, examples["target"]),
            "margin-targeted": lambda: pick(logits, examples["target"]) - pick(logits, y),
        }[loss]()
        # A sum, not a mean, makes an example's gradient independent of the batch size.
        return per_example.sum(), (per_example, loops.misclassified(logits, y))

    def evaluate(x, examples):
        gradient, (loss, wrong) = jax.grad(total, has_aux=True)(x, examples)
        return loss, wrong, gradient

    return evaluate


def _checkpoint_table(steps: int) -> jax.Array:
    """Length of the window that ends after each number of steps [steps + 1], or 0."""
    table, ends = np.zeros(steps + 1, np.int32), np.array([0] + checkpoints(steps))
    table[ends[1:]] = np.diff(ends)
    return jnp.asarray(table)


def _initial(x: jax.Array, mask: jax.Array, broken: jax.Array) -> _State:
    zeros, none, no = (loops.zeros(x, dtype) for dtype in (jnp.float32, jnp.int32, bool))
    return _State(
        active=mask & ~broken,
        broken=broken,
        adversarial=x,
        x=x,
        x_old=x,
        x_best=x,
        gradient_best=jnp.zeros_like(x),
        loss=zeros,
        loss_best=zeros,
        loss_best_at_check=zeros,
        increases=none,
        step_size=zeros,
        reduced=no,
        zero_gradient=no,
        passes=none,
    )


def _restart(
    state: _State, active: jax.Array, start: jax.Array, epsilon: jax.Array | float
) -> _State:
    fill = jnp.full_like
    return state._replace(
        active=active,
        x=start,
        x_old=start,
        x_best=start,
        loss=fill(state.loss, 0),
        loss_best=fill(state.loss, -jnp.inf),
        loss_best_at_check=fill(state.loss, -jnp.inf),
        increases=fill(state.increases, 0),
        step_size=fill(state.loss, 2 * epsilon),
        # As if just halved, so that the first checkpoint only tests the number of increases.
        reduced=fill(state.reduced, True),
    )


def _observe(
    i: jax.Array, examples: Examples, state: _State, evaluate: Callable, stop_when_broken: bool
) -> tuple[_State, jax.Array]:
    """Evaluates the iterate after i steps; records the best and the last misclassified one."""
    loss, wrong, gradient = evaluate(state.x, examples)
    gradient = geometry.finite(gradient)
    better = loss > state.loss_best
    choose = lambda c, new, old: jnp.where(geometry.along(c, new), new, old)  # noqa: E731
    zero = (i == 0) & (geometry.size(gradient, "linf") == 0)
    state = state._replace(
        active=~(state.broken | wrong) if stop_when_broken else state.active,
        broken=state.broken | wrong,
        adversarial=choose(wrong, state.x, state.adversarial),
        x_best=choose(better, state.x, state.x_best),
        gradient_best=choose(better, gradient, state.gradient_best),
        # As published, the loss at the start counts as 0 in the first comparison.
        increases=state.increases + ((i > 0) & (loss > state.loss)),
        loss=jnp.where(i > 0, loss, 0),
        loss_best=jnp.where(better, loss, state.loss_best),
        zero_gradient=state.zero_gradient | zero,
        passes=state.passes + 1,
    )
    return state, gradient


def _checkpoint(
    state: _State, gradient: jax.Array, window: jax.Array, rho: float
) -> tuple[_State, jax.Array]:
    """Halves the step size and returns to the best iterate if the window brought no progress."""
    oscillates = state.increases <= checks.float32(rho) * window
    stuck = ~state.reduced & (state.loss_best_at_check >= state.loss_best)
    halve = oscillates | stuck
    choose = lambda new, old: jnp.where(geometry.along(halve, new), new, old)  # noqa: E731
    state = state._replace(
        x=choose(state.x_best, state.x),
        step_size=jnp.where(halve, state.step_size / 2, state.step_size),
        reduced=halve,
        loss_best_at_check=state.loss_best,
        increases=jnp.zeros_like(state.increases),
    )
    return state, choose(state.gradient_best, gradient)


def _move(
    i: jax.Array,
    examples: Examples,
    state: _State,
    gradient: jax.Array,
    epsilon: jax.Array | float,
    norm: str,
) -> _State:
    """Takes one projected step along the gradient, with momentum."""
    x = state.x
    share = jnp.where(i > 0, _MOMENTUM, 1.0)
    along_gradient = geometry.along(state.step_size, x) * geometry.steepest(gradient, norm)
    z = geometry.project(x + along_gradient, examples["x"], epsilon, norm)
    moved = x + share * (z - x) + (1 - share) * (x - state.x_old)
    return state._replace(x=geometry.project(moved, examples["x"], epsilon, norm), x_old=x)
