"""DeepAugment's images of CIFAR-10, rendered by distorted EDSR and CAE networks.

    python -m ada_jax.deepaugment --config=experiments/deepaugment.py --copies=10
    python -m ada_jax.deepaugment --config=experiments/deepaugment.py:small

The set is written to runs/deepaugment, from which experiments/cifar10.py:deepaugment and
:deepaugment10x read it. Words after the colon: small, a small EDSR for two CPU cores; gpu, the EDSR
of experiments/cifar10.py:gpu.

The set must be made from the training images: give both commands the same --config.dataset,
--config.data_dir and --config.train_split.
"""

import ml_collections

_EDSR = {"": "edsr_baseline_x4", "small": "edsr_small", "gpu": "edsr_medium"}


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The config with all fields of `ada_jax.deepaugment`."""
    if words not in _EDSR:
        raise ValueError(
            f"--config=experiments/deepaugment.py:{words} has an unknown word: choose small or "
            "gpu, or leave it out."
        )
    config = ml_collections.ConfigDict()
    config.name = "deepaugment"
    config.seed = 0
    config.dataset = "cifar10"
    config.data_dir = ""
    config.train_split = "train"
    config.image_size = 32  # pixels, for the data set 'folder'
    config.copies = 1  # of every image and network; 10 for the paper's 10x
    config.nets = (_EDSR[words], "cae")
    config.weights = ("", "")  # safetensors files; '' is the shipped one
    # Factors by which images are enlarged for the network. At 32x32 the CAE alone, undistorted,
    # raises a nominal classifier's error from 14% to 41%; enlarged twice, to 22%.
    config.enlarge = (1, 2)
    config.group = 20  # images that share a distortion of the weights
    config.quirks = False  # reproduce the published code's known bugs
    config.shard_images = 10_000  # images per file; a resumed run rewrites at most one file
    config.compilation_cache = "~/.cache/ada_jax"  # JAX_COMPILATION_CACHE_DIR takes precedence
    # Number of devices that a CPU is split into; 0 does not split it, and uses a GPU if present.
    config.cpu_devices = 0 if words == "gpu" else 2
    return config.lock()
