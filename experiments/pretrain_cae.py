"""Trains weights for DeepAugment's CAE, an autoencoder with two random bits per pixel.

    python -m ada_jax.pretrain --config=experiments/pretrain_cae.py

The weights are written to runs/pretrain_cae/cae.safetensors, for `config.ada.corruption_weights`.
The shipped ones were trained on CIFAR-10's training images at 32x32, without the last 5,000:

    python -m ada_jax.pretrain --config=experiments/pretrain_cae.py --config.dataset=cifar10 \\
        --config.train_split='train[:45000]' --config.eval_split='train[45000:]'

The published network was trained for 5.8 million steps on 128x128 patches of video frames (learning
rate 1e-4).
"""

import pathlib
import runpy

import ml_collections


def get_config(preset: str = "cae") -> ml_collections.ConfigDict:
    """The EDSR config with the CAE's loss and schedule."""
    if preset not in ("", "cae"):
        raise ValueError(
            f"--config=experiments/pretrain_cae.py:{preset} trains the CAE only: use "
            f"--config=experiments/pretrain_edsr.py:{preset}."
        )
    config = _edsr("cae")
    config.loss = "mse"
    config.noise = 0.0
    config.sr_weight = 0.0
    config.weight_decay = 0.0  # the published network's was 1e-5
    config.batch_size = 16
    config.train_steps = 9000
    config.learning_rate = 1e-3
    config.store_dtype = "float16"
    return config.lock()


def _edsr(preset: str) -> ml_collections.ConfigDict:
    path = pathlib.Path(__file__).with_name("pretrain_edsr.py")
    return runpy.run_path(str(path))["_config"](preset)
