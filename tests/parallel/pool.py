"""Worker processes that stay: started once for a whole run of tests, joined by gloo, each with one
import of torch. A test sends a function to all ranks and gets what each of them answers.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moetor import ParallelConfig
from moetor.parallel.launch import NO_ANSWER, explain_waiting

# A rank that does not answer for so long hangs; so much less when another one has failed already,
# for which it may wait.
PATIENCE, PATIENCE_AFTER = 240.0, 20.0


def patient(**fields: Any) -> ParallelConfig:
    """A configuration for tests of other things than time limits."""
    return ParallelConfig(timeout=PATIENCE, **fields)


def _work(rank: int, ranks: int, meeting: str, orders: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
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


class _SilentError(Exception):
    """A rank that hangs or has ended."""


def _nothing(why: str) -> tuple[bool, Any]:
    text = f"{NO_ANSWER}: {why}"
    return False, (_SilentError, text, text)


def _received(orders: Connection) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = orders.recv()
    except (EOFError, OSError):
        return _nothing("its process has ended")
    return answer


class RankError(AssertionError):
    """A rank raised: its error's class and text are kept."""

    def __init__(self, rank: int, kind: type[Exception], text: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {trace}")
        self.kind = kind
        self.text = text


class Pool:
    """So many ranks. Where one does not answer, all are replaced, so that the next test has sound
    ones.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._folder = tempfile.TemporaryDirectory(prefix="moetor-ranks-")
        self._numbers = itertools.count()
        self._start()

    def _start(self) -> None:
        # A file, because a port that is free now may not be so in a moment.
        meeting = str(Path(self._folder.name) / f"meeting{next(self._numbers)}")
        context = mp.get_context("spawn")
        self.orders: list[Connection] = []
        self.workers = []
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_work, args=(rank, self.ranks, meeting, theirs), daemon=True
            )
            worker.start()
            theirs.close()  # so that the end of a worker is noticed
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
        """The same; for a rank that raised, or did not answer, False and (class, text, trace)."""
        for orders in self.orders:
            orders.send((function, args))
        answers: dict[Connection, tuple[bool, Any]] = {}
        end = time.monotonic() + PATIENCE
        while len(answers) < self.ranks:
            silent = [orders for orders in self.orders if orders not in answers]
            ready = wait(silent, max(0.0, end - time.monotonic()))
            if not ready:
                break
            for orders in silent:
                if orders in ready:
                    answers[orders] = _received(orders)
                    if not answers[orders][0]:
                        end = min(end, time.monotonic() + PATIENCE_AFTER)
        told = [answers.get(orders, _nothing("was silent for too long")) for orders in self.orders]
        if any(not fine and answer[0] is _SilentError for fine, answer in told):
            self._replace()
        return told

    def _replace(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        self._start()

    def close(self) -> None:
        """Ends the workers."""
        for orders in self.orders:
            with contextlib.suppress(OSError):
                orders.send(None)
        for worker in self.workers:
            worker.join(10)
            if worker.is_alive():
                worker.kill()
