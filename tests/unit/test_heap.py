"""Threads share the one heap of the C library."""

from __future__ import annotations

import subprocess
import sys

#: Allocates outside of Python's own pools in many threads at once, and counts the heaps that glibc describes.
THREADS = """
import ctypes, os, sys, threading
from qmpd.heap import share_one_heap
if sys.argv[1] == "one":
    assert share_one_heap()
together = threading.Barrier(6)
def allocate():
    together.wait()
    kept = [bytes(5000) for _ in range(50)]
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
out = libc.fdopen(1, b"w")
libc.malloc_info(0, ctypes.c_void_p(out))
libc.fflush(ctypes.c_void_p(out))
"""


def heaps(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", THREADS, how], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.count("<heap nr=")


def test_all_threads_allocate_from_one_heap() -> None:
    assert heaps("one") == 1
    assert heaps("many") > 1
