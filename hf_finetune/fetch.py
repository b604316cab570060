"""From the Hub into its cache: which commit an id means, its files, and in few words why they cannot be had.

The cache answers when the Hub does not. This module is light: huggingface_hub is imported when an id needs it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Literal, TypeVar

from hf_finetune.errors import DataError, FinetuneError, HubError, ModelError, UserError, did_you_mean

T = TypeVar("T")
Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
_WAITS = (0.5, 2.0)
"""Seconds before a request is tried again that the Hub, or the way to it, failed to answer."""
_TIMEOUT = 30.0
"""Seconds the Hub has to answer what an id means."""
_WORDS: dict[Kind, tuple[str, str, type[UserError]]] = {
    "model": ("model", "backbone=", ModelError),
    "dataset": ("data set", "data=", DataError),
}
"""Kind of repository -> its name, the key it belongs to, what a wrong id of it raises."""


@dataclass(frozen=True)
class Wanted:
    """A repository somebody asked for."""

    where: str
    """How an error begins: what was asked for, in the words of the recipe or the command line."""
    id: str
    kind: Kind
    revision: str | None = None
    """Branch, tag or commit; None for the main branch."""
    hint: Callable[[], str] = str
    """Says what else could have been meant, where the id is not found."""


@dataclass(frozen=True)
class Pinned:
    """A repository at one commit."""

    wanted: Wanted
    commit: str
    unreachable: Exception | None = None
    """Why the cache was asked instead of the Hub."""

    @property
    def note(self) -> str | None:
        """What a run should say of it: that the cache stood in for the Hub."""
        if self.unreachable is None:
            return None
        why = offline(self.wanted.kind) or f"the Hub does not answer ({_short(self.unreachable)})"
        return f"{self.wanted.where}: {why}; taken from the cache, commit {self.commit[:12]}"


def offline(kind: Kind = "model") -> str | None:
    """Return the variable that forbids the Hub, as `NAME=value`; None where it may be asked."""
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        *(["HF_DATASETS_OFFLINE"] if kind == "dataset" else []),
    ):
        if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{name}={os.environ[name]}"
    return None


def pin(wanted: Wanted) -> Pinned:
    """Return the repository at the commit its revision means now, or meant when it was cached if the Hub is away.

    Raises:
        UserError: there is no such repository or revision, or one that this token may not read.
        HubError: the Hub does not answer, and the cache does not know the commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(wanted.id)
    except HFValidationError as error:
        raise refusal(wanted, error) from None
    away = OfflineModeIsEnabled() if offline(wanted.kind) else None

    def ask() -> str:
        if away:
            raise away
        info = HfApi().repo_info(wanted.id, repo_type=wanted.kind, revision=wanted.revision, timeout=_TIMEOUT)
        return str(info.sha)

    try:
        if wanted.revision and COMMIT.fullmatch(wanted.revision):
            return Pinned(wanted, wanted.revision, away)
        commit = _patiently(ask)
    except Exception as error:
        cached = _ref(wanted)
        if not _is_away(error) or not cached.is_file():
            raise refusal(wanted, error) from None
        return Pinned(wanted, cached.read_text(encoding="utf-8").strip(), error)
    with suppress(OSError):  # a cache that cannot be written to still can be read
        cached = _ref(wanted)
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside = cached.with_name(f".{cached.name}.{os.getpid()}")
        aside.write_text(commit, encoding="utf-8")
        aside.replace(cached)
    return Pinned(wanted, commit)


def download(pinned: Pinned, patterns: list[str]) -> Path:
    """Return the folder of a repository's top-level files that match `patterns`, fetched where the cache lacks them.

    Files that the repository does not have are not missed here.

    Raises:
        UserError: this token may not read it, or the commit does not exist.
        HubError: the Hub does not answer, what it sent is damaged, or the disk is full.
    """
    from huggingface_hub import ResolvedRevision, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    def fetch() -> str:
        try:
            return snapshot_download(
                pinned.wanted.id,
                repo_type=pinned.wanted.kind,
                revision=ResolvedRevision(pinned.commit, pinned.wanted.revision),
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=pinned.unreachable is not None,
            )
        except IncompleteSnapshotError as error:
            if pinned.unreachable is None:
                raise
            return error.snapshot_path  # by another library, which needed fewer files

    began = time.time()
    try:
        folder = Path(_patiently(fetch))
    except Exception as error:
        raise refusal(pinned.wanted, pinned.unreachable or error) from None
    verify(pinned.wanted, folder, since=began)
    return folder


def verify(wanted: Wanted, folder: Path, *, since: float) -> None:
    """Compare the files fetched since then with their hashes, which the client does not.

    Raises:
        HubError: a file is not what the Hub says it is; it is removed from the cache.
    """
    for file in folder.rglob("*"):
        blob = file.resolve()
        if not (file.is_symlink() and blob.is_file() and blob.stat().st_mtime >= since - 1):
            continue
        # The cache names a blob by its hash: sha256 in the large file storage, git's own otherwise.
        algorithm = {40: "sha1", 64: "sha256"}.get(len(blob.name))
        if algorithm is None or not re.fullmatch(r"[0-9a-f]+", blob.name):
            continue
        found = hashlib.new(algorithm, usedforsecurity=False)
        if algorithm == "sha1":
            found.update(b"blob %d\0" % blob.stat().st_size)
        with blob.open("rb") as content:
            while part := content.read(1 << 20):
                found.update(part)
        if found.hexdigest() != blob.name:
            file.unlink()
            blob.unlink()
            raise HubError(
                f"{wanted.where}: {file.name} was damaged on its way from the Hub; it is removed. Run again."
            )


def refusal(wanted: Wanted, error: Exception) -> FinetuneError:
    """Return what to raise where the Hub's client raised `error`: what is wrong, and what to do."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, wrong = _WORDS[wanted.kind]
    where = f"{wanted.where}: "
    error = _cause(error)
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, HFValidationError):
        at = " A revision is a key of its own: `revision`." if "@" in wanted.id else ""
        return wrong(f"{where}this is no folder and no valid Hub id.{at}{wanted.hint()}")
    if isinstance(error, GatedRepoError):
        page = f"{_endpoint()}/{'datasets/' if wanted.kind == 'dataset' else ''}{wanted.id}"
        then = "then run again" if _has_token() else _LOGIN
        return wrong(f"{where}this {name} is gated. Ask for access on {page}, {then}.")
    if isinstance(error, RevisionNotFoundError):
        return wrong(f"{where}the {name} has no revision '{wanted.revision}'.{_revisions(wanted)}")
    if isinstance(error, DisabledRepoError):
        return wrong(f"{where}this {name} was disabled on the Hub. Take another one.")
    if status == 401 and "nvalid credentials" in str(error):
        return wrong(
            f"{where}the Hub does not accept your token: it has expired, or was mistyped. Make a new one on "
            f"{_endpoint()}/settings/tokens and log in with `hf auth login`, or unset HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return wrong(f"{where}{_unknown(wanted)}")
    if status == 403:
        return wrong(
            f"{where}your token may not read it. Give it the right to read this {name} on "
            f"{_endpoint()}/settings/tokens."
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        return HubError(
            f"{where}the cache cannot be written to: {os.strerror(error.errno).lower()} ({_cache()}). Make room there, "
            "or name another place with HF_HOME."
        )
    if _broke_off(error):
        return HubError(f"{where}a download broke off: {_short(error)}. Run again; whole files are kept.")
    if not _is_away(error):
        return HubError(f"{where}it could not be fetched: {_short(error)}. Run again.")
    not_here = f"{where}{_HERE[wanted.kind]}, it is not in the Hub's cache ({_cache()}), and the Hub cannot be reached"
    if variable := offline(wanted.kind):
        unset = variable.partition("=")[0]
        return wrong(f"{not_here}: {variable} is set.{wanted.hint()} Unset {unset} to fetch it once.")
    return HubError(
        f"{not_here}: {_short(error)}.{wanted.hint()} Check the network and run again; what was fetched once is found "
        "in the cache."
    )


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_HERE: dict[Kind, str] = {
    "model": "there is no such folder here",
    "dataset": "no file or folder of that name is here",
}
_LOGIN = "then log in with `hf auth login` or set HF_TOKEN"


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the log lines of the Hub's client: what matters reaches the user as an error or a note."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _patiently(ask: Callable[[], T]) -> T:
    """Return what `ask` returns, trying again where the Hub failed to answer."""
    for wait in (*_WAITS, None):
        try:
            with quiet():
                return ask()
        except Exception as error:
            if wait is None or not _may_pass(_cause(error)):
                raise
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _cause(error: BaseException) -> Exception:
    """Return what lies below: the client wraps what the Hub answered."""
    from huggingface_hub.errors import HfHubHTTPError

    below: BaseException | None = error
    while below is not None:
        if (
            isinstance(below, HfHubHTTPError)
            or getattr(below, "errno", None) is not None
            or _is_transport(below)
        ):
            return below  # type: ignore[return-value]
        below = below.__cause__ or below.__context__
    return error  # type: ignore[return-value]


def from_the_hub(error: Exception) -> bool:
    """Return whether the Hub, the way to it or the disk it is cached on is why something failed, not what it holds."""
    below = _cause(error)
    return (
        _is_away(below)
        or hasattr(below, "response")
        or getattr(below, "errno", None) in _DISK
        or _broke_off(below)
    )


def _is_transport(error: BaseException) -> bool:
    import huggingface_hub.utils as client

    return isinstance(error, client.httpx.TransportError)  # type: ignore[attr-defined]


def _is_away(error: BaseException) -> bool:
    """Return whether the Hub did not answer, by choice or not; the cache may be asked instead."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return _is_transport(error) or isinstance(
        error, (OfflineModeIsEnabled, EntryNotFoundError, ConnectionError)
    )


def _may_pass(error: Exception) -> bool:
    """Return whether asking again soon may help: the Hub was there, and faltered."""
    import huggingface_hub.utils as client
    from huggingface_hub.errors import OfflineModeIsEnabled

    httpx = client.httpx  # type: ignore[attr-defined]
    never = (httpx.ConnectError, httpx.ProxyError, OfflineModeIsEnabled, FileNotFoundError)
    return _broke_off(error) or (_is_away(error) and not isinstance(error, never))


def _broke_off(error: Exception) -> bool:
    """Return whether a file came shorter or longer than announced."""
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def _unknown(wanted: Wanted) -> str:
    """Return what to say of an id that the Hub does not know, or does not show to this token."""
    from huggingface_hub import HfApi

    name = _WORDS[wanted.kind][0]
    other: Kind = "dataset" if wanted.kind == "model" else "model"
    with suppress(Exception):  # a kindness: what it says is not needed
        HfApi().repo_info(wanted.id, repo_type=other, timeout=_TIMEOUT)
        word, key, _ = _WORDS[other]
        return f"on the Hub this is a {word}, not a {name}. As a {word} it is given by `{key}{wanted.id}`."
    private = (
        "that your token may not read" if _has_token() else "to log in for with `hf auth login` or HF_TOKEN"
    )
    return (
        f"{_HERE[wanted.kind]}, and the Hub has no {name} of that name (or a private one {private})."
        f"{did_you_mean(wanted.id, cached_ids(wanted.kind))}{wanted.hint()} Check the spelling: an id is `user/name`."
    )


def _revisions(wanted: Wanted) -> str:
    """Return the revisions there are."""
    from huggingface_hub import HfApi

    with suppress(Exception):
        refs = HfApi().list_repo_refs(wanted.id, repo_type=wanted.kind)
        names = [each.name for each in (*refs.branches, *refs.tags)]
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"{did_you_mean(str(wanted.revision), names)} It has {listed}, and the commits of these."
    return " Give a branch, tag or commit of it."


def cached_ids(kind: Kind) -> list[str]:
    """Return the ids of the repositories in the Hub's cache."""
    cache, start = Path(_cache()), f"{kind}s--"
    if not cache.is_dir():
        return []
    return sorted(each.name.removeprefix(start).replace("--", "/") for each in cache.glob(f"{start}*"))


def hub_folder(wanted: Wanted) -> Path:
    """Return the folder in which the Hub's cache keeps a repository."""
    from huggingface_hub.file_download import repo_folder_name

    return Path(_cache()) / repo_folder_name(repo_id=wanted.id, repo_type=wanted.kind)


def _ref(wanted: Wanted) -> Path:
    """Return the file in which the Hub's cache keeps the commit of a branch or tag."""
    return hub_folder(wanted) / "refs" / (wanted.revision or "main")


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _short(error: Exception) -> str:
    """Return the kind of a failure in a few words; the client's own texts hold addresses and advice for programmers."""
    from huggingface_hub import get_token

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"it answers {status}"
    text = str(error).replace(get_token() or "\n", "").strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200].rstrip('.')}" if text else type(error).__name__
