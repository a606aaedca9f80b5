#!/usr/bin/env python3
"""Runs the points of a sweep on a pool of Cloud TPU VMs.

    python -m ada_jax.sweep --sweep=FILE --out=gs://BUCKET/FOLDER --print | \\
      launch/sweep_tpu.py --commands=- --vms=4 --zone=europe-west4-a --type=v3-8 --spot

Each line is a training command, run by run_tpu.sh, which creates, sets up and replaces its VM. A
point that succeeds gets a file `finished` in its workdir and is skipped from then on, so the same
command resumes after a failure. The VMs are deleted at the end. It only needs Python's standard
library.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from typing import NoReturn

HERE = pathlib.Path(__file__).resolve().parent
MISTAKE = 2


class Parser(argparse.ArgumentParser):
    """Reports errors in one sentence."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message[:1].upper()}{message[1:]}: see {self.prog} --help.")


def complain(sentence: str) -> NoReturn:
    """Prints an error and exits with status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(MISTAKE)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags; `vm` of the result are run_tpu.sh's flags except --name."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--commands", required=True, help="file with one command per line, - for standard input"
    )
    parser.add_argument("--vms", type=int, required=True, help="number of VMs")
    parser.add_argument("--prefix", default="ada", help="VMs are called PREFIX-0, PREFIX-1, ...")
    for name in ("zone", "type"):
        parser.add_argument(f"--{name}", required=True, help="as for create_tpu.sh")
    for name in ("version", "project", "source", "ref", "max_restarts", "retry_seconds"):
        parser.add_argument(f"--{name}", help="as for run_tpu.sh")
    for name in ("spot", "queued"):
        parser.add_argument(f"--{name}", action="store_true", help="as for create_tpu.sh")
    parser.add_argument("--keep_vms", action="store_true", help="do not delete the VMs at the end")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the commands without running them"
    )
    values = parser.parse_args(argv)
    if values.vms < 1:
        complain(f"--vms={values.vms} is not a positive number.")
    named = ("zone", "type", "version", "project", "source", "ref", "max_restarts", "retry_seconds")
    values.vm = [f"--{n}={getattr(values, n)}" for n in named if getattr(values, n)]
    values.vm += [f"--{n}" for n in ("spot", "queued") if getattr(values, n)]
    return values


@dataclasses.dataclass(frozen=True)
class Point:
    """A command of the sweep, as words, and its workdir."""

    command: tuple[str, ...]
    workdir: str


def read_points(lines: list[str]) -> list[Point]:
    """Parses shell commands, one per line, ignoring empty lines and comments."""
    points: dict[str, Point] = {}
    for number, line in enumerate(lines, 1):
        try:
            command = shlex.split(line, comments=True)
        except ValueError as error:
            complain(f"Line {number} of the commands has unbalanced quotes: {error}.")
        if not command:
            continue
        workdirs = [word for word in command if word.startswith("--workdir=gs://")]
        if len(workdirs) != 1:
            complain(f"Line {number} of the commands needs one --workdir=gs://BUCKET/FOLDER.")
        workdir = workdirs[0].partition("=")[2].rstrip("/")
        if workdir in points:
            complain(f"Line {number} has the same --workdir={workdir} as another line.")
        points[workdir] = Point(tuple(command), workdir)
    if not points:
        complain("There are no commands to run.")
    return list(points.values())


class Pool:
    """VMs that take points from a queue until it is empty."""

    def __init__(self, points: list[Point], values: argparse.Namespace) -> None:
        self._points, self._values = points, values
        self._queue: queue.SimpleQueue[Point] = queue.SimpleQueue()
        for point in points:
            self._queue.put(point)
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self.statuses: dict[str, int] = {}  # By workdir.

    def run(self) -> None:
        """Runs all points; after SIGINT or SIGTERM the VMs are still released."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.stop())
        count = min(self._values.vms, len(self._points))
        names = [f"{self._values.prefix}-{i}" for i in range(count)]
        if self._values.dry_run:  # Assumes that all points take the same time.
            for i, point in enumerate(self._points):
                self._train(names[i % count], point)
            for name in names:
                self._release(name)
            return
        threads = [threading.Thread(target=self._serve, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """Starts no more points and stops following the running ones."""
        self._stopped = True
        for process in list(self._running.values()):
            self._end(process)

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        with contextlib.suppress(ProcessLookupError):  # The group: script, gcloud, ssh.
            os.killpg(process.pid, signal.SIGTERM)

    def _serve(self, name: str) -> None:
        used = False
        while not self._stopped:
            try:
                point = self._queue.get_nowait()
            except queue.Empty:
                break
            used = self._train(name, point) or used
        if used or not self._values.keep_vms:  # A killed sweep may have left the VM.
            self._release(name)

    def _train(self, name: str, point: Point) -> bool:
        """Runs a point unless it is finished; returns whether the VM was used."""
        if self._finished(name, point):
            self.statuses[point.workdir] = 0
            self._say(name, f"{point.workdir} is finished.")
            return False
        script = [HERE / "run_tpu.sh", f"--name={name}", *self._values.vm]
        status = self._call(name, [*script, "--", *point.command])
        self.statuses[point.workdir] = status
        if self._values.dry_run:
            return True
        self._say(name, f"{point.workdir} ended with {status}.")
        if status == 0:  # results.json does not suffice: it is written from the first measurement.
            mark = ["gcloud", "storage", "cp", "--quiet", "-", f"{point.workdir}/finished"]
            subprocess.run(mark, input=b"by sweep_tpu.py\n", capture_output=True)
        return True

    def _finished(self, name: str, point: Point) -> bool:
        command = ["gcloud", "storage", "ls", f"{point.workdir}/finished"]
        if self._values.dry_run:
            self._say(name, shlex.join(command))
            return False
        return subprocess.run(command, capture_output=True).returncode == 0

    def _release(self, name: str) -> None:
        where = [f for f in self._values.vm if f.startswith(("--zone=", "--project="))]
        if not self._values.keep_vms:
            self._call(name, [HERE / "delete_tpu.sh", f"--name={name}", *where], last=True)
        elif self._stopped:  # The next sweep may give this VM another point.
            self._call(name, [HERE / "run_tpu.sh", f"--name={name}", *where, "--stop"], last=True)

    def _call(self, name: str, command: list[str | pathlib.Path], last: bool = False) -> int:
        """Runs a script, prints its output with the VM's name, and returns its status."""
        words = [str(word) for word in command]
        if self._values.dry_run:
            self._say(name, shlex.join(["launch/" + pathlib.Path(words[0]).name, *words[1:]]))
            return 0
        # In its own session, so that Ctrl-C reaches it only through `stop`.
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        if not last:
            self._running[name] = process
            if self._stopped:
                self._end(process)
        assert process.stdout
        for line in process.stdout:
            self._say(name, line.rstrip("\n"))
        self._running.pop(name, None)
        return process.wait()

    def _say(self, name: str, line: str) -> None:
        with self._lock:
            print(f"[{name}] {line}", flush=True)


def main(argv: list[str]) -> int:
    """Runs the sweep; returns 0 if every point is finished, else 1."""
    values = parse(argv)
    try:
        path = pathlib.Path("/dev/stdin" if values.commands == "-" else values.commands)
        text = path.read_text()
    except OSError as error:
        complain(f"--commands={values.commands} cannot be read: {error.strerror}.")
    points = read_points(text.splitlines())
    if not values.dry_run and not shutil.which("gcloud"):
        complain("There is no gcloud on the PATH: see https://cloud.google.com/sdk/docs/install.")
    pool = Pool(points, values)
    pool.run()
    failed = [p.workdir for p in points if pool.statuses.get(p.workdir) != 0]
    if not values.dry_run:
        print(f"{len(points) - len(failed)} of {len(points)} points are finished.")
    if failed:
        print("Not finished; the same command resumes them:", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
