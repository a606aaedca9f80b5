"""Image-to-image networks as pure functions of their parameters.

`make(name)` gives a `CorruptionNet` with shipped weights where there are some. A network is a plain
function `apply(theta, x, key)`, so its parameters can be perturbed as any pytree.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ada_jax import checkpoint, per_example
from ada_jax.errors import UserError

WEIGHTS = pathlib.Path(__file__).parent / "weights"
EDSR_PRESETS = {
    "edsr_baseline_x4": {"blocks": 16, "features": 64, "scale": 4},
    "edsr_baseline": {"blocks": 16, "features": 64, "scale": 1},
    "edsr_small": {"blocks": 4, "features": 16, "scale": 1},
}
_DIV2K_MEAN = np.array([0.4488, 0.4371, 0.4040], np.float32)  # EDSR's fixed MeanShift


class CorruptionNet(NamedTuple):
    """An image-to-image network c_theta.

    Attributes:
      apply: `apply(theta, x, key) -> [B,H,W,C]`, x [B,H,W,C] in [0,1], output near [0,1] but not
        clipped; deterministic networks ignore the key.
      theta: parameters, a nested dict of float32 arrays.
    """

    apply: Callable[..., jax.Array]
    theta: dict


def names() -> tuple[str, ...]:
    """The presets that `make` knows."""
    return tuple(EDSR_PRESETS)


def make(name: str, weights: str | None = None) -> CorruptionNet:
    """A corruption network with trained weights.

    Args:
      name: one of `names()`.
      weights: a safetensors file written by `ada_jax.pretrain`; None takes the shipped one.

    Returns:
      The network.

    Raises:
      UserError: unknown name, no weights, or weights of another network.
    """
    net = architecture(name)
    path = pathlib.Path(weights) if weights else WEIGHTS / f"{name}.safetensors"
    if not weights and not path.exists():
        shipped = sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))
        raise UserError(
            f"corruption_net={name!r} has no shipped weights (there are: "
            f"{', '.join(shipped) or 'none'}): train some with `python -m ada_jax.pretrain "
            f"--config=experiments/pretrain_edsr.py:{name}` and name the file in "
            "config.ada.corruption_weights."
        )
    theta, _ = checkpoint.load_weights(path, like=jax.eval_shape(net.init, jax.random.key(0)))
    # Large networks are stored as float16.
    theta = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), theta)
    return CorruptionNet(net.apply, theta)


class Architecture(NamedTuple):
    """A network without weights: `init(key) -> theta`, `apply(theta, x, key)`, and its scale."""

    init: Callable[..., dict]
    apply: Callable[..., jax.Array]
    scale: int


def architecture(name: str) -> Architecture:
    """The untrained network of a preset.

    Raises:
      UserError: unknown name.
    """
    if name not in EDSR_PRESETS:
        raise UserError(f"corruption_net={name!r} is unknown: choose one of {', '.join(names())}.")
    return edsr(**EDSR_PRESETS[name])


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
    x = _conv(theta["head"], 255 * (x - _DIV2K_MEAN))
    h = x
    for i in range(sum(name.endswith("/conv0") for name in theta)):
        block = f"block{i:02d}"
        h = h + _conv(theta[f"{block}/conv1"], jax.nn.relu(_conv(theta[f"{block}/conv0"], h)))
    h = x + _conv(theta["body_end"], h)
    for i in range(sum(name.startswith("up") for name in theta)):
        h = pixel_shuffle(_conv(theta[f"up{i}"], h))
    return _conv(theta["tail"], h) / 255 + _DIV2K_MEAN


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """[B,H,W,4C] to [B,2H,2W,C]: in[h, w, 4c+2i+j] is out[2h+i, 2w+j, c], as in PyTorch."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, c // 4)


def _conv(params: dict, x: jax.Array) -> jax.Array:
    return per_example.conv2d(x, params["w"], params["b"])


def _conv_init(key: jax.Array, inputs: int, outputs: int, size: int = 3) -> dict:
    bound = (inputs * size * size) ** -0.5
    w_key, b_key = jax.random.split(key)
    return {
        "w": jax.random.uniform(w_key, (size, size, inputs, outputs), minval=-bound, maxval=bound),
        "b": jax.random.uniform(b_key, (outputs,), minval=-bound, maxval=bound),
    }
