"""Where a run's numbers go: metrics.jsonl, TensorBoard and the terminal."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm
from absl import logging

from ada_jax import paths
from ada_jax import results as results_files
from ada_jax.errors import NotFiniteError, UserError

Record = dict[str, Any]


class Logbook:
    """Writes records to metrics.jsonl, where a resumed run leaves none twice, and TensorBoard."""

    def __init__(self, workdir: str, step: int, *, write: bool = True) -> None:
        """Opens the run's records and drops those after `step`, which will be written again.

        Args:
          workdir: the run's folder.
          step: step that the run goes on from.
          write: False on the processes that leave writing to another.
        """
        workdir = os.fspath(paths.at(workdir))
        self._journal = self._tensorboard = None
        self._workdir = workdir
        # On every process: those that did not import it would give up waiting at the first step.
        summary_writer = _summary_writer()
        # On every process, for a damaged log must stop all of them.
        kept = [json.dumps(r) + "\n" for r in read(workdir) if r["step"] <= step]
        if write:
            if summary_writer:
                self._tensorboard = summary_writer(os.path.join(workdir, "tensorboard"))
            self._journal = paths.Journal(os.path.join(workdir, "metrics.jsonl"), "".join(kept))

    def write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Writes one record of scalars: kind is 'train', 'eval' and so on."""
        metrics = {k: float(v) for k, v in metrics.items()}
        scalars = {f"{kind}/{k}": v for k, v in sorted(metrics.items())}
        logging.info("[%d] %s", step, ", ".join(f"{k}={v:f}" for k, v in scalars.items()))
        if self._tensorboard:
            with paths.os_errors(self._workdir):
                self._tensorboard.write_scalars(step, scalars)
        if self._journal:
            record = {"step": step, "kind": kind, **metrics}
            self._journal.write(json.dumps(record, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Call it before a checkpoint: a resumed run does not write the lines before it again."""
        if self._journal:
            self._journal.flush()

    def close(self) -> None:
        """Writes out what is buffered."""
        if self._tensorboard:
            with paths.os_errors(self._workdir):
                self._tensorboard.flush()
                self._tensorboard.close()
        if self._journal:
            self._journal.close()


def _summary_writer() -> type | None:
    """clu's writer of TensorBoard's files; None where what it needs is not installed."""
    try:
        from clu.metric_writers import SummaryWriter  # imports TensorFlow: takes seconds

        return SummaryWriter
    except ImportError as error:
        logging.info(
            "Metrics go to metrics.jsonl and this log, and not to TensorBoard (%s); to have it: "
            "pip install clu tensorboard tensorflow",
            error,
        )
        return None


def read(workdir: str) -> list[Record]:
    """The records of a run; a last line cut short by a kill is left out.

    Raises:
      UserError: another line is damaged.
    """
    path = os.path.join(workdir, "metrics.jsonl")
    records = []
    lines = paths.read(path).splitlines() if paths.exists(path) else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"], record["kind"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"Line {number} of {path} is damaged: mend or cut out that line, or rename the "
                "file to go on without the metrics so far."
            ) from error
        records.append(record)
    return records


def finite(pending: list[dict[str, Any]], step: int, *, advice: str) -> list[dict[str, float]]:
    """Brings the last steps' metrics to the host, and stops the run where one is not finite.

    Args:
      pending: metrics of the steps up to `step`, on the host, on a device or replicated over
        several.
      step: the last of these steps.
      advice: what to do against it, for the message.

    Raises:
      NotFiniteError: naming the first step with a metric that is not finite, such as the loss.
    """
    import jax

    from ada_jax import sharding

    fetched = [
        {name: float(np.ravel(value)[0]) for name, value in metrics.items()}
        for metrics in jax.device_get(jax.tree.map(sharding.first, pending))
    ]
    for i, metrics in enumerate(fetched):
        bad = [f"{name} {value}" for name, value in metrics.items() if not np.isfinite(value)]
        if bad:
            raise NotFiniteError(
                f"With {' and '.join(bad)} the run cannot go on at step "
                f"{step - len(fetched) + i + 1}, so it stops; checkpoints of earlier steps "
                f"are kept: {advice} and start again in another --workdir."
            )
    return fetched


def summarise(steps: list[dict[str, float]]) -> dict[str, float]:
    """One value per metric over several steps: the least of those named '*_min', else the mean."""
    return {
        name: float((np.min if name.endswith("_min") else np.mean)([s[name] for s in steps]))
        for name in steps[0]
    }


def table(rows: list[tuple[str, str]]) -> str:
    """Rows of (name, value) as Markdown's, aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"| {name:{widths[0]}} | {value:{widths[1]}} |" for name, value in rows)


def commit(package: pathlib.Path = pathlib.Path(__file__).parents[1]) -> str:
    """The git commit of the code that ran: an installed package's own, or its clone's, else ''."""
    built = package / "commit.txt"  # setup.py writes it into wheels
    if built.is_file():
        return built.read_text().strip()

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *command], capture_output=True, text=True
        ).stdout.strip()

    try:
        # Another repository may hold the package, as one with a virtual environment in it does.
        tracked = git("ls-files", "--full-name", "__init__.py")
        return git("rev-parse", "HEAD") if tracked == "ada_jax/__init__.py" else ""
    except OSError:  # There is no git.
        return ""


class Timer:
    """Speed, time left and time spent waiting for data, on the terminal and for the log."""

    def __init__(self, step: int, total: int, batch_size: int, *, show: bool = True) -> None:
        """Starts at `step` of `total` steps of `batch_size` examples."""
        self._step, self._total, self._batch_size, self._show = step, total, batch_size, show
        self._since, self._waited = time.monotonic(), 0.0
        self._bar = tqdm.tqdm(
            initial=step * batch_size,
            total=total * batch_size,
            unit=" examples",
            unit_scale=True,
            disable=not (show and sys.stderr.isatty()),
        )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what runs inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def lap(self, step: int) -> dict[str, float]:
        """Shows progress; returns the speed and the share of waiting since the last lap."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        examples = (step - self._step) * self._batch_size
        rate, waited = examples / seconds, 100 * self._waited / seconds
        self._bar.update(examples)
        if self._show and self._bar.disable:
            left = results_files.clock((self._total - step) * self._batch_size / max(rate, 1e-9))
            logging.info("step %d of %d, %.0f examples/s, %s left", step, self._total, rate, left)
        self._step, self._since, self._waited = step, time.monotonic(), 0.0
        return {"examples_per_second": rate, "input_wait_percent": waited}

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()
