"""Processes that run a script as `python SCRIPT ARGUMENTS` does, but for the seconds that its imports take.

The nursery is a process that has imported what training needs. For each line of its input, a request in JSON, it forks
one that runs the script, in a group of its own, prints its number, and writes its exit code to `CODES/<number>` when it
has ended.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
}
"""What processes are given beside our own environment."""


@cache
def _nursery() -> tuple[subprocess.Popen[str], Path]:
    """Return the process that forks, and the folder it leaves exit codes in."""
    codes = Path(tempfile.mkdtemp())
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        env=os.environ | ENVIRONMENT | {"CODES": str(codes)},
    )  # fmt: skip
    atexit.register(shutil.rmtree, codes, ignore_errors=True)
    atexit.register(process.kill)
    return process, codes


_asking = threading.Lock()


class Process:
    """A process that runs a script, as `subprocess.Popen` would give it; `log` gets all that it prints."""

    def __init__(self, script: Path, *arguments: str, log: Path, env: dict[str, str]) -> None:
        process, self._codes = _nursery()
        assert process.stdin is not None
        assert process.stdout is not None
        request = {
            "script": str(script),
            "arguments": arguments,
            "log": str(log),
            "env": os.environ | ENVIRONMENT | env,
        }
        with _asking:
            process.stdin.write(json.dumps(request) + "\n")
            self.pid = int(process.stdout.readline())

    def poll(self) -> int | None:
        code = self._codes / str(self.pid)
        return int(code.read_text()) if code.exists() else None

    def wait(self, timeout: float = 240) -> int:
        limit = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired("a process of the nursery", timeout)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        """End it, and the workers of its loaders."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def ranks(processes: int) -> list[dict[str, str]]:
    """Return the variables by which a launcher tells each of several processes of the others; none for a lone one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run(script: Path, *arguments: str, log: Path, processes: int = 1, **env: str) -> tuple[list[int], str]:
    """Run a script in one or several processes to the end; return their exit codes and what they printed."""
    members = [Process(script, *arguments, log=log, env=env | rank) for rank in ranks(processes)]
    try:
        return [member.wait() for member in members], log.read_text()
    finally:
        for member in members:
            member.kill()


def _serve() -> None:
    from hf_finetune.host import leave, quick_imports

    with quick_imports():  # also what is imported late by those who need it
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import torch.distributed.fsdp  # noqa: F401

        from hf_finetune import cli, inference, record, train  # noqa: F401
        from hf_finetune.models import adapters, load_transformers  # noqa: F401
    # As in conftest.py; who wants to see them puts it back.
    record.save_curves = lambda rows, best, path, title="": Path(path).write_bytes(b"")  # type: ignore[assignment]
    while line := sys.stdin.readline():
        pid = os.fork()
        os.setpgid(pid, 0)  # by whichever of the two comes first
        if not pid:
            leave(_become(json.loads(line)))
        threading.Thread(target=_bury, args=(pid,), daemon=True).start()
        print(pid, flush=True)


def _become(request: dict[str, Any]) -> int:
    """Run the script that a line asks for; return the exit code."""
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["script"], *request["arguments"]]
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _bury(pid: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    aside = Path(os.environ["CODES"], f".{pid}")
    aside.write_text(str(code))
    aside.rename(aside.with_name(str(pid)))


if __name__ == "__main__":
    _serve()
