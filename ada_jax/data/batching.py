"""Batches of a data set: shuffled and prefetched for training, in order for evaluation.

A training batch is a pure function of (seed, step): it depends neither on earlier steps nor on the
number of processes, so a run resumes at any step, also with another number of processes.
"""

import collections
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ada_jax.data import core, photographs
from ada_jax.errors import UserError

_AHEAD_LIMIT = 2 * 10**9  # Bytes of prefetched batches.


def train_batches(
    dataset: core.Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    renderings: Sequence[Sequence[Any]] = (),
    clean_too: bool = True,
    crop_scale: Sequence[float] = (),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> Iterator[dict[str, np.ndarray]]:
    """Yields shuffled batches forever; step s is a pure function of (seed, s).

    Every epoch has its own permutation, keyed on (seed, epoch). No example is dropped between two
    epochs, so a batch that spans two may contain an example twice. Each process takes a contiguous
    part of the global batch, with b = batch_size / process_count examples.

    Args:
      dataset: the examples.
      batch_size: examples per step over all processes, at most len(dataset).
      seed: in 0..2**32-1.
      start_step: the step of the first batch.
      process_index: this process, in 0..process_count-1.
      process_count: number of processes that share each batch.
      num_threads: number of threads that prefetch batches; 0 makes them on demand.
      renderings: sources of other versions of the images. Each has K copies, which map a position
        in `dataset` to [H, W, 3] uint8. An example's source is drawn uniformly from these and the
        data set, then its copy. The length of an epoch does not change.
      clean_too: whether the data set itself is one of the sources.
      crop_scale: range of the area of random crops, drawn for every step and position (see
        `photographs.random_box`); () takes central squares. Needs a `photographs.Source`, and no
        `renderings`.
      crop_ratio: range of the crops' width over height.

    Returns:
      An iterator of {'image': [b, H, W, 3] uint8 in 0..255 or float32 in [0, 1], 'label': [b]
      int32, 'index': [b] int32, the position in `dataset`}.
    """
    size, share = len(dataset), _share(batch_size, process_index, process_count)

    def batch(step: int) -> dict[str, np.ndarray]:
        epochs, offsets = np.divmod(step * batch_size + share, size)
        parts = [_permutation(size, seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
        indices = np.concatenate(parts)
        if crop_scale:
            generators = [np.random.RandomState([seed, step, position]) for position in share]
            crops = dataset.source.random_crops(
                indices.tolist(), generators, tuple(crop_scale), tuple(crop_ratio)
            )
            return _stacked(crops, indices)
        examples = gather(dataset, indices)
        if renderings:
            # Drawn for the global batch; `share` has this process's positions.
            draws = np.random.RandomState([seed, step, batch_size])
            first, copies = int(not clean_too), len(renderings[0])
            sources = draws.randint(first, 1 + len(renderings), batch_size)[share]
            _render(examples, renderings, sources, draws.randint(copies, size=batch_size)[share])
        return examples

    steps = range(start_step, sys.maxsize)
    return _prefetched(batch, steps, num_threads, _bytes(dataset, len(share)))


def _render(
    examples: dict[str, np.ndarray],
    renderings: Sequence[Sequence[Any]],
    sources: np.ndarray,
    copies: np.ndarray,
) -> None:
    """Replaces every image by a copy from its source; source 0 is the image itself."""
    images, index = examples["image"], examples["index"]
    scale = 1 if images.dtype == np.uint8 else np.float32(1 / 255)
    for i in np.flatnonzero(sources):
        images[i] = renderings[sources[i] - 1][copies[i]][int(index[i])] * scale


def eval_batches(
    dataset: core.Dataset,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of one data set, see `chained_eval_batches`."""
    batches = chained_eval_batches(
        [dataset],
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    return (batch for _, batch in batches)


def chained_eval_batches(
    datasets: Sequence[core.Dataset],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields every example of several data sets once over all processes, in order.

    The last batch of a data set is padded. All processes yield the same number of batches, so that
    none waits for another in a collective operation.

    Args:
      datasets: the data sets; a batch has examples of one of them.
      batch_size, process_index, process_count: as for `train_batches`.
      num_threads: number of threads that prefetch batches.

    Returns:
      An iterator of (position in `datasets`, batch). Batches are as in `train_batches`, with 'mask'
      [b] float32, which is 1 for examples and 0 for padding. The padding repeats the last example.

    Raises:
      UserError: the batch size is out of range.
    """
    share = _share(batch_size, process_index, process_count)
    starts = [
        (i, start)
        for i, dataset in enumerate(datasets)
        for start in range(0, len(dataset), batch_size)
    ]

    def batch(step: int) -> tuple[int, dict[str, np.ndarray]]:
        i, start = starts[step]
        positions, size = start + share, len(datasets[i])
        mask = (positions < size).astype(np.float32)
        # Padded with a real image: zeros could lead to NaN, which a mask of 0 does not remove.
        return i, gather(datasets[i], np.minimum(positions, size - 1)) | {"mask": mask}

    size = max((_bytes(dataset, len(share)) for dataset in datasets), default=1)
    return _in_threads(batch, range(len(starts)), num_threads, _ahead(num_threads, size))


def _share(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """This process's positions within the global batch."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"config.batch_size or config.eval_batch_size = {batch_size} cannot be divided among "
            f"{process_count} process(es): make it a positive multiple of {process_count}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0..{process_count - 1}.")
    local = batch_size // process_count
    return process_index * local + np.arange(local)


@functools.lru_cache(maxsize=8)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy guarantees that RandomState's stream never changes, so old runs can be repeated. Grain's
    # shuffle is keyed on seed + epoch, so that consecutive seeds would share epochs.
    return np.random.RandomState([seed, epoch]).permutation(size).astype(np.int32)


def gather(dataset: core.Dataset, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of the examples at positions [b], as in `train_batches`."""
    source, indices = dataset.source, indices.astype(np.int32)
    if isinstance(source, core.ArraySource):
        images, labels = source.images[indices], source.labels[indices]
        return {"image": images, "label": labels, "index": indices}
    return _stacked(photographs.get_many(source, indices.tolist()), indices)


def _stacked(
    examples: Iterable[tuple[np.ndarray, int]], indices: np.ndarray
) -> dict[str, np.ndarray]:
    images, labels = zip(*examples, strict=True)
    return {"image": np.stack(images), "label": np.array(labels, np.int32), "index": indices}


def _bytes(dataset: core.Dataset, examples: int) -> int:
    source = dataset.source
    dtype = source.images.dtype if isinstance(source, core.ArraySource) else np.dtype(np.uint8)
    return examples * math.prod(dataset.image_shape) * dtype.itemsize


def _ahead(num_threads: int, batch_bytes: int) -> int:
    """Number of batches to prefetch."""
    return min(2 * num_threads, max(2, _AHEAD_LIMIT // batch_bytes))


def _in_threads(
    batch: Callable[[int], Any], steps: range, num_threads: int, ahead: int
) -> Iterator[Any]:
    """Prefetches batches like `_prefetched`, but without grain, which evaluation does not need."""
    pool, made = futures.ThreadPoolExecutor(num_threads), collections.deque()
    try:
        for step in steps:
            made.append(pool.submit(batch, step))
            if len(made) == ahead:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prefetched(
    batch: Callable[[int], Any], steps: range, num_threads: int, batch_bytes: int
) -> Iterator[Any]:
    import grain  # Slow to import, and not installed without the extra [train].

    # Grain maps whole steps, so that a batch is one indexing operation, not one copy per example.
    ahead = _ahead(num_threads, batch_bytes)
    options = grain.ReadOptions(min(num_threads, ahead), prefetch_buffer_size=ahead)
    batches = grain.MapDataset.range(steps.start, steps.stop).map(batch)
    return iter(batches.to_iter_dataset(options))


def to_float(x: chex.Array) -> jax.Array:
    """Converts uint8 pixels in 0..255 to float32 in [0, 1]; float32 pixels are not changed."""
    if x.dtype == jnp.uint8:
        return jnp.asarray(x, jnp.float32) / 255
    chex.assert_type(x, jnp.float32)
    return jnp.asarray(x)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Converts float32 pixels in [0, 1] to uint8 in 0..255; uint8 pixels are not changed."""
    return images if images.dtype == np.uint8 else np.rint(255 * images).astype(np.uint8)
