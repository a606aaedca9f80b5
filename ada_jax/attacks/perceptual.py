"""Attacks that are bounded by LPIPS: Fast-LPA, LPA and PPGD.

All three take a `model`, images -> logits and features, such as `ada_jax.perceptual.model_of`
returns. To bound a classifier by another network, pass `lambda x: (logits_fn(x), features_fn(x))`.

Source: Laidlaw, Singla and Feizi, "Perceptual adversarial robustness: defense against unseen threat
models" (2021), algorithms 1 to 3, with the constants of its code.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import checks, keys, losses, perceptual, sharding
from ada_jax.attacks import geometry, loops
from ada_jax.errors import UserError
from ada_jax.perceptual import Features, Model

_PROBE = 0.1  # Distance in pixel values over which the features' speed is measured.
_CG_PROBE = 1e-3  # The same for the Jacobian in PPGD.
_CG_STEPS = 5
_NEWTON_STEPS = 10
_BISECTIONS = 10
_OVERSHOOT = 0.1
_NOISE = 0.01  # Standard deviation of LPA's and PPGD's start.
_KAPPA = 1.0  # LPA and PPGD do not increase margins that are larger.


class _Problem(NamedTuple):
    """What an attack is given; arrays are [B, ...]."""

    model: Model
    x: jax.Array
    y: jax.Array
    bound: jax.Array
    wrong: jax.Array  # Whether the model misclassifies x.
    unit: Features  # The unit features of x.


Search = Callable[[_Problem, jax.Array], jax.Array]  # of images, given a start near x


def fast_lpa(
    key: jax.Array,
    model: Model,
    x: jax.Array,
    y: jax.Array,
    bound: jax.Array | float = 0.5,
    *,
    steps: int = 10,
    step_size: float = 0.5,
    penalty: float = 10.0,
    noise: float = 0.01,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Fast Lagrangian perceptual attack, for adversarial training.

    It ascends the margin minus a penalty times the excess of LPIPS over the bound. In step i of N
    the penalty's weight is `penalty` 0.1^(1 - i/N), and the step moves the features by about
    `step_size` 0.1^(i/N). There is no projection, so that distances may exceed the bound.

    Args:
      key: random key, or one per example [B].
      model: the classifier in evaluation mode, images [b,H,W,C] -> logits [b,K] and features, a
        tree of [b,H',W',C']; it must not mix examples.
      x: images [B,H,W,C] of any floating type, in [0,1].
      y: labels [B], int. Images that the model misclassifies are returned unchanged.
      bound: LPIPS above which a distance is penalised, positive.
      steps: N.
      step_size: LPIPS of the first step, positive.
      penalty: the penalty's weight at the end, positive.
      noise: standard deviation of the start around x, positive, in units of pixel values.

    Returns:
      The last iterates [B,H,W,C] in [0,1], and, per example [B], whether they are misclassified,
      'broken', and their LPIPS to x, 'distance'.

    Raises:
      UserError: an argument is out of range, or the model returns no features. Inside `jax.jit`
        images that are out of range, or whose label is, become NaN.
    """
    check_settings(steps=steps, step_size=step_size, penalty=penalty, noise=noise)
    step_size, penalty, noise = map(jnp.float32, (step_size, penalty, noise))

    def search(problem, start):
        def step(i, images):
            decay = _decay(i, steps)
            weight, length = penalty * 0.1 / decay, step_size * decay
            return _ascend(problem, images, weight, length, floor=1e-4)[0]

        images = lax.fori_loop(0, steps, step, start)
        return jnp.where(geometry.along(problem.wrong, images), problem.x, images)

    return _run(search, key, model, x, y, bound, noise)


class _Lagrangian(NamedTuple):
    active: jax.Array  # All arrays are [B, ...].
    x: jax.Array
    penalty: jax.Array


def lpa(
    key: jax.Array,
    model: Model,
    x: jax.Array,
    y: jax.Array,
    bound: jax.Array | float = 0.5,
    *,
    steps: int = 40,
    rounds: int = 5,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Lagrangian perceptual attack, for evaluation.

    It ascends like `fast_lpa`, in `rounds` of `steps` steps. The penalty's weight is 0.01 at first
    and ten times larger after every round at whose end the image is outside of the bound. An image
    that is misclassified within the bound is left as it is. In the end images outside of the bound
    are projected onto it by Newton's method, or by bisection where that fails.

    Args:
      key, model, x, y: as for `fast_lpa`; misclassified images are attacked, too.
      bound: the largest LPIPS, positive.
      steps: steps of a round.
      rounds: rounds, with the end of each as the start of the next.

    Returns:
      As `fast_lpa`, with distances of at most the bound.

    Raises:
      UserError: as `fast_lpa`.
    """
    checks.check_integers(1, steps=steps, rounds=rounds)

    def search(problem, start):
        def step(i, _, state):
            length = problem.bound * _decay(i % steps, steps)
            options = {"floor": 1e-8, "kappa": _KAPPA}
            moved, distances, wrong = _ascend(problem, state.x, state.penalty, length, **options)
            found = wrong & (distances <= problem.bound)
            raised = ((i + 1) % steps == 0) & (distances >= problem.bound)
            return _Lagrangian(
                active=~found,
                x=jnp.where(geometry.along(found, moved), state.x, moved),
                penalty=jnp.where(raised, 10 * state.penalty, state.penalty),
            )

        first = loops.zeros(start) + 0.01
        state = _Lagrangian(first > 0, jnp.clip(start, 0, 1), first)
        state = loops.iterate(step, {}, state, steps * rounds, len(start))
        return _project(problem, state.x)

    return _run(search, key, model, x, y, bound, _NOISE)


def ppgd(
    key: jax.Array,
    model: Model,
    x: jax.Array,
    y: jax.Array,
    bound: jax.Array | float = 0.5,
    *,
    steps: int = 40,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Perceptual projected gradient ascent, for evaluation.

    Every step increases the margin as much as is possible, to first order, while the features move
    by 2 bound / steps, and is followed by a projection as in `lpa`. The direction solves a linear
    system with five steps of conjugate gradients, which use finite differences of the features.

    Args:
      key, model, x, y, bound: as for `lpa`.
      steps: steps of the run.

    Returns:
      As `lpa`.

    Raises:
      UserError: as `fast_lpa`.
    """
    checks.check_integers(1, steps=steps)

    def search(problem, start):
        def step(_, images):
            return _project(problem, _first_order_step(problem, images, 2 * problem.bound / steps))

        return lax.fori_loop(0, steps, step, start)

    return _run(search, key, model, x, y, bound, _NOISE)


def check(bound: jax.Array | float) -> None:
    """Raises UserError for a bound that is not positive and finite."""
    if not 0 < checks.scalar("bound", bound, 1.0) < np.inf:
        raise UserError(f"bound={bound} must be positive and finite (0.5 is common).")


def check_settings(*, steps: int, step_size: float, penalty: float, noise: float) -> None:
    """Raises UserError for a setting of `fast_lpa` that is out of range."""
    checks.check_integers(1, steps=steps)
    checks.check_positive(step_size=step_size, penalty=penalty, noise=noise)


def _run(
    search: Search,
    key: jax.Array,
    model: Model,
    x: jax.Array,
    y: jax.Array,
    bound: jax.Array | float,
    noise: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Checks an attack's arguments, runs it from a random start, and measures its images."""
    check(bound)
    x, y = checks.as_images(jnp.asarray(x)), jnp.asarray(y)
    classes = checks.check_labels(y, x, lambda x: model(x)[0])
    x = checks.nan_if_invalid(x, y, classes)
    perceptual.check(jax.eval_shape(lambda x: model(x)[1], x))

    def on_devices(model, x, key, y, bound):
        model = checks.detached(model, x)
        logits, features = model(x)
        unit = perceptual.unit_features(features)
        problem = _Problem(model, x, y, bound, loops.misclassified(logits, y), unit)
        draw = lambda key: jax.random.normal(key, x.shape[1:], jnp.float32)  # noqa: E731
        images = search(problem, x + noise * jax.vmap(draw)(keys.of_batch(key, x)))
        distances, logits = _distances(problem, images)
        info = {"broken": loops.misclassified(logits, y), "distance": distances}
        return lax.stop_gradient((images, info))

    run = sharding.on_mesh(on_devices, model, x)
    return run(x, key, y.astype(jnp.int32), jnp.asarray(bound, jnp.float32))


def _distances(problem: _Problem, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distances [B] of images to the clean ones, and their logits [B,K]."""
    logits, features = problem.model(images)
    return perceptual.distance(perceptual.unit_features(features), problem.unit), logits


def _ascend(
    problem: _Problem,
    images: jax.Array,
    penalty: jax.Array | float,
    length: jax.Array | float,
    *,
    floor: float,
    kappa: float = np.inf,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of the Lagrangian attacks.

    Args:
      problem: the attack's.
      images: the iterates [B,H,W,C].
      penalty: weight of a distance's excess over the bound, a scalar or [B].
      length: LPIPS of the step.
      floor: added to the features' speed.
      kappa: margin above which there is nothing to gain.

    Returns:
      The next iterates, and of the given ones their distances to the clean images and whether they
      are misclassified.
    """

    def objective(images):
        logits, features = problem.model(images)
        unit = perceptual.unit_features(features)
        distances = perceptual.distance(unit, problem.unit)
        gain = jnp.minimum(losses.margin(logits, problem.y), kappa)
        value = gain - penalty * jax.nn.relu(distances - problem.bound)
        return value.sum(), (unit, distances, loops.misclassified(logits, problem.y))

    gradient, (unit, distances, wrong) = jax.grad(objective, has_aux=True)(images)
    gradient = geometry.finite(gradient)
    direction = gradient / geometry.along(geometry.size(gradient, "l2") + 1e-8, gradient)
    probed = perceptual.unit_features(problem.model(images + _PROBE * direction)[1])
    speed = perceptual.distance(probed, unit) / _PROBE
    step = direction * geometry.along(length / (speed + floor), direction)
    return jnp.clip(images + step, 0, 1), distances, wrong


def _first_order_step(problem: _Problem, images: jax.Array, length: jax.Array) -> jax.Array:
    """Moves along (J^T J)^-1 g until the features have moved by `length`, to first order.

    Here g is the margin's gradient and J the Jacobian of the unit features; both are per example.
    """

    def gain(images):
        return jnp.minimum(losses.margin(problem.model(images)[0], problem.y), _KAPPA).sum()

    def unit_of(images):
        return perceptual.unit_features(problem.model(images)[1])

    gradient = geometry.finite(jax.grad(gain)(images))
    unit, pull_back = jax.vjp(unit_of, images)

    def push(v):
        """J v, by a finite difference along v normalised."""
        norm = geometry.size(v, "l2")
        probed = unit_of(images + _CG_PROBE * geometry.normalise(v, "l2"))
        scale = lambda a, b: (a - b) * geometry.along(norm / _CG_PROBE, a)  # noqa: E731
        return jax.tree.map(scale, probed, unit)

    def conjugate_gradient(_, carry):
        solution, residual, v = carry
        product = pull_back(push(v))[0]
        before = _dot(residual, residual)
        along = lambda a: geometry.along(a, v)  # noqa: E731
        step = along(_ratio(before, _dot(v, product)))
        residual = residual - step * product
        v_next = residual + along(_ratio(_dot(residual, residual), before)) * v
        return solution + step * v, residual, v_next

    start = jnp.zeros_like(gradient), gradient, gradient
    direction, _, _ = lax.fori_loop(0, _CG_STEPS, conjugate_gradient, start)
    zero = jax.tree.map(jnp.zeros_like, unit)
    speed = perceptual.distance(push(direction), zero)
    # Without a gradient the image is not moved.
    scale = jnp.where(geometry.size(gradient, "l2") < 1e-4, 0, _ratio(length, speed))
    return jnp.clip(images + direction * geometry.along(scale, direction), 0, 1)


class _Moving(NamedTuple):
    active: jax.Array  # All arrays are [B, ...].
    x: jax.Array


class _Bisection(NamedTuple):
    active: jax.Array  # All arrays are [B, ...].
    inside: jax.Array  # The largest share of the movement known to be within the bound.
    outside: jax.Array


def _project(problem: _Problem, images: jax.Array) -> jax.Array:
    """Moves images that are outside of the bound to within it.

    At most ten steps of Newton's method go down the distance's gradient, beyond the bound by a
    tenth. Images that are still outside are replaced by a point of the line from the clean image to
    where they were at first, found by bisection.
    """

    def total(images):
        distances, _ = _distances(problem, images)
        return distances.sum(), distances

    def newton(_, examples, state):
        gradient, distances = jax.grad(total, has_aux=True)(state.x)
        outside = distances > problem.bound
        length = (distances - problem.bound + _OVERSHOOT) * (1 + _OVERSHOOT)
        step = gradient * geometry.along(_ratio(length, _dot(gradient, gradient)), gradient)
        moved = jnp.clip(state.x - step, 0, 1)
        return _Moving(outside, jnp.where(geometry.along(outside, moved), moved, state.x))

    def between(share):
        return problem.x + geometry.along(share, images) * (images - problem.x)

    def bisect(_, examples, state):
        middle = (state.inside + state.outside) / 2
        fits = _distances(problem, between(middle))[0] <= problem.bound
        inside = jnp.where(fits, middle, state.inside)
        return _Bisection(state.active, inside, jnp.where(fits, state.outside, middle))

    none = loops.zeros(images)
    moving = _Moving(none == 0, images)
    moved = loops.iterate(newton, {}, moving, _NEWTON_STEPS, len(images)).x
    outside = _distances(problem, moved)[0] > problem.bound
    share = _Bisection(outside, none, none + 1)
    share = loops.iterate(bisect, {}, share, _BISECTIONS, len(images)).inside
    return jnp.where(geometry.along(outside, moved), between(share), moved)


def _decay(i: jax.Array, steps: int) -> jax.Array:
    """0.1^(i / steps), in float32 also under x64."""
    return jnp.float32(0.1) ** (jnp.float32(i) / jnp.float32(steps))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The dot products [B] of two batches."""
    return jnp.sum(a * b, tuple(range(1, a.ndim)))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b; zero where b is not positive."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
