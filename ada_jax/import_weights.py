"""Converts PyTorch weights to this package's, and those of corruption networks back.

python -m ada_jax.import_weights edsr edsr_baseline_x4.pt OUT.safetensors
python -m ada_jax.import_weights edsr model.safetensors OUT.safetensors
python -m ada_jax.import_weights cae model_final.state OUT.safetensors
python -m ada_jax.import_weights --export cae IN.safetensors OUT.pt
python -m ada_jax.import_weights classifier resnet20.pt OUT.safetensors --classifier=resnet20 \\
    --mean=0.4914,0.4822,0.4465 --std=0.2471,0.2435,0.2616

'edsr' is the EDSR preset that matches the file. All files except safetensors need PyTorch
(pip install -e '.[torch]'). A classifier's file is a state dict in a layout of
`nets.torch_layouts`; --mean and --std normalise its input, images in [0,1].
`ada_jax.export_weights` exports classifiers.
"""

import hashlib
import io
import os
import pathlib
import pickle
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from absl import flags, logging

from ada_jax import paths
from ada_jax.errors import UserError
from ada_jax.nets import classifiers, corruption_nets, edsr, torch_layouts, weight_files
from ada_jax.run import cli

StateDict = dict[str, np.ndarray]
_NETWORKS = ("edsr", *corruption_nets.names(), "classifier")
# Under which training scripts save a state dict; RobustBench reads 'last'.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "last")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_NORMALISATION = (("mu", "sigma"), ("normalize.mean", "normalize.std"))
_SHIFT = {"sub_mean": -255.0, "add_mean": 255.0}  # EDSR's MeanShift layers: factors of the mean.


# ------------------------------------------------------------------------ the mapping


def torch_name(preset: str, name: str) -> str:
    """A layer's name in the published network.

    Args:
      preset: one of `corruption_nets.names()`.
      name: a layer of its theta, such as 'block03/conv0'.

    Returns:
      The prefix of '.weight' and '.bias', such as 'body.3.body.0'.
    """
    if preset == "cae":
        layer, _, part = name.partition("/")
        kind = layer.rstrip("123").rstrip("_")
        # Positions in the published nn.Sequential modules, which include padding and activations.
        at = {"e_conv": {"": 1}, "e_block": {"conv0": 1, "conv1": 4}}
        at |= {"d_block": at["e_block"], "d_up_conv": {"conv": 0, "up": 3, "conv0": 0, "conv1": 3}}
        position = 0 if layer == "e_conv_3" else at[kind][part]
        return f"{layer}.{position}"
    if match := re.fullmatch(r"block(\d+)/conv([01])", name):
        return f"body.{int(match[1])}.body.{2 * int(match[2])}"
    if match := re.fullmatch(r"up(\d)", name):
        return f"tail.0.{2 * int(match[1])}"
    blocks = corruption_nets.PRESETS[preset]["blocks"]
    return {"head": "head.0", "body_end": f"body.{blocks}", "tail": "tail.1"}[name]


def to_torch(preset: str, theta: Mapping[str, Any]) -> StateDict:
    """Converts parameters to the published network's PyTorch state dict.

    Args:
      preset: one of `corruption_nets.names()`.
      theta: its parameters.

    Returns:
      The state dict as float32 arrays, including EDSR's fixed MeanShift layers.
    """
    state = {}
    for name, layer in theta.items():
        prefix, w = torch_name(preset, name), np.asarray(layer["w"], np.float32)
        # [h,w,in,out] becomes [out,in,h,w], and [in,out,h,w] in transposed convolutions.
        state[f"{prefix}.weight"] = (
            w.transpose(2, 3, 0, 1) if _is_up(name) else w.transpose(3, 2, 0, 1)
        )
        state[f"{prefix}.bias"] = np.asarray(layer["b"], np.float32)
    if preset != "cae":
        for shift, factor in _SHIFT.items():
            state[f"{shift}.weight"] = np.eye(3, dtype=np.float32)[:, :, None, None]
            state[f"{shift}.bias"] = np.float32(factor * edsr.DIV2K_MEAN)
    return state


def from_torch(preset: str, state: StateDict) -> dict[str, dict[str, np.ndarray]]:
    """Converts a PyTorch state dict to the parameters of a preset.

    Args:
      preset: one of `corruption_nets.names()`.
      state: floating-point arrays by name; a common prefix 'module.' or 'model.' is ignored.

    Returns:
      theta, float32.

    Raises:
      UserError: names, shapes or mean shifts do not match, or values are not finite.
    """
    state = {name: _float32(a) for name, a in _without_prefix(state).items()}
    if mismatch := _mismatch(preset, state):
        raise UserError(f"The file is not {preset} ({mismatch}): give the file of this network.")
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise UserError(f"The file's {name} holds NaN or infinity: use another file.")
    _check_mean_shift({name: a for name, a in state.items() if _is_mean_shift(name)})
    return {name: _layer(preset, name, state) for name in _zeros(preset)}


def _without_prefix(state: StateDict) -> StateDict:
    """Removes the components of `_PREFIXES` with which all names begin."""
    while state and any(all(name.startswith(p) for name in state) for p in _PREFIXES):
        logging.info("Ignoring the prefix %r of all names.", next(iter(state)).partition(".")[0])
        state = {name.partition(".")[2]: array for name, array in state.items()}
    return state


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # Infinities are reported by the caller.
        return np.asarray(array, np.float32)


def _zeros(preset: str) -> dict[str, dict[str, np.ndarray]]:
    like = jax.eval_shape(corruption_nets.architecture(preset).init, jax.random.key(0))
    return jax.tree.map(lambda a: np.zeros(a.shape, np.float32), like)


def _mismatch(preset: str, state: StateDict) -> str | None:
    """The difference between a state dict's names and shapes and a preset's; None if equal."""
    expected = _shapes(preset)
    required = {name for name in expected if not _is_mean_shift(name)}
    if missing := sorted(required - set(state)):
        return f"it lacks {len(missing)} arrays, {missing[0]} first"
    if unknown := sorted(set(state) - set(expected)):
        return f"it has {len(unknown)} unexpected arrays, {unknown[0]} first"
    for name, array in state.items():
        if array.shape != expected[name]:
            return f"{name} has the shape {array.shape}, expected {expected[name]}"
    return None


def _shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the published network's arrays."""
    return {name: a.shape for name, a in to_torch(preset, _zeros(preset)).items()}


def _is_mean_shift(name: str) -> bool:
    return name.partition(".")[0] in _SHIFT


def _layer(preset: str, name: str, state: StateDict) -> dict[str, np.ndarray]:
    prefix = torch_name(preset, name)
    w = state[f"{prefix}.weight"]
    w = w.transpose(2, 3, 0, 1) if _is_up(name) else w.transpose(2, 3, 1, 0)
    return {"w": np.ascontiguousarray(w), "b": state[f"{prefix}.bias"]}


def _is_up(name: str) -> bool:
    """Whether a layer is a transposed convolution."""
    return name.endswith("/up")


def _check_mean_shift(shifts: StateDict) -> None:
    for name, array in shifts.items():
        layer, _, kind = name.partition(".")
        expected = _SHIFT[layer] * edsr.DIV2K_MEAN
        if kind == "weight":
            expected = np.eye(3)[:, :, None, None]
        if not np.allclose(array, expected, rtol=2**-9):  # bfloat16's precision.
            raise UserError(
                f"The file's {name} is {array.ravel().tolist()}, not DIV2K's fixed mean shift: use "
                "a network that was trained with DIV2K's normalisation."
            )


def preset_of(network: str, state: StateDict) -> str:
    """Returns `network`, or for 'edsr' the preset that matches the state dict.

    Raises:
      UserError: no EDSR preset matches.
    """
    if network != "edsr":
        return network
    state = _without_prefix(state)
    presets = [preset for preset, fields in corruption_nets.PRESETS.items() if fields]
    for preset in presets:
        if not _mismatch(preset, state):
            return preset
    shared = {preset: len(_shapes(preset).keys() & state.keys()) for preset in presets}
    nearest = max(presets, key=shared.get)
    why = f"for {nearest}, {_mismatch(nearest, state)}"
    if not shared[nearest]:
        why = f"its first arrays are {', '.join(list(state)[:3]) or 'none'}"
    raise UserError(
        f"The file is not a known EDSR ({why}): give the weights of {', '.join(presets)}."
    )


# ------------------------------------------------------------------------ files


def read_torch(path: str | os.PathLike[str]) -> StateDict:
    """Reads the tensors of a PyTorch or safetensors file without executing code from it.

    Args:
      path: a file with a state dict, or with a dict that has one under a key of `_WRAPPERS`.
        safetensors files do not need PyTorch.

    Returns:
      Arrays by name.

    Raises:
      UserError: the file is missing or damaged, or holds more than tensors.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: check the path.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file.") from error
    if start[8:] == b"{" or os.fspath(path).endswith(".safetensors"):
        return weight_files.read_safetensors(os.fspath(path))[0]
    if not start.startswith((b"PK", b"\x80")):
        raise UserError(
            f"{path} is neither a PyTorch nor a safetensors file (it starts with {start!r}): "
            "download it again, and check that it is not an error page."
        )
    torch = _torch()
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged or holds more than tensors, which could execute code on loading: "
            "save only the network's state_dict()."
        ) from error
    except Exception as error:  # torch raises errors of many types for damaged files.
        raise UserError(
            f"{path} is not a complete PyTorch file ({type(error).__name__}): download it again."
        ) from error
    while isinstance(loaded, Mapping):
        key = next((k for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if key is None:
            break
        logging.info("%s: reading the state dict under %r.", path, key)
        loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and torch.is_tensor(a) and a.layout == torch.strided
        for name, a in loaded.items()
    ):
        raise UserError(f"{path} holds no state dict of tensors: save the network's state_dict().")
    # NumPy supports neither bfloat16 nor quantised tensors.
    wide = {name: a.dequantize() if a.is_quantized else a.double() for name, a in loaded.items()}
    return {name: a.detach().numpy() for name, a in wide.items()}


def check_suffix(path: str) -> None:
    """Raises UserError for a file that `write_torch` cannot write."""
    if not path.endswith((".pt", ".safetensors")):
        raise UserError(f"{path} does not end in .pt or .safetensors: rename it.")


def write_torch(path: str, state: StateDict) -> None:
    """Writes a state dict atomically, for `torch.load` (.pt) or as .safetensors."""
    if path.endswith(".safetensors"):
        # safetensors.numpy.save ignores the strides of an array.
        state = {name: np.asarray(a, order="C") for name, a in state.items()}
        weight_files.write_file(path, safetensors.numpy.save(state))
        return
    torch = _torch()
    with io.BytesIO() as file:
        torch.save({name: torch.from_numpy(a.copy()) for name, a in state.items()}, file)
        weight_files.write_file(path, file.getvalue())


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            "PyTorch, which all files except safetensors need, is not installed: pip install -e "
            "'.[torch]'."
        ) from error
    return torch


# ------------------------------------------------------------------------ the command


def import_file(network: str, source: str, out: str) -> str:
    """Converts a PyTorch file to weights for `corruption_nets.make`.

    Args:
      network: 'edsr', 'cae' or a preset.
      source: the file with a state dict.
      out: the weights file to write.

    Returns:
      A summary line.

    Raises:
      UserError: the file is missing, damaged or of another network.
    """
    state = read_torch(source)
    preset = preset_of(network, state)
    theta = from_torch(preset, state)
    content = pathlib.Path(source).read_bytes()
    metadata = {
        "corruption_net": preset,
        "imported_from": os.path.basename(source),
        "imported_sha256": hashlib.sha256(content).hexdigest(),
    }
    digest = weight_files.save_weights(out, theta, metadata)
    leaves = jax.tree.leaves(theta)
    count = sum(leaf.size for leaf in leaves)
    return f"{out}: {preset}, {count:,} numbers in {len(leaves)} leaves, digest {digest[:16]}"


def import_classifier(
    classifier: str, source: str, out: str, mean: Sequence[float], std: Sequence[float]
) -> str:
    """Converts a PyTorch file to weights for `config.init_weights` and `evaluate --weights`.

    Args:
      classifier: one of `classifiers.names()`.
      source: the file with a state dict in the layout of `torch_layouts.layout(classifier)`.
      out: the weights file to write.
      mean: channel means of images in [0,1], by which the network's input is normalised.
      std: channel standard deviations.

    Returns:
      A summary line.

    Raises:
      UserError: the file is missing, damaged, of another network or of other normalisation.
    """
    torch_layouts.layout(classifier)
    state = _without_prefix(read_torch(source))
    state = _without_prefix(_without_normalisation(state, mean, std))
    if unused := [name for name in state if name.startswith("sub_block1.")]:  # of TRADES
        logging.info("%s: ignoring sub_block1, which the network does not use.", source)
        state = {name: a for name, a in state.items() if name not in unused}
    tree = torch_layouts.from_torch(classifier, state)
    digest = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()
    metadata = {
        "classifier": classifier,
        "classes": torch_layouts.num_classes(classifier, state),
        "mean": list(mean),
        "std": list(std),
        "imported_from": os.path.basename(source),
        "imported_sha256": digest,
        "recipe": digest,  # Runs of several seeds that start from it are repetitions.
    }
    weight_files.save_weights(out, tree, metadata)
    count = sum(leaf.size for leaf in jax.tree.leaves(tree["params"]))
    return (
        f"{out}: {classifier} with {metadata['classes']} classes, {count:,} parameters; use it "
        f"with --config.init_weights={shlex.quote(out)} --config.classifier={classifier} "
        f'--config.mean="{tuple(mean)}" --config.std="{tuple(std)}"'
    )


def _without_normalisation(
    state: StateDict, mean: Sequence[float], std: Sequence[float]
) -> StateDict:
    """Checks and drops the mean and standard deviation that RobustBench's models store."""
    state = dict(state)
    for names in _NORMALISATION:
        for name, flag, asked in zip(names, ("mean", "std"), (mean, std), strict=True):
            stored = state.pop(name, np.asarray(asked)).ravel().tolist()
            if len(stored) != 3 or not np.allclose(stored, asked, atol=1e-6):
                raise UserError(
                    f"The file's {name} is {stored}, and --{flag} is {list(asked)}: use the file's."
                )
    return state


def _classifier_flags() -> tuple[str, list[float], list[float]]:
    """--classifier, --mean and --std, checked."""
    values = flags.FLAGS
    if values.classifier not in classifiers.names():
        raise UserError(
            f"--classifier={values.classifier} is unknown: choose one of "
            f"{', '.join(classifiers.names())}."
        )
    for name, least in (("mean", 0), ("std", 1e-6)):
        given = values[name].value or []
        try:
            numbers = [float(number) for number in given]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or not all(least <= number <= 1 for number in numbers):
            raise UserError(
                f"--{name}={','.join(given)} must be three numbers, one per channel of images in "
                "[0,1], by which the network was trained to normalise its input: give them, such "
                "as --mean=0.4914,0.4822,0.4465 --std=0.2471,0.2435,0.2616, or --mean=0,0,0 "
                "--std=1,1,1 for none."
            )
    mean, std = ([float(number) for number in values[name].value] for name in ("mean", "std"))
    return values.classifier, mean, std


def export_file(network: str, source: str, out: str) -> str:
    """Converts weights to a PyTorch file.

    Args:
      network: one of `corruption_nets.names()`.
      source: the weights file.
      out: the .pt or .safetensors file to write.

    Returns:
      A summary line.

    Raises:
      UserError: the network is unknown, or a file cannot be read or written.
    """
    check_suffix(out)
    if network == "edsr":
        raise UserError("'edsr' is not a preset: give the one to export, such as edsr_baseline_x4.")
    net = corruption_nets.make(network, weights=source)
    state = to_torch(network, net.theta)
    write_torch(out, state)
    return f"{out}: {network}, {len(state)} tensors for load_state_dict"


def main(argv: list[str]) -> None:
    """Imports or exports a file."""
    if len(argv) != 4:
        raise UserError(
            "There must be three arguments: NETWORK IN OUT, such as edsr edsr_baseline_x4.pt OUT."
        )
    _, network, source, out = argv
    if network not in _NETWORKS:
        raise UserError(f"{network!r} is unknown: choose one of {', '.join(_NETWORKS)}.")
    paths.check_bucket(out, out)
    if paths.exists(out):
        raise UserError(f"{out} exists and is not overwritten: rename it or give another file.")
    if network != "classifier":
        for name in ("classifier", "mean", "std"):
            if flags.FLAGS[name].value is not None:
                raise UserError(f"--{name} does not apply to {network}: leave it out.")
        print((export_file if flags.FLAGS.export else import_file)(network, source, out))
    elif flags.FLAGS.export:
        raise UserError(
            "--export is for corruption networks: use python -m ada_jax.export_weights."
        )
    else:
        classifier, mean, std = _classifier_flags()
        print(import_classifier(classifier, source, out, mean, std))


if __name__ == "__main__":
    flags.DEFINE_bool("export", False, "Whether to convert to PyTorch instead of from it.")
    flags.DEFINE_string("classifier", None, "The classifier's architecture.")
    flags.DEFINE_list("mean", None, "Channel means of the classifier's input, images in [0,1].")
    flags.DEFINE_list("std", None, "Channel standard deviations of the classifier's input.")
    cli.start(main, arguments=True)
