"""Loads classifiers and counts their errors."""

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from ada_jax import checks, losses, paths, perceptual
from ada_jax import results as results_files
from ada_jax.corruptions import parameter_tables
from ada_jax.data import batching, core
from ada_jax.errors import UserError
from ada_jax.evaluation import image_sets
from ada_jax.nets import classifiers, weight_files
from ada_jax.run import checkpoint, distributed
from ada_jax.sharding import AXIS, shard, unreplicate

# ------------------------------------------------------------------------ the classifier


def make_classifier(config: ml_collections.ConfigDict, num_classes: int) -> hk.TransformedWithState:
    """The config's classifier."""
    return classifiers.make(
        config.classifier,
        num_classes,
        mean=tuple(config.mean),
        std=tuple(config.std),
        bn_decay=config.bn_decay,
        bn_axis_name=AXIS if config.cross_replica_bn else None,
        zero_init_logits=config.zero_init_logits,
        compute_dtype=config.compute_dtype,
    )


def make_eval_step(logits_fn: Callable[..., jax.Array]) -> Callable[..., dict[str, jax.Array]]:
    """Makes `eval_step(*variables, batch)`, which sums over all devices.

    Args:
      logits_fn: (*variables, images [B,H,W,C] in [0,1]) -> logits [B,K].

    Returns:
      The step. It counts 'examples' (without padding), those that are 'wrong' and those whose
      logits are 'not_finite', which are also wrong, and sums their 'loss'.
    """

    def eval_step(*arguments):
        *variables, batch = arguments
        x, y, real = batching.to_float(batch["image"]), batch["label"], batch["mask"] > 0
        logits = logits_fn(*variables, x)
        loss = losses.cross_entropy(logits, y)
        not_finite = checks.not_finite(logits) | ~jnp.isfinite(loss)
        counts = {
            "examples": real,
            "wrong": real & ((jnp.argmax(logits, -1) != y) | not_finite),
            "not_finite": real & not_finite,
        }
        sums = {name: v.sum(dtype=jnp.int32) for name, v in counts.items()}
        sums["loss"] = jnp.where(real & ~not_finite, loss, 0).sum()
        return jax.lax.psum(sums, AXIS)

    return eval_step


def map_eval_step(classifier: hk.TransformedWithState) -> Callable[..., dict[str, jax.Array]]:
    """The evaluation step, mapped over all devices."""
    return jax.pmap(make_eval_step(functools.partial(apply_classifier, classifier)), AXIS)


def apply_classifier(
    classifier: hk.TransformedWithState,
    params: hk.Params,
    state: hk.State,
    x: jax.Array,
    with_features: bool = False,
) -> jax.Array:
    """Logits [B,K] of images [B,H,W,3] in [0,1], with batch norm's running statistics.

    With `with_features` these are logits and features, see `perceptual.model_of`.
    """
    if with_features:
        return perceptual.model_of(classifier, params, state)(x)
    return classifier.apply(params, state, None, x, is_training=False)[0]


def load_classifier(
    workdir: str | os.PathLike[str], num_classes: int | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Loads a trained run's classifier as a function.

    Args:
      workdir: folder of the run.
      num_classes: K; None reads it from classifier.safetensors, which a finished run has.

    Returns:
      `logits_fn`, images [B,H,W,3] float32 in [0,1] -> logits [B,K], in the order of
      `metadata(workdir)["class_names"]`.

    Raises:
      UserError: there is no run, it is damaged or unfinished, or its file lacks K.
    """
    config = config_of_run(workdir)
    if num_classes is None:
        file = paths.at(workdir) / "classifier.safetensors"
        num_classes = weight_files.metadata(file).get("classes")
        if num_classes is None:
            raise UserError(f"{file} has no number of classes: give num_classes.")
    classifier = make_classifier(config, num_classes)
    # Every classifier averages over its last features, so that weights fit images of any size.
    params, state, _ = load_variables(config, classifier, (32, 32, 3), workdir)
    return functools.partial(apply_classifier, classifier, params, state)


def load_features(
    path: str | os.PathLike[str],
) -> tuple[Callable[..., perceptual.Features], dict[str, Any], str]:
    """Loads a trained classifier as a network whose features bound PAT and perceptual attacks.

    Args:
      path: folder of a finished run, or its classifier.safetensors.

    Returns:
      `apply(theta, images) -> features`, theta, and the classifier's name.

    Raises:
      UserError: there are no weights, they do not name their classifier, or do not fit it.
    """
    about = metadata(path)
    if not {"classifier", "classes", "mean", "std"} <= about.keys():
        raise UserError(
            f"{path} has no weights that name their classifier: give the folder of a finished run."
        )
    name, normalisation = about["classifier"], {f: tuple(about[f]) for f in ("mean", "std")}
    classifier = classifiers.make(name, about["classes"], **normalisation)
    config = ml_collections.ConfigDict({"classifier": name} | normalisation)
    params, state, _ = load_variables(config, classifier, (32, 32, 3), path)
    return features_fn(classifier), {"params": params, "state": state}, name


def features_fn(classifier: hk.TransformedWithState) -> Callable[..., perceptual.Features]:
    """A classifier's features as a function `(theta, images)`, theta of 'params' and 'state'."""
    return lambda theta, x: perceptual.model_of(classifier, **theta)(x)[1]


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a classifier's weights.

    Args:
      path: a safetensors file, or a folder with classifier.safetensors or else checkpoints.

    Returns:
      Among others 'class_names' [K], in the order of the logits; 'training', digests of the data
      and weights used in training, see `setup.describe`; and 'recipe', which is equal for runs that
      differ only in seed. Weights of older versions lack them.
    """
    path = paths.at(path)
    file = path / "classifier.safetensors" if paths.is_dir(path) else path
    if paths.exists(file):
        return weight_files.metadata(file)
    if not paths.is_dir(path / "checkpoints"):
        return {}
    checkpoints = checkpoint.Checkpoints(path, keep=1)
    extra = checkpoints.latest_extra()
    checkpoints.close()
    return extra.get("about", {})


# ------------------------------------------------------------------------ counting


def count_errors(
    eval_step: Callable[..., dict[str, jax.Array]],
    variables: Sequence[Any],
    datasets: Mapping[results_files.Condition, core.Dataset],
    batch_size: int,
) -> Iterator[tuple[results_files.Condition, results_files.Counts]]:
    """Counts errors; every example counts once, whatever the batch size and number of devices.

    Args:
      eval_step: the evaluation step, mapped over devices.
      variables: the classifier's parameters and batch-norm averages, replicated.
      datasets: images and labels.
      batch_size: over all devices; rounded up to a multiple of them, and no larger than the
        largest set needs.

    Yields:
      A key of `datasets` as soon as it is measured, with 'examples' and how many of them are
      'wrong', 'error' in percent and 'loss'.

    Raises:
      UserError: logits that are not finite.
    """
    largest, devices = max(map(len, datasets.values()), default=0), jax.device_count()
    batches = batching.chained_eval_batches(
        list(datasets.values()),
        batch_size=max(1, -(-min(batch_size, largest) // devices)) * devices,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=max(4, os.cpu_count() or 1),
    )
    conditions = list(datasets)
    with _progress(sum(map(len, datasets.values()))) as progress:
        for i, group in itertools.groupby(batches, key=lambda item: item[0]):
            name, severity = conditions[i]
            what = f"{name} severity {severity}" if severity else name
            progress.set_description(what, refresh=False)
            sums = []
            for _, batch in group:
                sums.append(eval_step(*variables, shard(batch)))
                jax.block_until_ready(sums[-3:][0])  # More in flight would take more memory.
                progress.update(int(batch["mask"].sum()) * jax.process_count())
            yield conditions[i], _counts(sums, f"{what} images")


def corruption_errors(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    names: Sequence[str] = parameter_tables.NAMES,
    seed: int = 0,
    table: str = "cifar",
    batch_size: int = 256,
) -> results_files.Results:
    """Measures any classifier on clean images and under corruptions, applied on the fly.

    Args:
      logits_fn: images [B,H,W,3] float32 in [0,1] -> logits [B,K]; includes normalisation.
      images: [N,H,W,3] uint8.
      labels: [N] integers in 0..K-1.
      names: corruptions, in `corruptions.NAMES`, `EXTRA` or `CBAR[table]`.
      seed: seed of the corruptions, in 0..2**32-1.
      table: parameters, 'cifar' for small images, 'imagenet' for large ones.
      batch_size: over all devices.

    Returns:
      'clean', {'error': percent, ...}; 'corruptions', {name: [{'severity': 1, 'error': percent,
      ...}, ...]}; if names has all of NAMES, EXTRA or CBAR[table], their means in percent,
      'mce_unnormalised', 'mean_extra' and 'mean_cbar'; 'data' and 'corruption_source'.

    Raises:
      UserError: an argument is not as above, logits are not finite, or frost's photographs are
        missing (the package imagecorruptions).
    """
    if np.ndim(images) != 4 or np.shape(images)[3] != 3:
        raise UserError(f"Images of shape {list(np.shape(images))} must be [N,H,W,3].")
    x = jax.ShapeDtypeStruct((1, *np.shape(images)[1:]), jnp.float32)
    class_names = [str(i) for i in range(checks.num_classes(logits_fn, x))]
    clean = core.from_arrays(images, labels, class_names=class_names)
    checks.check_integers(1, batch_size=batch_size)
    if not names:
        raise UserError("names is empty: give at least one corruption.")
    config = {"dataset": "", "corruption_seed": seed, "corruption_table": table}
    corrupted, source = image_sets.on_the_fly(
        ml_collections.ConfigDict(config), clean, names, len(clean)
    )
    results = {"data": {"name": clean.name}, "corruption_source": source}
    eval_step = jax.pmap(make_eval_step(logits_fn), AXIS)
    datasets = {("clean", 0): clean, **corrupted}
    for condition, counts in count_errors(eval_step, (), datasets, batch_size):
        results = results_files.with_counts(results, condition, counts)
    return results


def _counts(sums: Iterable[dict[str, jax.Array]], what: str) -> results_files.Counts:
    # Summed on the host, in Python's integers and double precision.
    fetched = [{name: value.item() for name, value in unreplicate(s).items()} for s in sums]
    names = ("examples", "wrong", "not_finite", "loss")
    examples, wrong, not_finite, loss = (sum(f[name] for f in fetched) for name in names)
    checks.check_finite(not_finite, examples, what)
    return {
        "examples": examples,
        "wrong": wrong,
        "error": 100 * wrong / examples,
        "loss": loss / examples,
    }


def _progress(total: int) -> tqdm.tqdm:
    """A progress bar, updated seldom in logs."""
    return tqdm.tqdm(
        total=total,
        unit=" images",
        unit_scale=True,
        leave=False,
        delay=2,
        mininterval=0.2 if sys.stderr.isatty() else 20,
        disable=jax.process_index() != 0,
    )


def complete(
    results: results_files.Results,
    path: str | os.PathLike[str],
    eval_step: Callable[..., dict[str, jax.Array]],
    variables: Sequence[Any],
    datasets: Mapping[results_files.Condition, core.Dataset],
    batch_size: int,
) -> results_files.Results:
    """Measures the sets that the results lack, writing the file after each of them.

    Args:
      results: the results so far.
      path: the results file.
      eval_step: see `count_errors`, as for the arguments below.
      variables: the classifier's.
      datasets: all sets that the results should have.
      batch_size: over all devices.

    Returns:
      The results with everything in `datasets` measured.
    """
    measured = [results_files.is_measured(results, condition) for condition in datasets]
    measured = distributed.broadcast(np.array(measured))
    missing = {c: d for (c, d), done in zip(datasets.items(), measured, strict=True) if not done}
    started, before = time.monotonic(), results["seconds"]
    for condition, counts in count_errors(eval_step, variables, missing, batch_size):
        results = results_files.with_counts(results, condition, counts)
        results["seconds"] = before + time.monotonic() - started
        write_results(path, results)
    write_results(path, results)
    return results


def config_of_run(workdir: str) -> ml_collections.ConfigDict:
    """The config that a run was started with, unlocked.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = paths.at(workdir) / "config.json"
    try:
        fields = dict(paths.read_json(path))
    except FileNotFoundError as error:
        raise UserError(
            f"--workdir={workdir} has no config.json: name a run's folder, or give --config and "
            "--weights."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again.") from error
    return ml_collections.ConfigDict(fields, type_safe=False)


def load_variables(
    config: ml_collections.ConfigDict,
    classifier: hk.TransformedWithState,
    image_shape: Sequence[int],
    path: str | os.PathLike[str],
) -> tuple[hk.Params, hk.State, int]:
    """Loads a classifier's variables from a weights file or a run's folder.

    Args:
      config: config of the classifier; its 'classifier', 'mean' and 'std' must be those of the
        weights file.
      classifier: the network.
      image_shape: [H, W, 3].
      path: a safetensors file, or a folder with classifier.safetensors or else checkpoints.

    Returns:
      Parameters, batch-norm averages, and their step.

    Raises:
      UserError: they are missing, damaged, of another architecture or of another normalisation.
    """
    path, images = paths.at(path), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = functools.partial(classifier.init, is_training=True)
    params, state = jax.eval_shape(init, jax.random.key(0), images)
    folder = paths.is_dir(path)
    file = path / "classifier.safetensors" if folder else path
    if paths.exists(file) or not folder:
        tree, metadata = weight_files.load_weights(file, {"params": params, "state": state})
        for field in ("classifier", "mean", "std"):  # Two classifiers can have the same shapes.
            kind = str if field == "classifier" else tuple
            value, ours = kind(metadata.get(field, config[field])), kind(config[field])
            if value != ours:
                raise UserError(
                    f"The weights file {file} was trained with config.{field}={value}, but this "
                    f'config has {ours}: set --config.{field}="{value}".'
                )
        return tree["params"], tree.get("state", {}), int(metadata.get("step", 0))
    if paths.is_dir(path / "checkpoints"):
        checkpoints = checkpoint.Checkpoints(path, keep=1)
        found = checkpoints.read_latest({"params": params, "net_state": state})
        checkpoints.close()
        if found:
            return found[0]["params"], found[0].get("net_state", {}), found[1]
    raise UserError(
        f"{path} has neither classifier.safetensors nor a checkpoint: train there "
        "first, or name a file of weights."
    )


def random_variables(
    classifier: hk.TransformedWithState, clean: core.Dataset, seed: int
) -> tuple[hk.Params, hk.State]:
    """The classifier's variables before training."""
    images = batching.to_float(next(batching.eval_batches(clean, batch_size=8))["image"])
    init = jax.jit(classifier.init, static_argnames="is_training")
    return init(jax.random.key(seed), images, is_training=True)


def write_results(path: str | os.PathLike[str], results: results_files.Results) -> None:
    """Writes a results file in the first process alone."""
    if jax.process_index() == 0:
        results_files.write(path, results)
