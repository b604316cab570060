"""A run's model folder to a repository on the Hub, in one commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from hf_finetune.errors import HubError, UserError
from hf_finetune.runfolder import load_run


def check_rights(repo_id: str, *, private: bool) -> None:
    """Make the repository if it is not there, so that a run does not end in a refusal.

    Raises:
        HubError: the Hub cannot be reached, or refuses.
    """
    try:
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise HubError(
            f"hub: {repo_id} cannot be written to: {_reason(error)} Log in with `hf auth login` as somebody who may, "
            "choose another repo_id, or train with `hub=` and push later."
        ) from None


def push_folder(
    folder: Path, repo_id: str, *, message: str, branch: str | None = None, pr: bool = False
) -> str:
    """Upload a model folder in one commit and return the commit's address.

    Raises:
        HubError: the upload failed; the folder is as it was.
    """
    api = HfApi()
    try:
        if branch:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, revision=branch, create_pr=pr
        )
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise HubError(
            f"push to {repo_id} failed: {_reason(error)} The model is complete in {folder}; try again: "
            f"hf-finetune push {folder.parent} {repo_id}"
        ) from None
    return str(commit.pr_url or commit.commit_url)


def push_run(
    place: str,
    repo_id: str,
    *,
    private: bool,
    branch: str | None,
    pr: bool,
    tag: str | None,
    message: str | None,
) -> str:
    """Push the best model of a run folder and return the commit's address.

    Raises:
        UserError: the folder holds no run, or the run kept no model.
        HubError: the Hub cannot be reached, or refuses.
    """
    run = load_run(place)
    if not run.model_folder.is_dir():
        raise UserError(
            f"{place}: this run kept no model (status {run.status.get('status')}), so nothing can be pushed."
        )
    check_rights(repo_id, private=private)
    address = push_folder(
        run.model_folder, repo_id, message=message or commit_message(run.best), branch=branch, pr=pr
    )
    if tag:
        try:
            HfApi().create_tag(repo_id, tag=tag, revision=branch)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise HubError(
                f"{repo_id}: pushed ({address}), but the tag '{tag}' failed: {_reason(error)}"
            ) from None
    return address


def commit_message(best: dict | None) -> str:
    """Return a commit message that says what the weights measured."""
    if not best:
        return "Model that was not measured"
    return f"{best['metric']} {best['value']:.4f} at step {best['step']}"


def _reason(error: Exception) -> str:
    """Return the first line of what the client says; it never holds the token."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."
