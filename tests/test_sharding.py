"""Batches split over four devices give what one device gives.

Run as a program, `python test_sharding.py FILE.npz NAME ...`, it writes what functions return.
"""

import contextlib
import functools
import itertools
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ada_jax
from ada_jax import attacks, sharding
from ada_jax.augment import augmix, norm_noise, trivial_augment
from ada_jax.nets import batch_norm, per_example

DEVICES, BATCH, SIZE, CLASSES = 4, 8, 12, 4
ROOT = pathlib.Path(__file__).parents[1]
Arrays = dict[str, np.ndarray]


def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    x = np.float32(rng.uniform(0, 1, (BATCH, SIZE, SIZE, 3)))
    weights = np.float32(rng.normal(size=(SIZE * SIZE * 3, CLASSES)) / 10)
    return {"x": x, "y": np.argmax(classify(weights, x), -1), "weights": weights}


def classify(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x.reshape(len(x), -1) - 0.5) @ weights


def render(theta: dict, x: jax.Array, key: jax.Array) -> jax.Array:
    """Two convolutions with kernels of each example's own, and noise."""
    h = per_example.conv2d(x, theta["w"], theta["b"])
    noise = jax.random.normal(key, x.shape) * 0.05
    return x + noise + per_example.conv2d(jnp.tanh(h), jnp.swapaxes(theta["w"], 2, 3))


def net() -> ada_jax.CorruptionNet:
    w = jnp.float32(np.random.default_rng(1).normal(size=(3, 3, 3, 5)) / 10)
    return ada_jax.CorruptionNet(render, {"w": w, "b": jnp.ones(5)})


def augment(key, weights, x, y, **options):
    logits_fn = functools.partial(classify, weights)
    return ada_jax.adversarial_augment(key, x, y, logits_fn=logits_fn, net=net(), **options)


def mix(key, weights, x, y, **options):
    return augmix.augment_and_mix(key, x, **options)


def attack(function, key, weights, x, y, epsilon=0.02, **options):
    return function(key, functools.partial(classify, weights), x, y, epsilon, **options)


def gradients(layer, key, weights, x, y):
    """The gradient to images, and the sum of those to a layer's weights, equal on all devices."""
    function, parameters = layer()

    def summed(_, x):
        loss = lambda x, parameters: (function(parameters, x) ** 2).sum()  # noqa: E731
        dx, others = jax.grad(loss, (0, 1))(x, parameters)
        return {"x": dx, "weights": sum(map(jnp.sum, jax.tree.leaves(others))) + 0 * dx}

    return sharding.on_mesh(summed, None, x)(x)


def convolution():
    return lambda theta, x: per_example.conv2d(x, theta["w"], theta["b"]), net().theta


def kernels(key, weights, x, y):
    """The gradient to images through convolutions with a kernel made from each image."""

    def loss(x):
        w = x[:, :3, :3, :, None] * net().theta["w"]
        return (jax.vmap(per_example.conv2d)(x[:, None], w) ** 2).sum()

    return jax.grad(loss)(x)


def normalisation():
    norm = hk.transform_with_state(
        lambda x, training: batch_norm.BatchNorm(True, True, 0.9)(x, training, False)
    )
    parameters, state = norm.init(jax.random.key(0), jnp.ones((1, SIZE, SIZE, 3)), True)
    return lambda parameters, x: norm.apply(parameters, state, None, x, False)[0], parameters


FUNCTIONS: dict[str, Callable] = {
    "convolution": functools.partial(gradients, convolution),
    "kernels": kernels,
    "normalisation": functools.partial(gradients, normalisation),
    "augment": functools.partial(augment, steps=2, nu=0.2),
    "augment-biases": functools.partial(augment, steps=2, nu=0.2, microbatch=2, leaves="b"),
    "augment-group": functools.partial(augment, steps=2, nu=0.2, microbatch=2, group=2),
    "augment-mixing": functools.partial(
        augment, steps=2, nu=0.2, microbatch=2, choice="mixing", leaves="w"
    ),
    # One operation takes statistics, one moves pixels; all of them would compile for minutes.
    "augmix": functools.partial(mix, ops=("autocontrast", "rotate"), width=2, depth=1),
    "norm_noise": lambda key, weights, x, y: norm_noise.add_noise(key, x),
    "trivial_augment": lambda key, weights, x, y: trivial_augment.trivial_augment(
        key, x, ops=("autocontrast", "color", "rotate")
    ),
    "pgd": functools.partial(attack, attacks.pgd, steps=3, restarts=2),
    "multitargeted": functools.partial(attack, attacks.multitargeted, steps=3, restarts=2),
    "apgd": functools.partial(attack, attacks.apgd, steps=10, microbatch=2),
    "apgd-t": functools.partial(attack, attacks.apgd, loss="dlr-targeted", steps=4, norm="l2"),
    "fab": functools.partial(attack, attacks.fab, steps=3, restarts=2),
    "square": functools.partial(attack, attacks.square, queries=10),
    "square-l2": functools.partial(attack, attacks.square, queries=10, norm="l2", epsilon=0.3),
}
QUICK = ("pgd", "convolution", "kernels", "normalisation")
PALLAS = ("kernels", "augment", "augment-group")  # With a kernel per example or group.
OTHERS = tuple(name for name in FUNCTIONS if name not in QUICK)


def on_one_device(function: Callable) -> Any:
    a = arrays()
    return jax.jit(function)(jax.random.key(0), a["weights"], a["x"], a["y"])


def on_devices(mesh: jax.sharding.Mesh) -> tuple[jax.Array, ...]:
    """The functions' arguments, with images and labels split."""
    a, split = arrays(), NamedSharding(mesh, P("data"))
    weights = jax.device_put(a["weights"], NamedSharding(mesh, P()))
    return (jax.random.key(0), weights, *jax.device_put((a["x"], a["y"]), split))


def on_mesh(function: Callable, axis_type: AxisType, mapped: bool = False) -> Any:
    """Runs a function jitted on a mesh, or in `jax.shard_map`."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
    if mapped:
        batch = P("data")
        in_specs = (P(), P(), batch, batch)
        function = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=batch)
    out = jax.jit(function)(*on_devices(mesh))
    for leaf in jax.tree.leaves(out):
        assert axis_type is AxisType.Auto or leaf.sharding.spec[0] == "data"
    return out


WAYS: dict[str, Callable] = {
    "auto": functools.partial(on_mesh, axis_type=AxisType.Auto),
    "explicit": functools.partial(on_mesh, axis_type=AxisType.Explicit),
    "shard_map": functools.partial(on_mesh, axis_type=AxisType.Explicit, mapped=True),
}


def readme() -> Arrays:
    """The last loss of the README's training loop, and of its version for several devices."""
    blocks = [
        re.findall(rf"```python\n({start}.*?)```", (ROOT / file).read_text(), re.DOTALL)
        for file, start in {
            "README.md": "import functools\n",
            "ada_jax/README.md": r"mesh = jax\.make_mesh",
        }.items()
    ]
    a, names, found = arrays(), {}, {}
    for way, (block,) in zip(("one", "explicit"), blocks, strict=True):
        names["batches"] = iter([(a["x"], a["y"])] * 3)
        exec(block, names)
        found[way] = np.asarray(names["loss"])
    return found


def tpu_kernels() -> Arrays:
    """Numbers of Pallas kernels in programs for a TPU, on one device and on both kinds of mesh."""
    found = {}
    for name, kind in itertools.product(PALLAS, (None, AxisType.Auto, AxisType.Explicit)):
        devices = 1 if kind is None else DEVICES
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind or AxisType.Auto,))
        with contextlib.nullcontext() if kind is None else jax.set_mesh(mesh):
            traced = jax.jit(FUNCTIONS[name]).trace(*on_devices(mesh))
            program = traced.lower(lowering_platforms=("tpu",)).as_text()
        found[f"{name}/{kind}"] = np.asarray(program.count("@tpu_custom_call"))
    return found


def compute(names: list[str]) -> Arrays:
    """All leaves of what the functions return, by function, way and number."""
    if names == ["readme"]:
        return readme()
    if names == ["tpu_kernels"]:
        return tpu_kernels()
    found = {}
    for name in names:
        for way, run in {"one": on_one_device, **WAYS}.items():
            for i, leaf in enumerate(jax.tree.leaves(run(FUNCTIONS[name]))):
                found[f"{name}/{way}/{i}"] = np.asarray(leaf)
    return found


def computed(names: tuple[str, ...], folder: pathlib.Path) -> Arrays:
    """The same in a process with four devices."""
    file = folder / "out.npz"
    subprocess.run([sys.executable, __file__, str(file), *names], check=True)
    with np.load(file, allow_pickle=False) as out:
        return dict(out)


# All in one test, so that one process computes them.
@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"]
)
def test_equal_to_one_device(names, tmp_path):
    found = computed(names, tmp_path)
    for name, way in itertools.product(names, WAYS):
        leaves = [key for key in found if key.startswith(f"{name}/one/")]
        assert leaves
        for leaf in leaves:
            one, many = found[leaf], found[leaf.replace("/one/", f"/{way}/")]
            np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5, err_msg=f"{leaf}, {way}")


def test_a_tpu_s_kernels_are_split_over_its_devices(tmp_path):
    """Only compiling such a program would fail, so it is lowered for a TPU."""
    found = computed(("tpu_kernels",), tmp_path)
    for name in PALLAS:
        one, *many = (
            int(found[f"{name}/{kind}"]) for kind in (None, AxisType.Auto, AxisType.Explicit)
        )
        assert one > 0 and many == [one, one], name


@pytest.mark.slow
def test_the_readme_s_training_loop_on_a_mesh(tmp_path):
    found = computed(("readme",), tmp_path)
    np.testing.assert_allclose(found["explicit"], found["one"], rtol=1e-4)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    np.savez(sys.argv[1], **compute(sys.argv[2:]))
