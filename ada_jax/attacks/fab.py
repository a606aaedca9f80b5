"""FAB-T, the targeted fast adaptive boundary attack, which minimises the distance.

Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
attack" (2020), with one target class per run as in AutoAttack.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ada_jax import checks, keys
from ada_jax.attacks import geometry, loops
from ada_jax.attacks.apgd import pick
from ada_jax.attacks.loops import Examples, LogitsFn


class _State(NamedTuple):
    active: jax.Array  # All arrays are [B, ...].
    adversarial: jax.Array  # The nearest misclassified image so far, or x.
    distance: jax.Array  # Its distance from x, infinite if there is none.
    x: jax.Array  # The iterate.
    forward: jax.Array
    backward: jax.Array


@loops.attack
def fab(
    key: jax.Array,
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    epsilon: jax.Array | float,
    *,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    search_steps: int = 3,
    stop_when_broken: bool = True,
    mask: jax.Array | None = None,
    microbatch: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """FAB-T: follows the decision boundary with a bias towards the original image.

    Args:
      logits_fn, x, y, mask, microbatch: as for `attacks.pgd`.
      key: random key, or one per example [B]; used from the second restart on.
      epsilon: distance up to which an example counts as broken, and radius of the random restarts;
        positive.
      norm: 'linf' or 'l2', the distance to minimise.
      steps: steps of a run.
      restarts: runs for every target; the first starts at x.
      targets: number of classes to aim at: those other than y with the largest logits for x. More
        than K - 1 means all.
      alpha_max: largest weight of the projection from x, against that from the iterate, in a step;
        positive.
      eta: overshoot beyond the boundary, positive; 1 is none.
      beta: factor of the distance to x after a misclassified iterate, positive.
      search_steps: steps of the final line search between x and the result; AutoAttack uses none.
      stop_when_broken: whether to stop an example's attack within epsilon; False minimises the
        distance further.

    Returns:
      The nearest misclassified images found [B,H,W,C] in [0,1], not always within epsilon, or x if
      none was found, and, per example [B]: 'broken' (within epsilon), 'distance' (infinite if none
      was found) and the numbers of passes 'forward' and 'backward'.

    Raises:
      UserError: an argument is out of range.
    """
    checks.check_integers(1, steps=steps, restarts=restarts, targets=targets)
    checks.check_integers(0, search_steps=search_steps)
    checks.check_positive(alpha_max=alpha_max, eta=eta, beta=beta)
    logits_fn, mask, microbatch = loops.prepare(logits_fn, x, mask, microbatch)
    runs = restarts * min(targets, checks.num_classes(logits_fn, x[:microbatch]) - 1)
    example_keys = keys.of_batch(key, x)
    logits = loops.logits_of(logits_fn, x, mask, microbatch)
    alpha_max, eta, beta = map(checks.float32, (alpha_max, eta, beta))
    ranking = jnp.argsort(-logits, axis=-1)
    wrong = mask & loops.misclassified(logits, y)
    attackable = mask & ~wrong

    def step(i, examples, state):
        w, gap = _linearise(logits_fn, examples, state.x)
        moved = _step(examples["x"], state.x, w, gap, norm, alpha_max, eta)
        state = state._replace(forward=state.forward + 2, backward=state.backward + 1)
        return _keep(logits_fn, examples, state, moved, epsilon, norm, beta, stop_when_broken)

    def one_run(run, state):
        state = state._replace(x=x)
        if restarts > 1:
            run_keys = jax.vmap(lambda k: jax.random.fold_in(k, run))(example_keys)
            radius = geometry.along(jnp.minimum(epsilon, state.distance) / 2, x)
            random = geometry.on_sphere(run_keys, x, radius, norm)
            state = state._replace(x=jnp.where(run % restarts > 0, random, x))
        examples = {"x": x, "y": y, "target": ranking[:, 1 + run // restarts]}
        return loops.iterate(step, examples, state, steps, microbatch)

    none = loops.zeros(x, jnp.int32)
    distance = jnp.where(wrong, 0.0, jnp.inf).astype(jnp.float32)
    start = _State(attackable, x, distance, x, none + mask, none)
    state = loops.repeat(one_run, runs, start)
    if search_steps:
        state = _search(logits_fn, x, y, logits, state, norm, search_steps, microbatch)
    info = {"broken": state.distance <= epsilon, "distance": state.distance}
    info |= {"forward": state.forward, "backward": state.backward}
    return lax.stop_gradient((state.adversarial, info))


def _linearise(
    logits_fn: LogitsFn, examples: Examples, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradient and value of the target's logit minus the label's, at x."""

    def total(x):
        logits = logits_fn(x)
        gap = pick(logits, examples["target"]) - pick(logits, examples["y"])
        return gap.sum(), gap

    gradient, gap = jax.grad(total, has_aux=True)(x)
    return geometry.finite(gradient), gap


def _step(
    x0: jax.Array,
    x: jax.Array,
    w: jax.Array,
    gap: jax.Array,
    norm: str,
    alpha_max: float,
    eta: float,
) -> jax.Array:
    """Steps beyond the linearised boundary, from a mixture of the iterate and the original."""
    missing0 = -gap - jnp.sum((w * (x0 - x)).reshape(len(x), -1), -1)
    both = jnp.concatenate
    delta = geometry.to_hyperplane(both([x, x0]), both([w, w]), both([-gap, missing0]), norm)
    length = jnp.maximum(geometry.size(delta, norm), 1e-8)
    (d, d0), (near, near0) = jnp.split(delta, 2), jnp.split(length, 2)
    alpha = geometry.along(jnp.minimum(near / (near + near0), alpha_max), x)
    return jnp.clip((1 - alpha) * (x + eta * d) + alpha * (x0 + eta * d0), 0, 1)


def _keep(
    logits_fn: LogitsFn,
    examples: Examples,
    state: _State,
    moved: jax.Array,
    epsilon: jax.Array | float,
    norm: str,
    beta: float,
    stop_when_broken: bool,
) -> _State:
    """Records the nearest misclassified iterate, and moves a misclassified one towards x."""
    x0 = examples["x"]
    wrong = loops.misclassified(logits_fn(moved), examples["y"])
    distance = geometry.size(moved - x0, norm)
    nearer = wrong & (distance < state.distance)
    best = jnp.where(nearer, distance, state.distance)
    return state._replace(
        active=state.active & ~(best <= epsilon) if stop_when_broken else state.active,
        adversarial=jnp.where(geometry.along(nearer, x0), moved, state.adversarial),
        distance=best,
        x=jnp.where(geometry.along(wrong, x0), x0 + beta * (moved - x0), moved),
    )


class _Segment(NamedTuple):
    active: jax.Array
    low: jax.Array  # The largest share of the way that is known to be classified correctly.
    high: jax.Array  # The smallest share that is known to be misclassified.
    margin_low: jax.Array  # The margins there.
    margin_high: jax.Array


def _search(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    logits: jax.Array,
    state: _State,
    norm: str,
    steps: int,
    microbatch: int,
) -> _State:
    """Searches the segment from x to the result for nearer images, by the secant method."""
    found = jnp.isfinite(state.distance) & (state.distance > 0)
    examples = {"x": x, "y": y, "end": state.adversarial}
    at = lambda e, share: e["x"] + geometry.along(share, e["x"]) * (e["end"] - e["x"])  # noqa: E731
    at_end = loops.logits_of(logits_fn, state.adversarial, found, microbatch)
    zeros = loops.zeros(x)
    start = _Segment(found, zeros, zeros + 1, loops.margin(logits, y), loops.margin(at_end, y))

    def step(i, examples, s):
        # Slightly beyond the secant's root; at the root itself rounding would decide the class.
        root = s.low - s.margin_low * (s.high - s.low) / (s.margin_high - s.margin_low)
        share = root + 0.01 * (s.high - root)
        logits = logits_fn(at(examples, share))
        wrong, margin = (
            loops.misclassified(logits, examples["y"]),
            loops.margin(logits, examples["y"]),
        )
        return s._replace(
            low=jnp.where(wrong, s.low, share),
            high=jnp.where(wrong, share, s.high),
            margin_low=jnp.where(wrong, s.margin_low, margin),
            margin_high=jnp.where(wrong, margin, s.margin_high),
        )

    end = loops.iterate(step, examples, start, steps, microbatch)
    nearest = jnp.where(geometry.along(end.high < 1, x), at(examples, end.high), state.adversarial)
    distance = jnp.where(found, geometry.size(nearest - x, norm), state.distance)
    passes = state.forward + jnp.where(found, steps + 1, 0)
    return state._replace(adversarial=nearest, distance=distance, forward=passes)
