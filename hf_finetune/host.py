"""What a process asks of the machine under it, so that nobody need set environment variables: memory kept between
steps, all its cores, imports without the garbage collector in between.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEPT_BYTES = 1 << 30
"""Freed memory at the end of the heap that stays with the process."""
_USERS_OWN = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
)
"""Who sets one of these has chosen an allocator, or how it works."""

_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")
"""How the program of a launcher is called, or its module."""


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process for the next step, rather than go to the system and come back; say if so.

    glibc hands every block above 32 MB back as soon as it is freed. Activations are such blocks: each step then faults
    every page of them in anew, which took half the time of training a MobileNetV2 on a CPU (600,000 faults a step).
    Does nothing under another C library, or where the environment says how memory is to be managed.
    """
    options = malloc_options()
    return bool(options) and all(ctypes.CDLL(None).mallopt(*each) for each in options)


def malloc_options() -> tuple[tuple[int, int], ...]:
    """Return the arguments of `mallopt` that let freed memory stay; none where another allocator was chosen."""
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in _USERS_OWN):
        return ()
    return (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEPT_BYTES)


def drop_freed_memory() -> None:
    """Give freed memory back to the system, once: for a process forked from one that keeps it.

    To a fork freed pages look used. It would hold on to each as it was, while its parent writes to a copy: a data
    worker that started after the first step had taken as much as all activations of the run.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def threads_to_use() -> int | None:
    """Return how many threads a process that computes on the CPU should use; None for as many as it has.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 for want of a better number, and a run would leave all
    cores but one idle. A number that was given to the launcher, or stood in its environment, is kept.
    """
    import psutil

    if os.environ.get("OMP_NUM_THREADS") != "1":
        return None
    try:
        launcher = psutil.Process().parent()
        if launcher is None or "OMP_NUM_THREADS" in launcher.environ():
            return None
        words = launcher.cmdline()
    except psutil.Error:
        return None
    launches = any(Path(word).name.startswith(_LAUNCHERS) for word in words)
    if not launches or any(word.startswith("--num_cpu_threads") for word in words):
        return None
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def leave(code: int) -> NoReturn:
    """End the process: what asked to be called at its end is called, what was said is written out, and that is all.

    The interpreter would then free every module and object by itself, which takes two seconds with torch loaded.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # a pipe whose reader has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without collecting garbage: of a million new objects none is any, and a sixth of the time went there.

    What lives afterwards is kept out of later collections as well.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # the interpreter frees its modules by collecting them
        if was_on:
            gc.enable()
