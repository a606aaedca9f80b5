"""SSIM against scikit-image, the line search against a literal statement of appendix G."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_jax import ssim
from ada_jax.errors import UserError

SIZE, THRESHOLD = 16, 0.3
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
floats = st.floats(0, 1, width=32)
similarity = jax.jit(ssim.ssim)
along_ray = jax.jit(lambda a, b: ssim._along_ray(a, b, jnp.asarray(ssim.GAMMAS)))
line_search = jax.jit(ssim.line_search, static_argnames="rule")


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One pair of images by scikit-image.

    truncate = 3.5 gives its window the radius 5, and it averages the map without a border of 5:
    11x11 windows, whole ones only.
    """
    return skimage.metrics.structural_similarity(
        np.asarray(a, np.float64),
        np.asarray(b, np.float64),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=-1,
    )


def smooth_image(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """A random colour image with the 1/f spectrum of photographs."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    noise = 0.7 * rng.normal(size=(size, size, 1)) + 0.3 * rng.normal(size=(size, size, 3))
    spectrum = np.fft.rfft2(noise, axes=(0, 1)) / frequency[:, :, None] ** rng.uniform(1, 1.5)
    image = np.fft.irfft2(spectrum, (size, size), axes=(0, 1))
    return np.clip(image / image.std() * rng.uniform(0.1, 0.25) + rng.uniform(0.3, 0.7), 0, 1)


def checkerboard(image: np.ndarray) -> np.ndarray:
    return (np.indices(image.shape[:2]).sum(0) % 2 * 2.0 - 1)[..., None]


CORRUPTIONS = {
    "noise": lambda rng, x: x + rng.uniform(0.1, 1) * rng.normal(size=x.shape),
    "blur": lambda rng, x: scipy.ndimage.gaussian_filter(x, rng.uniform(1, 6), axes=(0, 1)),
    "inversion": lambda rng, x: 1 - x,
    "constant": lambda rng, x: np.broadcast_to(rng.uniform(0, 1, 3), x.shape),
    "colour shift": lambda rng, x: x + rng.uniform(-1, 1, 3),
    "checkerboard": lambda rng, x: x + rng.uniform(0.1, 1) * checkerboard(x),
}


@functools.cache
def pairs(kind: str, n: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    clean = [smooth_image(rng) for _ in range(n)]
    corrupted = [np.clip(CORRUPTIONS[kind](rng, x), 0, 1) for x in clean]
    return np.float32(clean), np.float32(corrupted)


def every_pair() -> tuple[np.ndarray, np.ndarray]:
    clean, corrupted = zip(*(pairs(kind) for kind in CORRUPTIONS), strict=True)
    return np.concatenate(clean), np.concatenate(corrupted)


# ------------------------------------------------------------------------------- SSIM


@pytest.mark.accelerator
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_ssim_equals_scikit_image(kind):
    clean, corrupted = pairs(kind)
    expected = [reference_ssim(a, b) for a, b in zip(clean, corrupted, strict=True)]
    np.testing.assert_allclose(similarity(clean, corrupted), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(11, 11, 3), (11, 24, 1), (33, 12, 4)])
def test_ssim_equals_scikit_image_for_other_shapes(shape):
    a, b = np.random.default_rng(0).uniform(size=(2, 3, *shape)).astype(np.float32)
    expected = [reference_ssim(*pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(similarity(a, b), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 9, 10])
def test_images_smaller_than_the_window_are_refused(size):
    with pytest.raises(UserError, match="11"):
        ssim.ssim(jnp.zeros((1, 16, size, 3)), jnp.zeros((1, 16, size, 3)))


def test_an_image_is_wholly_similar_to_itself():
    clean, _ = every_pair()
    np.testing.assert_allclose(similarity(clean, clean), 1, atol=1e-6)


@quick
@given(floats, floats)
def test_ssim_of_two_flat_images_is_the_luminance_term(a, b):
    value = similarity(*np.full((2, 1, 11, 11, 3), np.float32([a, b]).reshape(2, 1, 1, 1, 1)))
    expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-5)


def test_ssim_is_symmetric_and_at_most_one():
    clean, corrupted = every_pair()
    values = similarity(clean, corrupted)
    np.testing.assert_allclose(values, similarity(corrupted, clean), atol=1e-5)
    assert np.all(np.abs(values) <= 1 + 1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gradients_are_finite_on_flat_images(value):
    flat, other = jnp.full((1, 12, 12, 3), value), jnp.full((1, 12, 12, 3), 0.3)
    gradients = jax.jit(jax.grad(lambda a, b: ssim.ssim(a, b).sum(), (0, 1)))
    for a, b in [(flat, flat), (flat, other), (other, flat)]:
        assert np.all(np.isfinite(gradients(a, b)))


def test_the_values_along_the_ray_are_those_of_the_blended_images():
    clean, corrupted = every_pair()
    values = along_ray(clean, corrupted)
    for k in range(9):
        blend = (1 - k / 8) * clean + k / 8 * corrupted
        np.testing.assert_allclose(values[:, k], similarity(clean, blend), atol=1e-5)


# ------------------------------------------------------------------------------- line search


@quick
@given(
    st.sampled_from([("in_range", 0.15, 0.2), ("interpolated", 0.05, 0.05)]),
    st.sampled_from(sorted(CORRUPTIONS)),
    seeds,
)
def test_the_result_is_as_similar_as_the_threshold_up_to_the_error_of_the_fit(rule, kind, seed):
    rule, below, above = rule
    clean, corrupted = pairs(kind, 4, seed)
    images, info = line_search(clean, corrupted, THRESHOLD, rule=rule)
    after = np.asarray(similarity(clean, images))
    assert np.all(after >= THRESHOLD - below)
    assert np.all(after[np.asarray(info["changed"]) == 1] <= THRESHOLD + above)


@pytest.mark.parametrize("rule", ssim.ROOT_RULES)
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.6])
def test_similar_images_come_out_bitwise_untouched(rule, threshold):
    clean, corrupted = every_pair()
    images, info = line_search(clean, corrupted, threshold, rule=rule)
    before = np.asarray(similarity(clean, corrupted))
    np.testing.assert_allclose(info["ssim_before"], before, atol=1e-6)
    changed = np.asarray(info["ssim_before"]) < threshold
    assert changed.any() == (threshold > 0)
    assert not changed.all()
    np.testing.assert_array_equal(info["changed"], changed)
    np.testing.assert_array_equal(np.asarray(images)[~changed], corrupted[~changed])
    np.testing.assert_array_equal(np.asarray(info["gamma"])[~changed], 1)


@pytest.mark.parametrize("rule", ssim.ROOT_RULES)
def test_the_result_lies_on_the_ray_between_the_images(rule):
    clean, corrupted = every_pair()
    images, info = line_search(clean, corrupted, THRESHOLD, rule=rule)
    gamma = np.asarray(info["gamma"])
    assert np.all((gamma >= 0) & (gamma <= 1))
    assert np.all((images >= 0) & (images <= 1))
    blend = clean + gamma[:, None, None, None] * (corrupted - clean)
    np.testing.assert_allclose(images, blend, atol=1e-6)


@pytest.mark.accelerator
@pytest.mark.parametrize("rule", ssim.ROOT_RULES)
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_gamma_equals_a_literal_statement_in_numpy(rule, threshold):
    clean, corrupted = every_pair()
    _, info = line_search(clean, corrupted, threshold, rule=rule)
    for x, y, gamma in zip(clean, corrupted, info["gamma"], strict=True):
        np.testing.assert_allclose(gamma, literal_gamma(x, y, threshold, rule), atol=2e-3)


def literal_gamma(x: np.ndarray, y: np.ndarray, threshold: float, rule: str) -> float:
    """Appendix G on similarities; of a complex pair of roots the real part is taken."""
    gammas = np.linspace(0, 1, 9)
    values = np.array([reference_ssim(x, (1 - g) * x + g * y) for g in gammas])
    if values[-1] >= threshold:
        return 1.0
    if rule == "interpolated":
        last = np.flatnonzero(values >= threshold)[-1]
        return np.interp(threshold, values[[last + 1, last]], gammas[[last + 1, last]])
    roots = np.roots(np.polyfit(gammas, values - threshold, 2))
    if rule == "paper":
        return max(np.clip(roots.real, 0, 1))
    inside = [r.real for r in roots if r.imag == 0 and 0 <= r.real <= 1]
    return max(inside) if inside else max(gammas[values >= threshold])


def test_the_papers_rule_leaves_convex_cases_uncorrected():
    """The second root of a convex fit lies past 1, is clipped to 1 and chosen."""
    clean, corrupted = every_pair()
    images, info = line_search(clean, corrupted, THRESHOLD, rule="paper")
    curves = np.asarray(along_ray(clean, corrupted))
    a, b, c = np.polyfit(ssim.GAMMAS, curves.T - THRESHOLD, 2)
    root = (-b + np.sqrt(np.maximum(b * b - 4 * a * c, 0))) / (2 * a)
    convex = (np.asarray(info["changed"]) == 1) & (a > 0) & (root > 1)
    assert convex.any()
    np.testing.assert_array_equal(np.asarray(info["gamma"])[convex], 1)
    np.testing.assert_allclose(np.asarray(images)[convex], corrupted[convex], atol=1e-6)
    _, corrected = line_search(clean, corrupted, THRESHOLD, rule="in_range")
    assert np.all(np.asarray(corrected["gamma"])[convex] < 1)


@pytest.mark.parametrize("rule", ssim.ROOT_RULES)
def test_flat_images_give_no_nan(rule):
    levels = np.float32([0, 0.001, 0.5, 1])
    a, b = (np.ravel(g)[:, None, None, None] for g in np.meshgrid(levels, levels))
    ones = np.ones((1, 11, 11, 3), np.float32)
    images, info = line_search(a * ones, b * ones, THRESHOLD, rule=rule)
    assert np.all(np.isfinite(images))
    assert np.all(np.isfinite(list(info.values())))


def test_an_unknown_root_rule_is_named():
    x = jnp.zeros((1, 11, 11, 3))
    with pytest.raises(UserError, match="rule='interpolate' is unknown: choose one of in_range, "):
        ssim.line_search(x, x, 0.3, "interpolate")
