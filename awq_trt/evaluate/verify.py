"""Verification of an export: accuracy of the rounded model, and the ONNX file compared with that model.

The ONNX file runs as it is, in ONNX Runtime on a CPU, with the 16-bit activations it was exported with (the copy with
fp32 activations that serve/ort.py runs would hide an overflow). The eager model has the rounded weights and computes in
fp32, block by block, so that verifying needs no more memory than quantizing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers

from awq_trt.awq.blocks import Inputs
from awq_trt.awq.calibration import HELD_OUT_TEXT, arrays, windows
from awq_trt.awq.outside import Weights
from awq_trt.awq.ranges import Ranges
from awq_trt.checkpoint.directory import token_ids
from awq_trt.checkpoint.model import most_tokens
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.errors import AwqTrtError, brief
from awq_trt.evaluate.accuracy import Predictions, accuracy, eager_outputs, is_causal_lm, rounded_like
from awq_trt.evaluate.float_model import FloatModel, judge
from awq_trt.export.fp32 import float32_copy
from awq_trt.export.kv_cache import give_all_logits
from awq_trt.export.metadata import METADATA_KEY, fixed_cache_facts, graph_metadata, read_graph
from awq_trt.export.onnx_file import open_onnx
from awq_trt.export.rope import resolve_longrope
from awq_trt.publishing import scratch

WINDOW = 512  # tokens of a window of held-out text, where the model has as many positions
AGREEMENT_TOKENS = 128  # tokens of held-out text whose every logit is compared
NUMPY_TYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # where a graph in memory has its weights
RELATIVE, GAP = 0.05, 0.25
"""A right file is no further from the eager model than this: the relative difference of all outputs (0.001 to 0.002 in
float16), and the gap of a token that the eager model would not have chosen, in standard deviations of its logits."""
PROMPT = "The first thing to know about the sea is that"

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """The ONNX file in ONNX Runtime against the eager model with the rounded weights in fp32."""

    max_abs: float  # largest difference of two logits
    relative: float  # |difference| / |eager|, the norms over all logits
    top1: float  # part of the positions with the same arg max
    logits: int  # how many were compared
    generated: str = ""  # prompt and greedy continuation by the ONNX file through its KV cache; "" for encoders
    tokens: int = 0  # generated
    tokens_equal: int = 0  # of them, those that the eager model would have chosen
    gap: float = 0.0  # most that a generated token's eager logit is below the best one; tiny for a tie
    spread: float = 0.0  # standard deviation of the eager logits over the vocabulary, mean over the generated tokens
    largest: float = 0.0  # |value| that any layer or norm of the eager model read or gave
    largest_in: str = ""  # which module that was


def onnx_session(path: Path, *, all_logits: bool = False) -> onnxruntime.InferenceSession:
    """The ONNX file in ONNX Runtime on the CPU, in the most exact arithmetic it has for 4-bit weights.

    With `all_logits`, a decoder that gives the logits of last tokens gives those of all. A bfloat16 file is run as its
    copy with fp32 activations, because ONNX Runtime has no bfloat16 kernels for the CPU. Constants are not folded:
    folding unpacks all weights at once, 31 bytes for each; so each run unpacks anew.

    Raises:
        AwqTrtError: ONNX Runtime does not take the file, or its weights are not its own.
    """
    read_graph(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    source = path
    try:
        with ExitStack() as stack:
            model = open_onnx(path)
            if any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer):
                source = stack.enter_context(scratch(path.parent)) / path.name
                float32_copy(path, source)
                model = open_onnx(source)
            if all_logits and graph_metadata(model, path).get("logits") == "last":
                give_all_logits(model.graph)
            options.add_session_config_entry(WEIGHTS_FOLDER, str(source.parent))
            graph, cpu = model.SerializeToString(), ["CPUExecutionProvider"]
            return onnxruntime.InferenceSession(graph, options, cpu, disabled_optimizers=["ConstantFolding"])
    except AwqTrtError:
        raise
    except Exception as error:
        raise AwqTrtError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {brief(error)}") from error


def run_onnx(
    session: onnxruntime.InferenceSession, inputs: Arrays, past: Arrays | None = None, past_length: int = 0
) -> Arrays:
    """Run an exported model, with a fixed KV cache, one that grows, or none; long prompts in chunks.

    Args:
        inputs: by name, "input_ids" int64 [B, S], "pixel_values" and so on. Those the file does not have are left out;
            a missing attention mask is ones.
        past: what the call before returned, None for an empty cache. past_length: tokens in it.

    Returns:
        The outputs by name: "logits" [B, S, V], or [B, 1, V] where the file gives those of the last token, "present.*".

    Raises:
        AwqTrtError: an input is missing, or there are more tokens than the cache has room for.
    """
    types = {tensor.name: NUMPY_TYPES[tensor.type] for tensor in session.get_inputs()}
    names = [tensor.name for tensor in session.get_outputs()]
    fixed = fixed_cache_facts(json.loads(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}")))
    ids = inputs.get("input_ids", np.zeros((1, 1)))  # a model that reads no tokens runs in one call, too
    batch, done, end = len(ids), past_length, past_length + ids.shape[1]
    if end > fixed.get("capacity", end):
        raise AwqTrtError(f"{end} tokens, but the KV cache has room for {fixed['capacity']}: export a larger capacity.")
    outputs = dict(past or {})
    for tensor in [] if past else session.get_inputs():  # an empty cache; no slots at all where their number is dynamic
        if tensor.name.startswith("past_key_values"):
            shape = (batch, *(size if isinstance(size, int) else 0 for size in tensor.shape[1:]))
            outputs[tensor.name.replace("past_key_values", "present")] = np.zeros(shape)
    logits, chunk = [], fixed.get("prefill_chunk", end)
    while done < end:
        stop = min(end, done - done % chunk + chunk)
        feeds = {
            "attention_mask": np.ones((batch, stop)),
            "past_length": np.full(batch, done),
            "input_length": np.full(batch, stop - done),
            **{name: v[:, done - past_length : stop - past_length] if v is ids else v for name, v in inputs.items()},
            **{name.replace("present", "past_key_values"): value for name, value in outputs.items()},
        }
        if missing := types.keys() - feeds.keys():
            raise AwqTrtError(f"the ONNX file wants inputs that the calibration inputs do not have: {sorted(missing)}.")
        feeds = {name: feeds[name].astype(dtype, copy=False) for name, dtype in types.items()}
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        logits.append(outputs[names[0]])
        done = stop
    if len(logits) > 1 and session.get_outputs()[0].shape[1] != 1:
        outputs[names[0]] = np.concatenate(logits, 1)
    return outputs


def onnx_outputs(path: Path, inputs: Sequence[Inputs]) -> Iterator[torch.Tensor]:
    """First output of an ONNX file for each input in turn, in fp32; a decoder's logits of all tokens.

    Raises:
        AwqTrtError: ONNX Runtime cannot load it, or its output is not finite.
    """
    session = onnx_session(path, all_logits=True)
    for sample in inputs:
        outputs = run_onnx(session, {name: tensor.numpy() for name, tensor in sample.items()})
        output = torch.from_numpy(next(iter(outputs.values()))).float()
        if not torch.isfinite(output).all():
            raise AwqTrtError(f'{path.name}: its output has NaN or Inf: float16 overflowed. Use dtype="bfloat16".')
        yield output


def generate_onnx(session: onnxruntime.InferenceSession, prompt: np.ndarray, tokens: int) -> np.ndarray:
    """Greedy continuation through the KV cache: prompt int64 [1, S] -> int64 [tokens]."""
    output = run_onnx(session, {"input_ids": prompt})
    ids: list[int] = []
    while len(ids) < tokens:
        if ids:
            output = run_onnx(session, {"input_ids": np.array([ids[-1:]])}, output, prompt.shape[1] + len(ids) - 1)
        ids.append(int(output["logits"][0, -1].argmax()))
    return np.array(ids)


def agreement(
    onnx_path: Path, weights: Weights, inputs: Sequence[Inputs], tokenizer: Any = None, tokens: int = 32
) -> Agreement:
    """Compare every output of the ONNX file with the eager model, and for a decoder the greedy tokens.

    The eager model reads prompt and continuation in one pass; the ONNX file made them one by one through its cache, so
    equal arg max at every position is the same as generating the same tokens.

    Raises:
        AwqTrtError: the file is float16 and the eager model computes what that cannot hold (ONNX Runtime, computing in
            fp32 on a CPU, need not notice); outputs of other shapes.
    """
    ranges = Ranges()
    eager = list(eager_outputs(weights, inputs, ranges))
    ranges.refuse_float16(weights.source, read_graph(onnx_path).metadata["dtype"])
    got = list(onnx_outputs(onnx_path, inputs))
    if (shapes := [list(x.shape) for x in got]) != (wanted := [list(x.shape) for x in eager]):
        raise AwqTrtError(
            f"{onnx_path}: the ONNX outputs have shapes {shapes} instead of {wanted}; "
            "please report this with the model's name."
        )
    expected, logits = (torch.cat([x.flatten(0, -2) for x in outputs]) for outputs in (eager, got))  # [positions, V]
    difference = logits - expected
    found = Agreement(
        max_abs=float(difference.abs().max()),
        relative=float(difference.norm() / expected.norm().clamp(min=1e-15)),
        top1=float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
        logits=logits.numel(),
        largest=ranges.largest,
        largest_in=ranges.module,
    )
    if tokenizer is None or not is_causal_lm(weights.config):
        return found
    prompt = np.array([token_ids(tokenizer, PROMPT)])
    if room := fixed_cache_facts(read_graph(onnx_path).metadata).get("capacity"):
        prompt = prompt[:, : max(1, room - tokens)]
        tokens = min(tokens, room - prompt.shape[1])
    ids = generate_onnx(onnx_session(onnx_path), prompt, tokens)
    whole = torch.from_numpy(np.concatenate([prompt[0], ids])[None])
    (logits,) = eager_outputs(weights, [{"input_ids": whole}])
    logits = logits[0, prompt.shape[1] - 1 : -1]  # [tokens, V], each token chosen by the one before
    gap = logits.max(-1).values - logits.gather(-1, torch.from_numpy(ids)[:, None])[:, 0]
    equal = int((logits.argmax(-1).numpy() == ids).sum())
    text, spread = PROMPT + tokenizer.decode(ids), float(logits.std(-1).mean())
    return replace(found, generated=text, tokens=tokens, tokens_equal=equal, gap=float(gap.max()), spread=spread)


def refuse_wrong(found: Agreement, onnx_path: Path) -> None:
    """Stop where the ONNX file does not compute what the eager model does, but for 16-bit arithmetic and ties.

    Raises:
        AwqTrtError: it does not.
    """
    tokens = f", {found.tokens_equal} of {found.tokens} greedy tokens equal" if found.tokens else ""
    if found.relative > RELATIVE or found.gap > GAP * found.spread:
        raise AwqTrtError(
            f"{onnx_path.name} does not compute what the model does, and is not kept: relative difference "
            f"{found.relative:.1e}, same arg max {found.top1:.1%}{tokens}, the others up to {found.gap:.2g} below the "
            f"best logit (standard deviation {found.spread:.2g}). Please report this with the model's name."
        )


def verify(
    onnx_path: Path,
    awq_dir: Path,
    original: Checkpoint | None,
    *,
    inputs: str | Path | None = None,
    judged: FloatModel | None = None,
) -> dict[str, Any]:
    """Everything that is known of an export's correctness, as plain data for the sidecar.

    Args:
        onnx_path, awq_dir: the export, and the quantized checkpoint it was made from. original: the checkpoint before
            quantization, None where it is not at hand (then no accuracy is measured).
        inputs: a .npz of model inputs for models without a tokenizer; text models read the held-out text.
        judged: what `judge_float` said of the original; None asks it now.

    Raises:
        AwqTrtError: the original is read wrong, or the ONNX file computes something else than the eager model.
    """
    quantized = open_quantized(awq_dir)
    room = fixed_cache_facts(read_graph(onnx_path).metadata).get("capacity")
    samples, short = held_out_inputs(quantized.config, quantized.tokenizer, inputs, room)
    exported = replace(quantized, config=resolve_longrope(quantized.config, room or 0))
    found = agreement(onnx_path, exported, short or [random_inputs(onnx_path)], quantized.tokenizer)
    refuse_wrong(found, onnx_path)
    held_out = {}
    if original is not None and samples:
        judged = judged or judge_float(original, inputs=inputs)
        models: dict[str, Weights | Predictions] = {"float": judged.predictions or original}
        if quantized.report["method"] != "rtn":
            models["rounding"] = rounded_like(quantized, original)
        held_out = accuracy(models | {str(quantized.report["method"]): quantized}, samples)
    return {
        "text": HELD_OUT_TEXT.name if quantized.tokenizer is not None else str(inputs),
        "float": judged.judge if judged else "",
        "held_out": {name: asdict(value) for name, value in held_out.items()},
        "onnx": asdict(found),
    }


def held_out_inputs(
    config: transformers.PretrainedConfig, tokenizer: Any, inputs: str | Path | None, room: int | None = None
) -> tuple[list[Inputs], list[Inputs]]:
    """What models are compared on: for perplexity and choices, and fewer where every logit is looked at; none where
    there is neither a tokenizer nor a .npz.

    Args:
        room: tokens that the KV cache has room for, if it is known.
    """
    if tokenizer is not None:
        longest = most_tokens(config) or WINDOW
        samples = windows(HELD_OUT_TEXT, tokenizer, samples=8, length=min(WINDOW, longest))
        return samples, [{"input_ids": samples[0]["input_ids"][:, : min(AGREEMENT_TOKENS, room or AGREEMENT_TOKENS)]}]
    if inputs is not None and str(inputs).endswith(".npz"):
        samples = arrays(inputs, 8)
        return samples, samples[:2]
    return [], []


def judge_float(original: Checkpoint, *, inputs: str | Path | None = None, memory: int | None = None) -> FloatModel:
    """`float_model.judge` on the inputs that `verify` will use."""
    return judge(original, *held_out_inputs(original.config, original.tokenizer, inputs), memory=memory)


def random_inputs(onnx_path: Path) -> Inputs:
    """Random inputs of the shapes an ONNX file declares, for a model that came with none: 2 samples, 16 positions."""
    generator, inputs = torch.Generator().manual_seed(0), {}
    for wanted in read_graph(onnx_path).inputs:
        shape = [d if isinstance(d, int) else 2 if "batch" in d else 16 for d in wanted.shape]
        if wanted.dtype != "int64":
            inputs[wanted.name] = torch.randn(shape, generator=generator)
        elif wanted.name not in ("attention_mask", "past_length", "input_length"):  # which run_onnx adds
            inputs[wanted.name] = torch.randint(0, 100, shape, generator=generator)
    return {name: value for name, value in inputs.items() if not name.startswith("past_key_values")}
