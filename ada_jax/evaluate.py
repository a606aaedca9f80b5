"""Measures a classifier's errors on clean, corrupted and newly collected images.

    python -m ada_jax.evaluate --workdir=runs/cifar10 --sets=clean,c,extra,cifar10_1
    python -m ada_jax.evaluate --config=FILE --weights=FILE.safetensors --out=results.json
    python -m ada_jax.evaluate --config=FILE --random --out=results.json

The results file has every number as soon as it is measured, and the same command goes on with
those it lacks.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from absl import flags, logging

from ada_jax import (
    checkpoint,
    classifiers,
    cli,
    corruption_nets,
    corruptions,
    data,
    guards,
    hosts,
    locks,
    logbook,
    losses,
    npy_files,
    paths,
    photographs,
    worst_case,
)
from ada_jax.devices import AXIS, replicate, shard, unreplicate
from ada_jax.errors import UserError, renamed

SCHEMA = 1
_CORRUPTIONS = {"c": corruptions.NAMES, "extra": corruptions.EXTRA}
SETS = ("clean", *_CORRUPTIONS, "cifar10_1")
WORST = ("lp", "ada")  # the binary's alone
_IMAGENET_C = 224  # pixels, the side of ImageNet-C's images

Cell = tuple[str, int]  # A corruption and its severity; another set and 0.
Counts = dict[str, Any]
Results = dict[str, Any]

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
    """Makes `eval_step(*variables, batch)`: sums over all devices, padding masked out.

    Args:
      logits_fn: (*variables, images [B,H,W,C] in [0,1]) -> logits [B,K].

    Returns:
      The step; it counts 'examples', those 'wrong' and those whose logits are 'not_finite', which
      are wrong too, and adds up their 'loss'.
    """

    def eval_step(*arguments):
        *variables, batch = arguments
        x, y, real = data.to_float(batch["image"]), batch["label"], batch["mask"] > 0
        logits = logits_fn(*variables, x)
        loss = losses.cross_entropy(logits, y)
        not_finite = guards.not_finite(logits) | ~jnp.isfinite(loss)
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
    classifier: hk.TransformedWithState, params: hk.Params, state: hk.State, x: jax.Array
) -> jax.Array:
    """Logits [B,K] of images [B,H,W,3] in [0,1], by batch norm's running statistics."""
    return classifier.apply(params, state, None, x, is_training=False)[0]


def load_classifier(
    workdir: str | os.PathLike[str], num_classes: int | None = None
) -> Callable[[jax.Array], jax.Array]:
    """A trained run's classifier as one function, as `ada_jax.attacks` and one's own code take it.

    Args:
      workdir: folder of the run.
      num_classes: K; None reads it from classifier.safetensors, which a finished run has.

    Returns:
      logits_fn: images [B,H,W,3] float32 in [0,1] -> logits [B,K], in the order of the run's
      classes, which are `metadata(workdir)["class_names"]`.

    Raises:
      UserError: there is no run, it is damaged or not finished, or its file does not say K.
    """
    config = config_of_run(workdir)
    if num_classes is None:
        file = paths.at(workdir) / "classifier.safetensors"
        num_classes = checkpoint.load_weights(file)[1].get("classes")
        if num_classes is None:
            raise UserError(f"{file} does not say how many classes there are: give num_classes.")
    classifier = make_classifier(config, num_classes)
    # Every classifier averages over its last features: the weights fit images of any size.
    params, state, _ = load_variables(config, classifier, (32, 32, 3), workdir)
    return functools.partial(apply_classifier, classifier, params, state)


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is said of a classifier beside its weights.

    Args:
      path: a safetensors file, or a folder with classifier.safetensors or else checkpoints.

    Returns:
      Among others 'class_names' [K], in the order of the logits; 'training', digests of what it
      was trained from, see `train.describe`; and 'recipe', the same for runs that differ in seed
      alone. Weights of older versions lack them.
    """
    path = paths.at(path)
    file = path / "classifier.safetensors" if paths.is_dir(path) else path
    if paths.exists(file):
        return checkpoint.metadata(file)
    if not paths.is_dir(path / "checkpoints"):
        return {}
    checkpoints = checkpoint.Checkpoints(path, keep=1)
    extra = checkpoints.latest_extra()
    checkpoints.close()
    return extra.get("about", {})


# ------------------------------------------------------------------------ counting


def measure(
    eval_step: Callable[..., dict[str, jax.Array]],
    variables: Sequence[Any],
    datasets: Mapping[Cell, data.Dataset],
    batch_size: int,
) -> Iterator[tuple[Cell, Counts]]:
    """Counts errors; every example counts once, whatever the batch size and number of devices.

    Args:
      eval_step: mapped over devices.
      variables: the classifier's parameters and batch-norm averages, replicated.
      datasets: images and labels.
      batch_size: over all devices; rounded up to a multiple of them, and no larger than the
        largest set needs.

    Yields:
      A set's name in `datasets` as soon as it is measured, with 'examples' and how many of them
      are 'wrong', 'error' in percent and 'loss'.

    Raises:
      UserError: logits that are not finite.
    """
    largest, count = max(map(len, datasets.values()), default=0), jax.device_count()
    batches = data.chained_eval_batches(
        list(datasets.values()),
        batch_size=max(1, -(-min(batch_size, largest) // count)) * count,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=max(4, os.cpu_count() or 1),
    )
    cells, total = list(datasets), sum(map(len, datasets.values()))
    with _progress(total) as progress:
        for i, group in itertools.groupby(batches, key=lambda item: item[0]):
            progress.set_description(" ".join(map(str, filter(None, cells[i]))), refresh=False)
            sums = []
            for _, batch in group:
                sums.append(eval_step(*variables, shard(batch)))
                jax.block_until_ready(sums[-3:][0])  # More in flight would take more memory.
                progress.update(int(batch["mask"].sum()) * jax.process_count())
            yield cells[i], _counts(sums, _described_cell(cells[i]))


def measure_one(
    eval_step: Callable[..., dict[str, jax.Array]],
    variables: Sequence[Any],
    dataset: data.Dataset,
    batch_size: int,
) -> Counts:
    """As `measure`, of one data set."""
    ((_, counts),) = measure(eval_step, variables, {("", 0): dataset}, batch_size)
    return counts


def corruption_errors(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    names: Sequence[str] = corruptions.NAMES,
    seed: int = 0,
    table: str = "cifar",
    batch_size: int = 256,
) -> Results:
    """The errors of any classifier, clean and under corruptions made on the fly.

    Args:
      logits_fn: images [B,H,W,3] float32 in [0,1] -> logits [B,K]; it normalises them itself.
      images: [N,H,W,3] uint8.
      labels: [N] integers in 0..K-1.
      names: of `corruptions.NAMES` and `corruptions.EXTRA`.
      seed: of the corruptions, in 0..2**32-1.
      table: whose parameters: 'cifar' for small images, 'imagenet' for large ones.
      batch_size: over all devices.

    Returns:
      'clean', {'error': percent, ...}; 'corruptions', {name: [{'severity': 1, 'error': percent,
      ...}, ...]}; and, of all the 15 NAMES, 'mce_unnormalised', percent.

    Raises:
      UserError: an argument is not as above, or logits are not finite.
    """
    x = jax.ShapeDtypeStruct((1, *np.shape(images)[1:]), jnp.float32)
    class_names = [str(i) for i in range(guards.num_classes(logits_fn, x))]
    clean = data.from_arrays(images, labels, class_names=class_names)
    guards.check_integers(1, batch_size=batch_size)
    if not names or not len(clean):
        raise UserError("There are no images or names is empty: there is nothing to measure.")
    config = {"dataset": "", "corruption_seed": seed, "corruption_table": table}
    corrupted, source = _on_the_fly(ml_collections.ConfigDict(config), clean, names, len(clean))
    results = {"data": {"name": clean.name}, "corruption_source": source}
    eval_step = jax.pmap(make_eval_step(logits_fn), AXIS)
    datasets = {("clean", 0): clean, **corrupted}
    for cell, counts in measure(eval_step, (), datasets, batch_size):
        results = _with(results, cell, counts)
    return results


def _described_cell(cell: Cell) -> str:
    name, severity = cell
    return f"images of {name} at severity {severity}" if severity else f"{name} images".lstrip()


def _counts(sums: Iterable[dict[str, jax.Array]], what: str) -> Counts:
    # Added up on the host, where neither integers nor the loss run out of digits.
    fetched = [{name: value.item() for name, value in unreplicate(s).items()} for s in sums]
    names = ("examples", "wrong", "not_finite", "loss")
    examples, wrong, not_finite, loss = (sum(f[name] for f in fetched) for name in names)
    guards.check_finite(not_finite, examples, what)
    return {
        "examples": examples,
        "wrong": wrong,
        "error": 100 * wrong / examples,
        "loss": loss / examples,
    }


def _progress(total: int) -> tqdm.tqdm:
    """A bar for what takes more than moments; in a log it moves seldom."""
    return tqdm.tqdm(
        total=total,
        unit=" images",
        unit_scale=True,
        leave=False,
        delay=2,
        mininterval=0.2 if sys.stderr.isatty() else 20,
        disable=jax.process_index() != 0,
    )


# ------------------------------------------------------------------------ the sets


class Sets(NamedTuple):
    """What there is to measure on, checked.

    Attributes:
      datasets: images and labels of every cell.
      source: where the corrupted images come from: the results' 'corruption_source'; empty where
        there are none.
    """

    datasets: dict[Cell, data.Dataset]
    source: dict[str, Any]


def open_sets(
    config: ml_collections.ConfigDict,
    clean: data.Dataset,
    names: Sequence[str],
    examples: int | None = None,
) -> Sets:
    """Finds the images of some sets, and what is wrong with them before anything is computed.

    Args:
      config: 'eval_c_dir', 'corruption_seed', 'corruption_table' and 'data_dir' count.
      clean: the clean images.
      names: of SETS.
      examples: how many of the corrupted images to take from the start; None takes all.

    Raises:
      UserError: files are missing, half-written, damaged or do not belong to the clean images, or
        have other classes.
    """
    datasets, source = {}, {}
    if "clean" in names:
        datasets["clean", 0] = clean
    if wanted := [c for set_name in names for c in _CORRUPTIONS.get(set_name, ())]:
        size = min(examples or len(clean), len(clean))
        open_corrupted = {"": _on_the_fly, "tfds": _from_tfds}.get(config.eval_c_dir, _from_folder)
        corrupted, source = open_corrupted(config, clean, wanted, size)
        datasets |= corrupted
    if "cifar10_1" in names:
        _require_cifar10(clean, "cifar10_1")
        datasets["cifar10_1", 0] = data.cifar10_1(config.data_dir or None)
    names = clean.class_names
    return Sets({cell: data.renumbered(d, names) for cell, d in datasets.items()}, source)


def _require_cifar10(clean: data.Dataset, name: str) -> None:
    if clean.num_classes != 10 or clean.image_shape != (32, 32, 3):
        raise UserError(
            f"The set {name} has 10 classes of 32x32 pixels, and {clean.name} has "
            f"{clean.num_classes} of {clean.image_shape[0]}x{clean.image_shape[1]}: leave it out "
            "of config.eval_sets (--sets)."
        )


def _cells(names: Iterable[str]) -> list[Cell]:
    return list(itertools.product(names, corruptions.SEVERITIES))


@dataclasses.dataclass(frozen=True, eq=False)
class _Corrupted:
    """The first `size` clean images, corrupted each time they are asked for, `side` pixels wide."""

    clean: data.Dataset
    size: int
    name: str
    severity: int
    seed: int
    table: str
    side: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return next(iter(self.__getitems__([i])))

    def __getitems__(self, indices: Sequence[int]) -> Iterable[tuple[np.ndarray, int]]:
        batch = data.gather(self.clean, np.asarray(indices))
        images = corruptions.corrupt(
            self.name,
            self.severity,
            corruptions.as_uint8(batch["image"]),
            self.seed,
            indices=indices,
            table=self.table,
        )
        if self.side != self.clean.image_shape[0]:
            images = photographs.shrunk(images, self.side)
        return zip(images, batch["label"].tolist(), strict=True)


def _on_the_fly(
    config: ml_collections.ConfigDict, clean: data.Dataset, names: Sequence[str], size: int
) -> tuple[dict[Cell, data.Dataset], dict[str, Any]]:
    settings = {"seed": config.corruption_seed, "table": config.corruption_table}
    side, told = clean.image_shape[0], {}
    original = clean
    if config.dataset == "imagenet2012" and config.corruption_table == "imagenet":
        # As in ImageNet-C, the squares are corrupted at the size its parameters are meant for.
        original, told = data.resized(clean, _IMAGENET_C), {"pixels": _IMAGENET_C}
    sources = {
        cell: _Corrupted(original, size, *cell, **settings, side=side) for cell in _cells(names)
    }
    for name in names:  # One image each, for whatever is wrong to show now.
        _ = sources[name, 1][0]
    datasets = {cell: dataclasses.replace(clean, source=s) for cell, s in sources.items()}
    recipe = corruptions.RECIPES[config.corruption_table]
    return datasets, {"kind": "on_the_fly", "recipe": recipe, **settings, **told}


def _from_tfds(
    config: ml_collections.ConfigDict, clean: data.Dataset, names: Sequence[str], size: int
) -> tuple[dict[Cell, data.Dataset], dict[str, Any]]:
    base, open_cell = "test", data.cifar10_corrupted
    if config.dataset == "imagenet2012":
        base = "validation"
        open_cell = functools.partial(data.imagenet2012_corrupted, image_size=config.image_size)
    else:
        _require_cifar10(clean, "cifar10_corrupted")
    split = f"{base}[:{size}]" if size < len(clean) else base
    datasets, digests = {}, {}
    for cell in _cells(names):
        datasets[cell] = dataset = open_cell(*cell, config.data_dir or None, split=split)
        if len(dataset) != size:
            raise UserError(
                f"{dataset.name} has {len(dataset)} images, and there are {size} clean ones: set "
                "config.eval_split (--split) to the test split that it was made from."
            )
        digests["{}/{}".format(*cell)] = dataset.fingerprint
    return datasets, {"kind": "tfds", "files": digests}


# ------------------------------------------------------------------------ a folder of .npy files


def _from_folder(
    config: ml_collections.ConfigDict, clean: data.Dataset, names: Sequence[str], size: int
) -> tuple[dict[Cell, data.Dataset], dict[str, Any]]:
    """Opens a "-C" set in the published layout, see `corruptions.write_set`, memory-mapped."""
    what = f"config.eval_c_dir (--c_dir) = {config.eval_c_dir!r}"
    folder = paths.local(what, config.eval_c_dir).absolute()
    _check_whole(folder)
    sha256, clean_labels = corruptions.digest(clean)
    source = {"kind": "npy", "folder": str(folder)} | _read_manifest(folder, sha256)
    labels = _read_labels(folder, clean_labels)
    datasets = {}
    files = {"labels": folder / "labels.npy"} | {name: _path_of(folder, name) for name in names}
    for name in names:
        images = _read_images(folder, name, len(corruptions.SEVERITIES), clean)
        for severity, block in zip(corruptions.SEVERITIES, images, strict=True):
            arrays = data.ArraySource(block[:size], labels[:size])
            datasets[name, severity] = dataclasses.replace(clean, source=arrays)
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(_file_digest, files.values())
        return datasets, source | {"files": dict(zip(files, digests, strict=True))}


def _file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file; read once by a process while nobody writes to it."""
    stat = path.stat()
    return _digest_of(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _digest_of(path: pathlib.Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_whole(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"config.eval_c_dir (--c_dir) = {str(folder)!r} is not a folder: name one with .npy "
            "files, or 'tfds', or '' to corrupt on the fly."
        )
    if partial := sorted(folder.glob("*.partial")):
        raise UserError(
            f"config.eval_c_dir (--c_dir) = {str(folder)!r} is half-written ({partial[0].name}): "
            "let python -m ada_jax.corruptions end, or start it again, which goes on."
        )


def _load_array(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        fix = "is missing: complete the folder"
    except npy_files.DAMAGED as error:
        fix = f"is not a whole array ({' '.join(str(error).split())}): copy it again"
    raise UserError(
        f"{path.name} in config.eval_c_dir (--c_dir) = {str(path.parent)!r} {fix}, or set '' to "
        "corrupt on the fly."
    )


def _read_labels(folder: pathlib.Path, clean: np.ndarray) -> np.ndarray:
    """The labels [N] of one severity, which all severities share, int32."""
    labels = _load_array(folder / "labels.npy")
    wanted = len(corruptions.SEVERITIES) * len(clean)
    where = f"labels.npy in config.eval_c_dir (--c_dir) = {str(folder)!r}"
    if labels.shape != (wanted,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{where} is {_described(labels)} and should be [{wanted}] integers, five times the "
            f"{len(clean)} clean ones: set config.eval_split (--split) to the images that it was "
            "made from."
        )
    blocks = labels.reshape(-1, len(clean)).astype(np.int64)
    # Their order may differ: TFDS has CIFAR-10 shuffled, the published files have not.
    if (blocks != blocks[0]).any() or not np.array_equal(np.sort(blocks[0]), np.sort(clean)):
        raise UserError(
            f"{where} does not have the labels of the {len(clean)} clean images five times: set "
            "config.eval_split (--split) to the images that it was made from."
        )
    return blocks[0].astype(np.int32)


def _read_manifest(folder: pathlib.Path, sha256: str) -> dict[str, Any]:
    """What `corruptions.write_set` says of a set of its own; nothing of another's."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = paths.read_json(path)
        told = {field: manifest[field] for field in ("seed", "table", "recipe")}
        severities, made_from = manifest["severities"], manifest["data_sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): write the set again.") from error
    if severities != list(corruptions.SEVERITIES):
        raise UserError(
            f"config.eval_c_dir (--c_dir) = {str(folder)!r} has the severities {severities}: "
            "write a set with all of 1,2,3,4,5."
        )
    if made_from != sha256:
        raise UserError(
            f"config.eval_c_dir (--c_dir) = {str(folder)!r} was made from other images than "
            f"config.eval_split has (sha256 {made_from[:12]}..., not {sha256[:12]}...): set "
            "config.eval_split (--split) to those."
        )
    return told


def _path_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    path = folder / f"{name}.npy"
    other = folder / f"{data.TFDS_SPELLINGS.get(name, name)}.npy"
    return path if path.exists() or not other.exists() else other


def _read_images(
    folder: pathlib.Path, name: str, severities: int, clean: data.Dataset
) -> np.ndarray:
    """[S, N, H, W, 3] uint8, of a file in either spelling."""
    path = _path_of(folder, name)
    images = _load_array(path)
    wanted = (severities * len(clean), *clean.image_shape)
    if images.shape != wanted or images.dtype != np.uint8:
        raise UserError(
            f"{path.name} in config.eval_c_dir (--c_dir) = {str(folder)!r} is "
            f"{_described(images)} and should be [{', '.join(map(str, wanted))}] uint8: write it "
            "again, or set config.eval_split (--split) to the images that it was made from."
        )
    return images.reshape(severities, len(clean), *clean.image_shape)


def _described(array: np.ndarray) -> str:
    return f"[{', '.join(map(str, array.shape))}] {array.dtype}"


# ------------------------------------------------------------------------ results


def new_results(
    config: ml_collections.ConfigDict,
    *,
    name: str,
    step: int,
    weights_digest: str,
    clean: data.Dataset,
    source: Mapping[str, Any],
) -> Results:
    """A results file's content before anything is measured.

    Args:
      config: of the run.
      name: what tables call the run.
      step: updates made.
      weights_digest: of {'params': ..., 'state': ...}, see `checkpoint.digest`.
      clean: the clean images of config.eval_split.
      source: see `Sets`.
    """
    results = {
        "schema": SCHEMA,
        "name": name,
        "published": False,
        "seed": config.seed,
        "step": step,
        "config": config.to_dict(),
        "commit": logbook.commit(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "seconds": 0.0,
        "weights_digest": weights_digest,
        "data": {
            "name": clean.name,
            "split": config.eval_split,
            "examples": len(clean),
            "fingerprint": clean.fingerprint,
        },
        "class_names": list(clean.class_names),
    }
    results |= {"corruption_source": dict(source)} if source else {}
    return json.loads(json.dumps(results))  # Tuples become lists, as they come back.


def with_earlier(
    results: Results,
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    clean: data.Dataset | None = None,
) -> Results:
    """Adds what a results file of the same weights and data has measured already, if there is one.

    Args:
      results: from `new_results`.
      path: the file, which need not exist.
      replace: take a file of other weights for none.
      clean: the clean images, to recognise them in a file of an older version, whose fingerprint
        is of 256 images; what is returned has the one of now.

    Raises:
      UserError: it is damaged, of another schema, or of other weights, data or corruptions.
    """
    if not paths.exists(path):
        return results
    try:
        before = dict(paths.read_json(path))
        if replace and before["weights_digest"] != results["weights_digest"]:
            return results
        if clean is not None and data.recognises(clean, before["data"].get("fingerprint")):
            if before["data"]["fingerprint"] != clean.fingerprint:
                logging.warning(
                    "%s is of an older version, which knew data by 256 examples: rename it to "
                    "measure anew if the others may have changed.",
                    path,
                )
            before["data"]["fingerprint"] = clean.fingerprint
        _check_same(results, before, path)
        _check_rows(before)
        seconds = float(before["seconds"])
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"The results file {path} cannot be read ({error!r}): rename it, or name another with "
            "--out."
        ) from error
    if "corruption_source" in results and "corruption_source" in before:
        files = [of["corruption_source"].get("files", {}) for of in (before, results)]
        if any(files):
            before["corruption_source"]["files"] = files[0] | files[1]
    # What the file says of the run itself stays, as what it was trained and first measured by.
    return results | before | {"seconds": seconds} | _means(before)


def _check_same(results: Results, before: Results, path: paths.AnyPath) -> None:
    """Refuses a file whose numbers cannot stand beside those that are to be measured."""

    def facts(of: Results) -> dict[str, Any]:
        kept = {name: of.get(name) for name in ("schema", "weights_digest", "data")}
        config = dict(of.get("config") or {})
        return kept | {name: config.get(name) for name in ("classifier", "mean", "std")}

    now, then = facts(results), facts(before)
    if "corruption_source" in results and "corruption_source" in before:
        now["corruption_source"] = dict(results["corruption_source"])
        then["corruption_source"] = dict(before["corruption_source"])
        files = [of["corruption_source"].pop("files", {}) for of in (now, then)]
        if all(files):  # Of the images themselves, wherever they lie.
            both = files[0].keys() & files[1].keys()
            for of, digests in zip((now, then), files, strict=True):
                of["corruption_source"].pop("folder", None)
                of["corruption_source.files"] = {name: digests[name] for name in sorted(both)}
    for field, value in now.items():
        if (old := then[field]) == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):  # What differs of them is enough.
            part = next(k for k in (*value, *old) if value.get(k) != old.get(k))
            field, value, old = f"{field}.{part}", value.get(part), old.get(part)
        raise UserError(
            f"The results file {path} has {field} = {json.dumps(old)}, and this evaluation has "
            f"{json.dumps(value)}: move it away, or name another with "
            "python -m ada_jax.evaluate --out."
        )


def _check_rows(results: Results) -> None:
    for name, rows in results.get("corruptions", {}).items():
        severities = [row["severity"] for row in rows]
        known = name in corruptions.NAMES + corruptions.EXTRA
        if not known or not set(severities) <= set(corruptions.SEVERITIES):
            raise ValueError(f"no corruption {name} of the severities {severities}")
        if len(set(severities)) != len(rows):
            raise ValueError(f"a severity of {name} is there twice")
        for row in rows:
            if row["error"] != 100 * row["wrong"] / row["examples"]:
                raise ValueError(f"the counts and errors of {name} do not agree")


def complete(
    results: Results,
    path: str | os.PathLike[str],
    eval_step: Callable[..., dict[str, jax.Array]],
    variables: Sequence[Any],
    datasets: Mapping[Cell, data.Dataset],
    batch_size: int,
) -> Results:
    """Measures what the results lack, writing the file after every cell.

    Args:
      results: so far.
      path: the file.
      eval_step: see `measure`.
      variables: see `measure`.
      datasets: all that the results should have; see `measure`.
      batch_size: see `measure`.

    Returns:
      The results with everything in `datasets` measured.
    """
    have = hosts.of_first(np.array([_has(results, cell) for cell in datasets]))
    todo = {cell: datasets[cell] for cell, done in zip(datasets, have, strict=True) if not done}
    started, before = time.monotonic(), results["seconds"]
    for cell, counts in measure(eval_step, variables, todo, batch_size):
        results = _with(results, cell, counts)
        results["seconds"] = before + time.monotonic() - started
        write(path, results)
    write(path, results)
    return results


def write(path: str | os.PathLike[str], results: Results) -> None:
    """Writes a results file whole or not at all, by the first process alone."""
    if jax.process_index() != 0:
        return
    path = paths.at(path)
    try:
        paths.make_folder(path.parent)
        logbook.write_json(path, results)
    except OSError as error:
        raise UserError(
            f"The results file {path} cannot be written ({error.strerror}): free some space, or "
            "name another with --out."
        ) from error


def _has(results: Results, cell: Cell) -> bool:
    name, severity = cell
    if not severity:
        return name in results
    return any(row["severity"] == severity for row in results.get("corruptions", {}).get(name, ()))


def _with(results: Results, cell: Cell, counts: Counts) -> Results:
    """The results with one more cell."""
    name, severity = cell
    measured = {field: counts[field] for field in ("examples", "wrong", "error")}
    if not severity:
        return results | {name: counts if name == "clean" else measured}
    grid = results.get("corruptions", {})
    rows = [*grid.get(name, ()), {"severity": severity, **measured}]
    results = results | {"corruptions": grid | {name: sorted(rows, key=lambda r: r["severity"])}}
    return results | _means(results)


def mean_error(
    grid: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]
) -> float | None:
    """The mean over corruptions of the mean error over severities: mCE, un-normalised.

    Args:
      grid: results' 'corruptions'.
      names: which of them; NAMES of `corruptions` for the mCE.

    Returns:
      Percent; None where a severity of one of them is missing.

    Source: Calian et al. (2021), section 4; not divided by AlexNet's errors.
    """
    rows = [grid.get(name, ()) for name in names]
    if any(len(r) != len(corruptions.SEVERITIES) for r in rows):
        return None
    return float(np.mean([np.mean([row["error"] for row in r]) for r in rows]))


def alexnet_mce(grid: Mapping[str, Sequence[Mapping[str, Any]]]) -> float | None:
    """ImageNet-C's mCE: the mean over corruptions of the error relative to AlexNet's.

    Args:
      grid: results' 'corruptions'.

    Returns:
      Percent of AlexNet's error; None where a severity of one of the 15 is missing.

    Source: Hendrycks & Dietterich (2019), section 4.2.
    """
    errors = {name: mean_error(grid, [name]) for name in corruptions.NAMES}
    if None in errors.values():
        return None
    return float(np.mean([errors[n] / a for n, a in corruptions.ALEXNET_ERRORS.items()]))


def _means(results: Results) -> Results:
    """The means that the results are complete enough for."""
    names = {"mce_unnormalised": corruptions.NAMES, "mean_extra": corruptions.EXTRA}
    grid = results.get("corruptions", {})
    means = {f: mean_error(grid, names[f]) for f in names}
    if results["data"]["name"] == "imagenet2012":
        means["mce_alexnet"] = alexnet_mce(grid)
    return {field: mean for field, mean in means.items() if mean is not None}


def flat_errors(
    measured: Iterable[tuple[Cell, Counts]],
) -> dict[str, float]:
    """The corruption errors of `measure` for a log: 'error/NAME/SEVERITY' and 'mce', in percent."""
    errors = {f"error/{name}/{severity}": c["error"] for (name, severity), c in measured}
    # Every corruption has all its severities, so that the mean of means is the mean.
    return errors | {"mce": float(np.mean(list(errors.values())))}


def rows(results: Results) -> list[tuple[str, str]]:
    """The results as a table's (name, value)."""

    def of(counts: Counts) -> str:
        return f"{counts['error']:.2f}% of {counts['examples']} images"

    shown = [("clean error", of(results["clean"]))] if "clean" in results else []
    grid = results.get("corruptions", {})
    for names, field, title in (
        (corruptions.NAMES, "mce_unnormalised", "mCE, un-normalised"),
        (corruptions.EXTRA, "mean_extra", "mean of the 4 extra"),
    ):
        errors = {name: mean_error(grid, [name]) for name in names}
        shown += [(n.replace("_", " "), f"{e:.2f}%") for n, e in errors.items() if e is not None]
        shown += [(title, f"{results[field]:.2f}%")] if field in results else []
    if "mce_alexnet" in results:
        shown.append(("mCE, AlexNet's errors as 100%", f"{results['mce_alexnet']:.2f}%"))
    if "cifar10_1" in results:
        shown.append(("CIFAR-10.1 v6 error", of(results["cifar10_1"])))
    return shown


# ------------------------------------------------------------------------ the config

_NEEDED = {  # and the kinds of their values; a tuple's elements are of one kind
    **dict.fromkeys(("name", "dataset", "data_dir", "train_split", "eval_split"), str),
    **dict.fromkeys(("classifier", "compute_dtype", "compilation_cache"), str),
    **dict.fromkeys(("eval_c_dir", "corruption_table"), str),
    **dict.fromkeys(("seed", "image_size", "eval_batch_size", "cpu_devices"), int),
    **dict.fromkeys(("corruption_seed",), int),
    **dict.fromkeys(("cross_replica_bn", "zero_init_logits"), bool),
    **{"bn_decay": float, "mean": (float,), "std": (float,), "eval_sets": (str,)},
}
DATA_FLAGS = {  # of binaries with --split and --data_dir, for the fields that `data` names
    "config.train_split or config.eval_split": "--split",
    "--config.data_dir": "--data_dir",
}
_FLAGS = {
    "sets": "eval_sets",
    "c_dir": "eval_c_dir",
    "corruption_seed": "corruption_seed",
    "corruption_table": "corruption_table",
    "batch_size": "eval_batch_size",
    "split": "eval_split",
    "data_dir": "data_dir",
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Finds what is wrong with the evaluation's part of a config.

    Raises:
      UserError: naming the field, its value and the fix.
    """
    unknown = [name for name in config.eval_sets if name not in SETS]
    if unknown or not config.eval_sets:
        raise UserError(
            f"config.eval_sets (--sets) = {tuple(config.eval_sets)} is empty or has an unknown "
            f"name: choose from {', '.join(SETS)}; ada_jax.evaluate has {', '.join(WORST)} besides."
        )
    if not 0 <= config.corruption_seed < 2**32:
        raise UserError(
            f"config.corruption_seed={config.corruption_seed} is out of range: choose it in "
            f"0..{2**32 - 1}."
        )
    if config.corruption_table not in corruptions.TABLES:
        raise UserError(
            f"config.corruption_table={config.corruption_table!r} is unknown: choose from "
            f"{', '.join(corruptions.TABLES)}."
        )
    if config.eval_batch_size < 1:
        raise UserError(
            f"config.eval_batch_size (--batch_size) = {config.eval_batch_size} must be 1 or more."
        )


def config_of_run(workdir: str) -> ml_collections.ConfigDict:
    """The config that a run was started with, unlocked.

    Raises:
      UserError: there is none in `workdir`, or it is damaged.
    """
    path = paths.at(workdir) / "config.json"
    try:
        fields = dict(paths.read_json(path))
    except FileNotFoundError as error:
        raise UserError(
            f"--workdir={workdir} has no config.json, so no run was started there: name a run's "
            "folder, or give --config with --weights."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again.") from error
    return ml_collections.ConfigDict(fields, type_safe=False)


def _with_flags(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    if missing := [name for name in _NEEDED if name not in config]:
        raise UserError(
            f"The config has no field {missing[0]!r}, so it is not of a classifier's training: "
            "name another with --config or --workdir."
        )
    if wrong := [name for name, kind in _NEEDED.items() if not _is_kind(config[name], kind)]:
        raise UserError(
            f"config.{wrong[0]}={config[wrong[0]]!r} is of another type than a run's: name another "
            "config with --config or --workdir, or set the value back."
        )
    values = {field: flags.FLAGS[flag].value for flag, field in _FLAGS.items()}
    config = config.copy_and_resolve_references().unlock()
    with config.ignore_type():
        config.update({field: v for field, v in values.items() if v is not None})
    return config.lock()


def _is_kind(value: Any, kind: Any) -> bool:
    """Whether a config's value is of a kind in `_NEEDED`."""
    if isinstance(kind, tuple):
        return isinstance(value, tuple | list) and all(_is_kind(v, kind[0]) for v in value)
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


# ------------------------------------------------------------------------ the binary


def _check_flags(argv: list[str]) -> None:
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"The argument {argv[1]!r} is not a flag: write --flag=value.")
    given = [f for f in ("workdir", "weights", "random") if values[f].value]
    if len(given) != 1:
        raise UserError(
            f"There are {len(given)} of --workdir, --weights and --random: give one, a run's "
            "folder, a file of weights or none at all, to say what to evaluate."
        )
    if values.workdir and values.config:
        raise UserError(
            f"--workdir={values.workdir} has a config.json of its own: leave --config out."
        )
    for flag in ("config", "out"):
        if not values.workdir and not values[flag].value:
            raise UserError(f"--{given[0]} needs --{flag}=FILE beside it: give both.")
    for flag in ("workdir", "weights", "out"):
        paths.check_bucket(f"--{flag}={values[flag].value}", values[flag].value or "")


def load_variables(
    config: ml_collections.ConfigDict,
    classifier: hk.TransformedWithState,
    image_shape: Sequence[int],
    path: str | os.PathLike[str],
) -> tuple[hk.Params, hk.State, int]:
    """The classifier's variables from a weights file, or from a run's folder.

    Args:
      config: the classifier's; its 'mean' and 'std' must be those that the weights were trained
        with, where their file says so.
      classifier: what they are for.
      image_shape: [H, W, 3].
      path: a safetensors file, or a folder with classifier.safetensors or else checkpoints.

    Returns:
      Parameters, batch-norm averages, and the step they are of.

    Raises:
      UserError: there are none, or they are damaged, of another architecture or of images that were
        normalised otherwise.
    """
    path, images = paths.at(path), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = functools.partial(classifier.init, is_training=True)
    params, state = jax.eval_shape(init, jax.random.key(0), images)
    folder = paths.is_dir(path)
    file = path / "classifier.safetensors" if folder else path
    if paths.exists(file) or not folder:
        tree, metadata = checkpoint.load_weights(file, {"params": params, "state": state})
        for field in ("mean", "std"):
            value = tuple(metadata.get(field, config[field]))
            if value != tuple(config[field]):
                raise UserError(
                    f"The weights file {file} was trained with config.{field}={value}, and this "
                    f'config has {tuple(config[field])}: set --config.{field}="{value}".'
                )
        return tree["params"], tree.get("state", {}), int(metadata.get("step", 0))
    if paths.is_dir(path / "checkpoints"):
        checkpoints = checkpoint.Checkpoints(path, keep=1)
        found = checkpoints.read_latest({"params": params, "net_state": state})
        checkpoints.close()
        if found:
            return found[0]["params"], found[0].get("net_state", {}), found[1]
    raise UserError(
        f"{path} has neither classifier.safetensors nor an undamaged checkpoint: train there "
        "first, or name a file of weights."
    )


def random_variables(
    classifier: hk.TransformedWithState, clean: data.Dataset, seed: int
) -> tuple[hk.Params, hk.State]:
    """The classifier's variables before training."""
    images = data.to_float(next(data.eval_batches(clean, batch_size=8))["image"])
    init = jax.jit(classifier.init, static_argnames="is_training")
    return init(jax.random.key(seed), images, is_training=True)


def main(argv: list[str]) -> None:
    """Evaluates what the flags describe."""
    try:
        _check_flags(argv)
        with contextlib.ExitStack() as locked:
            _evaluate(flags.FLAGS, locked)
    except UserError as error:
        raise renamed(error, DATA_FLAGS) from error


def _lock(out: str) -> Any:
    """What is locked to write a results file: of a run its folder, as in training."""
    path = paths.at(out)
    return locks.of_folder(path.parent) if path.name == "results.json" else locks.of_file(path)


def _evaluate(values: flags.FlagValues, locked: contextlib.ExitStack) -> None:
    started, workdir, weights = time.monotonic(), values.workdir, values.weights
    worst = [name for name in WORST if name in (values.sets or ())]
    if worst:
        values.sets = [name for name in values.sets if name not in WORST] or ["clean"]
    config = _with_flags(config_of_run(workdir) if workdir else values.config)
    validate(config)
    _check_worst(values, worst)
    cli.set_up_devices(config.cpu_devices, config.compilation_cache)
    clean = data.load(
        config.dataset,
        config.eval_split,
        data_dir=config.data_dir or None,
        image_size=config.image_size,
    )
    if "ada" in worst:
        unscaled = [1] * len(values.ada_nets)
        corruption_nets.check_sizes("--ada_nets", values.ada_nets, unscaled, clean.image_shape)
    sets = open_sets(config, clean, config.eval_sets)
    about = {} if values.random else metadata(workdir or weights)
    class_names = about.get("class_names", clean.class_names)
    datasets = {
        cell: data.renumbered(dataset, class_names) for cell, dataset in sets.datasets.items()
    }
    classifier = make_classifier(config, len(class_names))
    if values.random:
        name, step = f"{config.name}_random", 0
        params, state = random_variables(classifier, clean, config.seed)
    else:
        name = config.name if workdir else pathlib.Path(weights).stem
        params, state, step = load_variables(
            config, classifier, clean.image_shape, workdir or weights
        )
    out = values.out or os.path.join(workdir, "results.json")
    locked.enter_context(locks.hold(f"--out={out}", _lock(out)))
    results = new_results(
        config,
        name=name,
        step=step,
        weights_digest=checkpoint.digest({"params": params, "state": state}),
        clean=clean,
        source=sets.source,
    )
    results["class_names"] = list(class_names)
    results |= {"training": about["training"]} if "training" in about else {}
    if count := _trained_on(config, workdir, about, clean):
        results["trained_on"] = count
        logging.warning("%d of these %d images were trained on.", count, len(clean))
    results = with_earlier(results, out, clean=clean)
    clean = data.renumbered(clean, class_names)
    variables, eval_step = replicate((params, state)), map_eval_step(classifier)
    results = complete(results, out, eval_step, variables, datasets, config.eval_batch_size)
    logits_fn = functools.partial(apply_classifier, classifier, params, state)
    settings = {"examples": values.worst_examples, "seed": config.seed}
    settings |= {"batch_size": min(config.eval_batch_size, 256)}
    save = functools.partial(write, out)
    if "lp" in worst:
        results = worst_case.pixel_balls(
            results, save, logits_fn, clean, state_dir=f"{out}.attacks", **settings
        )
    if "ada" in worst:
        results = worst_case.under_ada(
            results,
            save,
            logits_fn,
            clean,
            nets=values.ada_nets,
            radii=[float(nu) for nu in values.ada_radii],
            steps=values.ada_steps,
            restarts=values.ada_restarts,
            **settings,
        )
    table = [
        *rows(results),
        *worst_case.rows(results),
        ("results", out),
        ("time of this evaluation", logbook.clock(time.monotonic() - started)),
    ]
    print("\n" + logbook.table(table), flush=True)


def _trained_on(
    config: ml_collections.ConfigDict,
    workdir: str | None,
    about: Mapping[str, Any],
    clean: data.Dataset,
) -> int:
    """How many of the images the classifier was trained on, where its training images are there.

    Args:
      config: of the evaluation.
      workdir: the run's folder; None for weights alone.
      about: `metadata` of the weights; {} for random ones.
      clean: the images.
    """
    if about.get("training", {}).get("data") == clean.fingerprint:
        return len(clean)
    trained = config_of_run(workdir) if workdir else config
    split = trained.train_split if workdir else about.get("train_split")
    # Files of one's own are those named at training; --data_dir says where copies of others are.
    own = trained.dataset in ("folder", "npz")
    other = about.get("dataset", trained.dataset) != trained.dataset
    if not split or (not workdir and (own or other)):
        return 0
    try:
        train_set = data.load(
            trained.dataset,
            split,
            data_dir=(trained if own else config).data_dir or None,
            image_size=trained.image_size,
            encoded=True,
        )
    except UserError:
        return 0
    return max(data.overlap(train_set, clean))


def check_radii(flag: str, radii: Sequence[str]) -> None:
    """Refuses what are no relative radii.

    Raises:
      UserError: naming the flag and the first of them.
    """
    for radius in radii:
        if not re.fullmatch(r"\d*\.?\d+", radius):
            raise UserError(f"--{flag}={radius} is no radius: give numbers from 0, as 0.015.")


def _check_worst(values: flags.FlagValues, worst: Sequence[str]) -> None:
    known = corruption_nets.names()
    if "ada" in worst and not (values.ada_nets and values.ada_radii):
        raise UserError("--ada_nets or --ada_radii is empty: name at least one each.")
    if unknown := [name for name in values.ada_nets if name not in known]:
        raise UserError(f"--ada_nets={unknown[0]} is unknown: choose from {', '.join(known)}.")
    check_radii("ada_radii", values.ada_radii)
    for name, least in (("worst_examples", 0), ("ada_steps", 0), ("ada_restarts", 1)):
        if values[name].value < least:
            raise UserError(f"--{name}={values[name].value} must be {least} or more.")


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "As for train, with --weights or --random.")
    flags.DEFINE_string("workdir", None, "Folder of a run, finished or not.")
    flags.DEFINE_string("weights", None, "A classifier's safetensors file.")
    flags.DEFINE_bool("random", False, "Evaluate the classifier as it is before training.")
    flags.DEFINE_list("sets", None, f"Which of {','.join(SETS + WORST)}.")
    flags.DEFINE_integer("worst_examples", 0, "lp, ada: images, from the start; 0 is all.")
    flags.DEFINE_list("ada_nets", ["edsr_small"], "ada: corruption networks.")
    flags.DEFINE_list("ada_radii", ["0.015", "0.03", "0.06"], "ada: relative radii nu.")
    flags.DEFINE_integer("ada_steps", 10, "ada: steps of ascent.")
    flags.DEFINE_integer("ada_restarts", 1, "ada: attacks, of which one is enough.")
    flags.DEFINE_string("c_dir", None, "Folder of a '-C' set, 'tfds', or '' to corrupt on the fly.")
    flags.DEFINE_integer("corruption_seed", None, "Of the corruptions on the fly.")
    flags.DEFINE_string("corruption_table", None, "Whose parameters on the fly: cifar or imagenet.")
    flags.DEFINE_integer("batch_size", None, "Images at a time over all devices.")
    flags.DEFINE_string("split", None, "Clean images, such as test[:500].")
    flags.DEFINE_string("data_dir", None, "Where the data is.")
    flags.DEFINE_string("out", None, "Results file; by default results.json in the workdir.")
    cli.start(main, computes=True)
