"""Per-example losses of a classifier's logits, and weight decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ada_jax.errors import UserError


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Returns the cross-entropy of each example.

    Args:
      logits: [B, K], any type; computed in float32.
      labels: [B] integers in [0, K).
      smoothing: share of the target that is spread evenly over all K classes, in [0, 1).

    Returns:
      [B] float32, in nats, non-negative.

    Raises:
      UserError: the shapes do not match, the labels are not integers, or smoothing is out of range.

    Source: eq. (3) of Calian et al., "Defending against image corruptions through adversarial
    augmentations" (2021); smoothing follows Szegedy et al., "Rethinking the Inception architecture
    for computer vision" (2016), section 7.
    """
    _check(logits, labels)
    if not 0 <= smoothing < 1:
        raise UserError(f"smoothing={smoothing} must be at least 0 (off) and below 1.")
    logits = logits.astype(jnp.float32)
    if smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, smoothing))


def jsd(logits_clean: jax.Array, logits_aug1: jax.Array, logits_aug2: jax.Array) -> jax.Array:
    """Returns the Jensen-Shannon divergence between three predictions for each example.

    It is the mean over the three of KL(p_k || M), where M is their mean, clamped to [1e-7, 1]
    before the logarithm. AugMix weights this loss by 12.

    Args:
      logits_clean: [B, K], any float type; computed in float32.
      logits_aug1: [B, K], for the same examples augmented.
      logits_aug2: [B, K], for a second augmentation of the same examples.

    Returns:
      [B] float32, in nats, between 0 and log(3) up to the clamp and rounding.

    Raises:
      UserError: the shapes are not as above.

    Source: Hendrycks et al., "AugMix" (2020), section 3, with the clamp of its code.
    """
    shapes = [a.shape for a in (logits_clean, logits_aug1, logits_aug2)]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise UserError(f"The logits have shapes {shapes}: all must have the same shape [B, K].")
    logits = jnp.stack([logits_clean, logits_aug1, logits_aug2]).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    log_p = jnp.where(p > 0, log_p, 0.0)  # 0 log 0 is 0, for logits of -infinity.
    log_mixture = jnp.log(jnp.clip(jnp.mean(p, axis=0), 1e-7, 1.0))
    return jnp.mean(jnp.sum(p * (log_p - log_mixture), axis=-1), axis=0)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the largest wrong logit minus the true one, max_{i != y} z_i - z_y.

    Args:
      logits: [B, K] with K > 1, any float type; computed in float32.
      labels: [B] integers in [0, K).

    Returns:
      [B] float32, positive for misclassified examples.

    Raises:
      UserError: the shapes or types are not as above.

    Source: Carlini and Wagner, "Towards evaluating the robustness of neural networks" (2017).
    """
    _check(logits, labels)
    logits = logits.astype(jnp.float32)
    is_true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    best_wrong = jnp.max(jnp.where(is_true, -jnp.inf, logits), axis=-1)
    return best_wrong - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def weight_decay(params: Any, *, include_bn: bool = False) -> jax.Array:
    """Returns half the sum of squares of the parameters.

    Args:
      params: a tree of arrays with Haiku's parameter names.
      include_bn: whether to include batch normalisation's parameters `scale` and `offset`.

    Returns:
      A float32 scalar, to be multiplied by the weight decay's coefficient.

    Source: Calian et al. (2021), the "global weight decay" of the training details, which do not
    say whether it includes batch normalisation.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    squares = [
        jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        for path, leaf in leaves
        if include_bn or jax.tree_util.keystr(path[-1:], simple=True) not in ("scale", "offset")
    ]
    return 0.5 * sum(squares, start=jnp.float32(0.0))


def _check(logits: jax.Array, labels: jax.Array) -> None:
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not integer:
        raise UserError(
            f"Logits of shape {list(logits.shape)} and labels of shape {list(labels.shape)} and "
            f"type {labels.dtype} do not match: logits must be [B, K] and labels [B] integers."
        )
