"""Where a run's metrics go: metrics.jsonl, train.log, TensorBoard and the terminal."""

import contextlib
import json
import logging as python_logging
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import tqdm
from absl import logging

from ada_jax import paths
from ada_jax import results as results_files
from ada_jax.errors import UserError

Record = dict[str, Any]


class Logbook:
    """Writes a run's metrics to metrics.jsonl, train.log and TensorBoard.

    metrics.jsonl has each record once, also after a resume. train.log, which a bucket cannot have,
    has the messages of the terminal and all metrics, with the time.
    """

    def __init__(self, workdir: str, step: int, *, write: bool = True) -> None:
        """Opens the files and drops records after `step`, which will be written again.

        Args:
          workdir: the run's folder.
          step: the step that the run resumes from.
          write: False in all processes but one.
        """
        workdir = os.fspath(paths.at(workdir))
        self._workdir, self._files = workdir, contextlib.ExitStack()
        self._journal = self._tensorboard = None
        # In every process: importing TensorFlow takes so long that the others would time out, and
        # a damaged file must stop all of them.
        summary_writer = _summary_writer()
        kept = [json.dumps(r) + "\n" for r in read(workdir) if r["step"] <= step]
        if not write:
            return
        self._journal = paths.Journal(os.path.join(workdir, "metrics.jsonl"), "".join(kept))
        if summary_writer:
            self._tensorboard = summary_writer(os.path.join(workdir, "tensorboard"))
        if not paths.in_bucket(workdir):
            self._files.enter_context(_messages_in(os.path.join(workdir, "train.log")))

    def write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Writes one record of scalars; kind is 'train', 'eval' and so on."""
        metrics = {k: float(v) for k, v in metrics.items()}
        scalars = {f"{kind}/{k}": v for k, v in sorted(metrics.items())}
        _METRICS.info("step %d: %s", step, ", ".join(f"{k}={v:g}" for k, v in scalars.items()))
        if self._tensorboard:
            with paths.os_errors(self._workdir):
                self._tensorboard.write_scalars(step, scalars)
        if self._journal:
            record = {"step": step, "kind": kind, **metrics}
            self._journal.write(json.dumps(record, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Writes out what is buffered; call it before each checkpoint."""
        if self._journal:
            self._journal.flush()

    def close(self) -> None:
        """Writes out what is buffered and closes the files."""
        with self._files:
            if self._tensorboard:
                with paths.os_errors(self._workdir):
                    self._tensorboard.flush()
                    self._tensorboard.close()
            if self._journal:
                self._journal.close()


_METRICS = python_logging.getLogger("ada_jax.metrics")  # for train.log alone
_METRICS.setLevel(python_logging.INFO)
_METRICS.propagate = False


@contextlib.contextmanager
def _messages_in(path: str) -> Iterator[None]:
    """Appends all messages to a file, with the time."""
    handler = python_logging.FileHandler(path)
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.filters = list(logging.get_absl_handler().filters)
    handler.handleError = lambda record: None  # A full disk: metrics.jsonl raises it.
    loggers = _METRICS, python_logging.getLogger()
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # What a full disk did not take.
            handler.close()


def _summary_writer() -> type | None:
    """clu's writer of TensorBoard events; None if its dependencies are not installed."""
    try:
        from clu.metric_writers import SummaryWriter  # Imports TensorFlow, which takes seconds.

        return SummaryWriter
    except ImportError as error:
        logging.info("No TensorBoard events (%s): pip install clu tensorboard tensorflow.", error)
        return None


def read(workdir: str) -> list[Record]:
    """Reads the records of a run; an incomplete last line, left by a kill, is ignored.

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
                f"Line {number} of {path} is damaged: correct or delete that line, or rename the "
                "file to resume without the metrics so far."
            ) from error
        records.append(record)
    return records


def table(rows: list[tuple[str, str]]) -> str:
    """Formats rows of (name, value) as an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"| {name:{widths[0]}} | {value:{widths[1]}} |" for name, value in rows)


def commit(package: pathlib.Path = pathlib.Path(__file__).parents[1]) -> str:
    """The git commit of an installed package or of a clone; '' if it is unknown."""
    built = package / "commit.txt"  # Written by setup.py.
    if built.is_file():
        return built.read_text().strip()

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *command], capture_output=True, text=True
        ).stdout.strip()

    try:
        # The package may lie in another repository, for example in its virtual environment.
        tracked = git("ls-files", "--full-name", "__init__.py")
        return git("rev-parse", "HEAD") if tracked == "ada_jax/__init__.py" else ""
    except OSError:  # Git is not installed.
        return ""


class Progress:
    """Progress of training: a bar on a terminal, elsewhere one line for every interval."""

    def __init__(self, step: int, total: int, batch_size: int, *, show: bool = True) -> None:
        """Starts at `step` of `total` steps of `batch_size` examples; `show` prints it."""
        self._step, self._total, self._batch_size, self._show = step, total, batch_size, show
        self._since, self._waited = time.monotonic(), 0.0
        self._bar = tqdm.tqdm(
            initial=step,
            total=total,
            bar_format="step {n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}",
            disable=not (show and sys.stderr.isatty()),
        )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the speed."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def update(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Shows the step, its metrics, the speed and the time left.

        Returns:
          'examples_per_second' and 'input_wait_percent' since the last update.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        steps = step - self._step
        rate, waited = steps * self._batch_size / seconds, 100 * self._waited / seconds
        shown = f"{_in_words(metrics)}, {rate:.0f} examples/s"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(steps)
        if self._bar.disable:
            left = results_files.clock((self._total - step) * seconds / steps)
            self._print(f"step {step}/{self._total}, {shown}, {left} left")
        self._restart(step)
        return {"examples_per_second": rate, "input_wait_percent": waited}

    def skip_compilation(self, step: int) -> None:
        """Leaves the first step, which compiles, out of the speed."""
        self._bar.update(step - self._step)
        self._bar.unpause()
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._step, self._since, self._waited = step, time.monotonic(), 0.0

    def note(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Shows the result of an evaluation."""
        self._print(f"step {step}/{self._total}, {kind}: {_in_words(metrics)}")

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _print(self, line: str) -> None:
        if self._show:
            tqdm.tqdm.write(line, file=sys.stderr)


def _in_words(metrics: dict[str, float]) -> str:
    """The metrics that matter most: 'loss 0.412, error 3.20%'."""
    units = {"loss": "", "error": "%", "mce": "%", "psnr": " dB", "ssim": ""}
    return ", ".join(f"{k} {metrics[k]:.4g}{unit}" for k, unit in units.items() if k in metrics)
