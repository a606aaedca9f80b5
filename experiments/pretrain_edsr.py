"""Trains weights for EDSR corruption networks, by mild denoising and super-resolution.

    python -m ada_jax.pretrain --config=experiments/pretrain_edsr.py
    python -m ada_jax.pretrain --config=experiments/pretrain_edsr.py:edsr_baseline_x4

The word after the colon is a network of `ada_jax/nets/corruption_nets.py`, edsr_small by default.
The weights are written to runs/pretrain_NETWORK/NETWORK.safetensors, for
`config.ada.corruption_weights`. The images are the photographs that scikit-image ships, so nothing
is downloaded.

The shipped edsr_small was trained on CIFAR-10's training images, without the last 5,000:

    python -m ada_jax.pretrain --config=experiments/pretrain_edsr.py --config.dataset=cifar10 \\
        --config.train_split='train[:45000]' --config.eval_split='train[45000:]'

What to expect: 7 minutes on two CPU cores; PSNR 57.6 dB and SSIM 0.9999 on the held-out images. The
shipped edsr_medium was trained with the same command and ':edsr_medium': 6,000 steps, PSNR 61.3 dB.
"""

import ml_collections


def get_config(preset: str = "edsr_small") -> ml_collections.ConfigDict:
    """The config with all fields of `ada_jax.pretrain`."""
    if preset == "cae":
        raise ValueError("The CAE has its own config: use --config=experiments/pretrain_cae.py.")
    return _config(preset).lock()


def _config(preset: str) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.corruption_net = preset or "edsr_small"
    config.name = f"pretrain_{config.corruption_net}"
    config.seed = 0

    # Data. 'photos' are scikit-image's photographs, one of them held out ('test'); 'div2k' is
    # TFDS's (800 'train', 100 'validation'); otherwise any data set of ada_jax.train.
    config.dataset = "photos"
    config.data_dir = ""
    config.train_split = "train"
    config.eval_split = "test"
    config.image_size = 32  # pixels, for the data set 'folder'
    config.tiles = 4096  # maximum number of squares cut from a photograph of 'photos' or 'div2k'

    # Denoising at the input's size: the loss compares outputs for noisy patches with clean ones.
    config.loss = "l1"  # or 'mse'
    config.batch_size = 16
    config.patch = 32  # pixels
    config.noise = 0.02  # its standard deviation is uniform in [0, noise]; 1 is white

    # Super-resolution by the network's scale, if that is more than 1, on additional patches.
    config.sr_weight = 1.0  # 0 disables it
    config.sr_batch_size = 8
    config.sr_patch = 48  # pixels after the enlargement

    # Adam.
    config.train_steps = 12000
    config.learning_rate = 3e-3
    config.schedule = "cosine"  # to 0 at the last step, or 'halving' every halve_steps
    config.halve_steps = 3000
    config.warmup_steps = 100
    config.weight_decay = 0.0  # added to the gradient, as PyTorch's Adam does

    # Bookkeeping.
    config.store_dtype = "float32"  # or 'float16', half the size
    config.log_steps = 100
    config.eval_steps = 1000
    config.eval_batch_size = 50
    config.checkpoint_steps = 1000
    config.keep_checkpoints = 2
    config.compilation_cache = "~/.cache/ada_jax"  # JAX_COMPILATION_CACHE_DIR takes precedence

    if config.corruption_net == "edsr_medium":
        config.train_steps = 6000
    if config.corruption_net.startswith("edsr_baseline"):
        baseline(config)
    return config


def baseline(config: ml_collections.ConfigDict) -> None:
    """Sets the schedule for the paper's network."""
    config.batch_size = 4
    config.train_steps = 2000
    config.learning_rate = 3e-4
    config.eval_batch_size = 25
    config.eval_steps = 500
    config.checkpoint_steps = 250
    config.store_dtype = "float16"
