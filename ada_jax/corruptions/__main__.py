"""Writes a "-C" folder of corrupted images in the layout of CIFAR-10-C.

python -m ada_jax.corruptions --data=cifar10 --split=test --out=cifar10c
"""

import os

from absl import flags

from ada_jax import paths
from ada_jax.corruptions import c_folder, parameter_tables
from ada_jax.data import core, sources
from ada_jax.errors import UserError, renamed
from ada_jax.run import cli


def main(argv: list[str]) -> None:
    """Writes the set that the flags describe."""
    del argv
    values = flags.FLAGS
    if not values.data or not values.out:
        raise UserError("--data or --out is not set: give the images and the output folder.")
    # `check_request` rejects severities that are not numbers.
    severities = [int(s) if s.isdigit() else s for s in values.severities]
    c_folder.check_request(values.names, severities, values.seed, values.table, values.processes)
    paths.local(f"--out={values.out}", values.out)
    if values.image_size < parameter_tables.SMALLEST:
        raise UserError(
            f"--image_size={values.image_size} is too small: give at least "
            f"{parameter_tables.SMALLEST} pixels."
        )
    c_folder.write_set(
        _load(values.data, values.split, values.data_dir, values.image_size),
        values.out,
        names=values.names,
        severities=severities,
        seed=values.seed,
        table=values.table,
        processes=values.processes,
    )


def _load(name: str, split: str, data_dir: str | None, image_size: int) -> core.Dataset:
    """Loads the clean images; errors name the flags instead of config fields."""
    is_file = name.endswith(".npz")
    if is_file and data_dir:
        raise UserError(f"--data_dir={data_dir} does not apply to --data={name}: leave it out.")
    try:
        return sources.load(
            "npz" if is_file else name,
            split,
            data_dir=name if is_file else data_dir,
            image_size=image_size,
        )
    except UserError as error:
        names = {"config.train_split or config.eval_split": "--split", "--config.": "--"}
        names |= {"config.": "--", "--dataset": "--data"}
        raise renamed(error, names | ({"--data_dir": "--data"} if is_file else {})) from error


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "mnist5k, cifar10, imagenet2012, folder or an .npz file.")
    flags.DEFINE_string("split", "test", "Split or slice of the data, such as test[:500].")
    flags.DEFINE_string("data_dir", None, "Folder of the data.")
    flags.DEFINE_integer("image_size", 32, "Side in pixels of a folder's or ImageNet's images.")
    flags.DEFINE_string("out", None, "Output folder.")
    flags.DEFINE_list(
        "names",
        list(parameter_tables.NAMES + parameter_tables.EXTRA),
        "Corruptions; by default the 15 and the 4 extra ones. C-bar's are given by name.",
    )
    flags.DEFINE_list("severities", [str(s) for s in parameter_tables.SEVERITIES], "Severities.")
    flags.DEFINE_integer("seed", 0, "Random seed.")
    flags.DEFINE_string("table", "cifar", "Table of parameters: cifar or imagenet.")
    flags.DEFINE_integer("processes", os.cpu_count() or 1, "Number of worker processes.")
    cli.start(main)
