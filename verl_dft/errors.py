"""The one exception that means "the user can fix this"."""


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do.

    The command line prints it as ``error: <message>`` and exits with code 2.
    """
