"""tools/estimate_speed.py: models' sizes, the fitted law on times whose law is known, and the sum of the parts."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import bench_gemm
import estimate_speed
import numpy as np
import pytest
from bench.gemm.shapes import MODELS, RANGES, Model, Shape, shapes
from bench.speed.law import Law, fit
from bench.speed.models import model_from
from bench.speed.prediction import decode_step, prefill_step, weight_bytes
from bench.speed.table import FLOAT, INT4, METHODS, Gpu, Table, tables
from gpu_check import UsageError

H100 = Gpu(3.0e12, 790e12)
LAWS = {INT4: Law(2.5, 0.85, 0.7, 2.5), FLOAT: Law(3.5, 0.9, 0.95, 4.0)}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def true_us(kind: str, shape: Shape, tokens: int, gpu: Gpu = H100) -> float:
    """By LAWS, with zero points; written out once more."""
    law = LAWS[kind]
    weights = shape.n * shape.k * (0.5 + 2.5 / shape.group_size) if kind == INT4 else 2 * shape.n * shape.k
    moved = (weights + 2 * tokens * (shape.n + shape.k)) / (gpu.bandwidth * law.bandwidth_fraction)
    flops = 2 * tokens * shape.n * shape.k / (gpu.peak * law.peak_fraction)
    return law.start_us + 1e6 * (moved**law.sharpness + flops**law.sharpness) ** (1 / law.sharpness)


def record(
    tokens: tuple[int, ...] = RANGES["all"],
    models: tuple[str, ...] = tuple(MODELS),
    noise: float = 0.0,
    **settings: Any,
) -> dict[str, Any]:
    """As bench_gemm.py writes it; a slower variant of the own kernels beside the true one, and a peer."""
    draw = random.Random(7)
    rows: list[dict[str, Any]] = []
    for shape in shapes(models):
        for m in tokens:
            cell = {"n": shape.n, "k": shape.k, "group_size": shape.group_size, "m": m, "variant": "default"}
            for kind, method in METHODS.items():
                rows.append(
                    cell | {"method": method, "us": true_us(kind, shape, m) * (1 + draw.uniform(-noise, noise))}
                )
            rows.append(rows[-2] | {"variant": "tactic 3", "us": 2 * rows[-2]["us"]})
            rows.append(cell | {"method": "humming", "us": 0.01})
            rows.append(cell | {"method": "awq_trt", "variant": "tactic 4", "problem": "no such tactic"})
    return {
        "date": "2026-01-02T00:00:00+00:00", "hardware": [{"name": "A GPU"}],
        "settings": {"device": "cuda", "dtype": "float16", "symmetric": False} | settings,
        "device": {"bandwidth": {"used": H100.bandwidth}, "peak": {"used": H100.peak}},
        "rows": rows, "targets": {}, "refusals": {}, "not_run": [], "seconds": 1.0,
    }  # fmt: skip


def written(path: Path, content: dict[str, Any] | list[Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def run(tmp_path: Path, *options: object, model: object = "Llama-3.1-8B") -> dict[str, Any]:
    output = tmp_path / "speed.json"
    assert estimate_speed.main([str(o) for o in ("--model", model, "--output", output, *options)]) == 0
    return json.loads(output.read_text())


def said(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    assert estimate_speed.main([str(o) for o in options]) == 2
    words = capsys.readouterr().err
    assert words.startswith("estimate_speed: ")
    assert words.count("\n") == 1
    return words


@pytest.mark.parametrize("kind", [INT4, FLOAT])
def test_the_law_is_found_again(kind: str) -> None:
    cells = {(s, m): true_us(kind, s, m) for s in shapes() for m in RANGES["all"]}
    found = Table(kind, False, H100, cells)
    for name in ("start_us", "bandwidth_fraction", "peak_fraction", "sharpness"):
        assert getattr(found.law, name) == pytest.approx(getattr(LAWS[kind], name), rel=1e-3), name
    errors = found.errors()
    assert [e["tokens"] for e in errors] == [[1, 32], [64, 256], [512, 8192]]
    assert [e["cells"] for e in errors] == [14 * 7, 14 * 3, 14 * 5]
    assert max(e["worst"] for e in errors) < 1e-3


def test_noise_stays_noise_on_shapes_not_fitted_to(tmp_path: Path) -> None:
    found, _ = tables([written(tmp_path / "r.json", record(noise=0.1))], allow_made_up=False)
    for kind in (INT4, FLOAT):
        for e in found[kind].errors():
            assert 0.02 < e["median"] < 0.07, "of +-10% evenly spread: 5%"
            assert e["worst"] < 0.15
        assert found[kind].law.bandwidth_fraction == pytest.approx(LAWS[kind].bandwidth_fraction, rel=0.05)
        assert found[kind].law.peak_fraction == pytest.approx(LAWS[kind].peak_fraction, rel=0.05)


def test_errors_are_of_shapes_left_out() -> None:
    """A shape three times slower than the law of the others shows its whole error: it must not bend its own law."""
    cells = {(s, m): true_us(INT4, s, m) for s in shapes() for m in RANGES["all"]}
    odd = next(s for s in shapes() if (s.n, s.k) == (8192, 8192))
    slow = {key: us * (3 if key[0] == odd else 1) for key, us in cells.items()}
    held_out = Table(INT4, False, H100, slow).held_out()
    assert set(held_out) == set(cells)
    assert all(error == pytest.approx(-2 / 3, abs=1e-3) for (shape, _), error in held_out.items() if shape == odd)
    assert all(e["worst"] >= 2 / 3 for e in Table(INT4, False, H100, slow).errors())


def test_fit_of_times_that_say_little() -> None:
    """All the same, and of one resource only: finite numbers within their bounds, and the times themselves."""
    ones = np.ones(10)
    law = fit(np.linspace(1e-3, 2e-3, 10), np.linspace(1e-4, 2e-4, 10), ones)
    assert law.us(1e-3, 1e-4) == pytest.approx(1, rel=0.01)
    bytes_us = np.geomspace(3, 300, 20)
    law = fit(bytes_us, bytes_us / 1e3, 2 + bytes_us / 0.8)
    assert (law.start_us, law.bandwidth_fraction) == pytest.approx((2, 0.8), rel=0.02)
    assert 0.01 <= law.peak_fraction <= 2
    assert 1 < law.sharpness < 31.1
    impossible = fit(np.geomspace(1, 100, 10), np.geomspace(1, 100, 10), ones)
    assert max(impossible.bandwidth_fraction, impossible.peak_fraction) <= 2 + 1e-9, "no GPU is so far above itself"


def test_measured_times_are_taken_and_others_fitted(tmp_path: Path) -> None:
    """A cell that is off the law keeps its time; a GPU twice as fast in all halves all but the start."""
    made = record()
    for row in made["rows"]:
        if (row["method"], row["n"], row["k"], row["m"]) == ("awq_trt", 4096, 4096, 1) and "us" in row:
            row["us"] *= 1.5
    found, _ = tables([written(tmp_path / "r.json", made)], allow_made_up=False)
    table, shape = found[INT4], Shape(4096, 4096, 128, ("some layer",))
    assert table.us(shape, 1, H100) == (pytest.approx(1.5 * true_us(INT4, shape, 1)), True)
    law = float(table.law.us(*table.floors(shape, 1, H100)))
    twice = Gpu(2 * H100.bandwidth, 2 * H100.peak)
    expected = 1.5 * true_us(INT4, shape, 1) * (table.law.start_us + (law - table.law.start_us) / 2) / law
    assert table.us(shape, 1, twice) == (pytest.approx(expected), True)
    for other, tokens in ((Shape(5120, 5120, 128), 1), (shape, 48), (Shape(4096, 4096, 64), 1)):
        us, measured = table.us(other, tokens, H100)
        assert not measured
        assert us == pytest.approx(true_us(INT4, other, tokens), rel=0.05)
    assert found[FLOAT].us(Shape(4096, 4096, 64), 1, H100)[1], "16 bits have no groups"


def test_parts_of_a_step_by_hand() -> None:
    """Round numbers: 1 GB/s and 1 TFLOP/s, two blocks, every layer 10 us."""
    model = Model(hidden=64, query=128, key=32, mlp=256, blocks=2, vocabulary=1000, group_size=64)
    cells = {(Shape(n, k, k), m): 10.0 for n, k in model.layers().values() for m in (1, 4, 100)}
    gpu = Gpu(1e9, 1e12)
    table = Table(FLOAT, False, gpu, cells)
    step = decode_step(model, table, gpu, batch=4, context=99)
    assert (step.linears, step.measured, step.layers) == (2 * 4 * 10, 4, 4)
    assert step.attention == pytest.approx(2 * 2 * (2 * 32 * 4 * 100 + 2 * 128 * 4) / 1e3)
    assert step.head == pytest.approx(2 * (1000 * 64 + 4 * 1000 + 4 * 64) / 1e3)
    assert step.elementwise == pytest.approx(2 * 4 * (2 * (10 * 64 + 3 * 256 + 2 * 160) + 4 * 64) / 1e3)
    assert step.us == step.linears + step.attention + step.head + step.elementwise
    assert step.as_json(4)["tokens_per_second"] == pytest.approx(4e6 / step.us, rel=1e-4)
    assert step.as_json(4)["measured_layers"] == "4 of 4"
    step = prefill_step(model, table, gpu, 100)
    assert step.attention == pytest.approx(2 * 2 * 2 * 160 * 100 / 1e3), "bytes take longer than 2*128*100*101 flops"
    assert step.head == pytest.approx(2 * (1000 * 64 + 1000 + 64) / 1e3), "one token"
    slow = Gpu(1e9, 1e9)
    step = prefill_step(model, Table(FLOAT, False, slow, cells), slow, 100)
    assert step.attention == pytest.approx(2 * 2 * 128 * 100 * 101 / 1e3), "now flops do"
    layers = sum(n * k for n, k in model.layers().values())
    assert weight_bytes(model, table) == 2 * (2 * 1000 * 64 + 2 * layers)
    assert weight_bytes(MODELS["SmolLM2-135M"], table) == pytest.approx(269e6, rel=0.01), "tied: one embedding"
    int4 = Table(INT4, False, gpu, {})
    assert weight_bytes(model, int4) == 2 * 2 * 1000 * 64 + 2 * layers * (0.5 + 2.5 / 64)


def test_estimate_of_a_known_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its name, its config.json and the directory: the same; the linear layers are the record's own times."""
    path = written(tmp_path / "r.json", record())
    result = run(tmp_path, "--record", path)
    out = capsys.readouterr().out
    assert "MADE UP" not in out
    assert "another bandwidth" not in out
    assert "1 to   32 tokens: median 0.0%, worst 0.0%; 98 cells" in out
    assert [(e["batch"], e["context"]) for e in result["decode"]] == [(b, c) for b in (1, 8, 32) for c in (1024, 8192)]
    assert [e["prompt"] for e in result["prefill"]] == [128, 1024, 8192]
    assert result["weights_gb"] == {"int4": pytest.approx(5.7, abs=0.1), "float": pytest.approx(16.06, abs=0.01)}
    for entry in result["decode"]:
        for kind in (INT4, FLOAT):
            layers = [Shape(n, k, 128) for n, k in MODELS["Llama-3.1-8B"].layers().values()]
            linears = 32 * sum(true_us(kind, s, entry["batch"]) for s in layers)
            assert entry[kind]["parts_us"]["linears"] == pytest.approx(linears, rel=1e-3)
            assert entry[kind]["measured_layers"] == "4 of 4"
            assert entry[kind]["us"] == pytest.approx(sum(entry[kind]["parts_us"].values()), abs=0.05)
    first = result["decode"][0]
    assert 100 < first["float"]["tokens_per_second"] < 3e12 / 16.06e9, "below what the weights' bytes allow"
    assert first["times_faster"] == pytest.approx(first["float"]["us"] / first["int4"]["us"], abs=1e-3)
    config = written(tmp_path / "config.json", CONFIG)
    for model in (config, tmp_path):
        again = run(tmp_path, "--record", path, model=model)
        assert {k: v for k, v in again.items() if k != "model"} == {k: v for k, v in result.items() if k != "model"}
    half = run(tmp_path, "--record", path, "--bandwidth", 1500, "--peak", 395)
    assert "no measurement says" in capsys.readouterr().out
    assert half["gpu"] == {"bandwidth": 1.5e12, "peak": 395e12}
    for entry, before in zip(half["prefill"], result["prefill"], strict=True):
        assert entry["int4"]["us"] == pytest.approx(2 * before["int4"]["us"], rel=0.06)
        assert entry["int4"]["parts_us"]["head"] == pytest.approx(2 * before["int4"]["parts_us"]["head"], abs=0.02)


def test_two_records_of_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decode = written(tmp_path / "d.json", record(RANGES["decode"]))
    prefill = written(tmp_path / "p.json", record(RANGES["prefill"]))
    both = run(tmp_path, "--record", decode, prefill)
    whole = run(tmp_path, "--record", written(tmp_path / "w.json", record()))
    assert [both[k] for k in ("decode", "prefill", "laws")] == [whole[k] for k in ("decode", "prefill", "laws")]
    alone = run(tmp_path, "--record", decode)
    assert alone["prefill"] == []
    assert alone["not_estimated_tokens"] == [128, 1024, 8192]
    assert "8192 tokens: not estimated, the records have 1 to 32" in capsys.readouterr().out
    common = ("--model", "Qwen3-8B", "--record", decode)
    assert "none of these batches" in said(capsys, *common, "--batch", "64", "--prompt", "64")
    for change, words in (({"dtype": "bfloat16"}, "another dtype"), ({"symmetric": True}, "another zero points")):
        other = written(tmp_path / "o.json", record(**change))
        assert f"{other}: {words} than in {decode}" in said(capsys, *common, other)
    elsewhere = written(tmp_path / "o.json", record() | {"hardware": [{"name": "Another GPU"}]})
    assert "another GPU than in" in said(capsys, *common, elsewhere)


def test_a_dry_run_is_refused_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dry.json"
    command = ["bench_gemm.py", "--dry-run", "--methods", "awq_trt", "cublas", "--tokens", "1", "8", "32", "64", "128",
               "--output", str(path)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    assert bench_gemm.main() == 0
    capsys.readouterr()
    assert f"{path}: its times are made up" in said(capsys, "--model", "Qwen3-8B", "--record", path)
    result = run(tmp_path, "--record", path, "--made-up")
    assert capsys.readouterr().out.startswith("MADE UP: ")
    assert result["measured_on"]["made_up"] is True
    assert result["decode"][0]["int4"]["measured_layers"] == "0 of 4"


def test_records_that_are_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(content: Any) -> str:
        return said(capsys, "--model", "Qwen3-8B", "--record", written(tmp_path / "r.json", content))

    assert "No such file" in said(capsys, "--model", "Qwen3-8B", "--record", tmp_path / "nowhere.json")
    assert "no date, hardware, settings" in refused({})
    assert "0 timed cells of awq_trt, of 0 shapes: 8 of two shapes are needed" in refused(record() | {"rows": []})
    assert "no device in it" in refused({k: v for k, v in record().items() if k != "device"})
    one_shape = record()
    one_shape["rows"] = [r for r in one_shape["rows"] if (r["n"], r["k"]) == (4096, 4096)]
    assert "15 timed cells of awq_trt, of 1 shapes" in refused(one_shape)
    only_own = record()
    only_own["rows"] = [r for r in only_own["rows"] if r["method"] != "cublas"]
    assert "0 timed cells of cublas" in refused(only_own)
    for field, value in (("group_size", None), ("us", 0), ("us", float("nan")), ("variant", None), ("n", "4096")):
        broken = record()
        if value is None:
            del broken["rows"][0][field]
        else:
            broken["rows"][0][field] = value
        assert "a row of awq_trt without sound n, k, m, group_size, variant or us" in refused(broken)


def test_options_that_are_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "r.json", record())
    for option, value in (("bandwidth", "-1"), ("peak", "nan"), ("batch", "0"), ("context", "-5"), ("prompt", "0")):
        words = said(capsys, "--model", "Qwen3-8B", "--record", path, f"--{option}={value}")
        assert f"--{option} {value}" in words
        assert "must be above 0" in words


def test_models_from_their_fields(tmp_path: Path) -> None:
    def model(**changes: Any) -> Model:
        config = {k: v for k, v in (CONFIG | changes).items() if v is not None}
        return model_from(str(written(tmp_path / "config.json", config)))

    assert model() == model_from("Llama-3.1-8B") == MODELS["Llama-3.1-8B"]
    assert model(num_key_value_heads=None).key == 4096
    assert model(head_dim=256).query == 8192
    assert model(intermediate_size=64 * 101).group_size == 64
    assert model(tie_word_embeddings=True).tied
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": CONFIG}
    assert model_from(str(written(tmp_path / "config.json", nested))) == model()
    for changes, words in (
        ({"num_local_experts": 8}, "num_local_experts is 8: mixtures of experts are not estimated"),
        ({"n_routed_experts": 64}, "mixtures of experts"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is no decoder"),
        ({"hidden_size": None, "vocab_size": None}, "no hidden_size, vocab_size: give the config.json"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": 14337}, "no group size divides"),
    ):
        with pytest.raises(UsageError, match=f"config.json: .*{words}"):
            model(**changes)
    assert model(num_local_experts=1) == model(num_experts=0) == model()
    with pytest.raises(UsageError, match="nowhere: no such file; give a config.json, its directory, or one of Llama"):
        model_from(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="not a model's configuration"):
        model_from(str(written(tmp_path / "config.json", [])))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        model_from(str(tmp_path))


def test_help_says_that_nothing_is_recorded_yet(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        estimate_speed.main(["--help"])
    assert "none is recorded in this repository so far" in capsys.readouterr().out
