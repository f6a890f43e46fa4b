"""Chats: what messages may be, and the text that a tokenizer's chat template makes of them.

A template is a program out of a checkpoint, and messages come from anyone: loops in loops, `10**10**9` and strings that
double would hold up whatever runs in the same process, which cannot interrupt them. So a process of its own renders
them (render_process.py), with a limit of time and memory. It starts with the first chat, serves all that follow, and
is replaced when a limit has ended it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from awq_trt.errors import AwqTrtError
from awq_trt.files import PACKAGE

MOST_MESSAGES, DEEPEST = 1024, 32
"""Messages of a chat, and how deep lists and objects may be nested in them (tools' schemas are about 10)."""

BYTES_PER_TOKEN = 64
"""A text of more characters than that for each token a prompt may have is refused without being tokenized."""

MOST_CHARACTERS = 1 << 24
"""Of a prompt where nothing is known about the model's cache."""

SECONDS = 5
"""To render a chat. Real templates take milliseconds."""

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)

_idle: list[subprocess.Popen[str]] = []
"""Processes that render, none of them at work: a thread takes one, or starts one, and puts it back."""


def check_size(characters: int, most_tokens: int | None) -> None:
    """Refuse a prompt that is far too long without tokenizing it.

    Raises:
        AwqTrtError: more characters than `most_tokens` tokens can be.
    """
    if characters > (MOST_CHARACTERS if most_tokens is None else BYTES_PER_TOKEN * most_tokens):
        limit = f"{MOST_CHARACTERS} characters" if most_tokens is None else f"{most_tokens} tokens"
        raise AwqTrtError(f"the prompt has {characters} characters; this model takes at most {limit}. Shorten it.")


def read_messages(text: str) -> list[dict[str, Any]]:
    """The messages of a chat from JSON.

    Raises:
        AwqTrtError: not JSON, nested too deep, or not what `check_messages` takes.
    """
    check_depth(text)
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AwqTrtError(f"messages is not JSON: {error}.") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise AwqTrtError('messages must be a JSON list of {"role": ..., "content": ...}.')
    check_messages(messages)
    return messages


def check_depth(text: str) -> None:
    """Refuse JSON that is nested deeper than `DEEPEST`: its readers and writers call themselves at every level."""
    level = 0
    for bracket in re.finditer(r"[\[\]{}]", _STRING.sub("", text)):
        level += 1 if bracket.group() in "[{" else -1
        if level > DEEPEST:
            raise AwqTrtError(f"messages are nested deeper than {DEEPEST} levels.")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what is no chat of texts.

    Raises:
        AwqTrtError: no messages or too many, no role, a content that is neither text nor a list of parts of text.
    """
    if not 1 <= len(messages) <= MOST_MESSAGES:
        raise AwqTrtError(f"{len(messages)} messages; a chat has 1 to {MOST_MESSAGES} of them.")
    for number, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(message.get("role"), str):
            raise AwqTrtError(f'messages[{number}] has no role; it must be {{"role": ..., "content": ...}}.')
        if not (content is None or isinstance(content, (str, list, tuple))):
            kind = type(content).__name__
            raise AwqTrtError(f"the content of messages[{number}] must be text or a list of parts; it is a {kind}.")
        for part in content if isinstance(content, (list, tuple)) else ():
            kind = str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise AwqTrtError(
                    f"messages[{number}] has a part of type {kind[:50]!r}; this model reads text only: "
                    '{"type": "text", "text": ...}.'
                )


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], most_tokens: int | None = None) -> str:
    """The text of a chat, up to where the answer begins, by the tokenizer's chat template.

    Args:
        most_tokens: of a prompt; a longer text is refused.

    Raises:
        AwqTrtError: see `check_messages`; there is no template, it does not take these messages, needs too much time or
            memory, or makes too long a text.
    """
    check_messages(messages)
    if not tokenizer.chat_template:
        raise AwqTrtError("the tokenizer has no chat template, which would say how a chat is written. Give text.")
    try:
        plain = json.dumps([dict(message) for message in messages])
        template, tokens = tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)
    except (TypeError, ValueError, RecursionError) as error:
        raise AwqTrtError(f"the chat cannot be rendered: {error}") from error
    check_depth(plain)
    check_size(len(plain), most_tokens)
    longest = MOST_CHARACTERS if most_tokens is None else BYTES_PER_TOKEN * most_tokens
    job = {"template": template, "tokens": tokens, "messages": json.loads(plain), "longest": longest}
    reply = _ask(json.dumps(job | {"seconds": SECONDS}))
    if "failed" in reply:
        raise AwqTrtError(f"the chat template does not take these messages: {reply['failed']}")
    return str(reply["text"])


def _ask(job: str) -> dict[str, str]:
    """Have a process render one chat."""
    process, line = _running() or _start(), ""
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        print(job, file=process.stdin, flush=True)
        line = process.stdout.readline()
    except BrokenPipeError:  # it has ended
        pass
    finally:
        if line.endswith("\n"):
            _idle.append(process)
        else:  # also after Ctrl-C: an answer to nobody may still come
            status = _end(process)
    if line.endswith("\n"):
        return dict(json.loads(line))
    if status == -signal.SIGALRM:
        return {"failed": f"it takes longer than {SECONDS} seconds."}
    return {"failed": f"the process that renders it ended with status {status}; see its output."}


def _running() -> subprocess.Popen[str] | None:
    """A process that has nothing to do, if there is one."""
    with contextlib.suppress(IndexError):
        while (process := _idle.pop()).poll() is not None:
            pass
        return process
    return None


def _start() -> subprocess.Popen[str]:
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "awq_trt.serve.render_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C stops an answer, and not this
        text=True,
        encoding="utf-8",
    )


def _end(process: subprocess.Popen[str]) -> int:
    """End a process; its exit status, by itself if it had ended."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)
    process.kill()
    return process.wait()


@atexit.register
def _end_all() -> None:
    while _idle:
        _end(_idle.pop())


os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's
