"""Rotary frequencies that depend on the length of a sequence are resolve_longrope by the size of the cache."""

from __future__ import annotations

import copy
from pathlib import Path

import families
import torch
import transformers as t

from awq_trt.awq.outside import fill
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.export.rope import freeze, resolve_longrope


def test_short_frequencies_stay_up_to_the_original_positions_and_long_ones_beyond(tmp_path: Path) -> None:
    """Against transformers, which chooses by the sequence: 128 tokens and fewer, or more."""
    checkpoint = open_checkpoint(families.checkpoint(families.DECODERS["phi3-longrope"](), tmp_path))
    config = checkpoint.config
    assert resolve_longrope(config, 128) is config
    assert resolve_longrope(config, 0) is config
    long = resolve_longrope(config, 129)
    assert long is not config
    assert long.rope_parameters["short_factor"] == config.rope_parameters["long_factor"]
    assert config.rope_parameters["short_factor"] != config.rope_parameters["long_factor"]
    theirs = t.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = {}
    for name, configuration in (("short", config), ("long", long)):
        model = empty_model(configuration)
        fill(model, "", checkpoint)
        freeze(model)
        ids = torch.randint(0, 384, (1, 200), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found[name] = [model(ids[:, :n]).logits for n in (60, 200)]
    with torch.no_grad():
        short, long_ = (theirs(ids[:, :n]).logits for n in (60, 200))
    torch.testing.assert_close(found["short"][0], short, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["long"][1], long_, rtol=1e-4, atol=1e-4)
    assert (found["long"][0] - short).abs().max() > 0.1
    assert (found["short"][1] - long_).abs().max() > 0.1


def test_scalings_of_single_layer_types() -> None:
    config = families.DECODERS["phi3-longrope"]()
    scaling = copy.deepcopy(config.rope_parameters)
    config.rope_parameters = {"full_attention": scaling, "sliding_attention": {"rope_type": "default"}}
    assert resolve_longrope(config, 129).rope_parameters["full_attention"]["short_factor"] == scaling["long_factor"]


def test_models_without_such_frequencies_are_left_alone() -> None:
    for name in ("llama3", "gemma3", "gpt2"):
        config = families.DECODERS[name]()
        assert resolve_longrope(config, 1 << 20) is config
        config.architectures = [t.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        model = empty_model(config)
        before = {n: b.clone() for n, b in model.named_buffers()}
        freeze(model)
        assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
