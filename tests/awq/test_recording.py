"""Blocks that return more than hidden states, and models that cannot be run block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers as t

from awq_trt.awq.blocks import BlockStream
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.errors import AwqTrtError

TEXT = {**families.SHAPE, **families.TEXT}
T5 = {"vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4}
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pad_token_id": 0}
CONFIGS = {
    "T5EncoderModel": lambda: t.T5Config(**T5),  # the position bias of block 0 goes through all others
    "MT5EncoderModel": lambda: t.MT5Config(**T5),
    "DebertaModel": lambda: t.DebertaConfig(**DEBERTA, max_relative_positions=32),  # a weight outside is used as it is
    "DebertaV2ForMaskedLM": lambda: t.DebertaV2Config(**DEBERTA, position_buckets=16),
    "BambaForCausalLM": lambda: t.BambaConfig(  # two kinds of block
        **families.GQA, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16
    ),
    "RwkvForCausalLM": lambda: t.RwkvConfig(  # three values
        vocab_size=384, context_length=256, hidden_size=64, num_hidden_layers=2, intermediate_size=128
    ),
    "GPTJForCausalLM": lambda: t.GPTJConfig(  # moves a table to where its inputs are, and keeps it there
        n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=384, rotary_dim=8, bos_token_id=0, eos_token_id=1
    ),
    "SwinModel": lambda: t.SwinConfig(  # stages that halve the image and return its size
        image_size=32, patch_size=2, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    "WavLMModel": lambda: t.WavLMConfig(
        **families.SHAPE, vocab_size=384, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    ),
}  # fmt: skip


def inputs_of(architecture: str) -> list[dict[str, torch.Tensor]]:
    """Two of different lengths, where they can have any."""
    torch.manual_seed(0)
    if architecture == "SwinModel":
        return [{"pixel_values": torch.randn(1, 3, 32, 32)} for _ in range(2)]
    if architecture == "WavLMModel":
        return [{"input_values": torch.randn(1, n)} for n in (400, 560)]
    return [{"input_ids": torch.randint(2, 384, (1, n))} for n in (24, 17)]


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    cls = getattr(t, name)
    families.checkpoint(CONFIGS[name](), tmp_path, cls=cls)
    whole = cls.from_pretrained(tmp_path, dtype=torch.float32).eval()
    checkpoint, inputs = open_checkpoint(tmp_path), inputs_of(name)
    stream = BlockStream(checkpoint, inputs)
    states = list(stream.record())
    for i in range(len(stream.blocks)):
        stream.load(i, checkpoint)
        states = [stream.run(i, state, j) for j, state in enumerate(states)]
        stream.unload(i)
    assert all(parameter.is_meta for parameter in stream.model.parameters())
    for j, state in enumerate(states):
        with torch.no_grad():
            output = whole(**inputs[j])
        expected = output["logits" if "logits" in output else "last_hidden_state"]
        torch.testing.assert_close(stream.head(state, j), expected, rtol=1e-4, atol=1e-4)


def test_what_is_carried(tmp_path: Path) -> None:
    """Nothing before block 0 and behind the last one; the position bias between."""
    families.checkpoint(CONFIGS["T5EncoderModel"](), tmp_path, cls=t.T5EncoderModel)
    checkpoint = open_checkpoint(tmp_path)
    stream = BlockStream(checkpoint, inputs_of("T5EncoderModel"))
    (state, _) = list(stream.record())
    shapes = [[tuple(x.shape) for x in state]]
    for i in range(3):
        stream.load(i, checkpoint)
        state = stream.run(i, state, 0)
        shapes.append([tuple(x.shape) for x in state])
    hidden, bias = (1, 24, 64), (1, 4, 24, 24)
    assert shapes == [[hidden], [hidden, bias], [hidden, bias], [hidden]]


def test_quantizing_goes_on_with_what_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the last block and begins again writes the bits of a run that did not."""
    source = families.checkpoint(CONFIGS["T5EncoderModel"](), tmp_path / "m", cls=t.T5EncoderModel)
    config = QuantizeConfig(calibration_samples=2, calibration_length=32)
    quantize(source, tmp_path / "whole", config)
    load, loaded = BlockStream.load, []

    def interrupted(self: BlockStream, i: int, weights: Any) -> Any:
        loaded.append(i)
        if loaded.count(2) == 2:  # the first time is that of the float pass, which looks at the range of values
            raise KeyboardInterrupt
        return load(self, i, weights)

    monkeypatch.setattr(BlockStream, "load", interrupted)
    with pytest.raises(KeyboardInterrupt, match="2 finished blocks are kept"):
        quantize(source, tmp_path / "again", config)
    monkeypatch.setattr(BlockStream, "load", load)
    quantize(source, tmp_path / "again", config)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (
            t.DebertaV2Model,
            lambda: t.DebertaV2Config(**DEBERTA, position_buckets=16, conv_kernel_size=3, conv_act="gelu"),
            r"DebertaV2Model: its forward computes something between encoder\.layer\.0 and encoder\.layer\.1",
        ),
        (
            t.AlbertModel,
            lambda: t.AlbertConfig(**TEXT, embedding_size=32),
            r"AlbertModel: its forward calls encoder\.albert_layer_groups\.0 more than once",
        ),
    ],
)
def test_models_that_compute_between_their_blocks_are_refused(
    cls: Any, config: Any, message: str, tmp_path: Path
) -> None:
    source = families.checkpoint(config(), tmp_path / "m", cls=cls)
    with pytest.raises(AwqTrtError, match=message):
        quantize(source, tmp_path / "out", QuantizeConfig(calibration_samples=1, calibration_length=32))
    assert not (tmp_path / "out").exists()


def test_a_head_that_reads_other_blocks_is_refused(tmp_path: Path) -> None:
    config = CONFIGS["WavLMModel"]()
    config.use_weighted_layer_sum = True
    families.checkpoint(config, tmp_path, cls=t.WavLMForSequenceClassification)
    checkpoint = open_checkpoint(tmp_path)
    stream = BlockStream(checkpoint, inputs_of("WavLMModel"))
    (state, _) = stream.record()
    with pytest.raises(AwqTrtError, match=r"computed from more than what wavlm\.encoder\.layers\.1 returns"):
        stream.head(state, 0)
