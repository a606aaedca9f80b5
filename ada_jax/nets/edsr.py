"""EDSR, a super-resolution network (Lim et al., 2017), at scale 1, 2 or 4."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ada_jax.nets import layers, per_example

DIV2K_MEAN = np.array([0.4488, 0.4371, 0.4040], np.float32)  # EDSR's fixed MeanShift


def edsr(blocks: int, features: int, scale: int) -> layers.Architecture:
    """EDSR (Lim et al., 2017) whose output is downsampled to the input's size.

    Args:
      blocks: number of residual blocks.
      features: channels.
      scale: upsampling factor 1, 2 or 4; the output is downsampled by an antialiased bicubic
        filter, the operator that super-resolution inverts.

    Returns:
      The architecture, with the parameters of the published network except its fixed mean shift:
      74 leaves and 1,517,571 numbers for 16 blocks, 64 features and scale 4.
    """

    def init(key):
        return edsr_init(key, blocks=blocks, features=features, scale=scale)

    def apply(theta, x, key=None):
        del key
        y = edsr_apply(theta, x)
        shape = (*x.shape[:3], y.shape[-1])
        return y if scale == 1 else jax.image.resize(y, shape, "cubic", antialias=True)

    return layers.Architecture(init, apply, scale)


def edsr_init(key: jax.Array, *, blocks: int, features: int, scale: int) -> dict:
    """Random EDSR parameters, kernels and biases U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    widths = {"head": (3, features)}
    for i in range(blocks):
        widths[f"block{i:02d}/conv0"] = widths[f"block{i:02d}/conv1"] = (features, features)
    widths["body_end"] = (features, features)
    for i in range({1: 0, 2: 1, 4: 2}[scale]):
        widths[f"up{i}"] = (features, 4 * features)
    widths["tail"] = (features, 3)
    keys = jax.random.split(key, len(widths))
    return {
        name: layers.conv_init(k, *w) for k, (name, w) in zip(keys, widths.items(), strict=True)
    }


def edsr_apply(theta: dict, x: jax.Array) -> jax.Array:
    """Runs EDSR without the downsampling: [B,H,W,3] in [0,1] to [B,scale H,scale W,3] near [0,1].

    The published network works on 0..255; the scaling by 255 is not part of theta.
    """
    x = h = edsr_head(theta, x)
    for i in range(sum(name.endswith("/conv0") for name in theta)):
        h = edsr_block(theta, i, h)
    return edsr_tail(theta, x + edsr_body_end(theta, h))


def edsr_head(theta: dict, x: jax.Array) -> jax.Array:
    """[B,H,W,3] in [0,1] to features [B,H,W,C]."""
    return layers.conv(theta["head"], 255 * (x - DIV2K_MEAN))


def edsr_block(theta: dict, i: int, h: jax.Array) -> jax.Array:
    """Residual block i of features [B,H,W,C]."""
    first, second = theta[f"block{i:02d}/conv0"], theta[f"block{i:02d}/conv1"]
    return h + layers.conv(second, jax.nn.relu(layers.conv(first, h)))


def edsr_body_end(theta: dict, h: jax.Array) -> jax.Array:
    """The convolution after the last block."""
    return layers.conv(theta["body_end"], h)


def edsr_tail(theta: dict, h: jax.Array) -> jax.Array:
    """Features [B,H,W,C] to [B,scale H,scale W,3] near [0,1]."""
    ups = sum(name.startswith("up") for name in theta)
    if ups == 2:
        h = layers.conv(theta["up0"], h)
    if ups:
        last = theta[f"up{ups - 1}"], theta["tail"]
        h = pixel_shuffle(conv_shuffle_conv(*last, h, shuffle=ups == 2))
    else:
        h = layers.conv(theta["tail"], h)
    return h / 255 + DIV2K_MEAN


# [a, d, u] is 1 where tap a of one kernel and tap d of the next are tap u of both together.
_SUMS = np.array([[[a + d == u for u in range(5)] for d in range(3)] for a in range(3)], np.float32)
# The first and last row or column of an image: its index, and the taps a and d that meet outside of
# the image from there.
_SIDES = ((0, 2, 0), (-1, 0, 2))


def conv_shuffle_conv(up: dict, conv: dict, x: jax.Array, shuffle: bool = False) -> jax.Array:
    """Computes conv(pixel_shuffle(up(x))), before another shuffle, by one kernel of size 5.

    All three are linear. One kernel takes a seventh of the operations, and the wide features in
    between are not written. It takes features around the image for what `up` gives there, where
    they should be zero: the difference is subtracted along the border.

    Args:
      up: kernel w [3,3,C,4M] and bias b [4M].
      conv: kernel w [3,3,M,O] and bias b [O].
      x: features [B,H,W,C].
      shuffle: x is [B,H/2,W/2,4C] instead, of which `pixel_shuffle` would make the features. A
        kernel of size 3 then computes the same, and only the border is shuffled.

    Returns:
      [B,H,W,4O], of which `pixel_shuffle` makes [B,2H,2W,O].
    """
    einsum = functools.partial(jnp.einsum, precision="highest")
    sums = jnp.asarray(_SUMS, up["w"].dtype)
    w = _before_shuffle(conv["w"])
    pairs = einsum("abcm,demo->adbeco", up["w"], w)
    biases = einsum("demo,m->deo", w, up["b"])
    rows, columns = (
        einsum("adbeco,bev->advco", pairs, sums),
        einsum("adbeco,adu->ubeco", pairs, sums),
    )

    x = x.astype(w.dtype)
    kernel = einsum("advco,adu->uvco", rows, sums)
    bias = biases.sum((0, 1)) + jnp.repeat(conv["b"], 4)
    if shuffle:
        y = per_example.conv2d(x, _before_shuffle(kernel), jnp.repeat(bias, 4))
        y = pixel_shuffle(y)
    else:
        y = per_example.conv2d(x, kernel, bias)
    for i, a, d in _SIDES:
        x_row, x_column = (_edge(x, axis, i, shuffle) for axis in (1, 2))
        row = _line(x_row, rows[a, d]) + biases[d].sum(0)
        for j, b, e in _SIDES:
            row = _subtract(row, x_row[:, j] @ pairs[a, d, b, e] + biases[d, e], 1, j)
        column = _line(x_column, columns[:, a, d]) + biases[:, d].sum(0)
        y = _subtract(_subtract(y, row, 1, i), column, 2, i)
    return y


def _before_shuffle(w: jax.Array) -> jax.Array:
    """The kernel [3,3,4C,4O] for unshuffled features that equals w [n,n,C,O], n = 3 or 5.

    pixel_shuffle(conv(x, _before_shuffle(w))) is conv(pixel_shuffle(x), w).
    """
    # 1 where tap a of w, for the output at subpixel p of a pixel, reads subpixel i of the
    # neighbouring pixel d.
    a, d, i, p = np.indices((len(w), 3, 2, 2))
    taps = jnp.asarray(p + a - len(w) // 2 == 2 * (d - 1) + i, w.dtype)
    joined = jnp.einsum("adip,bejq,abco->decijopq", taps, taps, w, precision="highest")
    return joined.reshape(3, 3, 4 * w.shape[2], 4 * w.shape[3])


def _edge(x: jax.Array, axis: int, index: int, shuffle: bool) -> jax.Array:
    """The first or last row or column, [B,W,C] or [B,H,C], of x or of what it is shuffled to."""
    line = jax.lax.index_in_dim(x, index, axis)
    line = pixel_shuffle(line) if shuffle else line
    return jax.lax.index_in_dim(line, index, axis, keepdims=False)


def _line(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolves lines [B,W,C] with a kernel [5,C,O]."""
    padded = jnp.pad(x, [(0, 0), (2, 2), (0, 0)])
    taps = jnp.stack([padded[:, i : i + x.shape[1]] for i in range(5)], 2)
    return jnp.einsum("bwtc,tco->bwo", taps, w)


def _subtract(y: jax.Array, part: jax.Array, axis: int, index: int) -> jax.Array:
    """Subtracts a part from y at an index, 0 or -1, of an axis."""
    part = jax.lax.index_in_dim(y, index, axis, keepdims=False) - part
    return jax.lax.dynamic_update_index_in_dim(y, part, index % y.shape[axis], axis)


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """[B,H,W,4C] to [B,2H,2W,C]: in[h, w, 4c+2i+j] is out[2h+i, 2w+j, c], as in PyTorch."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, c // 4)
