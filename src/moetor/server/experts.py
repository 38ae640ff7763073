"""`/v1/experts/stats`: how the experts are loaded, and by what they run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

if TYPE_CHECKING:
    from moetor.server.service import Service

router = APIRouter()


def balancedness(counts: Sequence[int]) -> float | None:
    """Mean over maximum of the experts' tokens: 1 where all have the same, 1/E where one has all;
    None before there is a token.
    """
    most = max(counts, default=0)
    return sum(counts) / len(counts) / most if most else None


@router.get("/v1/experts/stats")
async def experts_stats(request: Request) -> dict[str, Any]:
    """Tokens of each expert since the start, the fusion report, and the engine's counters.

    Balancedness is the mean over the maximum of the experts' tokens in a layer.
    """
    service: Service = request.app.state.service
    engine = service.engine
    layers = []
    if engine.engine.config.record_expert_load:
        # On a GPU this waits for the device.
        load = await asyncio.to_thread(engine.expert_load)
        layers = [
            {"layer": layer, "tokens": counts, "balancedness": balancedness(counts)}
            for layer, counts in load.items()
        ]
    stats = engine.stats()
    report = engine.fusion_report
    return {
        "model": service.names[0],
        "time": time.time(),
        "healthy": service.healthy,
        "recorded": engine.engine.config.record_expert_load,
        "layers": layers,
        "fusion": [] if report is None else [_block(block) for block in report.blocks],
        "engine": {
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "prompt_tokens": stats.prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "prefix_hit_tokens": stats.prefix_hit_tokens,
            "prefix_query_tokens": stats.prefix_query_tokens,
            "requests_finished": stats.requests_finished,
            "max_num_seqs": engine.engine.config.max_num_seqs,
        },
    }


def _block(block: Any) -> dict[str, Any]:
    return {
        "layer": block.name,
        "family_block": block.family_block,
        "level": block.level,
        "kernel": block.kernel,
        "router": block.router,
        "reason": block.reason,
        "quantization": block.quantization,
        "num_experts": block.num_experts,
        "refusals": [{"kernel": one.kernel, "reason": one.reason} for one in block.refusals],
    }
