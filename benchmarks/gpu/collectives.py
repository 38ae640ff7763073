"""Ways to sum, gather and scatter a layer's results over the GPUs of one machine, in CUDA graphs.

    torchrun --nproc-per-node 2 benchmarks/gpu/collectives.py --json FILE

Every way is compared with NCCL's result, then all are timed interleaved; a time is the slower
rank's, the median over the samples. Sizes are tokens of the whole job, bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric

from moetor.bench.hardware import describe_run
from moetor.kernels import dense
from moetor.kernels.dense import Norm
from moetor.parallel.direct_rows import DirectRows
from moetor.parallel.groups import start_process_group
from moetor.parallel.small_sums import MOST_ROWS, SmallSums

CALLS = 20


class Shared:
    """Memory of every rank that all can read."""

    def __init__(self, count: int) -> None:
        self.own = symmetric.empty(count, dtype=torch.bfloat16, device="cuda")
        self.handle = symmetric.rendezvous(self.own, dist.group.WORLD)
        self.name = dist.group.WORLD.group_name


def ways_to_sum(
    shared: Shared, part: Tensor, made: dict[str, SmallSums]
) -> dict[str, Callable[[], Tensor]]:
    """All-reduces of [T, H] into new tensors; NCCL's own is in place, behind a clone."""
    view = shared.own[: part.numel()].view(part.shape)
    ops, name = torch.ops.symm_mem, shared.name

    def nccl() -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    def one_shot() -> Tensor:
        total = torch.empty_like(part)
        return ops.one_shot_all_reduce_copy_out(view, part, "sum", name, total)

    def two_shot() -> Tensor:
        view.copy_(part)
        total = torch.empty_like(part)
        return ops.two_shot_all_reduce_out(view, "sum", name, total)

    def clone() -> Tensor:
        return part.clone()

    ways = {"nccl": nccl, "torch one shot": one_shot, "torch two shots": two_shot, "clone": clone}
    direct = {way: partial(sums, part) for way, sums in made.items() if sums.takes(part)}
    return ways | direct


def ways_to_norm(part: Tensor, sums: SmallSums) -> dict[str, Callable[[], Tensor]]:
    """All-reduces of [T, H], then the residual's addition and a norm."""
    residual = torch.ones_like(part)
    norm = Norm(torch.ones(part.shape[1], device="cuda", dtype=part.dtype), 1e-6)

    def nccl() -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return dense.add_rms_norm(total, residual, norm)[0]

    def two() -> Tensor:
        return dense.add_rms_norm(sums(part), residual, norm)[0]

    def one() -> Tensor:
        return sums.add_rms_norm(part, residual, norm)[0]

    return {"nccl": nccl, "direct, two launches": two, "direct, one": one}


def ways_to_exchange(whole: Tensor, rows: DirectRows) -> dict[str, Callable[[], Tensor]]:
    """All-gathers of [T / R, H] and routing, then a reduce-scatter of [T, H]."""
    ranks = dist.get_world_size()
    part = whole[: whole.shape[0] // ranks].contiguous()
    routing = torch.zeros(len(part), 16, device="cuda", dtype=torch.int32)

    def nccl() -> Tensor:
        both, routings = torch.empty_like(whole), routing.new_empty(ranks * len(part), 16)
        dist.all_gather_into_tensor(both, part)
        dist.all_gather_into_tensor(routings, routing)
        own = torch.empty_like(part)
        dist.reduce_scatter_tensor(own, both)
        return own

    def direct() -> Tensor:
        assert rows.takes(part, routing, part), "so much has room"
        both, _ = rows.gather(part, routing)
        return rows.scatter(both)

    return {"nccl": nccl, "direct": direct}


def capture(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `CALLS` calls, and the last one's result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            result = call()
    return graph, result


def measure(ways: dict[str, Callable[[], Tensor]], samples: int, host: Any) -> dict[str, Any]:
    """Microseconds a call of every way, and its largest difference from NCCL's."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
    failed = {}
    for name, call in ways.items():
        try:
            graphs[name] = capture(call)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(samples + 2):
        for name, (graph, _) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dist.barrier(group=host)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number >= 2:
                times[name].append(begin.elapsed_time(end) * 1e3 / CALLS)
    row: dict[str, Any] = {"us": {}, "error": {}, "failed": failed}
    for name, (_, result) in graphs.items():
        slower = torch.tensor(times[name])
        dist.all_reduce(slower, op=dist.ReduceOp.MAX, group=host)
        row["us"][name] = round(statistics.median(slower.tolist()), 2)
        expected = graphs["nccl"][1].float()
        row["error"][name] = float((result.float() - expected).abs().max())
    return row


def main() -> None:
    """Measures what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--json", default="collectives.json")
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    start_process_group("cuda")
    dist.barrier(device_ids=[torch.cuda.current_device()])
    host = dist.new_group(backend="gloo")
    sizes = list(map(int, args.tokens.split(",")))
    shared = Shared(max(sizes) * args.hidden * 2)
    record = {**describe_run("cuda", torch.get_num_threads()), "rows": []}
    record["command"] = "torchrun --nproc-per-node 2 benchmarks/gpu/collectives.py"
    record["multicast"] = bool(shared.handle.multicast_ptr)
    rng = torch.Generator("cuda").manual_seed(dist.get_rank())

    def note(what: str, tokens: int, ways: dict[str, Callable[[], Tensor]]) -> None:
        row = {"what": what, "tokens": tokens, **measure(ways, args.samples, host)}
        record["rows"].append(row)
        if dist.get_rank() == 0:
            print(what, tokens, row["us"], row["error"], row["failed"] or "", flush=True)
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")

    wholes = {
        tokens: torch.randn(tokens, args.hidden, device="cuda", generator=rng).bfloat16()
        for tokens in sizes
    }
    where = torch.device("cuda", torch.cuda.current_device())
    direct = {
        f"direct, {block}": SmallSums(dist.group.WORLD, where, block=block, most_bytes=4 * 2**20)
        for block in (1024, 2048)
    }
    rows = DirectRows(dist.group.WORLD, where)
    for tokens, whole in wholes.items():
        note("all-reduce", tokens, ways_to_sum(shared, whole, direct))
        if tokens <= MOST_ROWS:
            note("all-reduce, residual, norm", tokens, ways_to_norm(whole, direct["direct, 2048"]))
        if tokens % dist.get_world_size() == 0:
            note("gather and scatter", tokens, ways_to_exchange(whole, rows))
    torch.cuda.synchronize()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
