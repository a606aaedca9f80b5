"""The exceptions that mean: the user can mend this."""


class UserError(ValueError):
    """A mistake in a config, a file or an argument, told in one full sentence.

    The binaries print the sentence and leave with exit status 2; libraries let it through.
    The sentence names the field, its value and the fix.
    """


class NotFiniteError(UserError):
    """Training diverged; every process of a run finds it at the same step."""


def renamed(error: UserError, names: dict[str, str]) -> UserError:
    """The same sentence with a binary's own flags for the fields of a training run."""
    text = str(error)
    for field, flag in names.items():
        text = text.replace(field, flag)
    return UserError(text)
