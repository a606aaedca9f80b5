"""DeepAugment's distortions of image-to-image networks (Hendrycks et al., 2021).

The weight distortions are NumPy on the host, a few array operations for a whole group of images;
those of features and latents are JAX, drawn for every image.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import lax

from ada_jax import keys
from ada_jax.nets import cae, edsr, per_example

Theta = dict[str, dict[str, np.ndarray]]
_LAPLACE = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32)[..., None, None]
_OUTLINE = np.array([[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]], np.float32)[..., None, None]


# ------------------------------------------------------------------------ EDSR's weights


def distort_edsr(rng: np.random.Generator, theta: Theta, *, quirks: bool = False) -> Theta:
    """A copy of EDSR's parameters under three distortions drawn from `EDSR_DISTORTIONS`.

    Args:
      rng: source of all draws.
      theta: trained parameters; not changed.
      quirks: follow the published code also where it does other than it says.

    Returns:
      Distorted parameters.
    """
    theta = _copy(theta)
    for option in rng.integers(len(EDSR_DISTORTIONS), size=3):
        EDSR_DISTORTIONS[option](rng, theta, quirks)
    return theta


def _blocks(theta: Theta) -> int:
    return sum(name.endswith("/conv0") for name in theta)


def _conv(theta: Theta, block: int, conv: int) -> dict[str, np.ndarray]:
    return theta[f"block{block:02d}/conv{conv}"]


def _draw(rng: np.random.Generator, theta: Theta, blocks: tuple[int, ...]) -> int:
    """One of some blocks of the 16 published ones; of a shallower network, one that it has."""
    return int(rng.choice([i for i in blocks if i < _blocks(theta)]))


def _draw_any(rng: np.random.Generator, theta: Theta) -> int:
    """Any block but the last, as published."""
    return int(rng.integers(_blocks(theta) - 1))


_FIRST, _SECOND, _THIRD = (0, 3, 6, 9), (1, 4, 7), (1, 5, 9)


def reverse_filters(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Reverses the order of both convolutions' output channels."""
    i = _draw(rng, theta, _FIRST)
    for conv in (_conv(theta, i, 0), _conv(theta, i, 1)):
        conv["w"], conv["b"] = conv["w"][..., ::-1], conv["b"][::-1]


def negate_first(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Negates a block's first convolution."""
    conv = _conv(theta, _draw(rng, theta, _SECOND), 0)
    conv["w"], conv["b"] = -conv["w"], -conv["b"]


def zero_first(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Switches a block's first convolution off."""
    conv = _conv(theta, _draw(rng, theta, _FIRST), 0)
    conv["w"], conv["b"] = 0 * conv["w"], 0 * conv["b"]


def gelu_weights(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Puts both kernels through a negated GELU."""
    i = _draw(rng, theta, _FIRST)
    for conv in (_conv(theta, i, 0), _conv(theta, i, 1)):
        conv["w"] = -gelu(conv["w"])


def laplace(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Multiplies the first kernel's taps by a Laplacian's."""
    _conv(theta, _draw(rng, theta, _FIRST), 0)["w"] *= _LAPLACE


def outline(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Multiplies the first kernel's taps by an edge detector's."""
    _conv(theta, _draw(rng, theta, _FIRST), 0)["w"] *= _OUTLINE


def amplify(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Multiplies the second kernel by random factors of at least 1."""
    conv = _conv(theta, _draw(rng, theta, _FIRST), 1)
    conv["w"] *= _factors(rng, conv["w"].shape, 4)


def mirror_and_negate(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Mirrors the first kernel left to right and negates the second."""
    i = _draw(rng, theta, _FIRST)
    _conv(theta, i, 0)["w"] = _conv(theta, i, 0)["w"][:, ::-1]
    _conv(theta, i, 1)["w"] *= -1


def shift_kernels(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Shifts every input slice of the first kernel by a random tap of random sign.

    The published code adds all shifted slices up and puts the sum in the place of each.
    """
    conv = _conv(theta, _draw(rng, theta, _THIRD), 0)
    inputs = conv["w"].shape[2]
    taps = np.zeros((3, 3, inputs, inputs), np.float32)
    row, column = rng.integers(3, size=(2, inputs))
    sign = rng.choice(np.float32([-1, 1]), inputs)
    every = np.arange(inputs)
    if quirks:
        taps[row, column, every, :] = sign[:, None]
    else:
        taps[row, column, every, every] = sign
    conv["w"] = convolve_kernels(conv["w"], taps)


def convolve_noise(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Convolves the first kernel with random taps."""
    conv = _conv(theta, _draw(rng, theta, _FIRST), 0)
    inputs = conv["w"].shape[2]
    taps = (2 * rng.random((3, 3, inputs, inputs), np.float32) * rng.random() - 1) / 6
    conv["w"] = convolve_kernels(conv["w"], taps)


def convolve_dirichlet(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Convolves the second kernel with random averages."""
    conv = _conv(theta, _draw(rng, theta, _THIRD), 1)
    inputs = conv["w"].shape[2]
    taps = rng.dirichlet(np.full(9, 0.1), (inputs, inputs)).astype(np.float32)
    conv["w"] = convolve_kernels(conv["w"], np.moveaxis(taps, 2, 0).reshape(3, 3, inputs, inputs))


def add_noise(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Adds uniform noise to the second kernel."""
    conv = _conv(theta, _draw_any(rng, theta), 1)
    conv["w"] += rng.uniform(-0.5, 0.5, conv["w"].shape).astype(np.float32)


def rotate_kernels(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Turns five kernels by right angles, in space or over their channels."""
    for _ in range(5):
        conv = _conv(theta, _draw_any(rng, theta), int(rng.integers(2)))
        # Over [out, in] in PyTorch's order of axes, which is (3, 2) here.
        axes = (0, 1) if rng.random() < 0.5 else (3, 2)
        conv["w"] = np.rot90(conv["w"], rng.integers(1, 4), axes)


def flip_signs(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Negates half of the weights of five first kernels."""
    for _ in range(5):
        conv = _conv(theta, _draw_any(rng, theta), 0)
        conv["w"] *= rng.choice(np.float32([-1, 1]), conv["w"].shape)


def drop_weights(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Switches half of the weights of five first kernels off."""
    for _ in range(5):
        conv = _conv(theta, _draw_any(rng, theta), 0)
        conv["w"] *= rng.integers(0, 2, conv["w"].shape)


def negate_filters(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Negates about two fifths of the output filters of five first kernels."""
    for _ in range(5):
        conv = _conv(theta, _draw_any(rng, theta), 0)
        filters = conv["w"].shape[3]
        conv["w"][..., np.unique(rng.integers(filters, size=filters // 2))] *= -1


def keep_largest_tap(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Keeps the largest tap of every 3x3 of five kernels."""
    for _ in range(5):
        conv = _conv(theta, _draw_any(rng, theta), int(rng.integers(2)))
        flat = conv["w"].reshape(9, -1)
        kept = np.arange(9)[:, None] == flat.argmax(0)
        conv["w"] = (flat * kept).reshape(conv["w"].shape)


EDSR_DISTORTIONS: tuple[Callable[[np.random.Generator, Theta, bool], None], ...] = (
    reverse_filters,
    negate_first,
    zero_first,
    gelu_weights,
    laplace,
    outline,
    amplify,
    mirror_and_negate,
    shift_kernels,
    convolve_noise,
    convolve_dirichlet,
    add_noise,
    rotate_kernels,
    flip_signs,
    drop_weights,
    negate_filters,
    keep_largest_tap,
)


# ------------------------------------------------------------------------ the CAE's weights

_LAYERS = tuple(cae.CAE_LAYERS)  # in the published order
_UPS = tuple(i for i, name in enumerate(_LAYERS) if name.endswith("/up"))


def distort_cae(rng: np.random.Generator, theta: Theta) -> Theta:
    """A copy of the CAE's parameters under one distortion drawn from `CAE_DISTORTIONS`.

    Args:
      rng: source of all draws.
      theta: trained parameters; not changed.

    Returns:
      Distorted parameters.
    """
    theta = _copy(theta)
    CAE_DISTORTIONS[rng.integers(len(CAE_DISTORTIONS))](rng, theta)
    return theta


def _layer(rng: np.random.Generator, theta: Theta, first: int, last: int) -> tuple[dict, int]:
    """One layer of first..last, and the axis of its kernel that PyTorch stores first."""
    i = int(rng.integers(first, last + 1))
    return theta[_LAYERS[i]], 2 if i in _UPS else 3


def _filters(w: np.ndarray, axis: int) -> np.ndarray:
    """A view of a kernel with its filters, as PyTorch counts them, as first axis."""
    return np.moveaxis(w, axis, 0)


def cae_reverse(rng: np.random.Generator, theta: Theta) -> None:
    """Reverses the order of one convolution's output channels."""
    layer, _ = _layer(rng, theta, 11, 15)
    layer["w"], layer["b"] = layer["w"][..., ::-1], layer["b"][::-1]


def cae_negate(rng: np.random.Generator, theta: Theta) -> None:
    """Negates filters and biases, twelve times one, so that some turn back."""
    layer, axis = _layer(rng, theta, 8, 13)
    for k in rng.integers(layer["w"].shape[axis], size=12):
        _filters(layer["w"], axis)[k] *= -1
        layer["b"][k] *= -1


def cae_zero(rng: np.random.Generator, theta: Theta) -> None:
    """Switches up to 25 filters and biases off."""
    layer, axis = _layer(rng, theta, 8, 13)
    for k in rng.integers(layer["w"].shape[axis], size=25):
        _filters(layer["w"], axis)[k] = layer["b"][k] = 0


def cae_gelu(rng: np.random.Generator, theta: Theta) -> None:
    """Puts filters and biases through a negated GELU, 25 times one."""
    layer, axis = _layer(rng, theta, 10, 13)
    for k in rng.integers(layer["w"].shape[axis], size=25):
        _filters(layer["w"], axis)[k] = -gelu(_filters(layer["w"], axis)[k])
        layer["b"][k] = -gelu(layer["b"][k])


def cae_amplify(rng: np.random.Generator, theta: Theta) -> None:
    """Multiplies two kernels by random factors of at least 1."""
    for _ in range(2):
        layer, _ = _layer(rng, theta, 8, 13)
        layer["w"] *= _factors(rng, layer["w"].shape, 8)


def cae_mask(rng: np.random.Generator, theta: Theta) -> None:
    """Switches off, or negates, half of a kernel's weights."""
    layer, _ = _layer(rng, theta, 8, 13)
    other = np.float32(0 if rng.random() < 0.5 else -1)
    layer["w"] *= np.where(rng.random(layer["w"].shape) < 0.5, other, np.float32(1))


def cae_rotate(rng: np.random.Generator, theta: Theta) -> None:
    """Turns a kernel by right angles."""
    layer, _ = _layer(rng, theta, 8, 13)
    layer["w"] = np.rot90(layer["w"], rng.integers(1, 4), (0, 1))


def cae_negate_filters(rng: np.random.Generator, theta: Theta) -> None:
    """Negates about a fifth of a kernel's filters."""
    layer, axis = _layer(rng, theta, 8, 13)
    filters = layer["w"].shape[axis]
    _filters(layer["w"], axis)[np.unique(rng.integers(filters, size=filters // 5))] *= -1


CAE_DISTORTIONS: tuple[Callable[[np.random.Generator, Theta], None], ...] = (
    cae_reverse,
    cae_negate,
    cae_zero,
    cae_gelu,
    cae_amplify,
    cae_mask,
    cae_rotate,
    cae_negate_filters,
)


# ------------------------------------------------------------------------ kernels


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function of x, exactly."""
    return np.float32(x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2))))


def convolve_kernels(w: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Convolves a kernel, taken for images of its output filters, with other kernels.

    Args:
      w: [3,3,I,O].
      taps: [3,3,I,I'], correlated with w as a layer of a network does, padded by one zero.

    Returns:
      [3,3,I',O].
    """
    padded = np.pad(w, ((1, 1), (1, 1), (0, 0), (0, 0)))
    parts = (
        np.einsum("hwio,ij->hwjo", padded[r : r + 3, c : c + 3], taps[r, c], optimize=True)
        for r in range(3)
        for c in range(3)
    )
    return np.float32(sum(parts))


def _factors(rng: np.random.Generator, shape: tuple[int, ...], strength: float) -> np.ndarray:
    return np.float32(1 + strength * rng.random() * rng.random(shape, np.float32))


def _copy(theta: Theta) -> Theta:
    return {name: {k: np.array(a) for k, a in layer.items()} for name, layer in theta.items()}


# ------------------------------------------------------------------------ EDSR's features


def render_edsr(theta: dict, x: jax.Array, key: jax.Array, *, quirks: bool = False) -> jax.Array:
    """EDSR with random distortions of its features, its output brought to the input's size.

    Args:
      theta: parameters, distorted or not.
      x: images [B,H,W,3] in [0,1].
      key: random key, or one per example [B].
      quirks: as for `distort_edsr`.

    Returns:
      [B,H,W,3], not clipped.
    """
    draws = jax.vmap(jax.random.split)(keys.per_example(key, len(x)))
    head = edsr.edsr_head(theta, x)
    head = jax.vmap(functools.partial(_distort_head, quirks=quirks))(draws[:, 0], head)
    y = edsr.edsr_tail(theta, head + _distorted_body(draws[:, 1], theta, head, quirks))
    return y if y.shape == x.shape else jax.image.resize(y, x.shape, "cubic", antialias=True)


def _distort_head(key: jax.Array, h: jax.Array, quirks: bool) -> jax.Array:
    """Exchanges channels of [H,W,C], drops or negates features, or nothing: one of four."""
    which, swap_key, mask_key = jax.random.split(key, 3)
    uniform = jax.random.uniform(mask_key, h.shape, jnp.float32)
    pairs = jax.random.randint(swap_key, (5, 2), 0, h.shape[-1], jnp.int32)

    def exchange(i, order):
        a, b = pairs[i]
        # The published code writes through a view and so only overwrites.
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
    """The residual blocks and their closing convolution, distorted in one of five ways.

    After a third of the blocks features are negated, rectified or flipped; or modules are skipped;
    or nothing happens. All images [B,H,W,C] pass through the same convolutions; keys are [B].
    """
    blocks = sum(name.endswith("/conv0") for name in theta)
    middle = 5 if blocks > 5 else blocks // 2
    which, what, skip_key = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(key), 1, 0)
    option = jax.vmap(lambda k: jax.random.randint(k, (), 0, 5, jnp.int32))(which)
    u = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(what)
    # Module `blocks` is the closing one.
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
        # The published code feeds every kept module with the head's output.
        x = select(skipping, h, out) if quirks else out
        last = i == blocks
        y = edsr.edsr_body_end(theta, x) if last else edsr.edsr_block(theta, i, x)
        out = select(skipping & jnp.any(drawn == i, 1), out, y)
    return out


# ------------------------------------------------------------------------ the CAE's latents


def render_cae(theta: dict, x: jax.Array, key: jax.Array) -> jax.Array:
    """The CAE with one random distortion of its latent or its bits.

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
    """Bits [h,w,32] drawn from a latent, one of the two distorted."""
    bits_key, which, draw = jax.random.split(key, 3)
    option = jax.random.randint(which, (), 0, 1 + len(_LATENT_DISTORTIONS), jnp.int32)
    # Option 0 leaves the latent alone and amplifies the bits.
    options = (lambda e: e, *(lambda e, f=f: f(draw, e) for f in _LATENT_DISTORTIONS))
    bits = cae.binarise(bits_key, lax.switch(option, options, latent))
    scale_key, factor_key = jax.random.split(draw)
    factors = jax.random.uniform(factor_key, bits.shape, jnp.float32)
    factors = 3 + 4 * jax.random.uniform(scale_key, (), jnp.float32) * factors
    # The published network amplifies bits of 0 and 1.
    return jnp.where(option == 0, (bits + 1) * factors - 1, bits)


def latent_drop(key: jax.Array, e: jax.Array) -> jax.Array:
    """Sets a fifth of the places to 0."""
    return e * (jax.random.uniform(key, (*e.shape[:2], 1), jnp.float32) >= 0.2)


def latent_negate(key: jax.Array, e: jax.Array) -> jax.Array:
    """Negates a tenth of the places."""
    drawn = jax.random.uniform(key, (*e.shape[:2], 1), jnp.float32)
    return e * jnp.where(drawn < 0.1, -1.0, 1.0)


def latent_permute(key: jax.Array, e: jax.Array) -> jax.Array:
    """Permutes the first ten channels."""
    order = jax.random.permutation(key, jnp.arange(10, dtype=jnp.int32))
    return jnp.concatenate([e[..., order], e[..., 10:]], -1)


def latent_flip_some(key: jax.Array, e: jax.Array) -> jax.Array:
    """Flips five channels, all in the same way."""
    which, how = jax.random.split(key)
    chosen = jax.random.randint(which, (5,), 0, e.shape[-1], jnp.int32)
    # A channel that is drawn twice is flipped back.
    odd = jnp.bincount(chosen, length=e.shape[-1]) % 2
    return jnp.where(odd == 1, latent_flip(how, e), e)


def latent_flip(key: jax.Array, e: jax.Array) -> jax.Array:
    """Flips all channels: up, sideways or both."""
    how = jax.random.randint(key, (), 0, 3, jnp.int32)
    return lax.switch(how, (lambda: e[::-1, ::-1], lambda: e[::-1], lambda: e[:, ::-1]))


def latent_convolve(key: jax.Array, e: jax.Array) -> jax.Array:
    """Convolves with the identity and some noise on every tap."""
    channels = e.shape[-1]
    noise = jax.random.uniform(key, (3, 3, channels, channels), jnp.float32, -0.1, 0.1)
    return _convolve(e, noise.at[1, 1].add(jnp.eye(channels, dtype=jnp.float32)))


def latent_mix(key: jax.Array, e: jax.Array) -> jax.Array:
    """Adds to half of the channels another one, shifted by a pixel or not.

    A channel may draw itself, unshifted: its tap is 1 already and stays 1, as published.
    """
    channels = e.shape[-1]
    on, source, row, column = _taps(key, channels)
    taps = jnp.zeros((3, 3, channels, channels)).at[1, 1].add(jnp.eye(channels))
    on = jax.random.bernoulli(on, np.float32(0.5), (channels,))
    source = jax.random.randint(source, (channels,), 0, channels, jnp.int32)
    return _convolve(e, taps.at[row, column, source, jnp.arange(channels)].max(on))


def latent_shift(key: jax.Array, e: jax.Array) -> jax.Array:
    """Shifts the channels; a channel's shift is its predecessor's, or with 1/5 a new one."""
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
    """Two keys, and a row and a column of a 3x3 for every channel."""
    a, b, c = jax.random.split(key, 3)
    row, column = jax.random.randint(c, (2, channels), 0, 3, jnp.int32)
    return a, b, row, column


def _convolve(e: jax.Array, taps: jax.Array) -> jax.Array:
    # Fast also where every image has taps of its own.
    return per_example.conv2d(e[None], taps.astype(e.dtype))[0]
