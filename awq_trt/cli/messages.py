"""What the library says, in the options of the command line."""

from __future__ import annotations

import argparse
import re

OTHER_NAMES = r"(?:group_size|lm_head|pre_scale)\b"
"""Keywords that also name tensors or fields of nodes: options in a message only with their value, or in backticks."""


def with_flags(text: str, options: argparse.ArgumentParser) -> str:
    """A library's message with its keyword arguments as the options of this command.

    The library writes `calibration_length`, kv_cache="fixed", pre_scale=False; the command line has
    --calibration-length, --kv-cache fixed, --no-pre-scale. A keyword of one word counts as one only with its value or
    in backticks.
    """
    flags = {action.dest: action for action in options._actions if action.option_strings}

    def flag(match: re.Match[str]) -> str:
        action = flags.get(match["name"])
        if action is None:
            return match[0]
        value = (match["value"] or "").strip("\"'")
        names = action.option_strings
        if action.nargs == 0 and value in ("True", "False"):
            sets = action.const  # True or False for a switch; None for --x and --no-x in one
            if sets is None:
                names = [name for name in names if name.startswith("--no-") == (value == "False")]
            return names[0] if str(sets) in (value, "None") else match[0]
        return f"{names[0]} {value}".rstrip()

    with_value = r"(?P<name>[a-z][a-z_]*)=(?P<value>\"[^\"]*\"|'[^']*'|[\w./-]*\w)"
    text = re.sub(rf"`?(?<![\w.-]){with_value}`?", flag, text)
    text = re.sub(r"`(?P<name>[a-z_]+)(?P<value>)`", flag, text)
    return re.sub(rf"(?<![\w./=-])(?!{OTHER_NAMES})(?P<name>[a-z]+_[a-z_]+)(?P<value>)(?![\w/=(]|\.\w)", flag, text)
