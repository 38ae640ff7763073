"""Dense parts fused on models that are spread over ranks: the same logits and tokens, and one sum
over ranks after attention and one after the experts.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import moetor
from moetor import LLM, ParallelConfig, SamplingParams
from moetor.engine.vocabulary import SplitVocabulary, split_vocabulary
from moetor.errors import FusionError, UnsupportedError
from moetor.huggingface import dense_fusing
from moetor.huggingface.dense_fusing import fuse_dense, is_dense_fused, unfuse_dense
from moetor.huggingface.dense_observe import Observation, recording
from moetor.huggingface.dense_spread import GatheredForward, take_over
from moetor.huggingface.experts_form import Unrecognised
from moetor.huggingface.tensor_parallel import PlanEntry, apply_plan, mark_spread, spread_over
from moetor.huggingface.trial import relative_error
from moetor.kernels.native import dense as native
from moetor.parallel.groups import make_groups
from moetor.tools.tiny import logits_of, tiny_inputs, tiny_model
from parallel.families import MODES, batch
from parallel.pool import Pool, RankError


@dataclass
class Found:
    """What a rank found of one family and mode.

    Attributes:
        error: of the logits, relative to the largest.
        done, left: how many parts of each kind were fused, and were not.
        reasons: of modules of the plan that were not taken over.
        distributed: parameters that are distributed tensors, of modules that were called.
        undone: whether unfusing gives the spread model's own logits, bit for bit, and tensors.
    """

    error: float = 1.0
    done: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    distributed: list[str] = field(default_factory=list)
    undone: bool = False


def even(name: str) -> Any:
    """A tiny model whose vocabulary every release of Transformers splits over two ranks."""
    return tiny_model(name, settings={"vocab_size": 132})


def distributed(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, DTensor)]


def fuse_spread(rank: int, name: str, mode: str) -> Found:
    """In a worker: spread and fused against one process's whole model."""
    model = tiny_model(name) if mode == "tp" else even(name)
    for module in model.modules():  # fresh models have biases of zeros
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Linear) and bias is not None:
            bias.data.normal_(generator=torch.Generator().manual_seed(bias.numel()))
    config = MODES[mode]
    inputs = tiny_inputs(name, model)
    mine = batch(inputs, rank // config.tensor_parallel_size) if config.joint else inputs
    moetor.fuse(model, verify=False)
    expected = logits_of(name, model, mine)
    spread = copy.deepcopy(model)
    moetor.parallelize(spread, config)
    before, held = logits_of(name, spread, mine), distributed(spread)
    reports = fuse_dense(spread)
    found = Found(
        error=relative_error(logits_of(name, spread, mine), expected),
        done=Counter(part.kind for part in reports if part.done),
        left=Counter(part.kind for part in reports if not part.done),
        reasons=[part.reason for part in reports if part.kind == "split" and not part.done],
        distributed=distributed(spread),
    )
    assert is_dense_fused(spread)
    assert unfuse_dense(spread) > 0
    after = logits_of(name, spread, mine)
    found.undone = torch.equal(after, before) and distributed(spread) == held
    return found


# Head norms, with dense layers beside experts; biases and sinks, with attention that the plan
# leaves whole; latent attention; partial rotary positions and shared experts; norms over all heads,
# for which the plan gathers; layers without attention.
CASES = [
    ("qwen3_moe", "tp"),
    ("qwen3_moe", "tp_ep"),
    ("qwen3_moe", "sp"),
    ("qwen3_moe", "dp_ep"),
    ("mixtral", "tp"),
    ("gpt_oss", "tp_ep"),
    ("deepseek_v3", "tp"),
    ("deepseek_v2", "tp_ep"),
    ("glm4_moe", "tp"),
    ("olmoe", "tp"),
    ("qwen3_next", "tp"),
]
NO_FUSED_ATTENTION = ("deepseek_v2", "deepseek_v3", "qwen3_next")


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_logits_are_those_of_one_process(name: str, mode: str, two: Pool) -> None:
    ours, theirs = two.run(fuse_spread, name, mode)
    for found in (ours, theirs):
        assert found.error <= 1e-5
        assert found.undone
        assert found.reasons == []
        assert found.done["norm"]
        assert bool(found.done["attention"]) == (name not in NO_FUSED_ATTENTION)
        assert bool(found.done["split"]) == (mode != "dp_ep")
        assert all("embed" in one for one in found.distributed)
    assert (ours.done, ours.left) == (theirs.done, theirs.left)


STYLES = (
    "colwise", "packed_colwise", "colwise_gather_output", "rowwise", "rowwise_split_input",
)  # fmt: skip


def take_over_styles(rank: int) -> dict[str, tuple[float, float]]:
    """In a worker: a linear module, most with a bias, in every style: how far it is from the plan's
    own answer, and from the whole module's (of a rank's slice: from its part of it).
    """
    groups = make_groups(MODES["tp"])
    rng = torch.Generator().manual_seed(11)
    # The plan splits a packed weight by gate and up, and a packed bias not.
    made = {style: nn.Linear(10, 12, bias="packed" not in style) for style in STYLES}
    model = nn.ModuleDict(made).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(generator=rng)
    x = torch.randn(2, 3, 10, generator=rng)
    expected = {style: model[style](x) for style in STYLES}
    entries = [
        PlanEntry(f"{style}.{name}".rstrip("."), style)
        for style in STYLES
        for name in (*dict(model[style].named_parameters()), "")
    ]
    mark_spread(model, groups, apply_plan(model, entries, groups.mesh["tp"]))
    inputs = {
        style: x[..., 5 * rank : 5 * rank + 5] if style == "rowwise" else x for style in STYLES
    }
    observed = Observation()
    with recording(model, observed):
        plans = {style: model[style](inputs[style]).clone() for style in STYLES}
    reports = take_over(model, observed)
    assert all(report.done for report in reports)
    assert not distributed(model)
    halves = {style: whole.chunk(2, -1)[rank] for style, whole in expected.items()}
    quarters = expected["packed_colwise"].chunk(4, -1)  # half of the gate, half of the up product
    wanted = expected | {
        "colwise": halves["colwise"],
        "packed_colwise": torch.cat((quarters[rank], quarters[2 + rank]), -1),
    }
    return {
        style: (
            relative_error(model[style](inputs[style]), plans[style]),
            relative_error(model[style](inputs[style]), wanted[style]),
        )
        for style in STYLES
    }


def test_every_style_with_a_bias(two: Pool) -> None:
    for errors in two.run(take_over_styles):
        for style in STYLES:
            assert max(errors[style]) <= 1e-6, style


def communicate(rank: int, name: str, mode: str, tokens: int) -> tuple[Counter[str], int, int]:
    """In a worker: the collectives of a forward pass, the number of layers, and that of embeddings
    which the installed Transformers splits.
    """
    model = even(name)
    moetor.fuse(model, verify=False, dense=True, parallel=MODES[mode])
    ids = torch.arange(3, 3 + tokens)[None]
    with CommDebugMode() as counted:
        model(input_ids=ids)
    counts = {str(op).rpartition(".")[2]: n for op, n in counted.get_comm_counts().items()}
    return Counter(counts), len(model.model.layers), len(distributed(model))


@pytest.mark.parametrize(
    ("name", "mode", "gathered"),
    [("glm4_moe", "tp", 0), ("glm4_moe", "tp_ep", 0), ("olmoe", "tp", 1)],
)
def test_one_sum_after_attention_and_one_after_the_experts(
    name: str, mode: str, gathered: int, two: Pool
) -> None:
    """And one for the embedding, and one gathering of logits; norms over all heads gather queries,
    keys and values at once.
    """
    for counts, layers, embeddings in two.run(communicate, name, mode, 5):
        assert sum(n for op, n in counts.items() if "reduce" in op) == 2 * layers + embeddings
        assert sum(n for op, n in counts.items() if "gather" in op) == gathered * layers + 1
        assert sum(counts.values()) == (2 + gathered) * layers + embeddings + 1


PROMPTS = [[5, 9, 33, 7], [88, 3], list(range(20, 41)), [64]]


def generate(rank: int, name: str, parallel: ParallelConfig, ready: bool) -> tuple[Any, Any]:
    """In a worker: greedy tokens of a spread and fused model, and of the whole one."""
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (9, 3, 12, 6)]
    answers = []
    for config in (parallel, None):
        model = even(name)
        moetor.fuse(model, verify=False, parallel=config, dense=ready and config is not None)
        asked = "off" if config is None else "auto" if ready else "on"
        llm = LLM(
            model,
            level="none",
            fuse_dense=asked,
            max_num_seqs=3,
            max_num_batched_tokens=8,
            kv_cache_blocks=32,
        )
        assert is_dense_fused(model) == (config is not None)
        outputs = llm.generate(PROMPTS, params)
        answers.append([output.outputs[0].token_ids for output in outputs])
    return answers[0], answers[1]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("qwen3_moe", "tp"), ("gpt_oss", "tp_ep"), ("glm4_moe", "tp_ep"), ("qwen3_moe", "dp_ep")],
)
def test_the_engine_gives_the_same_tokens(name: str, mode: str, two: Pool) -> None:
    for ours, whole in two.run(generate, name, MODES[mode], name == "glm4_moe"):
        assert ours == whole


def find_likeliest(rank: int, dtype: torch.dtype) -> tuple[bool, bool]:
    """In a worker: of a vocabulary of 9, with many equal logits, and rows without a largest one."""
    linear = nn.Linear(4, 9)
    split = SplitVocabulary(GatheredForward(linear, make_groups(MODES["tp"]).tensor))
    rng = torch.Generator().manual_seed(4)
    whole = torch.randint(-2, 3, (60, 9), generator=rng).to(dtype)
    whole[3, 7], whole[4, :], whole[5, 2] = torch.nan, -torch.inf, torch.inf
    whole[6, 6] = torch.finfo(dtype).max
    part = whole[:, :5] if rank == 0 else whole[:, 5:]
    found, expected = split.likeliest(part), whole.argmax(-1)
    assert found.dtype == torch.int64
    same = torch.equal(split.whole(part).nan_to_num(99), whole.nan_to_num(99))
    return same, torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_token_of_a_split_vocabulary(dtype: torch.dtype, two: Pool) -> None:
    assert two.run(find_likeliest, dtype) == [(True, True)] * 2


def gather_logits(rank: int) -> tuple[list[int], bool]:
    """In a worker: how often logits are gathered for greedy tokens, for drawn ones, and for
    log-probabilities of a prompt; and whether the model's own calls give all of them as before.
    """
    model = even("qwen3_moe")
    ids = torch.tensor([PROMPTS[0]])
    whole = model(input_ids=ids).logits
    moetor.fuse(model, verify=False, dense=True, parallel=MODES["tp"])
    llm = LLM(model, level="none", max_num_seqs=3, kv_cache_blocks=32)
    split, calls = llm.engine.served.vocabulary, []
    assert split is not None
    own = split.whole
    split.whole = lambda part: calls.append(part.shape) or own(part)  # type: ignore[method-assign]
    counts = []
    for settings in ({}, {"temperature": 1.0}, {"prompt_logprobs": 1}):
        asked = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True} | settings
        llm.generate(PROMPTS, SamplingParams(**asked))
        counts.append(len(calls))
        calls.clear()
    return counts, relative_error(model(input_ids=ids).logits, whole) <= 1e-5


def test_logits_are_gathered_where_they_are_asked_for(two: Pool) -> None:
    for (greedy, drawn, prompts), whole in two.run(gather_logits):
        assert greedy == 0
        assert drawn >= 4
        assert prompts >= len(PROMPTS) - 1
        assert whole


def squash(rank: int) -> bool:
    """In a worker: logits of which each depends on all are not taken in parts."""
    model = even("qwen3_moe")
    moetor.fuse(model, verify=False, dense=True, parallel=MODES["tp"])
    taken = split_vocabulary(model, spread_over(model)) is not None
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits.log_softmax(-1)
        return output

    model.forward = forward
    return taken and split_vocabulary(model, spread_over(model)) is None


def test_logits_that_depend_on_one_another_stay_whole(two: Pool) -> None:
    assert two.run(squash) == [True, True]


def by_itself(rank: int) -> list[bool]:
    """In a worker: whether the engine fuses by itself, as on one rank."""
    found = []
    for available in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "available", lambda: available)  # noqa: B023
            given = {"dtype": "float32", "device": "cpu", "kv_cache_blocks": 32}
            llm = LLM("demo", parallel=MODES["tp"], **given)
            found.append(is_dense_fused(llm.engine.served.model))
    return found


def test_auto_is_as_on_one_rank(two: Pool) -> None:
    assert two.run(by_itself) == [[True, False]] * 2


def leave_alone(rank: int) -> tuple[list[str], str, str, bool]:
    """In a worker: a module whose wrapper cannot be taken over, and one rank that differs."""
    model = even("qwen3_moe")
    moetor.fuse(model, verify=False, parallel=MODES["tp"])
    wrapped = model.model.layers[1].self_attn.k_proj
    own = wrapped.forward
    wrapped.forward = lambda *args, **kwargs: own(*args, **kwargs)
    inputs = tiny_inputs("qwen3_moe", model)
    before = logits_of("qwen3_moe", model, inputs)
    with pytest.raises(FusionError) as refused:
        fuse_dense(model, whole_plan=True)
    assert not is_dense_fused(model)
    assert torch.equal(logits_of("qwen3_moe", model, inputs), before)
    reports = fuse_dense(model)
    left = [f"{part.name}: {part.reason}" for part in reports if not part.done]
    same = relative_error(logits_of("qwen3_moe", model, inputs), before) <= 1e-5
    with torch.enable_grad(), pytest.raises(UnsupportedError) as gradients:
        model.lm_head(torch.ones(1, 64, requires_grad=True))
    return left, str(refused.value), str(gradients.value), same


def test_what_cannot_be_taken_over(two: Pool) -> None:
    for left, refused, gradients, same in two.run(leave_alone):
        assert left == [
            "model.layers.1.self_attn.k_proj: its forward was wrapped after it was split"
        ]
        assert "fuse_dense='on': 1 modules" in refused
        assert left[0] in refused
        assert "torch.no_grad()" in gradients
        assert same


def differ(rank: int) -> tuple[Counter[str], set[str], bool]:
    """In a worker: the second rank recognises less than the first one."""
    model = even("mixtral")
    moetor.fuse(model, verify=False, parallel=MODES["tp"])
    inputs = tiny_inputs("mixtral", model)
    before = logits_of("mixtral", model, inputs)
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            for name in ("recognise_norm", "recognise_attention"):
                patch.setattr(dense_fusing, name, lambda *_: Unrecognised("never"))
        reports = fuse_dense(model)
    done = Counter(part.kind for part in reports if part.done)
    same = relative_error(logits_of("mixtral", model, inputs), before) <= 1e-5
    return done, {part.reason for part in reports if not part.done}, same


def test_ranks_fuse_what_all_of_them_recognise(two: Pool) -> None:
    (ours, reasons, same), (theirs, _, also) = two.run(differ)
    assert same
    assert also
    assert ours == theirs
    assert not ours["norm"]
    assert not ours["attention"]
    assert ours["split"]
    assert ours["product"]
    assert "another rank does not recognise its own part" in reasons


def spread_late(rank: int) -> None:
    """In a worker: joined first, split afterwards."""
    model = even("mixtral")
    moetor.fuse(model, verify=False, dense=True)
    moetor.parallelize(model, MODES["tp"])


def test_joined_weights_are_not_split(two: Pool) -> None:
    with pytest.raises(RankError, match=r"dense=True, parallel=\.\.\."):
        two.run(spread_late)
