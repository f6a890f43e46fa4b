"""The process that holds the engine of a Triton model: requests in, events out, each a line of JSON.

supervisor.py starts it: `python -m awq_trt.serve.triton.engine_process FOLDER SETTINGS`. A process of its own, because
the decode loop should not wait for Triton (a response takes longer to send than a small model takes for a token), and
because whatever kills an engine, a CUDA error or the kernel for want of memory, then leaves Triton's process alive.

    in    {"add": 7, "prompt": "text" or [messages], "sampling": {"max_tokens": 64, ...}}      {"cancel": 7}
    out   {"ready": {"rows": 8, "capacity": 2048, "prompt_tokens": 2047, ...}}      {"failed": "why it could not start"}
          {"events": [{"id": 7, "prompt_tokens": 12}, {"id": 7, "text": " in", "tokens": 1, "finish": null}],
           "active": 1, "waiting": 0}

An event with "refused" says why a request was not taken, one with "error" why it ended. The process ends when its input
does. Prompts are rendered and tokenized by threads beside the decode loop, so that a long one holds up nobody else.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from awq_trt.errors import AwqTrtError  # the rest late, so that a package that is missing here becomes a message

TEXTS, CHATS = 2, 4
"""Prompts that are tokenized at once, and chats that are rendered before, each in a process of its own (chat.py). Text
does not wait for chats, which a template may make slow."""


class Requests:
    """Messages in, events out, between the input's reader, the threads that prepare prompts, and the generator.

    Args:
        limit: tokens of a prompt.
    """

    def __init__(self, generator: Any, limit: int) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # lines, "" at the end, and what `_prepare` returns
        self._generator, self._limit = generator, limit
        self._preparing: set[int] = set()
        self._texts, self._chats = ThreadPoolExecutor(TEXTS), ThreadPoolExecutor(CHATS)

    @property
    def waiting(self) -> int:
        """Requests without a row of the cache."""
        return len(self._preparing) + int(self._generator.waiting)

    def receive(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Take a message, or a prompt that is ready; the events of it."""
        if "cancel" in message:
            id = message["cancel"]
            if id not in self._preparing:
                self._generator.cancel(id)
                return []
            self._preparing.remove(id)
            return [{"id": id, "text": "", "tokens": 0, "finish": "cancelled", "error": None}]
        id = message["add"]
        if "prompt" in message:
            self._preparing.add(id)
            workers = self._texts if isinstance(message["prompt"], str) else self._chats
            workers.submit(lambda: self.inbox.put(self._prepare(message)))
            return []
        if id not in self._preparing:  # cancelled
            return []
        self._preparing.remove(id)
        if "refused" not in message:
            message |= _guarded(lambda: self._generator.add(message["ids"], message["sampling"], id))
        if "refused" in message:
            return [{"id": id, "refused": message["refused"]}]
        return [{"id": id, "prompt_tokens": len(message["ids"])}]

    def _prepare(self, message: dict[str, Any]) -> dict[str, Any]:
        """{"add": id, "ids": token ids, "sampling": Sampling}, or {"add": id, "refused": why}. Runs in a thread."""
        from awq_trt.serve.generate import encode
        from awq_trt.serve.sampling import Sampling

        found: dict[str, Any] = {"add": message["add"]}

        def work() -> None:
            found["sampling"] = Sampling(**message["sampling"])
            found["ids"] = encode(self._generator.tokenizer, message["prompt"], self._limit)
            if (count := len(found["ids"])) > self._limit:
                raise AwqTrtError(f"the prompt has {count} tokens; this model takes at most {self._limit}. Shorten it.")

        return found | _guarded(work)


def _guarded(work: Callable[[], object]) -> dict[str, str]:
    """Do something for one request; {"refused": why} if that fails, whatever it is."""
    try:
        work()
    except AwqTrtError as error:
        return {"refused": str(error)}
    except BaseException as error:  # a panic in the library tokenizers is no Exception; SIGINT is ignored here
        return {"refused": f"the prompt cannot be read: {type(error).__name__}: {error}"[:1000]}
    return {}


def serve(folder: Path, settings: dict[str, Any], send: Any) -> None:
    """Load the model of a version's folder, then answer until the input ends.

    Args:
        settings: {"model": name of the file, "max_batch": rows, "threads": of ONNX Runtime, "max_prompt_tokens": of a
            request}; all but the first may be missing. send: writes a message.
    """
    from awq_trt.serve.generate import encode, open_tokenizer
    from awq_trt.serve.generator import Generator
    from awq_trt.serve.open import open_decoder

    rows, threads = settings.get("max_batch"), settings.get("threads")
    decoder = open_decoder(folder / settings["model"], max_batch=rows, threads=threads)
    generator = Generator(decoder, open_tokenizer(decoder, folder / "tokenizer"))
    encode(generator.tokenizer, "Hello")  # the first call may change the tokenizer, which threads then share
    limit = min(settings.get("max_prompt_tokens", decoder.capacity), decoder.capacity - 1)
    sizes = {"rows": decoder.max_batch, "capacity": decoder.capacity, "prompt_tokens": limit}
    send({"ready": sizes | {"cache_bytes": decoder.cache_bytes}})
    requests = Requests(generator, limit)

    def read() -> None:
        for line in itertools.chain(sys.stdin, [""]):  # "" is the end
            requests.inbox.put(line)

    threading.Thread(target=read, daemon=True).start()
    while True:
        events: list[dict[str, Any]] = []
        while not (generator.busy or events) or not requests.inbox.empty():
            item = requests.inbox.get()
            if item == "":
                return
            events += requests.receive(json.loads(item) if isinstance(item, str) else item)
        events += [
            {"id": e.id, "text": e.text, "tokens": len(e.token_ids), "finish": e.finish_reason, "error": e.error}
            for e in (generator.step() if generator.busy else [])
        ]
        send({"events": events, "active": generator.active, "waiting": requests.waiting})


def main() -> int:
    """Serve on the standard input and output; whatever else prints there goes to the log. Returns the exit status."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; Triton's process says when to end

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=output, flush=True)

    try:
        serve(Path(sys.argv[1]), json.loads(sys.argv[2]), send)
    except Exception as error:  # a runtime that is missing; a CUDA error, after which only a new process helps
        expected = isinstance(error, AwqTrtError)
        if not expected:
            traceback.print_exc()
        send({"failed": str(error) if expected else f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # the thread that reads may hold the lock of stdin, which a usual exit would wait for
