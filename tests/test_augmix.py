"""AugMix against Pillow, operation by operation, and its draws against the published ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from PIL import Image

from ada_jax.augment import augmix
from ada_jax.errors import UserError
from tests.conftest import pillow

EVERY = (*augmix.OPS, *augmix.EXTRA_OPS)
APPLY = jax.jit(lambda *a: augmix.apply_ops(*a, ops=EVERY))
INEXACT = ("rotate", "shear_x", "shear_y")  # float64 in Pillow


def amount(name: str, level: float, sign: float, height: int = 32, width: int = 32) -> float:
    """The published augmentation's, in Pillow's units."""
    amounts = {
        "posterize": 4 - int(level * 4 / 10),
        "rotate": sign * int(level * 3),
        "solarize": 256 - int(level * 256 / 10),
        "shear_x": sign * level * 0.03,
        "shear_y": sign * level * 0.03,
        "translate_x": sign * int(level * (width / 3) / 10),
        "translate_y": sign * int(level * (height / 3) / 10),
    }
    return amounts.get(name, level * 1.8 / 10 + 0.1)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """1,000 images of 32x32: noise of several ranges, flat ones, photographs."""
    rng = np.random.default_rng(0)
    noise = [
        rng.integers(low, high + 1, (100, 32, 32, 3))
        for low, high in ((0, 255), (40, 60), (200, 255), (7, 7))
    ]
    few = rng.choice([0, 3, 250], (100, 32, 32, 3), p=[0.1, 0.8, 0.1])
    photo, cuts = skimage.data.astronaut(), rng.integers(0, 480, (500, 2))
    real = np.stack([photo[i : i + 32, j : j + 32] for i, j in cuts])
    return np.concatenate([*noise, few, real]).astype(np.uint8)


def levels_of(name: str) -> np.ndarray:
    """Levels in 0.1..3 on both sides of each step of an operation's own scale."""
    steps = {
        "posterize": 2.5,
        "rotate": 1 / 3,
        "solarize": 10 / 256,
        "translate_x": 30 / 32,
        "translate_y": 30 / 32,
    }
    edges = np.arange(1, 100) * steps.get(name, 0.2)
    edges = edges[edges < 3]
    return np.float32(np.unique(np.clip(np.concatenate([edges - 1e-3, edges + 1e-3]), 0.1, 3)))


@pytest.mark.accelerator
@pytest.mark.parametrize("name", EVERY)
def test_every_operation_is_pillows_at_every_level(name, images):
    levels = np.resize(levels_of(name), len(images))
    signs = np.where(np.arange(len(images)) // len(levels_of(name)) % 2, -1.0, 1.0)
    op = jnp.full(len(images), EVERY.index(name))
    ours = APPLY(jnp.asarray(images, jnp.int32), op, jnp.asarray(levels), jnp.float32(signs))
    amounts = [amount(name, *a) for a in zip(levels.tolist(), signs, strict=True)]
    theirs = [pillow(name, *a) for a in zip(images, amounts, strict=True)]
    difference = np.abs(np.asarray(ours) - np.stack(theirs))
    if name in INEXACT:
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
    else:
        assert difference.max() == 0


def test_the_vectorised_program_equals_the_cpus(images):
    """What TPUs and GPUs run: all operations, one selected."""
    some = jnp.asarray(images[::40], jnp.int32)
    op, level = jnp.arange(len(some)) % len(EVERY), jnp.linspace(0.1, 3, len(some))
    one = lambda *a: augmix._apply_one(*a, ops=EVERY)  # noqa: E731
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(one))(some, op, level, jnp.ones(len(some))),
        APPLY(some, op, level, jnp.ones(len(some))),
    )


@pytest.mark.accelerator
def test_other_sizes_are_pillows_too():
    image = skimage.data.astronaut()[100:140, 200:248]
    for name in ("rotate", "translate_x", "translate_y", "equalize", "sharpness"):
        args = (jnp.asarray(image, jnp.int32)[None], *(jnp.float32([v]) for v in (2.2, -1)))
        ours = augmix.apply_ops(args[0], jnp.array([0]), *args[1:], ops=(name,))[0]
        theirs = pillow(name, image, amount(name, 2.2, -1, *image.shape[:2]))
        assert np.abs(np.asarray(ours) - theirs).max() <= (name == "rotate")


@pytest.mark.parametrize("turn", [-1.0, 1.0])
def test_quarter_turns_are_pillows(turn):
    image = skimage.data.astronaut()[100:132, 200:232]
    turned = augmix.apply_ops(
        jnp.asarray(image, jnp.int32)[None],
        jnp.array([0]),
        jnp.float32([30]),
        jnp.float32([turn]),
        ops=("rotate",),
    )[0]
    theirs = Image.fromarray(image).rotate(90 * turn, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(turned, theirs)


# ------------------------------------------------------------------------------- the mixture


def test_white_stays_in_range():
    x = jnp.ones((2000, 2, 2, 3))
    mix = jax.jit(lambda key: augmix.augment_and_mix(key, x, ops=("autocontrast",)))
    assert mix(jax.random.key(0)).max() <= 1


def test_levels_are_drawn_as_published():
    """Shares of the levels of three operations at severity 3."""
    x = jnp.full((6000, 4, 4, 3), 248 / 255)
    # 4 bits keep 240 of 248, 3 bits 224; a large alpha mixes half and half.
    f = lambda key: augmix.augment_and_mix(  # noqa: E731
        key, x, width=1, depth=1, alpha=1e6, ops=("posterize",)
    )
    mixed = 255 * np.asarray(jax.jit(f)(jax.random.key(0))[:, 0, 0, 0])
    assert np.mean(mixed < 240) == pytest.approx(0.172, abs=0.02)
    assert np.mean(np.abs(mixed - 244) < 0.5) == pytest.approx(0.828, abs=0.02)


def test_translations_are_drawn_as_published():
    ramp = jnp.broadcast_to(8 * jnp.arange(32.0)[None, :, None] / 255, (6000, 1, 32, 3))
    f = lambda key: augmix.augment_and_mix(  # noqa: E731
        key, ramp, width=1, depth=1, alpha=1e6, ops=("translate_x",)
    )
    mixed = 255 * np.asarray(jax.jit(f)(jax.random.key(0))[:, 0, 16, 0])
    # Half of the mixture is the ramp itself, which rises by 8 a pixel.
    shift = np.round((2 * mixed - 8 * 16) / 8 - 16).astype(int)
    shares = [np.mean(np.abs(shift) == pixels) for pixels in range(4)]
    assert shares == pytest.approx([0.289, 0.323, 0.323, 0.065], abs=0.025)
    assert np.mean(shift > 0) == pytest.approx(np.mean(shift < 0), abs=0.04)


def test_rotations_are_drawn_as_published(images):
    x = jnp.broadcast_to(jnp.float32(images[500]) / 255, (3000, 32, 32, 3))
    f = lambda key: augmix.augment_and_mix(  # noqa: E731
        key, x, width=1, depth=1, alpha=1e6, ops=("rotate",)
    )
    moved = np.abs(np.asarray(jax.jit(f)(jax.random.key(0)) - x)).max((1, 2, 3))
    assert np.mean(moved < 1e-3) == pytest.approx(0.08, abs=0.02)  # int(3 s) is 0


@pytest.fixture(scope="module")
def drawn():
    """What a solarised white image shows: 0 in a chain, so the mixture's share can be read off."""
    x = jnp.ones((3000, 4, 4, 3))
    f = jax.jit(lambda key: augmix.augment_and_mix(key, x, depth=1, ops=("solarize",)))
    return 1 - np.asarray(f(jax.random.key(1))[:, 0, 0, 0])


def test_the_share_of_the_mixture_is_uniform(drawn):
    assert np.quantile(drawn, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.04)


def test_the_weights_of_chains_are_uniform():
    """A chain of a white image is black if it draws 'solarize', so 1 - image is the sum of these
    chains' weights times the mixture's share."""
    x = jnp.ones((6000, 4, 4, 3))
    settings = {"width": 2, "depth": 1, "ops": ("solarize", "autocontrast")}
    f = jax.jit(lambda key: augmix.augment_and_mix(key, x, **settings))
    black = 1 - np.asarray(f(jax.random.key(0))[:, 0, 0, 0])
    # No chain is black with probability 1/4, both 1/4, one 1/2; its weight is uniform.
    expected = 1 / 4 + 1 / 4 * 0.25 + 1 / 2 * 0.25 * (1 + np.log(4))
    assert np.mean(black < 0.25) == pytest.approx(expected, abs=0.025)  # 0.5625 for equal weights


def test_the_depth_of_a_chain_is_one_two_or_three():
    """At severity 0.1 brightness multiplies by 0.118, and a large alpha mixes half and half."""
    x = jnp.ones((3000, 4, 4, 3))

    def shown(depth):
        f = lambda key: augmix.augment_and_mix(  # noqa: E731
            key, x, severity=0.1, width=1, depth=depth, alpha=1e6, ops=("brightness",)
        )
        mixed = np.asarray(jax.jit(f)(jax.random.key(2))[:, 0, 0, 0])
        return np.round(255 * (2 * mixed - 1)).astype(int)

    values, counts = np.unique(shown(-1), return_counts=True)
    near = {30: 1, 3: 2, 0: 3}
    seen = {d: counts[np.abs(values - v) <= 1].sum() / 3000 for v, d in near.items()}
    assert seen == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1 / 3}, abs=0.04)
    assert np.abs(shown(2) - 3).max() <= 1


def test_an_example_does_not_depend_on_its_neighbours_and_stays_in_range(images):
    x, f = jnp.float32(images[500:516]) / 255, jax.jit(augmix.augment_and_mix)
    key = jax.random.split(jax.random.key(0), len(x))
    mixed, turned = f(key, x), f(key[::-1], x[::-1])
    np.testing.assert_allclose(turned[::-1], mixed, atol=1e-6)
    others = f(key.at[8:].set(key[:8]), x.at[8:].set(x[:8]))
    np.testing.assert_allclose(others[:8], mixed[:8], atol=1e-6)
    assert mixed.min() >= 0 and mixed.max() <= 1 + 1e-6
    assert np.abs(mixed - x).mean() > 0.01


def test_without_any_operation_drawn_an_image_on_the_grid_comes_back():
    x = jnp.round(255 * jax.random.uniform(jax.random.key(0), (4, 16, 16, 3))) / 255
    chains = augmix.apply_ops(
        jnp.int32(255 * x + 0.5), jnp.zeros(4, int), jnp.ones(4), jnp.ones(4), ops=("", "solarize")
    )
    np.testing.assert_array_equal(chains, jnp.round(255 * x))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("severity", 0.0, "severity=0.0 must be in"),
        ("width", 0, "width=0"),
        ("depth", 0, "depth=0"),
        ("alpha", 0.0, "alpha=0.0 must be positive"),
        ("ops", ("blur",), "unknown operation 'blur'"),
        ("ops", (), "ops is empty"),
    ],
)
def test_mistakes_are_told(field, value, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        augmix.augment_and_mix(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), **{field: value})


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (jnp.zeros((1, 8, 8, 3), jnp.uint8), "divide by 255"),
        (jnp.full((1, 8, 8, 3), 200.0), "must be in"),
        (jnp.zeros((1, 8, 8, 1)), "three channels"),
    ],
)
def test_invalid_images_are_rejected(images, said):
    with pytest.raises(UserError, match=said):
        augmix.augment_and_mix(jax.random.key(0), images)


def test_inside_jit_a_wrong_image_becomes_nan():
    x = jnp.stack([jnp.full((8, 8, 3), 0.5), jnp.full((8, 8, 3), 2.0)])
    mixed = jax.jit(augmix.augment_and_mix)(jax.random.key(0), x)
    assert np.isnan(mixed).all((1, 2, 3)).tolist() == [False, True]
