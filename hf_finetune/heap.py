"""What blocks take in the C library's heap, gaps included: they are asked for and given back, and never touched.

As a script, `python -I -S heap.py`, it reads `{"options": …, "passes": …, "kept": …, "repeats": …}` as JSON and prints
the bytes by which its address space grew at most: a process of its own has a fresh heap, takes no memory for what it
asks for, and an allocator that the environment chooses is the one that is tried.

Why there are gaps: torch asks glibc for blocks on a boundary of 64 bytes. Glibc (seen: 2.36) takes 96 bytes more and
gives the crumbs on both sides back. The vectors and nodes that come with every operation are small enough to settle
in them, and then the next block of the very same size does not fit where the last one was. How much that is depends on
what is freed while something else of its size is asked for: 1.01 to 1.8 times the tensors.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import cycle

Blocks = list[tuple[int, int]]
"""What a computation does to the heap: (number, bytes) where a block begins, (-number, any) where it ends."""

ALIGNMENT = 64
LASTING = (16, 24, 176, 16, 96, 24, 16, 184, 24, 488, 16, 96, 32, 64)
"""Bytes of the small blocks that live as long as a tensor: nodes of its graph, its sizes and strides."""
PASSING = (24, 16, 32, 64, 48, 8, 96, 40)
"""Bytes of small blocks that an operation has in use when it asks for its output. Kinds as seen in MobileNetV2 and in
ViT with LoRA; their number was chosen with MobileNetV2, ViT and MiniLM in sight (docs/performance.md)."""
NO_PADDING = (-2, 0)
"""M_TOP_PAD: the heap grows by what is asked for, not by 132 kB more, which would hide what a small network takes."""
TURNS = (0, 1, 3)
"""Where in these rows a trial begins. Which crumb is taken is chance: trials differ by a twentieth or so."""


def taken(
    passes: Sequence[Blocks], *, kept: Sequence[int], repeats: int, options: Sequence[tuple[int, int]]
) -> int | None:
    """Return the bytes that a heap grows to; None where that cannot be tried (not Linux; no address space left).

    Args:
        passes: the first is run `repeats` times, then each of the others once.
        kept: bytes of blocks that come after the last block of the first pass, and stay.
        repeats: how often the first pass is run.
        options: arguments of `mallopt`.
    """
    if not sys.platform.startswith("linux"):
        return None
    found = []
    for turn in TURNS:
        told = {"options": options, "passes": passes, "kept": kept, "repeats": repeats, "turn": turn}
        command = [sys.executable, "-I", "-S", __file__]
        done = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True, check=False)
        if done.returncode or not done.stdout.strip().isdigit():
            return None
        found.append(int(done.stdout))
    return sorted(found)[len(found) // 2]


def main() -> None:
    """Try what the input says; print the bytes."""
    told = json.loads(sys.stdin.read())
    library = ctypes.CDLL(None)
    malloc, free, aligned = library.malloc, library.free, library.memalign
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    aligned.argtypes, aligned.restype = [ctypes.c_size_t, ctypes.c_size_t], ctypes.c_void_p
    free.argtypes, free.restype = [ctypes.c_void_p], None
    for parameter, value in [*told["options"], NO_PADDING] if told["options"] else ():
        library.mallopt(parameter, value)
    turn = told["turn"]
    lasting, passing = (cycle(kinds[turn:] + kinds[:turn]) for kinds in (LASTING, PASSING))
    living: dict[int, list[int]] = {}

    def run(blocks: Blocks) -> None:
        for number, size in blocks:
            if number < 0:
                for place in living.pop(-number):
                    free(place)
                continue
            brief = [malloc(next(passing)) for _ in PASSING]
            before = [malloc(next(lasting)) for _ in range(len(LASTING) // 2)]
            place = aligned(ALIGNMENT, size)
            if not place:
                sys.exit(1)
            after = [malloc(next(lasting)) for _ in range(len(LASTING) // 2)]
            living[number] = [place, *before, *after]
            for small in brief:
                free(small)

    first, *others = told["passes"]
    last = max((at for at, (number, _) in enumerate(first) if number > 0), default=-1) + 1
    start = _address_space("VmSize")
    for repeat in range(told["repeats"]):
        run(first[:last])
        for size in told["kept"] if repeat == 0 else ():
            if not aligned(ALIGNMENT, size):
                sys.exit(1)
        run(first[last:])
    for blocks in others:
        run(blocks)
    sys.stdout.write(f"{max(_address_space('VmPeak') - start, 0)}\n")


def _address_space(name: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
