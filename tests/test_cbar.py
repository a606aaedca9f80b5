"""C-bar against the authors' statistics, other libraries, and its invariants."""

import functools

import numpy as np
import pytest
import scipy.ndimage
import skimage.draw
from ml_collections import ConfigDict

from ada_jax import results as results_files
from ada_jax.corruptions import c_folder, cbar, functions, parameter_tables
from ada_jax.corruptions.filters import Draws
from ada_jax.corruptions.functions import corrupt
from ada_jax.corruptions.parameter_tables import CBAR
from ada_jax.data import core
from ada_jax.errors import UserError
from ada_jax.evaluation import evaluators

CASES = [(table, name) for table, names in CBAR.items() for name in names]
ONLY_IMAGENET = sorted(set(CBAR["imagenet"]) - set(CBAR["cifar"]))
each = pytest.mark.parametrize(("table", "name"), CASES)


@functools.cache
def waves(n: int = 64, height: int = 32, width: int = 32) -> np.ndarray:
    """Coloured waves with stripes, [n, height, width, 3] uint8, by a formula."""
    k = np.arange(n)[:, None, None, None]
    y, x, c = np.indices((height, width, 3))
    smooth = np.sin(2 * np.pi * (y * (1 + k % 5) / 32 + x * (k % 7) / 40) + c + 0.3 * k)
    stripes = (x + y * (k % 3)) // (4 + k % 6) % 2
    return np.clip(107.5 + 70 * smooth + 40 * stripes, 0, 255).astype(np.uint8)


@functools.cache
def distances(table: str, name: str, severity: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean absolute and mean squared change of every image, each corrupted four times."""
    x = np.tile(waves(), (4, 1, 1, 1))
    change = corrupt(name, severity, x, table=table) - x.astype(float)
    return np.abs(change).mean((1, 2, 3)), (change**2).mean((1, 2, 3))


# ------------------------------------------------------------------------ the authors' code

# Mean and standard deviation of the absolute `distances` by the authors' code, at the five
# severities: their class of each name, `Transform(level, 32)(image)`, on every image of `waves()`
# four times after np.random.seed(0) (once for circular_motion_blur, which has no random numbers),
# with NumPy 2.4, SciPy 1.17 and scikit-image 0.26 (np.int replaced by int), at commit c7d90e3 of
# facebookresearch/augmentation-corruption.
AUTHORS = {
    "blue_noise_sample": ((1.42, 2.38, 3.91, 9.35, 13.61), (0.40, 0.45, 0.59, 0.74, 0.87)),
    "brownish_noise": ((15.74, 24.85, 33.33, 38.86, 41.40), (1.32, 1.85, 2.53, 3.06, 3.13)),
    "checkerboard_cutout": ((2.48, 4.70, 6.75, 9.47, 11.48), (1.77, 2.12, 2.57, 2.90, 2.87)),
    "inverse_sparkles": ((23.35, 29.05, 39.08, 54.59, 57.49), (1.30, 1.82, 2.37, 2.93, 3.09)),
    "pinch_and_twirl": ((6.15, 6.67, 7.18, 9.15, 10.59), (1.71, 1.85, 1.99, 2.51, 2.87)),
    "ripple": ((12.42, 13.38, 14.53, 16.54, 17.69), (3.02, 3.21, 3.41, 3.98, 4.13)),
    "circular_motion_blur": ((9.38, 10.37, 11.50, 12.72, 14.05), (0.70, 0.96, 1.29, 1.66, 2.06)),
    "lines": ((1.39, 4.00, 5.33, 7.60, 9.93), (0.33, 0.57, 0.57, 0.78, 0.87)),
    "sparkles": ((9.76, 12.87, 25.19, 29.49, 34.13), (0.87, 1.03, 2.09, 2.45, 2.95)),
    "transverse_chromatic_abberation": (
        (16.24, 18.24, 28.23, 35.58, 36.56),
        (4.71, 4.97, 6.40, 6.28, 5.94),
    ),
    "caustic_refraction": ((15.58, 21.24, 31.57, 40.39, 52.69), (1.64, 2.11, 3.19, 3.70, 4.35)),
    "cocentric_sine_waves": ((9.61, 16.02, 25.50, 28.51, 31.51), (0.11, 0.18, 0.42, 0.37, 0.49)),
    "perlin_noise": ((16.17, 18.32, 20.54, 26.95, 31.33), (0.46, 0.52, 0.57, 0.69, 0.85)),
    "plasma_noise": ((21.93, 31.79, 38.49, 41.67, 44.61), (1.22, 1.82, 2.29, 2.54, 2.88)),
    "single_frequency_greyscale": (
        (12.52, 18.81, 24.89, 53.08, 58.23),
        (0.45, 0.82, 1.85, 3.94, 2.58),
    ),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_changes_have_the_mean_and_spread_of_the_authors_code(name):
    table = "imagenet" if name in ONLY_IMAGENET else "cifar"
    for severity, (mean, spread) in enumerate(zip(*AUTHORS[name], strict=True), 1):
        found, _ = distances(table, name, severity)
        error = 0.01 if name == "circular_motion_blur" else spread * np.sqrt(2 / len(found))
        assert found.mean() == pytest.approx(mean, abs=3.5 * error + 0.01), severity
        # Few images, whose wave is almost constant, make most of this corruption's spread.
        tolerance = 0.6 if name == "single_frequency_greyscale" else 0.3
        assert found.std() == pytest.approx(spread, rel=tolerance), severity


# ------------------------------------------------------------------------ other libraries


def test_lines_are_scikit_images():
    rng = np.random.default_rng(0)
    for start, end in rng.integers(-20, 53, (300, 2, 2)):
        if (start == end).all():
            continue
        expected = np.zeros((96, 96))
        rows, columns, cover = skimage.draw.line_aa(*(start + 32), *(end + 32))
        expected[rows, columns] = cover
        found = cbar._line(start[None], end[None], 32, 32)[0]
        np.testing.assert_allclose(found, expected[32:64, 32:64], atol=1e-12)


@pytest.mark.parametrize("severity", [1, 5])
def test_circular_motion_blur_is_a_mean_of_scipys_rotations(severity):
    x = waves(3, 24, 36)
    degrees = 1.5 * parameter_tables.TABLES["cifar"]["circular_motion_blur"][severity - 1]
    positions = np.linspace(-1, 1, 21)
    rotated = [
        scipy.ndimage.rotate(x.astype(float), p * degrees, axes=(2, 1), reshape=False)
        for p in positions
    ]
    expected = np.average(rotated, 0, np.exp(-2 * positions**2))
    draws = Draws(0, "circular_motion_blur", severity, np.arange(3))
    found = cbar.circular_motion_blur(x, degrees / 1.5, draws)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_chromatic_aberration_is_scipys_zoom_in_every_order():
    x, level = waves(40), 9
    found = corrupt("transverse_chromatic_abberation", 4, x)
    orders = set()
    for image, changed in zip(x, found, strict=True):
        scales = []
        for channel in range(3):
            enlarged = {}
            for scale in (1, 1 + level / 40, 1 + level / 20):
                zoomed = scipy.ndimage.zoom(image[..., channel], scale, prefilter=False)
                edge = (len(zoomed) - 32) // 2
                enlarged[scale] = zoomed[edge : edge + 32, edge : edge + 32].astype(int)
            off = {s: np.abs(e - changed[..., channel]).max() for s, e in enlarged.items()}
            scales.append(min(off, key=off.get))
            assert off[scales[-1]] <= 1
        orders.add(tuple(scales))
    assert len(orders) == 6


def test_noise_has_its_spectrum():
    x = np.zeros((400, 32, 32, 3), np.uint8)
    frequencies = np.hypot(*np.meshgrid(*[np.fft.fftfreq(32, 1 / 32)] * 2))
    for spectrum in (lambda f: f, lambda f: 1 / (f**2 + 1)):
        draws = Draws(0, "noise", 1, np.arange(len(x)))
        noise = cbar._coloured_noise(x, draws, 1, spectrum)[..., 0]
        np.testing.assert_allclose(noise.std((1, 2)), 1, atol=1e-6)
        power = (np.abs(np.fft.fft2(noise)) ** 2).mean(0)
        low, high = frequencies < 5, frequencies > 12
        wanted = spectrum(frequencies) ** 2
        ratio = wanted[low].mean() / wanted[high].mean()
        assert power[low].mean() / power[high].mean() == pytest.approx(ratio, rel=0.25)


# ------------------------------------------------------------------------ invariants


@each
def test_images_of_any_size(table, name):
    for shape in [(2, 8, 8), (3, 41, 13), (1, 33, 50)]:
        x = waves(*shape)
        before = x.copy()
        for severity in (1, 5):
            result = corrupt(name, severity, x, table=table)
            assert (result.shape, result.dtype) == (x.shape, np.uint8)
        np.testing.assert_array_equal(x, before)
        assert corrupt(name, 1, x[:0], table=table).shape == (0, *x.shape[1:])


@each
def test_severities_are_ever_further_from_clean(table, name):
    squares = [distances(table, name, severity)[1].mean() for severity in range(1, 6)]
    assert squares[0] > 0
    assert np.all(np.diff(squares) > 0)


@each
def test_an_image_does_not_depend_on_its_neighbours(monkeypatch, table, name):
    x = waves(12)
    whole = corrupt(name, 3, x, 7, table=table)
    monkeypatch.setattr(functions, "_CHUNK_PIXELS", 3 * 32 * 32)
    np.testing.assert_array_equal(corrupt(name, 3, x, 7, table=table), whole)
    some = np.random.default_rng(0).permutation(12)[:5]
    np.testing.assert_array_equal(
        corrupt(name, 3, x[some], 7, indices=some, table=table), whole[some]
    )


@each
def test_every_seed_and_index_has_its_own_numbers(table, name):
    x = np.repeat(waves(1), 4, 0)
    images = np.concatenate([corrupt(name, 3, x, seed, table=table) for seed in (0, 1)])
    count = len(np.unique(images.reshape(8, -1), axis=0))
    if name == "circular_motion_blur":
        assert count == 1
    else:  # The channels' three scales have only six orders.
        assert count == 8 or (name == "transverse_chromatic_abberation" and count > 1)


def test_a_corruption_of_the_other_table_is_unknown():
    with pytest.raises(UserError, match="'ripple' is unknown in the table 'imagenet': choose from"):
        corrupt("ripple", 1, waves(2), table="imagenet")
    with pytest.raises(UserError, match="'plasma_noise' is unknown in the table 'cifar'"):
        c_folder.check_request(["plasma_noise"], [1], 0, "cifar", 1)


# ------------------------------------------------------------------------ as a set


@pytest.mark.parametrize("table", CBAR)
def test_the_set_of_each_table_is_measured(table):
    config = ConfigDict(
        {"eval_c_dir": "", "corruption_seed": 0, "corruption_table": table, "dataset": ""}
    )
    clean = core.from_arrays(waves(4), np.arange(4))
    sets = evaluators.open_sets(config, clean, ["clean", "cbar"])
    assert list(sets.datasets)[1:] == [(n, s) for n in CBAR[table] for s in range(1, 6)]
    results = {"data": {"name": "waves"}}
    for i, (name, severity) in enumerate(list(sets.datasets)[1:]):
        assert "mean_cbar" not in results
        counts = {"examples": 100, "wrong": i, "error": float(i)}
        results = results_files.with_counts(results, (name, severity), counts)
    assert results["mean_cbar"] == pytest.approx(24.5)
    assert not {"mce_unnormalised", "mean_extra"} & set(results)
    assert ("mean of C-bar", "24.50%") in results_files.summary(results)
    assert results_files.flatten("", results)["cbar"] == pytest.approx(24.5)


def test_tfds_has_no_cbar():
    config = ConfigDict({"eval_c_dir": "tfds", "corruption_table": "cifar"})
    clean = core.from_arrays(waves(4), np.arange(4))
    with pytest.raises(UserError, match="'tfds' has no corruption 'blue_noise_sample': set ''"):
        evaluators.open_sets(config, clean, ["cbar"])
