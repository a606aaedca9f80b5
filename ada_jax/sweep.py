"""Runs the points of a sweep on this machine, or prints their commands for any scheduler.

    python -m ada_jax.sweep --sweep=experiments/sweeps/table1.py:small
    python -m ada_jax.sweep --sweep=FILE --jobs=2 --out=runs/NAME --config.epochs=2  # all points
    python -m ada_jax.sweep --sweep=FILE --collect=DIR  # copies results to DIR/POINT.json
    python -m ada_jax.sweep --sweep=FILE --print

Every point is a run of ada_jax.train in OUT/POINT, where its output is log.txt. The same command
skips what is finished and goes on with what was interrupted, and ends with the report. SIGTERM and
Ctrl-C let the running points save, and leave with status 143 or 130; a point that fails does not
stop the others, and the status is 1. A point that another process is at work on is waited for.

A sweep file has get_hyper(hyper), or get_hyper(hyper, words) for FILE:WORDS. It returns a list of
points such as {'config': 'experiments/cifar10.py:ada,small', 'config.seed': 1}, made by hand or
with the functions of `Hyper`; CONFIG in the file names the config of points that name none.
"""

import collections
import contextlib
import functools
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from ada_jax import locks, paths
from ada_jax import results as results_files
from ada_jax.data import sources
from ada_jax.errors import UserError
from ada_jax.nets import weight_files
from ada_jax.report import grouping, paper_tables, tables
from ada_jax.run import cli, config_checks, distributed, setup

_TRAIN = ("-m", "ada_jax.train")
_POLL_SECONDS = 0.2
_MEANS = {"c": "mce_unnormalised", "extra": "mean_extra"}  # there once a set is whole

Fields = dict[str, Any]  # As {'config.seed': 1}.


class Hyper:
    """What get_hyper(hyper) makes lists of points with, named as elsewhere."""

    @staticmethod
    def sweep(name: str, values: Iterable[Any]) -> list[Fields]:
        """A point for each value of one field."""
        return [{name: value} for value in values]

    @staticmethod
    def fixed(name: str, value: Any, length: int = 1) -> list[Fields]:
        """One field's same value in so many points."""
        return [{name: value}] * length

    @staticmethod
    def product(sweeps: Iterable[Iterable[Fields]]) -> list[Fields]:
        """All combinations, the last sweep's points varying fastest."""
        return [_joined(points) for points in itertools.product(*sweeps)]

    @staticmethod
    def zipit(sweeps: Iterable[Sequence[Fields]]) -> list[Fields]:
        """First with first and so on; a sweep of one point goes with all."""
        sweeps = list(sweeps)
        length = max(map(len, sweeps), default=0)
        if any(len(sweep) not in (1, length) for sweep in sweeps):
            lengths = ", ".join(str(len(sweep)) for sweep in sweeps)
            raise UserError(f"hyper.zipit got {lengths} points: give it sweeps of one length.")
        repeated = [list(sweep) * (length if len(sweep) == 1 else 1) for sweep in sweeps]
        return [_joined(points) for points in zip(*repeated, strict=True)]

    @staticmethod
    def chainit(sweeps: Iterable[Iterable[Fields]]) -> list[Fields]:
        """One sweep after the other."""
        return list(itertools.chain.from_iterable(sweeps))


def _joined(points: Iterable[Fields]) -> Fields:
    return {name: value for point in points for name, value in point.items()}


# ------------------------------------------------------------------------ points


class Point(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder; safe for file systems, different from all others of the sweep.
      flags: of ada_jax.train, without --workdir.
      config: what they make of the config, as it comes back from JSON.
    """

    name: str
    flags: list[str]
    config: dict[str, Any]


def read(sweep: str, overrides: Sequence[str] = ()) -> list[Point]:
    """Reads a sweep file and checks all that can be wrong before anything is started.

    Args:
      sweep: FILE or FILE:WORDS.
      overrides: flags of ada_jax.train for every point, as '--config.epochs=2'.

    Raises:
      UserError: the file or the words are wrong, or a point has an unknown field, a value that
        training would refuse, or the name of another.
    """
    base, found = _load(sweep)
    swept = {name for fields in found for name in fields}
    for override in overrides:
        if (name := override.lstrip("-").partition("=")[0].removeprefix("no")) in swept:
            raise UserError(f"--sweep={sweep} sets {name} itself: leave --{name} out.")
    points = []
    for name, fields in zip(names(found, base), found, strict=True):
        config = fields.get("config", base)
        own = [f"--{field}={value}" for field, value in fields.items() if field != "config"]
        arguments = [f"--config={config}", *own, *overrides]
        try:
            points.append(Point(name, arguments, load_config(arguments)))
        except UserError as error:
            raise UserError(f"--sweep={sweep}, point {name}: {error}") from error
    counts = collections.Counter(point.name for point in points)
    for name, count in counts.items():
        if count > 1:
            raise UserError(
                f"--sweep={sweep} has {count} points with the name {name}: leave all but one out, "
                "or let them differ in more than punctuation."
            )
    return points


def _load(sweep: str) -> tuple[str, list[Fields]]:
    """The file's CONFIG, '' for none, and its points."""
    path, _, words = paths.experiment(sweep).partition(":")
    if not (os.path.isfile(path) and path.endswith(".py")):
        raise UserError(
            f"--sweep={path} is not a Python file: name one, as experiments/sweeps/table1.py."
        )
    spec = importlib.util.spec_from_file_location("sweep", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_hyper"):
            raise UserError("The file has no get_hyper(hyper), which returns points: add it.")
        if words and len(inspect.signature(module.get_hyper).parameters) < 2:
            raise UserError(f"The file takes no words: leave {words!r} out.")
        points = list(module.get_hyper(Hyper, words) if words else module.get_hyper(Hyper))
    except ValueError as error:  # Said by the file, as a config's get_config says it.
        raise UserError(f"--sweep={sweep}: {error}") from error
    except Exception as error:
        raise UserError(f"--sweep={sweep} cannot be read ({error!r}): mend the file.") from error
    base = getattr(module, "CONFIG", "")
    _check_points(path, base, points)
    return base, points


def _check_points(path: str, base: str, points: list[Fields]) -> None:
    if not points:
        raise UserError(f"--sweep={path} has no points: let get_hyper return some.")
    for point in points:
        if not isinstance(point, dict) or not all(
            re.match(r"config($|\.)", str(name)) for name in point
        ):
            raise UserError(
                f"--sweep={path} has the point {point!r}, which is not a dict of fields as "
                "{'config.seed': 1}: mend get_hyper."
            )
        if not point.get("config", base):
            raise UserError(
                f"--sweep={path} has the point {point!r} without a config: set CONFIG in the file, "
                "or 'config' in the point."
            )


def names(points: Sequence[Fields], base: str) -> list[str]:
    """Names of points: the words of their configs, and the fields in which they differ.

    Args:
      points: all of a sweep; a field that they share does not count, save for the seed.
      base: the config of those that name none.

    Returns:
      As 'ada+augmix,small-seed1'. The config's file stands for its words where it has none, and
      before them where the points' files differ.
    """
    fields = {field for point in points for field in point} - {"config"}
    counting = {f for f in fields if len({repr(p.get(f)) for p in points}) > 1} | {"config.seed"}
    configs = [point.get("config", base).partition(":") for point in points]
    several = len({file for file, _, _ in configs}) > 1
    made = []
    for point, (file, _, words) in zip(points, configs, strict=True):
        parts = [pathlib.Path(file).stem] if several or not words else []
        parts += [words] if words else []
        parts += [_label(field, point[field]) for field in point if field in counting]
        made.append("-".join(_safe(part) for part in parts))
    return made


def _label(field: str, value: Any) -> str:
    """'seed1', 'nu0.02', and of a word the word alone."""
    return value if isinstance(value, str) else f"{field.rpartition('.')[2]}{value}"


def _safe(text: str) -> str:
    return re.sub(r"[^\w.,+=-]+", "_", text).strip("._,")


def load_config(arguments: list[str]) -> dict[str, Any]:
    """The config that ada_jax.train makes of its flags, checked, as it comes back from JSON.

    Raises:
      UserError: what ada_jax.train would say of them.
    """
    values = flags.FlagValues()
    arguments = cli.found_configs(arguments)
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        values(["ada_jax.train", *arguments])
        config_checks.validate(values.config)
    except (KeyError, AttributeError) as error:
        raise UserError(cli.unknown_field(error)) from error
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    return json.loads(json.dumps(values.config.to_dict()))


# ------------------------------------------------------------------------ runs


def command(point: Point, out: str) -> list[str]:
    """The point's command line behind 'python'."""
    return [*_TRAIN, *point.flags, f"--workdir={os.path.join(out, point.name)}"]


def finished(point: Point, out: str) -> dict[str, Any] | None:
    """The results of a point that has nothing left to do; None for another.

    Its results file is of the point's config, has every set, the attack's errors and pictures if
    they are wanted, and is of the step that the weights are of, which a run writes at its end.
    """
    results, lacking = _look(point, out)
    return None if lacking else results


def _look(point: Point, out: str) -> tuple[dict[str, Any], str]:
    """A point's results, and what they lack: nothing where the point is finished."""
    workdir = os.path.join(out, point.name)
    try:
        results = dict(paths.read_json(os.path.join(workdir, "results.json")))
        _, weights = weight_files.load_weights(os.path.join(workdir, "classifier.safetensors"))
    except (OSError, ValueError, TypeError):  # A UserError is a ValueError.
        return {}, "results or weights are missing or damaged"
    config = point.config
    now, then = (
        results_files.comparable(config),
        results_files.comparable(results.get("config") or {}),
    )
    others = sorted(k for k in now | then if (k, now.get(k)) not in then.items())
    if others:
        return results, f"the results are of another config, with another {', '.join(others)}"
    if results.get("step") != weights.get("step"):
        return results, "the results are of another step than the weights"
    if changed := _changed_data(config, results):
        return results, f"the images of config.{changed} have changed since"
    attacked = config["method"] == "ada" and config["figure_examples"]
    nets = config_checks.net_labels(config["ada"]) if attacked else ()
    wanted = [_MEANS.get(name, name) for name in config["eval_sets"]]
    missing = [name for name in wanted if name not in results]
    missing += [f"ada.{net}" for net in nets if net not in results.get("ada", {})]
    return results, f"the results lack {', '.join(missing)}" if missing else ""


def _changed_data(config: dict[str, Any], results: dict[str, Any]) -> str:
    """The split whose images are no longer those of the results; '' where it cannot be told."""
    found = results_files.flat(results)
    known = {
        "train_split": (found.get("training.data"), bool(config.get("crop_scale"))),
        "eval_split": (found.get("data.fingerprint"), False),
    }
    if None in (digest for digest, _ in known.values()):  # Of an older version.
        return ""
    fields = config["dataset"], config["data_dir"] or None, config["image_size"]
    for split, (digest, encoded) in known.items():
        if _fingerprint(config[split], *fields, encoded) not in (digest, None):
            return split
    return ""


@functools.cache
def _fingerprint(
    split: str, dataset: str, data_dir: str | None, image_size: int, encoded: bool
) -> str | None:
    try:
        return sources.load(
            dataset, split, data_dir=data_dir, image_size=image_size, encoded=encoded
        ).fingerprint
    except UserError:
        return None


def run(points: Sequence[Point], out: str, jobs: int) -> tuple[dict[str, str], int]:
    """Runs what is not finished, `jobs` points at a time.

    Args:
      points: of `read`.
      out: folder of their folders.
      jobs: how many processes to keep running.

    Returns:
      For each point that failed its name and the reason; and the exit status after SIGTERM or
      Ctrl-C, else 0.
    """
    waiting, failed = _unfinished(points, out), {}
    running: dict[subprocess.Popen, tuple[Point, float]] = {}
    busy: list[Point] = []  # with another process at work, as where a sweep was killed
    with distributed.StopSignal() as stop, _no_process_left(running):
        while not stop.status and (waiting or running or busy):
            while waiting and len(running) < jobs:
                point = waiting.pop(0)
                if finished(point, out):  # since, by another sweep
                    continue
                try:
                    if process := start(point, out):
                        running[process] = point, time.monotonic()
                    else:
                        logging.info("%s: waiting for %s", point.name, _holder(point, out))
                        busy.append(point)
                except OSError as error:
                    failed[point.name] = _cannot_start(point, out, error)
            time.sleep(_POLL_SECONDS)
            for process in [p for p in running if p.poll() is not None]:
                point, started = running.pop(process)
                if reason := _settle(point, out, process.returncode, time.monotonic() - started):
                    failed[point.name] = reason
            free = [point for point in busy if _is_free(point, out)]
            busy = [point for point in busy if point not in free]
            for point in free:
                try:
                    waiting += _unfinished([point], out)
                except UserError as error:
                    failed[point.name] = str(error)
    return failed, stop.status


def _unfinished(points: Sequence[Point], out: str) -> list[Point]:
    """The points to run; says which are not.

    Raises:
      UserError: a file that one needs is missing.
    """
    found = {point.name: finished(point, out) for point in points}
    for name, results in found.items():
        if results:
            logging.info("%s: finished before, %s", name, _errors(results))
    waiting = [point for point in points if not found[point.name]]
    for point in waiting:
        try:
            setup.check_files(ml_collections.ConfigDict(point.config))
        except UserError as error:
            raise UserError(f"The point {point.name}: {error}") from error
    logging.info("%d of %d points to run", len(waiting), len(points))
    return waiting


@contextlib.contextmanager
def _no_process_left(running: dict[subprocess.Popen, tuple[Point, float]]) -> Iterator[None]:
    """Lets what is still running save and leave, whatever ended the block."""
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process, (point, _) in running.items():
            logging.info("%s: stopped with status %d", point.name, process.wait())


def start(point: Point, out: str) -> subprocess.Popen | None:
    """Starts a point's run, which adds its output to OUT/POINT/log.txt.

    Returns:
      The run; None where another process is at work on the point.

    Raises:
      OSError: the log cannot be written, or no process started.
    """
    arguments = command(point, out)
    path = _log(point, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The run inherits the lock and keeps it, should this process be killed: no two in a folder.
    if not (lock := locks.take(locks.of_folder(path.parent))):
        return None
    with lock, path.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(['python', *arguments])}\n")
        log.flush()
        logging.info("%s: started, output in %s", point.name, path)
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches this process alone, which tells them.
            pass_fds=[lock.fileno()],
            env=os.environ | {locks.INHERITED: str(lock.fileno())},
        )


def _log(point: Point, out: str) -> pathlib.Path:
    """Of the run's output, beside its lock; for a bucket they lie in runs/BUCKET/..."""
    folder = os.path.join("runs", out.removeprefix("gs://")) if paths.in_bucket(out) else out
    return pathlib.Path(folder) / point.name / "log.txt"


def _is_free(point: Point, out: str) -> bool:
    """Whether no process is at work on the point, as also where its folder was removed."""
    lock = locks.of_folder(_log(point, out).parent)
    if not lock.exists():
        return True
    with locks.claim(lock) as free:
        return free


def _holder(point: Point, out: str) -> str:
    return locks.holder(locks.of_folder(_log(point, out).parent))


def _cannot_start(point: Point, out: str, error: OSError) -> str:
    reason = f"cannot be started with its output in {_log(point, out)} ({error.strerror})"
    logging.error("%s: %s", point.name, reason)
    return reason


def _settle(point: Point, out: str, status: int, seconds: float) -> str | None:
    """Says how a run ended; returns the reason where it failed."""
    minutes = f"{seconds / 60:.1f} min"
    results, lacking = _look(point, out)
    if not lacking:
        logging.info("%s: finished in %s, %s", point.name, minutes, _errors(results))
        return None
    reason = f"status {status}, {_last_line(point, out) if status else lacking}"
    logging.error("%s: failed after %s, %s", point.name, minutes, reason)
    return reason


def _last_line(point: Point, out: str) -> str:
    try:
        return _log(point, out).read_text(errors="replace").rstrip().splitlines()[-1].strip()
    except OSError as error:
        return f"and its log cannot be read ({error.strerror})"


def _errors(results: dict[str, Any]) -> str:
    said = f"clean error {results['clean']['error']:.2f}%"
    return said + (f", mCE {results[_MEANS['c']]:.2f}%" if _MEANS["c"] in results else "")


# ------------------------------------------------------------------------ the binary


def show_report(files: Sequence[str]) -> None:
    """Prints tables 1 and 3 and the list of `python -m ada_jax.report FILES`."""
    results = [result for file in files for result in results_files.read(file)]
    ours = grouping.rows(results)
    made = (
        paper_tables.table_1(ours, []),
        paper_tables.table_3(ours, []),
        paper_tables.table_list(results, []),
    )
    print("\n\n".join(map(tables.markdown, made)), flush=True)


def collect(points: Sequence[Point], out: str, folder: str) -> None:
    """Copies every point's results file to FOLDER/POINT.json."""
    for point in points:
        results = paths.read(os.path.join(out, point.name, "results.json"))
        paths.write(os.path.join(folder, f"{point.name}.json"), results)


def main(argv: list[str], overrides: Sequence[str] = ()) -> int | None:
    """Runs or prints the sweep; returns an exit status."""
    f = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"The argument {argv[1]!r} is not a flag: write --flag=value.")
    points = read(f.sweep, overrides)
    out = f.out or os.path.join("runs", pathlib.Path(f.sweep.partition(":")[0]).stem)
    if f.print:
        print("\n".join(shlex.join(["python", *command(point, out)]) for point in points))
        return None
    cli.make_folder("out", out)
    if f.collect:
        cli.make_folder("collect", f.collect)
    failed, stopped = run(points, out, f.jobs)
    if stopped:
        logging.warning("Stopped: the same command goes on.")
        return stopped
    done = [point for point in points if point.name not in failed]
    if f.collect:
        collect(done, out, f.collect)
    if done:
        show_report([os.path.join(out, point.name, "results.json") for point in done])
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr, flush=True)
    return 1 if failed else None


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "File with get_hyper(), as experiments/sweeps/table1.py.")
    flags.DEFINE_string(
        "out", "", "Folder of the runs' folders; runs/NAME, the file's, by default."
    )
    flags.DEFINE_integer("jobs", 1, "Points that run at a time.", lower_bound=1)
    flags.DEFINE_bool("print", False, "Print the commands and run nothing.")
    flags.DEFINE_string("collect", "", "Folder for a copy POINT.json of every results file.")
    flags.mark_flag_as_required("sweep")
    # absl knows the fields of a config only once it has read one.
    given = [a for a in sys.argv[1:] if re.match(r"--?(no)?config\.", a)]
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in given]
    cli.start(lambda argv: main(argv, given))
