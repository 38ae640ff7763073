"""Flags of commands whose model may be spread over several ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moetor.cli.options import MODEL, ServedModelOptions
from moetor.errors import ConfigError

if TYPE_CHECKING:
    from moetor.parallel.config import ParallelConfig

PARALLEL = "several ranks"


@dataclass(frozen=True, kw_only=True)
class ParallelFlags:
    """One model over several ranks, which the command starts itself where torchrun has not."""

    tensor_parallel_size: int = field(
        default=1,
        metadata={
            "group": PARALLEL,
            "short": "-tp",
            "metavar": "N",
            "help": "ranks that share the model, one process and device each",
        },
    )
    enable_expert_parallel: bool = field(
        default=False,
        metadata={
            "group": PARALLEL,
            "help": "split the experts by expert, not by their intermediate size",
        },
    )
    expert_parallel_size: int | None = field(
        default=None,
        metadata={
            "group": PARALLEL,
            "metavar": "N",
            "help": "with --enable-expert-parallel, split the experts into N parts, each further "
            "split by intermediate size; without it, one part per rank",
        },
    )
    sequence_parallel: bool = field(
        default=False,
        metadata={
            "group": PARALLEL,
            "help": "each rank of a tensor-parallel group runs the experts for a part of the "
            "tokens",
        },
    )
    enable_eplb: bool = field(
        default=False,
        metadata={
            "group": PARALLEL,
            "sets": "eplb",
            "help": "with --enable-expert-parallel, move experts between ranks by the load that is "
            "met",
        },
    )
    eplb_stats: str | None = field(
        default=None,
        metadata={
            "group": PARALLEL,
            "metavar": "FILE.json",
            "sets": "eplb",
            "help": "place experts for a recorded load: a file of moetor experts --save-stats",
        },
    )
    num_redundant_experts: int = field(
        default=0,
        metadata={
            "group": PARALLEL,
            "metavar": "N",
            "help": "with --enable-expert-parallel, further slots per layer, for copies of busy "
            "experts",
        },
    )
    collectives: Literal["auto", "backend", "direct"] = field(
        default="auto",
        metadata={
            "group": PARALLEL,
            "help": "backend leaves all to NCCL or gloo; direct sums small results, and takes "
            "tokens to experts and back, in one launch each between GPUs of one machine; auto "
            "sums small results so, where it gives the same",
        },
    )
    parallel_timeout: float = field(
        default=15.0,
        metadata={
            "group": PARALLEL,
            "metavar": "SECONDS",
            "sets": "timeout",
            "help": "a rank that waits longer for another one gives up, and all end",
        },
    )

    def parallel(self) -> ParallelConfig | None:
        """The configuration that the flags describe; None for one rank.

        Raises:
            ConfigError: the flags contradict one another.
        """
        from moetor.parallel.config import EplbConfig, ParallelConfig

        eplb = None
        if self.enable_eplb or self.eplb_stats is not None:
            eplb = EplbConfig(statistics=self.eplb_stats, dynamic=self.enable_eplb)
        config = ParallelConfig(
            tensor_parallel_size=self.tensor_parallel_size,
            enable_expert_parallel=self.enable_expert_parallel,
            expert_parallel_size=self.expert_parallel_size,
            sequence_parallel=self.sequence_parallel,
            eplb=eplb,
            num_redundant_experts=self.num_redundant_experts,
            collectives=self.collectives,
            timeout=self.parallel_timeout,
            **self._groups_flags(),
        )
        if config.world_size > 1 and getattr(self, "level", "auto") == "none":
            raise ConfigError(
                "--level none runs plain Transformers; several ranks need a fused model. Leave "
                "out one of the two"
            )
        return config if config.world_size > 1 else None

    def _groups_flags(self) -> dict[str, Any]:
        """The fields of `ParallelConfig` that only commands with many prompts have flags for."""
        return {}

    @property
    def processes(self) -> int:
        """How many the command needs, each one rank."""
        return self.tensor_parallel_size


@dataclass(frozen=True, kw_only=True)
class ServingParallelFlags(ParallelFlags):
    """The same for a command with many prompts, which several copies of the attention share."""

    data_parallel_size: int = field(
        default=1,
        metadata={
            "group": PARALLEL,
            "short": "-dp",
            "metavar": "N",
            "help": "copies of the attention, each with its own prompts and its own "
            "tensor-parallel ranks",
        },
    )
    dispatcher: Literal["auto", "allgather", "alltoall"] = field(
        default="auto",
        metadata={
            "group": PARALLEL,
            "help": "how tokens reach experts on ranks that do not have them",
        },
    )

    dispatch_dtype: Literal["auto", "fp8"] = field(
        default="auto",
        metadata={
            "group": PARALLEL,
            "help": "how tokens travel to them; fp8 halves the bytes and rounds the tokens",
        },
    )

    def _groups_flags(self) -> dict[str, Any]:
        names = ("data_parallel_size", "dispatcher", "dispatch_dtype")
        return {name: getattr(self, name) for name in names}

    @property
    def processes(self) -> int:
        """See `ParallelFlags.processes`."""
        return self.tensor_parallel_size * self.data_parallel_size


@dataclass(frozen=True, kw_only=True)
class ParallelModelOptions(ServedModelOptions, ParallelFlags):
    """A model that generates text, over several ranks."""

    batch_invariant: bool = field(
        default=False,
        metadata={
            "group": MODEL,
            "help": "tokens have the bits that a server with --batch-invariant gives them in any "
            "batch; slower, on a CPU, and not for every family",
        },
    )
