"""Measures the package's hot paths on this machine, all in one process.

python -m ada_jax.benchmark [--rows=conv,inner,step,augment,memory,scaling] [--cpu_devices=2]

Every row gives useful work per second, counted as the floating-point operations of ordinary direct
convolutions, and its share of the speed of a large float32 matrix product measured in between.
"""

import concurrent.futures
import functools
import runpy
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ada_jax import (
    ada,
    augmix,
    classifiers,
    cli,
    corruption_nets,
    costs,
    deepaugment,
    evaluate,
    losses,
    paths,
    per_example,
    train,
)
from ada_jax.errors import UserError

ROWS = ("conv", "inner", "step", "augment", "memory", "scaling")
_SECONDS = 3.0  # measured per row

Timing = tuple[float, float]  # best seconds per call, seconds to compile


def measure(f: Callable[..., Any], *args: Any, seconds: float = _SECONDS) -> Timing:
    """Compiles and times a function of arrays, as one program per device.

    Args:
      f: a function of one device's arrays.
      *args: global arrays; the first axis is split over the devices.
      seconds: how long to repeat it.

    Returns:
      The least seconds of a call, which other load on the machine disturbs least, and the seconds
      of compilation.
    """
    devices = jax.local_device_count()
    mapped = jax.pmap(f, axis_name=train.AXIS)
    args = [a.reshape(devices, -1, *a.shape[1:]) for a in args]
    args = jax.pmap(lambda *a: a)(*args)
    start = time.perf_counter()
    compiled = mapped.lower(*args).compile()
    compilation = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return min(times), compilation


def forward_flops(f: Callable[..., Any], *shapes: Any) -> float:
    """Floating-point operations of f's direct convolutions and products, for shapes or arrays."""
    return costs.useful_flops(jax.make_jaxpr(f)(*shapes))


def peak() -> float:
    """Speed of a float32 matrix product of size 2048 over all devices, in flop/s."""
    a = jnp.ones((jax.local_device_count(), 2048, 2048))
    seconds, _ = measure(lambda a: a @ a, a)
    return len(a) * 2 * 2048**3 / seconds


# ------------------------------------------------------------------------ rows


def conv_rows() -> Iterator[tuple[str, float, float, str, float]]:
    """Per-example 3x3 convolution, 16 examples, 32x32, 64 to 64 channels, by each lowering."""
    for channels, examples in ((64, 16), (16, 64)):
        random = np.random.default_rng(0).normal
        x = jnp.asarray(random(size=(examples, 1, 32, 32, channels)), jnp.float32)
        w = jnp.asarray(random(size=(examples, 3, 3, channels, channels)), jnp.float32)
        flops = 2 * 9 * channels**2 * 32 * 32 * examples
        for name, conv in lowerings():
            title = f"{channels} channels, {name}"
            seconds, compilation = measure(conv, x, w)
            yield f"conv forward, {title}", flops, seconds, "", compilation

            def gradient(x, w, conv=conv):
                y, transpose = jax.vjp(conv, x, w)
                return transpose(y)

            seconds, compilation = measure(gradient, x, w)
            yield f"conv fwd + gradient, {title}", 3 * flops, seconds, "", compilation


def lowerings() -> list[tuple[str, Callable[..., jax.Array]]]:
    """Ways to convolve [N,1,H,W,C] with one kernel [N,3,3,C,O] each."""
    plain = functools.partial(per_example.plain_forward, stride=1, padding=1)

    def matmul(x, w):
        patches = jax.vmap(lambda x: per_example.patches(x, (3, 3), 1, 1))(x)
        return (patches @ w.reshape(len(w), -1, w.shape[-1])).reshape(*x.shape[:-1], w.shape[-1])

    return [
        ("jax.vmap of XLA's", jax.vmap(plain)),
        ("lax.map of XLA's", lambda x, w: jax.lax.map(lambda a: plain(*a), (x, w))),
        ("patches + batched matmul", matmul),
        ("ada_jax.per_example", jax.vmap(per_example.conv2d)),
    ]


INNER = (
    # corruption network, classifier, batch
    ("edsr_baseline", "preact_resnet18", 16),
    ("edsr_baseline_x4", "preact_resnet50", 8),
    ("cae", "preact_resnet18", 16),
    ("edsr_small", "preact_resnet20", 64),
    ("edsr_small", "resnet9", 64),
    ("cae", "resnet9", 16),
)


def inner_rows(steps: int = 5) -> Iterator[tuple[str, float, float, str, float]]:
    """Inner maximisation, in example-steps per second."""
    for name, classifier, batch in INNER:
        net, logits_fn, x, y = problem(name, classifier, batch)
        flops = attack_flops(net, logits_fn) * batch * steps

        def attack(x, y, net=net, logits_fn=logits_fn):
            keys = jax.random.split(jax.random.key(0), len(x))
            loss_fn = lambda images: losses.cross_entropy(logits_fn(images), y)  # noqa: E731
            delta, _ = ada.maximise(keys, x, loss_fn, net, nu=0.015, steps=steps)
            return delta

        seconds, compilation = measure(attack, x, y)
        rate = f"{batch * steps / seconds:.0f} example-steps/s"
        title = f"inner maximisation, {name} + {classifier}, batch {batch}"
        yield title, flops, seconds, rate, compilation


def problem(name: str, classifier: str, batch: int) -> tuple[Any, ...]:
    """A corruption network without training, a random classifier and a random batch."""
    architecture = corruption_nets.architecture(name)
    net = corruption_nets.CorruptionNet(architecture.apply, architecture.init(jax.random.key(0)))
    x = jax.random.uniform(jax.random.key(1), (batch, 32, 32, 3))
    model = classifiers.make(classifier, 10)
    init = jax.jit(model.init, static_argnames="is_training")
    params, state = init(jax.random.key(2), x[:2], is_training=True)

    def logits_fn(images):
        return model.apply(params, state, None, images, is_training=False, test_local_stats=True)[0]

    return net, logits_fn, x, jnp.arange(batch) % 10


def attack_flops(net: corruption_nets.CorruptionNet, logits_fn: Callable[..., Any]) -> float:
    """Operations of one step for one example: 3 passes of the network, 2 of the classifier."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return 3 * net_flops(net) + 2 * forward_flops(logits_fn, x)


def net_flops(net: corruption_nets.CorruptionNet) -> float:
    """Operations of a corruption network's forward pass for one image of 32x32."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return forward_flops(net.apply, net.theta, x, jax.random.key(0))


def cifar10(words: str) -> Any:
    """The config of experiments/cifar10.py."""
    return runpy.run_path(str(paths.EXPERIMENTS / "cifar10.py"))["get_config"](words)


def step_rows() -> Iterator[tuple[str, float, float, str, float]]:
    """The whole training step of cifar10.py:small, nominal, with AugMix and with AdA."""
    for words in ("nominal,small", "augmix,small", "small"):
        config = cifar10(words)
        images = jax.random.uniform(jax.random.key(0), (config.batch_size, 32, 32, 3))
        labels = jnp.arange(config.batch_size) % 10
        one_step, model, state, nets = first_step(config, images)
        seconds, compilation = measure(one_step, images, labels)
        logits_fn = functools.partial(
            model.apply, state.params, state.net_state, None, is_training=False
        )
        forward = forward_flops(lambda x, f=logits_fn: f(x)[0], images[:1])
        flops = 3 * forward
        for net in nets:
            inner = attack_flops(net, lambda x, f=logits_fn: f(x)[0])
            flops += config.ada.steps * inner + net_flops(net)
        rate = f"{config.batch_size / seconds:.0f} examples/s"
        title = f"training step, cifar10.py:{words}, batch {config.batch_size}"
        yield title, flops * config.batch_size, seconds, rate, compilation


def first_step(config: Any, images: jax.Array) -> tuple[Any, ...]:
    """A config's first update of one device's images and labels; its model, state and networks."""
    model = evaluate.make_classifier(config, 10)
    optimizer = train.make_optimizer(config, train.learning_rate_schedule(config, 100.0, 1000))
    nets = train.make_corruption_nets(config.ada) if config.method == "ada" else ()
    state = train.initial_state(model, optimizer, jax.random.key(0), images[:8])
    step = train.make_update_step(config, model, [net.apply for net in nets], optimizer)
    thetas = tuple(net.theta for net in nets)

    def one_step(x, y):
        return step(state, thetas, {"image": x, "label": y}, jax.random.key(0))

    return one_step, model, state, nets


def augment_rows() -> Iterator[tuple[str, float, float, str, float]]:
    """AugMix of a batch, and DeepAugment's renderings."""
    batch = 128
    x = jax.random.uniform(jax.random.key(0), (batch, 32, 32, 3))

    def mix(x, seed):
        return augmix.augment_and_mix(jax.random.key(seed[0]), x)

    seconds, compilation = measure(mix, x, np.arange(jax.local_device_count()))
    yield f"AugMix, batch {batch}", 0.0, seconds, f"{1e3 * seconds:.1f} ms", compilation
    images = np.random.default_rng(0).integers(0, 256, (4000, 32, 32, 3), np.uint8)
    for name, enlarge in (("edsr_small", 1), ("cae", 1), ("cae", 2)):
        theta = jax.tree.map(np.asarray, corruption_nets.make(name).theta)
        blocks = deepaugment.generate(name, theta, images, seed=0, copy=0, enlarge=enlarge)
        start = time.perf_counter()
        next(blocks)
        compilation = time.perf_counter() - start
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < _SECONDS and count < len(images) - 100:
            count += len(next(blocks))
        rate = f"{count / seconds:.0f} images/s"
        enlarged = ", enlarged twice" if enlarge == 2 else ""
        yield f"DeepAugment, {name}{enlarged}", 0.0, seconds, rate, compilation


def memory_rows() -> Iterator[str]:
    """Temporary memory of the inner maximisation with and without microbatches."""
    net, logits_fn, _, _ = problem(*INNER[0])

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

    whole, split = temporary(16, None), temporary(256, 16)
    yield (
        f"memory of the inner maximisation, EDSR 16x64 + preact_resnet18: {whole:.0f} MiB at batch "
        f"16; {split:.0f} MiB at batch 256 with microbatch=16, {split / whole:.2f} times as much"
    )


def scaling_rows(per_device: int = 64, rounds: int = 5) -> Iterator[str]:
    """Steps of 1, 2, 4, ... devices as one program, against as many that know of no other."""
    for words in ("nominal,small", "small"):
        config = cifar10(words)
        images = jax.random.uniform(jax.random.key(0), (per_device, 32, 32, 3))
        labels = jnp.arange(per_device) % 10
        one_step, *_ = first_step(config, images)
        count = 1
        while count <= jax.local_device_count():
            groups = [jax.local_devices()[:count]], [[d] for d in jax.local_devices()[:count]]
            joined, alone = (Together(one_step, g, images, labels) for g in groups)
            # By turns, for the machine's speed drifts; the least, which other load disturbs least.
            times = [(joined.seconds(), alone.seconds()) for _ in range(rounds)]
            one, other = map(min, zip(*times, strict=True))
            yield (
                f"weak scaling, cifar10.py:{words}, {per_device} examples on each of {count} "
                f"devices: {1e3 * one:.1f} ms a step, {1e3 * other:.1f} ms without each other, "
                f"{100 * (one / other - 1):+.1f}%"
            )
            count *= 2


class Together:
    """A function as one program for each group of devices, which run at the same time."""

    def __init__(self, f: Callable[..., Any], groups: list[list[Any]], *args: jax.Array) -> None:
        """Compiles it; every device has the same arguments."""
        self._programs = []
        for devices in groups:
            placed = [jnp.broadcast_to(a, (len(devices), *a.shape)) for a in args]
            placed = jax.pmap(lambda *a: a, devices=devices)(*placed)
            mapped = jax.pmap(f, axis_name=train.AXIS, devices=devices)
            self._programs.append(functools.partial(mapped.lower(*placed).compile(), *placed))
        self._threads = concurrent.futures.ThreadPoolExecutor(len(groups))
        self.seconds()

    def seconds(self, least: float = 1.0) -> float:
        """Least seconds until all programs have run."""
        times, end = [], time.perf_counter() + least
        while time.perf_counter() < end or len(times) < 3:
            start = time.perf_counter()
            list(self._threads.map(lambda p: jax.block_until_ready(p()), self._programs))
            times.append(time.perf_counter() - start)
        return min(times)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    chosen = flags.FLAGS.rows
    if unknown := set(chosen) - set(ROWS):
        raise UserError(f"--rows={','.join(unknown)} is unknown: choose from {', '.join(ROWS)}.")
    cli.set_up_devices(flags.FLAGS.cpu_devices, "")
    device = jax.devices()[0].device_kind
    print(f"{jax.local_device_count()} devices ({device}), jax {jax.__version__}\n")
    rows = {"conv": conv_rows, "inner": inner_rows, "step": step_rows, "augment": augment_rows}
    timed = [name for name in rows if name in chosen]
    if timed:
        print("| what | speed | Gflop/s | share of sgemm | compile s |")
        print("|---|---|---|---|---|")
    for name in timed:
        sgemm = peak()
        print(f"| sgemm 2048 | | {sgemm / 1e9:.0f} | 100% | |", flush=True)
        for title, flops, seconds, rate, compilation in rows[name]():
            speed, share = flops / seconds, 100 * flops / seconds / sgemm
            rate = rate or f"{1e3 * seconds:.1f} ms"
            counted = f"{speed / 1e9:.0f} | {share:.1f}%" if flops else "|"
            print(f"| {title} | {rate} | {counted} | {compilation:.1f} |", flush=True)
    sentences = {"memory": memory_rows, "scaling": scaling_rows}
    for name in (n for n in ROWS if n in chosen and n in sentences):
        print()
        for line in sentences[name]():
            print(line, flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("rows", list(ROWS), "Which rows: " + ", ".join(ROWS) + ".")
    flags.DEFINE_integer("cpu_devices", 2, "Devices that a CPU is split into.")
    cli.start(main, computes=True)
