"""DeepAugment: images as randomly distorted networks render them."""

import functools
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ada_jax.augment import distortions
from ada_jax.nets import corruption_nets

# By network; raised whenever the same seed gives other images than before.
RECIPES = dict.fromkeys(corruption_nets.names(), 1) | {"cae": 2}


# ------------------------------------------------------------------------ rendering


def generate(
    net: str,
    theta: distortions.Theta,
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
    """Renders a data set once through distorted networks, group by group, over all devices.

    What becomes of an image depends on the seed, the network, the copy and the image's position in
    the whole set, not on the devices.

    Args:
      net: a name of `corruption_nets.names()`.
      theta: its trained parameters.
      images: [N,H,W,3] uint8, or what gives such arrays when indexed with positions [n].
      seed: of all draws.
      copy: which of several independent renderings, from 0.
      group: images that share a distortion of the weights (the published code's mean is 20).
      quirks: follow the published code also where it does other than it says.
      enlarge: as for `corruption_nets.make`.
      start: the first position to render, a multiple of `group`.
      stop: the position after the last; None is N.

    Yields:
      Consecutive rendered images [n,H,W,3] uint8, cut off, not rounded, as published.
    """
    stop = len(images) if stop is None else stop
    if start % group:
        raise ValueError(f"start={start} is not a multiple of group={group}.")
    is_cae = corruption_nets.PRESETS[net] is None
    devices = jax.local_device_count()

    def distorted(index):
        rng = np.random.default_rng([seed, zlib.crc32(net.encode()), copy, index])
        if is_cae:
            return distortions.distort_cae(rng, theta)
        return distortions.distort_edsr(rng, theta, quirks=quirks)

    run = _renderer(is_cae, quirks, enlarge)
    for first in range(start, stop, group * devices):
        # The last groups are filled up with the last image, so that all have one shape.
        position = first + np.arange(group * devices)
        x = images[np.minimum(position, stop - 1)].reshape(devices, group, *images.shape[1:])
        indices = first // group + np.arange(devices)
        thetas = jax.tree.map(lambda *a: np.stack(a), *(distorted(int(i)) for i in indices))
        rendered = run(thetas, x, position.reshape(devices, group), seed, copy)
        yield np.asarray(rendered).reshape(-1, *images.shape[1:])[: stop - first]


@functools.cache  # One compiled program for all copies and shards.
def _renderer(is_cae: bool, quirks: bool, enlarge: int) -> Any:
    one = functools.partial(distortions.render_edsr, quirks=quirks)
    apply = corruption_nets.enlarged(distortions.render_cae if is_cae else one, enlarge)

    def render(theta, x, position, seed, copy):
        root = jax.random.fold_in(jax.random.key(seed), copy)
        key = jax.vmap(lambda i: jax.random.fold_in(root, i))(position)
        y = apply(theta, x.astype(jnp.float32) / 255, key)
        return (255 * jnp.clip(y, 0, 1)).astype(jnp.uint8)

    return jax.pmap(render, axis_name="devices", in_axes=(0, 0, 0, None, None))
