"""LPIPS: the distance between two images in the features of a classifier.

Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric"
(2018), without learned weights, as Laidlaw et al., "Perceptual adversarial robustness" (2021),
section 3, apply it to any classifier.
"""

import math
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from ada_jax.errors import UserError

Features = Any  # A tree of features [B, H', W', C'], one leaf for each layer.
# Images [B,H,W,C] in [0,1] -> logits [B,K] and features.
Model = Callable[[jax.Array], tuple[jax.Array, Features]]

_EPSILON = 1e-10


def unit_features(features: Features) -> Features:
    """Scales features so that their Euclidean distance, over all layers, is LPIPS.

    Every pixel's features are divided by their norm over the channels plus 1e-10, and every layer
    by the square root of its number of pixels.

    Args:
      features: a tree of [B, H', W', C'], computed in float32.

    Returns:
      A tree of the same shapes, float32.
    """

    def unit(layer: jax.Array) -> jax.Array:
        layer = layer.astype(jnp.float32)
        norms = _norm(jnp.sum(layer**2, -1, keepdims=True))
        return layer / (norms + _EPSILON) / math.sqrt(layer.shape[1] * layer.shape[2])

    return jax.tree.map(unit, features)


def distance(a: Features, b: Features) -> jax.Array:
    """The Euclidean distances [B] between the features of two batches; zero has gradient zero."""
    per_layer = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2, (1, 2, 3)), a, b)
    return _norm(sum(jax.tree.leaves(per_layer)))


def lpips(features_fn: Callable[[jax.Array], Features], a: jax.Array, b: jax.Array) -> jax.Array:
    """LPIPS between images.

    Args:
      features_fn: images [B,H,W,C] -> features, a tree of [B,H',W',C'].
      a, b: images [B,H,W,C] in [0,1].

    Returns:
      [B], 0 or more.
    """
    return distance(unit_features(features_fn(a)), unit_features(features_fn(b)))


def model_of(classifier: hk.TransformedWithState, params: hk.Params, state: hk.State) -> Model:
    """A classifier of `nets.classifiers` in evaluation mode, as a function.

    Returns:
      Images -> logits and features: the outputs of its stages, without the stem's, or of AlexNet's
      five convolutions.
    """

    def model(x: jax.Array) -> tuple[jax.Array, Features]:
        (logits, features), _ = classifier.apply(
            params, state, None, x, is_training=False, with_features=True
        )
        return logits, {layer: h for layer, h in features.items() if layer != "stem"}

    return model


def check(features: Features) -> None:
    """Raises UserError unless there are features, all of them [B, H', W', C'].

    Args:
      features: a tree of arrays or of their shapes.
    """
    layers = jax.tree.leaves(features)
    if not layers or any(layer.ndim != 4 for layer in layers):
        raise UserError(
            f"The model returns features of the shapes {[list(layer.shape) for layer in layers]}: "
            "it must return at least one layer, and each must be [B,H,W,C]."
        )


def _norm(square: jax.Array) -> jax.Array:
    """The square root, whose gradient at zero is zero instead of infinite."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
