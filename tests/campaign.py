"""The reliability campaign: damaged inputs and wrong settings.

    python tests/campaign.py
    python tests/campaign.py --malformed=60 --settings=100 --seed=1

Prints one line of counts for each part, then every failure with the command that repeats it. The
exit status is 1 if there was any.

- malformed: one file is truncated, has a bit flipped, or (JSON) a value replaced. The command must
  end with status 2, one sentence as its last line, and every file as it was; or with status 0 and
  the end that the undamaged file gives. Formats without a checksum may also give another end.
- settings: every field of the quickstart set to each of `WRONG`, with status 2 and one sentence, or
  accepted. What was accepted is listed, to be looked through.

Importing takes longer than a tiny run, so all is imported once and each command is a fork.
"""

import argparse
import atexit
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ada_jax import results as results_files
from ada_jax.nets import classifiers, residual_nets

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "experiments" / "quickstart.py"
PARTS = ("malformed", "settings")
SECONDS = 300  # after which a command hangs
SETTING_SECONDS = 30  # after which a setting is accepted, if the run goes on still
STEPS = 8
WRONG = (
    *("-1", "0", "1e30", "nan", "inf", "", "nonsense", "None", "()", "(1,)", "[1, 'a']", "{}"),
    *("1" + 30 * "0", "two\nlines", "../outside", "True"),
)
PASSING = ("examples_per_second", "input_wait_percent", "seconds", "commit")  # not of the end


class Outcome(NamedTuple):
    """What became of one case; `failure` is '' where it was as it should be."""

    case: str
    kind: str
    failure: str = ""
    counts: tuple[str, ...] = ()
    accepted: str = ""
    seconds: float = 0.0


# ------------------------------------------------------------------------ commands


def _run(folder: pathlib.Path, arguments: list[str], errors: pathlib.Path) -> None:
    """Does in a fork what the interpreter does with `-m`, from the first line to the exit."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(folder.with_name(folder.name + ".out"), _NEW), 1)
    os.dup2(os.open(errors, _NEW), 2)
    os.chdir(folder)
    module = f"ada_jax.{arguments[0]}"
    sys.argv = [module, *arguments[1:]]
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def run(folder: pathlib.Path, arguments: list[str], seconds: float = SECONDS) -> int | None:
    """Runs `python -m ada_jax.ARGUMENTS` in a folder, as a fork, with its output beside it.

    Returns its status as subprocess gives it; None if it had to be killed.
    """
    if WORLD.args.only:
        print(f"in {folder}: python -m ada_jax.{shlex.join(arguments)}")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        try:
            _run(folder, arguments, folder.with_name(folder.name + ".err"))
        finally:
            os._exit(70)
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def said(folder: pathlib.Path) -> str:
    """What the last command in a folder wrote to stderr."""
    return folder.with_name(folder.name + ".err").read_text(errors="replace")


def complaint(folder: pathlib.Path, status: int | None) -> str:
    """What is wrong with how a command ended that may succeed or refuse; '' if nothing is."""
    lines = [line for line in said(folder).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if status is None:
        return f"did not end; its last line: {last}"
    if "Traceback (most recent call last)" in said(folder):
        return f"a traceback, status {status}: {_raised(lines)}"
    if status not in (0, 2):
        return f"status {status}: {last}"
    if status == 2 and not last.startswith("error: "):
        return f"status 2 and the last line is not an error's: {last}"
    return ""


def _raised(lines: list[str]) -> str:
    """The last frame and the last line of the last traceback."""
    frames = [i for i, line in enumerate(lines) if line.lstrip().startswith('File "')]
    after = [line for line in lines[frames[-1] :] if not line.startswith(" ")] if frames else []
    return f"{lines[frames[-1]].strip()}: {(after or lines[-1:])[0][:300]}"


# ------------------------------------------------------------------------ what is run


def tiny(**changes: Any) -> list[str]:
    """Flags of a nominal run of a few steps on data.npz."""
    fields = {
        "name": "tiny",
        "dataset": "npz",
        "data_dir": "data.npz",
        "train_split": "train",
        "eval_split": "test",
        "method": "nominal",
        "classifier": "resnet9",
        "epochs": 0.0,
        "warmup_epochs": 0.0,
        "train_steps": STEPS,
        "batch_size": 4,
        "eval_batch_size": 8,
        "eval_epochs": 1.0,
        "eval_sets": ("clean",),
        "checkpoint_epochs": 0.25,
        "log_steps": 3,
        "figure_examples": 2,
        "compilation_cache": "",
        "cpu_devices": 0,
    }
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config={QUICKSTART}", *(f"--config.{k}={v}" for k, v in fields.items())]


def train(workdir: str = "run", **changes: Any) -> list[str]:
    """The arguments of a training run."""
    return ["train", *tiny(**changes), f"--workdir={workdir}"]


def evaluate(*flags: str) -> list[str]:
    """The arguments of an evaluation of weights.safetensors."""
    return ["evaluate", *tiny(), "--weights=weights.safetensors", "--out=out.json", *flags]


def prepare(good: pathlib.Path) -> None:
    """Makes the files that are to be damaged, and fills the compilation cache."""
    import numpy as np
    from PIL import Image

    good.mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 16), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 2
        for i, image in enumerate(arrays[f"{split}_images"]):
            path = good / "photographs" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    np.savez(good / "data.npz", **arrays)
    weights = ROOT / "ada_jax" / "nets" / "weights"
    shutil.copy(weights / "edsr_small.safetensors", good / "net.safetensors")
    _run_all(good, [train()])
    shutil.copy(good / "run" / "classifier.safetensors", good / "weights.safetensors")
    rendering = [f"--config={ROOT}/experiments/deepaugment.py:small", "--config.dataset=npz"]
    rendering += ["--config.data_dir=data.npz", "--config.nets=('edsr_small',)"]
    rendering += ["--config.weights=('',)", "--config.enlarge=(1,)", "--config.cpu_devices=0"]
    rendering += ["--config.group=8", "--config.compilation_cache=", "--out=renderings"]
    corrupted = ["--data=data.npz", "--split=test", "--out=c", "--processes=1"]
    _run_all(good, [["deepaugment", *rendering], ["corruptions", *corrupted]])


def _run_all(good: pathlib.Path, commands: list[list[str]]) -> None:
    for arguments in commands:
        status = run(good, arguments)
        if status != 0:
            raise SystemExit(f"The undamaged command failed, status {status}:\n{said(good)}")


@contextlib.contextmanager
def case_folder(case: str, *needs: str) -> Iterator[pathlib.Path]:
    """A folder of its own with copies of what is needed; removed unless the case fails."""
    folder = WORLD.root / case.replace(":", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in needs:
        source = WORLD.root / "good" / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    yield folder


def forget(folder: pathlib.Path) -> None:
    """Removes a case's files."""
    shutil.rmtree(folder)
    for suffix in (".out", ".err"):
        folder.with_name(folder.name + suffix).unlink(missing_ok=True)


def end(folder: pathlib.Path) -> dict[str, Any]:
    """What commands in a folder have made, without what depends on the clock, the folder or git."""
    found: dict[str, Any] = {}
    for path in sorted([*folder.glob("run/*"), *folder.glob("out.json")]):
        name = str(path.relative_to(folder))
        if path.suffix in (".json", ".jsonl"):
            lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
            records = [json.loads(line.replace(str(folder), "FOLDER")) for line in lines]
            found[name] = [_lasting(record) for record in records]
        elif path.is_file() and not path.name.startswith("."):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _lasting(record: dict[str, Any]) -> dict[str, Any]:

    return {k: v for k, v in results_files.flat(record).items() if k not in PASSING}


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first file in which two ends differ, and its first record that does."""
    for name in sorted({*one, *other}):
        a, b = one.get(name), other.get(name)
        if a == b:
            continue
        if isinstance(a, list) and isinstance(b, list):
            for x, y in itertools.zip_longest(a, b, fillvalue={}):
                fields = [k for k in sorted({*x, *y}) if repr(x.get(k)) != repr(y.get(k))]
                if fields:
                    k = fields[0]
                    return f"{name} has {k} = {str(x.get(k))[:80]}, not {str(y.get(k))[:80]}"
            continue  # NaN
        return f"{name} is {'missing' if a is None else 'new' if b is None else 'other'}"
    return ""


# ------------------------------------------------------------------------ malformed inputs


class Kind(NamedTuple):
    """An input: its files, the command that reads it and what else that needs.

    Attributes:
      files: a pattern; one of what matches is damaged.
      arguments: the command.
      needs: what it reads, of the good files.
      checked: whether the format notices every change, so that another end is a failure.
    """

    files: str
    arguments: list[str]
    needs: tuple[str, ...]
    checked: bool


_SHORT = {"train_steps": 2, "eval_epochs": 0.0}
_RUN = ("run", "data.npz")
_WEIGHTS = ("weights.safetensors", "data.npz")
KINDS = {
    "weights": Kind("weights.safetensors", evaluate(), _WEIGHTS, True),
    "init_weights": Kind(
        "weights.safetensors", train(init_weights="weights.safetensors", **_SHORT), _WEIGHTS, True
    ),
    "corruption_weights": Kind(
        "net.safetensors",
        train(method="ada", ada__steps=1, ada__corruption_weights=("net.safetensors",), **_SHORT),
        ("net.safetensors", "data.npz"),
        True,
    ),
    "npz": Kind("data.npz", train(**_SHORT), ("data.npz",), True),
    "png": Kind(
        "photographs/*/*/*.png",
        train(dataset="folder", data_dir="photographs", **_SHORT),
        ("photographs",),
        False,
    ),
    "config": Kind("run/config.json", ["evaluate", "--workdir=run", "--out=out.json"], _RUN, False),
    "results": Kind("run/results.json", ["evaluate", "--workdir=run"], _RUN, False),
    "report": Kind("run/results.json", ["report", "--figures=figures", "run"], ("run",), False),
    "rerun": Kind("run/*.json*", train(), _RUN, False),
    "checkpoint": Kind("run/checkpoints/**/*", train(), _RUN, True),
    "evaluated_checkpoint": Kind(
        "run/checkpoints/**/*", ["evaluate", "--workdir=run", "--out=out.json"], _RUN, False
    ),
    "renderings": Kind(
        "renderings/*[yn]",
        train(deepaugment__copies=1, deepaugment__dir="renderings", **_SHORT),
        ("renderings", "data.npz"),
        False,
    ),
    "c": Kind("c/*", evaluate("--sets=c", "--c_dir=c"), ("c", *_WEIGHTS), False),
}


def control(kind: str) -> Outcome:
    """The undamaged command of a kind."""
    case = f"control:{kind}"
    with case_folder(case, *KINDS[kind].needs) as folder:
        if kind == "evaluated_checkpoint":
            (folder / "run" / "classifier.safetensors").unlink()
        status = run(folder, KINDS[kind].arguments)
        if status != 0:
            return Outcome(case, kind, f"status {status}: {said(folder)[-2000:]}")
        found = json.dumps(end(folder))
        forget(folder)
        return Outcome(case, kind, accepted=found)


def malformed(number: int) -> Outcome:
    """Damages one file; see the module's docstring."""
    case, draw = f"malformed:{number}", random.Random(f"{WORLD.seed} malformed {number}")
    name = list(KINDS)[number % len(KINDS)]
    kind = KINDS[name]
    with case_folder(case, *kind.needs) as folder:
        if name == "evaluated_checkpoint":
            (folder / "run" / "classifier.safetensors").unlink()
        path = draw.choice([p for p in sorted(folder.glob(kind.files)) if p.is_file()])
        damage, content = damaged(draw, path)
        path.write_bytes(content)
        what = f"{path.relative_to(folder)} {damage}"
        before = digests(folder)
        status = run(folder, kind.arguments)
        fault = complaint(folder, status)
        after = digests(folder)
        written = () if status == 2 else ("run/", "out.json")
        inputs = {p: d for p, d in before.items() if not p.startswith(written)}
        lost = [p for p, digest in inputs.items() if after.get(p) != digest]
        if path.name == "metrics.jsonl" and not records(content) <= records(path.read_bytes()):
            lost += ["run/metrics.jsonl: records beside the damaged one"]
        if lost and not fault:
            fault = f"status {status}, and lost {lost[0]}"
        changed = ""
        if status == 0 and not fault:
            changed = difference(end(folder), WORLD.ends[name])
            cut = damage.startswith("cut") and name != "rerun"  # The log's last line may be cut.
            if changed and (kind.checked or cut):
                fault, changed = f"accepted, and {changed}", ""
        counts = {2: "refused", 0: "another end" if changed else "same end"}.get(status, "failed")
        if not fault:
            forget(folder)
        return Outcome(
            case,
            name,
            fault and f"{what}: {fault}",
            (counts,),
            changed and f"{what}: {changed}",
        )


def digests(folder: pathlib.Path) -> dict[str, str]:
    """The content of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records(content: bytes) -> set[str]:
    """The lines that are whole JSON, in one spelling."""
    whole = set()
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            whole.add(json.dumps(json.loads(line), sort_keys=True))
    return whole


def damaged(draw: random.Random, path: pathlib.Path) -> tuple[str, bytes]:
    """A file's content with one damage, and what that is."""
    content = path.read_bytes()
    kind = draw.choice(["cut", "bit", "value"])
    if kind == "value" and path.suffix == ".json":
        with contextlib.suppress(ValueError):
            return _with_wrong_value(draw, json.loads(content))
    size = len(content)
    if kind == "cut" and size:
        length = draw.choice([0, size - 1, draw.randrange(size)])
        return f"cut to {length} of {size} bytes", content[:length]
    if not size:
        return "with a byte added", b"\x80"
    ends = [draw.randrange(min(size, 300)), size - 1 - draw.randrange(min(size, 300))]
    position, bit = draw.choice([*ends, draw.randrange(size)]), draw.randrange(8)
    flipped = bytes([content[position] ^ 1 << bit])
    return f"with bit {bit} of byte {position} flipped", (
        content[:position] + flipped + content[position + 1 :]
    )


def _with_wrong_value(draw: random.Random, value: Any) -> tuple[str, bytes]:
    """JSON with one of its values, at any depth, replaced."""
    places: list[tuple[Any, Any, str]] = []

    def collect(node: Any, prefix: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in list(items):
            places.append((node, key, f"{prefix}.{key}"))
            if isinstance(inner, dict | list):
                collect(inner, f"{prefix}.{key}")

    collect(value if isinstance(value, dict | list) else [value], "")
    wrong = draw.choice([None, -1, 1e30, math.nan, "nonsense", [], {}, 10**30, True, [None]])
    node, key, where = draw.choice(places)
    node[key] = wrong
    return f"with {where.lstrip('.')} = {wrong!r}", json.dumps(value, indent=2).encode()


# ------------------------------------------------------------------------ wrong settings


_PHOTOGRAPHS = {"dataset": "folder", "data_dir": "photographs"}
USING = {  # what makes fields count that begin so
    "ada": {"method": "ada", "ada__steps": 1},
    "pgd": {"method": "pgd", "pgd__steps": 1},
    "augmix": {"augmix__use": True},
    "deepaugment": {"deepaugment__copies": 1, "deepaugment__dir": "renderings"},
    "image_size": _PHOTOGRAPHS,
    "crop": _PHOTOGRAPHS | {"crop_scale": (0.5, 1.0)},
    "eval_c_dir": {"eval_sets": ("clean", "c")},
    "corruption": {"eval_sets": ("clean", "c"), "corruption_eval_epochs": 0.5},
}


@functools.cache
def all_settings() -> list[tuple[str, str]]:
    """Every field of the quickstart with every wrong value."""
    config = runpy.run_path(str(QUICKSTART))["get_config"]().to_dict()
    fields = []
    for name, value in config.items():
        fields += [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]
    settings = list(itertools.product(fields, WRONG))
    random.Random(f"{WORLD.seed} settings").shuffle(settings)
    return settings


def setting(number: int) -> Outcome:
    """Starts a run with one wrong setting; see the module's docstring."""
    case, (field, value) = f"settings:{number}", all_settings()[number]
    using = next((USING[part] for part in USING if field.startswith(part)), {})
    arguments = [*train(**_SHORT | using), f"--config.{field}={value}"]
    with case_folder(case, "data.npz", "photographs", "renderings") as folder:
        before = digests(folder)
        status = run(folder, arguments, SETTING_SECONDS)
        going = status is None and "Traceback" not in said(folder)
        fault = "" if going else complaint(folder, status)
        after = digests(folder)
        if any(after.get(path) != digest for path, digest in before.items()):
            fault = fault or f"status {status}, and a file was changed"
        if not fault:
            forget(folder)
        count = {2: "refused", 0: "accepted", None: "still running"}.get(status, "failed")
        shown = f"{field}={value!r}" + (" (still running)" if going else "")
        accepted = shown if not fault and status != 2 else ""
        return Outcome(case, field, fault and f"{shown}: {fault}", (count,), accepted)


# ------------------------------------------------------------------------ the campaign


class World:
    """What all cases share; the forks inherit it."""

    def __init__(self, args: argparse.Namespace, root: pathlib.Path) -> None:
        self.args, self.root, self.seed = args, root, args.seed
        self.ends: dict[str, Any] = {}


WORLD: World  # set by main, before anything forks


def preload() -> None:
    """Imports what the commands import, where it is installed; no JAX backend may start here."""
    modules = ["jax", "haiku", "optax", "orbax.checkpoint", "tensorstore", "grain", "scipy.ndimage"]
    modules += ["clu.metric_writers", "clu.parameter_overview", "tensorflow", "matplotlib.pyplot"]
    modules += ["safetensors.numpy", "PIL.Image", "ada_jax.evaluate", "ada_jax.report"]
    modules += ["ada_jax.deepaugment", "ada_jax.study"]
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)

    # Tracing resnet9 is most of what a tiny run does: one block takes a third of it.
    block = {"block": residual_nets.preact_basic, "widths": (8,), "depths": (1,)}
    classifiers._NETWORKS["resnet9"] = functools.partial(residual_nets.preact_resnet, **block)


def one(case: str) -> Outcome:
    """Runs a case by its name."""
    part, _, number = case.partition(":")
    began = time.monotonic()
    cases: dict[str, Callable[[Any], Outcome]] = {
        "malformed": malformed,
        "settings": setting,
        "control": control,
    }
    outcome = cases[part](number if part == "control" else int(number))
    return outcome._replace(seconds=time.monotonic() - began)


def run_cases(cases: list[str], jobs: int) -> Iterator[Outcome]:
    """Runs cases, several at a time."""
    # The workers fork the commands, and must have no threads: processes, not a thread pool.
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(one, cases)


def main() -> int:
    """Runs the parts that the flags name; returns the exit status."""
    global WORLD
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--malformed", type=int, default=200)
    parser.add_argument("--settings", type=int, default=10**6, help="at most; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time")
    parser.add_argument("--only", default="", help="one case, as malformed:17")
    parser.add_argument("--folder", default="", help="where to work; a failed case stays there")
    args = parser.parse_args()
    root = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="campaign-")).resolve()
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / "good", ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # faster
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(ROOT),
    }
    sys.path.insert(0, str(ROOT))
    warnings.filterwarnings("ignore", message=".*fork")
    WORLD = World(args, root)
    preload()
    return campaign(args)


def campaign(args: argparse.Namespace) -> int:
    """Prepares what the parts need and runs them."""
    began = time.monotonic()
    parts = [args.only.partition(":")[0]] if args.only else [p for p in PARTS if getattr(args, p)]
    prepare(WORLD.root / "good")
    failures: list[Outcome] = []
    if "malformed" in parts:
        for outcome in run_cases([f"control:{kind}" for kind in KINDS], args.jobs):
            failures += [outcome] if outcome.failure else []
            WORLD.ends[outcome.kind] = json.loads(outcome.accepted or "{}")
    print(f"prepared in {time.monotonic() - began:.0f} s, in {WORLD.root}", flush=True)
    for part in parts:
        failures += run_part(part, args)
    for failure in failures:
        python = f"python tests/campaign.py --seed={args.seed} --only={failure.case}"
        print(f"\nFAILED {failure.case}, {failure.failure.strip()}\n  repeat: {python}")
    if not failures and not args.folder:
        shutil.rmtree(WORLD.root)
    return 1 if failures else 0


def run_part(part: str, args: argparse.Namespace) -> list[Outcome]:
    """Runs the cases of one part and prints its counts; returns the failures."""
    began = time.monotonic()
    number = min(getattr(args, part), len(all_settings()) if part == "settings" else 10**6)
    cases = [args.only] if args.only else [f"{part}:{i}" for i in range(number)]
    outcomes = list(run_cases(cases, args.jobs))
    counts: dict[str, int] = {}
    for count in itertools.chain(*(outcome.counts for outcome in outcomes)):
        counts[count] = counts.get(count, 0) + 1
    failures = [outcome for outcome in outcomes if outcome.failure]
    told = ", ".join(f"{n} {count}" for count, n in sorted(counts.items()))
    seconds = time.monotonic() - began
    print(f"{part}: {len(cases)} cases ({told}), {len(failures)} failed; {seconds:.0f} s")
    for line in sorted(outcome.accepted for outcome in outcomes if outcome.accepted):
        print(f"  accepted: {line}")
    sys.stdout.flush()
    return failures


if __name__ == "__main__":
    sys.exit(main())
