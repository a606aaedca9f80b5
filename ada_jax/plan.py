r"""Tells, without a TPU, whether a config fits on one and how long a step takes there at least.

    python -m ada_jax.plan --config=experiments/cifar10.py --topology=v5e:2x2,v3:2x2 \
        [--hours_price=PRICE] [--json=FILE]

The TPU's own compiler (`pip install -e '.[tpu]'`) compiles the update step of `ada_jax.train` for
all cores of the topology; neither data nor weights are needed. Exit status 1 says that the step
does not fit into a core's memory. A FILE collects the figures of several configs, and ends as one
table; what it has of the same config and topology is not compiled again.

What the table's figures are, all of them for one core:
  useful flops     of the matrix products and convolutions that the step needs; a loop's body is
                   counted as often as it runs (XLA's cost analysis counts it once).
  compiled flops   the same for the program that the compiler made of it: many more than the
                   useful ones mean that it chose a wasteful algorithm.
  HBM traffic      bytes that the compiled program moves to and from HBM, on-chip memory left out.
  floor            the longer of compiled flops over the chip's published peak and HBM traffic over
                   its published bandwidth. No step is faster; most are several times slower, for
                   64 channels do not fill a matrix unit of 128 x 128.
  whole run        hours for all steps where each takes the floor, and where it takes 1 / 0.4 and
                   1 / 0.2 of it; with --hours_price also what they cost.
"""

import hashlib
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

from ada_jax import paths, sharding, training
from ada_jax.errors import UserError
from ada_jax.evaluation import scoring
from ada_jax.nets import corruption_nets
from ada_jax.report import tables
from ada_jax.run import cli, config_checks, costs


class Chip(NamedTuple):
    """A generation of TPUs, one core of it.

    Attributes:
      example: the smallest topology.
      cores: of a chip, as the compiler counts them.
      peak: published peak, bfloat16 flops per second. XLA multiplies float32 in one bfloat16 pass
        too, unless a precision is asked for.
      bandwidth: published HBM bandwidth, bytes per second.
      hbm: bytes that the compiler gives a program; less than the published size.
    """

    example: str
    cores: int
    peak: float
    bandwidth: float
    hbm: float


GIB = 2**30
# Peak and bandwidth: Google's, cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, a chip's divided by
# its cores. hbm: what libtpu 0.0.42 says is available when it refuses a program.
CHIPS = {
    "v3": Chip("v3:2x2", 2, 123e12 / 2, 900e9 / 2, 15.48 * GIB),
    "v4": Chip("v4:2x2x1", 2, 275e12 / 2, 1200e9 / 2, 15.25 * GIB),
    "v5e": Chip("v5e:2x2", 1, 197e12, 819e9, 15.75 * GIB),
    "v5p": Chip("v5p:2x2x1", 1, 459e12, 2765e9, 95.74 * GIB),
    "v6e": Chip("v6e:2x2", 1, 918e12, 1638e9, 31.25 * GIB),
}
_UTILISATIONS = (1.0, 0.4, 0.2)  # of the floor's speed
# Training examples and classes of a data set that is not looked at: ImageNet's, or CIFAR-10's.
_SIZES = {"imagenet2012": (1_281_167, 1000)}
_SIZES_OF_OTHERS = (50_000, 10)
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server about the TPU, for there is none
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: silences a warning
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once
}


# ------------------------------------------------------------------------ checks


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as 'v5e:2x2'.

    Raises:
      UserError: another spelling, or a generation without published figures here.
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        known = ", ".join(chip.example for chip in CHIPS.values())
        raise UserError(
            f"--topology={topology!r} is unknown: take {known} or a larger shape of one of these."
        )
    return CHIPS[generation]


def cores_of(topology: str) -> int:
    """The number of cores of a topology such as 'v5e:2x2'."""
    chip = chip_of(topology)
    return chip.cores * math.prod(int(n) for n in topology.partition(":")[2].split("x"))


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The cores of a topology, as the TPU compiler describes them.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
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
            f"The TPU compiler refuses --topology={topology!r} ({_first_line(error)}): take "
            f"{chip.example} or a larger one."
        ) from error


def _first_line(error: BaseException) -> str:
    return re.sub(r"^[A-Z_]+: ", "", str(error).strip().splitlines()[0]).rstrip(".")


# ------------------------------------------------------------------------ the step


class Step(NamedTuple):
    """The update step of one device and the shapes it takes: state, theta, batch and key."""

    update: Any
    arguments: tuple[Any, ...]


def step_of(config: ml_collections.ConfigDict, batch_size: int) -> Step:
    """The config's update step as `ada_jax.train` makes it, without data or weights.

    Args:
      config: the run's config.
      batch_size: examples of one device.

    Returns:
      The step, with the shapes of one device.
    """
    size = config.image_size
    schedule = training.learning_rate_schedule(config, steps_per_epoch=100, total_steps=1000)
    _, num_classes = _SIZES.get(config.dataset, _SIZES_OF_OTHERS)
    classifier = scoring.make_classifier(config, num_classes)
    optimizer = training.make_optimizer(config, schedule)
    nets = [
        corruption_nets.architecture(name)
        for name in (config.ada.corruption_net if config.method == "ada" else ())
    ]
    key = jax.eval_shape(lambda: jax.random.key(0))

    def initial_state(key):
        return training.initial_state(classifier, optimizer, key, jnp.zeros((1, size, size, 3)))

    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    thetas = tuple(jax.eval_shape(net.init, key) for net in nets)
    applies = [
        corruption_nets.enlarged(net.apply, enlarge)
        for net, enlarge in zip(nets, config.ada.corruption_enlarge, strict=False)
    ]
    update = training.make_update_step(config, classifier, applies, optimizer)
    return Step(update, (jax.eval_shape(initial_state, key), thetas, batch, key))


def useful_flops(step: Step, cores: int) -> float:
    """What the step needs on one core, see `costs.useful_flops`."""
    jaxpr = jax.make_jaxpr(step.update, axis_env=[(sharding.AXIS, cores)])(*step.arguments)
    return costs.useful_flops(jaxpr)


def compile_step(step: Step, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """Compiles the step for these devices, mapped as `train.compile_update_step` maps it."""
    *mapped, key = step.arguments
    mapped = jax.tree.map(lambda a: jax.ShapeDtypeStruct((len(devices), *a.shape), a.dtype), mapped)
    update = jax.pmap(
        step.update, sharding.AXIS, in_axes=(0, 0, 0, None), donate_argnums=0, devices=devices
    )
    return update.lower(*mapped, key).compile()


# ------------------------------------------------------------------------ the figures


def measure(
    config: ml_collections.ConfigDict, topology: str, examples: int | None = None
) -> dict[str, Any]:
    """Compiles the step for a topology and takes its figures.

    Args:
      config: the run's config.
      topology: such as 'v5e:2x2'.
      examples: training examples, for the length of a run; None takes the data set's.

    Returns:
      The figures of one core, flops, bytes and seconds; `fits` says whether the compiler found
      room, and where it did not `refusal` says what it said and the figures of the program are
      missing.

    Raises:
      UserError: a topology or a batch size that does not work.
    """
    config_checks.validate_devices(config, cores_of(topology))
    chip, devices = chip_of(topology), devices_of(topology)
    cores = len(devices)
    step = step_of(config, config.batch_size // cores)
    figures = {
        **_identity(config, topology, examples),
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
        return figures | {"fits": False, "refusal": _first_line(error)}
    figures["compile_seconds"] = time.monotonic() - started
    return figures | {"fits": True} | program_figures(compiled, chip)


def _identity(
    config: ml_collections.ConfigDict, topology: str, examples: int | None
) -> dict[str, Any]:
    knobs = json.dumps(config.to_dict(), sort_keys=True)
    return {
        "config": config.name,
        "config_sha256": hashlib.sha256(knobs.encode()).hexdigest(),
        "topology": topology,
        "steps": steps_of(config, examples),
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
        "xla_flops": xla["flops"],
        "xla_bytes": xla["bytes accessed"],
        **parts,
        "hbm_total": total,
        "hbm_share": total / chip.hbm,
        **seconds,
        "floor_seconds": max(seconds.values()),
    }


def table(figures: dict[str, Any], price: float = 0.0) -> str:
    """The figures of one topology as a table; see `run_rows` for the price."""
    f = figures
    rows = [
        ("topology", f"{f['topology']}, {f['cores']} cores of {f['device']}"),
        ("batch", f"{f['batch_per_core']} examples a core"),
        ("useful flops", f"{f['useful_flops'] / 1e12:.3f} T a core"),
    ]
    if f["fits"]:
        chip = chip_of(f["topology"])
        once = f"{f['xla_flops'] / 1e12:.3f} T flops, {f['xla_bytes'] / 1e9:.1f} GB accessed"
        rows += [
            ("compiled flops", f"{f['compiled_flops'] / 1e12:.3f} T a core"),
            ("HBM traffic", f"{f['hbm_traffic'] / 1e9:.1f} GB a core"),
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
            *run_rows(f, f["steps"], price),
            ("compiled in", f"{f['compile_seconds']:.0f} seconds"),
        ]
    return "\n".join(f"| {name:24} | {value:44} |" for name, value in rows)


def comparison(results: Sequence[dict[str, Any]]) -> tables.Table:
    """One line for each of several figures of `measure`, a core's; a config's lines together."""
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


def run_rows(figures: dict[str, Any], steps: int, price: float) -> list[tuple[str, str]]:
    """The whole run's hours, and its cost, at several shares of the floor's speed.

    Args:
      figures: of `measure`, of a step that fits.
      steps: of the run.
      price: of an hour of the whole topology; 0 leaves the cost out.
    """
    hours = [steps * figures["floor_seconds"] / share / 3600 for share in _UTILISATIONS]
    shares = ", ".join(f"{share:.0%}" for share in _UTILISATIONS)
    rows = [
        (f"{steps:,} steps, hours", f"{', '.join(f'{h:.1f}' for h in hours)} at {shares} of that"),
    ]
    if price:
        rows.append(("their price", ", ".join(f"{price * h:,.0f}" for h in hours)))
    return rows


def steps_of(config: ml_collections.ConfigDict, examples: int | None = None) -> int:
    """Steps of a whole run on so many training examples, by default the data set's."""
    if examples is None:
        examples, _ = _SIZES.get(config.dataset, _SIZES_OF_OTHERS)
    return config.train_steps or round(config.epochs * examples / config.batch_size)


def refusal(figures: dict[str, Any]) -> str:
    """One sentence about a step that does not fit: what the compiler said, and the way out."""
    local = figures["batch_per_core"]
    return (
        f"{figures['config']} does not fit on {figures['topology']} with {local} examples a core "
        f"({figures['refusal']}): set config.ada.microbatch, as to 1, or take more cores."
    )


# ------------------------------------------------------------------------ the binary


def main(
    config: ml_collections.ConfigDict,
    topologies: Sequence[str],
    json_path: str | None = None,
    *,
    examples: int | None = None,
    price: float = 0.0,
) -> int | None:
    """Prints a table for every topology.

    Args:
      config: the run's config.
      topologies: names, or several with commas between them.
      json_path: file for the figures, a list with a dictionary per config and topology. What it
        has already is kept and, if it is of this config, not compiled again.
      examples: training examples, for the length of a run; None takes the data set's.
      price: of an hour of a whole topology; 0 leaves the cost out.

    Returns:
      1 if the step does not fit on one of them, else None.

    Raises:
      UserError: a mistake in the config or a topology.
    """
    names = [name.strip() for given in topologies for name in given.split(",") if name.strip()]
    if not names:
        raise UserError(f"Name a topology: --topology={CHIPS['v5e'].example}, for example.")
    if (examples is not None and examples < 1) or not 0 <= price < math.inf:
        raise UserError(
            f"--examples={examples} must be 1 or more, and --hours_price={price} 0 or more."
        )
    config_checks.validate(config)
    for name in names:
        config_checks.validate_devices(config, cores_of(name))
    results = _read(json_path) if json_path else []
    planned = []
    for name in names:
        wanted = _identity(config, name, examples)
        figures = next((f for f in results if wanted.items() <= f.items()), None)
        if figures is None:
            figures = measure(config, name, examples)
            results.append(figures)
        planned.append(figures)
        print("\n" + table(figures, price), flush=True)
        if not figures["fits"]:
            print(f"error: {refusal(figures)}", file=sys.stderr, flush=True)
        if json_path:
            paths.write_json(json_path, results)
    if len(results) > 1:
        print("\n" + tables.markdown(comparison(results)))
    return None if all(f["fits"] for f in planned) else 1


def _read(path: str) -> list[dict[str, Any]]:
    """What earlier plans left in a file.

    Raises:
      UserError: another kind of file, which would be lost.
    """
    if not paths.exists(path):
        return []
    try:
        results = paths.read_json(path)
        known = all({"config", "topology", "fits"} <= set(f) for f in results)
    except (ValueError, TypeError):
        known = False
    if not known:
        raise UserError(f"--json={path} is no file of plans: name another one.")
    return results


def _run(config: ml_collections.ConfigDict, workdir: str) -> int | None:
    del workdir  # every binary has the flag; this one writes nothing there
    f = flags.FLAGS
    return main(config, f.topology, f.json, examples=f.examples, price=f.hours_price)


def _take_deep_stacks() -> None:
    """Starts the binary anew with the deepest stacks allowed: for v6e the compiler overran 8 MB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if sys.platform.startswith("linux") and soft != hard:
        resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
        cli.start_anew()


if __name__ == "__main__":
    _take_deep_stacks()
    jax.config.update("jax_platforms", "cpu")  # a TPU that is there is left alone
    flags.DEFINE_multi_string("topology", [], "Such as v5e:2x2; repeat it, or separate by commas.")
    flags.DEFINE_string("json", None, "File that the figures are added to.")
    flags.DEFINE_integer("examples", None, "Training examples, for the length of a run.")
    flags.DEFINE_float("hours_price", 0.0, "Price of an hour of the whole topology.")
    cli.run(_run)
