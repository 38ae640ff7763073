"""Worker processes that stay: started once for a whole run of tests, joined by gloo, each with one
import of torch. A test sends a function to all ranks and gets what each of them answers.
"""

from __future__ import annotations

import contextlib
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moetor import ParallelConfig
from moetor.parallel.launch import NO_ANSWER, explain_waiting

# A rank that does not answer for so long hangs.
PATIENCE = 240.0


def patient(**fields: Any) -> ParallelConfig:
    """A configuration for tests of other things than time limits."""
    return ParallelConfig(timeout=PATIENCE, **fields)


def _work(rank: int, ranks: int, port: int, orders: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=PATIENCE),
    )
    while (order := orders.recv()) is not None:
        function, args = order
        try:
            with torch.no_grad():
                answer = function(rank, *args)
            orders.send((True, answer))
        except Exception as error:
            orders.send((False, (type(error), str(error), traceback.format_exc())))
    dist.destroy_process_group()


class RankError(AssertionError):
    """A rank raised: its error's class and text are kept."""

    def __init__(self, rank: int, kind: type[Exception], text: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {trace}")
        self.kind = kind
        self.text = text


class Pool:
    """So many ranks."""

    def __init__(self, ranks: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        self.ranks = ranks
        self.orders: list[Connection] = []
        self.workers = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, ranks, port, theirs), daemon=True)
            worker.start()
            self.orders.append(ours)
            self.workers.append(worker)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, *args)` on every rank; the answers in rank order.

        Raises:
            RankError: a rank raised.
        """
        answers = self.try_all(function, *args)
        failed = [(rank, answer) for rank, (fine, answer) in enumerate(answers) if not fine]
        for rank, answer in failed:
            # One that waited for another one tells less than that one.
            waited = explain_waiting(answer[1]) is not None or NO_ANSWER in answer[1]
            if not waited or (rank, answer) == failed[-1]:
                raise RankError(rank, *answer)
        return [answer for _, answer in answers]

    def try_all(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """The same; for a rank that raised False and (class, text, trace)."""
        for orders in self.orders:
            orders.send((function, args))
        answers = []
        for rank, orders in enumerate(self.orders):
            if not orders.poll(PATIENCE):
                raise AssertionError(f"rank {rank} did not answer for {PATIENCE:.0f} s")
            answers.append(orders.recv())
        return answers

    def close(self) -> None:
        """Ends the workers."""
        for orders in self.orders:
            with contextlib.suppress(OSError):
                orders.send(None)
        for worker in self.workers:
            worker.join(10)
            if worker.is_alive():
                worker.kill()
