"""The process that holds the engine of a Triton model: requests in, news of them out, each a line of JSON.

supervisor.py starts it: `python -m awq_trt.serve.triton.engine_process FOLDER SETTINGS`. A process of its own, because
the decode loop should not wait for Triton (a response takes longer to send than a small model takes for a token), and
because whatever kills an engine, a CUDA error or the kernel for want of memory, then leaves Triton's process alive.

    in    {"add": 7, "prompt": "text" or [messages], "sampling": {"max_tokens": 64, ...}}      {"cancel": 7}
    out   {"ready": {"rows": 8, "capacity": 2048, "cache_bytes": ...}}      {"failed": "why it could not start"}
          {"news": [{"id": 7, "prompt_tokens": 12}, {"id": 7, "text": " in", "tokens": 1, "finish": null}],
           "active": 1, "waiting": 0}

An item of the news with "refused" says why a request was not taken, one with "error" why it ended. The process ends
when its input does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from awq_trt.errors import AwqTrtError
from awq_trt.serve.sampling import Sampling

if TYPE_CHECKING:  # imported late, so that a package that is missing here becomes a message
    from awq_trt.serve.generator import Generator

BYTES_PER_TOKEN = 64
"""A text of more characters than that for each token a prompt may have is refused without being tokenized."""


class Service:
    """Answers messages with a generator.

    Args:
        max_prompt_tokens: of a request; None is what the cache has room for.
    """

    def __init__(self, generator: Generator, max_prompt_tokens: int | None) -> None:
        room = generator.decoder.capacity - 1
        self.generator, self.max_prompt_tokens = generator, min(max_prompt_tokens or room, room)
        self._theirs: dict[int, int] = {}  # the generator's id -> the id that Triton's process gave
        self._ours: dict[int, int] = {}

    def receive(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Take a request or cancel one; the news of it."""
        if "cancel" in message:
            if (number := self._ours.get(message["cancel"])) is not None:
                self.generator.cancel(number)
            return []
        theirs, prompt = message["add"], message["prompt"]
        try:
            ids = self._encode(prompt)
            number = self.generator.add(ids, Sampling(**message["sampling"]))
        except AwqTrtError as error:
            return [{"id": theirs, "refused": str(error)}]
        except Exception as error:  # tokenizers and templates raise whatever they like
            return [{"id": theirs, "refused": f"the prompt cannot be read: {type(error).__name__}: {error}"}]
        self._theirs[number], self._ours[theirs] = theirs, number
        return [{"id": theirs, "prompt_tokens": len(ids)}]

    def step(self) -> list[dict[str, Any]]:
        """One step of the generator; the news of it."""
        news = []
        for event in self.generator.step():
            theirs = self._theirs[event.id]
            item: dict[str, Any] = {"id": theirs, "text": event.text, "tokens": len(event.token_ids)}
            item |= {"finish": event.finish_reason} | ({} if event.error is None else {"error": event.error})
            news.append(item)
            if event.finish_reason is not None:
                del self._ours[self._theirs.pop(event.id)]
        return news

    def _encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        from awq_trt.serve.generate import encode

        limit = self.max_prompt_tokens
        size = len(prompt if isinstance(prompt, str) else json.dumps(prompt))
        if size > BYTES_PER_TOKEN * limit:
            raise AwqTrtError(f"the prompt has {size} characters; this model takes at most {limit} tokens. Shorten it.")
        ids = encode(self.generator.tokenizer, prompt)
        if len(ids) > limit:
            raise AwqTrtError(f"the prompt has {len(ids)} tokens; this model takes at most {limit}. Shorten it.")
        return ids


def load_generator(folder: Path, settings: dict[str, Any]) -> Generator:
    """The decoder and the tokenizer of a model's folder.

    Args:
        settings: {"model": name of the file, "max_batch": rows or None, "threads": of ONNX Runtime or None}.

    Raises:
        AwqTrtError: what could not be loaded, and why.
    """
    from awq_trt.serve.generate import open_tokenizer
    from awq_trt.serve.generator import Generator
    from awq_trt.serve.open import open_decoder

    rows, threads = settings.get("max_batch"), settings.get("threads")
    decoder = open_decoder(folder / settings["model"], max_batch=rows, threads=threads)
    return Generator(decoder, open_tokenizer(decoder, folder / "tokenizer"))


def serve(lines: Iterable[str], output: TextIO, folder: Path, settings: dict[str, Any]) -> int:
    """Load the model, then answer until the input ends; returns the exit status."""

    def send(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    try:
        service = Service(load_generator(folder, settings), settings.get("max_prompt_tokens"))
        decoder = service.generator.decoder
        send({"ready": {"rows": decoder.max_batch, "capacity": decoder.capacity, "cache_bytes": decoder.cache_bytes}})
        _answer(service, lines, send)
    except Exception as error:  # a runtime that is missing; a CUDA error, after which only a new process helps
        if not isinstance(error, AwqTrtError):
            traceback.print_exc()
        send({"failed": str(error) if isinstance(error, AwqTrtError) else f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _answer(service: Service, lines: Iterable[str], send: Callable[[dict[str, Any]], None]) -> None:
    inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            inbox.put(line)
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    generator = service.generator
    while True:
        news: list[dict[str, Any]] = []
        while not (generator.busy or news) or not inbox.empty():
            line = inbox.get()
            if line is None:
                return
            news += service.receive(json.loads(line))
        if generator.busy:
            news += service.step()
        send({"news": news, "active": generator.active, "waiting": generator.waiting})


def main() -> int:
    """Serve on the standard input and output; whatever else prints there goes to the log."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; Triton's process says when to end
    return serve(sys.stdin, output, Path(sys.argv[1]), json.loads(sys.argv[2]))


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # the thread that reads may hold the lock of stdin, which a usual exit would wait for
