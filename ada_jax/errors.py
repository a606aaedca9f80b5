"""The exceptions that mean: the user can mend this."""

import importlib.util
import signal

# Exit statuses where a signal stopped a command, which the same command goes on with.
INTERRUPTED, CTRL_C = 128 + signal.SIGTERM, 128 + signal.SIGINT
# The modules of setup.py's extra [train], which a light installation lacks.
EXTRA = (
    *("clu", "etils", "google", "grain", "matplotlib", "mlxtend", "orbax", "skimage"),
    *("tensorflow", "tensorflow_datasets"),
)


class UserError(ValueError):
    """A mistake in a config, a file or an argument, told in one full sentence.

    The binaries print the sentence and leave with exit status 2; libraries let it through.
    The sentence names the field, its value and the fix.
    """


class NotFiniteError(UserError):
    """Training diverged; every process of a run finds it at the same step."""


def missing(what: str, module: str) -> UserError:
    """What to say where something needs a module of `EXTRA` that is not installed."""
    return UserError(f"{what} needs the package {module}: pip install 'ada-jax[train]'.")


def require_extra(what: str, *modules: str) -> None:
    """Checks that modules of `EXTRA` are installed, without importing them.

    Args:
      what: needs them, in the message.
      *modules: as 'grain' or 'orbax.checkpoint'.

    Raises:
      UserError: one is missing.
    """
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # The package that it is in.
            found = None
        if found is None:
            raise missing(what, module)


def renamed(error: UserError, names: dict[str, str]) -> UserError:
    """The same sentence with a binary's own flags for the fields of a training run."""
    text = str(error)
    for field, flag in names.items():
        text = text.replace(field, flag)
    return UserError(text)
