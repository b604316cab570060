"""Trying again: which errors of the Hub pass, how long to wait, and how they are told without a secret."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import get_session, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from hf_finetune.errors import HubError

Answer = TypeVar("Answer")
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the client's HTTP library raises, which is not the same one in all versions."""

HUB_ERRORS = (
    HTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OSError,
    ValueError,
    RuntimeError,
)
"""What the client raises: answers that are refusals, connections that break, answers that are no JSON (ValueError),
uploads of a file that failed for any of these (RuntimeError)."""
CONFLICT = (409, 412)


@dataclass(frozen=True)
class Patience:
    """How long to try: waits double from `first` to `longest` seconds, drawn between a half and the whole of it."""

    tries: int = 6
    first: float = 1.0
    longest: float = 30.0
    seconds: float = 900.0
    """No further try later than this after the first."""
    silence: float = 120.0
    """Seconds without a byte after which a connection counts as dead."""


PATIENT = Patience()
BRIEF = Patience(tries=2, seconds=30.0, silence=30.0)
"""While training waits."""


class Persistence:
    """Runs the steps of one push, each until it succeeds, is refused, or patience ends; a step may have steps."""

    def __init__(self, patience: Patience, say: Callable[[str], None]) -> None:
        self.patience, self.say = patience, say
        self.end = time.monotonic() + patience.seconds
        self.failures = 0
        """In a row."""

    def __call__(
        self, what: str, step: Callable[[], Answer], unsure: Callable[[], bool] = lambda: False
    ) -> Answer:
        """Run `step`, which may be run again after any error.

        Args:
            unsure: whether it is not known if an earlier try was carried out; no error is taken for final then.

        Raises:
            HUB_ERRORS: the last one, when it does not pass or patience ends.
        """
        conflicts = 0
        for number in range(1, self.patience.tries + 1):
            # The client waits for ever by default; it is made anew after a refused connection.
            get_session().timeout = self.patience.silence
            try:
                answer = step()
                self.failures = 0
                return answer
            except HUB_ERRORS as error:
                self.failures += 1
                conflicts += status(error) in CONFLICT
                wait = max(self._pause(), retry_after(error))
                final = not (passes(error) or unsure()) or conflicts > 1
                tired = (
                    max(number, self.failures) >= self.patience.tries or time.monotonic() + wait > self.end
                )
                if final or tired:
                    self.failures = self.patience.tries  # this was all: no step around this one tries again
                    raise
                self.say(f"{what}: {reason(error)} Trying again in {wait:.0f} s.")
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _pause(self) -> float:
        return random.uniform(0.5, 1.0) * min(
            self.patience.longest, self.patience.first * 2 ** (self.failures - 1)
        )


def passes(error: Exception) -> bool:
    """Whether trying again may help: the Hub is busy or broken, the connection was, or the branch moved on."""
    if isinstance(error, (OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError)):
        return False
    code = status(error)
    if code is not None:
        return code >= 500 or code in (408, 429, *CONFLICT)
    # A file that failed to upload gets a new address: what storage refused (a damaged body, an address that is too
    # old) counts too. Anything else without an answer is a connection that broke, or an answer that is not JSON.
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, RuntimeError, json.JSONDecodeError))


def status(error: BaseException) -> int | None:
    """Return the status of the Hub's answer, None when there was none."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def retry_after(error: BaseException) -> float:
    """Return the seconds that a busy Hub asks to wait."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    asked = error.response.headers.get("Retry-After", "").strip()
    return float(asked) if asked.isdigit() else 0.0


def reason(error: BaseException) -> str:
    """Return in a sentence or two what went wrong and what to do about it."""
    if isinstance(error, LocalTokenNotFoundError):
        return "You are not logged in. Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 keeps this process off the Hub. Unset it to push: HF_HUB_OFFLINE=0."
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return reason(error.__cause__)
    said = ""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or ""
        if isinstance(error, RepositoryNotFoundError):
            said = "there is no such repository, or you may not see it"
    said = " ".join((said or str(error)).split()) or type(error).__name__
    code = status(error)
    sentence = scrub(f"{code}: {said}" if code is not None else said).rstrip(". ") + "."
    return sentence if len(sentence) < 400 else sentence[:400] + " …"


def scrub(text: str) -> str:
    """Remove what must not be seen: the token, anything like one, passwords and signatures in addresses."""
    if token := get_token():
        text = text.replace(token, "***")
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}|\b(Bearer|Basic)\s+\S+", "***", text)
    text = re.sub(r"(https?://)[^\s/@]+@", r"\1***@", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]*", r"\1", text)


@contextmanager
def quiet_client(*, bars: bool) -> Iterator[None]:
    """Keep the client from telling of every request that it tries again; without `bars`, of uploads too."""
    level, hidden, session = logging.get_verbosity(), are_progress_bars_disabled(), get_session()
    timeout = session.timeout
    logging.set_verbosity_error()
    if not bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not bars and not hidden:
            enable_progress_bars()
        get_session().timeout = timeout


def refused(what: str, error: BaseException, remedy: str) -> HubError:
    """Return the error to raise for what the Hub did not do."""
    return HubError(scrub(f"{what}: {reason(error)} {remedy}".rstrip()))
