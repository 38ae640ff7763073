"""Loading: good checkpoints, and bad ones of every kind, each told in one line with its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import (
    WEIGHTS,
    edit_json,
    one_line,
)
from tiny import (
    DEEPSEEK_V3,
    FAMILIES,
    GRANITE,
    MIXTRAL,
    OLMOE,
    QWEN2,
    Tiny,
    logits_of,
    same_tensors,
    tensors_of,
)

import moetor
from moetor.errors import CheckpointError, ConfigError
from moetor.huggingface import loading, sources

# --- What is good --------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
def test_loads_every_family(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.build()
    model.save_pretrained(tmp_path)
    loaded = loading.load_model(str(tmp_path))
    assert not loaded.training
    assert type(loaded) is type(model)
    assert same_tensors(tensors_of(loaded), tensors_of(model)) == []


def test_loads_shards_as_one_file(whole: Path, saved_in_shards: Path) -> None:
    one, many = loading.load_model(str(whole)), loading.load_model(str(saved_in_shards))
    assert same_tensors(tensors_of(one), tensors_of(many)) == []
    assert torch.equal(logits_of(one), logits_of(many))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype(name: str, whole: Path) -> None:
    model = loading.load_model(str(whole), dtype=name)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}


def test_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    QWEN2.build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert loading.load_model(str(tmp_path)).dtype == torch.bfloat16


def test_selection_bias_stays_in_float32(tmp_path: Path) -> None:
    """As Transformers keeps it; `bfloat16` would move the choice of experts."""
    DEEPSEEK_V3.build().save_pretrained(tmp_path)
    model = loading.load_model(str(tmp_path), dtype="bfloat16")
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    report = moetor.fuse(model)
    assert {block.level for block in report.blocks} == {"block"}


def test_progress_ends_at_its_total(whole: Path) -> None:
    calls: list[tuple[int, int]] = []
    loading.load_model(str(whole), progress=lambda done, total, item: calls.append((done, total)))
    assert calls
    assert calls[-1][0] == calls[-1][1] > 0
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    before = len(calls)
    loading.load_model(str(whole))
    assert len(calls) == before, "the hook is gone after the load"


def test_demo_by_name() -> None:
    assert loading.load_config("demo").model_type == "qwen2_moe"
    assert loading.load_tokenizer("demo").chat_template


def test_home_folder_is_understood(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(whole.parent))
    assert sources.resolve("~/model") == str(whole)


def test_relative_folder(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole.parent)
    assert loading.load_config("model").model_type == "qwen2_moe"
    assert loading.load_config("./model").model_type == "qwen2_moe"


@dataclass(frozen=True)
class ContextCase:
    id: str
    config: dict[str, Any]
    expected: int | None


CONTEXTS = (
    ContextCase("usual", {"max_position_embeddings": 128}, 128),
    ContextCase("dbrx-like", {"max_sequence_length": 64}, 64),
    ContextCase("gpt-like", {"n_positions": 32}, 32),
    ContextCase("unknown", {}, None),
    ContextCase("none", {"max_position_embeddings": None}, None),
    ContextCase("zero", {"max_position_embeddings": 0}, None),
    ContextCase("first-that-says", {"max_position_embeddings": None, "seq_length": 16}, 16),
)


@pytest.mark.parametrize("case", CONTEXTS, ids=lambda case: case.id)
def test_context_length(case: ContextCase) -> None:
    text = SimpleNamespace(**case.config)
    assert loading.context_length(SimpleNamespace(get_text_config=lambda: text)) == case.expected


def test_context_length_of_the_demo() -> None:
    config = loading.load_config("demo")
    assert loading.context_length(config) == config.max_position_embeddings


# --- What is bad ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no/such/folder", "neither a folder nor a hub id"),
        ("./nothing", "neither a folder nor a hub id"),
        ("/nothing/here", "neither a folder nor a hub id"),
        ("nothing", "neither a folder nor a hub id.*'demo'"),
        ("Demo", "'demo'"),
        ("", "neither a folder nor a hub id"),
        ("owner/", "neither a folder nor a hub id"),
        ("/", "config.json"),
    ],
)
def test_names_that_mean_nothing(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for ask in (loading.load_config, loading.load_tokenizer, loading.load_model):
        with pytest.raises(CheckpointError, match=text) as caught:
            ask(name)
        one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody-here/no-such-model") as caught:
        loading.load_config("nobody-here/no-such-model")
    one_line(caught.value)


def test_file_instead_of_folder(whole: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is a file"):
        loading.load_model(str(whole / WEIGHTS))


def test_unknown_dtype_and_device(whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"'int8'.*float32, bfloat16, float16"):
        loading.load_model(str(whole), dtype="int8")
    with pytest.raises(ConfigError, match=r"'abacus'.*cpu"):
        loading.load_model(str(whole), device="abacus")
    with pytest.raises(ConfigError, match=r"'mps'.*cpu"):
        loading.load_model(str(whole), device="mps")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"'cuda:1'.*no CUDA"):
            loading.load_model(str(whole), device="cuda:1")
    with pytest.raises(ConfigError, match="'int8'"):
        moetor.explain(str(whole), dtype="int8")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2_moe", ')


def _config_binary(folder: Path) -> None:
    (folder / "config.json").write_bytes(bytes(range(200, 256)))


def _config_empty(folder: Path) -> None:
    (folder / "config.json").write_text("")


def _config_list(folder: Path) -> None:
    (folder / "config.json").write_text('["qwen2_moe"]')


def _config_number(folder: Path) -> None:
    (folder / "config.json").write_text("3")


def _config_unknown_type(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(model_type="brontosaurus"))


def _config_no_type(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.pop("model_type") and None)


def _config_wrong_kind(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(hidden_size="wide"))


def _config_null_size(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=None))


def _config_negative_size(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(hidden_size=-64))


def _config_heads(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(num_attention_heads=0))


def _config_activation(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(hidden_act="warp"))


BAD_CONFIGS = (
    _no_config,
    _config_no_json,
    _config_binary,
    _config_empty,
    _config_list,
    _config_number,
    _config_unknown_type,
    _config_no_type,
    _config_wrong_kind,
    _config_null_size,
    _config_negative_size,
    _config_heads,
    _config_activation,
)


@pytest.mark.parametrize("damage", BAD_CONFIGS)
@pytest.mark.parametrize("ask", [loading.load_model, moetor.explain, moetor.verify])
def test_bad_config(damage: Callable[[Path], None], ask: Callable[..., Any], whole: Path) -> None:
    damage(whole)
    with pytest.raises(CheckpointError) as caught:
        ask(str(whole))
    assert str(whole) in one_line(caught.value)


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
@pytest.mark.parametrize("ask", [loading.load_config, moetor.explain, moetor.verify])
def test_more_experts_per_token_than_experts(
    tiny: Tiny, ask: Callable[..., Any], tmp_path: Path
) -> None:
    experts = 10 if tiny is QWEN2 else 8
    tiny.config(num_experts_per_tok=experts + 1).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"{experts + 1} experts per token and has {experts}"
    ):
        ask(str(tmp_path))
    tiny.config(num_experts_per_tok=experts).save_pretrained(tmp_path)
    loading.load_config(str(tmp_path))


@pytest.mark.parametrize("experts", [0, 1])
def test_dense_member_of_a_sparse_family(experts: int, tmp_path: Path) -> None:
    """Its number of experts per token means nothing."""
    config = GRANITE.config(num_local_experts=8)
    config.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.update(num_local_experts=experts))
    assert loading.load_config(str(tmp_path)).num_local_experts == experts


def test_bad_tokenizer(whole: Path) -> None:
    (whole / "tokenizer.json").write_text('{"model": ')
    (whole / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError) as caught:
        loading.load_tokenizer(str(whole))
    assert str(whole) in one_line(caught.value)


@pytest.mark.parametrize("tiny", [QWEN2, MIXTRAL, OLMOE], ids=lambda tiny: tiny.id)
@pytest.mark.parametrize("settings", [True, False], ids=["settings-alone", "nothing"])
def test_no_tokenizer(tiny: Tiny, settings: bool, tmp_path: Path) -> None:
    """Some classes would make one without a vocabulary, which turns every prompt into nothing."""
    tiny.config().save_pretrained(tmp_path)
    if settings:
        (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        loading.load_tokenizer(str(tmp_path))
    assert str(tmp_path) in one_line(caught.value)
    assert settings or "holds no tokenizer" in str(caught.value)


def test_remote_code_is_not_run_unasked(whole: Path) -> None:
    (whole / "evil.py").write_text("raise SystemExit('ran')")
    edit_json(
        whole / "config.json",
        lambda c: c.update(
            model_type="own_type",
            auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        ),
    )
    with pytest.raises(CheckpointError, match="trust_remote_code") as caught:
        loading.load_model(str(whole))
    one_line(caught.value)
