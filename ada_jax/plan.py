"""Checks without a TPU whether a config fits on one, and gives a lower bound of the step time.

    python -m ada_jax.plan --config=experiments/cifar10.py --topology=v5e:2x2,v3:2x2 [--json=FILE]

The TPU compiler (`pip install -e '.[tpu]'`) compiles the update step of `ada_jax.train` for all
cores of the topology; neither data nor weights are needed. The exit status is 1 if the step does
not fit in a core's memory. FILE collects the figures of several configs, which are then printed as
one table; a config and topology in it are not compiled again.

The figures, all for one core:
  useful flops     of the matrix products and convolutions in the step; loops are multiplied by
                   their number of iterations (XLA's cost analysis counts them once).
  compiled flops   the same for the compiled program; many more than the useful ones mean that the
                   compiler chose an inefficient algorithm.
  HBM traffic      bytes that the compiled program moves to and from HBM, and what moves them.
  floor            the larger of compiled flops / the chip's published peak and HBM traffic / its
                   published bandwidth. No step is faster; most are several times slower, because
                   64 channels do not fill a matrix unit of 128 x 128.
  whole run        hours for all steps at the floor, and at 40% and 20% of its speed.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

from ada_jax import locks, paths, sharding, training
from ada_jax.errors import UserError, first_line
from ada_jax.evaluation import scoring
from ada_jax.nets import classifiers, corruption_nets
from ada_jax.report import tables
from ada_jax.run import cli, config_checks, costs, logbook


class Chip(NamedTuple):
    """One core of a generation of TPUs.

    Attributes:
      example: the smallest topology.
      cores: cores per chip, as the compiler counts them.
      peak: published peak, bfloat16 flops per second. By default XLA multiplies float32 in one
        bfloat16 pass, too.
      bandwidth: published HBM bandwidth, bytes per second.
      hbm: bytes that the compiler allows a program, less than the published size.
    """

    example: str
    cores: int
    peak: float
    bandwidth: float
    hbm: float


GIB = 2**30
# Peak and bandwidth: cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, divided by the cores per chip.
# hbm: the available memory in libtpu 0.0.42's error messages.
CHIPS = {
    "v3": Chip("v3:2x2", 2, 123e12 / 2, 900e9 / 2, 15.48 * GIB),
    "v4": Chip("v4:2x2x1", 2, 275e12 / 2, 1200e9 / 2, 15.25 * GIB),
    "v5e": Chip("v5e:2x2", 1, 197e12, 819e9, 15.75 * GIB),
    "v5p": Chip("v5p:2x2x1", 1, 459e12, 2765e9, 95.74 * GIB),
    "v6e": Chip("v6e:2x2", 1, 918e12, 1638e9, 31.25 * GIB),
}
_UTILISATIONS = (1.0, 0.4, 0.2)  # Shares of the floor's speed.
# Training examples and classes: ImageNet's, or CIFAR-10's for other data sets.
_SIZES = {"imagenet2012": (1_281_167, 1000)}
_SIZES_OF_OTHERS = (50_000, 10)
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # There is no metadata server.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # Any value silences a warning.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Several plans may run at once.
}


# ------------------------------------------------------------------------ checks


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as 'v5e:2x2'; raises UserError if it is unknown."""
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        known = ", ".join(chip.example for chip in CHIPS.values())
        raise UserError(
            f"--topology={topology!r} is unknown: use {known} or a larger shape of one of these."
        )
    return CHIPS[generation]


def cores_of(topology: str) -> int:
    """The number of cores of a topology such as 'v5e:2x2'."""
    chip = chip_of(topology)
    return chip.cores * math.prod(int(n) for n in topology.partition(":")[2].split("x"))


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The TPU compiler's devices for a topology; raises UserError if it has none."""
    chip = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("The TPU compiler is not installed: run pip install -e '.[tpu]' first.")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"The TPU compiler does not support --topology={topology!r} ({_reason(error)}): "
            f"use {chip.example} or a larger one."
        ) from error


def _reason(error: BaseException) -> str:
    return re.sub(r"^[A-Z_]+: ", "", first_line(error))


# ------------------------------------------------------------------------ the step


class Step(NamedTuple):
    """The update step of one device, and the shapes of its arguments state, theta, batch, key."""

    update: Any
    arguments: tuple[Any, ...]


def step_of(config: ml_collections.ConfigDict, batch_size: int) -> Step:
    """Makes a config's update step like `ada_jax.train`, for `batch_size` examples per device."""
    size = config.image_size
    _, num_classes = _SIZES.get(config.dataset, _SIZES_OF_OTHERS)
    classifier = scoring.make_classifier(config, num_classes)
    optimizer, _ = training.make_optimizer(config, steps_per_epoch=100, total_steps=1000)
    nets = [
        corruption_nets.architecture(name)
        for name in (config.ada.corruption_net if config.method == "ada" else ())
    ]
    key = jax.eval_shape(lambda: jax.random.key(0))

    def initial_state(key):
        images = jnp.zeros((1, size, size, 3))
        state = training.initial_state(classifier, optimizer, key, images)
        return training.with_average(state) if config.ema_decay else state

    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    thetas = tuple(jax.eval_shape(net.init, key) for net in nets)
    applies = [
        corruption_nets.enlarged(net.apply, enlarge)
        for net, enlarge in zip(nets, config.ada.corruption_enlarge, strict=False)
    ]
    if config.method == "pat" and config.pat.network != "self":
        bounding = classifiers.make(config.pat.network, num_classes)
        init = functools.partial(bounding.init, is_training=True)
        params, net_state = jax.eval_shape(init, key, jnp.zeros((1, size, size, 3)))
        thetas = ({"params": params, "state": net_state},)
        applies = [scoring.features_fn(bounding)]
    update = training.make_update_step(config, classifier, applies, optimizer)
    return Step(update, (jax.eval_shape(initial_state, key), thetas, batch, key))


def useful_flops(step: Step, cores: int) -> float:
    """Flops of the step on one core, see `costs.useful_flops`."""
    jaxpr = jax.make_jaxpr(step.update, axis_env=[(sharding.AXIS, cores)])(*step.arguments)
    return costs.useful_flops(jaxpr)


def compile_step(step: Step, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """Compiles the step for these devices, mapped like in `ada_jax.train`."""
    *mapped, key = step.arguments
    mapped = jax.tree.map(lambda a: jax.ShapeDtypeStruct((len(devices), *a.shape), a.dtype), mapped)
    update = jax.pmap(
        step.update, sharding.AXIS, in_axes=(0, 0, 0, None), donate_argnums=0, devices=devices
    )
    return update.lower(*mapped, key).compile()


# ------------------------------------------------------------------------ the figures


def plan_step(
    config: ml_collections.ConfigDict, topology: str, examples: int | None = None
) -> dict[str, Any]:
    """Compiles the step for a topology and returns its figures.

    Args:
      config: the run's config.
      topology: such as 'v5e:2x2'.
      examples: training examples, for the length of a run; None means the data set's.

    Returns:
      The figures of one core in flops, bytes and seconds. If the step does not fit in memory,
      'fits' is False, 'compiler_error' has its message, and there are no figures of the
      program.

    Raises:
      UserError: the topology or the batch size is invalid.
    """
    config_checks.validate_devices(config, cores_of(topology))
    known, classes = _SIZES.get(config.dataset, _SIZES_OF_OTHERS)
    chip, devices = chip_of(topology), devices_of(topology)
    cores = len(devices)
    step = step_of(config, config.batch_size // cores)
    figures = {
        **_identity(config, topology, examples),
        "data": f"{examples or known:,} examples of {config.image_size}x{config.image_size}, "
        f"{classes} classes",
        "device": devices[0].device_kind,
        "cores": cores,
        "batch_per_core": config.batch_size // cores,
        "useful_flops": useful_flops(step, cores),
        "hbm_available": chip.hbm,
    }
    started = time.monotonic()
    try:
        compiled = compile_step(step, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return figures | {"fits": False, "compiler_error": _reason(error)}
    figures["compile_seconds"] = time.monotonic() - started
    return figures | {"fits": True} | program_figures(compiled, chip)


def _identity(
    config: ml_collections.ConfigDict, topology: str, examples: int | None
) -> dict[str, Any]:
    fields = json.dumps(config.to_dict(), sort_keys=True)
    installed = filter(importlib.util.find_spec, ("jax", "libtpu"))
    return {
        "config": config.name,
        "config_sha256": hashlib.sha256(fields.encode()).hexdigest(),
        "topology": topology,
        "steps": steps_of(config, examples),
        "versions": {name: importlib.metadata.version(name) for name in installed},
    }


def program_figures(compiled: jax.stages.Compiled, chip: Chip) -> dict[str, float]:
    """Flops, traffic, memory and floor of a compiled program, on one core."""
    cost, memory = costs.program_costs(compiled.as_text()), compiled.memory_analysis()
    xla = compiled.cost_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = {
        "hbm_arguments": memory.argument_size_in_bytes,
        "hbm_temporary": memory.temp_size_in_bytes,
        "hbm_code": memory.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) + outputs
    seconds = {
        "flops_seconds": cost.flops / chip.peak,
        "traffic_seconds": cost.hbm_bytes / chip.bandwidth,
    }
    return {
        "compiled_flops": cost.flops,
        "hbm_traffic": cost.hbm_bytes,
        **{f"hbm_traffic_{kind}": cost.traffic[kind] for kind in costs.KINDS},
        "xla_flops": xla["flops"],
        "xla_bytes": xla["bytes accessed"],
        **parts,
        "hbm_total": total,
        "hbm_share": total / chip.hbm,
        **seconds,
        "floor_seconds": max(seconds.values()),
    }


def table(figures: dict[str, Any]) -> str:
    """Formats the figures of one topology as a table."""
    f = figures
    rows = [
        ("topology", f"{f['topology']}, {f['cores']} cores of {f['device']}"),
        ("data, assumed", f["data"]),
        ("batch", f"{f['batch_per_core']} examples a core"),
        ("useful flops", f"{f['useful_flops'] / 1e12:.3f} T a core"),
    ]
    if f["fits"]:
        chip = chip_of(f["topology"])
        once = f"{f['xla_flops'] / 1e12:.3f} T flops, {f['xla_bytes'] / 1e9:.1f} GB accessed"
        rows += [
            ("compiled flops", f"{f['compiled_flops'] / 1e12:.3f} T a core"),
            ("HBM traffic", f"{f['hbm_traffic'] / 1e9:.1f} GB a core"),
            *[
                (f"  {name}", f"{f[f'hbm_traffic_{kind}'] / 1e9:.1f} GB")
                for kind, name in costs.KINDS.items()
            ],
            ("XLA's count, loops once", once),
            ("HBM for arguments", _gib(f["hbm_arguments"])),
            ("HBM for temporaries", _gib(f["hbm_temporary"])),
            ("HBM for code", _gib(f["hbm_code"])),
            (
                "HBM in all",
                f"{_gib(f['hbm_total'])} of {_gib(f['hbm_available'])}, "
                f"{1 - f['hbm_share']:.0%} free",
            ),
            ("seconds for the flops", f"{f['flops_seconds']:.3f} at {chip.peak / 1e12:.1f} T/s"),
            (
                "seconds for the traffic",
                f"{f['traffic_seconds']:.3f} at {chip.bandwidth / 1e9:.0f} GB/s",
            ),
            ("floor", f"{f['floor_seconds']:.3f} seconds a step"),
            run_row(f),
            ("compiled in", f"{f['compile_seconds']:.0f} seconds"),
        ]
    return "\n".join(f"| {name:24} | {value:44} |" for name, value in rows)


def comparison(results: Sequence[dict[str, Any]]) -> tables.Table:
    """A table with one line for each result of `plan_step`, grouped by config."""
    head = [
        "config",
        "topology",
        "T flops",
        "HBM, GiB",
        "free",
        "floor, s",
        "hours at floor",
        "40%",
    ]
    groups = []
    configs = [f["config"] for f in results]
    for f in sorted(results, key=lambda f: configs.index(f["config"])):
        line = [tables.Cell(f[name]) for name in ("config", "topology")]
        line.append(tables.Cell(f["useful_flops"] / 1e12, 2))
        if f["fits"]:
            hours = f["steps"] * f["floor_seconds"] / 3600
            line += [
                tables.Cell(f["hbm_total"] / GIB, 2),
                tables.Cell(f"{1 - f['hbm_share']:.0%}"),
                tables.Cell(f["floor_seconds"], 3),
                tables.Cell(hours, 1),
                tables.Cell(hours / 0.4, 1),
            ]
        else:
            line += [tables.Cell("does not fit"), *[tables.Cell()] * 4]
        groups.append([line])
    return tables.Table("Plans", head, groups)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def run_row(figures: dict[str, Any]) -> tuple[str, str]:
    """The hours of the whole run at several shares of the floor's speed, as a line of `table`."""
    steps, seconds = figures["steps"], figures["floor_seconds"]
    hours = ", ".join(f"{steps * seconds / share / 3600:.1f}" for share in _UTILISATIONS)
    shares = ", ".join(f"{share:.0%}" for share in _UTILISATIONS)
    return f"{steps:,} steps, hours", f"{hours} at {shares} of that"


def steps_of(config: ml_collections.ConfigDict, examples: int | None = None) -> int:
    """Number of steps of a whole run; `examples` defaults to the data set's."""
    if examples is None:
        examples, _ = _SIZES.get(config.dataset, _SIZES_OF_OTHERS)
    return config.train_steps or round(config.epochs * examples / config.batch_size)


def too_large(config: ml_collections.ConfigDict, figures: dict[str, Any]) -> str:
    """The error message for a step that does not fit."""
    local = figures["batch_per_core"]
    smaller = "decrease config.batch_size"
    if config.method == "ada":
        smaller = "set config.ada.microbatch, for example to 1"
    return (
        f"{figures['config']} does not fit on {figures['topology']} with {local} examples a core "
        f"({figures['compiler_error']}): {smaller}, or use more cores."
    )


# ------------------------------------------------------------------------ the command


def main(
    config: ml_collections.ConfigDict,
    topologies: Sequence[str],
    json_path: str | None = None,
    *,
    examples: int | None = None,
) -> int | None:
    """Prints a table for every topology.

    Args:
      config: the run's config.
      topologies: names, or several names separated by commas.
      json_path: file of figures, a list with a dict per config and topology. Those in it are kept
        and, if they are of this config and these versions of JAX and libtpu, not compiled again.
      examples: training examples, for the length of a run; None means the data set's.

    Returns:
      1 if the step does not fit on one of them, else None.

    Raises:
      UserError: the config or a topology is invalid.
    """
    names = [name.strip() for given in topologies for name in given.split(",") if name.strip()]
    if not names:
        raise UserError(f"--topology is not set: give {CHIPS['v5e'].example}, for example.")
    if examples is not None and examples < 1:
        raise UserError(f"--examples={examples} must be at least 1.")
    config_checks.validate(config)
    for name in names:
        config_checks.validate_devices(config, cores_of(name))
    results = []
    if json_path:
        cli.make_folder("json", os.path.dirname(json_path) or ".")
        results = _read(json_path)
    planned = []
    for name in names:
        wanted = _identity(config, name, examples)
        figures = next((f for f in results if wanted.items() <= f.items()), None)
        if figures is None:
            figures = plan_step(config, name, examples) | {"commit": logbook.commit()}
            results = _add(json_path, figures) if json_path else [*results, figures]
        planned.append(figures)
        print("\n" + table(figures), flush=True)
        if not figures["fits"]:
            print(f"error: {too_large(config, figures)}", file=sys.stderr, flush=True)
    if len(results) > 1:
        print("\n" + tables.markdown(comparison(results)))
    return None if all(f["fits"] for f in planned) else 1


def _add(path: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds figures to a file, to which other plans may have added some meanwhile; returns all."""
    with locks.hold(f"--json={path}", locks.of_file(path), wait=True):
        results = [*_read(path), figures]
        paths.write_json(path, results)
    return results


def _read(path: str) -> list[dict[str, Any]]:
    """Reads the figures in a file; raises UserError if it is another kind of file."""
    if not paths.exists(path):
        return []
    try:
        results = paths.read_json(path)
        known = all({"config", "topology", "fits"} <= set(f) for f in results)
    except (ValueError, TypeError):
        known = False
    if not known:
        raise UserError(f"--json={path} is not a file of plans: give another file.")
    return results


def _run(config: ml_collections.ConfigDict, workdir: str) -> int | None:
    del workdir  # Nothing is written there.
    f = flags.FLAGS
    return main(config, f.topology, f.json, examples=f.examples)


def _enlarge_stack() -> None:
    """Restarts with the largest stack allowed: for v6e the compiler overflows 8 MB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if sys.platform.startswith("linux") and soft != hard:
        resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    _enlarge_stack()
    jax.config.update("jax_platforms", "cpu")  # Does not occupy a TPU on this machine.
    flags.DEFINE_multi_string("topology", [], "Topologies such as v5e:2x2, separated by commas.")
    flags.DEFINE_string("json", None, "File to which the figures are added.")
    flags.DEFINE_integer(
        "examples",
        None,
        "Training examples, for the length of a run; the data set's by default.",
    )
    cli.run(_run)
