"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in a config, a file or an argument, told in one full sentence.

    The binaries print the sentence and leave with exit status 2; libraries let it through.
    The sentence names the field, its value and the fix.
    """
