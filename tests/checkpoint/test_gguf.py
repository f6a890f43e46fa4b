"""GGUF: what its tensors and keys say is in the model, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch

from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.float_model import judge

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gguf_files.llama(tmp_path_factory.mktemp("llama") / "m")


def assert_same(path: Path, model: Any) -> None:
    """The parameters and the rotary frequencies are those of transformers' model."""
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.architectures == ["LlamaForCausalLM"]
    for name, parameter in model.named_parameters():
        assert torch.equal(checkpoint.tensor(name), parameter), name
    ours, theirs = empty_model(checkpoint.config).model.rotary_emb, model.model.rotary_emb
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=1e-5, atol=0)
    assert ours.attention_scaling == pytest.approx(theirs.attention_scaling)


def test_gguf_gives_what_transformers_reads(tmp_path: Path, model: Any) -> None:
    assert_same(gguf_files.write(tmp_path / "m.gguf", gguf_files.keys_of(model), gguf_files.tensors_of(model)), model)


@pytest.mark.parametrize(
    ("scaling", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            {"original_context_length": 128},
        ),
        (
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
            {"original_context_length": 64, "yarn_beta_fast": 16.0},
        ),
    ],
)
def test_scaling_in_keys(tmp_path: Path, scaling: dict[str, Any], keys: dict[str, Any]) -> None:
    model = gguf_files.llama(tmp_path / "hf", rope_parameters={"rope_theta": 10000.0, **scaling})
    named = {"type": scaling["rope_type"], "factor": scaling["factor"], **keys}
    stored = gguf_files.keys_of(model) | {f"rope.scaling.{key}": value for key, value in named.items()}
    assert_same(gguf_files.write(tmp_path / "m.gguf", stored, gguf_files.tensors_of(model)), model)


@pytest.mark.parametrize(
    ("factor", "original", "width"), [(8.0, 8192, 32), (32.0, 8192, 16), (8.0, 64, 16), (2.0, 700, 64)]
)
def test_scaling_in_a_tensor(tmp_path: Path, factor: float, original: int, width: int) -> None:
    """As convert_hf_to_gguf.py computes it for Llama 3.1, 3.2 and 3.3."""
    rope = {**LLAMA3, "factor": factor, "original_max_position_embeddings": original}
    model = gguf_files.llama(tmp_path / "hf", rope_parameters=rope, hidden_size=4 * width)
    plain = 5e5 ** -(torch.arange(0, width, 2) / width)
    tensors = gguf_files.tensors_of(model)
    tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.keys_of(model), tensors)
    assert_same(path, model)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.rope_parameters["factor"] == factor
    sample = {"input_ids": torch.randint(2, 384, (1, 60), generator=torch.Generator().manual_seed(0))}
    found = judge(checkpoint, [sample], [sample])  # transformers passes over that tensor
    assert found.judge.endswith("from_pretrained with the configuration that was read of the file")
    assert found.predictions is not None
    with torch.no_grad():
        assert torch.equal(found.predictions.chosen[0], model(**sample).logits.argmax(-1))


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"attention.sliding_window": 4096}, {}, r"its key llama\.attention\.sliding_window is 4096"),
        ({"attn_logit_softcapping": 50.0}, {}, "attn_logit_softcapping is 50"),
        ({"attention.scale": 0.5}, {}, r"llama\.attention\.scale is 0\.5, .*LlamaConfig has 0\.25"),
        ({"expert_count": 8}, {}, "expert_count is 8"),
        ({"logit_scale": 0.1}, {}, r"llama\.logit_scale"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, {}, "rope.scaling.type 'longrope'"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "rope.scaling.type 'yarn'"),
        ({"attention.causal": False}, {}, "attention.causal is False"),
        ({}, {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}, "rope_freqs.weight scales"),
        ({}, {"rope_factors_long.weight": np.ones(8, np.float32)}, r"1 of the stored tensors .*rope_factors_long"),
        ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, r"1 of the stored tensors .*q_proj\.bias|attn_q\.bias"),
        ({}, {"blk.7.attn_norm.weight": np.ones(64, np.float32)}, r"1 of the stored tensors .*blk\.7"),
        ({}, {"blk.0.ffn_up_exps.weight": np.ones((2, 64, 64), np.float32)}, "a mixture of experts"),
        ({}, {"token_embd.weight": np.ones((392, 64), np.float32)}, "has 25088 values, .* has 24576 there"),
    ],
)
def test_what_would_be_left_out(
    tmp_path: Path, model: Any, keys: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    stored = gguf_files.keys_of(model) | keys
    path = gguf_files.write(tmp_path / "m.gguf", stored, gguf_files.tensors_of(model) | tensors)
    with pytest.raises(AwqTrtError, match=message):
        open_checkpoint(path)


def test_keys_that_say_what_the_configuration_says(tmp_path: Path, model: Any) -> None:
    keys = {
        "attention.sliding_window": 0,
        "attention.scale": 0.25,
        "rope.scaling.type": "none",
        "attention.causal": True,
    }
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    stored = gguf_files.keys_of(model) | keys
    assert_same(gguf_files.write(tmp_path / "m.gguf", stored, gguf_files.tensors_of(model) | ones), model)


def test_a_model_in_parts(tmp_path: Path, model: Any) -> None:
    """The head is in the second part, so that only both together say that it is no copy of the embedding."""
    tensors = gguf_files.tensors_of(model) | {"output.weight": np.random.default_rng(0).random((384, 64), np.float32)}
    order = sorted(tensors, key=lambda name: name.startswith("output"))
    split = {"split.count": 2, "split.no": 0}
    first = {name: tensors[name] for name in order[:9]}
    one = gguf_files.write(tmp_path / "m-00001-of-00002.gguf", gguf_files.keys_of(model), first, general=split)
    two = gguf.GGUFWriter(tmp_path / "m-00002-of-00002.gguf", "llama")
    two.add_uint32("split.count", 2)
    two.add_uint32("split.no", 1)
    gguf_files.add_tensors(two, {name: tensors[name] for name in order[9:]})
    for path in (one, tmp_path / "m-00002-of-00002.gguf", tmp_path):
        checkpoint = open_checkpoint(path)
        assert not checkpoint.config.tie_word_embeddings
        assert torch.equal(checkpoint.tensor("lm_head.weight"), torch.from_numpy(tensors["output.weight"]))
        assert torch.equal(checkpoint.tensor("model.embed_tokens.weight"), model.model.embed_tokens.weight)
        assert len(checkpoint.files) == 2
        assert judge(checkpoint, [], []).judge == "none: transformers reads no GGUF file in parts"
    one.rename(tmp_path / "a.gguf")
    with pytest.raises(AwqTrtError, match=r"a\.gguf: part 1 of 2 of a model\. .*llama-gguf-split --merge"):
        open_checkpoint(tmp_path / "a.gguf")
    with pytest.raises(AwqTrtError, match=r"in 2 files, of which m-00001-of-00002\.gguf is missing"):
        open_checkpoint(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(AwqTrtError, match=r"of 2 \.gguf files it is not clear which one|is missing"):
        open_checkpoint(tmp_path)


def test_an_adapter(tmp_path: Path, model: Any) -> None:
    path = gguf_files.write(
        tmp_path / "m.gguf",
        gguf_files.keys_of(model),
        gguf_files.tensors_of(model),
        general={"general.type": "adapter"},
    )
    with pytest.raises(AwqTrtError, match="a LoRA adapter, not a model"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.bfloat16), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
def test_the_dtype_of_activations(tmp_path: Path, model: Any, kind: str, dtype: torch.dtype) -> None:
    stored = getattr(gguf.GGMLQuantizationType, kind)
    tensors = gguf_files.tensors_of(model)
    checkpoint = open_checkpoint(gguf_files.write(tmp_path / "m.gguf", gguf_files.keys_of(model), tensors, stored))
    assert checkpoint.dtype == dtype
    expected = torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(tensors["token_embd.weight"], stored), stored)
    )
    assert torch.equal(checkpoint.tensor("model.embed_tokens.weight"), expected)
