"""Is what was exported what was meant? Accuracy of the rounded model, and agreement of the ONNX file with it.

The eager side runs block by block (blocks.py), so that verifying needs no more memory than quantizing. The ONNX side is
plain ONNX Runtime on a CPU.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from awq_trt.awq.blocks import Inputs, Weights
from awq_trt.awq.calibration import HELD_OUT_TEXT, arrays, windows
from awq_trt.awq.config import QuantizeConfig
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.accuracy import RoundedWeights, accuracy, eager_outputs, is_causal_lm
from awq_trt.export.fp32 import float32_copy
from awq_trt.export.kv_cache import give_all_logits
from awq_trt.export.metadata import METADATA_KEY, fixed_cache_facts, graph_metadata, read_graph
from awq_trt.export.rope import resolve_longrope

WINDOW = 512
"""Tokens of a window of held-out text, where the model has as many positions."""
AGREEMENT_TOKENS = 128
"""Tokens of held-out text whose every logit is compared."""

NUMPY_TYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}

PROMPT = "The first thing to know about the sea is that"


@dataclass(frozen=True)
class Agreement:
    """The ONNX file in ONNX Runtime against the eager model with the rounded weights in fp32.

    Attributes:
        max_abs: largest difference of two logits. relative: |difference| / |eager| over all of them.
        top1: part of the positions with the same arg max. logits: how many were compared.
        generated: greedy continuation of the prompt by the ONNX file through its KV cache, "" for encoders.
        tokens, tokens_equal: tokens generated, and how many of them the eager model would have chosen.
        gap: how far the others are behind its choice, the largest difference of its logits; small where both were
            as good as equal, and so decided by the rounding of activations.
    """

    max_abs: float
    relative: float
    top1: float
    logits: int
    generated: str = ""
    tokens: int = 0
    tokens_equal: int = 0
    gap: float = 0.0


def onnx_session(path: Path, *, all_logits: bool = False) -> onnxruntime.InferenceSession:
    """The ONNX file in ONNX Runtime on the CPU, in the most exact arithmetic it has for 4-bit weights.

    With `all_logits`, a decoder that gives the logits of last tokens gives those of all. A bfloat16 file is run as its
    copy with fp32 activations, because ONNX Runtime has no bfloat16 kernels for the CPU. Constants are not folded:
    folding unpacks all weights at once and holds every intermediate result, 31 bytes for each weight. So memory stays
    bounded, and each run unpacks anew.

    Raises:
        AwqTrtError: ONNX Runtime does not take the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if all_logits and graph_metadata(model, path).get("logits") == "last":
            give_all_logits(model.graph)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".onnx") as file:
                Path(file.name).write_bytes(model.SerializeToString())  # beside the weights, to which it refers
                return _widened_session(Path(file.name), model, options)
        return _widened_session(path, model, options)
    except AwqTrtError:
        raise
    except Exception as error:
        raise AwqTrtError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}") from error


def _session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    cpu = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(str(path), options, cpu, disabled_optimizers=["ConstantFolding"])


def _widened_session(
    path: Path, model: onnx.ModelProto, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """A session of the file, or of its copy in fp32 where it has bfloat16 weights."""
    if not any(t.data_type == onnx.TensorProto.BFLOAT16 for t in model.graph.initializer):
        return _session(path, options)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".float32.") as folder:
        float32_copy(path, Path(folder) / path.name)
        return _session(Path(folder) / path.name, options)


def run_onnx(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an exported model; a decoder's missing KV cache is empty, a missing attention mask is ones.

    Args:
        inputs: by name; "input_ids" [B, S], or "pixel_values", and so on. Those the file does not have are left out.
            A decoder with a fixed cache takes as many tokens as it has room for, in as many calls as it needs.
    """
    if any(wanted.name == "past_length" for wanted in session.get_inputs()):
        return _run_fixed(session, inputs)
    feeds = {}
    for wanted in session.get_inputs():
        dtype = NUMPY_TYPES.get(wanted.type)
        if wanted.name in inputs:
            feeds[wanted.name] = inputs[wanted.name].astype(dtype)
        elif wanted.name.startswith("past_key_values"):
            batch = len(inputs["input_ids"])
            feeds[wanted.name] = np.zeros((batch, wanted.shape[1], 0, wanted.shape[3]), dtype)
        elif wanted.name == "attention_mask":
            feeds[wanted.name] = np.ones(inputs["input_ids"].shape, np.int64)
        else:
            raise AwqTrtError(f"the ONNX file wants an input {wanted.name!r} that the calibration inputs do not have.")
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _run_fixed(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Feed a decoder with a fixed cache new tokens, chunk by chunk.

    Args:
        inputs: "input_ids" [B, S]; to go on: "present.*" of the call before and "past_length" int64 [B], equal.

    Returns:
        "logits" [B, S, V] (or [B, 1, V] where the file gives those of last tokens) and "present.*".
    """
    cache = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])["kv_cache"]
    ids = inputs["input_ids"]
    batch, tokens = ids.shape
    feeds = {}
    for wanted in session.get_inputs():
        if wanted.name.startswith("past_key_values"):
            kept = inputs.get(wanted.name.replace("past_key_values", "present"))
            feeds[wanted.name] = (
                np.zeros((batch, *wanted.shape[1:]), NUMPY_TYPES[wanted.type]) if kept is None else kept
            )
    has_length = any(wanted.name == "input_length" for wanted in session.get_inputs())
    past = int(inputs.get("past_length", np.zeros(1, np.int64))[0])
    if past + tokens > cache["capacity"]:
        raise AwqTrtError(
            f"{past + tokens} tokens, but the KV cache has room for {cache['capacity']}: export with more --max-seq."
        )
    names = [o.name for o in session.get_outputs()]
    logits, done = [], 0
    while done < tokens:
        new = min(tokens - done, cache["prefill_chunk"] - (past + done) % cache["prefill_chunk"])
        at: dict[str, np.ndarray] = {
            "input_ids": ids[:, done : done + new].astype(np.int64),
            "past_length": np.full(batch, past + done, np.int64),
        }
        if has_length:
            at["input_length"] = np.full(batch, new, np.int64)
        output = dict(zip(names, session.run(names, at | feeds), strict=True))
        feeds = {name: output[name.replace("past_key_values", "present")] for name in feeds}
        logits.append(output["logits"])
        done += new
    if session.get_outputs()[0].shape[1] != 1:
        output["logits"] = np.concatenate(logits, 1)
    return output


def generate_onnx(session: onnxruntime.InferenceSession, prompt: np.ndarray, tokens: int) -> np.ndarray:
    """Greedy continuation through the KV cache: prompt int64 [1, S] -> int64 [tokens]."""
    output = run_onnx(session, {"input_ids": prompt})
    fixed = any(wanted.name == "past_length" for wanted in session.get_inputs())
    ids: list[int] = []
    for step in range(tokens):
        ids.append(int(output["logits"][0, -1].argmax()))
        if step + 1 == tokens:
            break
        feeds = {"input_ids": np.array([[ids[-1]]])}
        if fixed:
            feeds["past_length"] = np.array([prompt.shape[1] + step])
            feeds |= {n: v for n, v in output.items() if n.startswith("present")}
        else:
            feeds["attention_mask"] = np.ones((1, prompt.shape[1] + step + 1), np.int64)
            feeds |= {n.replace("present", "past_key_values"): v for n, v in output.items() if n.startswith("present")}
        output = run_onnx(session, feeds)
    return np.array(ids)


def agreement(
    onnx_path: Path, weights: Weights, inputs: Sequence[Inputs], tokenizer: Any = None, tokens: int = 32
) -> Agreement:
    """Compare every output of the ONNX file with the eager model, and 32 greedy tokens for a decoder.

    The eager model reads prompt and continuation in one pass; the ONNX file made them one by one through its cache, so
    equal arg max at every position is the same as generating the same tokens.
    """
    session = onnx_session(onnx_path, all_logits=True)
    sums = np.zeros(2)
    max_abs, same, positions, count = 0.0, 0, 0, 0
    eager = list(eager_outputs(weights, inputs))
    for sample, expected_tensor in zip(inputs, eager, strict=True):
        got = next(iter(run_onnx(session, {n: t.numpy() for n, t in sample.items()}).values())).astype(np.float32)
        expected = expected_tensor.numpy()
        if got.shape != expected.shape or not np.isfinite(got).all():
            raise AwqTrtError(
                f"{onnx_path}: the ONNX output has NaN, or shape {got.shape} instead of {expected.shape}; "
                "please report this with the model's name."
            )
        max_abs = max(max_abs, float(np.abs(got - expected).max()))
        sums += [((got - expected) ** 2).sum(), (expected**2).sum()]
        same += int((got.argmax(-1) == expected.argmax(-1)).sum())
        positions += got[..., 0].size
        count += got.size
    relative, top1 = float(np.sqrt(sums[0] / max(sums[1], 1e-30))), same / positions
    if tokenizer is None or not is_causal_lm(weights.config):
        return Agreement(max_abs, relative, top1, count)
    prompt = np.array([tokenizer(PROMPT)["input_ids"]])
    if room := capacity(onnx_path):
        prompt = prompt[:, : max(1, room - tokens)]
        tokens = min(tokens, room - prompt.shape[1])
    ids = generate_onnx(onnx_session(onnx_path), prompt, tokens)
    whole = torch.from_numpy(np.concatenate([prompt[0], ids])[None])
    (logits,) = eager_outputs(weights, [{"input_ids": whole}])
    logits = logits[0, prompt.shape[1] - 1 : -1]
    best, chosen = logits.max(-1)
    gap = best - logits.gather(-1, torch.from_numpy(ids)[:, None])[:, 0]
    equal = int((chosen.numpy() == ids).sum())
    return Agreement(max_abs, relative, top1, count, PROMPT + tokenizer.decode(ids), tokens, equal, float(gap.max()))


def capacity(onnx_path: Path) -> int | None:
    """Tokens that the fixed cache of an ONNX file holds; None for a file without one."""
    return fixed_cache_facts(read_graph(onnx_path).metadata).get("capacity")


def verify(
    onnx_path: Path, awq_dir: Path, original: Checkpoint | None, *, inputs: str | Path | None = None
) -> dict[str, Any]:
    """Everything that is known of an export's correctness, as plain data for the sidecar.

    Args:
        onnx_path, awq_dir: the export, and the quantized checkpoint it was made from. original: the checkpoint before
            quantization, None where it is not at hand (then no accuracy is measured).
        inputs: a .npz of model inputs for models without a tokenizer; text models read the held-out text.
    """
    quantized, room = open_quantized(awq_dir), capacity(onnx_path)
    if quantized.tokenizer is not None:
        longest = getattr(quantized.config, "max_position_embeddings", None) or WINDOW
        samples = windows(HELD_OUT_TEXT, quantized.tokenizer, samples=8, length=min(WINDOW, longest))
        short = [{"input_ids": samples[0]["input_ids"][:, : min(AGREEMENT_TOKENS, room or AGREEMENT_TOKENS)]}]
    elif inputs is not None and str(inputs).endswith(".npz"):
        samples = arrays(inputs, 8)
        short = samples[:2]
    else:
        samples, short = [], [random_inputs(onnx_path)]
    exported = replace(quantized, config=resolve_longrope(quantized.config, room or 0))
    held_out = {}
    if original is not None and samples:
        report = quantized.report
        config = QuantizeConfig(group_size=report["group_size"], symmetric=report["symmetric"])
        models: dict[str, Weights] = {
            "float": original,
            "rounding": RoundedWeights(original, config, head=quantized.report.get("lm_head") == "int4"),
            str(quantized.report["method"]): quantized,
        }
        if quantized.report["method"] == "rtn":
            del models["rounding"]
        held_out = accuracy(models, samples)
    return {
        "text": HELD_OUT_TEXT.name if quantized.tokenizer is not None else str(inputs),
        "held_out": {name: asdict(value) for name, value in held_out.items()},
        "onnx": asdict(agreement(onnx_path, exported, short, quantized.tokenizer)),
    }


def random_inputs(onnx_path: Path) -> Inputs:
    """Random inputs of the shapes an ONNX file declares, for a model that came with none: 2 samples, 16 positions."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for wanted in read_graph(onnx_path).inputs:
        if wanted.name.startswith("past_key_values") or wanted.name in (
            "attention_mask",
            "past_length",
            "input_length",
        ):
            continue
        shape = [d if isinstance(d, int) else 2 if "batch" in d else 16 for d in wanted.shape]
        integer = wanted.dtype == "int64"
        inputs[wanted.name] = (
            torch.randint(0, 100, shape, generator=generator) if integer else torch.randn(shape, generator=generator)
        )
    return inputs
