"""DeepAugment: renders images through randomly distorted networks."""

import functools
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ada_jax.augment import feature_distortions, weight_distortions
from ada_jax.nets import corruption_nets

# Version by network, raised when the same seed gives different images than before.
RECIPES = dict.fromkeys(corruption_nets.names(), 1) | {"cae": 2}


def generate(
    net: str,
    theta: weight_distortions.Theta,
    images: Any,
    *,
    seed: int,
    copy: int,
    group: int = 20,
    quirks: bool = False,
    enlarge: int = 1,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[np.ndarray]:
    """Renders a data set once through distorted networks, group by group, on all devices.

    The rendering of an image depends on the seed, the network, the copy and the image's position in
    the whole set, but not on the devices. The random numbers of the distorted features do not
    depend on the network.

    Args:
      net: one of `corruption_nets.names()`.
      theta: its trained parameters.
      images: [N,H,W,3] uint8, or an object that returns such arrays for positions [n].
      seed: seed of all draws.
      copy: index of the rendering, from 0; renderings are independent.
      group: number of images that share a distortion of the weights (20 on average in the published
        code).
      quirks: whether to reproduce the published code's known bugs.
      enlarge: as for `corruption_nets.make`.
      start: the first position to render, a multiple of `group`.
      stop: the position after the last; None means N.

    Yields:
      Consecutive rendered images [n,H,W,3] uint8, truncated, not rounded, as published.
    """
    stop = len(images) if stop is None else stop
    if start % group:
        raise ValueError(f"start={start} is not a multiple of group={group}.")
    is_cae = corruption_nets.PRESETS[net] is None
    devices = jax.local_device_count()

    def distorted(index):
        rng = np.random.default_rng([seed, zlib.crc32(net.encode()), copy, index])
        if is_cae:
            return weight_distortions.distort_cae(rng, theta)
        return weight_distortions.distort_edsr(rng, theta, quirks=quirks)

    run = _renderer(is_cae, quirks, enlarge)
    for first in range(start, stop, group * devices):
        # The last groups are padded with the last image, so that all have the same shape.
        position = first + np.arange(group * devices)
        x = images[np.minimum(position, stop - 1)].reshape(devices, group, *images.shape[1:])
        indices = first // group + np.arange(devices)
        thetas = jax.tree.map(lambda *a: np.stack(a), *(distorted(int(i)) for i in indices))
        rendered = run(thetas, x, position.reshape(devices, group), np.uint32(seed), copy)
        yield np.asarray(rendered).reshape(-1, *images.shape[1:])[: stop - first]


@functools.cache  # All copies and shards use the same compiled program.
def _renderer(is_cae: bool, quirks: bool, enlarge: int) -> Any:
    one = functools.partial(feature_distortions.render_edsr, quirks=quirks)
    apply = corruption_nets.enlarged(feature_distortions.render_cae if is_cae else one, enlarge)

    def render(theta, x, position, seed, copy):
        root = jax.random.fold_in(jax.random.key(seed), copy)
        key = jax.vmap(lambda i: jax.random.fold_in(root, i))(position)
        y = apply(theta, x.astype(jnp.float32) / 255, key)
        return (255 * jnp.clip(y, 0, 1)).astype(jnp.uint8)

    return jax.pmap(render, axis_name="devices", in_axes=(0, 0, 0, None, None))
