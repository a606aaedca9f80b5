"""The corruptions against other libraries, literal loops and the authors' own output; the set.

Where the authors' functions are at hand, $ADA_JAX_REFERENCE_C names an .npz file with `clean`
[N, 32, 32, 3] and, for each corruption, what they made of it, [5, N, 32, 32, 3], all uint8;

    ADA_JAX_REFERENCE_C=FILE python -m pytest tests/test_corruptions.py -k reference -s

then prints a table of how near we come.
"""

import functools
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.ndimage
import skimage.color
import skimage.data
import skimage.filters
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_jax import locks, ssim
from ada_jax.corruptions import (
    __main__,
    c_folder,
    filters,
    functions,
    parameter_tables,
    weather,
)
from ada_jax.corruptions.functions import corrupt
from ada_jax.corruptions.parameter_tables import EXTRA, NAMES
from ada_jax.data import core, npy_files, sources
from ada_jax.errors import UserError
from tests.conftest import assert_mistake, run_here

ROOT = pathlib.Path(__file__).parent.parent
ALL = NAMES + EXTRA
FIXED = (  # without random numbers
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
)
quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31 - 1)


@functools.cache
def photographs(n: int = 12, height: int = 32, width: int = 32) -> np.ndarray:
    """Cut-outs of a photograph at half its size, [n, height, width, 3] uint8."""
    image = skimage.data.astronaut().reshape(256, 2, 256, 2, 3).mean((1, 3)).astype(np.uint8)
    rng = np.random.default_rng(0)
    tops, lefts = rng.integers(0, 256 - height, n), rng.integers(0, 256 - width, n)
    return np.stack(
        [image[y : y + height, x : x + width] for y, x in zip(tops, lefts, strict=True)]
    )


def noise_image(seed: int, *shape: int) -> np.ndarray:
    """Any bytes at all, with some grey, black and white pixels among them."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, shape, np.uint8)
    grey = rng.random(shape[:-1]) < 0.2
    x[grey] = rng.choice(np.uint8([0, 100, 255]), shape)[grey][:, :1]
    return x


def cut_off(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0, 255).astype(np.uint8)


def assert_nearly_equal(a: np.ndarray, b: np.ndarray) -> None:
    """Equal but for values that rounding puts on the other side of an integer."""
    difference = np.abs(a.astype(int) - b)
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.1


# --------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("table", parameter_tables.TABLES)
def test_any_size_gives_bytes_of_the_same_shape(name, table):
    for shape in [(2, 8, 8, 3), (3, 41, 13, 3), (1, 65, 96, 3)]:
        x = noise_image(0, *shape)
        before = x.copy()
        for severity in (1, 5):
            result = corrupt(name, severity, x, table=table)
            assert (result.shape, result.dtype) == (shape, np.uint8)
            assert (result != x).any() or min(shape[1:3]) < 32
        np.testing.assert_array_equal(x, before)
        assert corrupt(name, 1, x[:0], table=table).shape == (0, *shape[1:])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("table", parameter_tables.TABLES)
def test_an_image_does_not_depend_on_its_neighbours(monkeypatch, name, table):
    x = photographs()
    whole = [corrupt(name, s, x, 7, table=table) for s in (2, 3, 5)]
    monkeypatch.setattr(functions, "_CHUNK_PIXELS", 3 * 32 * 32)
    rng = np.random.default_rng(0)
    for severity, expected in zip((2, 3, 5), whole, strict=True):
        np.testing.assert_array_equal(corrupt(name, severity, x, 7, table=table), expected)
        some = rng.permutation(len(x))[:5]
        result = corrupt(name, severity, x[some], 7, indices=some, table=table)
        np.testing.assert_array_equal(result, expected[some])


@pytest.mark.parametrize("name", sorted(set(ALL) - set(FIXED)))
def test_every_seed_index_and_severity_has_its_own_numbers(monkeypatch, name):
    table = {name: parameter_tables.TABLES["cifar"][name][2:3] * 5}
    monkeypatch.setitem(parameter_tables.TABLES, "same", table)
    x = np.repeat(photographs(1), 4, 0)
    results = [
        corrupt(name, severity, x, seed, table="same")
        for severity, seed in [(1, 0), (2, 0), (1, 1)]
    ]
    images = np.concatenate(results).reshape(12, -1)
    # Angles may well agree: lines of whole pixels are few.
    assert len(np.unique(images, axis=0)) == 12 or name == "motion_blur"
    assert len(np.unique(images, axis=0)) > 6
    np.testing.assert_array_equal(corrupt(name, 1, x, 0, table="same"), results[0])


@pytest.mark.parametrize("table", parameter_tables.TABLES)
@pytest.mark.parametrize(
    "name",
    [
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "speckle_noise",
        "defocus_blur",
        "gaussian_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
    ],
)
def test_severities_are_ever_further_from_clean(name, table):
    x = photographs(24, 48, 48)
    distances = [
        np.abs(corrupt(name, s, x, table=table) - x.astype(float)).mean() for s in range(1, 6)
    ]
    assert distances[0] > 0
    assert np.all(np.diff(distances) > 0)


def test_the_tables_name_every_corruption_at_five_severities():
    assert (len(NAMES), len(EXTRA)) == (15, 4)
    for name, table in parameter_tables.TABLES.items():
        assert set(table) == {*ALL, *parameter_tables.CBAR[name]}
        assert all(len(parameters) == 5 for parameters in table.values())


CHANGES = json.loads((pathlib.Path(__file__).parent / "corruption_changes.json").read_text())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("table", ["cifar", "imagenet"])
def test_the_mean_changes_are_those_of_this_recipe(table, name):
    """In grey levels, of six photographs of 48x48. Another value makes another benchmark: renew the
    numbers, and `c_folder.RECIPES`, only when a corruption is changed on purpose."""
    x = photographs(6, 48, 48)
    changes = [
        np.abs(corrupt(name, severity, x, table=table).astype(float) - x).mean()
        for severity in parameter_tables.SEVERITIES
    ]
    assert changes == pytest.approx(CHANGES[table][name], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("fogg", 1), {}, "'fogg' is unknown in the table 'cifar': choose from gaussian_noise, "),
        (("fog", 0), {}, "severity 0 does not exist: choose it in 1..5"),
        (("fog", 6), {}, "severity 6 does not exist"),
        (("fog", 1), {"table": "coco"}, "'coco' is unknown: choose from cifar, imagenet"),
        (("fog", 1), {"seed": -1}, "seed -1 is out of range"),
        (("fog", 1), {"indices": [1]}, r"indices of shape \[1\] .* for each of the 2 images"),
        (("fog", 1), {"indices": [0, -1]}, "non-negative integer"),
        (("fog", 1), {"indices": [0.2, 0.7]}, "type float64 must be a non-negative integer"),
        ((1, "fog"), {}, "corruption 1 is unknown"),
        (("fog", 3.0), {}, r"severity 3\.0 does not exist"),
        (("fog", True), {}, "severity True does not"),
        (("fog", 1), {"seed": None}, "seed None is out of range: choose it in 0"),
        (("fog", 1), {"table": ["cifar"]}, r"table \['cifar'\] is unknown"),
    ],
)
def test_mistakes_in_arguments(arguments, keywords, message):
    with pytest.raises(UserError, match=message):
        corrupt(*arguments, photographs(2), **keywords)


def test_images_that_are_no_array_are_refused():
    with pytest.raises(UserError, match="are of type list: give a NumPy array"):
        corrupt("fog", 1, [[0]])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 32, 32, 3), np.float32),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((1, 7, 9, 3), np.uint8),
    ],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(UserError, match=r"make them \[N, H, W, 3\] uint8"):
        corrupt("fog", 1, images)


# --------------------------------------------------------------------------------------- noise


def test_noise_has_the_moments_of_its_definition():
    x = np.full((40, 32, 32, 3), 100, np.uint8)
    for severity in range(1, 6):
        c = {n: parameter_tables.TABLES["cifar"][n][severity - 1] for n in ALL}
        spread = {
            "gaussian_noise": 255 * c["gaussian_noise"],
            "speckle_noise": 100 * c["speckle_noise"],
            "shot_noise": math.sqrt(100 / 255 / c["shot_noise"]) * 255,
        }
        for name, sigma in spread.items():
            result = corrupt(name, severity, x).astype(float) + 0.5  # half a level is cut off
            assert result.mean() == pytest.approx(100, abs=0.5)
            # Shot noise comes in steps of about a level, which cutting off makes uneven.
            assert result.std() == pytest.approx(sigma, rel=0.03)


def test_impulse_noise_is_half_salt_half_pepper():
    x = np.full((40, 32, 32, 3), 100, np.uint8)
    for severity, share in enumerate(parameter_tables.TABLES["cifar"]["impulse_noise"], 1):
        result = corrupt("impulse_noise", severity, x)
        assert set(np.unique(result)) == {0, 100, 255}
        for value in (0, 255):
            assert np.mean(result == value) == pytest.approx(share / 2, rel=0.1)


# ---------------------------------------------------------------------------------------- blur


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_blur_is_scikit_images(severity):
    x = photographs()
    sigma = parameter_tables.TABLES["cifar"]["gaussian_blur"][severity - 1]
    expected = [skimage.filters.gaussian(image / 255, sigma, channel_axis=-1) for image in x]
    assert_nearly_equal(corrupt("gaussian_blur", severity, x), cut_off(255 * np.stack(expected)))


def test_defocus_kernels():
    plus = np.float64([[0, 1, 0], [1, 1, 1], [0, 1, 0]]) / 5
    np.testing.assert_allclose(functions._disk(1.5, 0.1), np.full((3, 3), 1 / 9), atol=1e-6)
    kernel = functions._disk(1, 0.2)
    np.testing.assert_allclose(kernel, np.pad(plus, (len(kernel) - 3) // 2), atol=1e-5)
    for (radius, sigma), middle in {(0.3, 0.4): 0.9192, (0.4, 0.5): 0.7870}.items():
        taps = [(1 - middle) / 2, middle, (1 - middle) / 2]
        np.testing.assert_allclose(functions._disk(radius, sigma), np.outer(taps, taps), atol=1e-4)
    assert functions._disk(10, 0.5).shape == (21, 21)


@pytest.mark.parametrize("table", parameter_tables.TABLES)
@pytest.mark.parametrize("severity", range(1, 6))
def test_defocus_kernels_are_normalised_before_their_blur_only(table, severity):
    radius, sigma = parameter_tables.TABLES[table]["defocus_blur"][severity - 1]
    half, reach = (8, 1) if radius <= 8 else (radius, 2)
    x, y = np.meshgrid(*2 * [np.arange(-half, half + 1)])
    disk = np.float32(x**2 + y**2 <= radius**2)
    disk /= disk.sum()
    ours = functions._disk(radius, sigma)
    ours = np.pad(ours, (len(disk) - len(ours)) // 2)
    expected = scipy.ndimage.gaussian_filter(disk, sigma, mode="mirror", radius=reach)
    np.testing.assert_allclose(ours, expected, atol=1e-7)
    cv2 = pytest.importorskip("cv2", exc_type=ImportError)
    expected = cv2.GaussianBlur(disk, ksize=(2 * reach + 1,) * 2, sigmaX=sigma)
    np.testing.assert_allclose(ours, expected, atol=1e-7)


def test_imagenets_strongest_defocus_blurs_brighten_as_published():
    grey = np.full((1, 48, 48, 3), 200, np.uint8)
    values = [np.unique(corrupt("defocus_blur", s, grey, table="imagenet")) for s in range(1, 6)]
    assert values == [200, 200, 200, 202, 202]
    sums = [functions._disk(radius, 0.5).sum() for radius in (6, 8, 10)]
    np.testing.assert_allclose(sums, [1, 1.0130, 1.0108], atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.13, 1.75, 2.25, 4.5])
@pytest.mark.parametrize("size", [32, 45])
def test_zoom_is_scipys_of_the_middle(factor, size):
    x = np.random.default_rng(0).random((size, size), np.float32)
    shown = math.ceil(size / factor)
    top = (size - shown) // 2
    enlarged = scipy.ndimage.zoom(x[top : top + shown, top : top + shown], factor, order=1)
    trim = (len(enlarged) - size) // 2
    expected = enlarged[trim : trim + size, trim : trim + size]
    np.testing.assert_allclose(filters.zoom(x, factor), expected, atol=1e-5)


@quick
@given(seeds, st.integers(1, 4))
def test_glass_blur_displaces_like_the_loop(seed, delta):
    h, w = 11, 13
    shifts = np.random.default_rng(seed).integers(-delta, delta, (2, h, w, 2))
    for one, result in zip(shifts, functions._displaced(shifts, delta), strict=True):
        expected = np.arange(h * w).reshape(h, w)
        for y in range(h - delta, delta, -1):
            for x in range(w - delta, delta, -1):
                down, right = one[y, x]
                expected[y, x] = expected[y + down, x + right]
        np.testing.assert_array_equal(result.reshape(h, w), expected)


@quick
@given(seeds, st.floats(-180, 180), st.sampled_from([(6, 1), (9, 2.5), (20, 15)]))
def test_motion_blur_is_the_sum_along_the_line(seed, degrees, c):
    radius, sigma = c
    h, w = 9, 12
    image = np.random.default_rng(seed).integers(0, 256, (h, w), np.uint8)
    result = filters.motion_blur(image[None, None], radius, sigma, np.float32([degrees]))[0, 0]
    angle = math.radians(np.float32(degrees))
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    for y, x in [(0, 0), (4, 5), (8, 11), (3, 9)]:
        total = 0.0
        for i, weight in enumerate(weights):
            right, down = math.ceil(i * math.cos(angle) - 0.5), math.ceil(i * math.sin(angle) - 0.5)
            total += weight * int(image[np.clip(y + down, 0, h - 1), np.clip(x + right, 0, w - 1)])
        assert total / sum(weights) - 1.001 <= result[y, x] <= total / sum(weights) + 0.01


# ------------------------------------------------------------------------------------- weather


def test_plasma_is_the_diamond_square_algorithm():
    size, decay = 16, 1.75
    u = np.random.default_rng(0).uniform(-1, 1, (1, size, size))
    z, step, wibble = np.zeros((size, size)), size, 100.0

    def mean(points):
        return sum(z[y % size, x % size] for y, x in points) / 4

    while step >= 2:
        half = step // 2
        for y in range(half, size, step):
            for x in range(half, size, step):
                corners = [(y + i, x + j) for i in (-half, half) for j in (-half, half)]
                z[y, x] = mean(corners) + wibble**2 * u[0, y, x]
        for y in range(0, size, half):
            for x in range((y // half + 1) % 2 * half, size, step):
                sides = [(y - half, x), (y + half, x), (y, x - half), (y, x + half)]
                z[y, x] = mean(sides) + wibble**2 * u[0, y, x]
        step, wibble = half, wibble / decay
    expected = (z - z.min()) / (z.max() - z.min())
    np.testing.assert_allclose(weather._plasma(u, decay)[0], expected, atol=1e-9)


def test_fog_keeps_the_brightest_value_in_reach():
    dark = photographs() // 2
    for severity in (1, 5):
        assert np.all(corrupt("fog", severity, dark).max((1, 2, 3)) <= dark.max((1, 2, 3)))


def test_snow_and_frost_only_brighten_dark_images():
    dark = photographs() // 4
    for name in ("snow", "frost"):
        result = corrupt(name, 2, dark).astype(int)
        assert np.all(result.mean((1, 2, 3)) > dark.mean((1, 2, 3)))


def test_frost_reads_photographs_and_no_code():
    assert [p.name for p in weather.frost_files()] == [
        "frost1.png",
        "frost2.png",
        "frost3.png",
        "frost4.jpg",
        "frost5.jpg",
    ]
    sizes = [t.shape[:2] for t in weather._frost_textures(0.2, 32, 32)]
    assert sizes == [(120, 180), (63, 112), (63, 112), (70, 105), (99, 132)]
    for texture in weather._frost_textures(1, 400, 700):
        assert texture.shape[0] > 400
        assert texture.shape[1] > 700
    assert "imagecorruptions" not in sys.modules


def test_frost_without_its_photographs_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    weather._frost_textures.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps imagecorruptions"):
        corrupt("frost", 1, photographs())
    with pytest.raises(UserError, match="leave frost out"):
        c_folder.write_set(dataset(), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_spatters_parts_are_opencvs():
    cv2 = pytest.importorskip("cv2", exc_type=ImportError)
    rng = np.random.default_rng(0)
    layers = scipy.ndimage.gaussian_filter(rng.normal(0.65, 0.2, (50, 32, 40)), 1, axes=(1, 2))
    x = np.where(layers < 0.69, 0, 255 * layers).astype(np.uint8)
    edges = weather._edges(x)
    np.testing.assert_array_equal(edges, [cv2.Canny(image, 50, 150) > 0 for image in x])
    far = [cv2.distanceTransform(np.uint8(~image), cv2.DIST_L2, 5) for image in edges]
    np.testing.assert_allclose(weather._distance(edges), far, atol=0.6)
    assert np.abs(weather._distance(edges) - far).mean() < 1e-3
    expected = [cv2.equalizeHist(image) for image in x]
    np.testing.assert_allclose(weather._equalised(x), expected, atol=1)


def test_without_edges_the_distance_is_infinite():
    edges = np.zeros((3, 8, 8), bool)
    assert np.all(np.isinf(weather._distance(edges)))
    edges[1, 2, 3] = True
    result = weather._distance(edges)
    assert np.all(np.isinf(result[[0, 2]]))
    assert result[1, 2, 3] == 0
    assert result[1, 2, 5] == 2


def test_spatter_without_a_drop_changes_nothing():
    assert not weather._water(np.zeros((2, 9, 9), np.float32), 0.5).any()


# ------------------------------------------------------------------------------- colour and form


@quick
@given(seeds, st.integers(1, 5), st.sampled_from(sorted(parameter_tables.TABLES)))
def test_brightness_and_saturation_are_those_of_hsv(seed, severity, table):
    x = noise_image(seed, 2, 9, 9, 3)
    hsv = skimage.color.rgb2hsv(x)
    c = {n: parameter_tables.TABLES[table][n][severity - 1] for n in ("brightness", "saturate")}
    brighter, stronger = hsv.copy(), hsv.copy()
    brighter[..., 2] = np.clip(hsv[..., 2] + c["brightness"], 0, 1)
    factor, offset = c["saturate"]
    stronger[..., 1] = np.clip(hsv[..., 1] * factor + offset, 0, 1)
    for name, expected in [("brightness", brighter), ("saturate", stronger)]:
        result = corrupt(name, severity, x, table=table).astype(int)
        expected = cut_off(255 * skimage.color.hsv2rgb(expected) + 1e-9)
        assert np.abs(result - expected).max() <= 1


@quick
@given(seeds, st.integers(1, 5))
def test_contrast_draws_towards_the_mean_of_each_channel(seed, severity):
    x = noise_image(seed, 2, 9, 11, 3)
    factor = parameter_tables.TABLES["cifar"]["contrast"][severity - 1]
    mean = x.astype(float).mean((1, 2), keepdims=True)
    assert_nearly_equal(corrupt("contrast", severity, x), cut_off(mean + factor * (x - mean)))


@quick
@given(seeds, st.booleans())
def test_sampling_is_scipys(seed, repeat_edge):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (2, 9, 12, 3), np.uint8)
    down, right = rng.uniform(-30, 40, (2, 2, 9, 12)).astype(np.float32)
    result = functions._sample(x, down, right, repeat_edge)
    for n in range(2):
        for c in range(3):
            expected = scipy.ndimage.map_coordinates(
                x[n, ..., c].astype(float),
                [down[n], right[n]],
                order=1,
                mode="reflect" if repeat_edge else "mirror",
            )
            np.testing.assert_allclose(result[n, ..., c], expected, atol=1e-3)


def test_the_affine_map_moves_its_three_corners_by_the_jitter():
    jitter = np.zeros((1, 3, 2))
    jitter[0, :, 0], jitter[0, :, 1] = 2, -1  # to the right and up
    down, right = functions._affine(32, 32, jitter)
    rows, columns = np.indices((32, 32))
    np.testing.assert_allclose(down[0], rows + 1, atol=1e-5)
    np.testing.assert_allclose(right[0], columns - 2, atol=1e-5)
    jitter = np.random.default_rng(0).integers(-3, 4, (5, 3, 2))
    down, right = functions._affine(32, 32, jitter)
    for n in range(5):
        for corner, move in zip([(26, 26), (26, 6), (6, 6)], jitter[n], strict=True):
            x, y = np.add(corner, move)
            np.testing.assert_allclose((right[n, y, x], down[n, y, x]), corner, atol=1e-4)


# ------------------------------------------------------------------------- the authors' output


@pytest.fixture(scope="module")
def reference():
    path = os.environ.get("ADA_JAX_REFERENCE_C")
    if not path:
        pytest.skip("$ADA_JAX_REFERENCE_C names no file of the authors' output.")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in ("clean", *ALL)}


@pytest.mark.parametrize("name", FIXED)
def test_reference_of_fixed_corruptions(reference, name):
    """Within one grey level on at least 99.9% of the values, and near enough on all."""
    for severity in range(1, 6):
        result = corrupt(name, severity, reference["clean"]).astype(int)
        difference = np.abs(result - reference[name][severity - 1])
        equal, near = np.mean(difference == 0), np.mean(difference <= 1)
        print(f"| {name} {severity} | equal {equal:.2%} | within 1 {near:.3%} |")
        assert near >= 0.999
        assert equal >= 0.9


def test_reference_of_motion_blur_is_ours_at_some_angle(reference):
    angles = np.arange(-45, 45.5, 0.5, np.float32)
    for severity in range(1, 6):
        c = parameter_tables.TABLES["cifar"]["motion_blur"][severity - 1]
        shares = []
        authors = reference["motion_blur"][severity - 1]
        for clean, theirs in zip(reference["clean"], authors, strict=True):
            planes = np.repeat(np.moveaxis(clean, -1, 0)[None], len(angles), 0)
            ours = np.moveaxis(filters.motion_blur(planes, *c, angles), 1, -1)
            shares.append(np.mean(np.abs(ours.astype(int) - theirs) <= 1, (1, 2, 3)).max())
        near = np.mean(shares)
        print(f"| motion_blur {severity}, best of {len(angles)} angles | within 1 {near:.3%} |")
        assert near >= 0.999


@pytest.mark.parametrize("name", sorted(set(ALL) - set(FIXED)))
def test_reference_of_random_corruptions(reference, name):
    """Change and similarity as the authors', up to 10% or what so few images leave to chance."""
    clean = reference["clean"]

    def statistics(images):
        change = np.abs(images.astype(float) - clean).mean()
        pair = (x.astype(np.float32) / 255 for x in (clean, images))
        return change, float(np.mean(ssim.ssim(*pair)))

    for severity in range(1, 6):
        theirs = statistics(reference[name][severity - 1])
        ours = np.array([statistics(corrupt(name, severity, clean, seed)) for seed in range(8)])
        mean, spread = ours.mean(0), ours.std(0, ddof=1)
        off = np.abs(theirs - mean)
        print(
            f"| {name} {severity} | change {theirs[0]:.2f}, ours {mean[0]:.2f} ± {spread[0]:.2f} "
            f"| SSIM {theirs[1]:.3f}, ours {mean[1]:.3f} ± {spread[1]:.3f} |"
        )
        assert np.all((off <= 0.1 * np.abs(mean)) | (off <= 6 * spread))


# ------------------------------------------------------------------------------------ the set


def dataset(n: int = 10, seed: int = 0) -> core.Dataset:
    labels = (np.arange(n) + seed) % 3
    return core.from_arrays(noise_image(seed, n, 16, 12, 3), labels, class_names=list("abc"))


def write(out, names=("gaussian_noise", "contrast"), **keywords):
    c_folder.write_set(keywords.pop("dataset", dataset()), out, names=names, **keywords)


def read(path):
    return np.load(path, allow_pickle=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_set_has_the_published_layout(monkeypatch, tmp_path, processes):
    monkeypatch.setattr(c_folder, "_BLOCK_PIXELS", 4 * 16 * 12)
    write(tmp_path / "set", seed=3, table="imagenet", processes=processes)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "contrast.npy",
        "gaussian_noise.npy",
        "labels.npy",
        "manifest.json",
    ]
    labels = read(tmp_path / "set/labels.npy")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.tile(dataset().source.labels, 5))
    for name in ("gaussian_noise", "contrast"):
        blocks = read(tmp_path / f"set/{name}.npy")
        assert (blocks.shape, blocks.dtype) == ((50, 16, 12, 3), np.uint8)
        for severity in range(1, 6):
            expected = corrupt(name, severity, dataset().source.images, 3, table="imagenet")
            np.testing.assert_array_equal(blocks[10 * (severity - 1) : 10 * severity], expected)


def test_floating_point_images_are_rounded_to_bytes(tmp_path):
    whole = dataset()
    floats = core.from_arrays(whole.source.images / 255, whole.source.labels, class_names="abc")
    write(tmp_path / "bytes")
    write(tmp_path / "floats", dataset=floats)
    for name in ("contrast.npy", "labels.npy"):
        np.testing.assert_array_equal(
            read(tmp_path / "bytes" / name), read(tmp_path / "floats" / name)
        )


def test_a_stopped_set_goes_on(monkeypatch, tmp_path):
    write(tmp_path / "whole")
    calls = []

    def stop(name, *arguments, **keywords):
        calls.append(name)
        if len(calls) == 8:  # within the second corruption
            raise KeyboardInterrupt
        return corrupt(name, *arguments, **keywords)

    monkeypatch.setattr(functions, "corrupt", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set")
    assert sorted(p.name for p in (tmp_path / "set").glob("*.npy")) == ["gaussian_noise.npy"]
    made = (tmp_path / "set/gaussian_noise.npy").stat().st_mtime_ns
    write(tmp_path / "set")
    assert calls.count("gaussian_noise") == 5
    assert (tmp_path / "set/gaussian_noise.npy").stat().st_mtime_ns == made
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "set" / path.name).read_bytes()
    assert len(list((tmp_path / "set").iterdir())) == 4
    write(tmp_path / "set", ["contrast", "pixelate"])  # and may grow
    assert read(tmp_path / "set/pixelate.npy").shape == (50, 16, 12, 3)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"seed": 1}, "seed is 0, not 1: give another folder"),
        ({"table": "imagenet"}, "table is cifar, not imagenet"),
        ({"severities": [1, 2]}, r"severities is \[1, 2, 3, 4, 5\]"),
        ({"dataset": dataset(seed=1)}, "sha256 is "),
        ({"dataset": dataset(9)}, "sha256 is "),
    ],
)
def test_another_set_is_never_mixed_in(tmp_path, keywords, message):
    write(tmp_path, ["contrast"])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        write(tmp_path, **keywords)
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_other_versions_are_not_mixed(tmp_path):
    write(tmp_path, ["contrast"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["versions"]["numpy"] = "1.0"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="versions is"):
        write(tmp_path, ["pixelate"])


def test_only_imagenets_former_recipe_is_not_gone_on_with(tmp_path):
    for table in parameter_tables.TABLES:
        write(tmp_path / table, ["contrast"], table=table)
        path = tmp_path / table / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": 1}))
    write(tmp_path / "cifar", ["pixelate"])
    with pytest.raises(UserError, match="recipe is 1, not 2"):
        write(tmp_path / "imagenet", ["pixelate"], table="imagenet")


def test_a_full_disk_is_named_and_an_unreadable_part_is_not_called_unwritable(tmp_path):
    (tmp_path / "x.npy.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"x\.npy\.partial cannot be written \(No space"):
        npy_files.write_file(tmp_path / "x.npy", [bytes(100)])

    def parts():
        yield (tmp_path / "nothing").read_bytes()

    with pytest.raises(FileNotFoundError, match="nothing"):
        npy_files.write_file(tmp_path / "y.npy", parts())


def test_folders_that_are_not_ours(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/fog.npy").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"no manifest.json, .*give a new folder"):
        write(tmp_path / "other")
    with pytest.raises(UserError, match="cannot be written to"):
        write(tmp_path / "other/fog.npy")
    (tmp_path / "other/manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        write(tmp_path / "other")
    assert (tmp_path / "other/fog.npy").read_bytes() == b"precious"


@pytest.mark.parametrize("harm", ["short", "shape", "type", "labels"])
def test_a_file_that_is_not_whole_is_refused(tmp_path, harm):
    write(tmp_path)
    path = tmp_path / ("labels.npy" if harm == "labels" else "contrast.npy")
    match harm:
        case "short":
            path.write_bytes(path.read_bytes()[:-1])
        case "type":
            np.save(path, np.zeros((50, 16, 12, 3), np.float32))
        case _:
            np.save(path, np.zeros((49, 16, 12, 3), np.uint8))
    with pytest.raises(
        UserError, match=f"{path.name} is .* and should be .*move it to another folder"
    ):
        write(tmp_path)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"names": ["contrast", "fogg"]}, "'fogg' is unknown"),
        ({"names": []}, "is empty"),
        ({"severities": [0]}, "severity 0"),
        ({"seed": -1}, "seed -1"),
        ({"table": "coco"}, "table 'coco'"),
        ({"processes": 0}, "--processes=0"),
    ],
)
def test_mistakes_cost_nothing(tmp_path, keywords, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "set", **keywords)
    assert not (tmp_path / "set").exists()


def test_two_at_once_are_refused(tmp_path):
    with (
        locks.hold("--out", locks.of_folder(tmp_path)),
        pytest.raises(UserError, match=f"^--out={tmp_path} is in use by process {os.getpid()} on "),
    ):
        write(tmp_path)


def test_a_full_disk_is_said_before_work_begins(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GB free: free some space"):
        write(tmp_path)


# --------------------------------------------------------------------------------- the binary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar100", "test", None, 32), "--data = 'cifar100' is unknown: choose one of"),
        (("some.npz", "test[", None, 32), "--split = 'test\\[' is not a split"),
        (("mnist5k", "test", None, 64), "--image_size = 64 does not fit --data = 'mnist5k'"),
        (("folder", "test", None, 32), "--data_dir is not set, and --data = 'folder' needs it"),
        (("none.npz", "test", None, 32), "--data = '.*none.npz' does not exist"),
        (("none.npz", "test", "here", 32), "--data_dir=here does not apply to"),
    ],
)
def test_mistakes_in_the_data_name_the_flags(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    np.savez("some.npz", images=photographs(3), labels=np.arange(3))
    with pytest.raises(UserError, match=message):
        __main__._load(*arguments)


@pytest.mark.slow
def test_ctrl_c_costs_one_line_with_several_processes_too(tmp_path):
    images, labels = np.repeat(photographs(), 200, 0), np.arange(2400) % 3
    np.savez(tmp_path / "some.npz", images=images, labels=labels)
    command = [sys.executable, "-m", "ada_jax.corruptions", f"--data={tmp_path}/some.npz"]
    command += ["--split=all", f"--out={tmp_path}/set", "--names=elastic_transform"]
    process = subprocess.Popen(
        [*command, "--processes=2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    partial = tmp_path / "set/elastic_transform.npy.partial"
    while not (partial.exists() and partial.stat().st_size > 10_000):  # The workers are up.
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "Ctrl-C: run the same command again to continue."
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    images, labels = np.repeat(photographs(), 200, 0), np.arange(2400) % 3
    np.savez(tmp_path / "some.npz", images=images, labels=labels)
    command = [sys.executable, "-m", "ada_jax.corruptions", f"--data={tmp_path}/some.npz"]
    command += ["--split=all", f"--out={tmp_path}/set", "--names=elastic_transform"]
    process = subprocess.Popen([*command, "--processes=2"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "set/elastic_transform.npy.partial").exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        ".lock",
        "elastic_transform.npy.partial",
        "manifest.json",
    ]
    clean = sources.load("npz", "all", data_dir=tmp_path / "some.npz")
    write(tmp_path / "set", ["elastic_transform"], dataset=clean)
    last = corrupt("elastic_transform", 5, images[-5:], indices=np.arange(2395, 2400))
    np.testing.assert_array_equal(read(tmp_path / "set/elastic_transform.npy")[-5:], last)


def test_a_severity_that_is_no_number_is_named(tmp_path):
    flags = ("--data=mnist5k", f"--out={tmp_path}/set", "--severities=1,six")
    assert_mistake(run_here("corruptions", *flags), "The severity 'six' does not exist")


def test_the_command_writes_what_its_flags_say(tmp_path):
    flags = ("--data=mnist5k", "--split=test[:4]", f"--out={tmp_path}/set", "--processes=1")
    flags += ("--names=contrast,gaussian_noise", "--severities=2,5", "--seed=3", "--table=imagenet")
    done = run_here("corruptions", *flags)
    assert done.returncode == 0, done.stderr
    digits = sources.load("mnist5k", "test[:4]").source
    clean = np.stack([digits[i][0] for i in range(4)])
    for name in ("contrast", "gaussian_noise"):
        expected = [corrupt(name, s, clean, 3, table="imagenet") for s in (2, 5)]
        found = read(tmp_path / "set" / f"{name}.npy")
        np.testing.assert_array_equal(found, np.concatenate(expected))


def test_mistakes_are_told_before_images_are_read(tmp_path):
    flags = ("--data=folder", "--data_dir=/nowhere")
    small = run_here("corruptions", *flags, f"--out={tmp_path}/set", "--image_size=0")
    assert_mistake(small, "--image_size=0 is too small: give at least 8 pixels.")
    assert_mistake(run_here("corruptions", *flags, "--out=gs://bucket/set"), "is in a bucket")
