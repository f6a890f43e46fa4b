"""`generate`: prompts in, their continuations out; and how a prompt becomes token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from awq_trt.errors import AwqTrtError
from awq_trt.serve.chat import check_size, render
from awq_trt.serve.decoder import Decoder, tokenizer_folder
from awq_trt.serve.generator import Event, Generator
from awq_trt.serve.open import open_decoder
from awq_trt.serve.sampling import Sampling

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text to be continued; token ids; or the messages of a chat, {"role": ..., "content": ...}, where the content is text
or a list of parts, {"type": "text", "text": ...}."""


@dataclass(frozen=True)
class Generated:
    """The continuation of one prompt."""

    text: str  # what follows the prompt, without special tokens and stop string
    token_ids: tuple[int, ...]  # all new tokens, the end-of-sequence token too
    finish_reason: str  # see `Event`
    prompt_tokens: int  # length of the prompt


def generate(
    model: str | Path | Decoder,
    prompts: str | Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    tokenizer: Any = None,
    stream: Callable[[int, str], None] | None = None,
    max_batch: int | None = None,
    threads: int | None = None,
) -> list[Generated]:
    """Continue prompts, as many at once as the decoder has rows.

    Args:
        model: an .onnx file (ONNX Runtime on the CPU), a plan (TensorRT on the GPU), or an open decoder.
        prompts: one text, or several prompts; a prompt is text, token ids, or the messages of a chat.
        sampling: for all, or one for each; None is greedy. A seed gives every prompt the same random numbers.
        tokenizer: of transformers, or its directory; None is the one that the model's file names.
        stream: is called with the number of a prompt and a new piece of its text.
        max_batch, threads: see `open_decoder`.

    Raises:
        AwqTrtError: the model or tokenizer cannot be loaded, a prompt is empty or too long, the output is NaN.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    settings = list(sampling) if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(prompts)
    if len(settings) != len(prompts):
        raise AwqTrtError(f"{len(prompts)} prompts, but {len(settings)} settings; give one for each, or one for all.")
    if not isinstance(model, Decoder):
        with open_decoder(model, max_batch=max_batch, threads=threads) as decoder:
            return generate(decoder, prompts, settings, tokenizer=tokenizer, stream=stream)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = open_tokenizer(model, tokenizer)
    generator = Generator(model, tokenizer)
    encoded = [encode(tokenizer, prompt, model.capacity) for prompt in prompts]
    for number, (ids, one) in enumerate(zip(encoded, settings, strict=True)):
        generator.add(ids, one, id=number)
    events: list[list[Event]] = [[] for _ in prompts]
    while generator.busy:
        for event in generator.step():
            if event.error is not None:
                raise AwqTrtError(f"{model.path}: prompt {event.id}: {event.error}")
            events[event.id].append(event)
            if stream is not None and event.text:
                stream(event.id, event.text)
    return [
        Generated(
            text="".join(event.text for event in of_one),
            token_ids=tuple(token for event in of_one for token in event.token_ids),
            finish_reason=str(of_one[-1].finish_reason),
            prompt_tokens=len(ids),
        )
        for of_one, ids in zip(events, encoded, strict=True)
    ]


def encode(tokenizer: Any, prompt: Prompt, most_tokens: int | None = None) -> list[int]:
    """The token ids of a prompt; a chat goes through the tokenizer's chat template and ends where the answer begins.

    Text may be a chat that someone else has rendered, as Triton's OpenAI frontend does: where it begins with what the
    tokenizer puts before every text (a beginning-of-sequence token), that is not put there again.

    Args:
        most_tokens: a prompt may have. Much longer text is refused without being tokenized.

    Raises:
        AwqTrtError: none of the three kinds of prompt, or text that is not Unicode, or far too long; or a chat that
            `render` refuses.
    """
    text: Any = prompt
    if not isinstance(prompt, str):
        ids = [int(item) for item in prompt if isinstance(item, Integral)]
        if len(ids) == len(prompt):
            return ids
        if not all(isinstance(item, Mapping) for item in prompt):
            raise AwqTrtError(f"a prompt is text, token ids or messages with role and content, not {prompt!r:.200}.")
        text = render(tokenizer, prompt, most_tokens)  # type: ignore[arg-type]
    check_size(len(text), most_tokens)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
        raise AwqTrtError(f"character {error.start} of the prompt is not Unicode: {error.reason}.") from error
    from awq_trt.checkpoint.directory import token_ids

    if isinstance(prompt, str):
        ids, added = token_ids(tokenizer, prompt), token_ids(tokenizer, "")
        if not any(ids[:n] == ids[n : 2 * n] == added[:n] for n in range(1, len(added) + 1)):
            return ids
    return token_ids(tokenizer, text, add_special_tokens=False)  # the template has written them


def open_tokenizer(decoder: Decoder, directory: str | Path | None = None) -> Any:
    """The tokenizer in a directory, or in the one that the model's file names. Code in the directory is not run.

    Raises:
        AwqTrtError: there is none, or it cannot be loaded.
    """
    from awq_trt.checkpoint.directory import load_tokenizer

    return load_tokenizer(tokenizer_folder(decoder.path, decoder.facts, directory), required=True)
