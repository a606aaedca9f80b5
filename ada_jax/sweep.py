"""Runs the points of a sweep on this machine, or prints their commands for any scheduler.

    python -m ada_jax.sweep --sweep=experiments/sweeps/table1.py:small
    python -m ada_jax.sweep --sweep=FILE --jobs=2 --out=runs/NAME --config.epochs=2  # all points
    python -m ada_jax.sweep --sweep=FILE --collect=DIR  # copies results to DIR/POINT.json
    python -m ada_jax.sweep --sweep=FILE --print

Every point is a run of ada_jax.train in OUT/POINT, whose output goes to OUT/POINT/log.txt. The same
command skips finished points and resumes interrupted ones. It ends with the report. Several of
these commands may share a folder: each takes the next point that no other is running. SIGTERM and
Ctrl-C let the running points save, and exit with status 143 or 130. A point that fails does not
stop the others; the status is then 1.

A sweep file has get_hyper(hyper), or get_hyper(hyper, words) for FILE:WORDS. It returns a list of
points such as {'config': 'experiments/cifar10.py:ada,small', 'config.seed': 1}, written out or
made with the functions of `Hyper`. CONFIG in the file is the config of points that name none.
"""

import collections
import contextlib
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
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from ada_jax import locks, paths
from ada_jax import results as results_files
from ada_jax.errors import UserError
from ada_jax.evaluation import evaluators
from ada_jax.nets import weight_files
from ada_jax.report import grouping, paper_tables, tables
from ada_jax.run import cli, config_checks, distributed, setup

_TRAIN = ("-m", "ada_jax.train")
_POLL_SECONDS = 0.2
_DATA = {"data_dir", "deepaugment.dir", "eval_split"}  # The data of a run, in its bookkeeping.

Fields = dict[str, Any]  # such as {'config.seed': 1}


class Hyper:
    """The functions with which get_hyper(hyper) makes lists of points, named as in xmanager."""

    @staticmethod
    def sweep(name: str, values: Iterable[Any]) -> list[Fields]:
        """A point for each value of one field."""
        return [{name: value} for value in values]

    @staticmethod
    def fixed(name: str, value: Any, length: int = 1) -> list[Fields]:
        """The same value of one field in `length` points."""
        return [{name: value}] * length

    @staticmethod
    def product(sweeps: Iterable[Iterable[Fields]]) -> list[Fields]:
        """All combinations, the last sweep's points varying fastest."""
        return [_joined(points) for points in itertools.product(*sweeps)]

    @staticmethod
    def zipit(sweeps: Iterable[Sequence[Fields]]) -> list[Fields]:
        """The first points together, the second ones, ...; a sweep of one point is repeated."""
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
      name: name of its folder, unique in the sweep and safe for file systems.
      flags: flags of ada_jax.train, without --workdir.
      config: the config that they give, as read back from JSON.
    """

    name: str
    flags: list[str]
    config: dict[str, Any]


def read(sweep: str, overrides: Sequence[str] = ()) -> list[Point]:
    """Reads a sweep file and checks all of its points.

    Args:
      sweep: FILE or FILE:WORDS.
      overrides: flags of ada_jax.train for every point, such as '--config.epochs=2'.

    Raises:
      UserError: the file or the words are wrong, or a point has an unknown field, an invalid
        value, or the name of another.
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
                f"--sweep={sweep} has {count} points with the name {name}: remove all but one, "
                "or let them differ in more than punctuation."
            )
    return points


def _load(sweep: str) -> tuple[str, list[Fields]]:
    """The file's CONFIG, '' for none, and its points."""
    path, _, words = paths.experiment(sweep).partition(":")
    if not (os.path.isfile(path) and path.endswith(".py")):
        raise UserError(
            f"--sweep={path} is not a Python file: name one, such as experiments/sweeps/table1.py."
        )
    spec = importlib.util.spec_from_file_location("sweep", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_hyper"):
            raise UserError("The file has no get_hyper(hyper) that returns points: add it.")
        if words and len(inspect.signature(module.get_hyper).parameters) < 2:
            raise UserError(f"The file takes no words: leave {words!r} out.")
        points = list(module.get_hyper(Hyper, words) if words else module.get_hyper(Hyper))
    except ValueError as error:  # the file's own message
        raise UserError(f"--sweep={sweep}: {error}") from error
    except Exception as error:
        raise UserError(f"--sweep={sweep} cannot be read ({error!r}): correct the file.") from error
    base = getattr(module, "CONFIG", "")
    if not points:
        raise UserError(f"--sweep={path} has no points: let get_hyper return some.")
    for point in points:
        fields = point if isinstance(point, dict) else {"": 0}
        if not all(re.match(r"config($|\.)", str(name)) for name in fields):
            raise UserError(
                f"--sweep={path} has the point {point!r}, which is not a dict of fields such as "
                "{'config.seed': 1}: correct get_hyper."
            )
        if not (isinstance(config := point.get("config", base), str) and config):
            raise UserError(
                f"--sweep={path} has the point {point!r} without a config: set CONFIG in the file, "
                "or 'config' in the point, to a string such as 'experiments/cifar10.py:ada'."
            )
    return base, points


def names(points: Sequence[Fields], base: str) -> list[str]:
    """Names points by the words of their configs and the fields in which they differ.

    Args:
      points: all points of a sweep; fields that they share are left out, except for the seed.
      base: the config of points that name none.

    Returns:
      Names such as 'ada+augmix,small-seed1'. A config without words is named by its file. Where
      the files differ, each name begins with the file.
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
    """'seed1', 'nu0.02', or a word alone."""
    return value if isinstance(value, str) else f"{field.rpartition('.')[2]}{value}"


def _safe(text: str) -> str:
    return re.sub(r"[^\w.,+=-]+", "_", text).strip("._,")


def load_config(arguments: list[str]) -> dict[str, Any]:
    """The checked config of ada_jax.train with these flags, as read back from JSON.

    Raises:
      UserError: as ada_jax.train.
    """
    values = flags.FlagValues()
    arguments = cli.found_configs(list(map(cli.expand_home, arguments)))
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
    """The point's command line after 'python'."""
    return [*_TRAIN, *point.flags, f"--workdir={os.path.join(out, point.name)}"]


def finished(point: Point, out: str) -> dict[str, Any] | None:
    """The results of a finished point; None for another."""
    results, reason = _progress(point, out)
    return None if reason else results


def _progress(point: Point, out: str) -> tuple[dict[str, Any], str]:
    """A point's results so far, and why they are not final; '' where the point is finished."""
    workdir, config = os.path.join(out, point.name), point.config
    try:
        results = dict(paths.read_json(os.path.join(workdir, "results.json")))
        weights = weight_files.metadata(os.path.join(workdir, "classifier.safetensors"))
    except (OSError, ValueError, TypeError):  # UserError is a ValueError.
        return {}, "results or weights are missing or damaged"
    now, then = map(results_files.comparable, (config, results.get("config") or {}))
    if differing := {k for k in now | then if (k, now.get(k)) not in then.items()}:
        # A group of fields that one of them does not use is named as a whole.
        named = sorted({k if k in now and k in then else k.partition(".")[0] for k in differing})
        return results, f"the results are of another config, with another {', '.join(named)}"
    if results.get("step") != weights.get("step"):  # Training writes both at its end.
        return results, "the results are of another step than the weights"
    wanted = [evaluators.EVALUATORS[name].fields[-1] for name in config["eval_sets"]]
    missing = [field for field in wanted if field not in results]
    if config["method"] == "ada" and config["figure_examples"]:
        nets = config_checks.net_labels(config["ada"])
        missing += [f"ada.{net}" for net in nets if net not in results.get("ada", {})]
    return results, f"the results lack {', '.join(missing)}" if missing else ""


class _Run(NamedTuple):
    """A running point; `claim` holds its lock."""

    point: Point
    process: subprocess.Popen
    started: float
    claim: contextlib.ExitStack


def run(points: Sequence[Point], out: str, jobs: int) -> tuple[dict[str, str], int]:
    """Runs what is not finished, `jobs` points at a time.

    Args:
      points: the points of `read`.
      out: folder of their folders.
      jobs: number of processes.

    Returns:
      The name and reason of each point that failed or that another sweep is still running; and
      the exit status after SIGTERM or Ctrl-C, else 0.

    Raises:
      UserError: a file that a point needs is missing.
    """
    waiting = []
    for point in points:
        if results := finished(point, out):
            logging.info("%s: finished before, %s", point.name, _errors(results))
        else:
            waiting.append(point)
    logging.info("%d of %d points to run", len(waiting), len(points))
    for point in waiting:
        try:
            setup.check_files(ml_collections.ConfigDict(point.config))
        except UserError as error:
            raise UserError(f"The point {point.name}: {error}") from error
    running, elsewhere, failed = [], [], {}
    with distributed.StopSignal() as stop:
        try:
            while not stop.status and (waiting or running):
                while waiting and len(running) < jobs:
                    _claim_and_start(waiting.pop(0), out, running, elsewhere)
                time.sleep(_POLL_SECONDS)
                for ended in [r for r in running if r.process.poll() is not None]:
                    running.remove(ended)
                    _settle(ended, out, failed)
        finally:  # Whatever ended the loop, the runs save before this process ends.
            for current in running:
                current.process.terminate()
            for current in running:
                status = current.process.wait()
                logging.info("%s: stopped with status %d", current.point.name, status)
                current.claim.close()
    for point in elsewhere:
        if finished(point, out):
            continue
        with locks.claim(locks.of_file(_log(point, out))) as ended:
            failed[point.name] = (
                f"it ended in another sweep without results, see {_log(point, out)}"
                if ended
                else "another sweep is running it: start this command again later"
            )
    return failed, stop.status


def _claim_and_start(point: Point, out: str, running: list[_Run], elsewhere: list[Point]) -> None:
    """Starts a point unless another sweep is running or has finished it."""
    log = _log(point, out)
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(locks.claim(locks.of_file(log))):
            elsewhere.append(point)
        elif not finished(point, out):
            process = start(point, out)
            running.append(_Run(point, process, time.monotonic(), stack.pop_all()))


def start(point: Point, out: str) -> subprocess.Popen:
    """Starts a point's run, which appends its output to OUT/POINT/log.txt."""
    arguments, path = command(point, out), _log(point, out)
    with path.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(['python', *arguments])}\n")
        log.flush()
        logging.info("%s: started, output in %s", point.name, path)
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches this process alone, which terminates them.
        )


def _log(point: Point, out: str) -> pathlib.Path:
    """The file for a run's output; of a bucket it is in runs/BUCKET/..."""
    folder = os.path.join("runs", out.removeprefix("gs://")) if paths.in_bucket(out) else out
    return pathlib.Path(folder) / point.name / "log.txt"


def _settle(ended: _Run, out: str, failed: dict[str, str]) -> None:
    """Logs how a run ended, and notes the reason if it failed."""
    name, status = ended.point.name, ended.process.returncode
    ended.claim.close()
    minutes = f"{(time.monotonic() - ended.started) / 60:.1f} min"
    results, reason = _progress(ended.point, out)
    if not reason:
        logging.info("%s: finished in %s, %s", name, minutes, _errors(results))
        return
    if status:
        lines = _log(ended.point, out).read_text(errors="replace").split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "")
    failed[name] = f"status {status}, {reason}"
    logging.error("%s: failed after %s, %s", name, minutes, failed[name])


def _errors(results: dict[str, Any]) -> str:
    mce = results.get("mce_unnormalised")
    text = f"clean error {results['clean']['error']:.2f}%"
    return text if mce is None else f"{text}, mCE {mce:.2f}%"


# ------------------------------------------------------------------------ the command


def show_report(files: Sequence[str]) -> None:
    """Prints tables 1 and 3 and the list of `python -m ada_jax.report FILES`."""
    results = [result for file in files for result in results_files.read(file)]
    made = [paper_tables.table_list(results, [])]
    try:
        ours = grouping.rows(results)
        made = [paper_tables.table_1(ours, []), paper_tables.table_3(ours, []), *made]
    except UserError as error:  # Two points have trained the same.
        logging.warning("Tables 1 and 3 are left out: %s", error)
    print("\n\n".join(map(tables.markdown, made)), flush=True)


def check_collected(points: Sequence[Point], out: str, folder: str) -> None:
    """Checks that `collect` replaces no results of other configs and loses no measurements.

    Args:
      points: points that may still have to run.
      out: folder of their folders.
      folder: the folder to copy to.

    Raises:
      UserError: FOLDER/POINT.json has results of another config, data or split, or measurements
        that OUT/POINT lacks and the point does not make; or it cannot be read.
    """
    for point in points:
        path = os.path.join(folder, f"{point.name}.json")
        own = os.path.join(out, point.name, "results.json")
        if not paths.exists(path) or (paths.exists(own) and paths.read(own) == paths.read(path)):
            continue
        there = results_files.read(path)[0].fields
        now, then = map(results_files.comparable, (point.config, there.get("config") or {}))
        compared = (now.keys() | then.keys()) - results_files.BOOKKEEPING | _DATA
        differing = sorted(f"config.{k}" for k in compared if now.get(k) != then.get(k))
        made = {*point.config["eval_sets"], *_measured(_progress(point, out)[0])}
        if differing := differing or sorted(_measured(there) - made):
            raise UserError(
                f"--collect={folder} has other results of {', '.join(differing)} in "
                f"{point.name}.json: name another folder."
            )


def _measured(results: dict[str, Any]) -> set[str]:
    """The sets and attacks of --sets that results have."""
    return {name for name, e in evaluators.EVALUATORS.items() if e.fields[-1] in results}


def collect(points: Sequence[Point], out: str, folder: str) -> None:
    """Copies every point's results to FOLDER/POINT.json, those of EMA weights to POINT_ema.json.

    Args:
      points: finished points.
      out: folder of their folders.
      folder: the folder to copy to.
    """
    for point in points:
        for suffix in ("", "_ema") if point.config["ema_decay"] else ("",):
            results = paths.read(os.path.join(out, point.name, f"results{suffix}.json"))
            paths.write(os.path.join(folder, f"{point.name}{suffix}.json"), results)


def main(argv: list[str], overrides: Sequence[str] = ()) -> int | None:
    """Runs or prints the sweep; returns an exit status."""
    del argv
    f = flags.FLAGS
    points = read(f.sweep, overrides)
    out = f.out or os.path.join("runs", pathlib.Path(f.sweep.partition(":")[0]).stem)
    if f.print:
        print("\n".join(shlex.join(["python", *command(point, out)]) for point in points))
        return None
    cli.make_folder("out", out)
    if f.collect:
        cli.make_folder("collect", f.collect)
        check_collected(points, out, f.collect)
    failed, stopped = run(points, out, f.jobs)
    done = [point for point in points if finished(point, out)]
    if f.collect:
        collect(done, out, f.collect)
    if stopped:
        logging.warning("Stopped: run the same command again to continue.")
        return stopped
    if done:
        show_report([os.path.join(out, point.name, "results.json") for point in done])
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr, flush=True)
    return 1 if failed else None


if __name__ == "__main__":
    flags.DEFINE_string(
        "sweep", None, "File with get_hyper(), such as experiments/sweeps/table1.py."
    )
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
