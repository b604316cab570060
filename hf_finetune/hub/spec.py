"""What a recipe says about the Hub."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_finetune.spec import Spec

REPO_ID = r"^\w[\w.-]*/\w[\w.-]*$"
"""`user/name`."""


class HubSpec(Spec):
    """Where the model goes."""

    repo_id: Annotated[str, Field(pattern=REPO_ID)]
    """`user/name`; made when it is not there."""
    private: bool = False
    """Whether a repository that is made is private."""
    when: Literal["end", "best"] = "end"
    """`end` pushes the best model once, when the run is done; `best` pushes each new best model as well."""
