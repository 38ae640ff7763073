"""A model that is itself the MoE block is refused before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import moetor
from moetor.demo import model_path
from moetor.errors import FusionError
from moetor.huggingface import fusing


def test_a_block_without_a_model_is_refused_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def adopt(*_: Any) -> None:
        pytest.fail("hooks were moved")

    monkeypatch.setattr(fusing, "adopt_hooks", adopt)
    model = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    with pytest.raises(FusionError, match="the model itself is the MoE block"):
        moetor.fuse(model.model.layers[0].mlp)
