"""The ranks of a run as a grid of process groups, and what they must agree on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moetor.errors import ConfigError, ParallelError, UnsupportedError
from moetor.parallel.config import ParallelConfig, possible_grids
from moetor.parallel.direct_rows import start_direct_rows
from moetor.parallel.launch import local_rank
from moetor.parallel.small_sums import start_small_sums

# Loading and compiling may differ by minutes between ranks; only steps are watched closely.
START_TIMEOUT = timedelta(minutes=30)


_made: dict[tuple[ParallelConfig, str], tuple[dist.ProcessGroup, ParallelGroups]] = {}


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """This rank's place in the grid of a `ParallelConfig`.

    Attributes:
        world: all ranks, data-parallel groups one after the other.
        tensor: the ranks that share this rank's tokens and its copy of the attention.
        aside: the ranks of `tensor` once more, for questions that must not be taken for one of the
            model's collectives.
        data: the ranks at the same place of the other tensor-parallel groups.
        mesh: the same as a mesh with the dimensions `dp` and `tp`.
        not_direct: why collectives are not direct; None where they are.
    """

    config: ParallelConfig
    rank: int
    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    aside: dist.ProcessGroup
    data: dist.ProcessGroup
    mesh: DeviceMesh
    not_direct: str | None

    @property
    def tensor_rank(self) -> int:
        """This rank's number in its tensor-parallel group."""
        return self.rank % self.config.tensor_parallel_size

    @property
    def data_rank(self) -> int:
        """The number of this rank's tensor-parallel group."""
        return self.rank // self.config.tensor_parallel_size


def start_process_group(device: torch.device | str) -> None:
    """Joins the ranks that a launcher started, unless they are joined already.

    Raises:
        ConfigError: no launcher has said which rank this is.
        UnsupportedError: torch lacks the backend for this device.
    """
    if not dist.is_available():
        raise UnsupportedError(
            "this build of torch has no torch.distributed, which several ranks need; run on one "
            "device"
        )
    if dist.is_initialized():
        return
    if not dist.is_torchelastic_launched() and not _named_by_environment():
        raise ConfigError(
            "several ranks were asked for in a process that no launcher started; run the program "
            "by torchrun --nproc-per-node=N, or use moetor generate -tp N"
        )
    cuda = torch.device(device).type == "cuda"
    if cuda and not dist.is_nccl_available():
        raise UnsupportedError(
            "several CUDA devices need NCCL, which this build of torch lacks; install a CUDA build "
            "of torch, or run on the CPU"
        )
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=START_TIMEOUT)


def join_ranks(device: str = "auto") -> str:
    """Joins the ranks that a launcher started, each with a device of its own; this one's device.

    Args:
        device: cpu, cuda, or `auto` for cuda where there are GPUs.

    Raises:
        ConfigError: a device that all ranks would share, or fewer GPUs than ranks.
    """
    if device.startswith("cuda:"):
        raise ConfigError(f"{device} is one GPU; several ranks take cuda, one GPU each")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        number, gpus = local_rank(), torch.cuda.device_count()
        if gpus <= number:
            raise ConfigError(
                f"rank {number} of this machine has no GPU: there are {gpus}. Take at most "
                f"{gpus or 1} ranks here, or device cpu"
            )
        torch.cuda.set_device(number)
        start_process_group("cuda")
        return f"cuda:{number}"
    start_process_group(device)
    return device


def _named_by_environment() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def make_groups(config: ParallelConfig, device: torch.device | str = "cpu") -> ParallelGroups:
    """The groups of `config` among the ranks that have joined; every rank must call it.

    They are made once per configuration: they hold sockets and, on GPUs, memory.

    Raises:
        ConfigError: the ranks are not as many as the grid has.
        ParallelError: the ranks were given different configurations.
        UnsupportedError: an all-reduce was asked for that is not possible here.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size != config.world_size:
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} x data_parallel_size="
            f"{config.data_parallel_size} needs {config.world_size} ranks, and {world_size} "
            f"{'have' if world_size > 1 else 'has'} joined; possible here (tensor x data): "
            f"{possible_grids(world_size)}"
        )
    start_process_group(device)
    kind = torch.device(device).type
    known = _made.get((config, kind))
    if known is not None and known[0] is dist.group.WORLD:
        return known[1]
    agree({"the parallel configuration": repr(config)})
    rank, tp = dist.get_rank(), config.tensor_parallel_size
    options = {"timeout": timedelta(seconds=config.timeout)}
    if kind == "cpu":
        options["backend"] = "gloo"  # type: ignore[assignment]
    grid = [list(range(first, first + tp)) for first in range(0, world_size, tp)]
    tensor = _mine(grid, rank, options)
    data = _mine([list(ranks) for ranks in zip(*grid, strict=True)], rank, options)
    mesh = DeviceMesh.from_group(
        [data, tensor], kind, mesh=torch.tensor(grid), mesh_dim_names=("dp", "tp")
    )
    world = _mine([list(range(world_size))], rank, options)
    # Where tokens travel: see `layout`.
    joint = world if config.sequence_parallel else data
    tokens = None if not config.dispatches else joint if config.joint else tensor
    made = ParallelGroups(
        config=config,
        rank=rank,
        world=world,
        tensor=tensor,
        aside=_mine(grid, rank, options),
        data=data,
        mesh=mesh,
        not_direct=_start_direct(tensor, tokens, config, kind),
    )
    assert dist.group.WORLD is not None, "the ranks have joined"
    _made[config, kind] = dist.group.WORLD, made
    return made


def _start_direct(
    tensor: dist.ProcessGroup, tokens: dist.ProcessGroup | None, config: ParallelConfig, kind: str
) -> str | None:
    """Why collectives are not direct, the same on all ranks; None where they are.

    Args:
        tensor: whose ranks' results are summed.
        tokens: between whose ranks tokens travel, if they do.
    """
    if config.tensor_parallel_size == 1 and tokens is None:
        return "ranks exchange nothing"
    if config.collectives == "backend":
        return "collectives='backend' was asked for"
    device = torch.device("cpu" if kind == "cpu" else f"cuda:{torch.cuda.current_device()}")
    everything = config.collectives == "direct"
    reason = None
    if config.tensor_parallel_size > 1:
        reason = start_small_sums(tensor, device, everything=everything)
    if tokens is not None and everything:
        reason = reason or start_direct_rows(tokens, device)
    elif config.tensor_parallel_size == 1:
        reason = "tokens travel so where collectives='direct' is asked for"
    if reason is not None and config.collectives == "direct":
        raise UnsupportedError(
            f"collectives='direct' is not possible here: {reason}; take 'backend' or 'auto'"
        )
    return reason


def _mine(rows: list[list[int]], rank: int, options: dict[str, Any]) -> dist.ProcessGroup:
    """The group of the row that holds this rank; every rank makes every group."""
    mine: dist.ProcessGroup | None = None
    for row in rows:
        made = dist.new_group(row, **options)
        if rank in row:
            mine = made
    assert mine is not None, "every rank is in some row"
    return mine


def agree(facts: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Makes sure that every rank states the same facts.

    Args:
        facts: what must be equal, by name; values that JSON or `repr` can write.

    Raises:
        ParallelError: on every rank, naming the fact and the ranks that differ from rank 0.
    """
    digests = {name: _digest(value) for name, value in facts.items()}
    texts = {name: _short(value) for name, value in facts.items()}
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (digests, texts), group)
    wrong = []
    for name, expected in told[0][0].items():
        odd = [rank for rank, (theirs, _) in enumerate(told) if theirs.get(name) != expected]
        if odd:
            said = ", ".join(f"rank {rank}: {told[rank][1].get(name)}" for rank in odd[:3])
            wrong.append(f"{name} (rank 0: {told[0][1][name]}; {said})")
    if wrong:
        raise ParallelError(
            f"the ranks disagree on {'; '.join(wrong)}. Start every rank with the same command, "
            "the same versions and the same model files"
        )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({_digest(value)[:8]})"
