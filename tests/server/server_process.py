"""A real `moetor serve` on a free port of loopback."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx

KEY = "a-key-that-must-not-be-logged"


class ServerProcess:
    """Starts it and waits until it answers.

    Attributes:
        url: without a path.
        log: lines of standard error so far.
    """

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "moetor", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(240)
        if not self.url:
            self.process.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.log))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if " on http://" in line:
                self.url = line.rsplit(" on ", 1)[1].strip()
                self._ready.set()
        self._ready.set()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        status = self.process.wait(60)
        self._reader.join(10)
        return status

    def idle(self) -> None:
        """Waits until the engine holds nothing; fails after half a minute."""
        end = time.monotonic() + 30
        with httpx.Client(base_url=self.url) as client:
            while time.monotonic() < end:
                state = client.get("/health").json()
                if state["running"] == state["waiting"] == 0 and state["kv_cache_usage"] == 0:
                    return
                time.sleep(0.02)
        raise AssertionError(f"requests are left: {state}")


def resident_mib(pid: int) -> float:
    """Memory of a process and of its children, in MiB."""
    pages = 0
    for one in (pid, *children(pid)):
        pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def children(pid: int) -> list[int]:
    """Of a process: the engine of a server."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
