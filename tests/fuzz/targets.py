"""What is fuzzed: for each reader the files that it reads, and what its answer is compared with."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import commands
import numpy as np
import seeds
import tiny_models
import torch
import transformers
from safetensors import safe_open
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from awq_trt.awq import calibration
from awq_trt.checkpoint.directory import load_tokenizer, stored_tensors, token_ids
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import is_quantized, open_quantized
from awq_trt.checkpoint.safetensors import open_safetensors
from awq_trt.cli.main import COMMANDS
from awq_trt.engine import build_process, check, memory, sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.html_report import write_html_report
from awq_trt.evaluate.records import read_record
from awq_trt.export.metadata import external_files, optimization_profiles, read_graph
from awq_trt.serve.open import open_decoder
from awq_trt.serve.triton.repository import write_triton_repo

for module in ("llama", "gpt2", "bert"):  # before processes are forked, or each would take seconds for it
    importlib.import_module(f"transformers.models.{module}.modeling_{module}")
for module in ("awq.quantize", "export.export", *(f"cli.{name}" for name in COMMANDS)):
    importlib.import_module(f"awq_trt.{module}")
for module in ("onnxscript.function_libs.torch_lib.ops", "matplotlib.figure", "matplotlib.backends.backend_svg"):
    importlib.import_module(module)
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()

Read = Callable[[Path, Path], Any]
Judge = Callable[[Path, Path, Any], str]
"""Folder, mutated file, what was read -> "" or what is wrong with it."""


@dataclass(frozen=True)
class Target:
    """A reader."""

    make: Callable[[Path], object]  # its files, in a folder
    files: tuple[str, ...]  # patterns of those that are mutated
    read: Read
    weight: float  # share of the cases
    judge: Judge | None = None
    judged: float = 1.0  # part of the accepted cases that the judge sees
    clean: tuple[str, ...] = ()  # what reading leaves
    seconds: int = 1  # times as many as other readers may take: an accepted checkpoint is exported


def read_safetensors(folder: Path, file: Path) -> dict[str, torch.Tensor]:
    return {name: read() for name, read in open_safetensors(folder / file, str(folder)).items()}


def same_tensors(folder: Path, file: Path, found: dict[str, torch.Tensor]) -> str:
    """Against safetensors itself."""
    with safe_open(folder / file, "pt") as theirs:
        expected = {name: theirs.get_tensor(name) for name in theirs.keys()}  # noqa: SIM118
    return _differ(found, expected)


def _differ(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    if found.keys() != expected.keys():
        return f"other names: {sorted(found.keys() ^ expected.keys())[:3]}"
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype or found[name].shape != tensor.shape:
            return f"{name}: {found[name].dtype} {found[name].shape}, not {tensor.dtype} {tensor.shape}"
        if found[name].contiguous().view(torch.uint8).ne(tensor.contiguous().view(torch.uint8)).any():
            return f"{name}: other values"
    return ""


def read_index(folder: Path, _: Path) -> dict[str, torch.Tensor]:
    return {name: read() for name, read in stored_tensors(folder, str(folder)).items()}


def same_shards(folder: Path, _: Path, found: dict[str, torch.Tensor]) -> str:
    """All that the named shards hold, as transformers merges them, whatever shard the index says."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    expected = {}
    for shard in sorted(set(weight_map.values())):
        with safe_open(folder / shard, "pt") as theirs:
            expected |= {name: theirs.get_tensor(name) for name in theirs.keys()}  # noqa: SIM118
    return _differ(found, expected)


def read_checkpoint(folder: Path, _: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.readers:
        checkpoint.tensor(name)
    return checkpoint


def same_model(folder: Path, _: Path, checkpoint: Any) -> str:
    """Against transformers' own loader."""
    cls = getattr(transformers, checkpoint.config.architectures[0])
    model = cls.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        value = parameter.t() if name in checkpoint.transposed else parameter
        if not torch.equal(checkpoint.tensor(name), value):
            return f"{name} is not what transformers loads"
    return ""


def read_tokenizer(folder: Path, _: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    return tokenizer and token_ids(tokenizer, "The sea is blue.")


def read_linears(folder: Path, _: Path) -> Any:
    if not is_quantized(folder):
        return read_checkpoint(folder, _)
    quantized = open_quantized(folder)
    for name in quantized.linears:
        quantized.linears[name].dequantize()
    for name in quantized.readers:
        quantized.tensor(name)
    return quantized


def read_gguf(folder: Path, file: Path) -> Any:
    checkpoint = open_checkpoint(folder / file)
    for name in checkpoint.readers:
        checkpoint.tensor(name)
    return checkpoint


def same_gguf(folder: Path, file: Path, checkpoint: Any) -> str:
    model = transformers.AutoModelForCausalLM.from_config(checkpoint.config)
    theirs = load_gguf_checkpoint(folder / file, return_tensors=True, model_to_load=model)["tensors"]
    for name, tensor in theirs.items():
        if name in checkpoint.readers and not torch.equal(checkpoint.tensor(name).float(), tensor.float()):
            return f"{name} is not what transformers loads"
    return ""


def read_onnx(folder: Path, file: Path) -> Any:
    if file.suffix != ".onnx":
        file = Path("quantized.onnx")
    graph = read_graph(folder / file)
    profiles = optimization_profiles(graph, 2, None)
    external_files(folder / file)
    memory.activation_bytes(folder / file, profiles)
    return graph


def read_ort(folder: Path, file: Path) -> Any:
    with open_decoder(folder / file, max_batch=1, threads=1) as decoder:
        one = np.ones((1, 1), np.int64)
        return decoder.run(0, one, one[0] * 0, one[0])


def read_plan(folder: Path, file: Path) -> Any:
    plan = folder / file.name.removesuffix(".json")
    content = sidecar.read_sidecar(folder / file)
    check.check(plan)
    return content


def read_page(folder: Path, file: Path) -> Any:
    write_html_report(folder / "page.html", engine=folder / file.name.removesuffix(".json"))


def read_repository(folder: Path, file: Path) -> Any:
    return write_triton_repo(folder / file.name.removesuffix(".json"), folder / "repository")


def same_json(folder: Path, file: Path, content: Any) -> str:
    expected = json.loads((folder / file).read_text())
    return "" if json.dumps(content) == json.dumps(expected) else "not what the file says"


def read_calibration(folder: Path, file: Path) -> Any:
    if file.suffix == ".npz":
        return calibration.arrays(folder / file, 4)
    return calibration.windows(
        folder / file, transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"), samples=2, length=16
    )


class Builder:
    """TensorRT's configuration, as far as a timing cache goes: it knows its own by their beginning."""

    def create_timing_cache(self, blob: bytes) -> object | None:
        return blob if blob.startswith(b"mine") or not blob else None

    def set_timing_cache(self, cache: object, ignore_mismatch: bool) -> bool:
        return True


def command(*arguments: object) -> str:
    """`awq-trt` in this process; a refusal as the error that it is."""
    result = commands.command(*arguments)
    if result.returncode == 2 and result.stderr.startswith(("error: ", "usage: ")) and "Traceback" not in result.stderr:
        raise AwqTrtError(result.stderr)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"exit code {result.returncode}: {result.stderr}")
    return result.stdout


def read_report_command(folder: Path, _: Path) -> str:
    return command("report", folder, "--html", folder / "page.html", "--full")


def read_plan_command(folder: Path, file: Path) -> str:
    plan = folder / file.name.removesuffix(".json")
    command("check", plan)
    command("report", plan, "--html", folder / "p.html")
    return command("triton", plan, "--output", folder / "repository")


def read_onnx_command(folder: Path, _: Path) -> str:
    model, tokenizer = folder / "fixed.onnx", ("--tokenizer", folder / "tokenizer")
    command("triton", model, "--output", folder / "repository", *tokenizer)
    return command("generate", model, *tokenizer, "--prompt", "sea", "--max-tokens", 2)


def read_quantize_command(folder: Path, _: Path) -> str:
    return command("quantize", folder, "--output", f"{folder}.awq", "--method", "rtn", "--quiet")


def read_export_command(folder: Path, _: Path) -> str:
    return command("onnx", folder, "--output", folder / "out.onnx", "--no-verify", "--quiet", "--max-seq", 32)


def versions() -> dict[str, str]:
    names = ("awq_trt", "transformers", "torch", "safetensors", "tokenizers", "gguf", "onnx", "onnxruntime", "pydantic")
    return {name: metadata.version(name) for name in names}


SIDECARS = ("*.plan.json",)
TARGETS = {
    "safetensors": Target(seeds.small, ("model.safetensors",), read_safetensors, 20, same_tensors),
    "index": Target(seeds.sharded, ("*.index.json", "model-00001-of-00002.safetensors"), read_index, 12, same_shards),
    "config": Target(seeds.small, ("config.json", "generation_config.json"), read_checkpoint, 10, same_model, 0.3),
    "gpt2": Target(tiny_models.gpt2, ("config.json",), read_checkpoint, 2, same_model, 0.3),
    "bert": Target(tiny_models.bert, ("config.json",), read_checkpoint, 2, same_model, 0.3),
    "tokenizer": Target(seeds.small, ("tokenizer*.json", "special_tokens_map.json"), read_tokenizer, 6),
    **{
        f"quantized {name}": Target(seeds.quantized_as(name), ("*.json", "*.safetensors"), read_linears, 4)
        for name in ("awq-gemm", "gptq", "pack-quantized", "modelopt")
    },
    "gguf": Target(seeds.make_gguf, ("*.gguf",), read_gguf, 6, same_gguf, 0.3),
    "onnx": Target(seeds.make_onnx, ("*.onnx",), read_onnx, 12),
    "decoder": Target(seeds.make_ort, ("*.onnx",), read_ort, 3),
    "sidecar": Target(seeds.make_plan, SIDECARS, read_plan, 12, same_json),
    "page": Target(seeds.make_plan, SIDECARS, read_page, 3, clean=("page.html",)),
    "repository": Target(seeds.make_plan, SIDECARS, read_repository, 4, clean=("repository",)),
    "records": Target(seeds.make_records, ("*.json",), lambda folder, file: read_record(folder / file), 4),
    "timing cache": Target(
        lambda folder: (folder / "x.cache").write_bytes(b"mine" * 100),
        ("x.cache",),
        lambda folder, file: build_process._timing_cache(Builder(), str(folder / file)),
        1,
    ),
    "report": Target(seeds.make_report, ("awq_trt.json",), read_report_command, 1, clean=("page.html",)),
    "command check": Target(seeds.make_plan, SIDECARS, read_plan_command, 1, clean=("repository", "p.html")),
    "command generate": Target(
        seeds.make_generating, ("*.onnx", "tokenizer/*.json"), read_onnx_command, 0.5, clean=("repository",)
    ),
    "command quantize": Target(
        seeds.small, ("*.json", "*.safetensors"), read_quantize_command, 0.3, clean=("../command quantize.awq",)
    ),
    "command onnx": Target(
        seeds.quantized_as("awq-gemm"),
        ("*.json", "*.safetensors"),
        read_export_command,
        0.2,
        clean=("out.onnx", "out.onnx.data"),
        seconds=6,
    ),
    "calibration": Target(seeds.make_calibration, ("x.*",), read_calibration, 2),
}
