"""The sets of images that an evaluation measures, corrupted on the fly or read."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from ada_jax import results as results_files
from ada_jax.corruptions import c_folder, functions, parameter_tables
from ada_jax.data import batching, core, photographs, tfds_sets
from ada_jax.errors import UserError

_CORRUPTIONS = {"c": parameter_tables.NAMES, "extra": parameter_tables.EXTRA}
SETS = ("clean", *_CORRUPTIONS, "cifar10_1")
WORST = ("lp", "ada")  # of the binary alone
_IMAGENET_C = 224  # pixels, the side of ImageNet-C's images


# ------------------------------------------------------------------------ the sets


class Sets(NamedTuple):
    """What there is to measure on, checked.

    Attributes:
      datasets: images and labels of every cell.
      source: where the corrupted images come from: the results' 'corruption_source'; empty where
        there are none.
    """

    datasets: dict[results_files.Cell, core.Dataset]
    source: dict[str, Any]


def open_sets(
    config: ml_collections.ConfigDict,
    clean: core.Dataset,
    names: Sequence[str],
    examples: int | None = None,
) -> Sets:
    """Finds the images of some sets, and what is wrong with them before anything is computed.

    Args:
      config: 'eval_c_dir', 'corruption_seed', 'corruption_table' and 'data_dir' count.
      clean: the clean images.
      names: of SETS.
      examples: how many of the corrupted images to take from the start; None takes all.

    Raises:
      UserError: files are missing, half-written, damaged or do not belong to the clean images, or
        have other classes.
    """
    datasets, source = {}, {}
    if "clean" in names:
        datasets["clean", 0] = clean
    if wanted := [c for set_name in names for c in _CORRUPTIONS.get(set_name, ())]:
        size = min(examples or len(clean), len(clean))
        if config.eval_c_dir in ("", "tfds"):
            open_corrupted = _from_tfds if config.eval_c_dir else on_the_fly
            corrupted, source = open_corrupted(config, clean, wanted, size)
        else:
            corrupted, source = c_folder.open_set(config.eval_c_dir, clean, wanted, size)
        datasets |= corrupted
    if "cifar10_1" in names:
        _require_cifar10(clean, "cifar10_1")
        datasets["cifar10_1", 0] = tfds_sets.cifar10_1(config.data_dir or None)
    names = clean.class_names
    return Sets({cell: core.renumbered(d, names) for cell, d in datasets.items()}, source)


def _require_cifar10(clean: core.Dataset, name: str) -> None:
    if clean.num_classes != 10 or clean.image_shape != (32, 32, 3):
        raise UserError(
            f"The set {name} has 10 classes of 32x32 pixels, and {clean.name} has "
            f"{clean.num_classes} of {clean.image_shape[0]}x{clean.image_shape[1]}: leave it out "
            "of config.eval_sets (--sets)."
        )


def _cells(names: Iterable[str]) -> list[results_files.Cell]:
    return list(itertools.product(names, parameter_tables.SEVERITIES))


@dataclasses.dataclass(frozen=True, eq=False)
class _Corrupted:
    """The first `size` clean images, corrupted each time they are asked for, `side` pixels wide."""

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
            c_folder.as_uint8(batch["image"]),
            self.seed,
            indices=indices,
            table=self.table,
        )
        if self.side != self.clean.image_shape[0]:
            images = photographs.shrunk(images, self.side)
        return zip(images, batch["label"].tolist(), strict=True)


def on_the_fly(
    config: ml_collections.ConfigDict, clean: core.Dataset, names: Sequence[str], size: int
) -> tuple[dict[results_files.Cell, core.Dataset], dict[str, Any]]:
    """Sets that are corrupted each time they are read, and what identifies them."""
    settings = {"seed": config.corruption_seed, "table": config.corruption_table}
    side, told = clean.image_shape[0], {}
    original = clean
    if config.dataset == "imagenet2012" and config.corruption_table == "imagenet":
        # As in ImageNet-C, the squares are corrupted at the size its parameters are meant for.
        original, told = tfds_sets.resized(clean, _IMAGENET_C), {"pixels": _IMAGENET_C}
    sources = {
        cell: _Corrupted(original, size, *cell, **settings, side=side) for cell in _cells(names)
    }
    for name in names:  # One image each, for whatever is wrong to show now.
        _ = sources[name, 1][0]
    datasets = {cell: dataclasses.replace(clean, source=s) for cell, s in sources.items()}
    recipe = c_folder.RECIPES[config.corruption_table]
    return datasets, {"kind": "on_the_fly", "recipe": recipe, **settings, **told}


def _from_tfds(
    config: ml_collections.ConfigDict, clean: core.Dataset, names: Sequence[str], size: int
) -> tuple[dict[results_files.Cell, core.Dataset], dict[str, Any]]:
    base, open_cell = "test", tfds_sets.cifar10_corrupted
    if config.dataset == "imagenet2012":
        base = "validation"
        open_cell = functools.partial(
            tfds_sets.imagenet2012_corrupted, image_size=config.image_size
        )
    else:
        _require_cifar10(clean, "cifar10_corrupted")
    split = f"{base}[:{size}]" if size < len(clean) else base
    datasets, digests = {}, {}
    for cell in _cells(names):
        datasets[cell] = dataset = open_cell(*cell, config.data_dir or None, split=split)
        if len(dataset) != size:
            raise UserError(
                f"{dataset.name} has {len(dataset)} images, and there are {size} clean ones: set "
                "config.eval_split (--split) to the test split that it was made from."
            )
        digests["{}/{}".format(*cell)] = dataset.fingerprint
    return datasets, {"kind": "tfds", "files": digests}
