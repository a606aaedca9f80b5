"""Converts a trained classifier to PyTorch: a state dict, and a model.py that loads it.

python -m ada_jax.export_weights runs/cifar10_ada OUT.pt
python -m ada_jax.export_weights runs/cifar10_ada OUT.safetensors     # does not need PyTorch
python -m ada_jax.export_weights CLASSIFIER.safetensors OUT.pt        # of a run, or imported

The names and shapes are those of widespread PyTorch code, see `nets.torch_layouts`. `model.load()`
returns the network, with the normalisation of its input, in evaluation mode.
"""

import json
import os
import pathlib
from collections.abc import Sequence

from ada_jax import checks, paths
from ada_jax.errors import UserError
from ada_jax.import_weights import check_suffix, write_torch
from ada_jax.nets import torch_layouts, weight_files
from ada_jax.run import cli

_MODELS = pathlib.Path(__file__).parent / "nets" / "torch_models"

_IMPORTS = "import pathlib\n\nimport torch\nfrom torch import nn\n"
_CLASSIFIER = """

WEIGHTS = pathlib.Path(__file__).with_name({file})
CLASS_NAMES = {class_names}
MEAN, STD = {mean}, {std}  # of the training images, in [0,1]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Network({arguments})
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images - self.mean) / self.std)


def load(path=WEIGHTS) -> Classifier:
    \"\"\"The classifier: images [B,3,H,W] in [0,1] to logits, in the order of CLASS_NAMES.\"\"\"
    classifier = Classifier()
    classifier.network.load_state_dict({read})
    return classifier.eval()
"""
_READ = {
    ".pt": 'torch.load(path, map_location="cpu", weights_only=True)',
    ".safetensors": "load_file(path)",
}


def model_file(
    classifier: str,
    classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    file: str,
    class_names: Sequence[str] = (),
) -> str:
    """The content of model.py, which defines the network in PyTorch and loads its weights.

    Args:
      classifier: one of `classifiers.names()`.
      classes: the number of logits.
      mean: three channel means of the network's input.
      std: three channel standard deviations.
      file: name of the weights file, which ends in .pt or .safetensors.
      class_names: in the order of the logits.

    Raises:
      UserError: PyTorch has no such network.
    """
    layout = torch_layouts.layout(classifier)
    if layout.source.endswith(".py"):
        content = (_MODELS / layout.source).read_text()
        content = content.replace("import torch\n", "import pathlib\n\nimport torch\n", 1)
    else:
        content = f'"""torchvision\'s network."""\n\n{_IMPORTS}{layout.source}'
    suffix = pathlib.PurePath(file).suffix
    if suffix == ".safetensors":
        content = content.replace(
            "import torch\n", "import torch\nfrom safetensors.torch import load_file\n", 1
        )
    return content + _CLASSIFIER.format(
        arguments=", ".join(filter(None, [f"num_classes={classes}", layout.arguments])),
        mean=[float(value) for value in mean],
        std=[float(value) for value in std],
        file=json.dumps(file, ensure_ascii=False),
        class_names=json.dumps(list(class_names), ensure_ascii=False),
        read=_READ[suffix],
    )


def export(source: str, out: str) -> str:
    """Writes a classifier's state dict and, beside it, model.py.

    Args:
      source: a run's folder, or a classifier's weights with their metadata.
      out: the file to write, .pt or .safetensors; it and model.py must not exist.

    Returns:
      A summary line.

    Raises:
      UserError: the weights are missing or damaged, PyTorch has no such network or is not
        installed, or the files exist or cannot be written.
    """
    model = os.path.join(os.path.dirname(out), "model.py")
    _check_out(out, model)
    if paths.is_dir(source):
        source = os.path.join(source, "classifier.safetensors")
        if not paths.exists(source):
            raise UserError(f"{source} does not exist: train the run to its end first.")
    tree, metadata = weight_files.load_weights(source)
    if "corruption_net" in metadata:
        raise UserError(
            f"The weights file {source} is of a corruption network: use python -m "
            "ada_jax.import_weights --export."
        )
    if missing := {"classifier", "classes", "mean", "std"} - metadata.keys():
        raise UserError(
            f"The weights file {source} lacks the field {min(missing)!r}: export a run of "
            "ada_jax.train, or weights of ada_jax.import_weights."
        )
    classifier, classes = metadata["classifier"], metadata["classes"]
    checks.check_integers(2, classes=classes)  # It becomes a part of model.py.
    content = model_file(
        classifier,
        classes,
        mean=metadata["mean"],
        std=metadata["std"],
        file=os.path.basename(out),
        class_names=metadata.get("class_names", ()),
    )
    state_dict = torch_layouts.to_torch(classifier, tree["params"], tree["state"])
    write_torch(out, state_dict)
    weight_files.write_file(model, content)
    return (
        f"{out}: {classifier} with {classes} classes, {len(state_dict)} tensors; {model} loads it"
    )


def _check_out(out: str, model: str) -> None:
    check_suffix(out)
    paths.check_bucket(out, out)
    for path in (out, model):
        if paths.exists(path):
            raise UserError(f"{path} exists and is not overwritten: give a file in another folder.")


def main(argv: list[str]) -> None:
    """Exports a classifier."""
    if len(argv) != 3:
        raise UserError("There must be two arguments: RUN OUT, such as runs/cifar10_ada OUT.pt.")
    print(export(*argv[1:]))


if __name__ == "__main__":
    cli.start(main, arguments=True)
