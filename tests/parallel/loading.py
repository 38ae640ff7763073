"""In a worker: a checkpoint loaded onto ranks, against the whole model spread afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import moetor
from moetor.huggingface.checkpoint import CheckpointReader
from moetor.huggingface.loading import load_model
from moetor.huggingface.modules import fused_modules
from moetor.huggingface.trial import relative_error
from moetor.tools.tiny import logits_of, tiny_inputs
from parallel.families import MODES, batch, experts_held


@dataclass
class Loaded:
    """What a rank found.

    Attributes:
        differing: parameters that are not those of the model that was spread afterwards.
        equal_logits: bit for bit.
        read: elements of the experts' matrices that were read from files.
        held: elements that this rank keeps of them.
        whole: elements of all.
        levels: of the report.
        ranks: that the report names.
    """

    differing: list[str] = field(default_factory=list)
    equal_logits: bool = False
    read: int = 0
    held: int = 0
    whole: int = 0
    levels: set[str] = field(default_factory=set)
    ranks: int = 0


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return getattr(tensor, "_local_tensor", tensor).detach()


def load_both(rank: int, folder: str, name: str, mode: str, entrance: str) -> Loaded:
    """Both models of one family, in one mode."""
    config = MODES[mode]
    plain = load_model(folder)
    moetor.fuse(plain, verify="sample")
    told = Loaded(whole=experts_held(plain))
    moetor.parallelize(plain, config)
    told.held = experts_held(plain)
    own = CheckpointReader.read

    def count(self: Any, key: str, box: tuple[slice, ...] = ()) -> Tensor:
        found = own(self, key, box)
        if "experts" in key and "shared" not in key and found.dim() > 1 and "bias" not in key:
            told.read += found.numel()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointReader, "read", count)
        ours = getattr(moetor, entrance).from_pretrained(folder, parallel=config)
    theirs = dict(plain.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    told.differing = [
        key
        for key, parameter in ours.named_parameters()
        if not torch.equal(local(parameter), local(theirs[key]))
    ]
    inputs = tiny_inputs(name, plain)
    mine = batch(inputs, rank // config.tensor_parallel_size) if config.joint else inputs
    told.equal_logits = torch.equal(logits_of(name, ours, mine), logits_of(name, plain, mine))
    told.levels = {block.level for block in ours.fusion_report.blocks}
    told.ranks = ours.fusion_report.parallel.groups.config.world_size
    return told


def refuse(rank: int, folder: str, **options: Any) -> str:
    """What loading says."""
    with pytest.raises(moetor.errors.MoetorError) as caught:
        moetor.MoEForCausalLM.from_pretrained(folder, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


def load_quantised(rank: int, model: str, quantization: str | None, mode: str) -> tuple[float, int]:
    """A quantised model on this rank against the whole one: the error of its logits, and the bytes
    of its experts relative to the whole one's, in percent.
    """
    given: dict[str, Any] = {"quantization": quantization, "device": "cpu", "dtype": "float32"}
    whole = moetor.MoEForCausalLM.from_pretrained(model, **given)
    ours = moetor.MoEForCausalLM.from_pretrained(model, **given, parallel=MODES[mode])
    ids = torch.arange(3, 40)[None]
    held = [
        sum(t.nbytes for t in module.routed_experts.parameters())
        for m in (ours, whole)
        for _, module in fused_modules(m)
    ]
    half = len(held) // 2
    assert all(block.quantization for block in ours.fusion_report.blocks)
    error = relative_error(ours(input_ids=ids).logits, whole(input_ids=ids).logits)
    return error, round(100 * sum(held[:half]) / sum(held[half:]))


def refuse_grid(rank: int, folder: str) -> str:
    """A grid of another number of ranks."""
    return refuse(rank, folder, parallel=MODES["tp4_ep2"])
