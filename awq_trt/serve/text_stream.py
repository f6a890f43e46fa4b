"""Tokens in, text out, as early as it is certain: no half characters, nothing a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoding makes of bytes that are no UTF-8, among them a character whose other bytes are yet to come."""

CONTEXT = 6
"""Tokens of the prompt that are decoded with the first new ones: a token's text may depend on those before it
(SentencePiece leaves out the space at the beginning of a text)."""

PATIENCE = 16
"""Tokens to wait for the rest of a character; no character has more bytes than 4."""


class TextStream:
    """The text of one request.

    The pieces that `push` and `finish` return, joined, are the whole text: what follows the prompt, without special
    tokens, up to the first stop string. A character that is still incomplete at the end is left out.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop string was found; nothing follows
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._held = ""  # text that may be the beginning of a stop string
        self._window = list(prompt[-CONTEXT:])  # tokens to decode
        self._known = len(self._window)  # tokens of the window whose text is complete
        self._sent = len(self._decode(self._window).rstrip(REPLACEMENT))  # characters of the window

    def push(self, token: int) -> str:
        """The text that has become certain with this token, often ""."""
        self._window.append(token)
        text = self._decode(self._window)
        patient = len(self._window) - self._known <= PATIENCE
        complete = text.rstrip(REPLACEMENT) if patient else text
        piece, self._sent = complete[self._sent :], max(self._sent, len(complete))
        if complete == text and piece:
            self._window = self._window[self._known :]
            self._known = len(self._window)
            self._sent = len(self._decode(self._window))
        return self._release(piece, last=False)

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        return "" if self.stopped else self._release("", last=True)

    def _release(self, piece: str, last: bool) -> str:
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        certain = len(text) - (0 if last else max(lengths, default=0))
        self._held = text[certain:]
        return text[:certain]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
