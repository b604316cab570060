"""A fresh Python process that reads model folders by their own library: started early, asked last, never left behind.

Its imports take seconds, so it is started while training goes on. Within one process it serves every run, each from a
fork of its own.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hf_finetune.hub import reader

_OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
"""Variables that tell a training process of its siblings: this one has none."""
_PACKAGES = ("torch", "safetensors", "timm", "transformers", "peft", "PIL")


@dataclass
class _Reader:
    process: subprocess.Popen[str]
    remarks: IO[bytes]
    """What it writes to its standard error."""
    owner: int
    """Of this process: a fork of it (a data worker) has no business with the reader."""
    loaded: set[str]

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def send(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()


_reader: _Reader | None = None
_lock = threading.RLock()


def warm_up(*modules: str) -> None:
    """Start the process if there is none, and let it import `modules` while we go on. Costs milliseconds."""
    global _reader
    with _lock:
        if _reader is None or not _reader.alive:
            _reader = _start()
        if new := [name for name in modules if name not in _reader.loaded]:
            with suppress(OSError):  # it has ended; who asks it something will find out why
                _reader.send({"import": new})
                _reader.loaded.update(new)


def ask(request: dict[str, Any], *, on_wait: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Let the process read a model (`reader.read`) and return its answer; `error` and `traceback` if it could not.

    Args:
        request: arguments of `reader.read`.
        on_wait: called a few times a second; what it raises ends the waiting, and the process.
    """
    with _lock:
        line, said = _exchange(request, on_wait)
        if not line:  # one that was started for an earlier run may be gone by now: that is nobody's fault
            stop()
            line, said = _exchange(request, on_wait)
        if not (line and reader.FORKS):
            stop()
    if line:
        return json.loads(line)
    return {
        "error": (said.strip().splitlines() or ["the process ended without a word"])[-1],
        "traceback": said,
    }


def stop() -> None:
    """End the process, if there is one."""
    global _reader
    with _lock:
        gone, _reader = _reader, None
        if gone is None or gone.owner != os.getpid():
            return
        gone.process.kill()  # a fork of it in the middle of reading sees that, and leaves
        gone.process.wait()
        for stream in (gone.process.stdin, gone.process.stdout, gone.remarks):
            with suppress(OSError):  # what was still to be written has no reader any more
                if stream is not None:
                    stream.close()


atexit.register(stop)


def _start() -> _Reader:
    found = [importlib.util.find_spec(name) for name in _PACKAGES]
    homes = dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin)
    # One thread while it may still be forked; it computes with as many as the run. No device: that one is the run's.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # What an adapter's base model needs lies in the Hub's cache since the run loaded it.
    alone = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    remarks = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
    process = subprocess.Popen(
        [sys.executable, "-I", reader.__file__, *homes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=remarks,
        text=True,
        encoding="utf-8",
        env={name: value for name, value in os.environ.items() if not name.startswith(_OTHERS)}
        | threads
        | alone,
    )
    return _Reader(process, remarks, os.getpid(), set())


def _exchange(request: dict[str, Any], on_wait: Callable[[], None]) -> tuple[str, str]:
    """Return the line the process answers, empty if it ended instead, and what it wrote to its standard error."""
    warm_up()
    assert _reader is not None
    process, lines = _reader.process, [""]
    output = process.stdout
    assert output is not None
    try:
        _reader.send({"read": request})
    except OSError:
        return "", _said(_reader)
    waiting = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
    waiting.start()
    try:
        while waiting.is_alive():
            waiting.join(0.1)
            on_wait()
    except BaseException:
        process.kill()
        waiting.join()
        stop()
        raise
    return lines[-1], _said(_reader)


def _said(it: _Reader) -> str:
    it.remarks.seek(0)
    return it.remarks.read()[-4000:].decode("utf-8", "replace")
