"""The compressive autoencoder of Theis et al. (2017), binarised."""

import jax
import jax.numpy as jnp

from ada_jax.errors import UserError
from ada_jax.nets import layers

CAE_SMALLEST = 12  # The decoder starts with an unpadded 3x3 convolution at a quarter of the size.
CAE_LAYERS = {  # The published network's names: (kernel size, inputs, outputs).
    "e_conv_1": (5, 3, 64),
    "e_conv_2": (5, 64, 128),
    **{f"e_block_{i}/conv{j}": (3, 128, 128) for i in (1, 2, 3) for j in (0, 1)},
    "e_conv_3": (5, 128, 32),
    "d_up_conv_1/conv": (3, 32, 64),
    "d_up_conv_1/up": (2, 64, 128),
    **{f"d_block_{i}/conv{j}": (3, 128, 128) for i in (1, 2, 3) for j in (0, 1)},
    "d_up_conv_2/conv": (3, 128, 32),
    "d_up_conv_2/up": (2, 32, 256),
    "d_up_conv_3/conv0": (3, 256, 16),
    "d_up_conv_3/conv1": (3, 16, 3),
}


def cae() -> layers.Architecture:
    """The compressive autoencoder of DeepAugment (Dinu's cae_32x32x32_zero_pad_bin).

    It encodes [B,H,W,3] as [B,H/4,W/4,32] random bits, two per pixel, and decodes them. Heights and
    widths must be multiples of 4 and at least 12.

    Returns:
      The architecture, with 42 leaves and 2,241,859 numbers. `apply` needs a key to draw the bits.
    """

    def apply(theta, x, key):
        return cae_decode(theta, binarise(key, cae_encode(theta, x)))

    return layers.Architecture(cae_init, apply, 1)


def cae_init(key: jax.Array) -> dict:
    """Random CAE parameters of He's variance, a tenth of it in amplitude for residual branches.

    With PyTorch's default initialisation and a learning rate of 3e-4 or more, all latents saturate
    within a hundred steps and the network renders the mean image.
    """
    theta = {}
    keys = jax.random.split(key, len(CAE_LAYERS))
    for k, (name, (size, inputs, outputs)) in zip(keys, CAE_LAYERS.items(), strict=True):
        # 2 / fan_in; transposed convolutions do not sum over neighbours.
        gain = 1.0 if name.endswith("/up") else 6**0.5
        gain *= 0.1 if "_block_" in name and name.endswith("conv1") else 1.0
        theta[name] = {
            "w": gain * layers.conv_init(k, inputs, outputs, size)["w"],
            "b": jnp.zeros(outputs, jnp.float32),
        }
    return theta


def cae_encode(theta: dict, x: jax.Array) -> jax.Array:
    """Encodes [B,H,W,3] in [0,1] as the latent [B,H/4,W/4,32] in [-1,1].

    Raises:
      UserError: a side is below 12 or not a multiple of 4.
    """
    if not fits_cae(*x.shape[1:3]):
        raise UserError(
            "The CAE needs heights and widths that are multiples of 4 and at least "
            f"{CAE_SMALLEST}, not {x.shape[1:3]}: crop or resize the images."
        )
    act = jax.nn.leaky_relu
    h = act(layers.conv(theta["e_conv_1"], _pad(x, 1, 2), stride=2, padding=0))
    h = act(layers.conv(theta["e_conv_2"], _pad(h, 1, 2), stride=2, padding=0))
    for i in (1, 2, 3):
        h = _cae_block(theta, f"e_block_{i}", h)
    return jnp.tanh(layers.conv(theta["e_conv_3"], h))


def fits_cae(*sides: int) -> bool:
    """Whether the CAE accepts images with these sides."""
    return all(side % 4 == 0 and side >= CAE_SMALLEST for side in sides)


def binarise(key: jax.Array, latent: jax.Array) -> jax.Array:
    """Draws bits of -1 or 1 with the latent as mean; the gradient is straight-through."""
    drawn = jax.random.uniform(key, latent.shape, jnp.float32)
    bits = jnp.where(drawn <= (1 + latent) / 2, 1.0, -1.0).astype(latent.dtype)
    # In this order, because bits - latent would be rounded.
    return bits + (latent - jax.lax.stop_gradient(latent))


def cae_decode(theta: dict, bits: jax.Array) -> jax.Array:
    """Decodes bits [B,h,w,32] of -1 or 1 to [B,4h,4w,3] in [-1,1], near [0,1] once trained."""
    act = jax.nn.leaky_relu
    h = act(layers.conv(theta["d_up_conv_1/conv"], bits, padding=0))
    h = layers.conv_transpose(theta["d_up_conv_1/up"], _pad(h, 1, 1))
    for i in (1, 2, 3):
        h = _cae_block(theta, f"d_block_{i}", h)
    h = act(layers.conv(theta["d_up_conv_2/conv"], h, padding=0))
    h = _pad(h, 1, 1)
    h = act(layers.conv_after_up(theta["d_up_conv_2/up"], theta["d_up_conv_3/conv0"], h))
    return jnp.tanh(layers.conv(theta["d_up_conv_3/conv1"], _pad(h, 2, 2, "reflect"), padding=0))


def _cae_block(theta: dict, name: str, x: jax.Array) -> jax.Array:
    h = jax.nn.leaky_relu(layers.conv(theta[f"{name}/conv0"], x))
    return x + layers.conv(theta[f"{name}/conv1"], h)


def _pad(x: jax.Array, before: int, after: int, mode: str = "constant") -> jax.Array:
    return jnp.pad(x, [(0, 0), (before, after), (before, after), (0, 0)], mode)
