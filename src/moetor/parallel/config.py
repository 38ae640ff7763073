"""How a model is spread over ranks, as data. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moetor.errors import ConfigError

DispatcherName = Literal["auto", "allgather", "alltoall"]
DispatchDtype = Literal["auto", "fp8"]
BalancePolicy = Literal["auto", "global", "hierarchical"]
CollectivesName = Literal["auto", "backend", "direct"]


def _check_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{owner}: {name}={value} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class EplbConfig:
    """Expert-parallel load balancing: when experts move, and by what.

    Attributes:
        window: forward passes whose loads are remembered.
        decay: weight of a pass relative to the one after it; 1 weighs all alike.
        interval: forward passes between two looks at the load.
        min_gain: experts move only where the busiest rank's share falls by this factor or more.
        max_bytes_per_step: of weights that a rank receives between two forward passes, at least one
            expert.
        policy: `global` may put any expert anywhere; `hierarchical` keeps the experts of one
            routing group on one node (DeepSeek-V3, arXiv:2412.19437); `auto` takes the latter where
            groups divide by nodes.
        num_nodes: nodes that the ranks stand on, for `hierarchical`.
        statistics: file of `moetor experts --save-stats`, for which the first placement is made;
            None starts with experts in order.
        dynamic: experts move by the load that is met; False keeps the first placement.
    """

    window: int = 1000
    decay: float = 1.0
    interval: int = 3000
    min_gain: float = 1.05
    max_bytes_per_step: int = 256 * 2**20
    policy: BalancePolicy = "auto"
    num_nodes: int = 1
    statistics: str | None = None
    dynamic: bool = True

    def __post_init__(self) -> None:
        _check_positive(
            "EplbConfig",
            window=self.window,
            decay=self.decay,
            interval=self.interval,
            max_bytes_per_step=self.max_bytes_per_step,
            num_nodes=self.num_nodes,
        )
        if not self.dynamic and self.statistics is None:
            raise ConfigError("EplbConfig: dynamic=False without statistics would balance nothing")
        if self.decay > 1:
            raise ConfigError(f"EplbConfig: decay={self.decay} must not exceed 1")
        if self.min_gain < 1:
            raise ConfigError(f"EplbConfig: min_gain={self.min_gain} must be at least 1")
        if self.policy not in ("auto", "global", "hierarchical"):
            raise ConfigError(
                f"EplbConfig: policy={self.policy!r} is not one of auto, global, hierarchical"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """A grid of `data_parallel_size` x `tensor_parallel_size` ranks, and how experts lie on it.

    Attention and dense layers are split over the ranks of a tensor-parallel group. Routed experts
    are split by their intermediate size over the same ranks, or with `enable_expert_parallel` by
    expert over all ranks of the grid. Data-parallel groups see different tokens; with expert
    parallelism they share the experts and must step together, without it they are independent.

    Attributes:
        tensor_parallel_size: ranks that hold one copy of the attention.
        data_parallel_size: copies of the attention.
        enable_expert_parallel: split the experts by expert.
        expert_parallel_size: into so many parts; a part is further split by intermediate size over
            the ranks that share it. None: one part per rank.
        sequence_parallel: ranks of a tensor-parallel group each run the MoE of a part of the
            tokens: reduce-scatter and all-gather in the place of the all-reduce.
        dispatcher: how tokens reach experts on ranks that do not have them.
        dispatch_dtype: `fp8` sends tokens as e4m3 codes with a scale for every 128 values, half the
            bytes, and rounds them so; results return as they are. `auto` rounds nothing.
        max_tokens_per_rank: upper bound of the tokens of one call, to which every rank pads, so
            that nothing depends on the other ranks' counts; needed to capture CUDA graphs of a
            dispatcher. None: counts are exchanged at every call.
        eplb: move and copy experts between ranks by their load; None for a fixed placement.
        num_redundant_experts: further slots per layer, for copies of busy experts.
        collectives: `backend` leaves them to NCCL or gloo. `direct` has a launch write into memory
            that GPUs of one machine share: it sums up to 1 MiB over the ranks of a tensor-parallel
            group, with the norm that follows, and takes tokens to experts and back for the
            dispatcher `allgather`. `auto` takes of this what was measured, sums of up to 512 KiB,
            where trying at the start shows that they are the same.
        timeout: seconds after which a rank that waits for another one gives up.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    expert_parallel_size: int | None = None
    sequence_parallel: bool = False
    dispatcher: DispatcherName = "auto"
    dispatch_dtype: DispatchDtype = "auto"
    max_tokens_per_rank: int | None = None
    eplb: EplbConfig | None = None
    num_redundant_experts: int = 0
    collectives: CollectivesName = "auto"
    timeout: float = 15.0

    def __post_init__(self) -> None:
        me = "ParallelConfig"
        _check_positive(
            me,
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            timeout=self.timeout,
        )
        if self.dispatcher not in ("auto", "allgather", "alltoall"):
            raise ConfigError(
                f"{me}: dispatcher={self.dispatcher!r} is not one of auto, allgather, alltoall"
            )
        if self.dispatch_dtype not in ("auto", "fp8"):
            raise ConfigError(f"{me}: dispatch_dtype={self.dispatch_dtype!r} is not auto or fp8")
        if self.collectives not in ("auto", "backend", "direct"):
            raise ConfigError(
                f"{me}: collectives={self.collectives!r} is not one of auto, backend, direct"
            )
        if self.num_redundant_experts < 0:
            raise ConfigError(
                f"{me}: num_redundant_experts={self.num_redundant_experts} must not be negative"
            )
        exchanges = self.tensor_parallel_size > 1 or self.dispatches
        if self.collectives == "direct" and not exchanges:
            raise ConfigError(
                f"{me}: collectives='direct' concerns sums over ranks and tokens that travel; it "
                "needs tensor_parallel_size of at least 2, or data parallelism with "
                "enable_expert_parallel=True"
            )
        self._check_experts()
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ConfigError(
                f"{me}: sequence_parallel splits tokens over the ranks of a tensor-parallel group; "
                "it needs tensor_parallel_size of at least 2"
            )
        if not self.dispatches:
            self._check_nothing_to_dispatch()

    def _check_experts(self) -> None:
        if not self.enable_expert_parallel:
            asked = {
                "expert_parallel_size": self.expert_parallel_size is not None,
                "eplb": self.eplb is not None,
                "num_redundant_experts": self.num_redundant_experts > 0,
            }
            named = [name for name, given in asked.items() if given]
            if named:
                raise ConfigError(
                    f"ParallelConfig: {', '.join(named)} needs enable_expert_parallel=True"
                )
            return
        parts = self.expert_parallel_size
        if parts is not None and (parts < 1 or self.world_size % parts):
            raise ConfigError(
                f"ParallelConfig: expert_parallel_size={parts} does not divide the "
                f"{self.world_size} ranks; possible: {_divisors(self.world_size)}"
            )

    def _check_nothing_to_dispatch(self) -> None:
        asked = {
            f"dispatcher={self.dispatcher!r}": self.dispatcher != "auto",
            f"dispatch_dtype={self.dispatch_dtype!r}": self.dispatch_dtype != "auto",
            "max_tokens_per_rank": self.max_tokens_per_rank is not None,
        }
        named = [name for name, given in asked.items() if given]
        if named:
            raise ConfigError(
                f"ParallelConfig: {', '.join(named)} concerns tokens that travel to other ranks; "
                "here every rank has every token. It needs data_parallel_size of at least 2 with "
                "enable_expert_parallel=True, or sequence_parallel=True"
            )
        bound = self.max_tokens_per_rank
        if bound is not None and bound < 1:
            raise ConfigError(f"ParallelConfig: max_tokens_per_rank={bound} must be at least 1")

    @property
    def world_size(self) -> int:
        """Ranks of the grid."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def joint(self) -> bool:
        """Whether data-parallel groups share their experts, and so must step together."""
        return self.enable_expert_parallel and self.data_parallel_size > 1

    @property
    def dispatches(self) -> bool:
        """Whether tokens travel between ranks."""
        return self.joint or self.sequence_parallel

    @property
    def num_expert_parts(self) -> int:
        """Into how many parts the experts are split by expert; 1 for none."""
        if not self.enable_expert_parallel:
            return 1
        if self.expert_parallel_size is not None:
            return self.expert_parallel_size
        return self.world_size


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def possible_grids(world_size: int) -> str:
    """The grids that so many ranks can form, as a list for an error's text."""
    return ", ".join(
        f"{tp} x {world_size // tp}" for tp in range(1, world_size + 1) if world_size % tp == 0
    )
