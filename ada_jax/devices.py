"""Arrays on all local devices, one leading axis for `jax.pmap`."""

from typing import Any

import jax
import numpy as np

AXIS = "devices"


def shard(batch: dict[str, Any]) -> dict[str, Any]:
    """Splits a process's batch [b, ...] over its devices: [devices, b / devices, ...]."""
    devices = jax.local_device_count()
    return {name: a.reshape(devices, -1, *a.shape[1:]) for name, a in batch.items()}


def replicate(tree: Any) -> Any:
    """Puts a copy of every leaf on every local device, with a leading device axis."""
    devices = jax.local_device_count()
    tree = jax.tree.map(lambda a: np.broadcast_to(a, (devices, *np.shape(a))), tree)
    # With the axis of the step that takes it: for another one's arrays it would be compiled anew.
    return jax.pmap(lambda a: a, AXIS)(tree) if jax.tree.leaves(tree) else tree


def first(value: Any) -> Any:
    """The first local device's part of an array, on that device; others are left as they are."""
    return value.addressable_shards[0].data if isinstance(value, jax.Array) else value


def unreplicate(tree: Any) -> Any:
    """The first device's copy, on the host."""
    return jax.tree.map(lambda a: np.asarray(first(a)).reshape(a.shape[1:]), tree)
