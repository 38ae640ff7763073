"""Starts the ranks of a command on this machine, and ends all of them when one ends badly.

Ranks find one another as under torchrun, by the environment variables that it sets, and tell their
error as under it, in a file.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetor.errors import ParallelError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
NO_ANSWER = "did not answer"
_FAILED = "failed"
POLL_SECONDS = 0.05
# A rank that was told to end is killed after so long.
GRACE_SECONDS = 3.0
# One that goes on after it has told an error, or a server that is told of one, may give its last
# answers for so long.
TOLD_SECONDS = 2.0
# Other ranks notice a failure and fail too; what they say then is not the cause.
SETTLE_SECONDS = 0.3


@dataclass(slots=True)
class _Rank:
    """A process, and where its words go."""

    number: int
    process: subprocess.Popen[bytes]
    error: Path
    log: Path


def is_rank() -> bool:
    """Whether a launcher, ours or torchrun, has started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def rank_number() -> int:
    """This process's rank; 0 where no launcher has started it."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine, and the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def tell_launcher(text: str) -> bool:
    """Leaves an error for the launcher to show; False where there is none to leave it for."""
    file = os.environ.get(ERROR_FILE)
    if not file or not is_rank():
        return False
    text = explain_waiting(text) or text
    told = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(file).write_text(json.dumps(told), encoding="utf-8")
    return True


def failure_elsewhere() -> str | None:
    """What has ended another rank, once the launcher knows it; None also where there is none."""
    file = os.environ.get(ERROR_FILE)
    if not file or not is_rank():
        return None
    with suppress(FileNotFoundError):
        return Path(file).with_name(_FAILED).read_text(encoding="utf-8")
    return None


def launch(
    command: Sequence[str],
    ranks: int,
    *,
    stdin: Path | None = None,
    drains: bool = False,
    converses: bool = False,
) -> int:
    """Runs `command` as so many ranks. Rank 0 has this process's output.

    Args:
        stdin: a file that every rank reads as its standard input; none otherwise.
        drains: rank 0 ends in order, and the others with it, when it gets SIGTERM: so it gets the
            first SIGTERM or Ctrl-C that this process gets. Otherwise, and at the second one, all
            are ended.
        converses: rank 0 reads this process's standard input.

    Returns:
        0: all ranks have ended well.

    Raises:
        ParallelError: a rank died or ended badly; names it and its error. All are ended.
    """
    with tempfile.TemporaryDirectory(prefix="moetor-ranks-") as folder:
        started: list[_Rank] = []
        before = _catch_signals(started if drains else [])
        try:
            for number in range(ranks):
                started.append(_start(command, ranks, number, Path(folder), stdin, converses))
            if not _all_end_well(started):
                if drains:
                    _tell_all(_why(started), Path(folder))
                _settle(started, answers=drains)
                raise ParallelError(_why(started))
        finally:
            _end(started)
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def _catch_signals(drained: list[_Rank]) -> dict[int, Any]:
    """Handles SIGTERM and Ctrl-C until the handlers that were there, which it gives, are back."""
    asked = False

    def handle(number: int, _: Any) -> None:
        nonlocal asked
        if drained and not asked:
            asked = True
            drained[0].process.send_signal(signal.SIGTERM)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return {}  # only there may signals be handled
    return {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}


def _start(
    command: Sequence[str],
    ranks: int,
    number: int,
    folder: Path,
    stdin: Path | None,
    converses: bool,
) -> _Rank:
    environment = _environment(ranks, number, folder)
    log = folder / f"rank{number}.log"
    with log.open("wb") as words, open(stdin or os.devnull, "rb") as given:
        process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=None if converses and number == 0 else given,
            stdout=None if number == 0 else words,
            stderr=None if number == 0 else words,
            # Ctrl-C reaches the launcher, which ends the ranks.
            start_new_session=True,
        )
    return _Rank(number, process, Path(environment[ERROR_FILE]), log)


def _environment(ranks: int, number: int, folder: Path) -> dict[str, str]:
    port = folder / "port"
    if not port.exists():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port.write_text(str(free.getsockname()[1]))
    ours: Mapping[str, str | int] = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port.read_text(),
        ERROR_FILE: str(folder / f"rank{number}.json"),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    return {**threads, **os.environ, **{name: str(value) for name, value in ours.items()}}


def _all_end_well(started: list[_Rank]) -> bool:
    """Waits until all have ended well, or one has not."""
    running = list(started)
    while running:
        # One that has told an error may have to go on, as a server that answers 503 does.
        if any(rank.process.poll() or rank.error.exists() for rank in running):
            return False
        running = [rank for rank in running if rank.process.poll() is None]
        time.sleep(POLL_SECONDS)
    return True


def _tell_all(why: str, folder: Path) -> None:
    """Has `failure_elsewhere` give `why`, whole as soon as it is there."""
    written = folder / f"{_FAILED}.new"
    written.write_text(why, encoding="utf-8")
    written.rename(folder / _FAILED)


def _settle(started: list[_Rank], *, answers: bool) -> None:
    """Other ranks may have something to tell too, and clients of a server their last answers.

    Args:
        answers: rank 0 has clients.
    """
    until = time.monotonic() + TOLD_SECONDS
    while time.monotonic() < until:
        running = [rank for rank in started if rank.process.poll() is None]
        if not any(rank.error.exists() or (answers and rank.number == 0) for rank in running):
            break
        time.sleep(POLL_SECONDS)
    time.sleep(SETTLE_SECONDS)


def _why(started: list[_Rank]) -> str:
    """The cause, and who had to be ended: of several errors, one that is not of waiting."""
    told = []
    for rank in started:
        status = rank.process.poll()
        error = _told(rank)
        if status == 0 or (status is None and error is None):
            continue
        # What a rank has told is the cause also where a signal ended it: a library's threads, in
        # the middle of a collective that failed, may abort a process that is about to exit.
        what = error or f"{_ended(status)}{_last_words(rank)}"
        told.append((NO_ANSWER in what, rank.number, what))
    waited, number, what = min(told)
    text = f"rank {number} of {len(started)}: {what}"
    running = [
        str(rank.number)
        for rank in started
        if rank.process.poll() is None and rank.number != number
    ]
    if waited and running:
        text += f"; rank {', '.join(running)} still ran, and was ended"
    return text


def _ended(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def explain_waiting(text: str) -> str | None:
    """What a collective's own error means, where it is that another rank is silent or gone."""
    if any(
        sign in text for sign in ("Timed out waiting", "timed out", "Timeout", "timeout caused")
    ):
        return f"another rank {NO_ANSWER} in time (--parallel-timeout)"
    if any(sign in text for sign in ("closed by peer", "reset by peer", "Broken pipe")):
        return f"another rank {NO_ANSWER}: it has ended"
    return None


def _told(rank: _Rank) -> str | None:
    """The error that a rank has left."""
    try:
        told = json.loads(rank.error.read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError):
        return None
    return str(told["message"] if isinstance(told, dict) else told)


def _last_words(rank: _Rank) -> str:
    lines = rank.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def _end(started: list[_Rank]) -> None:
    """Ends what still runs."""
    for rank in started:
        if rank.process.poll() is None:
            rank.process.terminate()
    until = time.monotonic() + GRACE_SECONDS
    for rank in started:
        try:
            rank.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
        with suppress(ProcessLookupError):  # what a rank has started and left, such as an engine
            os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()


def python_command(arguments: Sequence[str]) -> list[str]:
    """The command line of this program with these arguments."""
    return [sys.executable, "-m", "moetor", *arguments]
