"""Files to a repository in one commit, so that what was sent once is not sent again and nothing is half there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    hf_hub_url,
    is_offline_mode,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from hf_finetune.hub.retry import CONFLICT, HUB_ERRORS, Answer, Persistence, status

MANIFEST = ".hf_finetune.json"
"""Lists the files of the last push: the next one removes those of them that it does not replace, and no others."""


@dataclass(frozen=True)
class Target:
    """Where files go."""

    repo_id: str
    kind: Literal["model", "space"] = "model"
    branch: str | None = None
    pr: bool = False
    tag: str | None = None


@dataclass(frozen=True)
class Pushed:
    """A commit that holds all files, and nothing else of ours."""

    commit: str
    url: str
    """The commit's address, a pull request's if one was opened."""
    is_new: bool = True
    """False when the branch held these very files already."""


@dataclass(frozen=True)
class Head:
    """A revision as it is: its commit, and the hash of each file, sha256 for a large one and git's own for others."""

    commit: str
    files: dict[str, str]


class Unsure(RuntimeError):
    """The commit was asked for, and it is not known whether it was made."""


def claim(api: HfApi, target: Target, *, private: bool, persist: Persistence) -> None:
    """Make the repository if it is not there, and ask whether it may be written to, without a commit.

    Raises:
        retry.HUB_ERRORS: it may not.
    """
    if is_offline_mode():
        raise OfflineModeIsEnabled
    persist("who am I", api.whoami)
    if target.pr:  # anybody who may read may ask
        persist("look at the repository", lambda: _info(api, target))
        return

    def create() -> None:
        sdk = {"space_sdk": "gradio"} if target.kind == "space" else {}
        api.create_repo(target.repo_id, repo_type=target.kind, private=private or None, exist_ok=True, **sdk)  # type: ignore[arg-type]

    persist("make the repository", create)
    # `create_repo` is content with any repository that can be seen. To announce a file takes the right to write.
    announced = [CommitOperationAdd("README.md", b"")]
    persist(
        "ask for write access",
        lambda: api.preupload_lfs_files(target.repo_id, announced, repo_type=target.kind, free_memory=False),
    )


def upload(
    api: HfApi,
    target: Target,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    merge_card: Callable[[str, str], str],
    persist: Persistence,
) -> Pushed:
    """Commit `files` and remove what an earlier push left and these do not replace.

    Each step may be run again at any point: the branch is looked at first, and a commit whose answer was lost is
    recognised by its files.

    Args:
        files: content by path.
        merge_card: from the new README.md and the one in the repository to the one to upload.

    Raises:
        Unsure: the Hub did not answer to the commit, nor later; the branch holds all of it or nothing.
        retry.HUB_ERRORS: the Hub refused, or could not be reached for long; the branch is as it was.
    """
    if target.branch and not target.pr:
        persist(
            "make the branch",
            lambda: api.create_branch(
                target.repo_id, branch=target.branch or "", repo_type=target.kind, exist_ok=True
            ),
        )
    listed = json.dumps({"files": sorted(files)}, indent=1) + "\n"
    contents = {**files, MANIFEST: listed.encode()}
    hashed = {path: CommitOperationAdd(path, _content(content)) for path, content in contents.items()}
    pulls = persist("look at pull requests", lambda: _pulls(api, target)) if target.pr else {}
    asked = False  # for a commit, whose answer did not come

    def sure(what: str, step: Callable[[], Answer]) -> Answer:
        return persist(what, step, unsure=lambda: asked)

    def publish() -> Pushed:
        nonlocal asked
        head = sure("look at the branch", lambda: _head(api, target, target.branch))
        wanted = dict(contents)
        if "README.md" in files and "README.md" in head.files:
            old = sure("read the card", lambda: _read(api, target, head, "README.md"))
            card = merge_card(
                _bytes(files["README.md"]).decode("utf-8"), old.decode("utf-8", errors="replace")
            )
            wanted["README.md"] = card.encode()
        changes: list[CommitOperationAdd | CommitOperationDelete] = []
        for path, content in wanted.items():
            change = CommitOperationAdd(path, _content(content))
            if content is contents[path]:
                change.upload_info = hashed[path].upload_info  # hashed once, however often it is tried
            if path not in head.files or head.files[path] not in _hashes(change):
                changes.append(change)
        additions = [each for each in changes if isinstance(each, CommitOperationAdd)]
        stale = sure("read what was pushed before", lambda: _left_over(api, target, head)) - wanted.keys()
        changes += [CommitOperationDelete(path) for path in sorted(stale)]
        if not changes:
            return Pushed(head.commit, f"{_page(api, target)}/commit/{head.commit}", is_new=asked)
        if target.pr and (
            opened := sure("look at pull requests", lambda: _opened(api, target, pulls, changes))
        ):
            return opened
        asked = False
        persist(
            "send files",
            lambda: api.preupload_lfs_files(
                target.repo_id, additions, repo_type=target.kind, revision=target.branch, create_pr=target.pr,
                free_memory=False,
            ),
        )  # fmt: skip
        try:
            commit = api.create_commit(
                target.repo_id, changes, commit_message=message, repo_type=target.kind, revision=target.branch,
                create_pr=target.pr, parent_commit=head.commit,
            )  # fmt: skip
        except HUB_ERRORS as error:
            asked = status(error) is None or status(error) in range(500, 600)
            raise
        return Pushed(commit.oid, str(commit.pr_url or commit.commit_url))

    try:
        return sure("commit", publish)
    except HUB_ERRORS as error:
        if asked:
            raise Unsure(error) from error
        raise


def tag(api: HfApi, target: Target, commit: str, persist: Persistence) -> None:
    """Tag a commit.

    Raises:
        retry.HUB_ERRORS: the Hub refused, or the tag is on another commit.
    """
    persist("tag", lambda: _tag(api, target, commit))


def _info(api: HfApi, target: Target, revision: str | None = None) -> Any:
    silence: Any = get_session().timeout
    return api.repo_info(
        target.repo_id,
        repo_type=target.kind,
        revision=revision,
        files_metadata=True,
        timeout=silence,
    )


def _head(api: HfApi, target: Target, revision: str | None) -> Head:
    info = _info(api, target, revision)
    files = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}
    return Head(info.sha, files)


def _read(api: HfApi, target: Target, head: Head, path: str) -> bytes:
    url = hf_hub_url(target.repo_id, path, repo_type=target.kind, revision=head.commit, endpoint=api.endpoint)
    answer = get_session().get(url, headers=build_hf_headers(token=api.token))
    hf_raise_for_status(answer)
    return answer.content


def _left_over(api: HfApi, target: Target, head: Head) -> set[str]:
    """Return the files of the last push that are still there."""
    if MANIFEST not in head.files:
        return set()
    try:
        listed = json.loads(_read(api, target, head, MANIFEST))["files"]
    except (ValueError, KeyError, TypeError):  # changed by hand: nothing is known to be ours
        return set()
    return {path for path in listed if path in head.files}


def _pulls(api: HfApi, target: Target) -> dict[str, str]:
    refs = api.list_repo_refs(target.repo_id, repo_type=target.kind, include_pull_requests=True)
    return {ref.ref: ref.target_commit for ref in refs.pull_requests or []}


def _opened(
    api: HfApi,
    target: Target,
    before: Mapping[str, str],
    changes: Sequence[CommitOperationAdd | CommitOperationDelete],
) -> Pushed | None:
    """Return the pull request that holds these changes already: it was opened, and the answer lost."""
    for ref, commit in _pulls(api, target).items():
        if ref in before:
            continue
        files = _head(api, target, ref).files
        if all(
            files.get(each.path_in_repo) in _hashes(each)
            if isinstance(each, CommitOperationAdd)
            else each.path_in_repo not in files
            for each in changes
        ):
            return Pushed(commit, f"{_page(api, target)}/discussions/{ref.rsplit('/', 1)[-1]}")
    return None


def _tag(api: HfApi, target: Target, commit: str) -> None:
    try:
        api.create_tag(target.repo_id, tag=target.tag or "", revision=commit, repo_type=target.kind)
    except HfHubHTTPError as error:
        if status(error) not in CONFLICT:
            raise
        there = _info(api, target, target.tag).sha
        if there != commit:
            raise ValueError(
                f"the tag '{target.tag}' is there already, on commit {there[:8]}; choose another"
            ) from None


def _hashes(operation: CommitOperationAdd) -> tuple[str, str]:
    """Return the hashes by which the Hub may know this content: as a large file, and as git's own."""
    sha256 = operation.upload_info.sha256.hex()
    if operation.upload_info.size > 50_000_000:
        return sha256, sha256  # never git's own
    with operation.as_file() as file:
        content = file.read()
    return sha256, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _content(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _page(api: HfApi, target: Target) -> str:
    return f"{api.endpoint}/{'spaces/' if target.kind == 'space' else ''}{target.repo_id}"
