"""User-correctable errors."""

import importlib.util
import signal

# Exit statuses of a command that a signal stopped; the same command resumes it.
INTERRUPTED, CTRL_C = 128 + signal.SIGTERM, 128 + signal.SIGINT
# Modules of setup.py's extra [train], which `pip install .` does not install.
EXTRA = (
    *("clu", "etils", "google", "grain", "matplotlib", "mlxtend", "orbax", "skimage"),
    *("tensorflow", "tensorflow_datasets"),
)


class UserError(ValueError):
    """An invalid config, file or argument.

    The message is one sentence with the field, its value and the fix. The commands print it and
    exit with status 2.
    """


class NotFiniteError(UserError):
    """The loss is not finite. All processes of a run raise it at the same step."""


def missing(what: str, module: str) -> UserError:
    """The error for a module of `EXTRA` that is not installed."""
    return UserError(f"{what} needs the package {module}: pip install 'ada-jax[train]'.")


def require_extra(what: str, *modules: str) -> None:
    """Checks that modules of `EXTRA` are installed, without importing them.

    Args:
      what: the feature that needs them, for the message.
      *modules: such as 'grain' or 'orbax.checkpoint'.

    Raises:
      UserError: a module is missing.
    """
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # Its parent package is missing.
            found = None
        if found is None:
            raise missing(what, module)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of an error without one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def renamed(error: UserError, names: dict[str, str]) -> UserError:
    """The same error with config fields replaced by a command's own flags."""
    text = str(error)
    for field, flag in names.items():
        text = text.replace(field, flag)
    return UserError(text)
