"""DeepAugment: renders a data set through distorted networks (Hendrycks et al., 2021).

python -m ada_jax.deepaugment --config=experiments/deepaugment.py --copies=10 --out=DIR

A group of images shares one random distortion of a network's weights; the distortions of the
network's features are drawn for every image. The set is written in shards. The same command
resumes a stopped set or adds copies. Several processes, also on several hosts with a shared file
system, may run it at once: each takes the next shard that no other process works on.
"""

import os

import ml_collections
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from ada_jax import results as results_files
from ada_jax.augment import rendered_set
from ada_jax.data import sources
from ada_jax.errors import require_extra
from ada_jax.report import figures
from ada_jax.run import cli, config_checks

RULES = (
    (*config_checks.SIDE, ("image_size",)),
    (*config_checks.DEVICES, ("cpu_devices",)),
)


def main(config: ml_collections.ConfigDict, out: str) -> None:
    """Writes the set and a contact sheet with some of its images."""
    fields = results_files.flat(config.to_dict())
    config_checks.check_values(fields)
    config_checks.check_fields(fields, {"dataset": sources.NAMES}, RULES)
    require_extra("The contact sheet", "matplotlib")
    cli.set_up_devices(config.cpu_devices, config.compilation_cache)
    rendered_set.check_request(config, out)
    dataset = sources.load(
        config.dataset,
        config.train_split,
        data_dir=config.data_dir or None,
        image_size=config.image_size,
    )
    if not rendered_set.write_set(dataset, out, config):
        logging.info("Other processes are still writing the missing shards of %s.", out)
        return
    count = min(rendered_set.SHEET_IMAGES, len(dataset))
    opened = rendered_set.open_set(out, dataset, config.copies).copies
    columns = {"clean": rendered_set.Images(dataset)[np.arange(count)]}
    for net, copies in opened.items():
        for c, copy in enumerate(copies[: rendered_set.SHEET_COPIES]):
            columns[f"{net} {c + 1}"] = np.stack([copy[i] for i in range(count)])
    sheet = os.path.join(out, "sheet.png")
    figures.contact_sheet(sheet, columns)
    print(f"{len(dataset)} images, {config.copies} copies of {', '.join(opened)}: {out}, {sheet}")


if __name__ == "__main__":
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Config file, such as experiments/deepaugment.py."
    )
    out_flag = flags.DEFINE_string("out", None, "Output folder; runs/NAME by default.")
    copies_flag = flags.DEFINE_integer("copies", None, "Short for --config.copies.")
    flags.mark_flag_as_required("config")

    def with_flags(argv: list[str]) -> None:
        del argv
        config = config_flag.value
        if copies_flag.value is not None and "copies" in config:
            config.copies = copies_flag.value
        main(config, out_flag.value or cli.default_folder(config.name, config.seed))

    cli.start(with_flags)
