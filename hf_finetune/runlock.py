"""One run, one process: a lock on the run folder that ends with the process that holds it, however it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from hf_finetune.errors import UserError
from hf_finetune.runfolder import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Keeps other processes from a run folder until `release`, or until this process is no more.

    It is a POSIX lock: workers do not inherit it, a killed process leaves none behind, and network file systems pass it
    on between hosts where their lock service runs.

    Raises:
        UserError: a live process holds it; its host and number are named.
        FinetuneError: the folder cannot be written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        with writing(folder):
            self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = self._holder()
                os.close(self._file)
                raise UserError(
                    f"{folder}: this run is still going on, in {holder}. Wait for its end, or stop it there (SIGTERM "
                    "saves its state) and use --resume then."
                ) from None
            say(
                f"{folder} cannot be locked ({error.strerror}): see to it that no other process runs it as well"
            )

    def sign(self) -> None:
        """Write who holds it, once the run goes on: a resume that is refused leaves the folder as it was."""
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat("T", "seconds"),
        }
        with contextlib.suppress(OSError):  # a full disk: what it says is for people
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(me).encode(), 0)

    def release(self) -> None:
        """Let others have the folder."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _holder(self) -> str:
        try:
            held = json.loads(os.pread(self._file, 4096, 0))
            return f"process {held['pid']} on {held['host']} since {held['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
