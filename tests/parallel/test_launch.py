"""The launcher: ranks that end well, die, hang, disagree; one error, and nobody left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetor.engine.ranks import REST_SHARE
from moetor.errors import ParallelError
from moetor.parallel.config import ParallelConfig
from moetor.parallel.launch import (
    GRACE_SECONDS,
    POLL_SECONDS,
    SETTLE_SECONDS,
    TOLD_SECONDS,
    launch,
)

# After so many seconds something hangs. The promise of 30 is not for a machine that others stall.
LIMIT = 120.0

NOTE = """
import os, sys, pathlib, time
folder = pathlib.Path(sys.argv[1])
rank = os.environ["RANK"]
(folder / f"pid{rank}").write_text(str(os.getpid()))
"""
# Both wait for each other; one never comes.
HANG = (
    NOTE
    + """
import datetime, torch, torch.distributed as dist
def run():
    dist.init_process_group("gloo")
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    if rank == "1":
        time.sleep(600)
    dist.all_reduce(torch.ones(1), group=group)
from moetor.parallel.launch import tell_launcher
try:
    run()
except RuntimeError as error:
    tell_launcher(str(error))
    sys.exit(1)
"""
)


def ranks_of(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("pid*")]


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def run(code: str, folder: Path, ranks: int = 2) -> int:
    return launch([sys.executable, "-c", code, str(folder)], ranks)


def test_ranks_that_end_well(tmp_path: Path) -> None:
    code = NOTE + "\n(folder / f'world{rank}').write_text(os.environ['WORLD_SIZE'])"
    assert run(code, tmp_path, 3) == 0
    assert [(tmp_path / f"world{rank}").read_text() for rank in range(3)] == ["3"] * 3


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("os.kill(os.getpid(), 9)", r"rank 1 of 3: was killed by SIGKILL"),
        ("sys.exit('the disk is full')", r"rank 1 of 3: ended with status 1: the disk is full"),
        (
            "from moetor.parallel.launch import tell_launcher\n"
            "    tell_launcher('no such model')\n    sys.exit(1)",
            r"rank 1 of 3: no such model",
        ),
        (
            "from moetor.parallel.launch import tell_launcher\n"
            "    tell_launcher('no such model')\n    os.abort()",
            r"rank 1 of 3: no such model",
        ),
    ],
    ids=["killed", "exits", "tells", "tells and aborts"],
)
def test_a_rank_that_dies_ends_all(ending: str, text: str, tmp_path: Path) -> None:
    code = NOTE + f"\nif rank == '1':\n    time.sleep(1)\n    {ending}\ntime.sleep(600)"
    start = time.monotonic()
    with pytest.raises(ParallelError, match=text):
        run(code, tmp_path, 3)
    assert time.monotonic() - start < LIMIT
    assert not [pid for pid in ranks_of(tmp_path) if alive(pid)]


def test_a_rank_that_hangs_ends_all(tmp_path: Path) -> None:
    with pytest.raises(ParallelError, match=r"rank 0 of 2: another rank did not answer in time"):
        run(HANG, tmp_path)
    pids = ranks_of(tmp_path)
    assert len(pids) == 2
    assert not [pid for pid in pids if alive(pid)]


def test_what_a_rank_has_started_ends_with_it(tmp_path: Path) -> None:
    """Also where it was stopped, and so sees nothing end."""
    code = (
        NOTE
        + """
import signal, subprocess
if rank == "0":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    child.send_signal(signal.SIGSTOP)
    (folder / "pid of its child").write_text(str(child.pid))
    time.sleep(600)
while not (folder / "pid of its child").exists():
    time.sleep(0.1)
sys.exit("no more")
"""
    )
    with pytest.raises(ParallelError, match="rank 1 of 2: ended with status 1: no more"):
        run(code, tmp_path)
    pids = ranks_of(tmp_path)
    assert len(pids) == 3
    end = time.monotonic() + LIMIT
    while any(map(alive, pids)):  # nobody waits for a rank's own child
        assert time.monotonic() < end
        time.sleep(0.1)


def test_no_rank_outlives_another_by_30_seconds() -> None:
    """Everything that may be waited for, one after the other, by default: of a server without
    requests two rests, the second of which is not heard; then the rest; then last words and ends.
    """
    timeout = ParallelConfig().timeout
    noticed = 2 * REST_SHARE * timeout + timeout
    ended = 2 * POLL_SECONDS + TOLD_SECONDS + SETTLE_SECONDS + GRACE_SECONDS
    assert noticed + ended < 25


def moetor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moetor", *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_generate_over_two_ranks() -> None:
    prompt = ("generate", "--prompt", "ROMEO:", "--max-tokens", "8", "--device", "cpu", "--json")
    two = moetor(*prompt, "-tp", "2", "--enable-expert-parallel")
    assert two.returncode == 0, two.stderr
    one = moetor(*prompt)
    ours, theirs = json.loads(two.stdout), json.loads(one.stdout)
    assert ours["token_ids"] == theirs["token_ids"]
    assert ours["fusion"]["parallel"]["config"]["tensor_parallel_size"] == 2


def test_generate_refuses_in_one_line() -> None:
    done = moetor("generate", "--prompt", "a", "-tp", "2", "--num-redundant-experts", "2")
    assert done.returncode == 2
    assert "--num-redundant-experts needs --enable-expert-parallel" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


QUESTIONS = (b"Who is there?\n", b"Nay, answer me.\n")


def chat(*flags: str) -> subprocess.Popen[bytes]:
    """A conversation through a pipe, with its first question asked.

    The pipe has no buffer here: ``communicate`` would not see what a line's reader read ahead.
    """
    command = (sys.executable, "-m", "moetor", "chat", "--max-tokens", "6", "--temperature", "0")
    process = subprocess.Popen(
        [*command, "--device", "cpu", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    process.stdin.write(QUESTIONS[0])
    return process


def first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def test_chat_over_two_ranks_waits_longer_for_its_user_than_for_a_rank() -> None:
    two = chat("-tp", "2", "--enable-expert-parallel", "--parallel-timeout", "10")
    line = first_line(two)
    time.sleep(11)
    rest, _ = two.communicate(QUESTIONS[1], timeout=LIMIT)
    assert two.returncode == 0
    whole, _ = chat().communicate(QUESTIONS[1], timeout=LIMIT)
    assert line + rest == whole
    assert whole.strip()


def test_chat_ends_with_a_rank_while_it_waits_for_its_user() -> None:
    process = chat("-tp", "2")
    first_line(process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), 9)
    assert process.wait(LIMIT) == 1
