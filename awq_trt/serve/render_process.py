"""Renders chat templates; started by chat.py. Of transformers it imports one module, and no torch.

A line of JSON in, a line out, until the input ends:

    in    {"template": text, "tokens": {"bos_token": "<s>", ...}, "messages": [...], "longest": characters,
           "seconds": most}
    out   {"text": text}   or   {"failed": why}

A template that runs for too long ends the process, by a signal that needs no help from Python: a loop can be in C, as
in `10**10**9`, and the parent may be gone. One that needs too much memory gets a MemoryError.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

MEMORY = 256 << 20
"""Bytes of address space beyond those of the process itself."""

PROBE = "Xprobe7"
"""A message that no template writes by itself."""


def rendered(template: str, tokens: str, messages: list[dict[str, Any]]) -> str:
    """A chat up to where the answer begins, as `apply_chat_template` of transformers renders it. tokens: JSON."""
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    found: Any = render_jinja_template([chat], chat_template=template, add_generation_prompt=True, **json.loads(tokens))
    return str(found[0][0])  # of a list of texts, and where the assistant's are


@lru_cache(maxsize=64)
def takes(template: str, tokens: str, role: str, parts: bool) -> bool:
    """Whether a template writes a role's text where its content is a list of parts, or a string: not nothing, not the
    list as Python or JSON print it, no error."""
    one, other = ([{"type": "text", "text": text}] if parts else text for text in (PROBE, "x"))
    message, user = {"role": role, "content": one}, {"role": "user", "content": other}
    try:
        chat = {"user": [message], "system": [message, user]}.get(role, [user, message])
        text = rendered(template, tokens, chat)
    except Exception:
        return False
    return PROBE in text and f"'{PROBE}'" not in text and f'"{PROBE}"' not in text


def in_its_form(message: dict[str, Any], template: str, tokens: str) -> dict[str, Any]:
    """A message with its content as the template takes it: parts joined by line breaks where it takes only strings, a
    string as a part where it takes only parts, which those of vision models do."""
    content, role = message.get("content"), message["role"]
    as_text, as_parts = (takes(template, tokens, role, parts) for parts in (False, True))
    if isinstance(content, list) and not as_parts:
        return message | {"content": "\n".join(part["text"] for part in content)}
    if isinstance(content, str) and as_parts and not as_text:
        return message | {"content": [{"type": "text", "text": content}]}
    return message


def answer(job: dict[str, Any]) -> dict[str, str]:
    """Render one chat."""
    template, tokens = job["template"], json.dumps(job["tokens"])
    try:
        text = rendered(template, tokens, [in_its_form(message, template, tokens) for message in job["messages"]])
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY >> 20} MiB of memory."}
    except Exception as error:  # templates raise whatever they like
        return {"failed": (str(error) or type(error).__name__)[:1000]}
    if len(text) > job["longest"]:
        return {"failed": f"it makes {len(text)} characters of them; {job['longest']} are the most."}
    return {"text": text}


def main() -> None:
    """Serve standard input until it ends."""
    output = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # its default is the end of the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    import transformers.utils.chat_template_utils  # noqa: F401  (takes a second, which no chat should pay for)

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        job = json.loads(line)
        signal.alarm(job["seconds"])
        reply = json.dumps(answer(job))
        signal.alarm(0)
        print(reply, file=output, flush=True)


if __name__ == "__main__":
    main()
