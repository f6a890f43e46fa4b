"""Quantize a checkpoint of a given shape, random weights made in place, and record peak memory and seconds.

    python tools/measure_memory.py --output tools/results/memory-llama-3.1-8b.json

By default the shape of Llama-3.1-8B: 32 blocks, vocabulary 128256, bfloat16, 16 GB. The bounds it is compared with are
1.2 x (one block in the compute dtype + its Hessians) + 600 MiB, and 6 GiB. Peak memory is what the kernel says of
the child process at its end (resident, pages of mapped files included); "anonymous" is sampled and leaves those out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import machine

SHAPE: dict[str, Any] = {
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
SIZES = {
    "blocks": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
}
"""Option -> field of the shape."""
POOL = 4_194_301
"""Random values made; every tensor is their repetition. A prime, so that no two rows are alike."""


def block_shapes(shape: dict[str, Any]) -> dict[str, list[int]]:
    """Parameters of one block of a Llama."""
    h, m = shape["hidden_size"], shape["intermediate_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linear = {"q_proj": [h, h], "k_proj": [kv, h], "v_proj": [kv, h], "o_proj": [h, h]}
    mlp = {"gate_proj": [m, h], "up_proj": [m, h], "down_proj": [h, m]}
    named = {f"self_attn.{n}.weight": s for n, s in linear.items()} | {f"mlp.{n}.weight": s for n, s in mlp.items()}
    return named | {"input_layernorm.weight": [h], "post_attention_layernorm.weight": [h]}


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """config.json and one shard per block, besides one for embedding, norm and head."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    pool = torch.randn(POOL).mul(0.02).to(torch.bfloat16)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", **shape}
    (folder / "config.json").write_text(json.dumps(config))
    h, v = shape["hidden_size"], shape["vocab_size"]
    files = {"outside": {"model.embed_tokens.weight": [v, h], "model.norm.weight": [h], "lm_head.weight": [v, h]}}
    for i in range(shape["num_hidden_layers"]):
        files[f"{i:05}"] = {f"model.layers.{i}.{name}": s for name, s in block_shapes(shape).items()}
    weight_map: dict[str, str] = {}
    for label, shapes in files.items():
        counts = {name: math.prod(s) for name, s in shapes.items()}
        values = {name: pool.repeat(-(-count // POOL))[:count].reshape(shapes[name]) for name, count in counts.items()}
        save_file(values, folder / f"model-{label}.safetensors")
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
    estimate = asdict(report.estimate) if report.estimate else None
    print(json.dumps({"estimate": estimate, "actual": asdict(report.actual)}))


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
    measured = {"seconds": round(seconds, 1), "peak_bytes": usage.ru_maxrss * 1024, "anonymous_bytes": anonymous}
    return measured | json.loads(text.splitlines()[-1])


def main() -> None:
    """Make the checkpoint, quantize it in a child process, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint, 16 GB and the result (default: /tmp)")
    numbers = {"samples": (2, "calibration windows"), "length": (64, "tokens of each")}
    numbers |= {option: (SHAPE[field], "of the model") for option, field in SIZES.items()}
    for option, (default, what) in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--effort", help="as tools/export.py has it (default: its default)")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    import numpy as np

    shape = SHAPE | {field: getattr(args, option) for option, field in SIZES.items()}
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
        "date": machine.now(),
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
    print(json.dumps(record, indent=2))
    if args.output:
        machine.write_json(args.output, record, indent=2)


def bounds(shape: dict[str, Any], dtype: str, measured: dict[str, Any]) -> dict[str, Any]:
    """What the peak may be, and whether it is; how far estimate and measurement are apart."""
    h, m = shape["hidden_size"], shape["intermediate_size"]
    block = sum(math.prod(s) for s in block_shapes(shape).values()) * (4 if dtype == "float32" else 2)
    hessians = 4 * (3 * h * h + m * m)  # q/k/v, o, gate/up, down
    bound = int(1.2 * (block + hessians)) + (600 << 20)
    estimate, actual = measured["estimate"], measured["actual"]
    return {
        "block_bytes": block,
        "moments_bytes": hessians,
        "bound_bytes": bound,
        "within_bound": measured["peak_bytes"] <= bound,
        "within_6_GiB": measured["peak_bytes"] <= 6 << 30,
        "estimate_over_actual": {k: round(estimate[k] / actual[k], 3) for k in actual} if estimate else None,
    }


if __name__ == "__main__":
    main()
