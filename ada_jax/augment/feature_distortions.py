"""DeepAugment's random distortions of features and latents, drawn for every image (JAX).

Source: Hendrycks et al., "The many faces of robustness" (2021), and its code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import keys
from ada_jax.nets import cae, edsr, per_example

# ------------------------------------------------------------------------ EDSR's features


def render_edsr(theta: dict, x: jax.Array, key: jax.Array, *, quirks: bool = False) -> jax.Array:
    """Runs EDSR with random distortions of its features; the output has the input's size.

    Args:
      theta: parameters, distorted or not.
      x: images [B,H,W,3] in [0,1].
      key: random key, or one per example [B].
      quirks: whether to reproduce the published code's known bugs.

    Returns:
      [B,H,W,3], not clipped.
    """
    draws = jax.vmap(jax.random.split)(keys.per_example(key, len(x)))
    head = edsr.edsr_head(theta, x)
    head = jax.vmap(functools.partial(_distort_head, quirks=quirks))(draws[:, 0], head)
    y = edsr.edsr_tail(theta, head + _distorted_body(draws[:, 1], theta, head, quirks))
    return y if y.shape == x.shape else jax.image.resize(y, x.shape, "cubic", antialias=True)


def _distort_head(key: jax.Array, h: jax.Array, quirks: bool) -> jax.Array:
    """Exchanges channels of [H,W,C], drops features, negates features, or does nothing."""
    which, swap_key, mask_key = jax.random.split(key, 3)
    uniform = jax.random.uniform(mask_key, h.shape, jnp.float32)
    pairs = jax.random.randint(swap_key, (5, 2), 0, h.shape[-1], jnp.int32)

    def exchange(i, order):
        a, b = pairs[i]
        # The published code writes through a view and so overwrites without exchanging.
        changed = order.at[a].set(order[b])
        return changed if quirks else changed.at[b].set(order[a])

    options = (
        lambda: h[..., lax.fori_loop(0, 5, exchange, jnp.arange(h.shape[-1]))],
        lambda: h * (uniform >= 0.05),
        lambda: h * jnp.where(uniform < 0.025, -1.0, 1.0),
        lambda: h,
    )
    return lax.switch(jax.random.randint(which, (), 0, len(options), jnp.int32), options)


def _distorted_body(key: jax.Array, theta: dict, h: jax.Array, quirks: bool) -> jax.Array:
    """Runs the residual blocks and the convolution after them with one of five distortions.

    Features are negated, activated or flipped after a third of the blocks; or up to three modules
    are skipped; or nothing happens. All images [B,H,W,C] use the same convolutions; keys are [B].
    """
    blocks = sum(name.endswith("/conv0") for name in theta)
    middle = 5 if blocks > 5 else blocks // 2
    which, what, skip_key = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(key), 1, 0)
    option = jax.vmap(lambda k: jax.random.randint(k, (), 0, 5, jnp.int32))(which)
    u = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(what)
    # Module `blocks` is the last convolution.
    drawn = jax.vmap(lambda k: jax.random.randint(k, (3,), 2, blocks + 1, jnp.int32))(skip_key)
    skipping = option == 3

    def select(condition, a, b):
        return jnp.where(condition[:, None, None, None], a, b)

    def change(x):
        activated = select(u < 1 / 3, jax.nn.relu(x), jax.nn.gelu(x, approximate=False))
        flipped = select(u < 1 / 3, x[:, ::-1, :, ::-1], x[:, :, ::-1, ::-1])
        x = select(option == 0, -x, x)
        return select(option == 1, activated, select(option == 2, flipped, x))

    out = h
    for i in range(blocks + 1):
        out = change(out) if i == middle else out
        # In the published code the input of every module is the head's output.
        x = select(skipping, h, out) if quirks else out
        last = i == blocks
        y = edsr.edsr_body_end(theta, x) if last else edsr.edsr_block(theta, i, x)
        out = select(skipping & jnp.any(drawn == i, 1), out, y)
    return out


# ------------------------------------------------------------------------ the CAE's latents


def render_cae(theta: dict, x: jax.Array, key: jax.Array) -> jax.Array:
    """Runs the CAE with one random distortion of its latent or of its bits.

    Args:
      theta: parameters, distorted or not.
      x: images [B,H,W,3] in [0,1].
      key: random key, or one per example [B].

    Returns:
      [B,H,W,3], not clipped.
    """
    latent = cae.cae_encode(theta, x)
    bits = jax.vmap(_distorted_bits)(keys.per_example(key, len(x)), latent)
    return cae.cae_decode(theta, bits)


def _distorted_bits(key: jax.Array, latent: jax.Array) -> jax.Array:
    """Draws bits [h,w,32] from a latent, with one of the two distorted."""
    bits_key, which, draw = jax.random.split(key, 3)
    option = jax.random.randint(which, (), 0, 1 + len(_LATENT_DISTORTIONS), jnp.int32)
    # Option 0 amplifies the bits instead of distorting the latent.
    options = (lambda e: e, *(lambda e, f=f: f(draw, e) for f in _LATENT_DISTORTIONS))
    bits = cae.binarise(bits_key, lax.switch(option, options, latent))
    scale_key, factor_key = jax.random.split(draw)
    factors = jax.random.uniform(factor_key, bits.shape, jnp.float32)
    factors = 3 + 4 * jax.random.uniform(scale_key, (), jnp.float32) * factors
    # The published network amplifies bits of 0 and 1.
    return jnp.where(option == 0, (bits + 1) * factors - 1, bits)


def latent_drop(key: jax.Array, e: jax.Array) -> jax.Array:
    """Sets 20% of the positions to 0."""
    return e * (jax.random.uniform(key, (*e.shape[:2], 1), jnp.float32) >= 0.2)


def latent_negate(key: jax.Array, e: jax.Array) -> jax.Array:
    """Negates 10% of the positions."""
    drawn = jax.random.uniform(key, (*e.shape[:2], 1), jnp.float32)
    return e * jnp.where(drawn < 0.1, -1.0, 1.0)


def latent_permute(key: jax.Array, e: jax.Array) -> jax.Array:
    """Permutes the first ten channels."""
    order = jax.random.permutation(key, jnp.arange(10, dtype=jnp.int32))
    return jnp.concatenate([e[..., order], e[..., 10:]], -1)


def latent_flip_some(key: jax.Array, e: jax.Array) -> jax.Array:
    """Flips five channels in the same way."""
    which, how = jax.random.split(key)
    chosen = jax.random.randint(which, (5,), 0, e.shape[-1], jnp.int32)
    # A channel drawn twice is flipped twice.
    odd = jnp.bincount(chosen, length=e.shape[-1]) % 2
    return jnp.where(odd == 1, latent_flip(how, e), e)


def latent_flip(key: jax.Array, e: jax.Array) -> jax.Array:
    """Flips all channels vertically, horizontally or both."""
    how = jax.random.randint(key, (), 0, 3, jnp.int32)
    return lax.switch(how, (lambda: e[::-1, ::-1], lambda: e[::-1], lambda: e[:, ::-1]))


def latent_convolve(key: jax.Array, e: jax.Array) -> jax.Array:
    """Convolves with the identity plus noise on every tap."""
    channels = e.shape[-1]
    noise = jax.random.uniform(key, (3, 3, channels, channels), jnp.float32, -0.1, 0.1)
    return _convolve(e, noise.at[1, 1].add(jnp.eye(channels, dtype=jnp.float32)))


def latent_mix(key: jax.Array, e: jax.Array) -> jax.Array:
    """Adds another channel, shifted by at most a pixel, to half of the channels.

    A channel that draws itself without a shift stays unchanged, as published.
    """
    channels = e.shape[-1]
    on, source, row, column = _taps(key, channels)
    taps = jnp.zeros((3, 3, channels, channels)).at[1, 1].add(jnp.eye(channels))
    on = jax.random.bernoulli(on, np.float32(0.5), (channels,))
    source = jax.random.randint(source, (channels,), 0, channels, jnp.int32)
    return _convolve(e, taps.at[row, column, source, jnp.arange(channels)].max(on))


def latent_shift(key: jax.Array, e: jax.Array) -> jax.Array:
    """Shifts the channels; each repeats the previous shift, or draws a new one with chance 1/5."""
    channels = e.shape[-1]
    renewed, _, row, column = _taps(key, channels)
    renewed = jax.random.bernoulli(renewed, np.float32(0.2), (channels,)).at[0].set(True)
    latest = lax.cummax(jnp.where(renewed, jnp.arange(channels), 0))
    every = jnp.arange(channels)
    taps = jnp.zeros((3, 3, channels, channels))
    return _convolve(e, taps.at[row[latest], column[latest], every, every].set(1.0))


_LATENT_DISTORTIONS = (
    latent_drop,
    latent_negate,
    latent_permute,
    latent_flip_some,
    latent_flip,
    latent_convolve,
    latent_mix,
    latent_shift,
)


def _taps(key: jax.Array, channels: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Two keys, and a row and a column of a 3x3 kernel for every channel."""
    a, b, c = jax.random.split(key, 3)
    row, column = jax.random.randint(c, (2, channels), 0, 3, jnp.int32)
    return a, b, row, column


def _convolve(e: jax.Array, taps: jax.Array) -> jax.Array:
    # Fast also under vmap, where every image has its own taps.
    return per_example.conv2d(e[None], taps.astype(e.dtype))[0]
