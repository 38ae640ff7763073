"""The model that ships in the package, fused; and `verify`, on it and on damaged copies."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    DEEPSEEK_V3,
    FAMILIES,
    GPT_OSS,
    MIXTRAL,
    QWEN2,
    Tiny,
    logits_of,
    relative,
    safetensors_of,
    tensors_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import moetor
from moetor.demo import heldout_text, model_path
from moetor.errors import CheckpointError, FusionError, KernelRefusedError
from moetor.huggingface import loading
from moetor.huggingface.verifying import perplexity

PROMPTS = (
    "ROMEO:\n",
    "What say you, my lord?",
    "First Citizen:\nBefore we proceed any further, hear me speak.",
    "O",
    "\n\n",
    "0123456789 ~ \u00e9\u00e8 \u6f22",
)
NEW_TOKENS = 40
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The demo model and the demo model fused."""
    plain, fused = (
        AutoModelForCausalLM.from_pretrained(model_path(), dtype=request.param).eval()
        for _ in range(2)
    )
    report = moetor.fuse(fused)
    assert {block.level for block in report.blocks} == {"block"}
    assert len(report.blocks) == plain.config.num_hidden_layers
    return plain, fused


def _greedy(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_generation(pair: tuple[Any, Any], tokenizer: Any, prompt: str) -> None:
    """Token for token in float32.

    In bfloat16 the two round at different places, and where the two likeliest tokens are as near to
    each other as that rounding, either may come first. So there the fused model must follow the
    original up to such a place, and nowhere else.
    """
    plain, fused = pair
    theirs, ours = _greedy(plain, tokenizer, prompt), _greedy(fused, tokenizer, prompt)
    if ours == theirs:
        return
    assert plain.dtype == torch.bfloat16, "float32 has no excuse"
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    with torch.no_grad():
        logits = plain(torch.tensor([theirs[:place]])).logits[0, -1].float()
    lead = float(logits[theirs[place]] - logits[ours[place]])
    assert lead <= 4 * torch.finfo(torch.bfloat16).eps * float(logits.abs().max())


def test_logits(pair: tuple[Any, Any], tokenizer: Any) -> None:
    plain, fused = pair
    ids = tokenizer(heldout_text(), return_tensors="pt", verbose=False).input_ids[:, :256]
    ours, theirs = logits_of(fused, ids), logits_of(plain, ids)
    if plain.dtype == torch.float32:
        assert relative(ours, theirs) <= 1e-5
    else:
        # Tokens whose routing tips at a near tie stand apart; most do not.
        error = (ours - theirs).float().norm(dim=-1) / theirs.float().norm(dim=-1)
        assert float(error.median()) <= 6 * torch.finfo(torch.bfloat16).eps


def test_perplexity(pair: tuple[Any, Any], tokenizer: Any) -> None:
    plain, fused = pair
    ids = tokenizer(heldout_text(), return_tensors="pt", verbose=False).input_ids[0, :1536]
    theirs, ours = perplexity(plain, ids), perplexity(fused, ids)
    assert 5 < theirs < 30
    if plain.dtype == torch.float32:
        assert f"{ours:.4f}" == f"{theirs:.4f}"
    else:
        assert ours == pytest.approx(theirs, rel=5e-3)


def test_sampling_with_a_seed(pair: tuple[Any, Any], tokenizer: Any) -> None:
    plain, fused = pair
    if plain.dtype != torch.float32:
        pytest.skip("a draw may fall between two roundings")
    inputs = tokenizer("JULIET:\n", return_tensors="pt")
    texts = []
    for model in (plain, fused):
        torch.manual_seed(11)
        out = model.generate(**inputs, max_new_tokens=30, do_sample=True, top_p=0.9)
        texts.append(out[0].tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("level", ["auto", "experts"])
def test_verify_demo(level: Any) -> None:
    report = moetor.verify("demo", level=level, dtype="float32")
    assert report.ok
    assert report.non_finite == ()
    assert all(block.ok for block in report.blocks)
    assert {block.level for block in report.blocks} == {"block" if level == "auto" else level}
    assert report.logits_error <= 1e-5
    assert report.perplexity is not None
    original, fused = report.perplexity
    assert f"{original:.4f}" == f"{fused:.4f}"
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_verify_demo_in_its_own_dtype() -> None:
    report = moetor.verify("demo")
    assert report.ok
    assert report.perplexity is not None
    assert report.perplexity[1] == pytest.approx(report.perplexity[0], rel=5e-3)


# --- verify on live models -----------------------------------------------------------------------


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
def test_verify_gives_a_live_model_back(tiny: Tiny) -> None:
    model = tiny.build()
    modules, before = dict(model.named_modules()), logits_of(model)
    report = moetor.verify(model)
    assert report.ok
    assert len(report.blocks) == tiny.blocks
    assert report.perplexity is None
    after = dict(model.named_modules())
    assert list(after) == list(modules)
    assert all(after[path] is module for path, module in modules.items())
    assert torch.equal(logits_of(model), before)


def test_verify_raises_no_false_alarm_in_bfloat16() -> None:
    """Correct fusions of random models: every block agrees, so the whole must be ok."""
    for tiny in (MIXTRAL, GPT_OSS, DEEPSEEK_V3):
        for seed in range(8):
            model = tiny.build(seed=seed, dtype=torch.bfloat16, num_hidden_layers=4)
            report = moetor.verify(model)
            assert all(block.ok for block in report.blocks)
            assert report.ok, (tiny.id, seed, report.logits_error, report.logits_tolerance)


def test_verify_sees_a_wrong_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that agree and a model that does not: the logits decide."""
    from moetor.huggingface import modules

    model = MIXTRAL.build()
    before = logits_of(model)
    right = modules.FusedMoEBlock.forward
    trial = True

    def wrong(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        out = right(self, hidden_states, *args, **kwargs)
        return out if trial or hidden_states.shape[1] == 1 else out * 1.01

    def after_the_trials(done: int, total: int, name: str) -> None:
        nonlocal trial
        trial = done < total

    monkeypatch.setattr(modules.FusedMoEBlock, "forward", wrong)
    report = moetor.verify(model, progress=after_the_trials)
    assert all(block.ok for block in report.blocks)
    assert report.logits_error > report.logits_tolerance
    assert not report.ok
    assert torch.equal(logits_of(model), before)


def test_verify_refuses_what_fuse_refuses() -> None:
    model = QWEN2.build()
    moetor.fuse(model)
    with pytest.raises(FusionError, match="fused already"):
        moetor.verify(model)
    moetor.unfuse(model)
    with pytest.raises(FusionError, match="training mode"):
        moetor.verify(model.train())
    with pytest.raises(KernelRefusedError, match="'cuda'"):
        moetor.verify(model.eval(), kernel="cuda")


# --- Weights that are not finite -----------------------------------------------------------------


def _plant(folder: Path, name: str, value: float) -> None:
    """One bad number into the saved tensor called `name`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].clone()
    tensors[name].flatten()[3] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_path(), tmp_path / "demo"))


def _tensor_with(folder: Path, *parts: str) -> str:
    return next(name for name in safetensors_of(folder) if all(part in name for part in parts))


@pytest.mark.parametrize(
    "parts",
    [
        ("layers.1", "experts.3", "down_proj"),
        ("layers.0", "experts.0", "gate_proj"),
        ("layers.1", "mlp.gate.weight"),
        ("layers.0", "shared_expert.", "up_proj"),
        ("embed_tokens",),
        ("layers.1", "input_layernorm"),
    ],
    ids=lambda parts: "-".join(parts),
)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_planted_weight_is_reported(demo_copy: Path, parts: tuple[str, ...], value: float) -> None:
    saved = _tensor_with(demo_copy, *parts)
    _plant(demo_copy, saved, value)
    report = moetor.verify(str(demo_copy))
    assert not report.ok
    assert len(report.non_finite) >= 1
    prefix = saved.partition(".experts.")[0]
    assert any(name.startswith(prefix) for name in report.non_finite), report.non_finite
    json.dumps(report.to_dict())


def test_planted_weight_in_a_live_model_leaves_it_as_it_was() -> None:
    model = MIXTRAL.build()
    model.model.layers[0].mlp.experts.down_proj.data[2, 5, 7] = math.nan
    before = tensors_of(model)
    report = moetor.verify(model)
    assert report.non_finite == ("model.layers.0.mlp.experts.down_proj",)
    assert not report.ok
    after = tensors_of(model)
    assert all(
        torch.equal(after[name].nan_to_num(123.0), kept.nan_to_num(123.0))
        for name, kept in before.items()
    )


def test_planted_selection_bias_is_reported() -> None:
    """DeepSeek keeps it in a buffer, not in a parameter."""
    model = DEEPSEEK_V3.build()
    model.model.layers[1].mlp.gate.e_score_correction_bias[2] = math.nan
    report = moetor.verify(model)
    assert report.non_finite == ("model.layers.1.mlp.gate.e_score_correction_bias",)
    assert not report.ok


def test_perplexity_beyond_all_numbers() -> None:
    """A model so wrong that exp overflows has perplexity infinity, not an exception."""
    model = MIXTRAL.build()
    model.lm_head.weight.data.mul_(1e4)
    ids = torch.arange(64) % 97
    assert perplexity(model, ids) == math.inf


def test_verify_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        moetor.verify(str(tmp_path))
    assert loading.load_config("demo").model_type == "qwen2_moe"
