"""The paper's CIFAR-10 set-up (appendix A): PreActResNet50 trained with AdA and EDSR.

    python -m ada_jax.train --config=experiments/cifar10.py
    python -m ada_jax.train --config=experiments/cifar10.py:small
    python -m ada_jax.train --config=experiments/cifar10.py:ada+augmix,gpu

After the colon: the words of a row of the paper's table 1, joined by '+', and a preset after a
comma:
  ada                          AdA with EDSR (the default)
  augmix                       AugMix, after AdA if both are given
  deepaugment, deepaugment10x  1 or 10 copies of the images written by ada_jax.deepaugment
  nominal                      none of these
  random                       random perturbations in AdA's ball, for comparison
  linf_at, l2_at               adversarial training by PGD, for comparison (table 3)
  pat_self, pat_alexnet        perceptual adversarial training, bounded by the classifier's own
                               features or by those of an AlexNet, the row below trained first
  rlat                         relaxed LPIPS adversarial training, after AugMix if both are given
  alexnet                      'nominal' with an AlexNet; with ',small' of a quarter of its width
  advmix                       AdvMix in AdA's terms, for comparison (appendix C); with ada, one of
                               the two is drawn for each batch
  best                         AdA, AugMix with a consistency loss and noise, chosen by the study
                               experiments/sweeps/best.py
  small                        a network and a schedule for two CPU cores
  gpu                          a network and a schedule for one GPU of 24 GB or more

What to expect: the paper reports 3.8% clean error and 12.5% mCE for AdA. A full run takes about
2e18 floating-point operations, for a TPU slice or several GPUs (it fits in a v3-8's memory;
launch/README.md has the TPU compiler's figures). ':small' takes about forty minutes on two cores.
':gpu' trained four rows at once on one H100 in seven minutes, to a clean error and mCE of 6.9% and
29.6% for 'nominal', and of 5.4% and 16.1% for 'ada'.

Without the official test set (CIFAR-10 prepared from its training images only) add
    --config.train_split='train[:45000]' --config.eval_split='train[45000:]'
"""

import re

import ml_collections

ROWS = (
    "nominal",
    "augmix",
    "deepaugment",
    "deepaugment+augmix",
    "deepaugment10x",
    "deepaugment10x+augmix",
    "ada",
    "ada+augmix",
    "ada+deepaugment+augmix",
    "ada+deepaugment10x+augmix",
)

PRESETS = ("small", "gpu")

# Words for comparison, and the methods that words of attacks select.
ATTACKS = {
    "ada": "ada",
    "random": "ada",
    "linf_at": "pgd",
    "l2_at": "pgd",
    "pat_self": "pat",
    "pat_alexnet": "pat",
    "rlat": "rlat",
    "advmix": "ada",
    "best": "ada",
}

COMPARISONS = (
    *(word for word in ATTACKS if word != "ada"),
    *("rlat+augmix", "rlat+deepaugment", "ada+advmix", "advmix+augmix", "alexnet"),
)


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The config with all fields of `ada_jax.train`, and the paper's values where it gives them."""
    chosen = _chosen(words)
    config = ml_collections.ConfigDict()
    row = "+".join(word for word in chosen if word not in PRESETS)
    config.name = "_".join(["cifar10", row, *(word for word in chosen if word in PRESETS)])
    config.seed = 0

    # Data. data_dir '' takes TFDS's own folder (or TFDS_DATA_DIR); slices are allowed.
    config.dataset = "cifar10"
    config.data_dir = ""
    config.train_split = "train"
    config.eval_split = "test"
    config.image_size = 32  # pixels, for the data sets 'folder' and 'imagenet2012'
    config.pad = 4  # pixels of zeros around the image before the random crop
    config.crop_scale = ()  # range of the area of random crops of photographs; () disables them
    config.crop_ratio = (3 / 4, 4 / 3)  # range of their width over height
    config.flip = True

    # Classifier. mean and std normalise its input.
    config.classifier = "preact_resnet50"
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2471, 0.2435, 0.2616)
    config.bn_decay = 0.99
    config.cross_replica_bn = False
    config.zero_init_logits = False
    config.compute_dtype = "float32"  # type of convolutions, or 'bfloat16'; all else is float32
    config.init_weights = ""  # a run's folder or a safetensors file to start from; '' is random

    # Outer minimisation. Set either epochs or train_steps; the other is 0.
    config.epochs = 300.0
    config.train_steps = 0
    config.batch_size = 256  # over all devices
    config.learning_rate = 0.1  # scaled by batch_size / 256 if that is more than 1
    config.warmup_epochs = 5.0
    config.momentum = 0.9
    config.weight_decay = 1e-4
    config.weight_decay_bn = False  # also decay batch-norm scales and offsets
    config.label_smoothing = 0.0  # share of the labels that is spread evenly over all classes
    # Decay per step of averaged weights, which are evaluated beside the last ones; 0 has none.
    config.ema_decay = 0.0

    # Inner maximisation.
    config.method = next((ATTACKS[word] for word in chosen if word in ATTACKS), "nominal")
    config.ada = ml_collections.ConfigDict()
    config.ada.corruption_net = ("edsr_baseline_x4",)  # if several, one is drawn for each batch
    config.ada.corruption_weights = ("",)  # safetensors files; '' is the shipped one
    config.ada.corruption_enlarge = (1,)  # factors by which images are enlarged for the network
    config.ada.nu = 0.015  # radius of each leaf's ball, relative to the leaf's norm
    config.ada.steps = 0 if "random" in chosen else 10
    config.ada.step_rule = "sign"  # 'sign' (paper) or 'l2' (per leaf)
    config.ada.step_scale = 0.25  # of the median radius ('sign') or of the leaf's own ('l2')
    config.ada.batch_norm = "batch"  # statistics in the attack: 'batch' or 'running'
    # Attack every n-th example; the others are not augmented by AdA. With batch_norm 'batch' the
    # statistics in the attack are those of the attacked examples.
    config.ada.every = 1
    # Consecutive examples that share a perturbation, a weaker attack; 1 is the paper's. It divides
    # the examples that a device attacks at a time.
    config.ada.group = 1
    # Regular expression for the perturbed leaves of the network, found in paths such as
    # 'block00/conv0/w' and, with several networks, in each: '' is all, 'b$' the biases, '^tail/'
    # the last layer, '^block' the residual blocks of EDSR.
    config.ada.leaves = ""
    # What the attack chooses: 'delta' (the paper's), or 'mixing', weights of random perturbations
    # (AdvMix, see ada.maximise). If both, one is drawn for each batch.
    choices = {"ada": "delta", "advmix": "mixing"}
    config.ada.choice = tuple(choices[word] for word in chosen if word in choices) or ("delta",)
    config.ada.ssim_threshold = 0.3  # the line search restores about this SSIM; -1 disables it
    config.ada.root_rule = "in_range"  # or 'interpolated', 'paper': see ada_jax/ssim.py
    config.ada.microbatch = 0  # examples attacked at a time on a device; 0 is all
    config.ada.remat = (
        False  # recompute features in the backward pass; microbatch saves more memory
    )

    # Adversarial training in a ball of pixels, for comparison.
    config.pgd = ml_collections.ConfigDict()
    config.pgd.norm = "l2" if "l2_at" in chosen else "linf"
    config.pgd.epsilon = 1.0 if "l2_at" in chosen else 8 / 255  # as in Laidlaw et al.
    config.pgd.steps = 10
    config.pgd.step_scale = 0.25  # relative to epsilon
    config.pgd.batch_norm = "batch"  # as for ada

    # Perceptual adversarial training (PAT), for comparison: Fast-LPA within a distance (LPIPS) in
    # the features of a network. The constants are those of Laidlaw et al.
    config.pat = ml_collections.ConfigDict()
    config.pat.network = "alexnet" if "pat_alexnet" in chosen else "self"  # or any classifier
    config.pat.weights = ""  # its weights: a run's folder or a safetensors file; '' for 'self'
    config.pat.bound = 0.5  # LPIPS above which distances are penalised
    config.pat.steps = 10
    config.pat.step_size = 0.5  # LPIPS of the first step, falling to a tenth
    config.pat.penalty = 10.0  # final weight of the penalty, which rises from a tenth of it
    config.pat.noise = 0.01  # standard deviation of the start, in units of pixel values
    config.pat.gradient_clip = 1.0  # largest value in the classifier's gradient

    # Relaxed LPIPS adversarial training (RLAT), for comparison: one step on images and features.
    # The radii are those of Kireev et al.
    config.rlat = ml_collections.ConfigDict()
    config.rlat.epsilon = 0.08  # l2 radius of images; those of layers follow from it
    if "augmix" in chosen:
        config.rlat.epsilon = 0.05
    if {"deepaugment", "deepaugment10x"} & set(chosen):
        config.rlat.epsilon = 0.02

    # AugMix, after AdA.
    config.augmix = ml_collections.ConfigDict()
    config.augmix.use = "augmix" in chosen
    config.augmix.severity = 3.0
    config.augmix.width = 3
    config.augmix.depth = -1  # operations in a chain; -1 draws 1 to 3
    config.augmix.alpha = 1.0
    # Of the consistency loss over three views, which needs `use`; AugMix has 12.
    config.augmix.jsd_weight = 0.0
    config.augmix.extra_ops = False  # also colour, contrast, brightness and sharpness
    # The consistency loss's first view is the image after AdA or, if true, before it. The
    # cross-entropy is that of the first view or, if label_views is true, the mean over all three.
    config.augmix.clean_view = False
    config.augmix.label_views = False

    # TrivialAugment, before AdA: one strong operation for each image.
    config.trivial_augment = ml_collections.ConfigDict()
    config.trivial_augment.use = False
    config.trivial_augment.extra_ops = True  # also colour, contrast, brightness and sharpness

    # Mixup of images or of the outputs of feature layers, one drawn for each batch, and noise on
    # them as in NoisyMix. It mixes the examples of a device.
    config.mixup = ml_collections.ConfigDict()
    config.mixup.alpha = 0.0  # the share is Beta(alpha, alpha); 0 is off, NoisyMix uses 1
    config.mixup.layers = ("input",)  # also 'stem', 'stage1' and so on
    config.mixup.additive = 0.0  # largest level of additive noise, 0.5 in NoisyMix
    config.mixup.multiplicative = 0.0  # of multiplicative noise, 0.5 in NoisyMix
    config.mixup.sparsity = 0.65  # share of the values without noise

    # Noise, last: drawn per image from the balls of several norms.
    config.noise = ml_collections.ConfigDict()
    config.noise.share = 0.0  # share of the images with noise; 0 is off
    config.noise.norms = ("l0", "l2", "linf")  # one is drawn for each image; also 'l1'
    # Largest radii, means over an image's values: see ada_jax/augment/norm_noise.py.
    config.noise.radii = {"l0": 0.12, "l1": 0.065, "l2": 0.09, "linf": 0.15}

    # DeepAugment: each image is either clean or rendered by one of the set's networks.
    config.deepaugment = ml_collections.ConfigDict()
    config.deepaugment.copies = 10 if "deepaugment10x" in chosen else int("deepaugment" in chosen)
    config.deepaugment.dir = "runs/deepaugment"
    config.deepaugment.clean_too = True

    # Bookkeeping.
    config.log_steps = 50
    config.eval_epochs = 5.0
    config.eval_batch_size = 1024
    config.eval_sets = ("clean", "c")  # at the end; also 'extra', 'cbar', 'cifar10_1'
    config.eval_c_dir = ""  # folder of a '-C' set, or 'tfds'; '' corrupts on the fly
    config.corruption_eval_epochs = 0.0  # interval of evaluations on corruptions; 0 is never
    config.corruption_eval_examples = 500  # per corruption and severity, during training
    config.corruption_seed = 0  # of the images corrupted on the fly
    config.corruption_table = "cifar"  # their parameters; 'imagenet' is meant for 224x224 pixels
    config.checkpoint_epochs = 1.0
    config.keep_checkpoints = 3
    config.figure_examples = 64  # images attacked for the picture at the end; 0 draws none
    config.compilation_cache = "~/.cache/ada_jax"  # JAX_COMPILATION_CACHE_DIR takes precedence
    config.cpu_devices = 0  # number of devices that a CPU is split into; 0 does not split it

    if not {*PRESETS} & {*chosen}:
        compared(config)
    if "small" in chosen:
        small(config)
    if "gpu" in chosen:
        gpu(config)
    if "best" in chosen:
        best(config)
    if "alexnet" in chosen:
        alexnet(config, "alexnet_small" if "small" in chosen else "alexnet")
    if "pat_alexnet" in chosen:
        config.pat.network = "alexnet_small" if "small" in chosen else "alexnet"
        config.pat.weights = config.name.replace("cifar10_pat_alexnet", "runs/cifar10_alexnet")
    return config.lock()


def _chosen(words: str) -> list[str]:
    """The words after the colon, checked and sorted; the default row is 'ada'."""
    alone = ("nominal", "alexnet", "best")
    rows = ("nominal", "alexnet", *ATTACKS, "deepaugment", "deepaugment10x", "augmix")
    given = [word for word in re.split("[,+]", words) if word]
    presets = [word for word in PRESETS if word in given]
    unknown = [word for word in given if word not in (*rows, *PRESETS)]
    chosen = [word for word in rows if word in given] or ["ada"]
    both = {*ATTACKS} & {*chosen}
    twice = len(both) > 1 and both != {"ada", "advmix"}
    twice = twice or {"deepaugment", "deepaugment10x"} <= {*chosen} or len(presets) > 1
    if unknown or twice or ({*alone} & {*chosen} and len(chosen) > 1):
        raise ValueError(
            f"--config=...:{words} "
            + (f"has the unknown word {unknown[0]!r}" if unknown else "is not a row")
            + f": choose from {', '.join((*ROWS, *COMPARISONS))}, and optionally one of ',small' "
            "and ',gpu'."
        )
    return chosen + presets


def best(config: ml_collections.ConfigDict) -> None:
    """Sets the recipe of experiments/sweeps/best.py.

    Its l2 noise is in effect the test corruption Gaussian noise and its l0 noise impulse noise; all
    its noise resembles shot noise. The study used ',small', where AdA gives no gain on top of the
    noise, so its radius is small. Other presets keep the radius of 'ada'; with ',gpu', AdA lowers
    mCE (one seed).
    """
    config.augmix.use = True
    config.augmix.jsd_weight = 4.0
    config.augmix.clean_view = True
    config.augmix.label_views = True
    config.noise.share = 0.5
    config.eval_sets = ("clean", "c", "cbar")
    if config.name.endswith("small"):
        config.batch_size = 64
        config.ada.nu = 0.007


def compared(config: ml_collections.ConfigDict) -> None:
    """Sets the published networks and schedules of PAT and RLAT, but for the cosine's shape."""
    if config.method == "pat":
        config.epochs = 100.0
        config.batch_size = 50
        config.weight_decay = 2e-4
    if config.method == "rlat":
        config.classifier = "preact_resnet18"
        config.bn_decay = 0.9
        config.epochs = 150.0
        config.batch_size = 128
        config.weight_decay = 5e-4
        config.warmup_epochs = 0.0


def alexnet(config: ml_collections.ConfigDict, name: str) -> None:
    """Sets an AlexNet, which has no batch normalisation and needs a lower learning rate."""
    config.classifier = name
    config.mean = (0.485, 0.456, 0.406)
    config.std = (0.229, 0.224, 0.225)
    config.learning_rate = 0.05


def small(config: ml_collections.ConfigDict) -> None:
    """Sets the preset for two CPU cores, about forty minutes with AdA."""
    config.classifier = "resnet9"
    config.bn_decay = 0.9
    config.epochs = 12.0
    config.batch_size = 128
    config.learning_rate = 0.2
    config.warmup_epochs = 1.0
    config.weight_decay = 5e-4
    config.ada.corruption_net = ("edsr_small",)
    # With one copy and AugMix, 0.005 was the best of three settings on train[40000:45000]: see
    # experiments/RESULTS.md.
    config.ada.nu = 0.005 if config.method == "ada" and config.deepaugment.copies else 0.02
    config.ada.steps = min(config.ada.steps, 1)  # 0 for 'random'
    config.pat.steps = 3
    config.eval_epochs = 1.0
    config.cpu_devices = 2


def gpu(config: ml_collections.ConfigDict) -> None:
    """Sets the preset for one GPU of 24 GB or more; launch/README.md has timings on an H100."""
    config.classifier = "preact_resnet18"
    config.compute_dtype = "bfloat16"
    config.bn_decay = 0.9
    config.epochs = 20.0
    config.learning_rate = 0.2
    config.warmup_epochs = 2.0
    config.weight_decay = 5e-4
    config.ada.corruption_net = ("edsr_medium",)
    config.ada.nu = 0.005 if config.method == "ada" and config.deepaugment.copies else 0.02
    config.ada.steps = min(config.ada.steps, 2)  # 0 for 'random'
