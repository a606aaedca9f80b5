"""Lists the commands: `python -m ada_jax`."""

COMMANDS = {
    "train": "train a classifier, with AdA or without",
    "evaluate": "measure a classifier on clean and corrupted images, and under attack",
    "report": "tables and figures from results files",
    "sweep": "run or print the points of a sweep",
    "corruptions": "write a data set with the common corruptions",
    "deepaugment": "write DeepAugment's images of a data set",
    "pretrain": "train the weights of a corruption network",
    "import_weights": "convert classifiers from PyTorch, and corruption networks from and to it",
    "export_weights": "convert a trained classifier to PyTorch",
    "study": "measure how strong a corruption network's perturbations are",
    "plan": "check whether a config fits on a TPU, without a TPU",
    "benchmark": "measure the speed of the package on this machine",
}

if __name__ == "__main__":
    for name, purpose in COMMANDS.items():
        print(f"python -m ada_jax.{name:<15} {purpose}")
    print(
        "\nEach has --help. Start with: python -m ada_jax.train --config=experiments/quickstart.py"
    )
