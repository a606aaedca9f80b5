"""Measures the speed of the package's main computations on this machine.

python -m ada_jax.benchmark [--rows=peak,conv,inner,step,augment,memory,scaling] [--cpu_devices=2]
python -m ada_jax.benchmark --rows=peak,conv,inner,step --peer=torch   # on a GPU, with '.[torch]'
python -m ada_jax.benchmark --rows=inner,step --group=16   # examples that share a perturbation

Rows of convolutions, of the inner maximisation and of training steps have the useful work per
second, counted as the floating-point operations of direct convolutions, and its share of the speed
of a large matrix product measured just before. The type is float32 on a CPU, and bfloat16 with
larger batches on a GPU or a TPU.
"""

import concurrent.futures
import functools
import importlib.util
import math
import os
import runpy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ada_jax import ada, losses, paths, sharding, training
from ada_jax.augment import augmix, rendering
from ada_jax.errors import UserError
from ada_jax.evaluation import scoring
from ada_jax.nets import classifiers, corruption_nets, per_example
from ada_jax.run import cli, costs, setup

ROWS = ("peak", "conv", "inner", "step", "augment", "memory", "scaling")

Timing = tuple[float, float]  # Least seconds per call, seconds to compile.
Row = tuple[str, float, float, str, float]  # Title, flops, seconds, rate, seconds to compile.
_AUGMIX_BATCH = 128


class Scale(NamedTuple):
    """Sizes of the measured problems.

    Attributes:
      dtype: type of convolutions.
      matmul: size of the reference matrix product.
      copied: bytes of the copied array.
      conv: (examples, pixels, input channels, output channels) of convolutions.
      inner: (corruption network, classifier, batch) of inner maximisations.
      words: words for experiments/cifar10.py, of training steps.
      batch: batch size of training steps; 0 means the config's, and 64 per device in the rows
        scaling.
      rendered: number of images for DeepAugment to render.
      memory: (batch, batch with microbatches, microbatch) for the first of `inner`.
      seconds: how long each row is repeated.
      group: examples that share a perturbation in the rows inner and step.
    """

    dtype: str
    matmul: int
    copied: int
    conv: tuple[tuple[int, int, int, int], ...]
    inner: tuple[tuple[str, str, int], ...]
    words: tuple[str, ...]
    batch: int
    rendered: int
    memory: tuple[int, int, int]
    seconds: float
    group: int = 1


SCALES = {
    "cpu": Scale(
        dtype="float32",
        matmul=2048,
        copied=2**28,
        conv=((16, 32, 64, 64), (64, 32, 16, 16)),
        inner=(
            ("edsr_baseline", "preact_resnet18", 16),
            ("edsr_baseline_x4", "preact_resnet50", 8),
            ("cae", "preact_resnet18", 16),
            ("edsr_small", "preact_resnet20", 64),
            ("edsr_small", "resnet9", 64),
            ("cae", "resnet9", 16),
        ),
        words=("nominal,small", "augmix,small", "small"),
        batch=0,
        rendered=4000,
        memory=(16, 256, 16),
        seconds=3.0,
    ),
    "accelerator": Scale(
        dtype="bfloat16",
        matmul=8192,
        copied=2**31,
        conv=tuple(
            (256 if pixels == 32 else 16, pixels, *channels)
            for pixels in (32, 128)
            for channels in ((3, 64), (64, 64), (64, 256), (64, 3))
        ),
        inner=(
            ("edsr_baseline", "preact_resnet18", 256),
            ("edsr_medium", "preact_resnet18", 256),
            ("edsr_baseline_x4", "preact_resnet50", 32),
        ),
        words=("nominal,gpu", "augmix,gpu", "ada,gpu"),
        batch=0,
        rendered=4000,
        memory=(256, 256, 64),
        seconds=0.3,
    ),
    # For a quick test of the accelerator's rows on a CPU.
    "tiny": Scale(
        dtype="bfloat16",
        matmul=256,
        copied=2**20,
        conv=((2, 8, 3, 16), (2, 8, 16, 16)),
        inner=(("edsr_small", "resnet9", 2),),
        words=("nominal,small", "small"),
        batch=4,
        rendered=300,
        memory=(2, 4, 2),
        seconds=0.1,
    ),
}


def batches(scale: Scale, rows: str) -> list[int]:
    """The batch sizes of some of the rows, which are split over the devices."""
    match rows:
        case "conv":
            return [examples for examples, *_ in scale.conv]
        case "inner":
            return [batch for *_, batch in scale.inner]
        case "step":
            return [scale.batch or cifar10(words).batch_size for words in scale.words]
        case "augment":
            return [_AUGMIX_BATCH]
    return []


def time_calls(f: Callable[..., Any], *args: Any, seconds: float) -> Timing:
    """Compiles and times a function of arrays, mapped over the devices.

    Args:
      f: a function of one device's arrays.
      *args: global arrays; the first axis is split over the devices.
      seconds: how long to repeat it.

    Returns:
      The least seconds per call, which depend little on other load, and the seconds to compile.
    """
    devices = jax.local_device_count()
    mapped = jax.pmap(f, axis_name=sharding.AXIS)
    args = [a.reshape(devices, -1, *a.shape[1:]) for a in args]
    args = jax.pmap(lambda *a: a)(*args)
    start = time.perf_counter()
    compiled = mapped.lower(*args).compile()
    compilation = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    # Short calls are dispatched back to back, or their dispatch would be timed.
    times, end, calls = [], time.perf_counter() + seconds, 1
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        jax.block_until_ready([compiled(*args) for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
        calls = max(1, min(50, int(0.02 / times[-1])))
    return min(times), compilation


def forward_flops(f: Callable[..., Any], *shapes: Any) -> float:
    """Floating-point operations of f's convolutions and matrix products."""
    return costs.useful_flops(jax.make_jaxpr(f)(*shapes))


def peak(scale: Scale, dtype: str, precision: str = "default") -> float:
    """Speed of a matrix product on all devices together, in flop/s."""
    a = jnp.ones((jax.local_device_count(), scale.matmul, scale.matmul), dtype)
    seconds, _ = time_calls(
        lambda a: jnp.matmul(a, a, precision=precision), a, seconds=scale.seconds
    )
    return len(a) * 2 * scale.matmul**3 / seconds


# ------------------------------------------------------------------------ rows


def peak_rows(scale: Scale) -> Iterator[Row]:
    """Matrix products by type and precision, and a copy."""
    flops = jax.local_device_count() * 2 * scale.matmul**3
    kinds = {"float32": "highest", "float32 by default": "default", "bfloat16": "default"}
    for name, precision in kinds.items():
        seconds = flops / peak(scale, name.partition(" ")[0], precision)
        yield f"matrix product {scale.matmul}, {name}", flops, seconds, "", 0.0
    a = jnp.ones((jax.local_device_count(), scale.copied // 4))
    seconds, compilation = time_calls(lambda a: a + 1, a, seconds=scale.seconds)
    rate = f"{2 * a.nbytes / seconds / 1e9:.0f} GB/s"
    yield f"copy of {a.nbytes / 2**20:.0f} MiB", 0.0, seconds, rate, compilation


def conv_rows(scale: Scale) -> Iterator[Row]:
    """Per-example 3x3 convolution by each lowering."""
    for examples, pixels, inputs, outputs in scale.conv:
        random = np.random.default_rng(0).normal
        x = jnp.asarray(random(size=(examples, 1, pixels, pixels, inputs)), scale.dtype)
        w = jnp.asarray(random(size=(examples, 3, 3, inputs, outputs)), scale.dtype)
        dy = jnp.asarray(random(size=(examples, 1, pixels, pixels, outputs)), scale.dtype)
        flops = 2 * 9 * inputs * outputs * pixels**2 * examples
        title = f"{examples} x {pixels}x{pixels}, {inputs} to {outputs} channels"
        for name, forward, gradients in lowerings():
            seconds, compilation = time_calls(forward, x, w, seconds=scale.seconds)
            yield f"conv forward, {title}, {name}", flops, seconds, "", compilation
            seconds, compilation = time_calls(gradients, x, w, dy, seconds=scale.seconds)
            yield f"conv gradients, {title}, {name}", 2 * flops, seconds, "", compilation


def lowerings() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Ways to convolve [N,1,H,W,C] with one kernel [N,3,3,C,O] each, and their gradients."""

    def without_bias(name):
        forward, gradients = per_example.LOWERINGS[name]
        return (
            lambda x, w: forward(x, w, None, 1, 1),
            lambda x, w, dy: gradients(x, w, dy, 1, 1)[:2],
        )

    def mapped(f):
        return lambda *args: jax.lax.map(lambda args: f(*args), args)

    platform = jax.default_backend()
    for name in per_example.LOWERINGS:
        if per_example.KERNELS.get(name, platform) == platform:
            yield name, *map(jax.vmap, without_bias(name))
    yield "lax.map", *map(mapped, without_bias("grouped"))
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    xla = jax.vmap(lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", **layout))
    yield "jax.vmap", xla, lambda x, w, dy: jax.vjp(xla, x, w)[1](dy)
    conv = jax.vmap(per_example.conv2d)
    yield "ada_jax.per_example", conv, lambda x, w, dy: jax.vjp(conv, x, w)[1](dy)


def inner_rows(scale: Scale, steps: int = 5) -> Iterator[Row]:
    """Inner maximisation, in example-steps per second."""
    for name, classifier, batch in scale.inner:
        net, logits_fn, x, y = inner_problem(name, classifier, batch, scale.dtype)
        flops = attack_flops(net, logits_fn) * batch * steps
        group = math.gcd(scale.group, batch // jax.local_device_count())

        def attack(x, y, net=net, logits_fn=logits_fn, group=group):
            keys = jax.random.split(jax.random.key(0), len(x))
            loss_fn = lambda images: losses.cross_entropy(logits_fn(images), y)  # noqa: E731
            return ada.maximise(keys, x, loss_fn, net, nu=0.015, steps=steps, group=group)[0]

        seconds, compilation = time_calls(attack, x, y, seconds=scale.seconds)
        rate = f"{batch * steps / seconds:.0f} example-steps/s"
        title = f"inner maximisation, {name} + {classifier}, batch {batch}{grouped(group)}"
        yield title, flops, seconds, rate, compilation


def grouped(group: int) -> str:
    """The end of a title."""
    return f", group {group}" if group > 1 else ""


def peer_rows(scale: Scale, rows: str) -> Iterator[Row]:
    """The inner maximisation or the nominal training step in PyTorch."""
    from ada_jax import benchmark_torch

    batch, steps = scale.inner[0][2], 5
    net, logits_fn, x, _ = inner_problem("edsr_baseline", "preact_resnet18", batch, scale.dtype)
    if rows == "inner":
        flops = attack_flops(net, logits_fn) * batch * steps
        found = benchmark_torch.inner_rows(batch, scale.dtype, steps, scale.seconds)
    else:
        flops = 3 * forward_flops(logits_fn, x[:1]) * batch
        found = benchmark_torch.step_rows(batch, scale.dtype, scale.seconds)
    for title, seconds, rate, compilation in found:
        yield title, flops, seconds, rate, compilation


def inner_problem(name: str, classifier: str, batch: int, dtype: str) -> tuple[Any, ...]:
    """A random corruption network, a random classifier and a random batch."""
    architecture = corruption_nets.architecture(name)
    apply = corruption_nets.cast(architecture.apply, dtype)
    net = ada.CorruptionNet(apply, architecture.init(jax.random.key(0)))
    x = jax.random.uniform(jax.random.key(1), (batch, 32, 32, 3))
    model = classifiers.make(classifier, 10, compute_dtype=dtype)
    init = jax.jit(model.init, static_argnames="is_training")
    params, state = init(jax.random.key(2), x[:2], is_training=True)

    def logits_fn(images):
        return model.apply(params, state, None, images, is_training=False, test_local_stats=True)[0]

    return net, logits_fn, x, jnp.arange(batch) % 10


def attack_flops(net: ada.CorruptionNet, logits_fn: Callable[..., Any]) -> float:
    """Operations of a step per example: 3 passes of the network and 2 of the classifier."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return 3 * net_flops(net) + 2 * forward_flops(logits_fn, x)


def net_flops(net: ada.CorruptionNet) -> float:
    """Operations of a corruption network's forward pass for one 32x32 image."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return forward_flops(net.apply, net.theta, x, jax.random.key(0))


def cifar10(words: str) -> Any:
    """The config of experiments/cifar10.py."""
    return runpy.run_path(str(paths.EXPERIMENTS / "cifar10.py"))["get_config"](words)


def step_rows(scale: Scale) -> Iterator[Row]:
    """The training step of experiments/cifar10.py, nominal, with AugMix and with AdA."""
    for words in scale.words:
        config = cifar10(words).unlock()
        config.batch_size = scale.batch or config.batch_size
        local = config.batch_size // jax.local_device_count()
        group = math.gcd(scale.group, local) if config.method == "ada" else 1
        config.ada.group = group
        images = jax.random.uniform(jax.random.key(0), (config.batch_size, 32, 32, 3))
        labels = jnp.arange(config.batch_size) % 10
        one_step, model, state, nets = first_step(config, images)
        seconds, compilation = time_calls(one_step, images, labels, seconds=scale.seconds)
        logits_fn = functools.partial(
            model.apply, state.params, state.net_state, None, is_training=False
        )
        forward = forward_flops(lambda x, f=logits_fn: f(x)[0], images[:1])
        flops = 3 * forward
        for net in nets:
            inner = attack_flops(net, lambda x, f=logits_fn: f(x)[0])
            flops += config.ada.steps * inner + net_flops(net)
        rate = f"{config.batch_size / seconds:.0f} examples/s"
        title = f"training step, cifar10.py:{words}, batch {config.batch_size}{grouped(group)}"
        yield title, flops * config.batch_size, seconds, rate, compilation


def first_step(config: Any, images: jax.Array) -> tuple[Any, ...]:
    """A config's first update as a function of images and labels; its model, state and networks."""
    model = scoring.make_classifier(config, 10)
    optimizer, _ = training.make_optimizer(config, 100.0, 1000)
    nets = setup.make_corruption_nets(config.ada) if config.method == "ada" else ()
    state = training.initial_state(model, optimizer, jax.random.key(0), images[:8])
    step = training.make_update_step(config, model, [net.apply for net in nets], optimizer)
    thetas = tuple(net.theta for net in nets)

    def one_step(x, y):
        return step(state, thetas, {"image": x, "label": y}, jax.random.key(0))

    return one_step, model, state, nets


def augment_rows(scale: Scale) -> Iterator[Row]:
    """AugMix of a batch, and DeepAugment's rendering."""
    x = jax.random.uniform(jax.random.key(0), (_AUGMIX_BATCH, 32, 32, 3))

    def mix(x, seed):
        return augmix.augment_and_mix(jax.random.key(seed[0]), x)

    devices = np.arange(jax.local_device_count())
    seconds, compilation = time_calls(mix, x, devices, seconds=scale.seconds)
    yield f"AugMix, batch {_AUGMIX_BATCH}", 0.0, seconds, f"{1e3 * seconds:.1f} ms", compilation
    images = np.random.default_rng(0).integers(0, 256, (scale.rendered, 32, 32, 3), np.uint8)
    for name, enlarge in (("edsr_small", 1), ("cae", 1), ("cae", 2)):
        theta = jax.tree.map(np.asarray, corruption_nets.make(name).theta)
        blocks = rendering.generate(name, theta, images, seed=0, copy=0, enlarge=enlarge)
        start = time.perf_counter()
        next(blocks)
        compilation = time.perf_counter() - start
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < scale.seconds and count < len(
            images
        ) - 100:
            count += len(next(blocks))
        rate = f"{count / seconds:.0f} images/s"
        enlarged = ", enlarged twice" if enlarge == 2 else ""
        yield f"DeepAugment, {name}{enlarged}", 0.0, seconds, rate, compilation


def memory_rows(scale: Scale) -> Iterator[str]:
    """Temporary memory of the inner maximisation, with and without microbatches."""
    net, logits_fn, _, _ = inner_problem(*scale.inner[0], scale.dtype)

    def temporary(batch, microbatch):
        def attack(x, y):
            return ada.adversarial_augment(
                jax.random.key(0),
                x,
                y,
                logits_fn=logits_fn,
                net=net,
                steps=5,
                microbatch=microbatch,
            )[0]

        x = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
        y = jax.ShapeDtypeStruct((batch,), jnp.int32)
        analysis = jax.jit(attack).lower(x, y).compile().memory_analysis()
        return analysis.temp_size_in_bytes / 2**20

    one, other, microbatch = scale.memory
    whole, split = temporary(one, None), temporary(other, microbatch)
    name, classifier, _ = scale.inner[0]
    yield (
        f"memory of the inner maximisation, {name} + {classifier}: {whole:.0f} MiB at batch {one}; "
        f"{split:.0f} MiB at batch {other} with microbatch={microbatch}, {split / whole:.2f} times "
        "as much"
    )


def scaling_rows(scale: Scale, rounds: int = 5) -> Iterator[str]:
    """Steps on 1, 2, 4, ... devices as one program, against one program per device."""
    per_device = scale.batch or 64
    for words in (scale.words[0], scale.words[-1]):
        config = cifar10(words)
        images = jax.random.uniform(jax.random.key(0), (per_device, 32, 32, 3))
        labels = jnp.arange(per_device) % 10
        one_step, *_ = first_step(config, images)
        count = 1
        while count <= jax.local_device_count():
            groups = [jax.local_devices()[:count]], [[d] for d in jax.local_devices()[:count]]
            joined, alone = (ConcurrentPrograms(one_step, g, images, labels) for g in groups)
            # In turn, because the machine's speed drifts.
            times = [(joined.seconds(), alone.seconds()) for _ in range(rounds)]
            one, other = map(min, zip(*times, strict=True))
            yield (
                f"weak scaling, cifar10.py:{words}, {per_device} examples on each of {count} "
                f"devices: {1e3 * one:.1f} ms a step, {1e3 * other:.1f} ms as separate programs, "
                f"{100 * (one / other - 1):+.1f}%"
            )
            count *= 2


class ConcurrentPrograms:
    """A function compiled as one program per group of devices, which run at the same time."""

    def __init__(self, f: Callable[..., Any], groups: list[list[Any]], *args: jax.Array) -> None:
        """Compiles the programs; every device gets the same arguments."""
        self._programs = []
        for devices in groups:
            placed = [jnp.broadcast_to(a, (len(devices), *a.shape)) for a in args]
            placed = jax.pmap(lambda *a: a, devices=devices)(*placed)
            mapped = jax.pmap(f, axis_name=sharding.AXIS, devices=devices)
            self._programs.append(functools.partial(mapped.lower(*placed).compile(), *placed))
        self._threads = concurrent.futures.ThreadPoolExecutor(len(groups))
        self.seconds()

    def seconds(self) -> float:
        """Least seconds until all programs have ended."""
        times, end = [], time.perf_counter() + 1.0
        while time.perf_counter() < end or len(times) < 3:
            start = time.perf_counter()
            list(self._threads.map(lambda p: jax.block_until_ready(p()), self._programs))
            times.append(time.perf_counter() - start)
        return min(times)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    f = flags.FLAGS
    if unknown := set(f.rows) - set(ROWS):
        raise UserError(f"--rows={','.join(unknown)} is unknown: choose from {', '.join(ROWS)}.")
    if f.peer:
        if not {"inner", "step"} & set(f.rows):
            raise UserError(f"--peer=torch has no rows of --rows={','.join(f.rows)}: add inner.")
        if importlib.util.find_spec("torch") is None:
            raise UserError("--peer=torch needs PyTorch: pip install -e '.[torch]'.")
        # Otherwise JAX reserves three quarters of the memory, which PyTorch needs.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cli.set_up_devices(f.cpu_devices, "")
    scale = SCALES[f.scale or ("cpu" if jax.default_backend() == "cpu" else "accelerator")]
    scale = scale._replace(group=f.group)
    devices = jax.local_device_count()
    for name in f.rows:
        for batch in batches(scale, name):
            if batch % devices:
                raise UserError(
                    f"The {devices} devices do not divide a batch of {batch} of --rows={name}: set "
                    "--cpu_devices or CUDA_VISIBLE_DEVICES so that they do."
                )
    device = jax.devices()[0].device_kind
    print(f"{devices} devices ({device}), jax {jax.__version__}\n")
    timed = {
        "peak": peak_rows,
        "conv": conv_rows,
        "inner": inner_rows,
        "step": step_rows,
        "augment": augment_rows,
    }
    chosen = [name for name in timed if name in f.rows]
    if chosen:
        print("| what | speed | Gflop/s | share of the matrix product | compile s |")
        print("|---|---|---|---|---|")
    for name in chosen:
        reference = peak(scale, scale.dtype)
        title = f"matrix product {scale.matmul}, {scale.dtype}"
        print(f"| {title} | | {reference / 1e9:.0f} | 100% | |", flush=True)
        for row in timed[name](scale):
            print_row(row, reference)
        if f.peer and name in ("inner", "step"):
            for row in peer_rows(scale, name):
                print_row(row, reference)
    sentences = {"memory": memory_rows, "scaling": scaling_rows}
    for name in (n for n in ROWS if n in f.rows and n in sentences):
        print()
        for line in sentences[name](scale):
            print(line, flush=True)


def print_row(row: Row, reference: float) -> None:
    """Prints a line of the table; `reference` is the speed of the matrix product in flop/s."""
    title, flops, seconds, rate, compilation = row
    speed, rate = flops / seconds, rate or f"{1e3 * seconds:.1f} ms"
    counted = f"{speed / 1e9:.0f} | {100 * speed / reference:.1f}%" if speed > 0 else "|"
    print(f"| {title} | {rate} | {counted} | {compilation:.1f} |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("rows", list(ROWS), "Rows to measure: " + ", ".join(ROWS) + ".")
    flags.DEFINE_integer(
        "cpu_devices", 2, "Number of devices that a CPU is split into.", lower_bound=0
    )
    flags.DEFINE_integer("group", 1, "Examples that share a perturbation.", lower_bound=1)
    flags.DEFINE_enum("peer", None, ["torch"], "Also measure inner and step in PyTorch.")
    flags.DEFINE_enum("scale", None, list(SCALES), "Problem sizes; the device's by default.")
    cli.start(main)
