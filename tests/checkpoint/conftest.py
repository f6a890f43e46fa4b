"""A llama in float and in AutoAWQ's layout; read only."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from quantized_models import rounded


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("float") / "llama", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="session")
def quantized(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounded(float_model, tmp_path_factory.mktemp("awq") / "llama")
