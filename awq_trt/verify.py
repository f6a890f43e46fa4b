"""Is what was exported what was meant? Accuracy of the rounded model, and agreement of the ONNX file with it.

The eager side runs block by block (blocks.py), so that verifying needs no more memory than quantizing. The ONNX side is
plain ONNX Runtime on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from awq_trt.accuracy import RoundedWeights, accuracy, eager_outputs, is_causal_lm
from awq_trt.awq import Settings
from awq_trt.blocks import Inputs, Weights
from awq_trt.calibration import HELD_OUT_TEXT, arrays, windows
from awq_trt.checkpoint import Checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.graph_facts import read_graph
from awq_trt.onnx_float32 import float32_copy
from awq_trt.quantized_checkpoint import open_quantized

AGREEMENT_TOKENS = 128
"""Tokens of held-out text whose every logit is compared."""

PROMPT = "The first thing to know about the sea is that"


@dataclass(frozen=True)
class Agreement:
    """The ONNX file in ONNX Runtime against the eager model with the rounded weights in fp32.

    Attributes:
        max_abs: largest difference of two logits. relative: |difference| / |eager| over all of them.
        top1: part of the positions with the same arg max. logits: how many were compared.
        generated: greedy continuation of the prompt by the ONNX file through its KV cache, "" for encoders.
        tokens, tokens_equal: tokens generated, and how many of them the eager model would have chosen.
    """

    max_abs: float
    relative: float
    top1: float
    logits: int
    generated: str = ""
    tokens: int = 0
    tokens_equal: int = 0


def onnx_session(path: Path) -> onnxruntime.InferenceSession:
    """The ONNX file in ONNX Runtime on the CPU, in the most exact arithmetic it has for 4-bit weights.

    A bfloat16 file is run as its copy with fp32 activations, because ONNX Runtime has no bfloat16 kernels for the CPU.
    Constants are not folded: folding unpacks all weights at once and holds every intermediate result, 31 bytes for each
    weight. So memory stays bounded, and each run unpacks anew.

    Raises:
        AwqTrtError: ONNX Runtime does not take the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    try:
        if not has_bfloat16(path):
            return _session(path, options)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".float32.") as folder:
            float32_copy(path, Path(folder) / path.name)
            return _session(Path(folder) / path.name, options)
    except AwqTrtError:
        raise
    except Exception as error:
        raise AwqTrtError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}") from error


def _session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    cpu = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(str(path), options, cpu, disabled_optimizers=["ConstantFolding"])


def has_bfloat16(path: Path) -> bool:
    """Whether the file has bfloat16 weights."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return any(t.data_type == onnx.TensorProto.BFLOAT16 for t in graph.initializer)


def run_onnx(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an exported model; a decoder's missing KV cache is empty, a missing attention mask is ones.

    Args:
        inputs: by name; "input_ids" [B, S], or "pixel_values", and so on. Those the file does not have are left out.
    """
    numpy_types = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {}
    for wanted in session.get_inputs():
        dtype = numpy_types.get(wanted.type)
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


def generate_onnx(session: onnxruntime.InferenceSession, prompt: np.ndarray, tokens: int) -> np.ndarray:
    """Greedy continuation through the KV cache: prompt int64 [1, S] -> int64 [tokens]."""
    output = run_onnx(session, {"input_ids": prompt})
    ids: list[int] = []
    for step in range(tokens):
        ids.append(int(output["logits"][0, -1].argmax()))
        cache = {n.replace("present", "past_key_values"): v for n, v in output.items() if n.startswith("present")}
        mask = np.ones((1, prompt.shape[1] + step + 1), np.int64)
        if step + 1 < tokens:
            output = run_onnx(session, {"input_ids": np.array([[ids[-1]]]), "attention_mask": mask, **cache})
    return np.array(ids)


def agreement(
    onnx_path: Path, weights: Weights, inputs: Sequence[Inputs], tokenizer: Any = None, tokens: int = 32
) -> Agreement:
    """Compare every output of the ONNX file with the eager model, and 32 greedy tokens for a decoder.

    The eager model reads prompt and continuation in one pass; the ONNX file made them one by one through its cache, so
    equal arg max at every position is the same as generating the same tokens.
    """
    session = onnx_session(onnx_path)
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
    ids = generate_onnx(session, prompt, tokens)
    whole = torch.from_numpy(np.concatenate([prompt[0], ids])[None])
    (logits,) = eager_outputs(weights, [{"input_ids": whole}])
    chosen = logits[0, prompt.shape[1] - 1 : -1].argmax(-1).numpy()
    equal = int((chosen == ids).sum())
    return Agreement(max_abs, relative, top1, count, PROMPT + tokenizer.decode(ids), tokens, equal)


def verify(
    onnx_path: Path, awq_dir: Path, original: Checkpoint | None, *, inputs: str | Path | None = None
) -> dict[str, Any]:
    """Everything that is known of an export's correctness, as plain data for the sidecar.

    Args:
        onnx_path, awq_dir: the export, and the quantized checkpoint it was made from. original: the checkpoint before
            quantization, None where it is not at hand (then no accuracy is measured).
        inputs: a .npz of model inputs for models without a tokenizer; text models read the held-out text.
    """
    quantized = open_quantized(awq_dir)
    if quantized.tokenizer is not None:
        samples = windows(HELD_OUT_TEXT, quantized.tokenizer, samples=8, length=512)
        short = [{"input_ids": samples[0]["input_ids"][:, :AGREEMENT_TOKENS]}]
    elif inputs is not None and str(inputs).endswith(".npz"):
        samples = arrays(inputs, 8)
        short = samples[:2]
    else:
        samples, short = [], [random_inputs(onnx_path)]
    held_out = {}
    if original is not None and samples:
        settings = Settings(quantized.report["group_size"], quantized.report["symmetric"], original.dtype)
        models: dict[str, Weights] = {
            "float": original,
            "rounding": RoundedWeights(original, settings),
            str(quantized.report["method"]): quantized,
        }
        if quantized.report["method"] == "rtn":
            del models["rounding"]
        held_out = accuracy(models, samples)
    return {
        "text": HELD_OUT_TEXT.name if quantized.tokenizer is not None else str(inputs),
        "held_out": {name: asdict(value) for name, value in held_out.items()},
        "onnx": asdict(agreement(onnx_path, quantized, short, quantized.tokenizer)),
    }


def random_inputs(onnx_path: Path) -> Inputs:
    """Random inputs of the shapes an ONNX file declares, for a model that came with none: 2 samples, 16 positions."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for wanted in read_graph(onnx_path).inputs:
        if wanted.name.startswith("past_key_values") or wanted.name == "attention_mask":
            continue
        shape = [d if isinstance(d, int) else 2 if "batch" in d else 16 for d in wanted.shape]
        integer = wanted.dtype == "int64"
        inputs[wanted.name] = (
            torch.randint(0, 100, shape, generator=generator) if integer else torch.randn(shape, generator=generator)
        )
    return inputs
