"""`experts_implementation="moetor"`: our experts, Transformers' routing."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_levels import OTHERS
from tiny import (
    DEEPSEEK_V3,
    FAMILIES,
    GPT_OSS,
    MIXTRAL,
    QWEN2,
    QWEN3,
    Tiny,
    bound,
    logits_of,
    relative,
    some_hidden,
    some_ids,
    tensors_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moetor
from moetor.errors import UnsupportedError
from moetor.layer import ops

families = pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)


class Calls:
    """How often our op ran, so that a silent fall-back to Transformers shows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moetor.huggingface import experts_backend

        self.count = 0
        real = ops.transformers_moe_forward

        def spy(*args: Any) -> Tensor:
            self.count += 1
            result: Tensor = real(*args)
            return result

        monkeypatch.setattr(experts_backend.ops, "transformers_moe_forward", spy)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def switched(tiny: Tiny, **options: Any) -> Any:
    model = tiny.build(**options)
    model.set_experts_implementation("moetor")
    return model


def test_is_registered() -> None:
    assert "moetor" in ALL_EXPERTS_FUNCTIONS.valid_keys()
    assert "moetor" in ALL_FP8_EXPERTS_FUNCTIONS.valid_keys()


@pytest.mark.parametrize("tiny", [*FAMILIES, *OTHERS], ids=lambda tiny: tiny.id)
def test_switched_on(tiny: Tiny, calls: Calls) -> None:
    model = tiny.build()
    before = logits_of(model)
    assert calls.count == 0
    model.set_experts_implementation("moetor")
    assert relative(logits_of(model), before) <= 1e-5
    assert calls.count == sum(
        hasattr(m, "down_proj") and hasattr(m.down_proj, "dim") and m.down_proj.dim() == 3
        for m in model.modules()
    )
    model.set_experts_implementation(tiny.implementation or "grouped_mm")
    assert torch.equal(logits_of(model), before)


@families
def test_at_construction(tiny: Tiny, calls: Calls) -> None:
    model = AutoModelForCausalLM.from_config(tiny.config(), experts_implementation="moetor").eval()
    plain = tiny.build()
    model.load_state_dict(plain.state_dict())
    assert relative(logits_of(model), logits_of(plain)) <= 1e-5
    assert calls.count == tiny.blocks


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_pretrained(tiny: Tiny, dtype: torch.dtype, calls: Calls, tmp_path: Path) -> None:
    saved = tiny.build()
    saved.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moetor", dtype=dtype
    ).eval()
    ours = logits_of(model)
    assert calls.count == tiny.blocks
    assert ours.dtype == dtype
    if dtype == torch.float32:
        assert relative(ours, logits_of(saved)) <= 1e-5


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts_in_half_precision(tiny: Tiny, dtype: torch.dtype) -> None:
    """The same routing for both sides, hence rounding alone between them."""
    model = tiny.build(dtype=dtype)
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    generator = torch.Generator().manual_seed(3)
    hidden = some_hidden(model.config.hidden_size, 30, dtype=dtype)[0]
    weights, ids = torch.rand((30, 8), generator=generator).topk(3, dim=-1)
    with torch.no_grad():
        theirs = experts(hidden, ids, weights.to(dtype))
        model.set_experts_implementation("moetor")
        ours = experts(hidden, ids, weights.to(dtype))
    assert ours.dtype == dtype
    assert relative(ours, theirs) <= bound(dtype)


def test_generate(calls: Calls) -> None:
    plain, ours = QWEN2.build(), switched(QWEN2)
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    ids = some_ids(2, 6)
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    got = ours.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert got.tolist() == expected.tolist()
    assert calls.count == 20


def test_dropped_slots() -> None:
    """Expert parallelism in Transformers marks a foreign slot by the id E."""
    model = switched(QWEN3)
    experts = model.model.layers[0].mlp.experts
    hidden = some_hidden(66, 6)[0]
    ids = torch.tensor([[0, 3, 8], [8, 8, 8], [1, 8, 2], [7, 6, 5], [8, 0, 8], [4, 4, 8]])
    weights = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        ours = experts(hidden, ids, weights)
        zeroed = experts(hidden, ids.clamp(max=7), weights.masked_fill(ids == 8, 0.0))
    assert torch.equal(ours[1], torch.zeros(66))
    torch.testing.assert_close(ours, zeroed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", ["strided", "transposed"])
@pytest.mark.parametrize("how", ["switched", "fused"])
def test_hidden_states_with_gaps(how: str, view: str) -> None:
    plain, ours = QWEN3.build(), QWEN3.build()
    if how == "switched":
        ours.set_experts_implementation("moetor")
    else:
        moetor.fuse(ours, level="experts")
    wide = some_hidden(132, 12)[0]
    hidden = wide[:, ::2] if view == "strided" else wide[:, :66].T.contiguous().T
    assert not hidden.is_contiguous()
    ids = torch.arange(12).reshape(12, 1).repeat(1, 2).add(torch.tensor([0, 3])) % 8
    weights = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = plain.model.layers[0].mlp.experts(hidden.contiguous(), ids, weights)
        got = ours.model.layers[0].mlp.experts(hidden, ids, weights)
    assert relative(got, theirs) <= 1e-5


@families
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_weights_loaded_after_the_first_call(tiny: Tiny, assign: bool) -> None:
    model, other = switched(tiny, seed=3), tiny.build(seed=4)
    logits_of(model)
    model.load_state_dict(tensors_of(other), assign=assign)
    assert relative(logits_of(model), logits_of(other)) <= 1e-5


@families
def test_cast_after_the_first_call(tiny: Tiny) -> None:
    model = switched(tiny)
    logits_of(model)
    model.to(torch.bfloat16)
    fresh = switched(tiny)
    fresh.to(torch.bfloat16)
    assert torch.equal(logits_of(model), logits_of(fresh))


def test_one_parameter_replaced() -> None:
    model, plain = switched(GPT_OSS), GPT_OSS.build()
    logits_of(model)
    for one in (model, plain):
        experts = one.model.layers[1].mlp.experts
        experts.down_proj_bias = torch.nn.Parameter(experts.down_proj_bias.detach() + 1.0)
    assert relative(logits_of(model), logits_of(plain)) <= 1e-5


def test_another_number_of_experts_per_token() -> None:
    model, plain = switched(QWEN3), QWEN3.build()
    logits_of(model)
    for one in (model, plain):
        for layer in one.model.layers:
            layer.mlp.gate.top_k = 5
    assert relative(logits_of(model), logits_of(plain)) <= 1e-5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate: Any) -> None:
    model = switched(QWEN2)
    before = logits_of(model)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(twin), before)


def test_saved_without_a_trace(tmp_path: Path) -> None:
    """What was chosen at run time is not written into the checkpoint."""
    model, plain = switched(QWEN2), QWEN2.build()
    logits_of(model)
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    texts = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "plain")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("tiny", [QWEN3, GPT_OSS], ids=lambda tiny: tiny.id)
def test_compile_fullgraph(tiny: Tiny) -> None:
    model = switched(tiny)
    before = logits_of(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative(logits_of(compiled), before) <= 1e-5


@pytest.mark.parametrize("called_first", [True, False], ids=["called", "compiled-at-once"])
def test_compiled_model_sees_new_weights(called_first: bool) -> None:
    """A graph holds the name of the experts; new parameters must not leave it with old ones."""
    model, other = switched(MIXTRAL, seed=5), MIXTRAL.build(seed=6)
    if called_first:
        logits_of(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    logits_of(compiled)
    model.load_state_dict(tensors_of(other), assign=True)
    assert relative(logits_of(compiled), logits_of(other)) <= 1e-5
    assert relative(logits_of(model), logits_of(other)) <= 1e-5
    assert relative(logits_of(compiled), logits_of(other)) <= 1e-5


def test_fuse_over_it() -> None:
    model, plain = switched(DEEPSEEK_V3), DEEPSEEK_V3.build()
    report = moetor.fuse(model)
    assert {block.level for block in report.blocks} == {"block"}
    assert relative(logits_of(model), logits_of(plain)) <= 1e-5
    moetor.unfuse(model)
    assert relative(logits_of(model), logits_of(plain)) <= 1e-5


def test_unknown_activation_is_refused() -> None:
    """Not computed with the nearest known one."""
    model = QWEN3.build()
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts._apply_gate = lambda packed: packed.chunk(2, dim=-1)[0].sin()
    model.set_experts_implementation("moetor")
    with pytest.raises(UnsupportedError, match=r"Qwen3MoeExperts.*activation.*eager"):
        logits_of(model)


def test_unknown_parameter_is_refused() -> None:
    model = QWEN3.build()
    model.model.layers[0].mlp.experts.per_expert_scale = torch.nn.Parameter(torch.ones(8))
    model.set_experts_implementation("moetor")
    with pytest.raises(UnsupportedError, match="per_expert_scale"):
        logits_of(model)


def test_fp8_experts_are_refused() -> None:
    function = ALL_FP8_EXPERTS_FUNCTIONS["moetor"]
    with pytest.raises(UnsupportedError, match=r"FP8 experts \(Linear\).*grouped_mm"):
        function(torch.nn.Linear(2, 2), None, None, None)


@pytest.mark.parametrize("part", ["everything", "experts", "attention"])
def test_training_is_refused(part: str) -> None:
    """Otherwise frozen embeddings would make a loss whose backward leaves the experts out."""
    model = switched(QWEN2).train()
    if part != "everything":
        model.requires_grad_(False)
        layer = model.model.layers[0]
        (layer.mlp.experts if part == "experts" else layer.self_attn).requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"no gradients.*model\.eval\(\).*grouped_mm"):
        model(input_ids=some_ids(), labels=some_ids())
    with torch.no_grad():
        model(input_ids=some_ids(), labels=some_ids())
    model.eval()
    model(input_ids=some_ids())


def test_frozen_model_in_training_mode_runs() -> None:
    model, plain = switched(QWEN2).requires_grad_(False).train(), QWEN2.build()
    assert relative(model(input_ids=some_ids()).logits, logits_of(plain)) <= 1e-5


# --- Importing, each in a process of its own -----------------------------------------------------

ORDERS = {
    "moetor-first": "import moetor\nfrom transformers import AutoModelForCausalLM",
    "transformers-first": "from transformers import AutoModelForCausalLM\nimport moetor",
    "moetor-then-base-class": "import moetor\nfrom transformers import PreTrainedModel\n"
    "from transformers import AutoModelForCausalLM",
    "moetor-then-fp8": "import moetor\nimport transformers.integrations.finegrained_fp8\n"
    "from transformers import AutoModelForCausalLM",
}
_RUN = """
import torch
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
torch.manual_seed(0)
config = MixtralConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                       num_attention_heads=2, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(config, experts_implementation="moetor").eval()
ids = torch.arange(12).reshape(2, 6)
with torch.no_grad():
    ours = model(ids).logits
    assert hasattr(model.model.layers[0].mlp.experts, "_moetor_borrowed")
    model.set_experts_implementation("eager")
    theirs = model(ids).logits
assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
assert "moetor" in ALL_EXPERTS_FUNCTIONS.valid_keys()
print("fine")
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_import_orders(order: str) -> None:
    done = run_python(order + _RUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
