"""What every binary shares: flags, one-sentence errors with exit status 2, devices, caches."""

import ctypes
import itertools
import logging as python_logging
import os
import pathlib
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
    """Runs a binary that takes --config and --workdir.

    Args:
      main: called with the locked config and the workdir; returns an exit status or None. A
        `UserError` it raises is printed as one sentence and the process leaves with status 2.
      several: whether it can be one of several processes, and takes the flags of `distributed`.
    """
    config_flag = config_flags.DEFINE_config_file(
        "config",
        None,
        "File with get_config(), as experiments/cifar10.py or FILE:WORDS. Where there is no folder "
        "experiments, its files are those that the package brings.",
    )
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run, may be gs://...; by default runs/NAME of the config, with another seed "
        "than 0 runs/NAME-seedN.",
    )
    flags.mark_flag_as_required("config")
    if several:
        from ada_jax.run import distributed

        distributed.define_flags()
    for module in (
        __name__,
        "ada_jax.run.distributed",
    ):  # For --help, which tells the main module's alone.
        for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def with_flags(argv: list[str]) -> int | None:
        if len(argv) > 1:
            raise UserError(f"The argument {argv[1]!r} is not a flag: write --flag=value.")
        config = config_flag.value
        folder = workdir.value or default_folder(config)
        paths.check_bucket(f"--workdir={folder}", folder)
        if several:
            distributed.connect(_complain)
        return main(config, folder)

    start(with_flags, computes=True)


def default_folder(config: ml_collections.ConfigDict) -> str:
    """The folder of what a config describes: runs/NAME, and runs/NAME-seedN for N other than 0.

    Raises:
      UserError: config.name cannot name a folder.
    """
    name = config.name
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(
            f"config.name={name!r} cannot name a folder in runs/: take one word, as 'cifar10_ada'."
        )
    return os.path.join("runs", name if config.seed == 0 else f"{name}-seed{config.seed}")


def start(main: Callable[[list[str]], int | None], *, computes: bool = False) -> None:
    """Parses the flags and runs main(argv); mistakes of the user end with status 2.

    Args:
      main: called with the arguments that are no flags; returns an exit status or None.
      computes: whether the binary computes for long, and so is worth huge pages.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # Of ASCII, say.
        stream.reconfigure(errors="backslashreplace")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_ours_or_warning)
    logging.get_absl_handler().setFormatter(_Sentences())
    sys.unraisablehook = _print_ignored

    def guarded(argv: list[str]) -> None:
        if computes:
            _take_huge_pages()
        try:
            status = main(argv)
        except UserError as error:
            status = _complain(error)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in errors.EXTRA:
                raise
            status = _complain(errors.missing("This command", error.name))
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 1
        except OSError as error:
            status = _complain(_cannot(error))
        except RuntimeError as error:  # JaxRuntimeError, in a process that may have no JAX.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            status = _complain(
                f"The device has too little memory ({str(error).splitlines()[0][:200]}): see that "
                "nothing else uses it; make config.ada.microbatch or config.batch_size smaller."
            )
        except KeyboardInterrupt:
            print("Ctrl-C: the same command goes on.", file=sys.stderr, flush=True)
            status = CTRL_C
        except (AttributeError, KeyError) as error:
            raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
            if "ml_collections" not in raised_in:
                raise
            fix = "The file of --config may be another binary's: --help names one of this."
            status = _complain(f"{unknown_field(error)} {fix}")
        sys.exit(status)

    app.run(guarded, flags_parser=_parse_flags)


def _cannot(error: OSError) -> str:
    named = isinstance(error.filename, str | bytes)  # Not a descriptor.
    name = os.fsdecode(error.filename) if named else "A file"
    return (
        f"{name} cannot be read or written ({error.strerror or error}): see that it is there, that "
        "you may use it, and that its disk has space."
    )


def _is_ours_or_warning(record: python_logging.LogRecord) -> bool:
    """Leaves out what libraries tell about themselves: orbax alone logs forty lines a save."""
    if "orbax" in record.pathname:  # Its errors, hundreds of lines each, are raised as well.
        return record.levelno == python_logging.WARNING
    if record.name == "asyncio":  # Saving's errors that nobody has asked for; one is raised.
        return False
    libraries = ("grain", "jax/_src")
    return record.levelno >= python_logging.WARNING or not any(
        n in record.pathname for n in libraries
    )


class _Sentences(python_logging.Formatter):
    """Messages as they are; warnings and errors say that they are."""

    def format(self, record: python_logging.LogRecord) -> str:
        text = super().format(record)
        serious = record.levelno >= python_logging.WARNING
        return f"{record.levelname.lower()}: {text}" if serious else text


def _print_ignored(ignored: Any) -> None:
    """Python's own, without what tensorstore's threads add to an error that saving raises.

    Ctrl-C in a callback of the garbage collector, of which JAX has one, would be ignored, too: it
    is raised again where the program goes on.
    """
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    elif str(ignored.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(ignored)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        _check_text(argv)
        argv = found_configs(list(map(_at_home, argv)))
        for path in _config_files(argv):
            if not path.is_file():
                raise UserError(
                    f"--config={path} is not a file: name one, as experiments/cifar10.py."
                )
        return flags.FLAGS(argv)
    except SystemExit as leaving:  # absl leaves with 1 after --help, too
        helped = any(re.fullmatch(r"--?(h|help\w*)", a) for a in argv)
        sys.exit(0 if helped else leaving.code)
    except (KeyError, AttributeError) as error:
        sys.exit(_complain(unknown_field(error)))
    except (flags.Error, UserError, ValueError, TypeError, OSError) as error:
        sys.exit(_complain(error))
    except (SyntaxError, ImportError, NameError) as error:
        said = f"{type(error).__name__}: {error}"
        sys.exit(_complain(f"The file of --config cannot be run ({said}): mend it."))


def _check_text(argv: list[str]) -> None:
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"The argument {os.fsencode(argument)!r} is not UTF-8, as names of folders have to "
                "be: rename the folder, or set LC_ALL=C.UTF-8 where it is."
            ) from error


def _at_home(argument: str) -> str:
    """An argument ~/folder or --flag=~/folder with the home folder's name."""
    flag, path = re.fullmatch(r"(--?[^=]*=)?(.*)", argument, re.DOTALL).groups("")
    return flag + os.path.expanduser(path)


def unknown_field(error: Exception) -> str:
    """ml_collections' answer to a field that the config does not have, in words."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    if not isinstance(error, KeyError):
        text = str(error)
        lacks = "The file of --config has no get_config(), which returns a config: name another."
        return lacks if "'get_config'" in text else text
    field, *hint = str(error.args[0]).splitlines()
    field = field.strip("'\"")
    return " ".join([f"The config has no field {field!r}.", *hint])


def found_configs(argv: list[str]) -> list[str]:
    """The same arguments, with each --config where `paths.experiment` finds it."""
    found = []
    for before, argument in itertools.pairwise(["", *argv]):
        flag, equals, value = argument.partition("=")
        if re.fullmatch("--?config", flag) and equals:
            argument = f"{flag}={paths.experiment(value)}"
        elif before in ("--config", "-config"):
            argument = paths.experiment(argument)
        found.append(argument)
    return found


def _config_files(argv: list[str]) -> list[pathlib.Path]:
    """The file of every --config=FILE:WORDS or --config FILE:WORDS on the command line."""
    values = [a.partition("=")[2] for a in argv if re.match("--?config=", a)]
    values += [b for a, b in itertools.pairwise(argv) if a in ("--config", "-config")]
    return [pathlib.Path(value.partition(":")[0]) for value in values]


def _complain(error: BaseException | str) -> int:
    # A config file's own error comes wrapped in the text of a traceback: its last line counts.
    text = re.split(r"^\w+(?:Error|Exception): ", str(error), flags=re.MULTILINE)[-1]
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return 2


def make_folder(flag: str, path: str) -> None:
    """Makes a folder that a flag names, with those above it.

    Raises:
      UserError: it cannot be made, or is in a bucket that cannot be used.
    """
    paths.check_bucket(f"--{flag}={path}", path)
    try:
        paths.make_folder(path)
    except OSError as error:
        raise UserError(
            f"--{flag}={path} cannot be made a folder ({error.strerror}): name another."
        ) from error


def set_up_devices(cpu_devices: int, compilation_cache: str) -> None:
    """Prepares the back end; call it before anything touches a device.

    Args:
      cpu_devices: devices that a CPU is split into; 0 leaves it one. No effect on TPU and GPU.
      compilation_cache: folder of compiled programs, '' for none; '~' is the home folder.

    Raises:
      UserError: JAX does not find the machine's GPU, and cpu_devices is 0.
    """
    import jax

    from ada_jax.run import devices

    jax.config.update("jax_enable_x64", False)  # JAX_ENABLE_X64=1 would only make optimisers slow.
    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    _keep_freed_memory()
    try:
        devices.check_gpu()
    except UserError as error:
        if not cpu_devices:
            raise
        logging.warning("%s", error)  # A config for CPUs.


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of giving it back to the kernel.

    XLA on a CPU allocates its temporary buffers anew for every call; above 32 MB glibc maps fresh
    pages each time, and touching them first costs more than computing on them.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, (1 << 31) - 1)


def _take_huge_pages() -> None:
    """Starts the binary anew with glibc's memory in huge pages, where Linux gives them if asked.

    XLA on a CPU maps its larger temporary buffers anew in every call, and each page of them is a
    fault when it is touched: pages of 2 MB instead of 4 KB take a fifth off the small preset's AdA
    step. glibc reads the setting at its own start only.
    """
    setting, given = "glibc.malloc.hugetlb", os.environ.get("GLIBC_TUNABLES", "")
    pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    module = getattr(sys.modules["__main__"], "__spec__", None)
    ours = module is not None and module.name.startswith("ada_jax.")  # not a user's own program
    if setting in given or not ours or not pages.exists() or "[madvise]" not in pages.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = f"{given}:{setting}=1".lstrip(":")
    start_anew()


def start_anew() -> None:
    """Replaces this process by the same command, for what only counts from a process's start."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
