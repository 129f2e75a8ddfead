"""What is told in one line: what the user can fix, and machines that failed."""

_LONGEST, _KEPT = 2000, (1500, 400)


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do.

    The command line prints it as ``error: <message>`` and exits with code 2. What a message quotes of the input may
    hold anything: line ends become spaces, other characters that are not printable are escaped, and of a very long line
    the middle is left out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_one_line(str(message)))


class MachineFailed(RuntimeError):
    """Processes that a command needs have died, not by its input; told in one line, with exit code 1."""


def _one_line(text: str) -> str:
    if len(text) > _LONGEST:
        text = f"{text[: _KEPT[0]]} … {text[-_KEPT[1] :]}"
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isspace():
        return " "
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
