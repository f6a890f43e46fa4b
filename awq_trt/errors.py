"""The one exception type a user of this package is meant to read."""

from __future__ import annotations


class AwqTrtError(Exception):
    """Something the user can act on: what happened, where (file, tensor, layer), what to do.

    The command-line tools print the message without a stack trace and exit with code 2.
    """

    def __str__(self) -> str:
        """The message, of at most 4000 characters: the middle is left out, where a long value of a file may stand."""
        text = super().__str__()
        return text if len(text) <= 4000 else f"{text[:3000]} ... {text[-995:]}"


def brief(error: BaseException) -> str:
    """What another library's exception says, as one line of at most 300 characters: its kind, then its own words."""
    words = " ".join(str(error)[:2000].split())
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


class OtherRankError(Exception):
    """Another process of the same run (torchrun) failed and says why; this one only ends."""


class TerminatedError(SystemExit):
    """SIGTERM or SIGHUP came. Like Ctrl-C, but nothing that Ctrl-C stops, as an answer of a chat, goes on after it."""

    def __init__(self, status: int, text: str = "") -> None:
        """`status` is 128 and the number of the signal, `text` what is left."""
        super().__init__(status)
        self.status, self.text = status, text
