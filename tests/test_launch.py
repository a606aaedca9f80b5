"""Launch scripts: what they call, how they answer preemptions and mistakes, quoting, shellcheck.

A stub `gcloud` on the PATH records its arguments and plays a cloud: a folder with a file a VM that
holds its state, one a queued request, and a list of what the next trainings end with. Told to, it
runs what comes over ssh, in a home folder of its own.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
BASH = shutil.which("bash") or "/bin/bash"
VM = ("--name=ada", "--zone=europe-west4-a")
TYPED = (*VM, "--type=v3-8")
RUN = (*TYPED, "--spot", "--retry_seconds=0", "--")
TRAIN = ("python", "-m", "ada_jax.train", "--config=c.py", "--workdir=gs://bucket/run")

GCLOUD = r"""#!/usr/bin/env bash
set -euo pipefail
printf -v line '%s\x1f' "$@"
printf '%s\n' "$line" >>"$CLOUD/calls" # in one piece: the VMs of a sweep write together

shift_line() { # Prints a file's first line and drops it.
  [ ! -s "$1" ] || { sed -n 1p "$1" && sed -i 1d "$1"; }
}

command=""
for word in "$@"; do
  case $word in --command=*) command=${word#*=} ;; esac
done
case "$1 $2 $3 ${4:-}" in
  "storage ls "*) [ -e "$CLOUD/bucket/${3#gs://}" ] ;;
  "storage cp "*)
    mkdir -p "$(dirname "$CLOUD/bucket/${5#gs://}")"
    cat "$4" >"$CLOUD/bucket/${5#gs://}" ;;
  "compute tpus tpu-vm list" | "compute tpus queued-resources list")
    [ ! -e "$CLOUD/offline" ] || { echo "no network" >&2 && exit 1; }
    cd "$CLOUD/$3"
    for file in *; do
      state=$(sed -n 1p "$file" 2>/dev/null) || continue # none, or deleted just now
      printf '%s\t%s\n' "$file" "$state"
      # A request's states follow each other; ACTIVE, it has its VM.
      if [ "$3" = queued-resources ]; then
        [ "$state" != ACTIVE ] || echo READY >"$CLOUD/tpu-vm/$file"
        [ "$state" != LAST ] || touch "$CLOUD/offline"
        [ "$(wc -l <"$file")" -lt 2 ] || sed -i 1d "$file"
      fi
    done ;;
  "compute tpus tpu-vm create")
    status=$(shift_line "$CLOUD/creations")
    [ -z "$status" ] || exit "$status"
    [ ! -e "$CLOUD/tpu-vm/$5" ] || exit 1
    echo READY >"$CLOUD/tpu-vm/$5" ;;
  "compute tpus tpu-vm start") echo READY >"$CLOUD/tpu-vm/$5" ;;
  "compute tpus queued-resources create") cp "$CLOUD/queue" "$CLOUD/queued-resources/$5" ;;
  *" delete") rm -f "$CLOUD/tpu-vm/$5" "$CLOUD/$3/$5" ;;
  "compute tpus tpu-vm scp") cp "$5" "$CLOUD/home/${6#*:}" ;;
  "compute tpus tpu-vm ssh")
    [ "$(cat "$CLOUD/tpu-vm/$5")" = READY ] || exit 1
    if [ -e "$CLOUD/execute" ]; then
      cd "$CLOUD/home" && HOME=$CLOUD/home exec bash -c "$command"
    fi
    [[ $command == *"worker.sh run"* ]] || exit 0
    ending=$(shift_line "$CLOUD/endings")
    read -r status state <<<"$ending"
    case ${state:-} in
      "") ;;
      MISSING) rm "$CLOUD/tpu-vm/$5" ;;
      *) echo "$state" >"$CLOUD/tpu-vm/$5" ;;
    esac
    exit "${status:-0}" ;;
esac
"""


@dataclasses.dataclass
class Cloud:
    """The stub's folder, and how scripts are run beside it."""

    path: pathlib.Path

    @property
    def environment(self):
        return os.environ | {
            "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
            "CLOUD": str(self.path),
        }

    def program(self, name, text, folder="bin"):
        file = self.path / folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        file.chmod(0o755)

    def write(self, name, *lines):
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines))

    def __call__(self, script, *words, status=0, **options):
        """Runs a script of launch/ and asserts its status; returns the finished process."""
        done = subprocess.run(
            [LAUNCH / script, *words],
            capture_output=True,
            text=True,
            timeout=30,
            **{"env": self.environment, "cwd": ROOT} | options,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def calls(self, *, lists=False):
        """The recorded calls without `gcloud compute tpus`, each a list of words."""
        file = self.path / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        calls = [line.split("\x1f")[:-1] for line in lines]
        calls = [c[2:] if c[:2] == ["compute", "tpus"] else c for c in calls]
        return [c for c in calls if lists or c[1] != "list"]

    def verbs(self):
        """What was done in short: create, delete, scp, install, run and others."""
        commands = (re.search(r"worker\.sh (\w+)", call[-3]) for call in self.calls())
        return [m[1] if m else c[1] for m, c in zip(commands, self.calls(), strict=True)]


@pytest.fixture
def cloud(tmp_path):
    for folder in ("tpu-vm", "queued-resources", "home", "bucket"):
        (tmp_path / folder).mkdir()
    cloud = Cloud(tmp_path)
    cloud.program("gcloud", GCLOUD)
    cloud.write("queue", "ACTIVE")
    return cloud


# The scripts as texts.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_bash_reads_it(script):
    subprocess.run([BASH, "-n", script], check=True)
    text = script.read_text()
    assert text.isascii()
    if script.name != "common.sh":
        assert os.access(script, os.X_OK) == (script.suffix == ".sh")
        assert "\nset -euo pipefail\n" in text


def test_shellcheck_finds_nothing():
    program = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if not program:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_readme_prints_what_the_dry_runs_print(cloud):
    block = re.search(r"```console\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
    commands = re.split(r"^\$ ", block[1], flags=re.MULTILINE)[1:]
    scripts = [c.split("_tpu")[0] for c in commands]
    assert scripts == [f"launch/{verb}" for verb in ("create", "setup", "run", "delete")]
    for command, _, printed in (c.partition("\n") for c in commands):
        script, *words = shlex.split(command)
        assert cloud(pathlib.Path(script).name, *words).stdout == printed
    assert cloud.calls(lists=True) == []


def test_a_printed_command_is_the_one_that_runs(cloud):
    printed = cloud("create_tpu.sh", *TYPED, "--project=a b", "--dry_run").stdout
    cloud("create_tpu.sh", *TYPED, "--project=a b")
    calls = [["gcloud", "compute", "tpus", *call] for call in cloud.calls(lists=True)]
    assert [shlex.split(line) for line in printed.splitlines()] == calls


# Mistakes.


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("create_tpu.sh --name=ada --zone=z", "The flag --type is missing"),
        ("create_tpu.sh --name=ada --zone=z --type=x9-8", "No software version is known"),
        ("setup_tpu.sh --zone=z", "The flag --name is missing"),
        ("setup_tpu.sh --name=ada --zone=z --ref=main", "The flag --ref needs --source"),
        ("run_tpu.sh --name=ada --type=v3-8", "The flag --zone is missing"),
        ("run_tpu.sh --name=ada --zone=z --type=v3-8", "The command is missing"),
        ("run_tpu.sh --name=a --zone=z --type=v3-8 -- x --workdir=runs/a", "needs --workdir=gs://"),
        ("run_tpu.sh --name=a --zone=z --type=v3-8 --max_restarts=x -- x", "must be an integer"),
        ("run_tpu.sh --name=a --zone=z --type=t --retry_seconds=1m -- x", "must be an integer"),
        ("run_tpu.sh --name=a --zone=z --type=t --ref=x -- x", "The flag --ref needs --source"),
        ("create_tpu.sh --name=a --zone=z --type=v3-8 --poll_seconds=x", "must be an integer"),
        ("delete_tpu.sh --name=ada --zone", "The flag --zone needs a value"),
        ("delete_tpu.sh --name=ada --zone=", "The flag --zone needs a value"),
        ("delete_tpu.sh --name=ada --zone=z --dry_run=1", "The flag --dry_run takes no value"),
        ("delete_tpu.sh --name=ada --zone=z --forced", "There is no flag --forced"),
        ("delete_tpu.sh ada", "The argument 'ada' is not a flag"),
        ("sweep_tpu.py --commands=x --vms=2 --zone=z", "arguments are required: --type"),
        ("sweep_tpu.py --commands=x --vms=2 --zone=z --type=t --no", "arguments: --no"),
        ("sweep_tpu.py --commands=x --vms=0 --zone=z --type=t", "not a positive number"),
        ("sweep_tpu.py --commands=/no --vms=1 --zone=z --type=t", "cannot be read"),
        ("sweep_tpu.py --commands=/dev/null --vms=1 --zone=z --type=t", "no commands to run"),
        ("slurm.sbatch", "The command is missing"),
        ("gpu_study.sh --minutes=5", "The flag --out is missing"),
        ("gpu_study.sh --out=x --minutes=soon", "--minutes=soon must be a positive integer"),
    ],
)
def test_a_mistake_costs_one_sentence_and_status_2(cloud, line, sentence):
    script, *words = shlex.split(line)
    program = [BASH] if script == "slurm.sbatch" else []
    done = subprocess.run(
        [*program, LAUNCH / script, *words], env=cloud.environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and sentence in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert cloud.calls(lists=True) == []


def test_no_gcloud_is_a_sentence(cloud):
    (cloud.path / "bin" / "gcloud").unlink()
    for tool in ("bash", "dirname", "env"):
        (cloud.path / "bin" / tool).symlink_to(shutil.which(tool))
    bare = cloud.environment | {"PATH": str(cloud.path / "bin")}
    done = cloud("delete_tpu.sh", *VM, status=2, env=bare)
    assert "no gcloud on the PATH" in done.stderr


@pytest.mark.parametrize("script", [p.name for p in SCRIPTS if "_tpu" in p.name] + ["sweep_tpu.py"])
def test_help(cloud, script):
    done = cloud(script, "--help")
    assert "--zone" in done.stdout and "--dry_run" in done.stdout and "set -e" not in done.stdout


# Creating and deleting.


def test_create(cloud):
    cloud("create_tpu.sh", *TYPED, "--spot", "--project=mine")
    where = ["--zone=europe-west4-a", "--project=mine", "--quiet"]
    assert cloud.calls(lists=True) == [
        ["tpu-vm", "list", "--format=value(name.basename(),state)", *where],
        ["tpu-vm", "create", "ada", "--version=tpu-ubuntu2204-base", "--accelerator-type=v3-8"]
        + ["--spot", *where],
    ]


@pytest.mark.parametrize(
    ("kind", "accelerator", "version"),
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_each_type_has_its_software_version(cloud, kind, accelerator, version):
    cloud("create_tpu.sh", *VM, f"--type={kind}")
    assert f"--accelerator-type={accelerator}" in cloud.calls()[0]
    assert f"--version={version}" in cloud.calls()[0]


def test_a_version_of_ones_own(cloud):
    cloud("create_tpu.sh", *VM, "--type=v9-8", "--version=mine")
    assert "--version=mine" in cloud.calls()[0]


@pytest.mark.parametrize(
    ("state", "status", "verbs"),
    [
        ("READY", 0, []),
        ("STOPPED", 0, ["start"]),
        ("PREEMPTED", 0, ["delete", "create"]),
        ("TERMINATED", 0, ["delete", "create"]),
        ("CREATING", 1, []),
    ],
)
def test_create_looks_at_what_is_there(cloud, state, status, verbs):
    cloud.write("tpu-vm/ada", state)
    cloud.write("tpu-vm/ada-2", "READY")  # another one
    cloud("create_tpu.sh", *TYPED, status=status)
    assert cloud.verbs() == verbs


def test_create_in_the_queue_waits_for_it(cloud):
    cloud.write("queue", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = cloud("create_tpu.sh", *TYPED, "--spot", "--queued", "--poll_seconds=0")
    assert cloud.calls() == [
        ["queued-resources", "create", "ada", "--node-id=ada"]
        + ["--runtime-version=tpu-ubuntu2204-base", "--accelerator-type=v3-8", "--spot"]
        + ["--zone=europe-west4-a", "--quiet"],
    ]
    assert done.stdout.count("is in state") == 2


def test_a_lost_network_ends_the_wait_with_an_error(cloud):
    cloud.write("queue", "WAITING_FOR_RESOURCES", "LAST")
    cloud("create_tpu.sh", *TYPED, "--queued", "--poll_seconds=0", status=1)


def test_a_deleted_request_ends_the_wait(cloud):
    cloud.write("queue", "WAITING_FOR_RESOURCES", "")
    done = cloud("create_tpu.sh", *TYPED, "--queued", "--poll_seconds=0", status=1)
    assert done.stdout.count("is in state MISSING") == 3


def test_a_failed_request_is_an_error_and_replaced_the_next_time(cloud):
    cloud.write("queue", "FAILED")
    done = cloud("create_tpu.sh", *TYPED, "--queued", status=1)
    assert "is in state FAILED" in done.stdout
    cloud.write("queue", "ACTIVE")
    cloud("create_tpu.sh", *TYPED, "--queued")
    assert cloud.verbs() == ["create", "delete", "create"]
    assert cloud.calls()[1] == ["queued-resources", "delete", "ada", "--force"] + [
        "--zone=europe-west4-a",
        "--quiet",
    ]


def test_delete(cloud):
    cloud("delete_tpu.sh", *VM)
    assert cloud.calls() == []
    cloud.write("tpu-vm/ada", "PREEMPTED")
    cloud("delete_tpu.sh", *VM)
    assert cloud.calls() == [["tpu-vm", "delete", "ada", "--zone=europe-west4-a", "--quiet"]]


def test_delete_does_not_take_a_lost_network_for_an_absent_vm(cloud):
    cloud.write("tpu-vm/ada", "READY")
    cloud.write("offline")
    assert "no network" in cloud("delete_tpu.sh", *VM, status=1).stderr


# Running.


def test_run(cloud):
    cloud.write("tpu-vm/ada", "READY")
    cloud("run_tpu.sh", *RUN, *TRAIN)
    (call,) = cloud.calls()
    assert call[:4] == ["tpu-vm", "ssh", "ada", "--worker=all"]
    command = re.sub(r"run \d{8}T\d{6}Z", "run TIME", call[-3])
    assert command == (
        "--command=bash ada_jax/launch/worker.sh run TIME gs://bucket/run python -m ada_jax.train"
        " --config=c.py --workdir=gs://bucket/run --distributed"
    )


@pytest.mark.parametrize(
    "command",
    [
        (*TRAIN, "--distributed"),
        (*TRAIN, "--nodistributed"),
        ("python", "-m", "ada_jax.pretrain", "--workdir=gs://bucket/run"),
    ],
)
def test_distributed_is_for_training_and_said_once(cloud, command):
    cloud.write("tpu-vm/ada", "READY")
    cloud("run_tpu.sh", *RUN, *command)
    assert cloud.calls()[0][-3].endswith(" ".join(command))


def test_run_creates_a_vm_that_is_not_there(cloud):
    cloud("run_tpu.sh", *RUN, *TRAIN)
    assert cloud.verbs() == ["create", "scp", "install", "run"]
    assert "--spot" in cloud.calls()[0]


@pytest.mark.parametrize("status", [143, 134, 255])
def test_an_interruption_on_a_healthy_vm_runs_the_same_again(cloud, status):
    cloud.write("tpu-vm/ada", "READY")
    cloud.write("endings", status, 0)
    done = cloud("run_tpu.sh", *RUN, *TRAIN)
    assert cloud.verbs() == ["run", "run"]
    first, second = (re.sub(r"run \S+", "run", call[-3]) for call in cloud.calls())
    assert first == second
    assert f"Status {status}: restart 1 of at most 20" in done.stderr


@pytest.mark.parametrize("ending", ["143 PREEMPTED", "1 TERMINATED", "255 PREEMPTED", "1 MISSING"])
def test_a_preempted_vm_is_made_anew(cloud, ending):
    cloud.write("tpu-vm/ada", "READY")
    cloud.write("endings", ending, 0)
    cloud("run_tpu.sh", *RUN, *TRAIN)
    delete = [] if "MISSING" in ending else ["delete"]
    assert cloud.verbs() == ["run", *delete, "create", "scp", "install", "run"]


def test_a_preempted_queued_vm_is_made_anew(cloud):
    cloud.write("queued-resources/ada", "SUSPENDED")
    cloud.write("tpu-vm/ada", "PREEMPTED")
    cloud("run_tpu.sh", "--queued", *RUN, *TRAIN)
    assert [c[:2] for c in cloud.calls()][:2] == [
        ["queued-resources", "delete"],
        ["queued-resources", "create"],
    ]
    assert cloud.verbs() == ["delete", "create", "scp", "install", "run"]


def test_a_zone_with_nothing_free_is_asked_again(cloud):
    cloud.write("creations", 1, 1)
    done = cloud("run_tpu.sh", *RUN, *TRAIN)
    assert cloud.verbs() == ["create", "create", "create", "scp", "install", "run"]
    assert "restart 2 of" in done.stderr


def test_restarts_are_bounded(cloud):
    cloud.write("tpu-vm/ada", "READY")
    cloud.write("endings", 143, 143, 143, 0)
    done = cloud("run_tpu.sh", "--max_restarts=2", *RUN, *TRAIN, status=143)
    assert cloud.verbs() == ["run"] * 3
    assert "after 2 restarts; the same command resumes" in done.stderr


@pytest.mark.parametrize(("ending", "status"), [(2, 2), (1, 1), (130, 130), (127, 2)])
def test_permanent_failures_are_not_retried(cloud, ending, status):
    cloud.write("tpu-vm/ada", "READY")
    cloud.write("endings", ending, 0)
    done = cloud("run_tpu.sh", *RUN, *TRAIN, status=status)
    assert cloud.verbs() == ["run"]
    if ending == 127:
        assert "run launch/setup_tpu.sh" in done.stderr


def test_a_lost_network_is_waited_for(cloud):
    cloud.write("tpu-vm/ada", "READY")
    cloud.write("offline")
    cloud("run_tpu.sh", "--max_restarts=1", *RUN, *TRAIN, status=143)
    assert cloud.verbs() == []


def test_setup_from_git(cloud):
    cloud.write("tpu-vm/ada", "READY")
    cloud("setup_tpu.sh", *VM, "--source=https://host/a b.git", "--ref=v1")
    (call,) = cloud.calls()
    assert call[-3] == (
        "--command=rm -rf ada_jax && git clone --quiet 'https://host/a b.git' ada_jax && "
        "git -C ada_jax checkout --quiet v1 && bash ada_jax/launch/worker.sh install"
    )


# On the worker: the stub runs what comes over ssh.

ODD = (
    "--config.train_split=train[:45000]",
    '--config.name=it\'s a "$HOME" & `so`; *',
    "--config.x=",
)


@pytest.fixture
def worker(cloud):
    """A VM that is set up with this tree's launch/, whose python is told what to do by a test."""
    cloud.write("execute")
    cloud.write("tpu-vm/ada", "READY")
    (cloud.path / "home" / "ada_jax").mkdir()
    shutil.copytree(LAUNCH, cloud.path / "home" / "ada_jax" / "launch")
    cloud.write("home/ada_jax_env/complete")

    def python(text):
        cloud.program("python", f"#!/usr/bin/env bash\n{text}\n", "home/ada_jax_env/bin")

    cloud.python = python
    yield cloud
    state = cloud.path / "home" / ".ada_jax"
    held = ["flock", "--nonblock", "--conflict-exit-code=9", state / "lock", "true"]
    if state.exists() and subprocess.run(held).returncode == 9:  # It outlived a test that failed.
        os.killpg(int((state / "pid").read_text()), signal.SIGKILL)


def ssh(cloud, attempt, *words, status=0):
    """Runs worker.sh as ssh would, and returns what it prints."""
    return cloud("worker.sh", *attempt, *words, status=status, env=at_home(cloud)).stdout


def at_home(cloud):
    return cloud.environment | {"HOME": str(cloud.path / "home")}


def until(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("It did not happen in ten seconds.")


def test_words_arrive_as_they_were_written(worker):
    worker.python('printf "%s\\0" "$@" >"$HOME/words"; echo trained; pwd')
    done = worker("run_tpu.sh", *RUN, *TRAIN, *ODD)
    words = (worker.path / "home" / "words").read_text().split("\0")[:-1]
    assert words == [*TRAIN[1:], *ODD, "--distributed"]
    assert "trained" in done.stdout
    (log,) = (worker.path / "bucket" / "bucket" / "run" / "logs").iterdir()
    assert log.read_text() == f"trained\n{worker.path / 'home' / 'ada_jax'}\n"
    assert re.fullmatch(r".*-\d{8}T\d{6}Z\.log", log.name)


@pytest.mark.parametrize("status", [2, 1])
def test_the_trainings_status_comes_back(worker, status):
    worker.python(f"echo 'error: no such split.' >&2; exit {status}")
    done = worker("run_tpu.sh", *RUN, *TRAIN, status=status)
    assert "no such split" in done.stdout


def test_a_lost_connection_does_not_start_a_second_training(worker):
    worker.python(
        'echo start >>"$HOME/starts"; until [ -e "$HOME/go" ]; do sleep 0.05; done; echo end'
    )
    starts = worker.path / "home" / "starts"
    command = ("run", "one", "gs://bucket/run", "python", "a b")
    first = subprocess.Popen(
        [LAUNCH / "worker.sh", *command], env=at_home(worker), stdout=subprocess.DEVNULL
    )
    until(starts.exists)
    first.kill()  # The connection is gone, the training goes on.
    first.wait()
    other = worker("worker.sh", *command[:3], "python", "c", status=2, env=at_home(worker))
    assert "Another command is running" in other.stderr
    (worker.path / "home" / "go").touch()
    assert "end" in ssh(worker, command)
    ssh(worker, command)  # gcloud tries again although it has ended: the same status, no new start
    assert starts.read_text() == "start\n"
    ssh(worker, ("run", "two", *command[2:]))  # A new attempt starts it anew.
    assert starts.read_text() == "start\nstart\n"


SAVES = """trap 'echo saved; exit 143' TERM
touch "$HOME/up"; while true; do sleep 0.05; done"""


def test_sigterm_to_everything_is_status_143(worker):
    """What a preemption does to the processes of a VM."""
    worker.python(SAVES)
    run = subprocess.Popen(
        [LAUNCH / "worker.sh", "run", "one", "gs://bucket/run", "python"],
        env=at_home(worker),
        stdout=subprocess.PIPE,
        text=True,
    )
    until((worker.path / "home" / "up").exists)
    os.killpg(int((worker.path / "home" / ".ada_jax" / "pid").read_text()), signal.SIGTERM)
    assert "saved\n" in run.communicate(timeout=20)[0]
    assert run.returncode == 143
    (log,) = (worker.path / "bucket" / "bucket" / "run" / "logs").iterdir()
    assert "saved\n" in log.read_text()


def test_stop_ends_a_run_that_is_not_restarted(worker):
    worker("run_tpu.sh", *VM, "--stop")  # nothing runs
    worker.python(SAVES)
    run = subprocess.Popen(
        [LAUNCH / "run_tpu.sh", *RUN, *TRAIN],
        env=worker.environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until((worker.path / "home" / "up").exists)
    worker("run_tpu.sh", *VM, "--stop")
    out, _ = run.communicate(timeout=20)
    assert run.returncode == 130 and "saved" in out
    assert worker.verbs().count("run") == 1


def test_a_worker_that_is_not_set_up_says_so(worker):
    (worker.path / "home" / "ada_jax_env" / "complete").unlink()
    done = worker("run_tpu.sh", *RUN, *TRAIN, status=2)
    assert "ada is not set up: run launch/setup_tpu.sh" in done.stderr


def test_setup_installs_this_tree(cloud):
    """The whole of it, but for python3, uv and pip, which are played."""
    cloud.write("execute")
    cloud.write("tpu-vm/ada", "READY")
    cloud.program(
        "python3",
        """\
        #!/usr/bin/env bash
        echo "python3 $*" >>"$HOME/installed"
        if [ "$3" = venv ]; then
          mkdir -p "${@: -1}/bin"
          for program in pip python; do
            printf '#!/bin/sh\\necho "%s $*" in "$PWD" >>"$HOME/installed"; test %s = pip\\n' \\
              $program $program >"${@: -1}/bin/$program"
            chmod +x "${@: -1}/bin/$program"
          done
        fi
        """,
    )
    home = cloud.path / "home"
    cloud.write("home/ada_jax/old")  # what an earlier setup left
    cloud("setup_tpu.sh", *VM)
    prepare = "import tensorflow_datasets as tfds; tfds.data_source('cifar10')"  # without success
    assert (home / "installed").read_text().splitlines() == [
        "python3 -m pip install --quiet --user uv",
        f"python3 -m uv venv --quiet --seed --clear --python 3.11 {home}/ada_jax_env",
        f"pip install --quiet -r requirements.txt -e .[tpu] in {home}/ada_jax",
        f"python -c {prepare} in {home}/ada_jax",
    ]
    tree = home / "ada_jax"
    assert (tree / "ada_jax" / "train.py").read_bytes() == (
        ROOT / "ada_jax" / "train.py"
    ).read_bytes()
    assert not [n for n in ("old", ".git", "runs") if (tree / n).exists()]
    assert (home / "ada_jax_env" / "complete").exists()
    assert cloud.calls()[0][:2] == ["tpu-vm", "scp"] and "--worker=all" in cloud.calls()[0]


# Sweeps.

POOL = ("--zone=z", "--type=v3-8", "--retry_seconds=0", "--prefix=p")


def commands(cloud, *workdirs):
    flags = "--workdir=gs://b/{} --config.train_split='train[:9]'"
    lines = [f"python -m ada_jax.train --config=c.py {flags.format(w)}" for w in workdirs]
    cloud.write("commands", "# a sweep", *lines, "")
    return f"--commands={cloud.path / 'commands'}"


def test_a_sweep_uses_all_vms_skips_the_finished_and_deletes_the_vms(cloud):
    cloud.write("bucket/b/two/finished")
    words = (commands(cloud, "one", "two", "three", "four"), *POOL)
    done = cloud("sweep_tpu.py", *words, "--vms=2", "--spot")
    ran = sorted(re.search(r"run \S+ (\S+)", c[-3])[1] for c in cloud.calls() if "run " in c[-3])
    assert ran == ["gs://b/four", "gs://b/one", "gs://b/three"]
    assert "4 of 4 points are finished." in done.stdout
    assert all(
        "'--config.train_split=train[:9]'" in c[-3] for c in cloud.calls() if "run " in c[-3]
    )
    verbs = cloud.verbs()
    assert verbs.count("create") == verbs.count("delete") == verbs.count("install") == 2
    assert list((cloud.path / "tpu-vm").iterdir()) == []
    cloud("sweep_tpu.py", *words, "--vms=2")  # Now all are marked, and no VM is needed.
    assert cloud.verbs()[len(verbs) :] == ["ls"] * 4
    cloud.write("tpu-vm/p-1", "READY")  # A killed sweep left it.
    cloud("sweep_tpu.py", *words, "--vms=2")
    assert list((cloud.path / "tpu-vm").iterdir()) == []


def test_a_sweep_goes_on_after_a_failure_and_names_it(cloud):
    cloud.write("endings", 2, 0)
    words = (commands(cloud, "one", "two"), *POOL, "--vms=1")
    done = cloud("sweep_tpu.py", *words, "--keep_vms", status=1)
    assert "1 of 2 points are finished." in done.stdout
    assert done.stdout.endswith("the same command resumes them:\n  gs://b/one\n")
    assert not (cloud.path / "bucket" / "b" / "one").exists()
    assert (cloud.path / "tpu-vm" / "p-0").exists()


def test_a_sweep_that_is_broken_off_deletes_its_vms(worker):
    worker.python(SAVES)
    worker.write("tpu-vm/p-0", "READY")
    words = (commands(worker, "one", "two"), *POOL, "--vms=1")
    sweep = subprocess.Popen(
        [LAUNCH / "sweep_tpu.py", *words],
        env=worker.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    until((worker.path / "home" / "up").exists)
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate(timeout=20)
    assert sweep.returncode == 1 and "0 of 2 points are finished." in out
    assert worker.verbs() == ["ls", "run", "delete"]


def test_a_sweeps_dry_run_deals_the_points_in_turn(cloud):
    words = (commands(cloud, "one", "two", "three"), *POOL, "--vms=2")
    lines = cloud("sweep_tpu.py", *words, "--dry_run").stdout.splitlines()
    runs = [line for line in lines if "run_tpu.sh" in line]
    assert [line.split()[0] for line in runs] == ["[p-0]", "[p-1]", "[p-0]"]
    assert runs[0].endswith("--workdir=gs://b/one '--config.train_split=train[:9]'")
    assert sum("delete_tpu.sh" in line for line in lines) == 2
    assert cloud.calls(lists=True) == []


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["train --workdir=a"], "Line 1 of the commands needs one --workdir=gs://"),
        (["train"], "Line 1 of the commands needs one --workdir"),
        (["x --workdir=gs://b/a", "y --workdir=gs://b/a"], "Line 2 has the same --workdir"),
        (["x --workdir='gs://b/a"], "Line 1 of the commands has unbalanced quotes"),
    ],
)
def test_mistakes_in_a_sweeps_commands(cloud, lines, sentence):
    done = cloud("sweep_tpu.py", "--commands=-", *POOL, "--vms=1", status=2, input="\n".join(lines))
    assert sentence in done.stderr and done.stderr.count("\n") == 1


# Slurm and Docker.


@pytest.fixture
def slurm(cloud):
    """Runs slurm.sbatch with a stub srun that ends with a status; returns what was called."""
    for name in ("srun", "scontrol"):
        cloud.program(
            name,
            f"""\
            #!{sys.executable}
            import json, os, sys
            devices = os.environ.get("JAX_LOCAL_DEVICE_IDS")
            with open(os.environ["CLOUD"] + "/slurm", "a") as file:
                print(json.dumps([{name!r}, *sys.argv[1:], devices]), file=file)
            with open(os.environ["CLOUD"] + "/cpus", "w") as file:
                file.write(os.environ["SRUN_CPUS_PER_TASK"])
            sys.exit(int(os.environ["STATUS"]) if {name!r} == "srun" else 0)
            """,
        )

    def run(*words, status=0, **variables):
        done = subprocess.run(
            [BASH, LAUNCH / "slurm.sbatch", *words],
            env=cloud.environment | {"STATUS": str(status), "SLURM_JOB_ID": "7"} | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        file = cloud.path / "slurm"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    return run


def test_slurm_runs_the_command(slurm):
    assert slurm(*TRAIN, ODD[1]) == [["srun", *TRAIN, ODD[1], None]]


def test_slurm_gives_the_run_all_cpus_of_its_task(slurm, cloud):
    for given, expected in (({}, "8"), ({"SLURM_CPUS_PER_TASK": "3"}, "3")):
        slurm(*TRAIN, **given)
        assert (cloud.path / "cpus").read_text() == expected


def test_slurm_requeues_what_was_stopped_with_its_state_saved(slurm):
    assert slurm(*TRAIN, status=143)[1:] == [["scontrol", "requeue", "7", None]]


@pytest.mark.parametrize(("status", "count"), [(2, "0"), (1, "0"), (143, "50")])
def test_slurm_requeues_nothing_else(slurm, status, count):
    calls = slurm(*TRAIN, status=status, SLURM_RESTART_COUNT=count)
    assert [call[0] for call in calls] == ["srun"]


def test_slurms_array_runs_a_line_of_the_file(slurm, cloud):
    file = commands(cloud, "one", "two").partition("=")[2]
    (call,) = slurm(file, SLURM_ARRAY_TASK_ID="3")
    assert call[-3:-1] == ["--workdir=gs://b/two", "--config.train_split=train[:9]"]
    slurm(file, SLURM_ARRAY_TASK_ID="9", status=2)


def test_slurm_on_several_nodes_gives_a_process_all_gpus_of_its_node(slurm):
    (call,) = slurm(*TRAIN, SLURM_NNODES="2", SLURM_GPUS_ON_NODE="4")
    assert call[-2:] == ["--distributed", "0,1,2,3"]


def test_slurms_options_stand_before_the_first_command():
    head = (LAUNCH / "slurm.sbatch").read_text().partition("\nset -euo")[0]
    assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@120"} <= set(head.splitlines())
    assert "#SBATCH" not in (LAUNCH / "slurm.sbatch").read_text()[len(head) :]


def test_the_container_is_not_roots_and_trains():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert "USER ada" in lines and lines.index("USER ada") < lines.index("COPY --chown=ada . .")
    assert "RUN pip install --no-cache-dir -r requirements.txt -e '.[cuda]'" in lines
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "ada_jax.train"]'


# One GPU.

STUDY = r"""#!/usr/bin/env bash
[ "$1" != -c ] || exit 1 # there is no PyTorch
printf '%s\x1f' "$@" >>"$CALLS"
printf '\n' >>"$CALLS"
case " $* " in
  *" ada_jax.deepaugment "*) exit "${RENDER:-0}" ;;
  *" ada_jax.sweep "*gpu.py:ada*) exit "${ADA:-0}" ;;
  *" ada_jax.sweep "*) mkdir -p "$OUT/results" && touch "$OUT/results/x.json" ;;
  *" pytest "*) exit "${TESTS:-0}" ;;
  *" ada_jax.report "*) echo "the report" ;;
esac
"""


@pytest.fixture
def study(tmp_path):
    """Runs gpu_study.sh with a stub python; returns what was printed and what was called."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(STUDY)
    python.chmod(0o755)

    def run(*words, status=0, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            [LAUNCH / "gpu_study.sh", "--minutes=9", f"--out={tmp_path / 'out'}", *words],
            env=os.environ
            | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
            | {"CALLS": str(calls)}
            | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout, [line.split("\x1f")[:-1] for line in calls.read_text().splitlines()]

    return run


def test_a_gpu_study_does_all_of_it_once(study):
    printed, calls = study("--", "--config.dataset=npz", "--config.data_dir=/a b.npz")
    assert "the report" in printed
    modules = [call[1] for call in calls]
    assert modules[:2] == ["pytest", "ada_jax.benchmark"] and modules[-1] == "ada_jax.report"
    swept = [call for call in calls if call[1] == "ada_jax.sweep"]
    rows = [call[2].rpartition(":")[2] for call in swept]
    assert rows[:4] == ["nominal", "ada", "augmix", "ada+augmix"] and len(rows) == 6
    assert all("--config.data_dir=/a b.npz" in call for call in swept)
    made = next(call for call in calls if call[1] == "ada_jax.deepaugment")
    assert made[-2:] == ["--config.dataset=npz", "--config.data_dir=/a b.npz"]
    again = [call[1] for call in study()[1]]
    assert "pytest" not in again and "ada_jax.benchmark" not in again


def test_a_gpu_study_of_a_recipe_trains_it_beside_ada_and_augmix(study):
    _, calls = study("--recipe=best", "--", "--config.dataset=npz")
    assert [call[1] for call in calls] == ["ada_jax.sweep", "ada_jax.report"]
    assert calls[0][2] == "--sweep=experiments/sweeps/gpu.py:best,ada+augmix,seeds=3"
    assert calls[0][-2:] == ["--config.eval_sets=('clean','c','cbar')", "--config.dataset=npz"]


def test_a_gpu_study_says_what_failed_and_goes_on(study):
    printed, calls = study(status=1, TESTS="1", ADA="3")
    assert "tests: failed" in printed and "ada: failed" in printed
    assert calls[-1][1] == "ada_jax.report"
    printed, calls = study(status=1, RENDER="1")
    assert "deepaugment+augmix: failed" in printed
    assert len([call for call in calls if call[1] == "ada_jax.sweep"]) == 4


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_a_gpu_study_s_command_save_and_ends_it(tmp_path, study, number, status):
    (tmp_path / "bin" / "python3").write_text(
        "#!/bin/bash\n[ $1 != -c ] || exit 1\n"
        "trap 'echo saved >>$CALLS; exit 143' TERM\necho started >>$CALLS\nsleep 60 &\nwait\n"
    )
    calls = tmp_path / "calls"
    running = subprocess.Popen(
        [LAUNCH / "gpu_study.sh", "--minutes=9", f"--out={tmp_path / 'out'}"],
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)},
        start_new_session=True,
    )
    while not calls.exists():
        time.sleep(0.02)
    # A terminal sends Ctrl-C to the whole group, a scheduler SIGTERM to the script.
    (os.killpg if number == signal.SIGINT else os.kill)(running.pid, number)
    assert running.wait(20) == status
    assert calls.read_text().splitlines() == ["started", "saved"]


def test_a_gpu_study_ends_where_its_time_is_up(study):
    printed, calls = study(status=143, TESTS="124")
    assert "tests: the time is up" in printed
    printed, calls = study(status=143, ADA="143")
    assert "ada: the time is up" in printed
    assert [call[1] for call in calls if call[1] == "ada_jax.sweep"] == ["ada_jax.sweep"] * 2
