"""The engine over models whose dense parts are fused too: keys and values are written by the launch
that turns them, and tokens are those of `generate` on the model as it was.
"""

from __future__ import annotations

import pytest
from torch import Tensor

import moetor
from engine.engine_cases import (
    assert_empty,
    greedy,
    make_engine,
    make_model,
    own_tokens,
    random_prompts,
    run_staggered,
)
from engine.test_engine_families import TIGHT
from moetor.engine import EngineConfig, attention, build
from moetor.engine.cache import Batch, EngineCache, LayerBlocks
from moetor.engine.scores import Scores
from moetor.errors import ConfigError, FusionMismatchError
from moetor.huggingface.dense_fusing import is_dense_fused
from moetor.kernels import dense
from moetor.kernels.dense import CacheSlots, NewHeads
from moetor.kernels.native import dense as native
from moetor.tools.tiny import FAMILIES


@pytest.fixture(params=["native", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the native library, where there is a compiler, and as if there were none."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_attention_with_and_without_the_native_library(name: str, library: str) -> None:
    model = make_model(name, 3)
    prompts = random_prompts(model, (11, 37, 1, 24, 13), seed=5)
    wanted = {str(i): own_tokens(name, model, prompt) for i, prompt in enumerate(prompts)}
    engine = make_engine(model)
    done = run_staggered(engine, prompts, [greedy()] * len(prompts), every=3)
    assert {key: output.outputs[0].token_ids for key, output in done.items()} == wanted
    assert_empty(engine)


def test_dense_parts_are_fused_on_a_cpu_with_the_library(library: str) -> None:
    engine = make_engine(make_model("qwen3_moe", 3), level="auto")
    fused = library == "native" and native.available()
    assert is_dense_fused(engine.served.model) == fused
    for asked, done in (("on", True), ("off", False)):
        engine = make_engine(make_model("qwen3_moe", 3), level="auto", fuse_dense=asked)
        assert is_dense_fused(engine.served.model) == done


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "mellum", "deepseek_v3", "qwen3_next", "llama4"],
)
def test_tokens_are_those_of_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in FAMILIES
    model = make_model(name, 3)
    prompts = random_prompts(model, (11, 37, 1, 24, 13), seed=5)
    wanted = {str(i): own_tokens(name, model, prompt) for i, prompt in enumerate(prompts)}
    targets: list[CacheSlots | None] = []
    reports: list[moetor.FusionReport | None] = []
    write_target = EngineCache.write_target

    def counted(*args: object) -> object:
        targets.append(write_target(*args))  # type: ignore[arg-type]
        return targets[-1]

    monkeypatch.setattr(EngineCache, "write_target", counted)
    for settings in ({}, TIGHT):
        engine = make_engine(model, fuse_dense="on", **settings)
        reports.append(engine.fusion_report)
        done = run_staggered(engine, prompts, [greedy()] * len(prompts), every=3)
        got = {key: output.outputs[0].token_ids for key, output in done.items()}
        assert got == wanted, (engine.strategy, settings)
        assert_empty(engine)
    (first, second) = reports
    assert first is not None
    assert second is None  # the model is fused already
    fused = any(part.kind == "attention" and part.done for part in first.dense)
    assert any(target is not None for target in targets) == fused


def test_what_nobody_asked_for_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where dense parts are fused by themselves, a mismatch is a warning."""

    def mismatch(model: object, **_: object) -> None:
        raise FusionMismatchError("logits differ")

    model = make_model("qwen3_moe", 3)
    assert not make_engine(model).fusion_report
    assert not is_dense_fused(model)
    monkeypatch.setattr(build, "fuse_dense", mismatch)
    with pytest.raises(FusionMismatchError):
        make_engine(model, fuse_dense="on")
    monkeypatch.setattr(EngineConfig, "fuses_dense", lambda *_: True)
    with pytest.warns(UserWarning, match="dense parts are not fused: logits differ"):
        engine = make_engine(model, level="auto", fuse_dense="auto")
    assert engine.fusion_report is not None
    assert [part.reason for part in engine.fusion_report.dense] == ["logits differ"]


def test_a_setting_that_is_none_of_them() -> None:
    with pytest.raises(ConfigError, match="auto, on, off"):
        EngineConfig(fuse_dense=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "glm4_moe"])
def test_heads_that_are_left_to_the_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: steps of single tokens give the attention all that it needs to turn queries and
    keys itself, which torch operations stand in for here."""
    own, turned = attention.attend, []

    def attend(
        query: Tensor,
        blocks: LayerBlocks,
        batch: Batch,
        scores: Scores,
        new: NewHeads | None = None,
    ) -> Tensor:
        if new is not None:
            assert batch.max_query_len == 1
            turned.append(len(query))
            norms = {"query_norm": new.query_norm, "key_norm": new.key_norm}
            cache = CacheSlots(blocks.keys, blocks.values, new.slots)
            heads = (query, new.key, new.value, new.cos, new.sin, new.form)
            query = dense.rotate(*heads, **norms, cache=cache, in_torch=True)[0]
        return own(query, blocks, batch, scores)

    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(dense, "attention_turns", lambda query, new: True)
    model = make_model(name, 3)
    prompts = random_prompts(model, (11, 37, 1), seed=5)
    wanted = {str(i): own_tokens(name, model, prompt) for i, prompt in enumerate(prompts)}
    engine = make_engine(model, fuse_dense="on")
    done = run_staggered(engine, prompts, [greedy()] * len(prompts), every=3)
    assert {key: output.outputs[0].token_ids for key, output in done.items()} == wanted
    assert set(turned) >= {1, 2}
