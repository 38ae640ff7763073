"""`/v1/experts/stats`: how the experts are loaded, and by what they run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from moetor.engine import EngineClient, EngineStoppedError
from moetor.errors import ParallelError
from moetor.server.responses import ExpertsStats, answers

if TYPE_CHECKING:
    from moetor.server.service import Service

router = APIRouter()
# Less than a scrape of Prometheus takes at most; the other figures do not depend on the engine.
_PATIENCE_S = 5.0
# Of what the fusion report says of a block.
_SHOWN = (
    "family_block",
    "level",
    "kernel",
    "router",
    "reason",
    "quantization",
    "num_experts",
    "refusals",
)


def balancedness(counts: Sequence[int]) -> float | None:
    """Mean over maximum of the experts' tokens: 1 where all have the same, 1/E where one has all;
    None before there is a token.
    """
    most = max(counts, default=0)
    return sum(counts) / len(counts) / most if most else None


async def expert_load(engine: EngineClient) -> dict[str, list[int]] | None:
    """Tokens of each expert by layer; None where they are not counted, or nobody can tell."""
    if not engine.config.record_expert_load:
        return None
    try:
        return await asyncio.wait_for(engine.expert_load(), _PATIENCE_S)
    except (EngineStoppedError, ParallelError, TimeoutError):
        return None


@router.get("/v1/experts/stats", response_model=None, responses=answers(ExpertsStats))
async def experts_stats(request: Request) -> dict[str, Any]:
    """Tokens of each expert since the start, the fusion report, and the engine's counters.

    Balancedness is the mean over the maximum of the experts' tokens in a layer.
    """
    service: Service = request.app.state.service
    engine = service.engine
    load = await expert_load(engine)
    layers = [
        {"layer": layer, "tokens": counts, "balancedness": balancedness(counts)}
        for layer, counts in (load or {}).items()
    ]
    stats = engine.stats()
    return {
        "model": service.names[0],
        "time": time.time(),
        "healthy": service.trouble is None,
        "recorded": engine.config.record_expert_load,
        "layers": layers,
        "fusion": [_block(block) for block in engine.fused.blocks or []],
        "engine": {
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "prompt_tokens": stats.prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "prefix_hit_tokens": stats.prefix_hit_tokens,
            "prefix_query_tokens": stats.prefix_query_tokens,
            "requests_finished": stats.requests_finished,
            "max_num_seqs": engine.config.max_num_seqs,
        },
    }


def _block(block: dict[str, Any]) -> dict[str, Any]:
    return {"layer": block["name"], **{name: block[name] for name in _SHOWN}}
