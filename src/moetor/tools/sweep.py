"""One family after the other: fuse its tiny model and compare it with itself.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import moetor
from moetor.errors import MoetorError, UnsupportedError
from moetor.huggingface.fused_experts import FusedExperts
from moetor.huggingface.modules import FusedMoEBlock
from moetor.huggingface.report import FusionReport
from moetor.huggingface.trial import relative_error
from moetor.tools.tiny import generate_of, logits_of, tiny_inputs, tiny_model
from moetor.tools.tiny.images import IMAGES, tiny_image_inputs

NO_BLOCK = "no MoE block is found"


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyRow:
    """What the sweep found for one family; None and empty text: it was not asked or not reached.

    Attributes:
        levels: number of blocks at level block, experts, none.
        routing: as recognised, each distinct one.
        float32_error: of the logits after fusing, largest deviation over the largest logit.
        bfloat16_error: of the logits of the fused bfloat16 model against the same bfloat16 weights
            in float32, see `typical_error`.
        bfloat16_original: the same of the model that is not fused.
        bfloat16_largest: largest deviations of both, where one choice of experts that tips over
            by rounding shows: fused, original.
        compiled: whether a fused block of every kind compiles as one graph.
        greedy: whether `generate` gives the same tokens.
        images_error: as `float32_error`, with a picture in each sequence.
        seconds: that the family took.
        note: why blocks are not at level block, and what failed.
    """

    family: str
    levels: tuple[int, int, int] = (0, 0, 0)
    routing: tuple[str, ...] = ()
    float32_error: float | None = None
    bfloat16_error: float | None = None
    bfloat16_original: float | None = None
    bfloat16_largest: tuple[float, float] | None = None
    compiled: bool | None = None
    greedy: bool | None = None
    images_error: float | None = None
    seconds: float = 0.0
    note: str = ""


def sweep(families: Iterable[str]) -> Iterator[FamilyRow]:
    """A row for every family that the installed Transformers has, whatever happens in it."""
    for name in families:
        start = time.perf_counter()
        try:
            row = check_family(name)
        except UnsupportedError as missing:
            row = FamilyRow(family=name, note=f"skipped: {missing}")
        except Exception as failure:
            row = FamilyRow(family=name, note=failure_text(failure))
        yield replace(row, seconds=time.perf_counter() - start)


def check_family(name: str) -> FamilyRow:
    """The row of one family.

    Raises:
        UnsupportedError: the installed Transformers does not have the family.
    """
    model = tiny_model(name)
    inputs = tiny_inputs(name, model)
    before = logits_of(name, model, inputs)
    tokens = generate_of(name, model, inputs)
    pictured = tiny_image_inputs(name, model) if name in IMAGES else None
    seen = None if pictured is None else logits_of(name, model, pictured)
    row, notes = FamilyRow(family=name), []
    try:
        report = moetor.fuse(model)
    except MoetorError as refusal:
        return replace(row, note=failure_text(refusal))
    row = replace(row, **_levels(report))
    notes += list(dict.fromkeys(block.reason for block in report.blocks if block.reason))
    if not report.blocks:
        return replace(row, note=NO_BLOCK)
    if not any(row.levels[:2]):
        return replace(row, note="; ".join(notes))
    row = replace(row, float32_error=relative_error(logits_of(name, model, inputs), before))
    if pictured is not None and seen is not None:
        ours_seen = logits_of(name, model, pictured)
        row = replace(row, images_error=relative_error(ours_seen, seen))
    if tokens is not None:
        ours = generate_of(name, model, inputs)
        row = replace(row, greedy=ours is not None and torch.equal(ours, tokens))
    steps: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: _compiled(model, lambda: logits_of(name, model, inputs)),
        lambda: _bfloat16(name, report, notes),
    )
    for step in steps:
        try:
            row = replace(row, **step())
        except Exception as failure:
            notes.append(failure_text(failure))
            if step is steps[0]:
                row = replace(row, compiled=False)
    return replace(row, note="; ".join(notes))


def typical_error(logits_BSV: Tensor, exact_BSV: Tensor) -> float:
    """The median over tokens of the relative error of a token's logits.

    The median, because in half precision a token whose choice of experts is a near tie takes
    another expert, fused or not; its error says nothing about either.
    """
    deviation = (logits_BSV - exact_BSV).norm(dim=-1) / exact_BSV.norm(dim=-1)
    return float(deviation.median())


def failure_text(failure: BaseException) -> str:
    """An exception as one line."""
    text = " ".join(str(failure).split())
    kind = "" if isinstance(failure, MoetorError) else f"{type(failure).__name__}: "
    return f"{kind}{text[:240]}"


def _levels(report: FusionReport) -> dict[str, Any]:
    levels = tuple(report.count(level) for level in ("block", "experts", "none"))
    routing = dict.fromkeys(block.router for block in report.blocks if block.router)
    return {"levels": levels, "routing": tuple(routing)}


def _bfloat16(name: str, report: FusionReport, notes: list[str]) -> dict[str, Any]:
    """Both errors in bfloat16, against the rounded weights in float32.

    Where a block reaches another level than in float32, that is added to the notes.
    """
    rounded = tiny_model(name, torch.bfloat16)
    exact = tiny_model(name)
    exact.load_state_dict(rounded.state_dict())
    inputs = tiny_inputs(name, exact)
    target = logits_of(name, exact, inputs)
    given = tiny_inputs(name, rounded)
    original = logits_of(name, rounded, given)
    for before, now in zip(report.blocks, moetor.fuse(rounded).blocks, strict=True):
        if now.level != before.level:
            notes.append(f"in bfloat16 {now.name} is at level {now.level}: {now.reason}")
            break
    fused = logits_of(name, rounded, given)
    return {
        "bfloat16_error": typical_error(fused, target),
        "bfloat16_original": typical_error(original, target),
        "bfloat16_largest": (relative_error(fused, target), relative_error(original, target)),
    }


def _compiled(model: nn.Module, forward: Callable[[], Any]) -> dict[str, Any]:
    """Compiles one fused module of every kind as one graph, and compares its answer.

    The backend `eager` shows whether the graph can be captured, which is what a family's own
    code decides; it generates no code, which takes far longer and depends on the kernel alone.

    Raises:
        Exception: whatever keeps the graph from being captured.
    """
    for module, args, kwargs in _calls(model, forward):
        torch.compiler.reset()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        with torch.no_grad():
            ours, expected = _first(compiled(*args, **kwargs)), _first(module(*args, **kwargs))
        if relative_error(ours, expected) > 1e-6:
            raise RuntimeError(f"the compiled {type(module).__name__} gives another result")
    return {"compiled": True}


def _calls(
    model: nn.Module, forward: Callable[[], Any]
) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """One fused module of every kind that a forward reaches, with what it is called with."""
    found: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(_kind(module), (module, args, kwargs))

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, FusedMoEBlock | FusedExperts)
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _kind(module: nn.Module) -> str:
    """Modules of one kind run the same code: the original's class and the routing."""
    original = module.__dict__.get("_original")
    routing = getattr(module, "token_router", None)
    return f"{type(original).__name__} {getattr(routing, 'label', '')}"


def _first(answer: Any) -> Tensor:
    first: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return first
