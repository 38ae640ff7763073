"""In a worker: a family's tiny model, spread over the ranks in several ways, against itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

import moetor
from moetor.errors import UnsupportedError
from moetor.huggingface.modules import fused_modules
from moetor.huggingface.trial import relative_error
from moetor.tools.tiny import generate_of, logits_of, tiny_inputs, tiny_model
from parallel.pool import patient

EP = {"enable_expert_parallel": True}
MODES = {
    "tp": patient(tensor_parallel_size=2),
    "tp_ep": patient(tensor_parallel_size=2, **EP),
    "sp": patient(tensor_parallel_size=2, sequence_parallel=True, **EP),
    "dp_ep": patient(data_parallel_size=2, **EP),
    "dp_ep_alltoall": patient(data_parallel_size=2, dispatcher="alltoall", **EP),
    "tp4_ep2": patient(tensor_parallel_size=4, expert_parallel_size=2, **EP),
    "tp2_dp2_ep": patient(tensor_parallel_size=2, data_parallel_size=2, **EP),
    # two parts by expert, each of two slices of the intermediate size
    "tp2_dp2_ep2": patient(
        tensor_parallel_size=2, data_parallel_size=2, expert_parallel_size=2, **EP
    ),
    "tp2_dp2_sp": patient(
        tensor_parallel_size=2, data_parallel_size=2, sequence_parallel=True, **EP
    ),
}


@dataclass
class Told:
    """What a rank found.

    Attributes:
        skipped: why the family was not run.
        errors: of every mode's logits, relative to the largest.
        reports: what was split, by mode.
        held: routed experts' weights on this rank, by mode, and of the whole model under "whole".
        same_tokens: whether greedy generation gives the same, by mode.
    """

    skipped: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    same_tokens: dict[str, bool] = field(default_factory=dict)


def experts_held(model: torch.nn.Module) -> int:
    """Weights of the fused model's routed experts, shared ones once."""
    held = {
        id(experts.down_proj): experts.config.num_experts * experts.config.params_per_expert
        for experts in (module.routed_experts for _, module in fused_modules(model))
    }
    return sum(held.values())


def try_family(rank: int, name: str, modes: list[str], *, generates: bool = False) -> Told:
    """Every mode of one family; with data parallelism the ranks have unequal batches."""
    try:
        model = tiny_model(name)
    except UnsupportedError as missing:
        return Told(skipped=str(missing))
    inputs = tiny_inputs(name, model)
    try:
        logits_of(name, model, inputs)
    except Exception as failure:
        return Told(skipped=f"its own forward fails: {failure}")
    moetor.fuse(model, verify=False)
    told = Told(held={"whole": experts_held(model)})
    for mode in modes:
        config = MODES[mode]
        mine = batch(inputs, rank // config.tensor_parallel_size) if config.joint else inputs
        expected = logits_of(name, model, mine)
        spread = copy.deepcopy(model)
        report = moetor.parallelize(spread, config)
        told.reports[mode] = str(report)
        told.errors[mode] = relative_error(logits_of(name, spread, mine), expected)
        told.held[mode] = experts_held(spread)
        if generates:
            tokens, ours = generate_of(name, model, mine), generate_of(name, spread, mine)
            assert tokens is not None
            told.same_tokens[mode] = ours is not None and torch.equal(tokens, ours)
    return told


def batch(inputs: dict[str, Tensor], data_rank: int) -> dict[str, Tensor]:
    """A rank's own batch: all sequences of the input, or the first one."""
    return {key: value[: 1 if data_rank else None] for key, value in inputs.items()}
