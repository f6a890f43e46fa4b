"""Talk to an exported model: a chat in the terminal, an answer to one prompt, or answers to a file of prompts.

    awq-trt generate out.plan                              # chat; Ctrl-C stops an answer, Ctrl-D ends
    awq-trt generate out.onnx --prompt "Why is the sky blue?" --temperature 0.7 --seed 1
    awq-trt generate out.onnx --prompts questions.txt --json > answers.jsonl

A plan runs on the GPU, an ONNX file on the CPU. A prompt is a message of a chat where the tokenizer has a chat
template, and text to be continued where it has none, or with --raw.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq_trt.errors import AwqTrtError

if TYPE_CHECKING:
    from awq_trt.serve.generate import Prompt
    from awq_trt.serve.generator import Event, Generator, Speed

CHAT_HELP = "Type a message. /reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer."


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `awq-trt generate`."""
    p.add_argument("model", type=Path, help=".onnx file or TensorRT plan of `awq-trt export`")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="answer every line of a text file, together")
    p.add_argument("--system", metavar="TEXT", help="system message")
    p.add_argument("--raw", action="store_true", help="continue the text as it is, without chat template")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="(default: the one the model's file names)")
    p.add_argument("--json", action="store_true", help="with prompts: a JSON object for each, when all are done")
    p.add_argument("--quiet", action="store_true", help="no speed at the end")

    s = p.add_argument_group("sampling")
    s.add_argument("--max-tokens", type=int, metavar="N", help="per answer (default: what the cache has room for)")
    s.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    s.add_argument("--top-k", type=int, default=0, metavar="K", help="0 for all tokens (default: %(default)s)")
    s.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(default: %(default)s)")
    s.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="(default: %(default)s)")
    s.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    s.add_argument("--seed", type=int, metavar="N", help="(default: another one every time)")
    s.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")

    r = p.add_argument_group("runtime")
    r.add_argument("--max-batch", type=int, metavar="N", help="prompts at once (default: 4, or what the plan allows)")
    r.add_argument("--threads", type=int, metavar="N", help="of ONNX Runtime (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Load the model, then answer or chat."""
    from awq_trt.serve.generate import open_tokenizer
    from awq_trt.serve.generator import Generator
    from awq_trt.serve.open import open_decoder
    from awq_trt.serve.sampling import Sampling

    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling)}
    sampling = Sampling(**fields | {"stop": tuple(args.stop)})
    texts = [args.prompt] if args.prompt is not None else read_lines(args.prompts) if args.prompts else None
    rows = args.max_batch if texts is not None and len(texts) > 1 else 1
    try:
        with open_decoder(args.model, max_batch=rows, threads=args.threads) as model:
            tokenizer = open_tokenizer(model, args.tokenizer)
            generator = Generator(model, tokenizer)
            plain = args.raw or not tokenizer.chat_template
            if plain and args.system is not None:
                raise AwqTrtError("a system message needs a chat template; without one, put it into the prompt.")
            if texts is None:
                chat(generator, sampling, args.system, plain, args.quiet)
            else:
                prompts: list[Prompt] = [text if plain else messages(args.system, text) for text in texts]
                answer(generator, texts, prompts, sampling, args.json, args.quiet)
    except KeyboardInterrupt:
        return 130
    return 0


def answer(
    generator: Generator, texts: list[str], prompts: list[Prompt], sampling: Any, as_json: bool, quiet: bool
) -> None:
    """Answer prompts: one is streamed, several are printed as they end, in JSON all at the end in their order."""
    from awq_trt.serve.generate import encode

    most = generator.decoder.capacity
    numbers = {generator.add(encode(generator.tokenizer, p, most), sampling): i for i, p in enumerate(prompts)}
    answers, tokens, reasons = [""] * len(texts), [0] * len(texts), [""] * len(texts)
    for event in events(generator):
        i = numbers[event.id]
        answers[i] += event.text
        tokens[i] += len(event.token_ids)
        reasons[i] = event.finish_reason or ""
        if as_json:
            continue
        if len(texts) == 1:
            print(event.text, end="" if event.finish_reason is None else "\n", flush=True)
        elif event.finish_reason is not None:
            print(f">>> {texts[i]}\n{answers[i]}\n", flush=True)
    if as_json:
        for text, reply, count, reason in zip(texts, answers, tokens, reasons, strict=True):
            row = {"prompt": text, "text": reply, "tokens": count, "finish_reason": reason}
            print(json.dumps(row, ensure_ascii=False))
    if not quiet:
        print(described(generator.speed), file=sys.stderr)


def chat(generator: Generator, sampling: Any, system: str | None, plain: bool, quiet: bool) -> None:
    """A conversation in the terminal; without a chat template every input is continued on its own."""
    from awq_trt.serve.generate import encode

    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
        print(CHAT_HELP, file=sys.stderr)
    history = messages(system)
    for text in inputs():
        if text == "/reset":
            history = messages(system)
            continue
        prompt: Prompt = text if plain else [*history, {"role": "user", "content": text}]
        try:
            ids = encode(generator.tokenizer, prompt, generator.decoder.capacity)
            reply = stream(generator, ids, sampling)
        except AwqTrtError as error:  # too long, most likely: the conversation goes on without this message
            print(f"error: {error} /reset forgets the conversation.", file=sys.stderr)
            continue
        history += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    if not quiet:
        print(described(generator.speed), file=sys.stderr)


def stream(generator: Generator, prompt: list[int], sampling: Any) -> str:
    """Print an answer while it comes; Ctrl-C stops it. Returns what there is."""
    request, reply = generator.add(prompt, sampling), ""

    def show(found: Iterator[Event]) -> None:
        nonlocal reply
        for event in found:
            reply += event.text
            print(event.text, end="", flush=True)

    try:
        show(events(generator))
    except KeyboardInterrupt:
        generator.cancel(request)
        show(events(generator))
    print()
    return reply


def events(generator: Generator) -> Iterator[Event]:
    """Step until nothing is left to do."""
    while generator.busy:
        for event in generator.step():
            if event.error is not None:
                raise AwqTrtError(event.error)
            yield event


def inputs() -> Iterator[str]:
    """Lines that the user types, until /exit, Ctrl-D or Ctrl-C."""
    ask: Callable[[], str] = (lambda: input("> ")) if sys.stdin.isatty() else input
    while True:
        try:
            text = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/exit":
            return
        if text:
            yield text


def messages(system: str | None, text: str | None = None) -> list[dict[str, str]]:
    """The beginning of a chat: a system message and a user's, each where there is one."""
    roles = {"system": system, "user": text}
    return [{"role": role, "content": content} for role, content in roles.items() if content is not None]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AwqTrtError(f"{path}: cannot be read: {error}. Give a text file (UTF-8) with a prompt a line.") from error
    if not lines:
        raise AwqTrtError(f"{path}: no prompts in it. Write one a line.")
    return lines


def described(speed: Speed) -> str:
    """Tokens and tokens per second, of prompts and of answers."""
    parts = (("prompt", speed.prompt_tokens, speed.prompt_seconds), ("answer", speed.tokens, speed.seconds))
    return "; ".join(f"{name} {n} tokens, {n / s if s else 0:.1f}/s" for name, n, s in parts)
