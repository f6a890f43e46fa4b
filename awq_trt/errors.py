"""The one exception type a user of this package is meant to read."""

from __future__ import annotations


class AwqTrtError(Exception):
    """Something the user can act on: what happened, where (file, tensor, layer), what to do.

    The command-line tools print the message without a stack trace and exit with code 2.
    """


class OtherRankError(Exception):
    """Another process of the same run (torchrun) failed and says why; this one only ends."""


class TerminatedError(SystemExit):
    """SIGTERM or SIGHUP came. Like Ctrl-C, but nothing that Ctrl-C stops, as an answer of a chat, goes on after it."""

    def __init__(self, status: int, text: str = "") -> None:
        """`status` is 128 and the number of the signal, `text` what is left."""
        super().__init__(status)
        self.status, self.text = status, text
