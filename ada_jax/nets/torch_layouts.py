"""Classifiers' weights as PyTorch state dicts, in the layouts of widespread PyTorch code."""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from ada_jax.errors import UserError
from ada_jax.nets import classifiers, weight_files

StateDict = dict[str, np.ndarray]

# Added to PyTorch's count of batches. After so many updates Haiku's correction for zero bias has no
# effect, so that running statistics are used as they are and training continues from them.
_SETTLED = 1 << 20
_COUNTER = "num_batches_tracked"
_SHAPE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


# Classifiers with a layout. Haiku's resnet50 pads differently; none is written for alexnet.
_CONVERTIBLE = (
    *("preact_resnet20", "resnet9", "preact_resnet18", "preact_resnet18_no_bn"),
    *("preact_resnet18_v2", "preact_resnet50", "resnet20", "resnet56", "wide_resnet40_2"),
    *("wide_resnet28_4", "wide_resnet28_10", "torchvision_resnet18", "torchvision_resnet50"),
)


class Layout(NamedTuple):
    """How PyTorch code names a network's layers.

    Attributes:
      block: the prefix of a block, a format of its stage, from 1, and its number, from 0.
      layers: our names of layers, and PyTorch's where they differ.
      source: the definition of `Network`: a file in torch_models/, or an import.
      arguments: the arguments of `Network` except for num_classes.
    """

    block: str
    layers: dict[str, str]
    source: str
    arguments: str


def layout(classifier: str) -> Layout:
    """The layout of a classifier.

    Args:
      classifier: one of `classifiers.names()`.

    Raises:
      UserError: PyTorch has no such network.

    Source: the code of Wong et al. and RobustBench (`preact_resnet*`; `wide_resnet*`, there from
    TRADES), akamaster/pytorch_resnet_cifar10 (`resnet20`, `resnet56`) and torchvision. The layouts
    of `resnet9` and `preact_resnet20` are this project's own.
    """
    if classifier not in _CONVERTIBLE:
        raise UserError(
            f"{classifier!r} cannot be converted: only {', '.join(_CONVERTIBLE)} have a layout."
        )
    kind, depth, rest = re.fullmatch(r"(\D+)(\d+)_?(\w*)", classifier).groups()
    layers = {"stem": "conv1", "stem_bn": "bn1", "logits": "linear"}
    match kind, depth:
        case "preact_resnet", _:
            widths = (16, 32, 64) if depth == "20" else (64, 128, 256, 512)
            depths = {"18": (2, 2, 2, 2), "20": (3, 3, 3), "50": (3, 4, 6, 3)}[depth]
            given = f"widths={widths}, depths={depths}"
            given += ", bottleneck=True" if depth == "50" else ""
            given += {"": "", "v2": ", v2=True", "no_bn": ", last_bn=False"}[rest]
            layers |= {"shortcut": "shortcut.0"}
            return Layout("layer{}.{}", layers, "preact_resnet.py", given)
        case "resnet", "20" | "56":
            return Layout("layer{}.{}", layers, "cifar_resnet.py", f"depth={depth}")
        case "resnet", "9":
            return Layout("layer{}", layers, "resnet9.py", "")
        case "wide_resnet", _:
            layers |= {"shortcut": "convShortcut", "bn": "bn1", "logits": "fc"}
            given = f"depth={depth}, factor={rest}"
            return Layout("block{}.layer.{}", layers, "wide_resnet.py", given)
    layers |= {"shortcut": "downsample.0", "shortcut_bn": "downsample.1", "logits": "fc"}
    source = f"from torchvision.models import resnet{depth} as Network\n"
    return Layout("layer{}.{}", layers, source, "")


def torch_name(classifier: str, layer: str) -> str:
    """A layer's name in the PyTorch network.

    Args:
      classifier: one of `classifiers.names()`.
      layer: a key of its parameters, such as 'stage2_block1/conv1'.

    Returns:
      The prefix of '.weight', such as 'layer2.0.conv1'.
    """
    names = layout(classifier)
    *scope, part = layer.split("/")
    part = names.layers.get(part, part)
    if not scope:
        return part
    stage, block = re.fullmatch(r"stage(\d+)(?:_block(\d+))?", scope[0]).groups("1")
    return f"{names.block.format(stage, int(block) - 1)}.{part}"


def to_torch(classifier: str, params: hk.Params, state: hk.State) -> StateDict:
    """Converts a classifier's variables to a PyTorch state dict.

    Args:
      classifier: one of `classifiers.names()`.
      params: its parameters.
      state: its batch-norm averages.

    Returns:
      Arrays by PyTorch's names, float32, and int64 for num_batches_tracked.

    Raises:
      UserError: PyTorch has no such network.
    """
    found: StateDict = {}
    for layer, leaves in params.items():
        prefix = torch_name(classifier, layer)
        if "scale" in leaves:
            averages = {which: state[f"{layer}/~/{which}_ema"] for which in ("mean", "var")}
            count = int(averages["mean"]["counter"])
            found |= {
                f"{prefix}.weight": _flat(leaves["scale"]),
                f"{prefix}.bias": _flat(leaves["offset"]),
                f"{prefix}.running_mean": _flat(averages["mean"]["average"]),
                f"{prefix}.running_var": _flat(averages["var"]["average"]),
                f"{prefix}.{_COUNTER}": np.int64(count - _SETTLED if count >= _SETTLED else count),
            }
        else:
            # [h,w,in,out] becomes [out,in,h,w], and [in,out] becomes [out,in].
            w = np.asarray(leaves["w"])
            found[f"{prefix}.weight"] = w.transpose(3, 2, 0, 1) if w.ndim == 4 else w.T
        if "b" in leaves:
            found[f"{prefix}.bias"] = np.asarray(leaves["b"])
    return {name: np.asarray(a, order="C") for name, a in found.items()}


def from_torch(classifier: str, state_dict: StateDict) -> dict[str, dict[str, Any]]:
    """Converts a PyTorch state dict to a classifier's variables.

    Args:
      classifier: one of `classifiers.names()`.
      state_dict: arrays of any floating type by PyTorch's names. The last layer gives the number of
        classes. num_batches_tracked may be missing.

    Returns:
      {'params': ..., 'state': ...}, float32, as `weight_files.save_weights` stores them.

    Raises:
      UserError: names or shapes differ, values are not finite, or PyTorch has no such network.
    """
    if difference := mismatch(classifier, state_dict):
        kind = re.match(r"\D+", classifier)[0]
        alike = [name for name in _CONVERTIBLE if re.match(r"\D+", name)[0] == kind]
        fits = [name for name in alike if not mismatch(name, state_dict)]
        other = f"it fits {' and '.join(fits)}" if fits else "give the weights of this network"
        raise UserError(f"The file is not {classifier} ({difference}): {other}.")
    with np.errstate(over="ignore"):
        arrays = {name: np.asarray(a, np.float32) for name, a in state_dict.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"The file's {name} holds NaN or infinity: use another file.")
    params, state = _variables(classifier, num_classes(classifier, state_dict))
    return {
        "params": {
            layer: {leaf: _leaf(classifier, layer, leaf, a, arrays) for leaf, a in leaves.items()}
            for layer, leaves in params.items()
        },
        "state": {layer: _averages(classifier, layer, a, state_dict) for layer, a in state.items()},
    }


def mismatch(classifier: str, state_dict: Mapping[str, np.ndarray]) -> str | None:
    """The first difference between a state dict's names and shapes and a classifier's, or None."""
    classes = num_classes(classifier, state_dict)
    like = [
        hk.data_structures.map(lambda _, __, a: np.broadcast_to(np.zeros((), a.dtype), a.shape), v)
        for v in _variables(classifier, classes)
    ]
    shapes = [
        {n: weight_files.shape(a) for n, a in arrays.items() if not n.endswith(_COUNTER)}
        for arrays in (state_dict, to_torch(classifier, *like))
    ]
    return weight_files.first_difference(*shapes)


def num_classes(classifier: str, state_dict: Mapping[str, np.ndarray]) -> int:
    """The number of outputs of a state dict's last layer; 10 where it is missing."""
    last = state_dict.get(f"{torch_name(classifier, 'logits')}.weight")
    return len(last) if np.ndim(last) == 2 and len(last) else 10


@functools.cache
def _variables(classifier: str, classes: int) -> tuple[hk.Params, hk.State]:
    init = functools.partial(classifiers.make(classifier, classes).init, is_training=True)
    return jax.eval_shape(init, jax.random.key(0), _SHAPE)


def _leaf(
    classifier: str, layer: str, leaf: str, like: jax.ShapeDtypeStruct, arrays: StateDict
) -> np.ndarray:
    """A parameter from PyTorch's."""
    name = "weight" if leaf in ("w", "scale") else "bias"
    array = arrays[f"{torch_name(classifier, layer)}.{name}"]
    if leaf == "w":
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array).reshape(like.shape)


def _averages(
    classifier: str, layer: str, like: Mapping[str, jax.ShapeDtypeStruct], state_dict: StateDict
) -> dict[str, np.ndarray]:
    """Haiku's moving average from PyTorch's, such as of 'stem_bn/~/mean_ema'."""
    module, _, which = layer.partition("/~/")
    prefix = torch_name(classifier, module)
    running = state_dict[f"{prefix}.running_{which.removesuffix('_ema')}"]
    average = np.asarray(running, np.float32).reshape(like["average"].shape)
    batches = int(np.max(state_dict.get(f"{prefix}.{_COUNTER}", 0)))  # Some files have it as [1].
    counter = np.int32(min(_SETTLED + batches, np.iinfo(np.int32).max))
    return {"average": average, "hidden": average, "counter": counter}


def _flat(array: Any) -> np.ndarray:
    return np.asarray(array).reshape(-1)
