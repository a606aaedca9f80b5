"""The training loop that `train` and `pretrain` share.

It resumes bitwise: the state, the metrics not yet logged and the seconds so far are in every
checkpoint, and a step's batch and keys depend on its number alone.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from ada_jax import paths, sharding
from ada_jax.errors import NotFiniteError, UserError
from ada_jax.run import checkpoint, distributed, logbook

State = Any  # A NamedTuple of arrays with the field `step`.
Batch = dict[str, np.ndarray]
Metrics = dict[str, Any]


class Evaluation(NamedTuple):
    """An evaluation that is repeated during training.

    Attributes:
      kind: names its records in metrics.jsonl.
      interval: steps from one evaluation to the next; 0 is never.
      evaluate: maps the state on the devices to scalars.
      at_end: whether to evaluate after the last step too.
    """

    kind: str
    interval: float
    evaluate: Callable[[State], Metrics]
    at_end: bool


class Task(NamedTuple):
    """What a command passes to the training loop.

    Attributes:
      update_step: `update_step(state, batch) -> (state, metrics)`; may donate the state.
      batches: `batches(step)` yields this process's batches from a step on.
      evaluations: on held-out images.
      scalars: `scalars(step)`, what to log beside the metrics, such as the learning rate.
      to_devices: copies a state from the host to the devices.
      to_host: copies it back.
      total_steps: steps of the whole run.
      batch_size: examples of a step over all processes.
      log_interval: steps over which metrics are averaged for the log.
      save_interval: steps from one checkpoint to the next; 0 saves at the end only.
      keep_checkpoints: number of newest checkpoints kept.
      advice: what to change if the loss is no longer finite.
    """

    update_step: Callable[[State, Batch], tuple[State, Metrics]]
    batches: Callable[[int], Iterator[Batch]]
    evaluations: Sequence[Evaluation]
    scalars: Callable[[int], Metrics]
    to_devices: Callable[[State], State]
    to_host: Callable[[State], State]
    total_steps: int
    batch_size: int
    log_interval: int
    save_interval: float
    keep_checkpoints: int
    advice: str


class Trained(NamedTuple):
    """Where training ended.

    Attributes:
      state: the last state, saved, on the host.
      seconds: what the run has taken, with those before it was resumed.
      status: the exit status if a signal stopped the run, else 0.
    """

    state: State
    seconds: float
    status: int


def run(
    task: Task,
    workdir: str,
    state: State,
    *,
    config: Mapping[str, Any],
    expect: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> Trained:
    """Trains, or resumes training, until the last step, SIGTERM or Ctrl-C.

    Args:
      task: what to train.
      workdir: the run's folder, locked.
      state: the state before the first step, on the host.
      config: written to config.json.
      expect: values that a checkpoint must have been written with.
      extra: JSON values to save in every checkpoint.

    Raises:
      UserError: the loss is no longer finite (earlier checkpoints are kept), or the workdir holds
        another run, or one that ended and has no checkpoints any more.
    """
    checkpoints = checkpoint.Checkpoints(workdir, keep=task.keep_checkpoints)
    saved = {"pending": [], "seconds": 0.0}
    if restored := checkpoints.restore(state, expect):
        state, saved_extra, step = restored
        saved |= saved_extra
        logging.info("Going on from step %d of %s.", step, workdir)
    elif trained_before := paths.glob(workdir, "*.safetensors"):
        raise UserError(
            f"--workdir={workdir} has {trained_before[0].name} and no checkpoints: name another "
            "folder, or move its files away to train again."
        )
    saved |= {"expect": expect, **(extra or {})}
    first = jax.process_index() == 0
    if first:
        paths.write_json(os.path.join(workdir, "config.json"), config)
    log = logbook.Logbook(workdir, int(state.step), write=first)
    with contextlib.closing(log), checkpoints.closing():
        trained = _train(task, state, saved, checkpoints, log)
    if trained.status:
        logging.warning(
            "Stopped: saved step %d; run the same command again to continue.", trained.state.step
        )
    return trained


def _train(
    task: Task,
    state: State,
    saved: dict[str, Any],
    checkpoints: checkpoint.Checkpoints,
    log: logbook.Logbook,
) -> Trained:
    """The loop; `saved` is what to save beside the state."""
    first_step = step = int(state.step)
    pending = saved["pending"]
    started = time.monotonic() - saved["seconds"]

    def save(*, wait: bool = False) -> float:
        seconds = time.monotonic() - started
        values = {"pending": finite(pending, step, task.advice), "seconds": seconds}
        log.flush()
        checkpoints.save(step, task.to_host(state), saved | values, wait=wait)
        return seconds

    if step < task.total_steps:
        logging.info("The first step compiles: seconds for small networks, minutes for large ones.")
    state, batches = task.to_devices(state), task.batches(step)
    progress = logbook.Progress(
        step, task.total_steps, task.batch_size, show=jax.process_index() == 0
    )
    with distributed.StopSignal() as stop:
        while step < task.total_steps and not stop.at(step):
            with progress.waiting():
                batch = next(batches)
            state, metrics = task.update_step(state, batch)
            pending.append(metrics)
            step += 1
            last = step == task.total_steps
            if step % task.log_interval == 0 or last:
                summary = summarise(finite(pending, step, task.advice)) | task.scalars(step)
                pending = []
                log.write(step, "train", summary | progress.update(step, summary))
            elif step == first_step + 1:
                progress.skip_compilation(step)
            for evaluation in task.evaluations:
                if is_due(step, evaluation.interval) or (last and evaluation.at_end):
                    with _paused(progress, state):
                        (result,) = finite([evaluation.evaluate(state)], step, task.advice)
                    log.write(step, evaluation.kind, result)
                    progress.note(step, evaluation.kind, result)
            if is_due(step, task.save_interval) and not last:
                with _paused(progress, state):
                    save()
        progress.close()
        # Within the block: a second SIGTERM must not end the process before this is written.
        seconds = save(wait=True)
    return Trained(task.to_host(state), seconds, stop.status)


@contextlib.contextmanager
def _paused(progress: logbook.Progress, state: State) -> Iterator[None]:
    """Leaves what is done with a state out of the speed, but not the steps that compute it."""
    jax.block_until_ready(state)
    with progress.paused():
        yield


def is_due(step: int, interval: float) -> bool:
    """Whether `step` completes an interval of `interval` steps; False for an interval of 0."""
    rounding = 1e-9  # 110 / (1.1 * 100) is less than 1.
    return interval > 0 and int(step / interval + rounding) > int((step - 1) / interval + rounding)


def finite(pending: Sequence[Metrics], step: int, advice: str) -> list[dict[str, float]]:
    """Fetches the metrics of the last steps, and stops the run if one is not finite.

    Args:
      pending: metrics of the steps up to `step`, on the host, on a device or replicated.
      step: the last of these steps.
      advice: what to change, for the message.

    Raises:
      NotFiniteError: naming the first step with a metric that is not finite.
    """
    fetched = [
        {name: float(np.ravel(value)[0]) for name, value in metrics.items()}
        for metrics in jax.device_get(jax.tree.map(sharding.first, list(pending)))
    ]
    for at, metrics in enumerate(fetched, step - len(fetched) + 1):
        bad = [f"{name} {value}" for name, value in metrics.items() if not np.isfinite(value)]
        if bad:
            raise NotFiniteError(
                f"Training stopped at step {at}, where the metrics are {' and '.join(bad)}; "
                f"checkpoints of earlier steps are kept: {advice} and start again in another "
                "--workdir."
            )
    return fetched


def summarise(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One value per metric over several steps: the minimum of '*_min', the mean of the others."""
    return {
        name: float((np.min if name.endswith("_min") else np.mean)([s[name] for s in steps]))
        for name in steps[0]
    }
