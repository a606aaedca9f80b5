"""Batches that are split over devices: by `pmap`, on explicit mesh axes, or by `shard_map`."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

AXIS = "devices"


def shard(batch: dict[str, Any]) -> dict[str, Any]:
    """Splits a process's batch [b, ...] over its devices: [devices, b / devices, ...]."""
    devices = jax.local_device_count()
    return {name: a.reshape(devices, -1, *a.shape[1:]) for name, a in batch.items()}


def output_like(x: jax.Array, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """A Pallas kernel's output, which inside `shard_map` varies over the mesh axes that x does."""
    varying = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def in_batches(mapped: Callable[..., Any], arrays: Sequence[Any], size: int, *args: Any) -> Any:
    """Applies a mapped function to arrays batch by batch; the last batch repeats the last example.

    Args:
      mapped: of `jax.pmap`; takes a batch of each array and `args`, returns a tree of [b,...].
      arrays: arrays [N,...].
      size: examples at a time over the local devices, rounded up to a multiple of them.
      *args: passed on.

    Returns:
      The tree of NumPy arrays [N,...].
    """
    parts = [
        jax.tree.map(lambda a: np.concatenate(np.asarray(a)), mapped(*batch, *args))
        for batch, _ in batches(arrays, size)
    ]
    return jax.tree.map(lambda *a: np.concatenate(a)[: len(arrays[0])], *parts)


def batches(arrays: Sequence[Any], size: int) -> Iterator[tuple[list[Any], np.ndarray]]:
    """Splits arrays [N,...] as `in_batches` does.

    Returns:
      An iterator of (a batch [devices,b,...] of each array, a mask bool [devices,b] that is False
      for repeated examples).
    """
    count, devices = len(arrays[0]), jax.local_device_count()
    size = -(-min(size, count) // devices) * devices
    for start in range(0, count, size):
        place = start + np.arange(size)
        batch = [a[np.minimum(place, count - 1)] for a in arrays]
        split = [a.reshape(devices, -1, *a.shape[1:]) for a in batch]
        yield split, (place < count).reshape(devices, -1)


def replicate(tree: Any) -> Any:
    """Puts a copy of every leaf on every local device, with a leading device axis."""
    devices = jax.local_device_count()
    tree = jax.tree.map(lambda a: np.broadcast_to(a, (devices, *np.shape(a))), tree)
    # With the update step's axis name: arrays of another one would make it compile again.
    return jax.pmap(lambda a: a, AXIS)(tree) if jax.tree.leaves(tree) else tree


def first(value: Any) -> Any:
    """The first local device's shard of an array; other values are returned as they are."""
    return value.addressable_shards[0].data if isinstance(value, jax.Array) else value


def unreplicate(tree: Any) -> Any:
    """The first device's copy, on the host."""
    return jax.tree.map(lambda a: np.asarray(first(a)).reshape(a.shape[1:]), tree)


LogitsFn = Callable[[jax.Array], jax.Array]


def on_mesh(function: Callable[..., Any], logits_fn: LogitsFn, x: jax.Array) -> Callable[..., Any]:
    """Binds logits_fn to a function, also for images split over explicit mesh axes.

    Inside the function these axes are automatic: the compiler chooses the sharding of every
    operation. logits_fn runs with explicit axes, because arrays that it closes over may have them.

    Args:
      function: `(logits_fn, x, *args)` of trees of arrays; returns a tree of arrays [B,...].
      logits_fn: the classifier, [b,H,W,C] -> [b,K].
      x: images [B,H,W,C].

    Returns:
      `(x, *args)`, the function without its first argument.
    """
    mesh, names = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec[0]
    if not mesh.explicit_axes:
        return functools.partial(function, logits_fn)
    axes = (names,) if isinstance(names, str) else names or ()
    devices = math.prod(mesh.shape[name] for name in axes)

    def explicit(images):
        spec = PartitionSpec(None if len(images) % devices else names)
        sharding = NamedSharding(mesh, spec)
        as_outside = jax.sharding.explicit_axes(
            logits_fn, axes=mesh.explicit_axes, in_sharding=sharding
        )
        return as_outside(images)

    automatic = jax.sharding.auto_axes(
        functools.partial(function, explicit),
        axes=mesh.explicit_axes,
        out_sharding=NamedSharding(mesh, PartitionSpec(names)),
    )
    # Jitted, because some operations cannot infer their devices outside of `jax.jit`.
    return jax.jit(automatic)


def map_examples(f: Callable, args: Any, batch_size: int | None = None) -> Any:
    """`lax.map` over examples; on a mesh each device loops over its own ones.

    Args:
      f: a function of one example.
      args: tree of arrays [N,...].
      batch_size: see `lax.map`.
    """
    return on_own_examples(functools.partial(jax.lax.map, f, batch_size=batch_size), args)


def on_own_examples(f: Callable, args: Any) -> Any:
    """f(args); on a mesh each device applies f to its own examples.

    The compiler would gather all examples on every device for a loop, and cannot split a Pallas
    kernel. A mesh of automatic axes must be set, by `on_mesh` or by `jax.set_mesh`.

    Args:
      f: a function of any number of examples.
      args: tree of arrays [N,...], split over explicit axes or, over all automatic ones, here. Then
        the last example is repeated if N is not a multiple of the devices.
    """
    leaves = jax.tree.leaves(args)
    mesh, names = _split_over(leaves)
    if mesh.empty or mesh.manual_axes:
        return f(args)
    count = len(leaves[0])
    if mesh.explicit_axes:
        args = jax.sharding.reshard(args, NamedSharding(mesh, PartitionSpec(names)))
    elif count % mesh.size:
        index = np.minimum(np.arange(count + -count % mesh.size), count - 1)
        args = jax.tree.map(lambda a: a[index], args)
    spec = PartitionSpec(names)
    out = jax.shard_map(f, mesh=mesh, in_specs=(spec,), out_specs=spec)(args)
    return jax.tree.map(lambda a: a[:count], out)


def _split_over(arrays: Sequence[jax.Array]) -> tuple[AbstractMesh, Any]:
    """The mesh of arrays [N,...] and the names of the axes to split N over."""
    for array in arrays:
        sharding = jax.typeof(array).sharding
        if sharding.mesh.explicit_axes and sharding.spec[0]:
            return sharding.mesh, sharding.spec[0]
    mesh = jax.sharding.get_abstract_mesh()
    return mesh, None if mesh.explicit_axes else mesh.axis_names


def varying(value: jax.Array, like: jax.Array) -> jax.Array:
    """Casts a value to vary over the same mesh axes as `like`, inside `jax.shard_map`.

    The initial carry of a loop must vary wherever the loop's body makes it vary.
    """
    return _cast(value, _axes(like))


def _cast(value: jax.Array, axes: frozenset[str]) -> jax.Array:
    axes -= _axes(value)
    return jax.lax.pcast(value, tuple(axes), to="varying") if axes else value


def alike(*values: jax.Array | None) -> list[jax.Array | None]:
    """Casts arrays to vary over all mesh axes of any of them, inside `jax.shard_map`.

    `jax.custom_vjp` requires it: gradients vary over these axes, and the cast sums them over those
    that an array did not vary over.
    """
    axes = frozenset().union(*(_axes(a) for a in values if a is not None))
    return [None if a is None else _cast(a, axes) for a in values]


def shard_index(x: jax.Array, other: jax.Array) -> tuple[Any, int]:
    """Index of this device's shard of a batch inside `jax.shard_map`, and the number of shards.

    Args:
      x: this device's shard of the batch.
      other: an array whose own mesh axes are not counted.
    """
    axes = _axes(x) - _axes(other)
    names = tuple(name for name in jax.sharding.get_abstract_mesh().axis_names if name in axes)
    return (jax.lax.axis_index(names), jax.lax.axis_size(names)) if names else (0, 1)


def _axes(a: jax.Array) -> frozenset[str]:
    return jax.typeof(a).mat.varying
