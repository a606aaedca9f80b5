"""Corruption networks: presets, weights, enlargement and mixed precision.

A network is a pure function `apply(theta, x, key)`, so its parameters can be perturbed like any
pytree. `make(name)` returns a `CorruptionNet` with trained weights.
"""

import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import jmp

from ada_jax import ada, checks
from ada_jax.errors import UserError
from ada_jax.nets import cae, edsr, layers, weight_files

WEIGHTS = pathlib.Path(__file__).parent / "weights"
# Keyword arguments of `edsr.edsr`; None is the CAE.
PRESETS = {
    "edsr_baseline_x4": {"blocks": 16, "features": 64, "scale": 4},
    "edsr_baseline": {"blocks": 16, "features": 64, "scale": 1},
    "edsr_medium": {"blocks": 8, "features": 32, "scale": 1},
    "edsr_small": {"blocks": 4, "features": 16, "scale": 1},
    "cae": None,
}


def names() -> tuple[str, ...]:
    """The names of the presets."""
    return tuple(PRESETS)


def shipped() -> tuple[str, ...]:
    """The names of the presets whose weights are shipped."""
    return tuple(name for name in PRESETS if (WEIGHTS / f"{name}.safetensors").exists())


def make(name: str, weights: str | None = None, *, enlarge: int = 1) -> ada.CorruptionNet:
    """Makes a corruption network with trained weights.

    Args:
      name: 'edsr_small', 'edsr_medium', 'edsr_baseline_x4', 'cae', or 'edsr_baseline', which has no
        shipped weights.
      weights: a safetensors file written by `ada_jax.pretrain` or `ada_jax.import_weights`; None
        means the shipped weights.
      enlarge: factor by which images are enlarged before the network and reduced after it. The
        published CAE was trained on patches of 128 pixels; 4 brings images of 32 pixels to that
        size, where its corruptions are milder and finer. The shipped weights were trained on 32
        pixels.

    Returns:
      The network.

    Raises:
      UserError: the name is unknown, `enlarge` is not a positive integer, or the weights are
        missing, damaged or of another network.
    """
    checks.check_integers(1, enlarge=enlarge)
    net = architecture(name)
    path = weights or WEIGHTS / f"{name}.safetensors"
    if not weights and name not in shipped():
        raise UserError(
            f"corruption_net={name!r} has no shipped weights (those of "
            f"{', '.join(shipped()) or 'no network'} are shipped): train some with `python -m "
            f"ada_jax.pretrain --config=experiments/pretrain_{name.partition('_')[0]}.py:{name}` "
            "and give the file as `weights` (config.ada.corruption_weights)."
        )
    theta, _ = weight_files.load_weights(path, like=jax.eval_shape(net.init, jax.random.key(0)))
    theta = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), theta)
    return ada.CorruptionNet(enlarged(net.apply, enlarge), theta)


def architecture(name: str) -> layers.Architecture:
    """The architecture of a preset; raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"corruption_net={name!r} is unknown: choose one of {', '.join(names())}.")
    fields = PRESETS[name]
    return cae.cae() if fields is None else edsr.edsr(**fields)


def check_sizes(
    field: str, nets: Sequence[str], enlarge: Sequence[int], image_shape: Sequence[int]
) -> None:
    """Checks that all networks accept images of a size, before anything is compiled.

    Args:
      field: the config field of the networks, such as 'config.nets', for the message.
      nets: names of presets.
      enlarge: the enlargement of each, see `make`.
      image_shape: [H,W,...] of the images.

    Raises:
      UserError: the CAE is among the networks and does not accept the size.
    """
    height, width = image_shape[:2]
    for name, factor in zip(nets, enlarge, strict=True):
        if PRESETS[name] is None and not cae.fits_cae(factor * height, factor * width):
            times = f", {factor} times enlarged," if factor > 1 else ""
            raise UserError(
                f"{field}={tuple(nets)} does not fit images of {height}x{width}, whose "
                f"sides{times} must be multiples of 4 and at least {cae.CAE_SMALLEST} for 'cae': "
                "crop or resize the images, or leave 'cae' out."
            )


def enlarged(apply: Callable[..., jax.Array], factor: int) -> Callable[..., jax.Array]:
    """Wraps a network: enlarges its input bicubically, and reduces its output (antialiased)."""
    if factor == 1:
        return apply

    def resized(theta, x, key=None):
        b, h, w, c = x.shape
        large = jax.image.resize(x, (b, factor * h, factor * w, c), "cubic")
        y = apply(theta, large, key)
        return jax.image.resize(y, (b, h, w, y.shape[-1]), "cubic", antialias=True)

    return resized


def cast(
    apply: Callable[..., jax.Array], dtype: str = "float32", remat: bool = False
) -> Callable[..., jax.Array]:
    """Wraps a network to compute in another type.

    Args:
      apply: a network's function.
      dtype: 'float32' or 'bfloat16'; parameters are cast to it, the output is float32.
      remat: whether the backward pass recomputes the features instead of storing them.
    """
    policy = jmp.get_policy(f"params=float32,compute={dtype},output=float32")

    def casted(theta, x, key=None):
        return policy.cast_to_output(apply(policy.cast_to_compute(theta), x, key))

    wrapped = apply if dtype == "float32" else casted
    return jax.checkpoint(wrapped) if remat else wrapped
