"""Quantize a checkpoint of a given shape, random weights made in place, and record peak memory and seconds.

    python tools/measure_memory.py --output tools/results/memory-llama-3.1-8b.json

By default the shape of Llama-3.1-8B: 32 blocks, vocabulary 128256, bfloat16, 16 GB. The bounds it is compared with are
1.2 x (one block in the compute dtype + its second moments) + 600 MiB, and 6 GiB. Peak memory is what the kernel says of
the child process at its end (resident, pages of mapped files included); "anonymous" is sampled and leaves those out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
POOL = 4_194_301
"""Random values made; tensors are cut out of their repetition. A prime, so that no two rows are alike."""


def block_shapes(shape: dict[str, Any]) -> dict[str, list[int]]:
    """Parameters of one block of a Llama."""
    h, m = shape["hidden_size"], shape["intermediate_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linear = {"q_proj": [h, h], "k_proj": [kv, h], "v_proj": [kv, h], "o_proj": [h, h]}
    mlp = {"gate_proj": [m, h], "up_proj": [m, h], "down_proj": [h, m]}
    named = {f"self_attn.{n}.weight": s for n, s in linear.items()} | {f"mlp.{n}.weight": s for n, s in mlp.items()}
    return named | {"input_layernorm.weight": [h], "post_attention_layernorm.weight": [h]}


def write_shard(path: Path, shapes: dict[str, list[int]], pool: bytes) -> None:
    """A safetensors file of bfloat16 tensors, cut out of the repeated `pool`; nothing larger than it in memory."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while end:
            end -= file.write(pool[:end])


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """config.json and one shard per block, besides one for embedding, norm and head."""
    import torch

    torch.manual_seed(0)
    pool = torch.randn(POOL).mul(0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", **shape}
    (folder / "config.json").write_text(json.dumps(config))
    h, v = shape["hidden_size"], shape["vocab_size"]
    files = {"outside": {"model.embed_tokens.weight": [v, h], "model.norm.weight": [h], "lm_head.weight": [v, h]}}
    for i in range(shape["num_hidden_layers"]):
        files[f"{i:05}"] = {f"model.layers.{i}.{name}": s for name, s in block_shapes(shape).items()}
    weight_map: dict[str, str] = {}
    for label, shapes in files.items():
        write_shard(folder / f"model-{label}.safetensors", shapes, pool)
        weight_map |= dict.fromkeys(shapes, f"model-{label}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def child(options: dict[str, Any]) -> None:
    """In a process of its own: quantize, and print estimate and measurement as JSON on the last line."""
    from dataclasses import asdict

    import torch
    from rich.console import Console

    from awq_trt.awq.config import QuantizeConfig
    from awq_trt.awq.quantize import quantize

    options["compute_dtype"] = getattr(torch, options["compute_dtype"])
    model, output = options.pop("model"), options.pop("output")
    report = quantize(model, Path(output), QuantizeConfig(**options), console=Console(stderr=True))
    print(
        json.dumps({"estimate": asdict(report.estimate) if report.estimate else None, "actual": asdict(report.actual)})
    )


def watch(command: list[str]) -> dict[str, Any]:
    """Run a command: seconds, peak resident and peak anonymous bytes, and the JSON on its last line."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    status, anonymous = Path(f"/proc/{process.pid}/status"), 0
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        anonymous = max(anonymous, int(lines.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.02)
    seconds = time.monotonic() - started
    assert process.stdout is not None
    text = process.stdout.read()
    if code:
        sys.exit(f"the run failed: {text}")
    peak = usage.ru_maxrss * 1024
    return {"seconds": round(seconds, 1), "peak_bytes": peak, "anonymous_bytes": anonymous} | json.loads(
        text.splitlines()[-1]
    )


def main() -> None:
    """Make the checkpoint, quantize it in a child process, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint, 16 GB and the result (default: /tmp)")
    parser.add_argument("--blocks", type=int, default=SHAPE["num_hidden_layers"], help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"], help="(default: %(default)s)")
    parser.add_argument("--intermediate", type=int, default=SHAPE["intermediate_size"], help="(default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=SHAPE["vocab_size"], help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="calibration windows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens each (default: %(default)s)")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--effort", help="as tools/export.py has it (default: its default)")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    import numpy as np

    sizes = {"hidden_size": args.hidden, "intermediate_size": args.intermediate, "vocab_size": args.vocabulary}
    shape = SHAPE | sizes | {"num_hidden_layers": args.blocks}
    folder = Path(tempfile.mkdtemp(prefix="measure_memory.", dir=args.folder))
    try:
        (folder / "model").mkdir()
        make_checkpoint(folder / "model", shape)
        ids = np.random.default_rng(0).integers(0, args.vocabulary, (args.samples, args.length))
        np.savez(folder / "ids.npz", input_ids=ids)
        options = {
            "model": str(folder / "model"),
            "output": str(folder / "quantized"),
            "calibration": str(folder / "ids.npz"),
            "calibration_samples": args.samples,
            "compute_dtype": args.compute_dtype,
        }
        options |= {"effort": args.effort} if args.effort else {}
        measured = watch([sys.executable, __file__, "--child", json.dumps(options)])
        written = sum(f.stat().st_size for f in (folder / "quantized").iterdir())
        read = sum(f.stat().st_size for f in (folder / "model").iterdir())
    finally:
        shutil.rmtree(folder)
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "shape": shape,
        "options": {k: v for k, v in vars(args).items() if k not in ("output", "folder", "child")},
        "checkpoint_bytes": read,
        "quantized_bytes": written,
        **measured,
        "bounds": bounds(shape, args.compute_dtype, measured),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")


def bounds(shape: dict[str, Any], dtype: str, measured: dict[str, Any]) -> dict[str, Any]:
    """What the peak may be, and whether it is; how far estimate and measurement are apart."""
    h, m = shape["hidden_size"], shape["intermediate_size"]
    block = sum(math.prod(s) for s in block_shapes(shape).values()) * (4 if dtype == "float32" else 2)
    moments = 4 * (3 * h * h + m * m)  # q/k/v, o, gate/up, down
    bound = int(1.2 * (block + moments)) + (600 << 20)
    estimate, actual = measured["estimate"], measured["actual"]
    return {
        "block_bytes": block,
        "moments_bytes": moments,
        "bound_bytes": bound,
        "within_bound": measured["peak_bytes"] <= bound,
        "within_6_GiB": measured["peak_bytes"] <= 6 << 30,
        "estimate_over_actual": {k: round(estimate[k] / actual[k], 3) for k in actual} if estimate else None,
    }


if __name__ == "__main__":
    main()
