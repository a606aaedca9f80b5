"""Mixup of inputs or features, with noise (Lim et al., 2022; NoisyMix, Erichson et al., 2022).

For example:

    partner, share = mixup.pair(pair_key, len(labels))
    change = lambda h: mixup.noisy(noise_key, mixup.mix(h, partner, share))
    perturbations = mixup.at_one_layer(layer_key, ("input", "stage1", "stage2"), change)
    logits, state = classifier.apply(..., perturbations=perturbations)
    loss = mixup.cross_entropy(logits, labels, partner, share)
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import losses
from ada_jax.errors import UserError


def pair(key: jax.Array, count: int, *, alpha: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Draws a partner for every example of a batch, and the share that all examples keep.

    Args:
      key: random key of the batch.
      count: B.
      alpha: the share is Beta(alpha, alpha).

    Returns:
      The partners' indices, a random permutation [B], and the share in [0,1], a float32 scalar.

    Raises:
      UserError: alpha is not positive and finite.

    Source: Zhang et al., "mixup: beyond empirical risk minimization" (2018); NoisyMix has alpha 1.
    """
    if not 0 < alpha < np.inf:
        raise UserError(f"alpha={alpha} must be positive and finite (NoisyMix uses 1).")
    partner_key, share_key = jax.random.split(key)
    partner = jax.random.permutation(partner_key, jnp.arange(count, dtype=jnp.int32))
    alpha = np.float32(alpha)
    return partner, jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32)


def mix(x: jax.Array, partner: jax.Array, share: jax.Array) -> jax.Array:
    """Mixes every example with its partner.

    Args:
      x: images or features [B,...] or, of V views of the batch one after the other, [VB,...]. The
        views of an example have the same partner.
      partner: indices [B].
      share: of an example itself, a number in [0,1].

    Returns:
      share * x + (1 - share) * the partners, of the type of x.

    Raises:
      UserError: x is not of a floating type.
    """
    x = _floating(x)
    views = x.reshape(-1, len(partner), *x.shape[1:])
    share = jnp.asarray(share, x.dtype)
    return (share * views + (1 - share) * views[:, partner]).reshape(x.shape)


def noisy(
    key: jax.Array,
    features: jax.Array,
    *,
    additive: float = 0.5,
    multiplicative: float = 0.5,
    sparsity: float = 0.65,
    views: int = 1,
) -> jax.Array:
    """Multiplies features by noise around 1 and adds Gaussian noise.

    The result is features * (1 + m U) + a N for U uniform in [-1,1] and N standard normal. The
    levels are a = additive * v and m = multiplicative * w with v and w from Beta(2, 5) (whose mean
    is 2/7), drawn once for the device's batch. U and N are zero at a share `sparsity` of the
    values, drawn independently. The i-th of several views, counted from 1, gets i times the
    additive noise.

    Args:
      key: one random key for the batch.
      features: [VB,...], V views one after the other.
      additive: largest standard deviation of the additive noise.
      multiplicative: largest relative change.
      sparsity: share of the values without noise, in [0,1).
      views: V.

    Returns:
      [VB,...], of the type of `features`.

    Raises:
      UserError: a level is out of range, or `views` does not divide the number of features.

    Source: the defaults, the Beta distributions, the sparsity and the views are those of NoisyMix's
    code for CIFAR, where the input is images in [-1,1]. Noise on the layer 'input' of `classifiers`
    is half as strong, because that is divided by CIFAR's standard deviation, 0.25. Lim et al.,
    "Noisy feature mixup" (2022), have additive 0.4, multiplicative 0.2 and sparsity 0.
    """
    check_levels(additive, multiplicative, sparsity)
    features = _floating(features)
    if len(features) % views:
        raise UserError(f"views={views} does not divide the {len(features)} features: correct it.")
    if additive == multiplicative == 0:
        return features
    keys = jax.random.split(key, 4)
    a, m = (jax.random.beta(k, 2.0, 5.0, dtype=jnp.float32) for k in keys[:2])
    normal, uniform = (_sparse_uniform(k, features.shape, sparsity) for k in keys[2:])
    normal = np.float32(np.sqrt(2)) * lax.erf_inv(normal)
    view = jnp.repeat(jnp.arange(1, views + 1, dtype=jnp.float32), len(features) // views)
    view = view.reshape(-1, *[1] * (features.ndim - 1))
    factor = 1 + np.float32(multiplicative) * m * uniform
    noise = np.float32(additive) * a * view * normal
    return (features.astype(jnp.float32) * factor + noise).astype(features.dtype)


def _sparse_uniform(key: jax.Array, shape: tuple[int, ...], sparsity: float) -> jax.Array:
    """Zero with probability `sparsity`, else uniform in (-1,1)."""
    below = np.nextafter(np.float32(1), np.float32(0))
    values = jax.random.uniform(key, shape, jnp.float32, -below, 1.0)
    sparsity = np.float32(sparsity)
    sparse = jnp.sign(values) * jnp.maximum(jnp.abs(values) - sparsity, 0) / (1 - sparsity)
    return jnp.clip(sparse, -below, below)  # Rounding can reach 1, where erf_inv is infinite.


def at_one_layer(
    key: jax.Array, layers: Sequence[str], change: Callable[[jax.Array], jax.Array]
) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Makes the `perturbations` of a classifier that change the output of one random layer.

    Args:
      key: random key of the batch.
      layers: names of `classifiers.feature_shapes`, or 'input'.
      change: features -> features of the same shape and type.

    Returns:
      {layer: features -> features}; all but one function return their argument.

    Source: Verma et al., "Manifold mixup" (2019). NoisyMix draws from the input and the outputs of
    the stages, without the stem.
    """
    drawn = jax.random.randint(key, (), 0, len(layers), jnp.int32)

    def at(index: int, features: jax.Array) -> jax.Array:
        return lax.cond(drawn == index, change, lambda h: h, features)

    return {layer: functools.partial(at, i) for i, layer in enumerate(layers)}


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    partner: jax.Array,
    share: jax.Array,
    smoothing: float = 0.0,
) -> jax.Array:
    """Returns the cross-entropy of mixed examples, by label and partner's label.

    Args:
      logits: [B, K], as for `losses.cross_entropy`.
      labels: [B] of the examples before mixing.
      partner: indices [B].
      share: of an example's own label.
      smoothing: see `losses.cross_entropy`.

    Returns:
      [B] float32, in nats, non-negative.

    Raises:
      UserError: as `losses.cross_entropy`.
    """
    labels = jnp.asarray(labels)
    own, other = (losses.cross_entropy(logits, y, smoothing) for y in (labels, labels[partner]))
    return share * own + (1 - share) * other


def _floating(x: jax.Array) -> jax.Array:
    """The images or features as an array; raises UserError if they are integers."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"Images of type {x.dtype} cannot be mixed: convert them to float32.")
    return x


def check_levels(additive: float, multiplicative: float, sparsity: float) -> None:
    """Raises UserError for the first level of `noisy` that is out of range."""
    for name, level in (("additive", additive), ("multiplicative", multiplicative)):
        if not 0 <= level < np.inf:
            raise UserError(f"{name}={level} must be at least 0 (off) and finite.")
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity={sparsity} must be at least 0 and below 1.")
