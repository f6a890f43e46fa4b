"""Models that have no ONNX form are refused before anything is quantized, and the trace made then serves the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import onnx
import pytest
import torch
import transformers as t
from commands import export

from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.export import exportable
from awq_trt.export.export import export_onnx
from awq_trt.export.exportable import check_exportable
from awq_trt.export.interface import DecoderOptions

G, VOCABULARY = families.GQA, {"vocab_size": 384}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
STATE = "keeps more than keys and values in layer"

REFUSED: dict[str, tuple[t.PretrainedConfig, str]] = {
    "MambaForCausalLM": (
        t.MambaConfig(**VOCABULARY, hidden_size=64, state_size=16, num_hidden_layers=2), "takes no past_key_values",
    ),
    "JambaForCausalLM": (
        t.JambaConfig(
            **{**G, "num_hidden_layers": 4}, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
            expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=16, mamba_dt_rank=4,
        ),
        rf"JambaForCausalLM {STATE} 0 \(LinearAttentionLayer",
    ),
    "Lfm2ForCausalLM": (t.Lfm2Config(**G, layer_types=["full_attention", "conv"], block_ff_dim=128), f"{STATE} 1"),
    "BambaForCausalLM": (t.BambaConfig(**G, attn_layer_indices=[1], **MAMBA), f"{STATE} 0"),
    "FalconH1ForCausalLM": (t.FalconH1Config(**G, **MAMBA, mamba_d_ssm=128), f"{STATE} 0"),
    "Qwen3NextForCausalLM": (
        t.Qwen3NextConfig(
            **G, layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=64, shared_expert_intermediate_size=64, linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, head_dim=16,
        ),
        f"{STATE} 0",
    ),
    "RecurrentGemmaForCausalLM": (
        t.RecurrentGemmaConfig(**{**G, "num_hidden_layers": 3}, lru_width=64, attention_window_size=16),
        f"{STATE} 0",
    ),
    "BartForConditionalGeneration": (
        t.BartConfig(**VOCABULARY, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
                     decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4),
        "is an encoder-decoder",
    ),
    "BloomForCausalLM": (
        t.BloomConfig(**VOCABULARY, hidden_size=64, n_layer=2, n_head=4), "takes no position_ids.*here, text is",
    ),
    "MptForCausalLM": (
        t.MptConfig(**VOCABULARY, d_model=64, n_layers=2, n_heads=4, max_seq_len=256), "takes no position_ids",
    ),
    "WavLMModel": (t.WavLMConfig(**families.SHAPE, **VOCABULARY), "takes 'input_values'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_an_onnx_form(name: str) -> None:
    config, message = REFUSED[name]
    config.architectures = [name]
    with pytest.raises(AwqTrtError, match=message):
        check_exportable(config, torch.float16)


def test_the_command_refuses_before_it_quantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_trt.awq.quantize.quantize", lambda *_, **__: pytest.fail("the model was quantized"))
    config, _ = REFUSED["BloomForCausalLM"]
    families.checkpoint(config, tmp_path / "m")
    for output in (("--onnx", tmp_path / "out.onnx"), ("--engine", tmp_path / "out.plan")):
        result = export("--model", tmp_path / "m", *output)
        assert result.returncode == 2
        assert "a fixed KV cache needs; with --kv-cache dynamic the ONNX file can be written, for a" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_early_trace_serves_the_export(
    models: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file as without; another form is traced anew."""
    checkpoint = open_checkpoint(models / "llama")
    early = check_exportable(checkpoint.config, checkpoint.dtype)
    assert early is not None
    monkeypatch.setattr("awq_trt.export.export.trace", lambda *_: pytest.fail("the model was traced again"))
    export_onnx(exported / "llama.awq", tmp_path / "early.onnx", early=early)
    plain, used = (onnx.load(str(path)) for path in (exported / "llama.onnx", tmp_path / "early.onnx"))
    assert list(plain.graph.node) == list(used.graph.node)
    assert [(x.name, x.raw_data) for x in plain.graph.initializer] == [
        (x.name, x.raw_data) for x in used.graph.initializer
    ]
    for config, dtype, options in (
        (checkpoint.config, torch.bfloat16, DecoderOptions()),
        (checkpoint.config, torch.float16, DecoderOptions(capacity=64)),
        (t.LlamaConfig(**families.GQA), torch.float16, DecoderOptions()),
    ):
        assert early.of(config, dtype, options) is None


@pytest.mark.parametrize(("fails", "traced"), [(0, [3]), (1, [3, 12]), (2, [3, 12])])
def test_a_deep_model_is_traced_with_a_block_of_each_kind(
    monkeypatch: pytest.MonkeyPatch, fails: int, traced: list[int]
) -> None:
    """Where that fails, whole: only then is it refused."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    config = t.Gemma3TextConfig(**{**G, "num_hidden_layers": 12}, head_dim=16, sliding_window=16, layer_types=kinds)
    config.architectures = ["Gemma3ForCausalLM"]
    counts: list[int] = []

    def trace(model: Any, dtype: torch.dtype, options: DecoderOptions) -> str:
        counts.append(len(model.model.layers))
        assert model.config.num_hidden_layers == len(model.config.layer_types) == counts[-1]
        if len(counts) <= fails:
            raise AwqTrtError("no ONNX form")
        return "a trace"

    monkeypatch.setattr(exportable, "trace", trace)
    if fails == 2:
        with pytest.raises(AwqTrtError, match="no ONNX form"):
            check_exportable(config, torch.float16)
    else:
        assert (check_exportable(config, torch.float16) is None) == (fails == 0)
    assert counts == traced
    assert (config.num_hidden_layers, len(config.layer_types)) == (12, 12)


def test_a_block_of_each_kind_of_a_real_model_can_be_traced() -> None:
    config = t.Gemma3TextConfig(
        **{**G, "num_hidden_layers": 6}, head_dim=16, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )  # fmt: skip
    config.architectures = ["Gemma3ForCausalLM"]
    assert check_exportable(config, torch.float16) is None
