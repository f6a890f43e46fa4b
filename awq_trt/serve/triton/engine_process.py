"""The process that holds the engine of a Triton model: requests in, events out, each a line of JSON.

supervisor.py starts it: `python -m awq_trt.serve.triton.engine_process FOLDER SETTINGS`. A process of its own, because
the decode loop should not wait for Triton (a response takes longer to send than a small model takes for a token), and
because whatever kills an engine, a CUDA error or the kernel for want of memory, then leaves Triton's process alive.

    in    {"add": 7, "prompt": "text" or [messages], "sampling": {"max_tokens": 64, ...}}      {"cancel": 7}
    out   {"ready": {"rows": 8, "capacity": 2048, "cache_bytes": ...}}      {"failed": "why it could not start"}
          {"events": [{"id": 7, "prompt_tokens": 12}, {"id": 7, "text": " in", "tokens": 1, "finish": null}],
           "active": 1, "waiting": 0}

An event with "refused" says why a request was not taken, one with "error" why it ended. The process ends when its input
does.
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
from pathlib import Path
from typing import Any

from awq_trt.errors import AwqTrtError  # the rest late, so that a package that is missing here becomes a message

BYTES_PER_TOKEN = 64
"""A text of more characters than that for each token a prompt may have is refused without being tokenized."""


def receive(generator: Any, limit: int, message: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the generator a request, or cancel one; the events of it. limit: tokens of a prompt."""
    from awq_trt.serve.generate import encode
    from awq_trt.serve.sampling import Sampling

    if "cancel" in message:
        generator.cancel(message["cancel"])
        return []
    id, prompt = message["add"], message["prompt"]
    try:
        size = len(prompt if isinstance(prompt, str) else json.dumps(prompt))
        if size > BYTES_PER_TOKEN * limit:
            raise AwqTrtError(f"the prompt has {size} characters; this model takes at most {limit} tokens. Shorten it.")
        ids = encode(generator.tokenizer, prompt)
        if len(ids) > limit:
            raise AwqTrtError(f"the prompt has {len(ids)} tokens; this model takes at most {limit}. Shorten it.")
        generator.add(ids, Sampling(**message["sampling"]), id)
    except AwqTrtError as error:
        return [{"id": id, "refused": str(error)}]
    except Exception as error:  # tokenizers and templates raise whatever they like
        return [{"id": id, "refused": f"the prompt cannot be read: {type(error).__name__}: {error}"}]
    return [{"id": id, "prompt_tokens": len(ids)}]


def serve(folder: Path, settings: dict[str, Any], send: Any) -> None:
    """Load the model of a version's folder, then answer until the input ends.

    Args:
        settings: {"model": name of the file, "max_batch": rows, "threads": of ONNX Runtime, "max_prompt_tokens": of a
            request}; all but the first may be missing. send: writes a message.
    """
    from awq_trt.serve.generate import open_tokenizer
    from awq_trt.serve.generator import Generator
    from awq_trt.serve.open import open_decoder

    rows, threads = settings.get("max_batch"), settings.get("threads")
    decoder = open_decoder(folder / settings["model"], max_batch=rows, threads=threads)
    generator = Generator(decoder, open_tokenizer(decoder, folder / "tokenizer"))
    limit = min(settings.get("max_prompt_tokens", decoder.capacity), decoder.capacity - 1)
    send({"ready": {"rows": decoder.max_batch, "capacity": decoder.capacity, "cache_bytes": decoder.cache_bytes}})
    inbox: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in itertools.chain(sys.stdin, [""]):  # "" is the end
            inbox.put(line)

    threading.Thread(target=read, daemon=True).start()
    while True:
        events: list[dict[str, Any]] = []
        while not (generator.busy or events) or not inbox.empty():
            line = inbox.get()
            if not line:
                return
            events += receive(generator, limit, json.loads(line))
        events += [
            {"id": e.id, "text": e.text, "tokens": len(e.token_ids), "finish": e.finish_reason, "error": e.error}
            for e in (generator.step() if generator.busy else [])
        ]
        send({"events": events, "active": generator.active, "waiting": generator.waiting})


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
