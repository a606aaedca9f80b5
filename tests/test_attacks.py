"""The attacks: what each promises, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import attacks, losses
from ada_jax.attacks import geometry
from ada_jax.attacks.apgd import checkpoints, dlr, dlr_targeted
from ada_jax.attacks.square import sides
from ada_jax.errors import UserError

BATCH, SIZE, CLASSES = 12, 6, 5
PIXELS = SIZE * SIZE * 3
EPSILON = {"linf": 0.02, "l2": 0.15}


def make_weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(PIXELS, 24), (24, CLASSES)]
    return [np.float32(rng.normal(size=s) / np.sqrt(s[0])) for s in shapes]


WEIGHTS = make_weights()


def classify(x: jax.Array) -> jax.Array:
    """A small network, smooth and not linear."""
    return 6 * jnp.tanh(3 * (x.reshape(len(x), -1) - 0.5) @ WEIGHTS[0]) @ WEIGHTS[1]


def batch(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Images that reach the box's sides, and the network's own labels but for one."""
    x = jnp.float32(np.random.default_rng(seed).uniform(0, 1, (BATCH, SIZE, SIZE, 3)))
    y = jnp.argmax(classify(x), -1)
    return x, y.at[0].set((y[0] + 1) % CLASSES)


def example_keys(seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), BATCH)


ATTACKS = {
    "pgd": functools.partial(attacks.pgd, norm="linf", restarts=2, stop_when_broken=True),
    "multitargeted": functools.partial(attacks.multitargeted, norm="l2", steps=20, restarts=1),
    "apgd": functools.partial(attacks.apgd, norm="l2", loss="ce", steps=30),
    "apgd-t": functools.partial(attacks.apgd, norm="linf", loss="dlr-targeted", steps=20),
    "fab": functools.partial(attacks.fab, norm="l2", steps=20),
    "square": functools.partial(attacks.square, norm="linf", queries=200),
    "square-l2": functools.partial(attacks.square, norm="l2", queries=200),
}
each_attack = pytest.mark.parametrize("name", list(ATTACKS))


def norm_of(name: str) -> str:
    return ATTACKS[name].keywords["norm"]


@functools.cache
def compiled(name: str):
    """Keys, images, labels, epsilon, mask -> images, info; the classifier takes four at a time."""

    def attack(keys, x, y, epsilon, mask):
        return ATTACKS[name](keys, classify, x, y, epsilon, mask=mask, microbatch=4)

    return jax.jit(attack)


def run(name: str, keys=None, x=None, y=None, epsilon=None, mask=None):
    (x0, y0), epsilon = batch(), epsilon or EPSILON[norm_of(name)]
    keys, x, y = (a if b is None else b for a, b in ((example_keys(), keys), (x0, x), (y0, y)))
    return compiled(name)(keys, x, y, epsilon, jnp.ones(BATCH, bool) if mask is None else mask)


# ------------------------------------------------------------------------------- every attack


@each_attack
def test_what_counts_as_broken_is_in_the_ball_in_the_box_and_misclassified(name):
    (x, y), norm = batch(), norm_of(name)
    images, info = run(name)
    assert (images.shape, images.dtype) == (x.shape, x.dtype)
    assert np.all((images >= 0) & (images <= 1))
    wrong = np.argmax(classify(images), -1) != y
    within = np.asarray(geometry.size(images - x, norm)) <= EPSILON[norm] + 1e-6
    np.testing.assert_array_equal(info["broken"], wrong & within)
    assert within.all() or name == "fab"
    assert 2 < info["broken"].sum() < BATCH


@each_attack
def test_an_examples_attack_depends_on_its_own_key_and_not_on_its_neighbours(name):
    (x, y), (other_x, other_y) = batch(), batch(1)
    images, info = run(name)
    same = np.arange(BATCH) % 3 == 0
    mix = lambda a, b: jnp.where(same.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    keys = jnp.where(same, example_keys(), example_keys(1))
    images_among_others, info_among_others = run(name, keys, mix(x, other_x), mix(y, other_y))
    np.testing.assert_allclose(images_among_others[same], images[same], atol=1e-5)
    np.testing.assert_array_equal(info_among_others["broken"][same], info["broken"][same])


@each_attack
def test_equal_keys_give_equal_images(name):
    np.testing.assert_array_equal(run(name)[0], run(name)[0])


@pytest.mark.parametrize("name", ["pgd", "multitargeted", "apgd", "apgd-t", "square", "square-l2"])
def test_other_keys_give_other_images(name):
    (first, info), (other, other_info) = run(name), run(name, example_keys(1))
    both = np.array(info["broken"] & other_info["broken"])
    both[0] = False  # Misclassified without an attack.
    assert np.any(first != other, axis=(1, 2, 3))[both].mean() > 0.5  # Corners coincide.


@each_attack
def test_masked_examples_stay_and_cost_nothing(name):
    mask = jnp.arange(BATCH) < 5
    (images, info), (all_images, _) = run(name, mask=mask), run(name)
    np.testing.assert_array_equal(images[5:], batch()[0][5:])
    np.testing.assert_allclose(images[:5], all_images[:5], atol=1e-5)
    assert not np.any(info["forward"][5:]) and not np.any(info["broken"][5:])


@each_attack
def test_the_cost_falls_as_examples_break(name):
    count = lambda epsilon: int(run(name, epsilon=epsilon)[1]["forward"].sum())  # noqa: E731
    assert count(1.0) < 0.5 * count(1e-3)


def test_passes_are_counted_as_they_are_made():
    """One example at a time, so that no microbatch is filled up."""
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(len(x)))
        return classify(x)

    attack = functools.partial(attacks.apgd, steps=10, microbatch=1)
    x, y = batch()
    _, info = jax.jit(lambda k: attack(k, counted, x, y, 0.02))(jax.random.key(0))
    jax.effects_barrier()
    assert sum(calls) == info["forward"].sum()
    np.testing.assert_array_equal(info["forward"], info["backward"] + 1)
    assert info["forward"][0] == 1 and info["forward"].max() == 12


def test_the_microbatch_changes_nothing():
    x, y = batch()
    attack = functools.partial(attacks.apgd, logits_fn=classify, x=x, y=y, epsilon=0.02, steps=10)
    results = [
        jax.jit(functools.partial(attack, microbatch=b))(jax.random.key(0)) for b in (5, None)
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)
    for name in ("broken", "forward"):
        np.testing.assert_array_equal(results[0][1][name], results[1][1][name])


def test_a_training_step_through_an_attack_has_no_gradient_from_it():
    x, y = batch()

    def loss(scale, images):
        return losses.cross_entropy(scale * classify(images), y).mean()

    def whole_step(scale):
        logits_fn = lambda images: scale * classify(images)  # noqa: E731
        images, _ = attacks.pgd(jax.random.key(0), logits_fn, x, y, 0.02, steps=3)
        return loss(scale, images), images

    gradient, images = jax.jit(jax.grad(whole_step, has_aux=True))(1.0)
    np.testing.assert_allclose(gradient, jax.grad(loss)(1.0, images), rtol=1e-4)


# ------------------------------------------------------------------------------- PGD


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_s_margin_is_of_the_best_of_its_runs(norm):
    x, y = batch()
    found = [
        attacks.square(example_keys(), classify, x, y, 0.02, norm=norm, queries=30, restarts=n)[1]
        for n in (1, 3)
    ]
    assert np.all(found[1]["margin"] >= found[0]["margin"])


def test_pgd_raises_the_loss_and_restarts_choose_the_largest_margin():
    x, y = batch()
    images, info = run("pgd")
    before, after = losses.margin(classify(x), y), losses.margin(classify(images), y)
    np.testing.assert_allclose(info["margin"], after, atol=1e-5)
    assert np.all(after[1:] > before[1:])  # The first stopped at its start.


# ------------------------------------------------------------------------------- APGD


def test_checkpoints():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_dlr_by_hand():
    logits, y = jnp.float32([[5.0, 1.0, 4.0, 2.0], [5.0, 1.0, 4.0, 2.0]]), jnp.array([0, 2])
    np.testing.assert_allclose(dlr(logits, y), [-1 / 3, 1 / 3], rtol=1e-6)
    expected = [(1 - 5) / (5 - 1.5), (1 - 4) / (5 - 1.5)]
    np.testing.assert_allclose(dlr_targeted(logits, y, jnp.array([1, 1])), expected, rtol=1e-6)


def literal_apgd(start, x, y, epsilon: float, steps: int) -> np.ndarray:
    """APGD on cross-entropy in linf for one example, written out from Croce and Hein's paper."""

    @jax.jit
    def evaluate(z):
        loss = lambda z: losses.cross_entropy(classify(z[None]), y[None])[0]  # noqa: E731
        return *jax.value_and_grad(loss)(z), jnp.argmax(classify(z[None])[0]) != y

    clip = lambda z: np.clip(np.clip(z, x - epsilon, x + epsilon), 0, 1)  # noqa: E731
    z = previous = best = start
    loss, gradient, wrong = (np.asarray(a) for a in evaluate(z))
    found = z if wrong else x
    best_loss, best_gradient, bar = loss, gradient, loss
    eta, reduced, history, last = 2 * epsilon, True, [0.0], 0
    for k in range(1, steps + 1):
        a = 0.75 if k > 1 else 1.0
        goal = clip(z + eta * np.sign(gradient))
        z, previous = clip(z + a * (goal - z) + (1 - a) * (z - previous)), z
        loss, gradient, wrong = (np.asarray(a) for a in evaluate(z))
        found = z if wrong else found
        history.append(loss)
        if loss > best_loss:
            best, best_loss, best_gradient = z, loss, gradient
        if k in checkpoints(steps):
            rises = np.sum(np.diff(history[last : k + 1]) > 0)
            halve = rises <= 0.75 * (k - last) or (not reduced and bar >= best_loss)
            if halve:
                eta, z, gradient = eta / 2, best, best_gradient
            reduced, bar, last = halve, best_loss, k
    return found


def test_apgd_equals_a_literal_statement():
    """The last misclassified iterate shows the whole path: steps, momentum, halving, restarts."""
    (x, y), epsilon, steps = batch(), np.float32(0.03), 40
    attack = functools.partial(attacks.apgd, steps=steps, stop_when_broken=False)
    images, info = jax.jit(lambda k: attack(k, classify, x, y, epsilon))(example_keys())
    starts = geometry.on_sphere(
        jax.vmap(lambda k: jax.random.fold_in(k, 0))(example_keys()), x, epsilon, "linf"
    )
    compared = np.flatnonzero(info["broken"])[1:5]
    assert len(compared) == 4
    for i in compared:
        expected = literal_apgd(*(np.asarray(a[i]) for a in (starts, x, y)), epsilon, steps)
        # Where a gradient is all but zero its sign is rounding's.
        assert np.mean(np.abs(images[i] - expected) > 1e-4) < 0.03


def test_too_few_classes_for_a_loss_are_refused():
    few = lambda x: classify(x)[:, :3]  # noqa: E731
    with pytest.raises(UserError, match="at least 4 classes and the classifier has 3"):
        attacks.apgd(jax.random.key(0), few, batch()[0], batch()[1] % 3, 0.1, loss="dlr-targeted")


# ------------------------------------------------------------------------------- FAB


def exact_distance(x, y, weights, norm: str) -> float:
    """From x to the nearest other class of a linear classifier, in the box, by bisection."""
    x = np.float64(x).ravel()
    logits, distances = (x - 0.5) @ weights, []
    for target in set(range(CLASSES)) - {y}:
        w, gap = weights[:, target] - weights[:, y], logits[y] - logits[target]
        room = np.where(w > 0, 1 - x, x)
        speed = np.abs(w) if norm == "l2" else np.ones_like(w)
        low, high = 0.0, 1e3
        for _ in range(100):
            t = (low + high) / 2
            reached = np.sum(np.abs(w) * np.minimum(room, t * speed)) >= gap
            low, high = (low, t) if reached else (t, high)
        distances.append(
            np.linalg.norm(np.minimum(room, high * speed), np.inf if norm == "linf" else 2)
        )
    return min(distances)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_finds_the_exact_distance_of_a_linear_classifier(norm):
    weights = np.random.default_rng(3).normal(size=(PIXELS, CLASSES))
    linear = lambda x: (x.reshape(len(x), -1) - 0.5) @ jnp.float32(weights)  # noqa: E731
    x, _ = batch()
    y = jnp.argmax(linear(x), -1)
    attack = functools.partial(attacks.fab, norm=norm, steps=30, stop_when_broken=False)
    _, info = jax.jit(lambda k: attack(k, linear, x, y, 0.1))(jax.random.key(0))
    exact = [exact_distance(x[i], int(y[i]), weights, norm) for i in range(BATCH)]
    np.testing.assert_allclose(info["distance"], exact, rtol=0.01)
    assert np.all(info["distance"] >= np.float32(exact) * (1 - 1e-4))


# ------------------------------------------------------------------------------- Square


def test_sides_of_the_squares():
    linf = sides(5000, (32, 32))
    changes = np.flatnonzero(np.diff(linf, prepend=0))
    assert changes.tolist() == [0, 11, 51, 201, 501, 1001, 2001, 4001]
    assert linf[changes].tolist() == [29, 20, 14, 10, 7, 5, 4, 3]
    assert sides(5000, (32, 32), norm="l2")[changes].tolist() == [29, 21, 15, 11, 7, 5, 5, 3]
    rescaled = sides(5000, (32, 32), rescale=True)
    np.testing.assert_array_equal(rescaled, sides(10_000, (32, 32))[::2])


def test_square_in_linf_moves_pixels_to_the_ends_of_their_range():
    x, _ = batch()
    images, info = run("square")
    delta = np.abs(images - x)[np.asarray(info["broken"])][1:]
    at_the_ball, at_the_box = np.abs(delta - 0.02) < 1e-6, (images == 0) | (images == 1)
    assert np.all(at_the_ball | at_the_box[np.asarray(info["broken"])][1:])


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd, attacks.fab, attacks.square])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"epsilon": float("nan")}, "epsilon=nan must be positive"),
        ({"epsilon": 8}, r"epsilon=8 is larger than the range \[0, 1\]: divide it by 255"),
        ({"epsilon": "8/255"}, "epsilon='8/255' must be one number"),
        ({"norm": "l1"}, "norm='l1' is unknown: choose one of linf, l2"),
        ({"restarts": 0}, "restarts=0 must be an integer of at least 1"),
        ({"x": 255 * batch()[0]}, "Pixels from .* must be in"),
        ({"x": batch()[0][0]}, r"shape \[6, 6, 3\]"),
        ({"microbatch": 0}, "microbatch=0"),
        ({"y": batch()[1] + 10}, "Labels from .* do not fit"),
        ({"y": batch()[1][:-1]}, "must be one integer for each"),
        ({"mask": np.ones(3, bool)}, r"mask is bool\[3\]: give one bool for each of the"),
        ({"mask": np.ones(len(batch()[1]), np.uint8)}, r"mask is uint8\[\d+\]: give one bool"),
    ],
    ids=str,
)
def test_what_no_attack_can_work_with_is_named(attack, changed, message):
    x, y = batch()
    arguments = {"key": jax.random.key(0), "x": x, "y": y, "epsilon": 0.1} | changed
    with pytest.raises(UserError, match=message):
        attack(logits_fn=classify, **arguments)


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        (attacks.pgd, {"step_size": -0.003}),
        (attacks.pgd, {"step_size": float("nan")}),
        (attacks.multitargeted, {"step_size": -0.1}),
        (attacks.apgd, {"rho": float("nan")}),
        (attacks.fab, {"eta": -1.0}),
        (attacks.square, {"p_init": -1.0}),
        (attacks.square, {"p_init": 1.5}),
    ],
)
def test_a_number_out_of_range_does_not_weaken_an_attack_unnoticed(attack, options):
    x, y = batch()
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value} must be"):
        attack(jax.random.key(0), classify, x, y, 0.1, **options)
