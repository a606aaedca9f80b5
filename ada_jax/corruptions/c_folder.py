"""Reads and writes "-C" folders, in the layout of CIFAR-10-C."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tqdm

from ada_jax import locks, paths
from ada_jax import results as results_files
from ada_jax.corruptions import functions, parameter_tables, weather
from ada_jax.data import batching, core, npy_files, tfds_sets
from ada_jax.errors import UserError

# ------------------------------------------------------------------------------- writing a "-C" set

# Version by table, raised when the same seed gives different images than before.
RECIPES = {"cifar": 1, "imagenet": 2}
_BLOCK_PIXELS = 2**20  # Pixels that a worker process gets at a time.


def write_set(
    dataset: core.Dataset,
    out: str | os.PathLike[str],
    *,
    names: Sequence[str] = parameter_tables.NAMES + parameter_tables.EXTRA,
    severities: Sequence[int] = parameter_tables.SEVERITIES,
    seed: int = 0,
    table: str = "cifar",
    processes: int = 1,
) -> None:
    """Writes a "-C" set in the published layout; resumes a set that was stopped.

    NAME.npy is [S*N, H, W, 3] uint8, one block of N images per severity; labels.npy is [S*N], uint8
    for up to 256 classes. Files are renamed to these names when they are complete, labels.npy last.
    manifest.json describes the set; a folder holds only one.

    Args:
      dataset: the clean images.
      out: folder of the set, created if missing.
      names: corruptions.
      severities: S of the severities 1..5; the published sets have all.
      seed: in 0..2**32-1.
      table: as for `corrupt`.
      processes: number of worker processes, which does not affect the images.

    Raises:
      UserError: an argument is invalid, or the folder holds something else.
    """
    names, severities = tuple(dict.fromkeys(names)), tuple(sorted(set(severities)))
    check_request(names, severities, seed, table, processes)
    functions.check_images(np.empty((0, *dataset.image_shape), np.uint8))
    out = paths.local(f"--out={out}", out)
    with locks.hold(f"--out={out}", locks.of_folder(out)):
        npy_files.check_folder(out)
        sha256, labels = digest(dataset)
        npy_files.check_manifest(out, _manifest(dataset, sha256, severities, seed, table))
        shape = (len(severities) * len(dataset), *dataset.image_shape)
        missing = [name for name in names if not npy_files.is_complete(out / f"{name}.npy", shape)]
        labelled = npy_files.is_complete(out / "labels.npy", shape[:1])
        npy_files.check_space(out, len(missing) * math.prod(shape))
        done = (len(names) - len(missing)) * shape[0]
        total = len(names) * shape[0]
        with (
            _ordered_map(processes) as mapped,
            tqdm.tqdm(total=total, initial=done, unit="image") as progress,
        ):
            for name in missing:
                progress.set_description(name)
                tasks = _tasks(dataset, name, severities, seed, table)
                blocks = npy_files.with_progress(mapped(tasks), progress)
                npy_files.write(out / f"{name}.npy", np.uint8, shape, blocks)
        if not labelled:
            npy_files.write(out / "labels.npy", labels.dtype, shape[:1], [labels] * len(severities))


def check_request(
    names: Sequence[str], severities: Sequence[int], seed: int, table: str, processes: int
) -> None:
    """Checks the arguments of `write_set` before images are read."""
    if not names or not severities:
        raise UserError("--names or --severities is empty: give at least one of each.")
    for name in names:
        for severity in severities:
            functions.check(name, severity, seed, table)
    if processes < 1:
        raise UserError(f"--processes={processes} must be at least 1.")
    if "frost" in names:
        weather.frost_files()


def digest(dataset: core.Dataset) -> tuple[str, np.ndarray]:
    """SHA-256 of all images and labels, and the labels [N] in the type of labels.npy."""
    sha256, labels = hashlib.sha256(), []
    for images, _, some in _blocks(dataset):
        sha256.update(images.tobytes())
        labels.append(some)
    every = np.concatenate(labels)
    sha256.update(every.astype("<i4").tobytes())
    return sha256.hexdigest(), every.astype(np.uint8 if dataset.num_classes <= 256 else np.int32)


def _blocks(dataset: core.Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields all images (uint8), indices and labels in order, in blocks of `_BLOCK_PIXELS`."""
    height, width, _ = dataset.image_shape
    size = max(1, _BLOCK_PIXELS // (height * width))
    for batch in batching.eval_batches(dataset, batch_size=min(size, len(dataset))):
        real = batch["mask"] > 0
        images = batching.to_uint8(batch["image"][real])
        yield images, batch["index"][real], batch["label"][real]


def _manifest(
    dataset: core.Dataset, sha256: str, severities: Sequence[int], seed: int, table: str
) -> dict[str, Any]:
    return {
        "data": dataset.name,
        "data_sha256": sha256,
        "images": len(dataset),
        "severities": list(severities),
        "seed": seed,
        "table": table,
        "recipe": RECIPES[table],
        "versions": {p: importlib.metadata.version(p) for p in ("numpy", "scipy", "pillow")},
    }


def _tasks(
    dataset: core.Dataset, name: str, severities: Sequence[int], seed: int, table: str
) -> Iterator[tuple[Any, ...]]:
    for severity in severities:
        for images, indices, _ in _blocks(dataset):
            yield name, severity, images, seed, indices, table


@contextlib.contextmanager
def _ordered_map(processes: int) -> Iterator[Callable[[Iterable[Any]], Iterator[np.ndarray]]]:
    """Yields an ordered map of `corrupt_task` over processes that reads few tasks ahead."""
    if processes == 1:
        yield functools.partial(map, functions.corrupt_task)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # One core per worker process.
    pool = futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _leave_with_parent
    )

    def mapped(tasks: Iterable[Any]) -> Iterator[np.ndarray]:
        pending = collections.deque()
        for task in tasks:
            # `submit` may start a worker, which inherits the mask: this process handles Ctrl-C.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pending.append(pool.submit(functions.corrupt_task, task))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield mapped
    except futures.process.BrokenProcessPool as error:
        raise UserError(
            f"One of the --processes={processes} died, probably out of memory: use fewer."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    """Ends this worker process when its parent has ended, even if it was killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------ a folder of .npy files


def open_set(
    folder: str, clean: core.Dataset, names: Sequence[str], size: int
) -> tuple[dict[results_files.Condition, core.Dataset], dict[str, Any]]:
    """Opens a "-C" folder in the published layout, see `write_set`, memory-mapped.

    Args:
      folder: its path.
      clean: the images that it was made from.
      names: corruptions to open.
      size: number of images of each severity to use, from the start.

    Returns:
      A data set for each corruption and severity, and fields that identify the folder's content.

    Raises:
      UserError: a file is missing, incomplete or damaged, or the set is of other images.
    """
    what = f"config.eval_c_dir (--c_dir) = {folder!r}"
    folder = paths.local(what, folder).absolute()
    _check_complete(folder)
    sha256, clean_labels = digest(clean)
    source = {"kind": "npy", "folder": str(folder)} | _read_manifest(folder, sha256)
    labels = _read_labels(folder, clean_labels)
    datasets = {}
    files = {"labels": folder / "labels.npy"} | {name: _path_of(folder, name) for name in names}
    for name in names:
        images = _read_images(folder, name, clean)
        for severity, block in zip(parameter_tables.SEVERITIES, images, strict=True):
            arrays = core.ArraySource(block[:size], labels[:size])
            datasets[name, severity] = dataclasses.replace(clean, source=arrays)
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(_file_digest, files.values())
        return datasets, source | {"files": dict(zip(files, digests, strict=True))}


def _file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, cached until the file changes."""
    stat = path.stat()
    return _digest_of(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _digest_of(path: pathlib.Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_complete(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"config.eval_c_dir (--c_dir) = {str(folder)!r} is not a folder: give one with .npy "
            "files, or 'tfds', or '' to corrupt on the fly."
        )
    if partial := sorted(folder.glob("*.partial")):
        raise UserError(
            f"config.eval_c_dir (--c_dir) = {str(folder)!r} is incomplete ({partial[0].name}): "
            "wait for python -m ada_jax.corruptions to end, or run it again to resume."
        )


def _load_array(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        fix = "is missing: complete the folder"
    except npy_files.DAMAGED as error:
        fix = f"is not a complete array ({' '.join(str(error).split())}): copy it again"
    raise UserError(
        f"{path.name} in config.eval_c_dir (--c_dir) = {str(path.parent)!r} {fix}, or set '' to "
        "corrupt on the fly."
    )


def _read_labels(folder: pathlib.Path, clean: np.ndarray) -> np.ndarray:
    """Reads the labels [N] int32 of one severity; those of all severities must be equal."""
    labels = _load_array(folder / "labels.npy")
    wanted = len(parameter_tables.SEVERITIES) * len(clean)
    where = f"labels.npy in config.eval_c_dir (--c_dir) = {str(folder)!r}"
    if labels.shape != (wanted,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{where} is {_described(labels)} and should be [{wanted}] integers, five times the "
            f"{len(clean)} clean ones: set config.eval_split (--split) to the images that it was "
            "made from."
        )
    blocks = labels.reshape(-1, len(clean)).astype(np.int64)
    # Their order may differ from the clean labels': TFDS shuffles CIFAR-10.
    if (blocks != blocks[0]).any() or not np.array_equal(np.sort(blocks[0]), np.sort(clean)):
        raise UserError(
            f"{where} does not have the labels of the {len(clean)} clean images five times: set "
            "config.eval_split (--split) to the images that it was made from."
        )
    return blocks[0].astype(np.int32)


def _read_manifest(folder: pathlib.Path, sha256: str) -> dict[str, Any]:
    """The manifest's seed, table and recipe; {} for a set that `write_set` did not write."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = paths.read_json(path)
        source = {field: manifest[field] for field in ("seed", "table", "recipe")}
        severities, made_from = manifest["severities"], manifest["data_sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): write the set again.") from error
    if severities != list(parameter_tables.SEVERITIES):
        raise UserError(
            f"config.eval_c_dir (--c_dir) = {str(folder)!r} has the severities {severities}: "
            "write a set with all five."
        )
    if made_from != sha256:
        raise UserError(
            f"config.eval_c_dir (--c_dir) = {str(folder)!r} was made from other images than "
            f"config.eval_split has (sha256 {made_from[:12]}..., not {sha256[:12]}...): set "
            "config.eval_split (--split) to the images that it was made from."
        )
    return source


def _path_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    path = folder / f"{name}.npy"
    other = folder / f"{tfds_sets.TFDS_SPELLINGS.get(name, name)}.npy"
    return path if path.exists() or not other.exists() else other


def _read_images(folder: pathlib.Path, name: str, clean: core.Dataset) -> np.ndarray:
    """Reads [5, N, H, W, 3] uint8 from the file of a corruption, in either spelling."""
    path, severities = _path_of(folder, name), len(parameter_tables.SEVERITIES)
    images = _load_array(path)
    wanted = (severities * len(clean), *clean.image_shape)
    if images.shape != wanted or images.dtype != np.uint8:
        raise UserError(
            f"{path.name} in config.eval_c_dir (--c_dir) = {str(folder)!r} is "
            f"{_described(images)} and should be [{', '.join(map(str, wanted))}] uint8: write it "
            "again, or set config.eval_split (--split) to the images that it was made from."
        )
    return images.reshape(severities, len(clean), *clean.image_shape)


def _described(array: np.ndarray) -> str:
    return f"[{', '.join(map(str, array.shape))}] {array.dtype}"
