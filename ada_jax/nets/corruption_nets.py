"""Image-to-image networks as pure functions of their parameters.

`make(name)` gives a `CorruptionNet` with shipped weights where there are some. A network is a plain
function `apply(theta, x, key)`, so its parameters can be perturbed as any pytree.
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
# The keywords of `edsr`; None is the CAE, which has none.
PRESETS = {
    "edsr_baseline_x4": {"blocks": 16, "features": 64, "scale": 4},
    "edsr_baseline": {"blocks": 16, "features": 64, "scale": 1},
    "edsr_medium": {"blocks": 8, "features": 32, "scale": 1},
    "edsr_small": {"blocks": 4, "features": 16, "scale": 1},
    "cae": None,
}


def names() -> tuple[str, ...]:
    """The presets that `make` knows."""
    return tuple(PRESETS)


def make(name: str, weights: str | None = None, *, enlarge: int = 1) -> ada.CorruptionNet:
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
    checks.check_integers(1, enlarge=enlarge)
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
    theta, _ = weight_files.load_weights(path, like=jax.eval_shape(net.init, jax.random.key(0)))
    theta = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), theta)
    return ada.CorruptionNet(enlarged(net.apply, enlarge), theta)


def architecture(name: str) -> layers.Architecture:
    """The untrained network of a preset.

    Raises:
      UserError: unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"corruption_net={name!r} is unknown: choose one of {', '.join(names())}.")
    fields = PRESETS[name]
    return cae.cae() if fields is None else edsr.edsr(**fields)


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
        if PRESETS[name] is None and not cae.fits_cae(factor * height, factor * width):
            times = f", {factor} times enlarged," if factor > 1 else ""
            raise UserError(
                f"{field}={tuple(nets)} does not fit images of {height}x{width}, whose "
                f"sides{times} must be multiples of 4 and at least {cae.CAE_SMALLEST} for 'cae': "
                "crop or resize the images, or leave 'cae' out."
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
