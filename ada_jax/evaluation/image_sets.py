"""The image sets of an evaluation: corrupted on the fly or read from files."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from ada_jax import results as results_files
from ada_jax.corruptions import c_folder, functions, parameter_tables
from ada_jax.data import batching, core, photographs, tfds_sets
from ada_jax.errors import UserError

_IMAGENET_C = 224  # pixels, the side of ImageNet-C's images
_Corruptions = tuple[dict[results_files.Condition, core.Dataset], dict[str, Any]]


def cifar10_1(config: ml_collections.ConfigDict, clean: core.Dataset) -> core.Dataset:
    """CIFAR-10.1 v6, from TFDS."""
    _require_cifar10(clean, "cifar10_1")
    return tfds_sets.cifar10_1(config.data_dir or None)


def corrupted(
    config: ml_collections.ConfigDict, clean: core.Dataset, names: Sequence[str], size: int
) -> _Corruptions:
    """Opens corrupted images as config.eval_c_dir says: a folder, 'tfds', or '' for on the fly.

    Args:
      config: see `evaluators.open_sets`.
      clean: the clean images.
      names: corruptions.
      size: number of images to take from the start.

    Returns:
      A data set for every corruption and severity, and the results' 'corruption_source'.
    """
    if config.eval_c_dir == "tfds":
        return _from_tfds(config, clean, names, size)
    if config.eval_c_dir:
        return c_folder.open_set(config.eval_c_dir, clean, names, size)
    return on_the_fly(config, clean, names, size)


def _require_cifar10(clean: core.Dataset, name: str) -> None:
    if clean.num_classes != 10 or clean.image_shape != (32, 32, 3):
        raise UserError(
            f"The set {name} has 10 classes of 32x32 pixels, and {clean.name} has "
            f"{clean.num_classes} of {clean.image_shape[0]}x{clean.image_shape[1]}: remove it "
            "from config.eval_sets (--sets)."
        )


def _conditions(names: Iterable[str]) -> Iterator[results_files.Condition]:
    return itertools.product(names, parameter_tables.SEVERITIES)


@dataclasses.dataclass(frozen=True, eq=False)
class _Corrupted:
    """The first `size` clean images, corrupted when they are read, `side` pixels wide."""

    clean: core.Dataset
    size: int
    name: str
    severity: int
    seed: int
    table: str
    side: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return next(iter(self.__getitems__([i])))

    def __getitems__(self, indices: Sequence[int]) -> Iterable[tuple[np.ndarray, int]]:
        batch = batching.gather(self.clean, np.asarray(indices))
        images = functions.corrupt(
            self.name,
            self.severity,
            batching.to_uint8(batch["image"]),
            self.seed,
            indices=indices,
            table=self.table,
        )
        if self.side != self.clean.image_shape[0]:
            images = photographs.shrunk(images, self.side)
        return zip(images, batch["label"].tolist(), strict=True)


def on_the_fly(
    config: ml_collections.ConfigDict, clean: core.Dataset, names: Sequence[str], size: int
) -> _Corruptions:
    """Images that are corrupted each time they are read; see `corrupted`."""
    settings = {"seed": config.corruption_seed, "table": config.corruption_table}
    side, original, resolution = clean.image_shape[0], clean, {}
    if config.dataset == "imagenet2012" and config.corruption_table == "imagenet":
        # As in ImageNet-C, the squares are corrupted at the size its parameters are meant for.
        original, resolution = tfds_sets.resized(clean, _IMAGENET_C), {"pixels": _IMAGENET_C}
    datasets = {
        key: dataclasses.replace(
            clean, source=_Corrupted(original, size, *key, **settings, side=side)
        )
        for key in _conditions(names)
    }
    for name in names:  # Corrupting one image of each raises errors before anything is compiled.
        _ = datasets[name, 1].source[0]
    recipe = c_folder.RECIPES[config.corruption_table]
    return datasets, {"kind": "on_the_fly", "recipe": recipe, **settings, **resolution}


def _from_tfds(
    config: ml_collections.ConfigDict, clean: core.Dataset, names: Sequence[str], size: int
) -> _Corruptions:
    if missing := set(names) - {*parameter_tables.NAMES, *parameter_tables.EXTRA}:
        raise UserError(
            f"config.eval_c_dir (--c_dir) = 'tfds' has no corruption {min(missing)!r}: set '' to "
            "corrupt on the fly, or name a folder of .npy files."
        )
    base, open_one = "test", tfds_sets.cifar10_corrupted
    if config.dataset == "imagenet2012":
        base = "validation"
        open_one = functools.partial(tfds_sets.imagenet2012_corrupted, image_size=config.image_size)
    else:
        _require_cifar10(clean, "cifar10_corrupted")
    if clean.origin.startswith(f"{config.dataset}/") and not clean.origin.endswith(f"/{base}"):
        raise UserError(
            f"config.eval_c_dir (--c_dir) = 'tfds' has corrupted images of the {base} split, and "
            f"the clean ones are of {clean.origin}: set '' to corrupt them on the fly, or "
            f"config.eval_split (--split) to {base!r}."
        )
    data_dir, first = config.data_dir or None, 0
    if isinstance(clean.members, range):
        first = clean.members.start
    elif len(whole := open_one(names[0], 1, data_dir, split=base)) != len(clean):
        raise UserError(
            f"{whole.name} has {len(whole)} images, and there are {len(clean)} clean ones: set "
            "config.eval_split (--split) to the test split that it was made from."
        )
    split, datasets, digests = f"{base}[{first}:{first + size}]", {}, {}
    for name, severity in _conditions(names):
        dataset = datasets[name, severity] = open_one(name, severity, data_dir, split=split)
        digests[f"{name}/{severity}"] = dataset.fingerprint
    return datasets, {"kind": "tfds", "files": digests}
