"""The engine over two GPUs by NCCL, its decoding step in CUDA graphs, against one GPU."""

from __future__ import annotations

import faulthandler
import gc
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moetor import LLM, ParallelConfig, SamplingParams
from moetor.parallel.config import EplbConfig

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

EP: dict[str, Any] = {"enable_expert_parallel": True}
SPREAD = {
    "tp": ParallelConfig(tensor_parallel_size=2, collectives="backend"),
    "tp_direct": ParallelConfig(tensor_parallel_size=2, collectives="direct"),
    "dp_ep": ParallelConfig(data_parallel_size=2, collectives="backend", **EP),
    "dp_ep_direct": ParallelConfig(data_parallel_size=2, collectives="direct", **EP),
    "tp_ep": ParallelConfig(tensor_parallel_size=2, **EP),
    "sp": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, **EP),
    "dp": ParallelConfig(data_parallel_size=2),
    "dp_ep_alltoall": ParallelConfig(data_parallel_size=2, dispatcher="alltoall", **EP),
    "eplb": ParallelConfig(
        data_parallel_size=2,
        eplb=EplbConfig(window=16, interval=8, min_gain=1.0),
        num_redundant_experts=2,
        **EP,
    ),
}
PROMPTS = ["ROMEO:", "To be, or not to be", "KING HENRY:\nOnce more unto the breach", "a", "LADY"]
PARAMS = [
    SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    for length in (24, 48, 12, 36, 5)
]
# Sums in another order, with TensorFloat-32 products.
NEAR = 0.05
# Seconds after which a rank shows where it stands.
HANGS = 60
TOGETHER = 5


def _answers(llm: LLM) -> list[Any]:
    outputs = llm.generate(PROMPTS, PARAMS, progress=False)
    return [(output.prompt_logprobs, output.outputs[0]) for output in outputs]


def _compared(ours: list[Any], whole: list[Any]) -> float:
    """The largest difference of log-probabilities of prompts, and of texts while they are alike."""
    worst = 0.0
    for (prompt, text), (prompt_1, text_1) in zip(ours, whole, strict=True):
        for entry, entry_1 in zip(prompt[1:], prompt_1[1:], strict=True):
            both = entry.keys() & entry_1.keys()
            worst = max([worst, *(abs(entry[t].logprob - entry_1[t].logprob) for t in both)])
        assert len(text.token_ids) == len(text_1.token_ids)
        alike = 0
        for token, token_1, found, found_1 in zip(
            text.token_ids, text_1.token_ids, text.logprobs, text_1.logprobs, strict=True
        ):
            if token != token_1:  # two that are as likely as each other
                break
            worst = max(worst, abs(found[token].logprob - found_1[token].logprob))
            alike += 1
        assert alike >= TOGETHER, (text.token_ids, text_1.token_ids)
    return worst


def _rank(rank: int, spread: str, folder: str, port: int) -> None:
    torch.cuda.set_device(rank)
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    settings: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 128}
    # Few sizes of graphs of prompts: each one is captured for every engine.
    settings |= {"kv_cache_blocks": 64, "max_num_batched_tokens": 64}
    faulthandler.dump_traceback_later(HANGS)
    whole = _answers(LLM("demo", device=f"cuda:{rank}", **settings))
    llm = LLM("demo", device="cuda", parallel=SPREAD[spread], **settings)
    assert llm.engine.without_graphs == "", llm.engine.without_graphs
    told = _compared(_answers(llm), whole), llm.stats().graph_steps
    torch.save(told, Path(folder) / f"rank{rank}.pt")
    # A communicator is not destroyed while a graph that captured its collectives lives.
    del llm
    gc.collect()
    torch.cuda.synchronize()
    dist.destroy_process_group()


@pytest.mark.parametrize("spread", SPREAD)
def test_two_gpus(spread: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(spread, str(tmp_path), port), nprocs=2)
    for rank in range(2):
        error, graph_steps = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert error < NEAR, f"rank {rank}"
        assert graph_steps > 20, "decoding is replayed"
