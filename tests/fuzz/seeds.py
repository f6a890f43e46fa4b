"""Small right files of every kind, made on the spot: what is mutated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoders
import numpy as np
import quantized_models
import stand_ins
import tiny_models
import tiny_onnx
import torch
from safetensors import safe_open


def small(folder: Path, **changes: Any) -> None:
    """A llama of one narrow block."""
    tiny_models.llama(folder, hidden_size=32, intermediate_size=64, num_hidden_layers=1, **changes)


def sharded(folder: Path) -> None:
    small(folder)
    tensors = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    from safetensors.torch import save_file

    names = sorted(tensors)
    weight_map = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )


def quantized_as(format: str) -> Callable[[Path], None]:
    """A checkpoint of one format: ours, and others' from ours by the layouts that formats.py reads."""

    def make(folder: Path) -> None:
        work = folder.with_name(folder.name + ".make")
        small(work / "float", tie_word_embeddings=False)
        save = "compressed-tensors" if format == "pack-quantized" else "awq"
        ours = quantized_models.rounded(work / "float", work / "ours", save_format=save, group=32)
        if format in PACKERS:
            pack, quantization = PACKERS[format]
            ours = quantized_models.repacked(ours, work / "theirs", pack, quantization)
        shutil.copytree(ours, folder, dirs_exist_ok=True)
        tiny_models.tokenizer().save_pretrained(folder)
        shutil.rmtree(work)

    return make


def _gptq(layer: Any) -> dict[str, torch.Tensor]:
    from awq_trt.checkpoint.formats import pack_nibbles

    zeros = torch.full(layer.scales.shape, 8, dtype=torch.uint8) if layer.zeros is None else layer.zeros
    qweight = torch.from_numpy(pack_nibbles(layer.q.numpy())).t().contiguous()
    return {
        "qweight": qweight,
        "qzeros": torch.from_numpy(pack_nibbles(zeros.t().contiguous().numpy())),
        "scales": layer.scales.t().contiguous(),
        "g_idx": torch.arange(layer.q.shape[1], dtype=torch.int32) // layer.group_size,
    }


def _modelopt(layer: Any) -> dict[str, torch.Tensor]:
    q = layer.q.numpy() ^ 8
    return {"weight": torch.from_numpy(q[::2] | q[1::2] << 4), "weight_scale": layer.scales.float()}


PACKERS: dict[str, tuple[Callable[[Any], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "gptq": (
        _gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2", "desc_act": False},
    ),
    "modelopt": (_modelopt, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 32}),
}


def make_gguf(folder: Path) -> None:
    """A llama of one block in F32 and Q8_0, with a vocabulary of 384 in its own tokenizer."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i % 26) * (1 + i // 26) for i in range(61))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(64)])
    writer.add_token_types([2, 3, 3, *[1] * 61])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (64, 32), "output_norm": (32,), "output": (64, 32), "blk.0.attn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (64, 32)}
    shapes |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if "ffn" in name and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_onnx(folder: Path) -> None:
    tiny_onnx.quantized(folder / "quantized.onnx", external=True)
    tiny_onnx.decoder(folder / "decoder.onnx")
    tiny_onnx.fixed_decoder(folder / "fixed.onnx")


def make_ort(folder: Path) -> None:
    tiny_onnx.fixed_decoder(folder / "fixed.onnx", layers=1)


def make_plan(folder: Path) -> None:
    tiny_models.tokenizer().save_pretrained(folder / "tokenizer")
    for name, make in (
        ("fixed", tiny_onnx.fixed_decoder),
        ("decoder", tiny_onnx.decoder),
        ("quantized", tiny_onnx.quantized),
    ):
        facts = {"tokenizer": "tokenizer"} if name == "fixed" else {}
        model = make(folder / f"{name}.onnx", **facts)
        stand_ins.plan_of(model, plugin=name == "quantized")


def make_records(folder: Path) -> None:
    times = [{"computeMs": 1.0 + i, "latencyMs": 2.0} for i in range(4)]
    layers = [{"count": 1}, *({"name": f"x{i}", "averageMs": 1.0, "medianMs": 1.0} for i in range(4))]
    gemm = {
        "settings": {"dtype": "float16", "device": "cuda", "tokens": [1, 64], "shapes": [
            {"n": 4096, "k": 4096, "group_size": 128, "layers": ["o"]}]},
        "hardware": [{"name": "NVIDIA H100"}],
        "date": "2026-11-20T00:00:00",
        "device": {"bandwidth": {"used": 1e12}, "peak": {"used": 1e14}},
        "rows": [{"method": m, "n": 4096, "k": 4096, "m": 1, "us": 5.0} for m in ("cublas", "awq_trt")],
    }  # fmt: skip
    for name, content in {"t.times.json": times, "l.layers.json": layers, "gemm.json": gemm}.items():
        (folder / name).write_text(json.dumps(content))


def make_calibration(folder: Path) -> None:
    tiny_models.tokenizer().save_pretrained(folder / "tokenizer")
    np.savez(folder / "x.npz", pixel_values=np.zeros((4, 3, 8, 8), np.float32))
    (folder / "x.txt").write_text("The sea is blue. " * 40)
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": "The sea is blue. " * 9}) for _ in range(4)))


def make_report(folder: Path) -> None:
    quantized_as("awq-gemm")(folder)
    row = {"alpha": 0.5, "weights": False, "folded_into": None, "error_rounding": 0.1, "error": 0.05, "clip": 1.0}
    row |= {"feedback": True, "tokens": 4096, "largest_activation": 3.0}
    report = json.loads((folder / "awq_trt.json").read_text()) | {
        "source": "tiny", "method": "awq", "clip": True, "feedback": True, "symmetric": False, "group_size": 32,
        "calibration": {"source": "a text", "windows": 8, "length": 512}, "pre_scales": 0, "folds": {},
        "layers": [{"name": f"model.layers.0.self_attn.{x}_proj"} | row for x in "qkvo"],
    }  # fmt: skip
    (folder / "awq_trt.json").write_text(json.dumps(report))


def make_generating(folder: Path) -> None:
    decoders.letters().save_pretrained(folder / "tokenizer")
    tiny_onnx.fixed_decoder(folder / "fixed.onnx", layers=1)
