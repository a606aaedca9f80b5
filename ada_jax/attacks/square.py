"""Square Attack: random search with square-shaped updates, without gradients.

Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via
random search" (2020), with the details of AutoAttack's version.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import checks, keys
from ada_jax.attacks import geometry, loops
from ada_jax.attacks.loops import LogitsFn
from ada_jax.errors import UserError

# The share of pixels in a square, initially p_init, is halved after these of 10,000 iterations.
_HALVE_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class _State(NamedTuple):
    active: jax.Array  # All arrays are [B, ...].
    broken: jax.Array
    x: jax.Array  # The best image so far.
    margin: jax.Array  # Its margin: largest wrong logit minus true one.
    passes: jax.Array


@functools.partial(loops.attack, gradients=False)
def square(
    key: jax.Array,
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    epsilon: jax.Array | float,
    *,
    norm: str = "linf",
    queries: int = 5000,
    restarts: int = 1,
    p_init: float = 0.8,
    rescale_schedule: bool = False,
    mask: jax.Array | None = None,
    microbatch: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Square Attack on the margin; every example draws its own squares and stops when broken.

    Args:
      key, logits_fn, x, y, epsilon, norm, mask, microbatch: as for `attacks.pgd`.
      queries: number of squares to try, after the start.
      restarts: number of runs.
      p_init: share of the image's pixels that the first squares cover.
      rescale_schedule: whether to rescale the schedule of 10,000 queries to `queries`; AutoAttack
        does not.

    Returns:
      Images [B,H,W,C] in the ball and in [0,1], misclassified or equal to x, and, per example [B]:
      'broken', the 'margin' of the best image found (positive if broken) and the number of passes
      'forward'.

    Raises:
      UserError: an argument is out of range.
    """
    checks.check_integers(1, queries=queries, restarts=restarts)
    checks.check_positive(p_init=p_init)
    if p_init > 1:
        raise UserError(f"p_init={p_init} must be a share of the pixels, at most 1.")
    logits_fn, mask, microbatch = loops.prepare(logits_fn, x, mask, microbatch)
    example_keys = keys.of_batch(key, x)
    schedule = sides(queries, x.shape[1:3], norm=norm, p_init=p_init, rescale=rescale_schedule)
    tiles = _tile_table(np.unique(schedule)) if norm == "l2" else None
    schedule = jnp.asarray(schedule)
    logits = loops.logits_of(logits_fn, x, mask, microbatch)

    propose = _proposal(norm, epsilon, schedule, tiles)

    def step(i, examples, state):
        candidate = jax.vmap(propose, (None, 0, 0, 0))(i, examples["key"], examples["x"], state.x)
        logits = logits_fn(candidate)
        margin = loops.margin(logits, examples["y"])
        wrong = loops.misclassified(logits, examples["y"])
        better = wrong | (margin > state.margin)
        return state._replace(
            active=~wrong,
            broken=wrong,
            x=jnp.where(geometry.along(better, x), candidate, state.x),
            margin=jnp.where(better, margin, state.margin),
            passes=state.passes + 1,
        )

    def one_run(run, state):
        run_keys = jax.vmap(lambda k: jax.random.fold_in(k, run))(example_keys)
        before = state.margin
        state = state._replace(margin=jnp.where(state.active, -jnp.inf, before))
        examples = {"key": run_keys, "x": x, "y": y}
        state = loops.iterate(step, examples, state, queries + 1, microbatch)
        return state._replace(margin=jnp.maximum(state.margin, before))

    wrong = mask & loops.misclassified(logits, y)
    start = _State(mask & ~wrong, wrong, x, loops.margin(logits, y), mask.astype(jnp.int32))
    state = loops.repeat(one_run, restarts, start)
    images = jnp.where(geometry.along(state.broken, x), state.x, x)
    info = {"broken": state.broken, "margin": state.margin, "forward": state.passes}
    return lax.stop_gradient((images, info))


def _proposal(
    norm: str, epsilon: jax.Array | float, schedule: jax.Array, tiles: Any
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Makes the function that proposes image i of an example: the start, then new squares."""
    first, change = (_stripes, _change_linf) if norm == "linf" else (_grid, _change_l2)

    def propose(i: jax.Array, key: jax.Array, x: jax.Array, best: jax.Array) -> jax.Array:
        # One draw for all purposes: each call of jax.random adds to the compile time.
        numbers = jax.random.uniform(
            jax.random.fold_in(key, i), (_most_numbers(x.shape),), jnp.float32
        )
        return lax.cond(
            i == 0,
            lambda: first(numbers, x, epsilon),
            lambda: change(numbers, x, best, epsilon, schedule[i - 1], tiles),
        )

    return propose


def sides(
    queries: int,
    image: tuple[int, int],
    *,
    norm: str = "linf",
    p_init: float = 0.8,
    rescale: bool = False,
) -> np.ndarray:
    """The side of the square in every iteration, int [queries], in pixels.

    Args:
      queries: number of iterations.
      image: height and width.
      norm: for 'l2' sides are odd and at least 3.
      p_init: share of the image's pixels that the first squares cover.
      rescale: whether to stretch or shrink the schedule of 10,000 iterations to `queries`.
    """
    iterations = np.arange(queries)
    if rescale:
        iterations = (iterations / queries * 10_000).astype(int)
    p = p_init / 2.0 ** np.searchsorted(_HALVE_AFTER, iterations)
    side = np.rint(np.sqrt(p * math.prod(image))).astype(np.int32)
    side = np.maximum(side, 1) if norm == "linf" else np.maximum(side, 3) // 2 * 2 + 1
    return np.minimum(side, min(image))


def _stripes(numbers: jax.Array, x: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """The start in linf: one sign for every column and channel."""
    return jnp.clip(x + epsilon * _signs(numbers, (1, *x.shape[1:])), 0, 1)


def _change_linf(
    numbers: jax.Array,
    x: jax.Array,
    best: jax.Array,
    epsilon: jax.Array | float,
    side: jax.Array,
    tiles: None,
) -> jax.Array:
    """Shifts a square by 2 epsilon, up or down in each channel, and clips."""
    inside, _ = _window(numbers[:2], x.shape, side)
    shift = 2 * epsilon * _signs(numbers[2:], (1, 1, x.shape[-1]))
    moved = jnp.where(inside, best + shift, best)
    return geometry.project(moved[None], x[None], epsilon, "linf")[0]


def _grid(numbers: jax.Array, x: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """The start in l2: a grid of tiles, about five in a row, each with a sign per channel."""
    height, width, channels = x.shape
    side = max(1, min(height, width) // 5)
    rows, columns = height // side, width // side
    signs = _signs(numbers, (rows, 1, columns, 1, channels))
    turned = _signs(numbers[signs.size :], (rows, 1, columns, 1, 1)) > 0
    tile = jnp.asarray(_tile(side))
    tile, tile_turned = (t[None, :, None, :, None] for t in (tile, tile.T))
    tiles = (jnp.where(turned, tile_turned, tile) * signs).reshape(rows * side, -1, channels)
    borders = [(gap // 2, gap - gap // 2) for gap in (height % side, width % side)]
    return _at_radius(jnp.pad(tiles, (*borders, (0, 0))), x, epsilon)


def _change_l2(
    numbers: jax.Array,
    x: jax.Array,
    best: jax.Array,
    epsilon: jax.Array | float,
    side: jax.Array,
    tiles: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Moves the l2 budget of one window to another, where a tile is added."""
    into, corner = _window(numbers[:2], x.shape, side)
    out_of, _ = _window(numbers[2:4], x.shape, side)
    tile = _placed_tile(tiles, side, corner, x.shape, numbers[4] > 0.5)
    delta = best - x
    norm = lambda a: jnp.sqrt(jnp.sum(a**2, (0, 1)))  # noqa: E731  Per channel.
    old = jnp.where(into, delta, 0)
    new = tile * _signs(numbers[5:], (1, 1, x.shape[-1])) + old / (1e-12 + norm(old))
    unused = jnp.maximum(epsilon**2 - jnp.sum(delta**2), 0) / x.shape[-1]
    budget = jnp.sqrt(unused + norm(jnp.where(into | out_of, delta, 0)) ** 2)
    new = new / (1e-12 + norm(new)) * budget
    return _at_radius(jnp.where(into, new, jnp.where(out_of, 0, delta)), x, epsilon)


def _at_radius(delta: jax.Array, x: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """x + delta [H,W,C] on the l2 ball's surface, clipped to the box."""
    return jnp.clip(x + epsilon * geometry.normalise(delta[None], "l2")[0], 0, 1)


def _window(
    numbers: jax.Array, shape: tuple[int, ...], side: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mask [H,W,1] and corner [2] of a square at a position given by numbers [2] in [0,1).

    As published, the last row and the last column are never reached.
    """
    corner = (numbers * (jnp.asarray(shape[:2], jnp.int32) - side)).astype(jnp.int32)
    inside = [
        (jnp.arange(n) >= first) & (jnp.arange(n) < first + side)
        for n, first in zip(shape[:2], corner, strict=True)
    ]
    return (inside[0][:, None] & inside[1])[..., None], corner


def _most_numbers(shape: tuple[int, ...]) -> int:
    """The largest number of random numbers that a start or a change needs."""
    height, width, channels = shape
    side = max(1, min(height, width) // 5)
    return max(width * channels, (height // side) * (width // side) * (channels + 1), channels + 5)


def _signs(numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Converts the first of the numbers in [0,1) to signs of this shape, -1 or 1."""
    signs = jnp.where(numbers[: math.prod(shape)] < 0.5, -1.0, 1.0)
    return signs.astype(jnp.float32).reshape(shape)


def _tile(side: int) -> np.ndarray:
    """Two opposite bumps of joint unit norm, [side, side] (Andriushchenko et al., eq. 2)."""
    upper = side // 2
    tile = np.concatenate([_bump(upper, side), -_bump(side - upper, side)])
    return np.float32(tile / np.sqrt(np.sum(tile**2)))


def _bump(height: int, width: int) -> np.ndarray:
    """A sum of centred squares of growing size and decreasing weight, of unit norm."""
    bump = np.zeros((height, width))
    if height:
        row, column = height // 2, width // 2
        for i in range(max(height, width) // 2 + 1):
            rows = slice(max(row - i, 0), row + i + 1)
            bump[rows, max(column - i, 0) : column + i + 1] += 1 / (i + 1) ** 2
        bump /= np.sqrt(np.sum(bump**2))
    return bump


def _tile_table(all_sides: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Sides [S] and their tiles [S, largest, largest], padded with zeros."""
    largest = all_sides.max()
    tiles = [np.pad(_tile(s), (0, largest - s)) for s in all_sides]
    return jnp.asarray(all_sides), jnp.asarray(np.stack(tiles))


def _placed_tile(
    tiles: tuple[jax.Array, jax.Array],
    side: jax.Array,
    corner: jax.Array,
    shape: tuple[int, ...],
    turned: jax.Array,
) -> jax.Array:
    """An image of zeros [H,W,1] with the tile of this side at this corner."""
    all_sides, table = tiles
    tile = table[jnp.argmax(all_sides == side)]
    tile = jnp.where(turned, tile.T, tile)
    largest = tile.shape[0]
    canvas = jnp.zeros((shape[0] + largest, shape[1] + largest), jnp.float32)
    return lax.dynamic_update_slice(canvas, tile, tuple(corner))[: shape[0], : shape[1], None]
