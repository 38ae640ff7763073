"""`moetor serve`: an OpenAI API over a fused model, metrics, and a page that shows the experts."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moetor.cli.console import note, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.cli.options import (
    MODEL,
    QUANTIZATION,
    ModelSource,
    OffloadOptions,
    QuantizationName,
    check_batch_invariant,
    check_one_gpu,
)
from moetor.cli.parallel_options import ServingParallelFlags
from moetor.engine.config import ENGINE, EngineConfig
from moetor.parallel.launch import rank_number
from moetor.server.config import SERVER, ServerConfig

if TYPE_CHECKING:
    from moetor.engine import EngineProcess

_EXTRA = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelSource, EngineConfig, OffloadOptions, ServerConfig, ServingParallelFlags):
    """Serve a model with an OpenAI API.

    Point any OpenAI client at http://HOST:PORT/v1. The page at / has a chat and shows how the
    experts are loaded. SIGTERM or Ctrl-C ends it when running requests are done.
    """

    level: Literal["auto", "block", "experts"] = field(
        default="auto",
        metadata={
            "group": MODEL,
            "help": "fuse whole MoE blocks or their experts alone; "
            "auto takes the deepest that each block allows",
        },
    )
    quantization: QuantizationName | None = field(default=None, metadata=QUANTIZATION)
    # the page and the metrics show it
    record_expert_load: bool = field(
        default=True,
        metadata={
            "group": ENGINE,
            "help": "count how many tokens each expert gets, for the page and /metrics",
        },
    )
    config: Path | None = field(
        default=None,
        metadata={
            "group": SERVER,
            "metavar": "FILE",
            "settings_file": True,
            "help": "YAML file with flags and their values; flags on the command line win",
        },
    )

    @property
    def drains(self) -> bool:
        """SIGTERM lets running requests go on for a while."""
        return True

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        ServerConfig.__post_init__(self)
        check_one_gpu(self, self.parallel())  # refuses flags that contradict one another
        check_batch_invariant(self.batch_invariant, self, self.parallel())


def run(options: ServeOptions) -> int:
    """Serve until a signal, and return the exit status."""
    try:
        from moetor.server.run import serve
    except ModuleNotFoundError as missing:
        if missing.name not in _EXTRA:
            raise
        raise UsageError(
            f"the server needs {missing.name}, which is not installed; pip install 'moetor[serve]'"
        ) from missing
    _prepare()
    if rank_number():
        _follow(options)
        return 0
    serve(lambda: _engine(options), ServerConfig.server_part(options), options.model)
    return 0


def _follow(options: ServeOptions) -> None:
    """Another rank than the one that serves: does what that one does, until it ends."""
    from moetor.engine import ModelSource as EngineSource
    from moetor.engine import build_engine

    source = EngineSource(model=options.model, **model_source(options))
    build_engine(source, EngineConfig.of(options)).core.follow()


def model_source(options: ServeOptions) -> dict[str, Any]:
    """Which model, and how it is loaded."""
    return {
        "kernel": options.kernel,
        "dtype": options.dtype,
        "device": options.device,
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "level": options.level,
        "quantization": options.quantization,
        "parallel": options.parallel(),
        "cpu_experts": options.offload(),
    }


def _engine(options: ServeOptions) -> EngineProcess:
    from moetor.engine import EngineProcess
    from moetor.engine import ModelSource as EngineSource

    note(f"loading {options.model}")
    source = EngineSource(model=options.model, **model_source(options))
    engine = EngineProcess(source, EngineConfig.of(options), prepare=_prepare)
    for line in engine.fused.lines:
        note(line)
    return engine


def _prepare() -> None:
    """Logging, in the server's process and in the engine's."""
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    quiet_transformers()
