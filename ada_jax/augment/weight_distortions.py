"""DeepAugment's random distortions of a network's weights, drawn for a group of images (NumPy).

Source: Hendrycks et al., "The many faces of robustness" (2021), and its code.
"""

from collections.abc import Callable

import numpy as np
import scipy.special

from ada_jax.nets import cae

Theta = dict[str, dict[str, np.ndarray]]
_LAPLACE = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32)[..., None, None]
_OUTLINE = np.array([[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]], np.float32)[..., None, None]


# ------------------------------------------------------------------------ EDSR's weights


def distort_edsr(rng: np.random.Generator, theta: Theta, *, quirks: bool = False) -> Theta:
    """Returns EDSR's parameters after three distortions drawn from `EDSR_DISTORTIONS`.

    Args:
      rng: random number generator.
      theta: trained parameters, which are not modified.
      quirks: whether to reproduce the published code's known bugs.
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
    """Draws one of some blocks; a network with fewer than 16 blocks draws among those it has."""
    return int(rng.choice([i for i in blocks if i < _blocks(theta)]))


def _draw_any(rng: np.random.Generator, theta: Theta) -> int:
    """Draws any block except the last, as published."""
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
    """Sets a block's first convolution to zero."""
    conv = _conv(theta, _draw(rng, theta, _FIRST), 0)
    conv["w"], conv["b"] = 0 * conv["w"], 0 * conv["b"]


def gelu_weights(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Applies a negated GELU to both kernels."""
    i = _draw(rng, theta, _FIRST)
    for conv in (_conv(theta, i, 0), _conv(theta, i, 1)):
        conv["w"] = -gelu(conv["w"])


def laplace(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Multiplies the first kernel elementwise by a Laplacian filter."""
    _conv(theta, _draw(rng, theta, _FIRST), 0)["w"] *= _LAPLACE


def outline(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Multiplies the first kernel elementwise by an edge detector."""
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
    """Shifts every input slice of the first kernel by a random tap, with a random sign.

    The published code replaces every slice by the sum of all shifted slices.
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
    """Rotates five kernels by multiples of 90 degrees, in space or over their channels."""
    for _ in range(5):
        conv = _conv(theta, _draw_any(rng, theta), int(rng.integers(2)))
        # (3, 2) are PyTorch's axes [out, in].
        axes = (0, 1) if rng.random() < 0.5 else (3, 2)
        conv["w"] = np.rot90(conv["w"], rng.integers(1, 4), axes)


def flip_signs(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Negates half of the weights of five first kernels."""
    for _ in range(5):
        conv = _conv(theta, _draw_any(rng, theta), 0)
        conv["w"] *= rng.choice(np.float32([-1, 1]), conv["w"].shape)


def drop_weights(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Sets half of the weights of five first kernels to zero."""
    for _ in range(5):
        conv = _conv(theta, _draw_any(rng, theta), 0)
        conv["w"] *= rng.integers(0, 2, conv["w"].shape)


def negate_filters(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Negates about 40% of the output filters of five first kernels."""
    for _ in range(5):
        conv = _conv(theta, _draw_any(rng, theta), 0)
        filters = conv["w"].shape[3]
        conv["w"][..., np.unique(rng.integers(filters, size=filters // 2))] *= -1


def keep_largest_tap(rng: np.random.Generator, theta: Theta, quirks: bool) -> None:
    """Keeps only the largest tap of every 3x3 slice of five kernels."""
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
    """Returns the CAE's parameters after one distortion drawn from `CAE_DISTORTIONS`."""
    theta = _copy(theta)
    CAE_DISTORTIONS[rng.integers(len(CAE_DISTORTIONS))](rng, theta)
    return theta


def _layer(rng: np.random.Generator, theta: Theta, first: int, last: int) -> tuple[dict, int]:
    """Draws one layer of first..last; also returns the kernel axis that PyTorch stores first."""
    i = int(rng.integers(first, last + 1))
    return theta[_LAYERS[i]], 2 if i in _UPS else 3


def _filters(w: np.ndarray, axis: int) -> np.ndarray:
    """A view of a kernel with PyTorch's first axis, its filters, in front."""
    return np.moveaxis(w, axis, 0)


def cae_reverse(rng: np.random.Generator, theta: Theta) -> None:
    """Reverses the order of one convolution's output channels."""
    layer, _ = _layer(rng, theta, 11, 15)
    layer["w"], layer["b"] = layer["w"][..., ::-1], layer["b"][::-1]


def cae_negate(rng: np.random.Generator, theta: Theta) -> None:
    """Negates twelve filters and their biases, drawn with replacement."""
    layer, axis = _layer(rng, theta, 8, 13)
    for k in rng.integers(layer["w"].shape[axis], size=12):
        _filters(layer["w"], axis)[k] *= -1
        layer["b"][k] *= -1


def cae_zero(rng: np.random.Generator, theta: Theta) -> None:
    """Sets up to 25 filters and their biases to zero."""
    layer, axis = _layer(rng, theta, 8, 13)
    for k in rng.integers(layer["w"].shape[axis], size=25):
        _filters(layer["w"], axis)[k] = layer["b"][k] = 0


def cae_gelu(rng: np.random.Generator, theta: Theta) -> None:
    """Applies a negated GELU to 25 filters and their biases, drawn with replacement."""
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
    """Negates half of a kernel's weights or sets them to zero."""
    layer, _ = _layer(rng, theta, 8, 13)
    other = np.float32(0 if rng.random() < 0.5 else -1)
    layer["w"] *= np.where(rng.random(layer["w"].shape) < 0.5, other, np.float32(1))


def cae_rotate(rng: np.random.Generator, theta: Theta) -> None:
    """Rotates a kernel by a multiple of 90 degrees."""
    layer, _ = _layer(rng, theta, 8, 13)
    layer["w"] = np.rot90(layer["w"], rng.integers(1, 4), (0, 1))


def cae_negate_filters(rng: np.random.Generator, theta: Theta) -> None:
    """Negates about 20% of a kernel's filters."""
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
    """The exact GELU: x times the normal distribution function of x."""
    return np.float32(x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2))))


def convolve_kernels(w: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Convolves a kernel, as images with its output filters as batch, with other kernels.

    Args:
      w: [3,3,I,O].
      taps: [3,3,I,I'], correlated with w as in a network's layer, with one zero of padding.

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
