"""Residual networks as functions of normalised images, for `classifiers`.

They compute what the PyTorch code that `torch_layouts` names computes, padding included.
"""

import functools
import math
from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

from ada_jax.nets import per_example

# norm_relu(x, name, relu=True): batch normalisation with parameters under this name, then ReLU.
NormRelu = Callable[..., jax.Array]
# tap(h, layer): names the features h, and returns them with the layer's perturbation, if any.
Tap = Callable[[jax.Array, str], jax.Array]
# block(x, width, stride, norm_relu): a residual block.
Block = Callable[[jax.Array, int, int, NormRelu], jax.Array]

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of PyTorch's convolutions and linear layers.
uniform_fan_in = hk.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")


def uniform(fan_in: int) -> hk.initializers.Initializer:
    """The default of PyTorch's biases."""
    bound = 1 / math.sqrt(fan_in)
    return hk.initializers.RandomUniform(-bound, bound)


class Conv(hk.Module):
    """A square convolution, padded by `size // 2` pixels as in PyTorch."""

    def __init__(
        self,
        channels: int,
        size: int,
        stride: int = 1,
        with_bias: bool = False,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.channels, self.size, self.stride = channels, size, stride
        self.with_bias = with_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, Cin] to [B, ceil(H / stride), ceil(W / stride), channels]."""
        shape = (self.size, self.size, x.shape[-1], self.channels)
        w = hk.get_parameter("w", shape, jnp.float32, init=uniform_fan_in).astype(x.dtype)
        b = None
        if self.with_bias:
            init = uniform(self.size**2 * x.shape[-1])
            b = hk.get_parameter("b", (self.channels,), jnp.float32, init=init).astype(x.dtype)
        return per_example.conv2d(x, w, b, stride=self.stride, padding=self.size // 2)


def _stages(
    x: jax.Array,
    norm_relu: NormRelu,
    tap: Tap,
    block: Block,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
) -> jax.Array:
    """Stages of blocks; the first block of each but the first stage has stride 2."""
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        for i in range(1, depth + 1):
            stride = 2 if stage > 1 and i == 1 else 1
            with hk.name_scope(f"stage{stage}_block{i}"):
                x = block(x, width, stride, norm_relu)
        x = tap(x, f"stage{stage}")
    return x


# ------------------------------------------------------------------------ pre-activation


def preact_basic(
    x: jax.Array, width: int, stride: int, norm_relu: NormRelu, *, v2: bool = False
) -> jax.Array:
    """Two convolutions; the shortcut projects the input, as in Wong et al.'s code.

    With `v2` it projects the pre-activated input, as in WideResNet.
    """
    pre = norm_relu(x, "bn1")
    h = Conv(width, 3, stride, name="conv1")(pre)
    h = Conv(width, 3, name="conv2")(norm_relu(h, "bn2"))
    if stride == 1 and x.shape[-1] == width:
        return h + x
    return h + Conv(width, 1, stride, name="shortcut")(pre if v2 else x)


def preact_bottleneck(x: jax.Array, width: int, stride: int, norm_relu: NormRelu) -> jax.Array:
    """Three convolutions; the shortcut projects the pre-activated input, as in Wong et al.'s."""
    pre = norm_relu(x, "bn1")
    h = Conv(width, 1, name="conv1")(pre)
    h = Conv(width, 3, stride, name="conv2")(norm_relu(h, "bn2"))
    h = Conv(4 * width, 1, name="conv3")(norm_relu(h, "bn3"))
    if stride == 1 and x.shape[-1] == 4 * width:
        return h + x
    return h + Conv(4 * width, 1, stride, name="shortcut")(pre)


def preact_resnet(
    x: jax.Array,
    norm_relu: NormRelu,
    tap: Tap,
    *,
    block: Block,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    stem: int | None = None,
    last_norm: bool = True,
) -> jax.Array:
    """A pre-activation ResNet; `stem` channels, by default those of the first stage."""
    x = tap(Conv(stem or widths[0], 3, name="stem")(x), "stem")
    x = _stages(x, norm_relu, tap, block, widths, depths)
    return norm_relu(x, "bn") if last_norm else x


def wide_resnet(
    x: jax.Array, norm_relu: NormRelu, tap: Tap, *, depth: int, factor: int
) -> jax.Array:
    """A WideResNet of Zagoruyko and Komodakis (2016), without dropout."""
    widths, depths = (16 * factor, 32 * factor, 64 * factor), ((depth - 4) // 6,) * 3
    block = functools.partial(preact_basic, v2=True)
    return preact_resnet(x, norm_relu, tap, block=block, widths=widths, depths=depths, stem=16)


# ------------------------------------------------------------------------ post-activation


def _padded_shortcut(x: jax.Array, width: int, stride: int, norm_relu: NormRelu) -> jax.Array:
    """Every stride-th pixel, with channels of zeros on both sides: He et al.'s option A."""
    more = (width - x.shape[-1]) // 2
    return jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(more, more)])


def _projected_shortcut(x: jax.Array, width: int, stride: int, norm_relu: NormRelu) -> jax.Array:
    """A normalised 1x1 convolution where the shape changes: He et al.'s option B."""
    if stride == 1 and x.shape[-1] == width:
        return x
    h = Conv(width, 1, stride, name="shortcut")(x)
    return norm_relu(h, "shortcut_bn", relu=False)


def _basic(
    x: jax.Array, width: int, stride: int, norm_relu: NormRelu, shortcut: Block
) -> jax.Array:
    h = norm_relu(Conv(width, 3, stride, name="conv1")(x), "bn1")
    h = norm_relu(Conv(width, 3, name="conv2")(h), "bn2", relu=False)
    return jax.nn.relu(h + shortcut(x, width, stride, norm_relu))


def cifar_basic(x: jax.Array, width: int, stride: int, norm_relu: NormRelu) -> jax.Array:
    """Two convolutions and a shortcut without parameters."""
    return _basic(x, width, stride, norm_relu, _padded_shortcut)


def imagenet_basic(x: jax.Array, width: int, stride: int, norm_relu: NormRelu) -> jax.Array:
    """Two convolutions and a projecting shortcut."""
    return _basic(x, width, stride, norm_relu, _projected_shortcut)


def imagenet_bottleneck(x: jax.Array, width: int, stride: int, norm_relu: NormRelu) -> jax.Array:
    """Three convolutions, with the stride in the 3x3 one, and a projecting shortcut."""
    h = norm_relu(Conv(width, 1, name="conv1")(x), "bn1")
    h = norm_relu(Conv(width, 3, stride, name="conv2")(h), "bn2")
    h = norm_relu(Conv(4 * width, 1, name="conv3")(h), "bn3", relu=False)
    return jax.nn.relu(h + _projected_shortcut(x, 4 * width, stride, norm_relu))


def cifar_resnet(x: jax.Array, norm_relu: NormRelu, tap: Tap, *, depth: int) -> jax.Array:
    """The ResNet for CIFAR of He et al., "Deep residual learning" (2016), section 4.2."""
    x = tap(norm_relu(Conv(16, 3, name="stem")(x), "stem_bn"), "stem")
    depths = ((depth - 2) // 6,) * 3
    return _stages(x, norm_relu, tap, cifar_basic, (16, 32, 64), depths)


def imagenet_resnet(
    x: jax.Array, norm_relu: NormRelu, tap: Tap, *, block: Block, depths: tuple[int, ...]
) -> jax.Array:
    """torchvision's ResNet: its max pooling is padded on both sides, unlike Haiku's."""
    x = norm_relu(Conv(64, 7, 2, name="stem")(x), "stem_bn")
    sides = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = lax.reduce_window(
        x, jnp.array(-jnp.inf, x.dtype), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), sides
    )
    return _stages(tap(x, "stem"), norm_relu, tap, block, (64, 128, 256, 512), depths)


def resnet9(x: jax.Array, norm_relu: NormRelu, tap: Tap) -> jax.Array:
    """Nine layers with few channels at full resolution, for CPUs."""
    x = tap(norm_relu(Conv(16, 3, name="stem")(x), "stem_bn"), "stem")
    for stage, width in enumerate((32, 64, 128), start=1):
        with hk.name_scope(f"stage{stage}"):
            x = norm_relu(Conv(width, 3, stride=2, name="down")(x), "down_bn")
            h = norm_relu(Conv(width, 3, name="conv1")(x), "bn1")
            x = x + norm_relu(Conv(width, 3, name="conv2")(h), "bn2")
        x = tap(x, f"stage{stage}")
    return x
