"""Writes and reads DeepAugment's sets of rendered images."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm

from ada_jax import locks, paths
from ada_jax.augment import rendering
from ada_jax.data import batching, core, npy_files
from ada_jax.errors import UserError
from ada_jax.nets import corruption_nets, weight_files

SHEET_IMAGES, SHEET_COPIES = 8, 3


# ------------------------------------------------------------------------ writing a set


def write_set(
    dataset: core.Dataset, out: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> bool:
    """Renders every image `config.copies` times through every network, and writes the results.

    NET_copyCC_SSS.npy is [n,H,W,3] uint8, shard SSS of n = config.shard_images images (fewer in the
    last one).

    Args:
      dataset: the clean images, in a fixed order.
      out: folder of the set, created if missing.
      config: a config like experiments/deepaugment.py.

    Returns:
      Whether the set is complete; otherwise other processes are writing the rest.

    Raises:
      UserError: a field is invalid, or the folder holds something else.
    """
    out, nets = check_request(config, out)
    corruption_nets.check_sizes("config.nets", config.nets, config.enlarge, dataset.image_shape)
    with locks.hold(f"--out={out}", locks.of_folder(out), wait=True):
        npy_files.check_folder(out)
        npy_files.check_manifest(out, _manifest(dataset, nets, config))
    shards = _shards(dataset, tuple(nets), range(config.copies), config.shard_images)
    missing = [s for s in shards if not npy_files.is_complete(out / s.file, s.shape)]
    npy_files.check_space(out, sum(math.prod(s.shape) for s in missing))
    total, remaining = (sum(s.shape[0] for s in some) for some in (shards, missing))
    images = Images(dataset)
    with tqdm.tqdm(total=total, initial=total - remaining, unit="image") as progress:
        for shard in missing:
            with locks.claim(locks.of_file(out / shard.file)) as ours:
                if not ours or npy_files.is_complete(out / shard.file, shard.shape):
                    continue
                theta, enlarge = nets[shard.net]
                progress.set_description(f"{shard.net}, copy {shard.copy + 1}")
                blocks = rendering.generate(
                    shard.net,
                    theta,
                    images,
                    seed=config.seed,
                    copy=shard.copy,
                    group=config.group,
                    quirks=config.quirks,
                    enlarge=enlarge,
                    start=shard.start,
                    stop=shard.start + shard.shape[0],
                )
                blocks = npy_files.with_progress(blocks, progress)
                npy_files.write(out / shard.file, np.uint8, shard.shape, blocks)
    return all(npy_files.is_complete(out / s.file, s.shape) for s in shards)


def check_request(
    config: ml_collections.ConfigDict, out: str | os.PathLike[str]
) -> tuple[pathlib.Path, dict[str, tuple[Any, int]]]:
    """Checks the arguments of `write_set` before images are read.

    Returns:
      The folder, and each network's theta and enlargement.
    """
    validate(config)
    fields = zip(config.nets, config.weights, config.enlarge, strict=True)
    nets = {
        name: (jax.tree.map(np.asarray, corruption_nets.make(name, path or None).theta), factor)
        for name, path, factor in fields
    }
    return paths.local(f"--out={out}", out), nets


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """The images of a data set as uint8, indexed by arrays of positions."""

    dataset: core.Dataset

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.dataset), *self.dataset.image_shape)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return batching.to_uint8(batching.gather(self.dataset, positions)["image"])


@dataclasses.dataclass(frozen=True)
class _Shard:
    net: str
    copy: int
    start: int  # Position of the first image.
    shape: tuple[int, ...]
    file: str


def _shards(
    dataset: core.Dataset, nets: Sequence[str], copies: Sequence[int], size: int
) -> list[_Shard]:
    """All shards of a set, copy by copy."""
    starts = range(0, len(dataset), size)
    return [
        _Shard(
            net,
            copy,
            start,
            (min(size, len(dataset) - start), *dataset.image_shape),
            f"{net}_copy{copy:02d}_{start // size:03d}.npy",
        )
        for copy in copies
        for net in nets
        for start in starts
    ]


def _manifest(
    dataset: core.Dataset, nets: dict[str, Any], config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Describes a set, without the number of its copies, which may grow."""
    return {
        "kind": "deepaugment",
        "data": dataset.name,
        "data_sha256": dataset.fingerprint,
        "images": len(dataset),
        "nets": {
            name: {"weights_sha256": weight_files.digest(theta), "enlarge": enlarge}
            for name, (theta, enlarge) in nets.items()
        },
        "seed": config.seed,
        "group": config.group,
        "quirks": config.quirks,
        "shard_images": config.shard_images,
        "recipe": max(rendering.RECIPES[name] for name in nets),
    }


# ------------------------------------------------------------------------ reading a set


@dataclasses.dataclass(frozen=True, eq=False)
class _Copy:
    """One rendering of all images in memory-mapped shards; `[i]` is [H,W,3] uint8."""

    shards: tuple[np.ndarray, ...]
    size: int

    def __getitem__(self, i: int) -> np.ndarray:
        return self.shards[i // self.size][i % self.size]


class RenderedSet(NamedTuple):
    """A complete set.

    Attributes:
      copies: the copies of each network, which map a position to [H,W,3] uint8.
      digest: SHA-256 of the manifest.
    """

    copies: dict[str, tuple[_Copy, ...]]
    digest: str


def open_set(folder: str | os.PathLike[str], dataset: core.Dataset, copies: int) -> RenderedSet:
    """Opens a set made by `write_set`, memory-mapped.

    Args:
      folder: folder of the set.
      dataset: the clean images that it must have been made from.
      copies: number of copies to use.

    Returns:
      The set.

    Raises:
      UserError: the set is missing, was made from other images, or has fewer copies.
    """
    where = f"config.deepaugment.dir={os.fspath(folder)!r}"
    manifest, folder = read_manifest(folder), paths.local(where, folder)
    if dataset.fingerprint != manifest["data_sha256"]:
        raise UserError(
            f"{where} was made from {manifest['images']} other images ({manifest['data']}) than "
            f"the {len(dataset)} of config.train_split: make a set of these with "
            "python -m ada_jax.deepaugment, or give another folder."
        )
    size = manifest["shard_images"]
    opened = {}
    for net in manifest["nets"]:
        shards = _shards(dataset, [net], range(copies), size)
        lacking = [s for s in shards if not npy_files.is_complete(folder / s.file, s.shape)]
        if lacking:
            raise UserError(
                f"{where} has {lacking[0].copy} complete copies of {net}, fewer than "
                f"config.deepaugment.copies={copies} ({lacking[0].file} is missing): "
                f"run python -m ada_jax.deepaugment with --copies={copies}, which adds the rest."
            )
        arrays = [np.load(folder / s.file, mmap_mode="r", allow_pickle=False) for s in shards]
        count = len(shards) // copies
        opened[net] = tuple(
            _Copy(tuple(arrays[c * count : (c + 1) * count]), size) for c in range(copies)
        )
    manifest.pop("data")  # Only a name.
    text = json.dumps(manifest, sort_keys=True)
    return RenderedSet(opened, hashlib.sha256(text.encode()).hexdigest())


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the manifest of a set.

    Raises:
      UserError: there is no set, or its recipe is of a newer version.
    """
    where = f"config.deepaugment.dir={os.fspath(folder)!r}"
    folder = paths.local(where, folder)
    try:
        manifest = paths.read_json(folder / "manifest.json")
        # Sets of older recipes can be trained on, but copies can no longer be added.
        if manifest["kind"] == "deepaugment" and manifest["recipe"] <= max(
            rendering.RECIPES.values()
        ):
            return manifest
        found = f"a set of kind {manifest['kind']!r}, recipe {manifest['recipe']}"
    except FileNotFoundError:
        found = "no set (manifest.json is missing)"
    except (OSError, ValueError, TypeError, KeyError) as error:
        found = f"a manifest.json that cannot be read ({error!r})"
    raise UserError(
        f"{where} has {found}: make one with python -m ada_jax.deepaugment "
        f"--config=experiments/deepaugment.py --out={shlex.quote(str(folder))}, or give the "
        "folder of a set."
    )


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field of a config that is invalid."""
    nets, known = tuple(config.nets), corruption_nets.names()
    if not nets or len(set(nets)) < len(nets) or not set(nets) <= set(known):
        raise UserError(f"config.nets={nets} must be distinct names from {', '.join(known)}.")
    for field in ("weights", "enlarge"):
        if len(config[field]) != len(nets):
            raise UserError(
                f"config.{field}={tuple(config[field])} must have one value for each of "
                f"config.nets={nets}."
            )
    if not all(isinstance(n, int) and n >= 1 for n in config.enlarge):
        raise UserError(f"config.enlarge={tuple(config.enlarge)} must be integers of at least 1.")
    for field in ("copies", "group", "shard_images"):
        if config[field] < 1:
            raise UserError(f"config.{field}={config[field]} must be 1 or more.")
    if config.shard_images % config.group:
        raise UserError(
            f"config.shard_images={config.shard_images} must be a multiple of "
            f"config.group={config.group}."
        )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed={config.seed} must be in 0..2**32-1.")
