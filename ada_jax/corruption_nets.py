"""Image-to-image networks as pure functions of their parameters.

`make(name)` gives a `CorruptionNet` with shipped weights where there are some. A network is a plain
function `apply(theta, x, key)`, so its parameters can be perturbed as any pytree.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jmp
import numpy as np

from ada_jax import checkpoint, guards, per_example
from ada_jax.errors import UserError

WEIGHTS = pathlib.Path(__file__).parent / "weights"
# The keywords of `edsr`; None is the CAE, which has none.
PRESETS = {
    "edsr_baseline_x4": {"blocks": 16, "features": 64, "scale": 4},
    "edsr_baseline": {"blocks": 16, "features": 64, "scale": 1},
    "edsr_medium": {"blocks": 8, "features": 32, "scale": 1},
    "edsr_small": {"blocks": 4, "features": 16, "scale": 1},
    "cae": None,
}
DIV2K_MEAN = np.array([0.4488, 0.4371, 0.4040], np.float32)  # EDSR's fixed MeanShift


class CorruptionNet(NamedTuple):
    """An image-to-image network c_theta.

    Attributes:
      apply: `apply(theta, x, key) -> [B,H,W,C]`, x [B,H,W,C] in [0,1], output near [0,1] but not
        clipped; deterministic networks ignore the key.
      theta: parameters, a nested dict of float32 arrays.
    """

    apply: Callable[..., jax.Array]
    theta: dict


class Architecture(NamedTuple):
    """A network without weights.

    Attributes:
      init: `init(key) -> theta`.
      apply: see `CorruptionNet`.
      scale: super-resolution factor of the network itself, 1 where it keeps the size.
    """

    init: Callable[..., dict]
    apply: Callable[..., jax.Array]
    scale: int


def names() -> tuple[str, ...]:
    """The presets that `make` knows."""
    return tuple(PRESETS)


def make(name: str, weights: str | None = None, *, enlarge: int = 1) -> CorruptionNet:
    """A corruption network with trained weights.

    Args:
      name: one of `names()`.
      weights: a safetensors file written by `ada_jax.pretrain` or `ada_jax.import_weights`; None
        takes the shipped one.
      enlarge: factor by which images are enlarged before the network and reduced after it. The
        published CAE saw patches of 128 pixels: 4 brings images of 32 to that size, where its
        corruptions are milder and finer. The shipped weights know 32 pixels: 1.

    Returns:
      The network.

    Raises:
      UserError: unknown name, no weights, or weights of another network.
    """
    guards.check_integers(1, enlarge=enlarge)
    net = architecture(name)
    path = weights or WEIGHTS / f"{name}.safetensors"
    if not weights and not path.exists():
        shipped = sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))
        raise UserError(
            f"corruption_net={name!r} has no shipped weights (there are: "
            f"{', '.join(shipped) or 'none'}): train some with `python -m ada_jax.pretrain "
            f"--config=experiments/pretrain_{name.partition('_')[0]}.py:{name}` and name the file "
            "in config.ada.corruption_weights."
        )
    theta, _ = checkpoint.load_weights(path, like=jax.eval_shape(net.init, jax.random.key(0)))
    theta = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), theta)
    return CorruptionNet(enlarged(net.apply, enlarge), theta)


def architecture(name: str) -> Architecture:
    """The untrained network of a preset.

    Raises:
      UserError: unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"corruption_net={name!r} is unknown: choose one of {', '.join(names())}.")
    fields = PRESETS[name]
    return cae() if fields is None else edsr(**fields)


def check_sizes(
    field: str, nets: Sequence[str], enlarge: Sequence[int], image_shape: Sequence[int]
) -> None:
    """Checks that all networks take images of a size, before anything is compiled.

    Args:
      field: names the networks in the message, as 'config.nets'.
      nets: names of presets.
      enlarge: the factor of each, see `make`.
      image_shape: [H,W,...] of the images.

    Raises:
      UserError: the CAE is among them and the sides do not fit it.
    """
    height, width = image_shape[:2]
    for name, factor in zip(nets, enlarge, strict=True):
        if PRESETS[name] is None and not fits_cae(factor * height, factor * width):
            times = f", {factor} times enlarged," if factor > 1 else ""
            raise UserError(
                f"{field}={tuple(nets)} does not fit images of {height}x{width}, whose "
                f"sides{times} must be multiples of 4 and at least {_CAE_SMALLEST} for 'cae': crop "
                "or resize the images, or leave 'cae' out."
            )


def enlarged(apply: Callable[..., jax.Array], factor: int) -> Callable[..., jax.Array]:
    """The network on bicubically enlarged images, its output reduced again (antialiased)."""
    if factor == 1:
        return apply

    def resized(theta, x, key=None):
        b, h, w, c = x.shape
        large = jax.image.resize(x, (b, factor * h, factor * w, c), "cubic")
        return jax.image.resize(apply(theta, large, key), x.shape, "cubic", antialias=True)

    return resized


def cast(
    apply: Callable[..., jax.Array], dtype: str = "float32", remat: bool = False
) -> Callable[..., jax.Array]:
    """The network with its parameters rounded to another type, in which its layers compute.

    Args:
      apply: a network's function.
      dtype: 'float32' or 'bfloat16'.
      remat: whether its gradient computes the features anew instead of keeping them.
    """
    policy = jmp.get_policy(f"params=float32,compute={dtype},output=float32")

    def casted(theta, x, key=None):
        return policy.cast_to_output(apply(policy.cast_to_compute(theta), x, key))

    wrapped = apply if dtype == "float32" else casted
    return jax.checkpoint(wrapped) if remat else wrapped


# ------------------------------------------------------------------------------- EDSR


def edsr(blocks: int, features: int, scale: int) -> Architecture:
    """EDSR (Lim et al., 2017) whose output is brought back to the input's size.

    Args:
      blocks: residual blocks.
      features: channels.
      scale: upsampling factor 1, 2 or 4 of the network; its output is downsampled by an antialiased
        bicubic filter, the operator that super-resolution inverts.

    Returns:
      The architecture. Parameters are those of the published network (its fixed mean shift is not
      among them): 74 leaves and 1,517,571 numbers for 16 blocks, 64 features and scale 4.
    """

    def init(key):
        return edsr_init(key, blocks=blocks, features=features, scale=scale)

    def apply(theta, x, key=None):
        del key
        y = edsr_apply(theta, x)
        return y if scale == 1 else jax.image.resize(y, x.shape, "cubic", antialias=True)

    return Architecture(init, apply, scale)


def edsr_init(key: jax.Array, *, blocks: int, features: int, scale: int) -> dict:
    """Random EDSR parameters, each kernel and bias U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    widths = {"head": (3, features)}
    for i in range(blocks):
        widths[f"block{i:02d}/conv0"] = widths[f"block{i:02d}/conv1"] = (features, features)
    widths["body_end"] = (features, features)
    for i in range({1: 0, 2: 1, 4: 2}[scale]):
        widths[f"up{i}"] = (features, 4 * features)
    widths["tail"] = (features, 3)
    keys = jax.random.split(key, len(widths))
    return {name: _conv_init(k, *w) for k, (name, w) in zip(keys, widths.items(), strict=True)}


def edsr_apply(theta: dict, x: jax.Array) -> jax.Array:
    """Runs EDSR at its own scale: [B,H,W,3] in [0,1] to [B,scale H,scale W,3] near [0,1].

    The published network works on 0..255; the factor 255 is part of the function, not of theta.
    """
    x = h = edsr_head(theta, x)
    for i in range(sum(name.endswith("/conv0") for name in theta)):
        h = edsr_block(theta, i, h)
    return edsr_tail(theta, x + edsr_body_end(theta, h))


def edsr_head(theta: dict, x: jax.Array) -> jax.Array:
    """[B,H,W,3] in [0,1] to features [B,H,W,C]."""
    return _conv(theta["head"], 255 * (x - DIV2K_MEAN))


def edsr_block(theta: dict, i: int, h: jax.Array) -> jax.Array:
    """Residual block i of features [B,H,W,C]."""
    first, second = theta[f"block{i:02d}/conv0"], theta[f"block{i:02d}/conv1"]
    return h + _conv(second, jax.nn.relu(_conv(first, h)))


def edsr_body_end(theta: dict, h: jax.Array) -> jax.Array:
    """The convolution after the last block."""
    return _conv(theta["body_end"], h)


def edsr_tail(theta: dict, h: jax.Array) -> jax.Array:
    """Features [B,H,W,C] to [B,scale H,scale W,3] near [0,1]."""
    for i in range(sum(name.startswith("up") for name in theta)):
        h = pixel_shuffle(_conv(theta[f"up{i}"], h))
    return _conv(theta["tail"], h) / 255 + DIV2K_MEAN


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """[B,H,W,4C] to [B,2H,2W,C]: in[h, w, 4c+2i+j] is out[2h+i, 2w+j, c], as in PyTorch."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, c // 4)


# -------------------------------------------------------------------------------- CAE

_CAE_SMALLEST = 12  # Its decoder's first convolution is 3x3, unpadded, at a quarter of the size.
CAE_LAYERS = {  # name: (kernel size, inputs, outputs), the published network's names
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


def cae() -> Architecture:
    """The compressive autoencoder of DeepAugment (Dinu's cae_32x32x32_zero_pad_bin).

    Two bits a pixel: [B,H,W,3] becomes [B,H/4,W/4,32] bits and is rendered from these. Heights and
    widths must be multiples of 4 and at least 12.

    Returns:
      The architecture; 42 leaves and 2,241,859 numbers. `apply` needs a key: the bits are drawn.
    """

    def apply(theta, x, key):
        return cae_decode(theta, binarise(key, cae_encode(theta, x)))

    return Architecture(cae_init, apply, 1)


def cae_init(key: jax.Array) -> dict:
    """Random CAE parameters that keep the size of activations, residual branches a tenth of it.

    From PyTorch's own initialisation at a learning rate of 3e-4 or more every latent saturates
    within a hundred steps, and the network renders one mean image.
    """
    theta = {}
    keys = jax.random.split(key, len(CAE_LAYERS))
    for k, (name, (size, inputs, outputs)) in zip(keys, CAE_LAYERS.items(), strict=True):
        # He's variance, 2 / fan_in; transposed convolutions add up no neighbours.
        gain = 1.0 if name.endswith("/up") else 6**0.5
        gain *= 0.1 if "_block_" in name and name.endswith("conv1") else 1.0
        theta[name] = {
            "w": gain * _conv_init(k, inputs, outputs, size)["w"],
            "b": jnp.zeros(outputs, jnp.float32),
        }
    return theta


def cae_encode(theta: dict, x: jax.Array) -> jax.Array:
    """[B,H,W,3] in [0,1] to the latent [B,H/4,W/4,32] in [-1,1].

    Raises:
      UserError: a side that is not a multiple of 4, or below 12.
    """
    if not fits_cae(*x.shape[1:3]):
        raise UserError(
            "The CAE needs heights and widths that are multiples of 4 and at least "
            f"{_CAE_SMALLEST}, not {x.shape[1:3]}: crop or resize the images."
        )
    act = jax.nn.leaky_relu
    h = act(_conv(theta["e_conv_1"], _pad(x, 1, 2), stride=2, padding=0))
    h = act(_conv(theta["e_conv_2"], _pad(h, 1, 2), stride=2, padding=0))
    for i in (1, 2, 3):
        h = _cae_block(theta, f"e_block_{i}", h)
    return jnp.tanh(_conv(theta["e_conv_3"], h))


def fits_cae(*sides: int) -> bool:
    """Whether the CAE takes images of these sides."""
    return all(side % 4 == 0 and side >= _CAE_SMALLEST for side in sides)


def binarise(key: jax.Array, latent: jax.Array) -> jax.Array:
    """Draws bits of -1 or 1 whose mean is the latent; their gradient is passed straight through."""
    drawn = jax.random.uniform(key, latent.shape, jnp.float32)
    bits = jnp.where(drawn <= (1 + latent) / 2, 1.0, -1.0)
    return latent + jax.lax.stop_gradient(bits - latent)


def cae_decode(theta: dict, bits: jax.Array) -> jax.Array:
    """Bits [B,h,w,32] of -1 or 1 to images [B,4h,4w,3] in [-1,1], near [0,1] when trained."""
    act = jax.nn.leaky_relu
    h = act(_conv(theta["d_up_conv_1/conv"], bits, padding=0))
    h = _conv_transpose(theta["d_up_conv_1/up"], _pad(h, 1, 1))
    for i in (1, 2, 3):
        h = _cae_block(theta, f"d_block_{i}", h)
    h = act(_conv(theta["d_up_conv_2/conv"], h, padding=0))
    h = _pad(h, 1, 1)
    h = act(_conv_after_up(theta["d_up_conv_2/up"], theta["d_up_conv_3/conv0"], h))
    return jnp.tanh(_conv(theta["d_up_conv_3/conv1"], _pad(h, 2, 2, "reflect"), padding=0))


def _cae_block(theta: dict, name: str, x: jax.Array) -> jax.Array:
    h = jax.nn.leaky_relu(_conv(theta[f"{name}/conv0"], x))
    return x + _conv(theta[f"{name}/conv1"], h)


def _pad(x: jax.Array, before: int, after: int, mode: str = "constant") -> jax.Array:
    return jnp.pad(x, [(0, 0), (before, after), (before, after), (0, 0)], mode)


# ------------------------------------------------------------------------------ layers


def _conv(params: dict, x: jax.Array, stride: int = 1, padding: int | None = None) -> jax.Array:
    w, b = params["w"], params["b"]
    return per_example.conv2d(x.astype(w.dtype), w, b, stride=stride, padding=padding)


def _conv_transpose(params: dict, x: jax.Array) -> jax.Array:
    return per_example.conv_transpose2d(x.astype(params["w"].dtype), params["w"], params["b"])


# [i, r, d, a]: tap r of a kernel of 3 that ends up at part a of a pixel enlarged twice meets part i
# of its neighbour d.
_MEETS = np.array(
    [[[[(a + r) == 2 * d + i for a in (0, 1)] for d in (0, 1)] for r in (0, 1, 2)] for i in (0, 1)],
    np.float32,
)


def _conv_after_up(up: dict, conv: dict, x: jax.Array) -> jax.Array:
    """A transposed convolution (2x2) and a convolution (3x3, no padding) as one.

    Nothing stands between them, so four kernels of 2x2, one for each part of an enlarged pixel, do
    the same without the wide features between: the CAE's need 20 times fewer operations.

    Returns:
      [B,2H-2,2W-2,O] for x [B,H,W,C].
    """
    meets = jnp.asarray(_MEETS, x.dtype)
    w = jnp.einsum("irda,jseb,ijcm,rsmo->decabo", meets, meets, up["w"], conv["w"])
    b = conv["b"] + up["b"] @ conv["w"].sum((0, 1))
    out = w.shape[-1]
    y = per_example.conv2d(x.astype(w.dtype), w.reshape(2, 2, -1, 4 * out), padding=0)
    batch, height, width, _ = y.shape
    y = y.reshape(batch, height, width, 2, 2, out).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, 2 * height, 2 * width, out) + b


def _conv_init(key: jax.Array, inputs: int, outputs: int, size: int = 3) -> dict:
    bound = (inputs * size * size) ** -0.5
    w_key, b_key = jax.random.split(key)
    shape = (size, size, inputs, outputs)
    return {
        "w": jax.random.uniform(w_key, shape, jnp.float32, -bound, bound),
        "b": jax.random.uniform(b_key, (outputs,), jnp.float32, -bound, bound),
    }
