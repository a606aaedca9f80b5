"""Pre-trains a corruption network: EDSR to denoise and super-resolve, the CAE to compress.

python -m ada_jax.pretrain --config=experiments/pretrain_edsr.py[:PRESET] [--workdir=DIR]
python -m ada_jax.pretrain --config=experiments/pretrain_cae.py [--workdir=DIR]
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ada_jax import keys, paths, ssim
from ada_jax import results as results_files
from ada_jax.data import batching, core, sources, tfds_sets, tiles
from ada_jax.errors import UserError, require_extra
from ada_jax.nets import cae, corruption_nets, edsr, layers, weight_files
from ada_jax.run import cli, config_checks, distributed, logbook, loop

SCHEDULES = ("cosine", "halving")
LOSSES = {"l1": jnp.abs, "mse": jnp.square}  # applied to the difference, then averaged
STORE_DTYPES = ("float32", "float16")
Batch = dict[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """The state of training.

    Attributes:
      step: updates made, int32 scalar.
      theta: the network's parameters.
      opt_state: Adam's state.
    """

    step: jax.Array
    theta: dict
    opt_state: optax.OptState


# ------------------------------------------------------------------------ the step


def make_update_step(
    config: ml_collections.ConfigDict,
    net: layers.Architecture,
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Makes the update: patches -> loss of reconstruction and super-resolution -> Adam -> metrics.

    Args:
      config: the run's config.
      net: the network to train.
      optimizer: its optimiser.

    Returns:
      `update_step(state, batch, key) -> (state, metrics)`, to be jitted; `batch` has 'image'
      [batch_size + sr_batch_size,S,S,3], without the latter if there is no super-resolution, with S
      no less than the patches; `key` is the run's.
    """

    def distance(a, b):
        return jnp.mean(LOSSES[config.loss](a - b))

    def loss_fn(theta, clean, noisy, fine, net_key):
        loss = distance(net.apply(theta, noisy, net_key), clean)
        metrics = {"reconstruction_loss": loss}
        if super_resolves(net, config.sr_weight):
            metrics["sr_loss"] = distance(super_resolve(theta, fine, net.scale), fine)
            loss += config.sr_weight * metrics["sr_loss"]
        return loss, metrics | {"loss": loss}

    def update_step(state, batch, key):
        x = batching.to_float(batch["image"])
        step_key = jax.random.fold_in(key, state.step)
        example_keys = keys.of_positions(step_key, 0, len(x))
        patch_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(example_keys), 1, 0)
        first, rest = slice(config.batch_size), slice(config.batch_size, None)
        clean = random_patches(patch_keys[first], x[first], size=config.patch)
        noisy = add_noise(noise_keys[first], clean, config.noise)
        fine = random_patches(patch_keys[rest], x[rest], size=config.sr_patch)

        gradient, metrics = jax.grad(loss_fn, has_aux=True)(
            state.theta, clean, noisy, fine, jax.random.fold_in(step_key, len(x))
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.theta)
        theta = optax.apply_updates(state.theta, updates)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        return TrainState(state.step + 1, theta, opt_state), metrics

    return update_step


def super_resolves(net: layers.Architecture, sr_weight: float) -> bool:
    """Whether super-resolution is part of the loss."""
    return net.scale > 1 and sr_weight > 0


def super_resolve(theta: dict, fine: jax.Array, scale: int) -> jax.Array:
    """Reduces images bicubically and restores them with EDSR.

    Args:
      theta: its parameters.
      fine: [B,H,W,3] in [0,1], H and W multiples of the scale.
      scale: its scale.

    Returns:
      [B,H,W,3], close to `fine` for a trained network; not clipped.
    """
    return edsr.edsr_apply(theta, reduce(fine, scale))


def reduce(x: jax.Array, scale: int) -> jax.Array:
    """Antialiased bicubic reduction of [B,H,W,C] by a whole factor."""
    b, h, w, c = x.shape
    return jax.image.resize(x, (b, h // scale, w // scale, c), "cubic", antialias=True)


def random_patches(key: jax.Array, images: jax.Array, *, size: int) -> jax.Array:
    """Cuts a random square from each image, rotated or mirrored at random (eight ways).

    Args:
      key: one key, or one per example [B].
      images: [B,H,W,C].
      size: side of the squares in pixels, at most H and W.

    Returns:
      [B,size,size,C].
    """

    def one(key, image):
        corner_key, turn_key = jax.random.split(key)
        corners = jnp.array(image.shape[:2], jnp.int32) - size + 1
        corner = jax.random.randint(corner_key, (2,), 0, corners, jnp.int32)
        patch = jax.lax.dynamic_slice(image, (*corner, jnp.int32(0)), (size, size, image.shape[2]))
        down, right, across = jax.random.bernoulli(turn_key, np.float32(0.5), (3,))
        patch = jnp.where(down, patch[::-1], patch)
        patch = jnp.where(right, patch[:, ::-1], patch)
        return jnp.where(across, patch.swapaxes(0, 1), patch)

    return jax.vmap(one)(keys.per_example(key, len(images)), images)


def add_noise(key: jax.Array, images: jax.Array, most: float) -> jax.Array:
    """Adds Gaussian noise whose standard deviation is drawn for each image.

    Args:
      key: one key, or one per example [B].
      images: [B,H,W,C] in [0,1].
      most: the deviation is uniform in [0, most].

    Returns:
      [B,H,W,C], not clipped.
    """

    def one(key, image):
        deviation_key, noise_key = jax.random.split(key)
        deviation = jax.random.uniform(deviation_key, (), jnp.float32, 0.0, most)
        return image + deviation * jax.random.normal(noise_key, image.shape, jnp.float32)

    return jax.vmap(one)(keys.per_example(key, len(images)), images)


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear warm-up from 0; then cosine to 0 at the last step, or halved every halve_steps."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, config.train_steps - warmup)
    else:
        after = optax.exponential_decay(peak, config.halve_steps, 0.5, staircase=True)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def initial_state(
    net: layers.Architecture, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """The state before the first step, with random parameters.

    Args:
      net: the network.
      optimizer: its optimiser.
      key: PRNG key.
    """
    theta = net.init(key)
    return TrainState(jnp.zeros((), jnp.int32), theta, optimizer.init(theta))


# ------------------------------------------------------------------------ evaluation


def make_eval_step(
    config: ml_collections.ConfigDict, net: layers.Architecture
) -> Callable[[dict, Batch], Metrics]:
    """Makes `eval_step(theta, batch)`: sums over the examples, padding masked out."""

    def eval_step(theta, batch):
        images, mask = batching.to_float(batch["image"]), batch["mask"]
        x = centre(images, config.patch)
        y = jnp.clip(net.apply(theta, x, jax.random.key(0)), 0, 1)
        values = {"examples": jnp.ones_like(mask), "psnr": psnr(y, x), "ssim": ssim.ssim(y, x)}
        if super_resolves(net, config.sr_weight):
            x = centre(images, config.sr_patch)
            bicubic = jax.image.resize(reduce(x, net.scale), x.shape, "cubic")
            values["sr_psnr"] = psnr(super_resolve(theta, x, net.scale), x)
            values["bicubic_psnr"] = psnr(bicubic, x)
        return {name: jnp.sum(mask * value) for name, value in values.items()}

    return eval_step


def evaluate(
    eval_step: Callable[[dict, Batch], Metrics], theta: dict, dataset: core.Dataset, batch_size: int
) -> dict[str, float]:
    """Measures quality on the centres of clean images; every image counts once.

    Args:
      eval_step: jitted.
      theta: the network's parameters.
      dataset: held-out images.
      batch_size: images at a time.

    Returns:
      'examples', mean 'psnr' in dB and mean 'ssim' of the reconstruction; with super-resolution
      also its 'sr_psnr', and 'bicubic_psnr' for comparison.
    """
    sums = [eval_step(theta, b) for b in batching.eval_batches(dataset, batch_size=batch_size)]
    total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
    count = total["examples"]
    return {name: v if name == "examples" else v / count for name, v in total.items()}


def centre(images: jax.Array, size: int) -> jax.Array:
    """The middle [B,size,size,C] of [B,H,W,C]."""
    top, left = ((n - size) // 2 for n in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, at most 100.

    Args:
      a: [B,H,W,C], clipped to [0,1] here.
      b: [B,H,W,C] in [0,1].

    Returns:
      [B].
    """
    error = jnp.mean((jnp.clip(a, 0, 1) - b) ** 2, (1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(error, 1e-10))


# ------------------------------------------------------------------------ the data


def load_images(config: ml_collections.ConfigDict, split: str, *, size: int) -> core.Dataset:
    """Loads a split of the config's images.

    Args:
      config: the run's config.
      split: its train_split or eval_split.
      size: side in pixels of the largest patch to be cut from an image.

    Returns:
      Images of one size; photographs are cut into overlapping tiles.

    Raises:
      UserError: no such data, or images smaller than `size`.
    """
    data_dir = config.data_dir or None
    if config.dataset in ("photos", "div2k"):
        if config.dataset == "photos":
            origin, members = "photos", tiles.PHOTOS[split]
            images = map(tiles.photo, members)
        else:
            origin, members, images = tfds_sets.div2k_images(split, data_dir)
        side = 2 * size if split.startswith("train") else size
        found = []
        for image in images:
            found.append(tiles.cut(image, side=side, step=size, most=config.tiles))
            _check_memory(config.tiles, split, sum(cut.nbytes for cut in found))
        images = np.concatenate(found)
        labels = np.zeros(len(images), np.int32)
        dataset = core.from_arrays(images, labels, class_names=("photo",), name=config.dataset)
        of_tiles = [m for m, cut in zip(members, found, strict=True) for _ in cut]
        return dataclasses.replace(dataset, origin=origin, members=of_tiles)
    dataset = sources.load(config.dataset, split, data_dir=data_dir, image_size=config.image_size)
    if min(dataset.image_shape[:2]) < size:
        height, width, _ = dataset.image_shape
        raise UserError(
            f"config.patch={config.patch} or config.sr_patch={config.sr_patch} is larger than the "
            f"images of {dataset.name}, which are {height}x{width}: decrease it."
        )
    return dataset


def _check_memory(most: int, split: str, size: int) -> None:
    """Checks that this machine has twice the memory of `size` bytes of squares."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * size > memory:
        raise UserError(
            f"config.tiles={most} makes over {size / 2**30:.1f} GiB of squares of the split "
            f"{split!r}, and this machine has {memory / 2**30:.1f} GiB of memory: decrease it, for "
            f"example to {max(1, most // 32)}."
        )


# ------------------------------------------------------------------------ the config


CHOICES = {
    "dataset": ("photos", "div2k", *sources.NAMES),
    "schedule": SCHEDULES,
    "loss": tuple(LOSSES),
    "store_dtype": STORE_DTYPES,
}
RULES = (
    (*config_checks.AT_LEAST_1, ("train_steps", "batch_size", "sr_batch_size", "halve_steps")),
    (*config_checks.AT_LEAST_1, ("eval_batch_size", "log_steps", "keep_checkpoints")),
    (*config_checks.AT_LEAST_1, ("tiles",)),
    (*config_checks.SIDE, ("image_size",)),
    (*config_checks.SEED, ("seed",)),
    (*config_checks.AT_LEAST_0, ("eval_steps", "checkpoint_steps", "sr_weight", "weight_decay")),
    (*config_checks.POSITIVE, ("learning_rate",)),
    (lambda value: 0 <= value <= 1, "must be in [0, 1], where 1 is white", ("noise",)),
    (
        lambda value: value >= ssim.WINDOW,
        f"is too small to measure SSIM: use {ssim.WINDOW} pixels or more",
        ("patch",),
    ),
)


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field that is out of range, with its name, value and fix."""
    fields = results_files.flat(config.to_dict())
    require = functools.partial(config_checks.require, fields)
    config_checks.check_values(fields)
    with config_checks.named_in("config."):
        scale = corruption_nets.architecture(config.corruption_net).scale
    config_checks.check_fields(fields, CHOICES, RULES)
    if config.dataset == "photos":
        splits = dict.fromkeys(("train_split", "eval_split"), tuple(tiles.PHOTOS))
        config_checks.check_fields(fields, splits, ())
    good = 0 <= config.warmup_steps < config.train_steps
    fix = f"must be 0 or more and below config.train_steps={config.train_steps}"
    require("warmup_steps", good, fix)
    good = config.corruption_net != "cae" or cae.fits_cae(config.patch)
    fix = "does not fit the CAE: use a multiple of 4 of at least 12 pixels"
    require("patch", good, fix)
    good = config.sr_patch >= scale and config.sr_patch % scale == 0
    fix = f"must be a positive multiple of the network's scale, {scale}"
    require("sr_patch", good, fix)


# ------------------------------------------------------------------------ the run


class Parts(NamedTuple):
    """Everything that a run is made of and that training does not change."""

    config: ml_collections.ConfigDict
    train_set: core.Dataset
    eval_set: core.Dataset
    net: layers.Architecture
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    examples: int  # of a step: those to reconstruct, then those to super-resolve


def build(config: ml_collections.ConfigDict) -> Parts:
    """Opens what a valid config names: the data, the network and its optimiser.

    Raises:
      UserError: a package or data is missing, or the data do not fit the config.
    """
    photos = ["skimage"] if config.dataset == "photos" else []
    require_extra("Training", "grain", "orbax.checkpoint", *photos)
    net = corruption_nets.architecture(config.corruption_net)
    size, examples = config.patch, config.batch_size
    if super_resolves(net, config.sr_weight):
        size, examples = max(size, config.sr_patch), examples + config.sr_batch_size
    train_set, eval_set = (
        load_images(config, split, size=size) for split in (config.train_split, config.eval_split)
    )
    core.check_held_out(train_set, eval_set, config.train_split, config.eval_split)
    if examples > len(train_set):
        raise UserError(
            f"config.batch_size={config.batch_size} and, for super-resolution, "
            f"config.sr_batch_size={config.sr_batch_size} are more than the {len(train_set)} "
            f"images of config.train_split={config.train_split!r}: make them smaller."
        )
    schedule = learning_rate_schedule(config)
    optimizer = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(schedule))
    return Parts(config, train_set, eval_set, net, optimizer, schedule, examples)


def main(config: ml_collections.ConfigDict, workdir: str) -> int | None:
    """Trains, or resumes training, in `workdir`; returns an exit status."""
    validate(config)
    cli.set_up_devices(0, config.compilation_cache)
    parts = build(config)
    with distributed.lock_workdir(workdir):
        return run(parts, workdir)


def run(parts: Parts, workdir: str) -> int | None:
    """Trains and writes in a folder that is locked; returns an exit status."""
    key = jax.random.key(parts.config.seed)
    trained = loop.run(
        make_task(parts, key),
        workdir,
        initial_state(parts.net, parts.optimizer, key),
        config=parts.config.to_dict(),
        expect=identity(parts.config) | {"training data": parts.train_set.fingerprint},
    )
    if trained.status:
        return trained.status
    finish(parts, workdir, trained.state, trained.seconds)
    return None


def make_task(parts: Parts, key: jax.Array) -> loop.Task:
    """What the training loop needs of a run with this key."""
    config = parts.config
    update_step = make_update_step(config, parts.net, parts.optimizer)
    update_step = jax.jit(update_step, donate_argnums=0)
    eval_step = jax.jit(make_eval_step(config, parts.net))

    def quality(state: TrainState) -> dict[str, float]:
        return evaluate(eval_step, state.theta, parts.eval_set, config.eval_batch_size)

    def batches(start_step: int) -> Iterator[Batch]:
        return batching.train_batches(
            parts.train_set, batch_size=parts.examples, seed=config.seed, start_step=start_step
        )

    return loop.Task(
        update_step=lambda state, batch: update_step(state, {"image": batch["image"]}, key),
        batches=batches,
        evaluations=(loop.Evaluation("eval", config.eval_steps, quality, True),),
        scalars=lambda step: {"learning_rate": parts.schedule(step - 1)},
        to_devices=lambda state: jax.tree.map(jnp.array, state),  # copies, as they are donated
        to_host=jax.device_get,
        total_steps=config.train_steps,
        batch_size=parts.examples,
        log_interval=config.log_steps,
        save_interval=config.checkpoint_steps,
        keep_checkpoints=config.keep_checkpoints,
        advice="lower config.learning_rate",
    )


_BOOKKEEPING = frozenset(
    (
        "name",
        "data_dir",
        "compilation_cache",
        "log_steps",
        "eval_steps",
        "eval_batch_size",
        "eval_split",
        "checkpoint_steps",
        "keep_checkpoints",
        "store_dtype",
    )
)


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config's fields that change what is trained, which a checkpoint must agree with."""
    fields = {f"config.{k}": v for k, v in config.items() if k not in _BOOKKEEPING}
    return json.loads(json.dumps(fields))


def finish(parts: Parts, workdir: str, state: TrainState, seconds: float) -> None:
    """Evaluates the weights in the stored precision, writes them and prints the run's table.

    Args:
      parts: the run's parts.
      workdir: the run's folder.
      state: the state after the last step.
      seconds: the time of training.
    """
    config, name = parts.config, parts.config.corruption_net
    stored = jax.tree.map(lambda a: np.asarray(a, config.store_dtype), state.theta)
    theta = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), stored)
    eval_step = jax.jit(make_eval_step(config, parts.net))
    quality = evaluate(eval_step, theta, parts.eval_set, config.eval_batch_size)
    metadata = {
        "corruption_net": name,
        **(corruption_nets.PRESETS[name] or {}),
        "dataset": config.dataset,
        "train_split": config.train_split,
        "eval_split": config.eval_split,
        "noise": config.noise,
        "steps": int(state.step),
        **{k: round(v, 5) for k, v in quality.items()},
    }
    path = os.path.join(workdir, f"{name}.safetensors")
    digest = weight_files.save_weights(path, stored, metadata)
    leaves = jax.tree.leaves(stored)
    rows = [
        ("network", f"{name}, {sum(a.size for a in leaves):,} numbers in {len(leaves)} leaves"),
        ("reconstruction", f"PSNR {quality['psnr']:.2f} dB, SSIM {quality['ssim']:.4f}"),
        ("held out", f"{quality['examples']:.0f} patches of {config.dataset}"),
        ("weights", f"{path}, {len(paths.read(path)) / 1e6:.2f} MB"),
        ("sha256 of the arrays", digest[:16]),
        ("time", results_files.clock(seconds)),
    ]
    if "sr_psnr" in quality:
        psnrs = f"PSNR {quality['sr_psnr']:.2f} dB, bicubic {quality['bicubic_psnr']:.2f} dB"
        rows.insert(2, (f"super-resolution x{parts.net.scale}", psnrs))
    print("\n" + logbook.table(rows), flush=True)


if __name__ == "__main__":
    cli.run(main)
