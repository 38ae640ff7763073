"""The engine on two ranks: the same tokens as on one, for requests that come and go together."""

from __future__ import annotations

import pytest

from moetor import LLM, ParallelConfig, SamplingParams
from parallel.pool import Pool, RankError

PROMPTS = ["ROMEO:", "To be, or not to be", "KING HENRY:\nOnce more", "a"]
EP = {"enable_expert_parallel": True}
CONFIGS = {
    "tp": ParallelConfig(tensor_parallel_size=2),
    "tp_ep": ParallelConfig(tensor_parallel_size=2, **EP),
    "sp": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, **EP),
}
# Greedy and sampled, of different lengths; fewer rows than requests, so that some wait.
PARAMS = [
    SamplingParams(max_tokens=length, temperature=temperature)
    for length, temperature in ((9, 0.0), (4, 0.8), (12, 0.0), (7, 1.0))
]


def tokens_of(parallel: ParallelConfig | None) -> list[list[int]]:
    llm = LLM("demo", dtype="float32", device="cpu", parallel=parallel, max_num_seqs=3)
    outputs = llm.generate(PROMPTS, PARAMS)
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare(rank: int, parallel: ParallelConfig) -> tuple[list[list[int]], list[list[int]]]:
    """In a worker: spread and whole."""
    return tokens_of(parallel), tokens_of(None)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_tokens(name: str, two: Pool) -> None:
    for ours, whole in two.run(compare, CONFIGS[name]):
        assert ours == whole


def test_data_parallel_ranks_are_refused(two: Pool) -> None:
    with pytest.raises(RankError, match="possible: tensor_parallel_size alone"):
        two.run(compare, ParallelConfig(data_parallel_size=2, **EP))
