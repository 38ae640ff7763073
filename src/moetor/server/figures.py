"""The line of figures in the log."""

from __future__ import annotations

import asyncio
import logging
import time

from moetor.server.service import Service

_log = logging.getLogger("moetor.server")


async def log_figures(service: Service, interval: float) -> None:
    """Logs a line every `interval` seconds in which something ran, until it is cancelled."""
    before, then, quiet = service.engine.stats(), time.monotonic(), True
    while True:
        await asyncio.sleep(interval)
        stats, now = service.engine.stats(), time.monotonic()
        idle = stats.steps == before.steps and not stats.running and not stats.waiting
        if not (idle and quiet):
            seconds = now - then
            asked = stats.prefix_query_tokens
            _log.info(
                "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
                "Running: %d reqs, Waiting: %d reqs, KV cache usage: %.1f%%, "
                "Prefix cache hit rate: %.1f%%",
                (stats.prompt_tokens - before.prompt_tokens) / seconds,
                (stats.generated_tokens - before.generated_tokens) / seconds,
                stats.running,
                stats.waiting,
                100 * stats.kv_cache_usage,
                100 * stats.prefix_hit_tokens / asked if asked else 0.0,
            )
        before, then, quiet = stats, now, idle
