"""DeepAugment's images of CIFAR-10: what distorted EDSR and CAE networks make of each.

    python -m ada_jax.deepaugment --config=experiments/deepaugment.py --copies=10
    python -m ada_jax.deepaugment --config=experiments/deepaugment.py:small

The set comes to runs/deepaugment, where experiments/cifar10.py:deepaugment and :deepaugment10x look
for it. Words after the colon: small, a small EDSR for two CPU cores; gpu, the EDSR of
experiments/cifar10.py:gpu.

The set must be made from the images that are trained on: give both commands the same
--config.dataset, --config.data_dir and --config.train_split.
"""

import ml_collections

_EDSR = {"": "edsr_baseline_x4", "small": "edsr_small", "gpu": "edsr_medium"}


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The config; every knob of the binary is here."""
    if words not in _EDSR:
        raise ValueError(
            f"--config=experiments/deepaugment.py:{words} has an unknown word: leave it out, or "
            "write small or gpu."
        )
    config = ml_collections.ConfigDict()
    config.name = "deepaugment"
    config.seed = 0
    config.dataset = "cifar10"
    config.data_dir = ""
    config.train_split = "train"
    config.image_size = 32  # pixels, for the data set 'folder'
    config.copies = 1  # of every image and network; the paper's 10x are 10
    config.nets = (_EDSR[words], "cae")
    config.weights = ("", "")  # safetensors files; '' takes the shipped one
    # Factors by which images are enlarged for the network. At 32x32 the CAE alone, undistorted,
    # makes a nominal classifier err on 41% of images that it errs on 14% of; enlarged twice, 22%.
    config.enlarge = (1, 2)
    config.group = 20  # images that share a distortion of the weights
    config.quirks = False  # follow the published code also where it does other than it says
    config.shard_images = 10_000  # in a file; a stopped run makes at most one file anew
    config.compilation_cache = "~/.cache/ada_jax"
    # Devices a CPU is split into; 0 leaves it one, and needs the GPU of a machine that has one.
    config.cpu_devices = 0 if words == "gpu" else 2
    return config.lock()
