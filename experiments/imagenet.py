"""ImageNet: a ResNet50 on crops of 128x128 pixels, trained with AdA through EDSR.

    python -m ada_jax.train --config=experiments/imagenet.py
    python -m ada_jax.train --config=experiments/imagenet.py:nominal

After the colon words of experiments/cifar10.py, joined by '+':
  ada                  AdA, through EDSR (the default)
  augmix               AugMix, after AdA if that is there
  nominal              neither
  random               random perturbations in AdA's ball, for comparison
  linf_at, l2_at       adversarial training by PGD, for comparison
  small                a small network and crops of 64 pixels, to try the input on two CPU cores

The paper's later version names the network (a standard ResNet50), standard augmentation and the
crops of 128 pixels. All other numbers are ours: batch 1024, 90 epochs, a peak learning rate of 0.4
after 5 epochs of warm-up, weight decay 1e-4 and momentum 0.9 (Goyal et al., 2017, with a cosine);
random crops of 8% to 100% of the area and 3:4 to 4:3 in shape (Szegedy et al., 2015); AdA's radius,
steps and step, which are the paper's for CIFAR-10; AugMix's severity 1, which is AugMix's own for
ImageNet; bfloat16 convolutions.

What to expect: no error rate, for nothing here has been trained on ImageNet. With AdA the run is
long: the TPU compiler's figures for a v3-32 (ada_jax.plan with --topology=v3:4x4) are half of each
core's memory and at least 7 seconds a step, nine days in all. `--config.ada.steps` is most of it.

Evaluation takes the central square of 0.875 of the shorter side. ImageNet-C's images, which are
such squares of 224 pixels, are resized whole; on the fly the squares are corrupted at 224 pixels
too, but not saved as JPEG between.

ImageNet comes through TFDS, prepared once from the two archives of image-net.org; so does
ImageNet-C for `--config.eval_c_dir=tfds`, a set for each corruption and severity. README.md
beside this file says how. A folder of the same images (train/CLASS/*.JPEG beside
val/CLASS/*.JPEG) works as well:
    --config.dataset=folder --config.data_dir=FOLDER --config.eval_split=val
It is evaluated on whole central squares, and corrupted at the size that is trained on.
"""

import pathlib
import runpy

import ml_collections


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The CIFAR-10 config with what ImageNet changes."""
    if "deepaugment" in words:
        raise ValueError(
            f"--config=experiments/imagenet.py:{words} asks for DeepAugment's images, which are "
            "made for sets that fit in memory: leave that word out."
        )
    config = _cifar10(words).unlock()
    config.name = config.name.replace("cifar10", "imagenet")

    # Data. Images are flipped on the device, cropped as they are decoded.
    config.dataset = "imagenet2012"
    config.eval_split = "validation"
    config.image_size = 128
    config.pad = 0
    config.crop_scale = (0.08, 1.0)

    # Classifier.
    config.classifier = "resnet50"
    config.mean = (0.485, 0.456, 0.406)
    config.std = (0.229, 0.224, 0.225)
    config.bn_decay = 0.9
    config.compute_dtype = "bfloat16"

    # Outer minimisation.
    config.epochs = 90.0
    config.batch_size = 1024
    config.learning_rate = 0.1
    config.warmup_epochs = 5.0
    config.weight_decay = 1e-4

    config.ada.microbatch = 8  # with its own batch statistics, for EDSR's features are 512x512
    config.augmix.severity = 1.0

    # Bookkeeping.
    config.corruption_table = "imagenet"
    config.eval_batch_size = 1024

    if "small" in words:
        small(config)
    return config.lock()


def small(config: ml_collections.ConfigDict) -> None:
    """A network that two CPU cores can train, on smaller crops."""
    config.image_size = 64
    config.classifier = "resnet9"
    config.compute_dtype = "float32"
    config.batch_size = 128
    config.ada.microbatch = 0
    config.eval_batch_size = 256


def _cifar10(words: str) -> ml_collections.ConfigDict:
    path = pathlib.Path(__file__).with_name("cifar10.py")
    return runpy.run_path(str(path))["get_config"](words)
