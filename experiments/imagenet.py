"""ImageNet: a ResNet50 on crops of 128x128 pixels, trained with AdA and EDSR.

    python -m ada_jax.train --config=experiments/imagenet.py
    python -m ada_jax.train --config=experiments/imagenet.py:nominal

After the colon: words of experiments/cifar10.py, joined by '+':
  ada                  AdA with EDSR (the default)
  augmix               AugMix, after AdA if both are given
  nominal              neither
  random               random perturbations in AdA's ball, for comparison
  linf_at, l2_at       adversarial training by PGD, for comparison
  advmix               AdvMix in AdA's terms, for comparison
  small                a small network and crops of 64 pixels, to test the input on two CPU cores

From the paper's later version: the network (a standard ResNet50), standard augmentation and crops
of 128 pixels. All other settings are ours: batch 1024, 90 epochs, a peak learning rate of 0.4 after
5 epochs of warm-up, weight decay 1e-4 and momentum 0.9 (Goyal et al., 2017, with a cosine
schedule); random crops of 8% to 100% of the area with ratios of 3:4 to 4:3 (Szegedy et al., 2015);
the paper's radius, steps and step size of AdA on CIFAR-10; AugMix's severity for ImageNet, 1;
bfloat16 convolutions.

What to expect: no model has been trained on ImageNet here, so there is no error rate. With AdA the
run is long: according to the TPU compiler (ada_jax.plan with --topology=v3:4x4), a v3-32 uses half
of each core's memory and takes at least 7 seconds a step, nine days in all. Most of it is due to
`--config.ada.steps`.

Evaluation uses the central square of 0.875 of the shorter side. The images of ImageNet-C, which are
such squares of 224 pixels, are resized without cropping. On the fly the squares are corrupted at
224 pixels too, but not saved as JPEG in between.

ImageNet is read from TFDS, which prepares it once from the two archives of image-net.org, and so is
ImageNet-C with `--config.eval_c_dir=tfds` (see README.md in this folder). A folder with the same
images (train/CLASS/*.JPEG and val/CLASS/*.JPEG) works as well:
    --config.dataset=folder --config.data_dir=FOLDER --config.eval_split=val
It is evaluated on the whole central squares, corrupted at the training size.
"""

import pathlib
import re
import runpy

import ml_collections


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The CIFAR-10 config with the changes for ImageNet."""
    known = ("ada", "augmix", "nominal", "random", "linf_at", "l2_at", "advmix", "small")
    for word in re.findall(r"[^+,]+", words):
        if word not in known:
            raise ValueError(
                f"--config=experiments/imagenet.py:{words} has the word {word!r}, which is not for "
                f"ImageNet: choose from {', '.join(known)}."
            )
    config = _cifar10(words).unlock()
    config.name = config.name.replace("cifar10", "imagenet")

    # Data. Images are cropped when they are decoded, and flipped on the device.
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

    config.ada.microbatch = 8  # EDSR's features are 512x512; it has its own batch statistics
    config.augmix.severity = 1.0

    # Bookkeeping.
    config.corruption_table = "imagenet"
    config.eval_batch_size = 1024

    if "small" in words:
        small(config)
    return config.lock()


def small(config: ml_collections.ConfigDict) -> None:
    """Sets a small network and small crops for two CPU cores."""
    config.image_size = 64
    config.classifier = "resnet9"
    config.compute_dtype = "float32"
    config.batch_size = 128
    config.ada.microbatch = 0
    config.eval_batch_size = 256


def _cifar10(words: str) -> ml_collections.ConfigDict:
    path = pathlib.Path(__file__).with_name("cifar10.py")
    return runpy.run_path(str(path))["get_config"](words)
