"""Lists the commands: `python -m ada_jax`."""

COMMANDS = {
    "train": "train a classifier, with AdA or without",
    "evaluate": "measure a classifier on clean and corrupted images, and under attack",
    "report": "tables and figures from results files",
    "sweep": "run or print the points of a sweep",
    "corruptions": "write a data set with the common corruptions",
    "deepaugment": "write DeepAugment's images of a data set",
    "pretrain": "train a corruption network's weights",
    "import_weights": "convert corruption networks from and to PyTorch",
    "study": "measure how far corruption networks reach",
    "plan": "tell without a TPU whether a config fits on one",
    "benchmark": "measure this machine",
}

if __name__ == "__main__":
    for name, does in COMMANDS.items():
        print(f"python -m ada_jax.{name:<15} {does}")
    print(
        "\nEach has --help. Start with: python -m ada_jax.train --config=experiments/quickstart.py"
    )
