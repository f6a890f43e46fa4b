"""The streaming writer, against safetensors itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq_trt.checkpoint import safetensors
from awq_trt.checkpoint.safetensors import DTYPES, open_safetensors, write_safetensors
from awq_trt.errors import AwqTrtError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"of.{name}": torch.randint(0, 2, (5, 3), generator=generator).to(dtype) for dtype, name in DTYPES.items()
    }
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "big": torch.randn(300, 70)}


def test_byte_for_byte_what_safetensors_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "PIECE", 1000)  # "big" goes in 22 pieces
    tensors = some_tensors()
    write_safetensors(tmp_path / "a.safetensors", tensors)
    save_file(tensors, tmp_path / "b.safetensors", metadata={"format": "pt"})
    for file in ("a", "b"):
        readers = open_safetensors(tmp_path / f"{file}.safetensors", "")
        assert all(torch.equal(readers[name](), tensor) for name, tensor in tensors.items())
    ours, theirs = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
    assert (tmp_path / "a.safetensors").stat().st_size == (tmp_path / "b.safetensors").stat().st_size
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_converted_and_transposed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "PIECE", 64)
    value = torch.randn(48, 20)
    write_safetensors(tmp_path / "a.safetensors", {"w": value.t()}, torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], value.t().to(torch.bfloat16))
    entry = open_safetensors(tmp_path / "a.safetensors", "m")["w"]
    assert (entry.shape, entry.dtype, entry.bytes) == ((20, 48), torch.bfloat16, 20 * 48 * 2)


@pytest.mark.parametrize("bad", [1e6, float("nan"), float("-inf")])
def test_overflow_leaves_no_file(tmp_path: Path, bad: float) -> None:
    value = torch.zeros(4, 4)
    value[3, 1] = bad
    with pytest.raises(AwqTrtError, match="tensor w overflows float16 .largest value .*dtype=.bfloat16"):
        write_safetensors(tmp_path / "a.safetensors", {"w": value}, torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 400, 10_000])
def test_truncated(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.randn(50, 50)})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(AwqTrtError, match=r"^m: shard a\.safetensors is truncated or damaged .*; download it again"):
        open_safetensors(path, "m")


MEASURE = """
import pathlib, resource, sys, torch
from awq_trt.checkpoint.safetensors import open_safetensors, write_safetensors
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4
path = pathlib.Path(sys.argv[1])
value = torch.ones(32 << 20)  # 128 MiB
write_safetensors(path, {"small": value[:1000]}, torch.float16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_safetensors(path, {name: value.view(1 << 10, -1) for name in "abc"}, torch.float16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
readers = open_safetensors(path, "")
before = resident()
for read in readers.values():
    assert read()[:, ::512].sum(dtype=torch.float32) == 1 << 16
print(resident() - before)
"""


def test_a_tensor_is_not_held_twice_and_none_stays_resident(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.safetensors")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    written, read = map(int, output.split())
    assert written < 24 << 10  # KiB; the tensor has 128 MiB, its copy in fp16 64
    assert read < 24 << 10  # three tensors of 64 MiB
