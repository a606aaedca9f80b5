"""What the commands share: flags, one-line errors with exit status 2, devices, caches."""

import ctypes
import itertools
import logging as python_logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from ada_jax import errors, paths
from ada_jax.errors import CTRL_C, UserError


def run(
    main: Callable[[ml_collections.ConfigDict, str], int | None], *, several: bool = False
) -> None:
    """Runs a command that takes --config and --workdir.

    Args:
      main: called with the locked config and the workdir; returns an exit status or None. A
        `UserError` is printed on one line, with exit status 2.
      several: whether it can run as several processes, and takes the flags of `distributed`.
    """
    config_flag = config_flags.DEFINE_config_file(
        "config",
        None,
        "FILE or FILE:WORDS, a file with get_config(), such as experiments/cifar10.py:ada. Outside "
        "a clone, experiments/ means the files in the package.",
    )
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run, may be gs://...; by default runs/NAME, or runs/NAME-seedN for a seed N "
        "other than 0, with NAME from the config.",
    )
    flags.register_validator(
        "config",
        lambda c: c is not None,
        "give a config file, such as --config=experiments/quickstart.py.",
    )
    if several:
        from ada_jax.run import distributed

        distributed.define_flags()
    # --help shows the flags of the main module alone.
    for module in (__name__, "ada_jax.run.distributed"):
        for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def with_flags(argv: list[str]) -> int | None:
        del argv
        config = config_flag.value
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(
                f"get_config of --config returns a {type(config).__name__}: return an "
                "ml_collections.ConfigDict."
            )
        folder = workdir.value or default_folder(config.name, config.seed)
        paths.check_bucket(f"--workdir={folder}", folder)
        if several:
            distributed.connect(print_error)
        return main(config, folder)

    start(with_flags)


def default_folder(name: str, seed: int) -> str:
    """runs/NAME, or runs/NAME-seedN for a seed N other than 0.

    Raises:
      UserError: config.name cannot be the name of a folder.
    """
    paths.check_name("config.name", name)
    return os.path.join("runs", name if seed == 0 else f"{name}-seed{seed}")


def start(main: Callable[[list[str]], int | None], *, arguments: bool = False) -> None:
    """Parses the flags and runs main(argv); a user's mistake exits with status 2 and one line.

    Args:
      main: called with the program's name and the arguments that are not flags; returns an exit
        status or None.
      arguments: whether the command takes such arguments.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # An ASCII terminal, for example.
        stream.reconfigure(errors="backslashreplace")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_relevant)
    logging.get_absl_handler().setFormatter(_Formatter())
    sys.unraisablehook = _print_ignored

    def run_main(argv: list[str]) -> None:
        try:
            if len(argv) > 1 and not arguments:
                raise UserError(f"The argument {argv[1]!r} is not a flag: write --flag=value.")
            status = main(argv)
        except BrokenPipeError:  # `| head` has read enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 1
        except KeyboardInterrupt:
            print("Ctrl-C: run the same command again to continue.", file=sys.stderr, flush=True)
            status = CTRL_C
        except Exception as error:
            message = _explain(error)
            if not message:
                raise
            status = print_error(message)
        sys.exit(status)

    app.run(run_main, flags_parser=_parse_flags)


def _explain(error: Exception) -> str:
    """The message for an error that the user can correct; '' for a bug."""
    text = str(error)
    match error:
        case UserError():
            return text
        case ModuleNotFoundError() if str(error.name).partition(".")[0] in errors.EXTRA:
            return str(errors.missing("This command", error.name))
        case OSError():
            named = isinstance(error.filename, str | bytes)  # Not a descriptor.
            name = os.fsdecode(error.filename) if named else "A file"
            return (
                f"{name} cannot be read or written ({error.strerror or error}): check that it "
                "exists, that you have access, and that its disk has space."
            )
        case RuntimeError() if "RESOURCE_EXHAUSTED" in text:  # JAX's, where there may be no JAX.
            return (
                f"The device has too little memory ({text.splitlines()[0][:200]}): check that "
                "nothing else uses it; decrease config.ada.microbatch or config.batch_size, or "
                "--batch_size."
            )
        case AttributeError() | KeyError():
            raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
            if "ml_collections" in raised_in:
                fix = "The file of --config may be for another command: see --help."
                return f"{unknown_field(error)} {fix}"
    return ""


def _is_relevant(record: python_logging.LogRecord) -> bool:
    """Filters messages of libraries: orbax alone logs forty lines per save."""
    if "orbax" in record.pathname:  # Its errors, hundreds of lines each, are raised too.
        return record.levelno == python_logging.WARNING
    if record.name == "asyncio":  # Repeats an error of saving that is raised.
        return False
    libraries = ("grain", "jax/_src", "matplotlib")
    return record.levelno >= python_logging.WARNING or not any(
        n in record.pathname for n in libraries
    )


class _Formatter(python_logging.Formatter):
    """Plain messages; warnings and errors start with their level."""

    def format(self, record: python_logging.LogRecord) -> str:
        text = super().format(record)
        serious = record.levelno >= python_logging.WARNING
        return f"{record.levelname.lower()}: {text}" if serious else text


def _print_ignored(ignored: Any) -> None:
    """Python's own hook, except for what tensorstore's threads add to a failed save.

    Python ignores Ctrl-C in callbacks of the garbage collector, of which JAX has one. It is raised
    again where the program goes on.
    """
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    elif str(ignored.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(ignored)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        _check_text(argv)
        return flags.FLAGS(found_configs(list(map(expand_home, argv))))
    except SystemExit as leaving:  # absl exits with 1 after --help, too.
        helped = any(re.fullmatch(r"--?(h|help\w*)", a) for a in argv)
        sys.exit(0 if helped else leaving.code)
    except (KeyError, AttributeError) as error:
        sys.exit(print_error(unknown_field(error)))
    except (flags.Error, UserError, ValueError, TypeError, OSError) as error:
        sys.exit(print_error(str(error)))
    except (SyntaxError, ImportError, NameError) as error:
        sys.exit(
            print_error(
                f"The file of --config cannot be run ({type(error).__name__}: {error}): correct it."
            )
        )


def _check_text(argv: list[str]) -> None:
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"The argument {os.fsencode(argument)!r} is not UTF-8, as names of folders must "
                "be: rename the folder, or set LC_ALL=C.UTF-8."
            ) from error


def expand_home(argument: str) -> str:
    """Expands '~' in ~/folder or --flag=~/folder."""
    flag, path = re.fullmatch(r"(--?[^=]*=)?(.*)", argument, re.DOTALL).groups("")
    return flag + os.path.expanduser(path)


def unknown_field(error: Exception) -> str:
    """The message for ml_collections' error about a field that the config does not have."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    if not isinstance(error, KeyError):
        text = str(error)
        lacks = "The file of --config has no get_config(), which returns a config: use another."
        return lacks if "'get_config'" in text else text
    field, *hint = str(error.args[0]).splitlines()
    field = field.strip("'\"")
    return " ".join([f"The config has no field {field!r}.", *hint])


def found_configs(argv: list[str]) -> list[str]:
    """The arguments with each --config=FILE:WORDS replaced by where `paths.experiment` finds it.

    Raises:
      UserError: there is no such file.
    """

    def found(value: str) -> str:
        name = paths.experiment(value)
        if not os.path.isfile(file := name.partition(":")[0]):
            raise UserError(
                f"--config={file} does not exist: give a file, such as experiments/cifar10.py."
            )
        return name

    arguments = []
    for before, argument in itertools.pairwise(["", *argv]):
        flag, equals, value = argument.partition("=")
        if re.fullmatch("--?config", flag) and equals:
            argument = f"{flag}={found(value)}"
        elif before in ("--config", "-config"):
            argument = found(argument)
        arguments.append(argument)
    return arguments


def print_error(text: str) -> int:
    """Prints a message on one line; returns exit status 2."""
    # An error of a config file comes wrapped in a traceback, of which the last line counts.
    text = re.split(r"^\w+(?:Error|Exception): ", text, flags=re.MULTILINE)[-1]
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return 2


def make_folder(flag: str, path: str) -> None:
    """Creates the folder of a flag, with its parents.

    Raises:
      UserError: it cannot be created, or is in a bucket that cannot be used.
    """
    paths.check_bucket(f"--{flag}={path}", path)
    try:
        paths.make_folder(path)
    except OSError as error:
        raise UserError(
            f"--{flag}={path} cannot be created ({error.strerror}): use another folder."
        ) from error


def set_up_devices(cpu_devices: int, compilation_cache: str) -> None:
    """Configures JAX; call it before anything uses a device.

    Args:
      cpu_devices: number of devices that a CPU is split into; 0 is one. Has no effect on TPU and
        GPU.
      compilation_cache: folder of compiled programs, '' for none. The environment variable
        JAX_COMPILATION_CACHE_DIR takes precedence.

    Raises:
      UserError: the platform of JAX_PLATFORMS does not start, or JAX does not find the machine's
        GPU and cpu_devices is 0.
    """
    import jax

    from ada_jax.run import devices

    jax.config.update("jax_enable_x64", False)  # x64 would slow down the optimiser.
    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if compilation_cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
    _keep_freed_memory()
    devices.check_platform()
    try:
        devices.check_gpu()
    except UserError as error:
        if not cpu_devices:
            raise
        logging.warning("%s", error)  # The config is for CPUs.


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory instead of returning it to the kernel.

    XLA on CPUs allocates its temporary buffers in every call. Above 32 MB glibc maps new pages each
    time, whose first access costs more than the computation.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # Another C library.
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    # Old versions allow at most 32 MiB. Without this first one the second would make it worse.
    if mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25):
        mallopt(m_trim_threshold, (1 << 31) - 1)
