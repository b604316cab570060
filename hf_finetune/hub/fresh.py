"""A fresh Python process that reads model folders by their own library: started early, asked last, never left behind.

Its imports take seconds, so it is started while training goes on, or forked off before anything of ours is loaded.
Within one process it serves every run, each from a fork of its own.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from hf_finetune.hub import reader

_OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
"""Variables that tell a training process of its siblings: this one has none."""
_PACKAGES = ("torch", "safetensors", "timm", "transformers", "peft", "PIL")


@dataclass
class _Fork:
    """A fork of this process, as far as one is used here like `subprocess.Popen`."""

    pid: int
    stdin: IO[str]
    stdout: IO[str]
    returncode: int | None = None

    def poll(self, options: int = os.WNOHANG if reader.FORKS else 0) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self) -> int | None:
        return self.poll(0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class _Reader:
    process: subprocess.Popen[str] | _Fork
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


def fork_off(*modules: str) -> None:
    """Import `modules`, which a run needs itself, and fork the process off with them: less to import, memory shared.

    Only while nothing else has happened here: these modules are loaded now, no other thread runs. Elsewhere, and where
    processes cannot be forked, it is started anew.
    """
    global _reader
    untouched = reader.FORKS and not any(name in sys.modules for name in (*modules, "huggingface_hub"))
    for name in modules:
        importlib.import_module(name)
    with _lock:
        if untouched and _reader is None and threading.active_count() == 1:
            _reader = _forked(set(modules))
    warm_up(*modules)


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
    remarks = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
    process = subprocess.Popen(
        [sys.executable, "-I", reader.__file__, *_homes()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=remarks,
        text=True,
        encoding="utf-8",
        env=_environment(),
    )
    return _Reader(process, remarks, os.getpid(), set())


def _forked(loaded: set[str]) -> _Reader:
    remarks = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
    (commands, sent), (received, answers) = os.pipe(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        _become_reader(commands, answers, remarks.fileno())
    os.close(commands)
    os.close(answers)
    streams = os.fdopen(sent, "w", encoding="utf-8"), os.fdopen(received, encoding="utf-8")
    return _Reader(_Fork(pid, *streams), remarks, os.getpid(), loaded)


def _become_reader(commands: int, answers: int, remarks: int) -> NoReturn:
    """Be, in a fork, what `python -I reader.py` is: that script, its input and output, no path or module of ours."""
    try:
        for number, descriptor in enumerate((commands, answers, remarks)):
            os.dup2(descriptor, number)
        os.closerange(3, 4096)  # an end of the pipes, held here, would keep them open
        for name in [name for name in sys.modules if name.split(".")[0] == "hf_finetune"]:
            del sys.modules[name]
        environment = _environment()
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
        sys.argv[:] = [reader.__file__, *_homes()]
        runpy.run_path(reader.__file__)["main"]()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)


def _homes() -> list[str]:
    """Return the folders that libraries are found in."""
    found = [importlib.util.find_spec(name) for name in _PACKAGES]
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin))


def _environment() -> dict[str, str]:
    """Return the process's environment: without siblings, a device (that one is the run's) or network.

    What an adapter's base model needs lies in the Hub's cache since the run loaded it. One thread while it may still be
    forked; it computes with as many as the run.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    alone = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {n: v for n, v in os.environ.items() if not n.startswith(_OTHERS)} | threads | alone


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
