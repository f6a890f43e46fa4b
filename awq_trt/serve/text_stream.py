"""Tokens in, text out, as early as it is certain: no half characters, nothing a stop string may still take back.

A token's text may depend on its neighbours: the first word of a text loses its space, and a character may have its
bytes in several tokens. So not single tokens are decoded but a window of them, which begins before the last text that
was certain. Two kinds of tokenizers split characters:

* Byte-level BPE (GPT-2, Llama 3, Qwen): bytes that are no character yet decode to U+FFFD, at the end of the text.
* Byte fallback (Llama 2, Mistral, Gemma): tokens <0x00> to <0xFF> for what the vocabulary lacks. A *run* of them is
  decoded together, and where it is no UTF-8, every byte of it becomes U+FFFD, whole characters before the bad byte too
  (ByteFallback of the library `tokenizers`). So nothing of a run is certain before it ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoding makes of bytes that are no UTF-8, among them a character whose other bytes are yet to come."""

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token of one byte, where the vocabulary has them."""

CONTEXT = 6
"""Tokens of the prompt, at least, that are decoded with the first new ones."""


class TextStream:
    """The text of one request.

    The pieces that `push` and `finish` return, joined, are what one decoding of prompt and new tokens has after the
    prompt, without special tokens, up to the first stop string. U+FFFD at the end is left out: an incomplete character.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop string was found; nothing follows
        self._tokenizer, self._stop = tokenizer, tuple(dict.fromkeys(stop))
        self._held = ""  # text that may be the beginning of a stop string
        self._window = self._end_of(prompt)  # tokens to decode
        self._known = len(self._window)  # tokens of the window before the last text that was certain
        self._text: str | None = self._decode(self._window)  # of the window without the tokens below, if it was decoded
        self._sent = len(self._text.rstrip(REPLACEMENT))  # characters of the window's text that are certain
        self._again = 0  # length of the window at which it is decoded again

    def push(self, token: int) -> str:
        """The text that has become certain with this token, often ""."""
        self._window.append(token)
        if self._is_byte(token) or len(self._window) < self._again:
            self._text = None
            return ""
        before = self._decode(self._window[:-1]) if self._text is None else self._text
        self._text = text = self._decode(self._window)
        # A window that gives nothing certain grows, and is decoded at a 16th more tokens each time, so that the work
        # stays in proportion to the tokens.
        self._again = len(self._window) + len(self._window) // 16
        if text == before:  # a special token: what comes before it may still change
            return ""
        complete = text.rstrip(REPLACEMENT)
        piece, self._sent = complete[self._sent :], max(self._sent, len(complete))
        if complete == text and piece:
            self._window = self._window[self._known :]
            self._known = len(self._window)
            self._text = self._decode(self._window)
            self._sent, self._again = len(self._text), 0
        return self._release(piece, last=False)

    def finish(self) -> str:
        """The rest: what was held back for a stop string that did not come, or for the end of a run of bytes."""
        if self.stopped:
            return ""
        text = self._decode(self._window) if self._text is None else self._text
        piece, self._window, self._sent = text.rstrip(REPLACEMENT)[self._sent :], [], 0
        return self._release(piece, last=True)

    def _release(self, piece: str, last: bool) -> str:
        """What of the text that is held and a new piece can go out: all before the first stop string, or before what
        may become one.

        Over all pieces each character is held, and tried as the beginning of a stop string, once.
        """
        text = self._held + piece
        found = [text.find(stop, max(0, len(self._held) - len(stop) + 1)) for stop in self._stop]
        if ends := [at for at in found if at >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        longest = 0 if last else max(map(len, self._stop), default=0)
        certain = max(0, len(text) - longest)
        while certain < len(text) and not any(stop.startswith(text[certain:]) for stop in self._stop):
            certain += 1
        self._held = text[certain:]
        return text[:certain]

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, from before the run of bytes it may end with, and with some text."""
        size = CONTEXT
        while size < len(prompt):
            if self._is_byte(prompt[-size]) or not self._decode([prompt[-size]]):  # special tokens end no run
                size += 1
            elif not self._decode(prompt[-size:]).rstrip(REPLACEMENT):
                size *= 2
            else:
                break
        return list(prompt[-size:])

    def _is_byte(self, token: int) -> bool:
        return BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
