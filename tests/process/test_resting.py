"""Whether a process computes, as /proc shows it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from qmpd.hostprocess import rests

PATIENCE_S = 60.0


def test_a_process_rests_when_all_of_its_threads_wait() -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as waiting:
        end = time.monotonic() + PATIENCE_S
        while (used := rests(waiting.pid)) is None:
            assert time.monotonic() < end
        assert used > 0
    assert rests(waiting.pid) is None


def test_a_process_that_computes_does_not_rest() -> None:
    code = (
        "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start(); print(flush=True)\nwhile True: pass"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            busy.stdout.readline()
            assert [rests(busy.pid) for _ in range(5)] == [None] * 5
        finally:
            busy.kill()
    assert rests(os.getpid()) is None
