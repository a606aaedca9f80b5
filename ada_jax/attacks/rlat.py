"""Relaxed LPIPS adversarial training: one step on the image and on layers of the classifier.

Source: Kireev, Andriushchenko and Flammarion, "On the effectiveness of adversarial training against
common corruptions" (2021), section 5, with its code's radii.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from ada_jax.attacks import geometry

Deltas = dict[str, jax.Array]


def radii(
    image_shape: Sequence[int], layers: Mapping[str, Sequence[int]], epsilon: float
) -> tuple[float, dict[str, float]]:
    """The l2 radii of the image and of every layer, epsilon (n_l / n_0) / (l + 1).

    Args:
      image_shape: [H, W, C]; n_0 is their product, 3072 for CIFAR-10.
      layers: {layer: shape}, for l = 1, 2, ... in this order; n_l is the number of its features.
      epsilon: the image's radius.

    Returns:
      The image's radius, and {layer: radius}.
    """
    pixels = math.prod(image_shape)
    return epsilon, {
        layer: epsilon * math.prod(shape) / pixels / (i + 1)
        for i, (layer, shape) in enumerate(layers.items(), start=1)
    }


def perturb(
    loss_fn: Callable[[jax.Array, Deltas], jax.Array],
    x: jax.Array,
    layers: Mapping[str, Sequence[int]],
    epsilon: float,
) -> tuple[jax.Array, Deltas, jax.Array]:
    """Moves the image and all layers along their gradients at once, from zero, by their radii.

    Args:
      loss_fn: (images [B,H,W,C], perturbations {layer: [B, *shape]}) -> losses [B].
      x: images [B,H,W,C] in [0,1].
      layers: {layer: shape}, in order; see `classifiers.feature_shapes`.
      epsilon: the image's l2 radius, positive.

    Returns:
      The images, clipped to [0,1]; the layers' perturbations; and the losses [B] without them.
    """

    def total(x, deltas):
        found = loss_fn(x, deltas)
        return found.sum(), found

    zeros = {layer: jnp.zeros((len(x), *shape), jnp.float32) for layer, shape in layers.items()}
    (gradient, gradients), found = jax.grad(total, argnums=(0, 1), has_aux=True)(x, zeros)
    radius, layer_radii = radii(x.shape[1:], layers, epsilon)
    images = jnp.clip(x + radius * geometry.steepest(gradient, "l2"), 0, 1)
    deltas = {
        layer: layer_radii[layer] * geometry.steepest(gradients[layer], "l2") for layer in layers
    }
    return jax.lax.stop_gradient((images, deltas, found))
