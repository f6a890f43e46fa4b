"""The one exception type a user of this package is meant to read."""

from __future__ import annotations


class AwqTrtError(Exception):
    """Something the user can act on: what happened, where (file, tensor, layer), what to do.

    The command-line tools print the message without a stack trace and exit with code 2.
    """


class OtherRankError(Exception):
    """Another process of the same run (torchrun) failed and says why; this one only ends."""
