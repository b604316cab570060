"""Several processes of one run: what fails in one of them ends all of them, with one message."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from hf_finetune.errors import FinetuneError, TrainingError

T = TypeVar("T")
_WORDS_OF_A_LOST_PEER = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


def together(action: Callable[[], T], *, main_only: bool = False) -> T:
    """Run `action` in every process and return its result; when it fails in one, every process raises.

    With `main_only` the main process alone runs it, and all get its result. The error is `told` where another process
    prints the same. Every process calls this.

    Raises:
        FinetuneError: the process's own, or the first other one's.
        TrainingError: another process is gone.
    """
    state = PartialState()
    result: Any = None
    failure: FinetuneError | None = None
    if state.is_main_process or not main_only:
        try:
            result = action()
        except FinetuneError as error:
            failure = error
    if state.num_processes > 1:
        try:
            found = gather_object([(failure, result if main_only else None)])
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise failure or lost_peer() from None
        failures = [error for error, _ in found]
        if main_only:
            result = found[0][1]
        if any(failures):
            own, rank = failure, state.process_index
            failure = own or next(error for error in failures if error)
            failure.told = own is None or any(str(own) == str(other) for other in failures[:rank] if other)
    if failure:
        raise failure
    return result


def by_main(method: Callable[..., Any]) -> Callable[..., None]:
    """Let the main process alone run a method that returns nothing; when it fails there, every process raises."""

    @functools.wraps(method)
    def shared(*args: Any, **kwargs: Any) -> None:
        together(lambda: method(*args, **kwargs), main_only=True)

    return shared


def by_everyone(error: FinetuneError) -> FinetuneError:
    """Return an error that every process raises alike, told by the main one alone."""
    error.told = not PartialState().is_main_process
    return error


def lost_peer() -> TrainingError:
    """Return the error of a process that another one has left."""
    return TrainingError(
        "another process of this run has ended; it said why, if it still could. `--resume` goes on from the run's last "
        "checkpoint."
    )


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error says that another process is no longer there to talk to."""
    said = str(error)
    return (
        isinstance(error, RuntimeError)
        and PartialState().num_processes > 1
        and any(word in said for word in _WORDS_OF_A_LOST_PEER)
    )
