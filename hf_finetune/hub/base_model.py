"""The model a run started from: what it is called on the Hub, and the licence and languages its own card states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants, hf_hub_download, metadata_load

from hf_finetune import shipped
from hf_finetune.hub.published import published_name
from hf_finetune.models.spec import BackboneSpec

CARD = "README.md"


@dataclass(frozen=True)
class BaseModel:
    """The model a run started from, as far as its own files tell."""

    name: str
    """A Hub id, `shipped/…`, or the name of a folder."""
    architecture: str
    pretrained: bool
    """False: only its architecture was taken."""
    hub_id: str | None = None
    """Of these very weights; None for a local folder."""
    commit: str | None = None
    ancestor: str | None = None
    """What the card of a local folder names as its own base model."""
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_from: str | None = None
    """The file that states the licence."""
    languages: tuple[str, ...] = ()

    @property
    def on_hub(self) -> str | None:
        """The nearest model on the Hub that the weights come from."""
        return (self.hub_id or self.ancestor) if self.pretrained else None

    @property
    def reference(self) -> str:
        """What an adapter's config names as the model it belongs on."""
        return self.hub_id or self.name


def find_base(spec: BackboneSpec, source: Mapping[str, Any]) -> BaseModel:
    """Return what is known of a backbone; asks the Hub for its card once, and does without where that fails.

    Args:
        spec: the recipe's section.
        source: what `Source.as_dict` says.
    """
    name, commit = published_name(spec.id), source["commit"]
    known = shipped.BACKBONES[name.removeprefix("shipped/")].hub_id if name.startswith("shipped/") else None
    hub_id = source["id"] if commit else known
    architecture = str(source["architecture"])
    if not spec.pretrained:
        return BaseModel(hub_id or name, architecture, pretrained=False, hub_id=hub_id)
    folder = Path(source["folder"]) if source["folder"] else None
    card = card_metadata(folder, hub_id, commit)
    base = card.get("base_model")
    ancestors = [each for each in (base if isinstance(base, list) else [base]) if isinstance(each, str)]
    return BaseModel(
        hub_id or name,
        architecture,
        pretrained=True,
        hub_id=hub_id,
        commit=commit,
        ancestor=ancestors[0] if hub_id is None and len(ancestors) == 1 else None,
        languages=_texts(card.get("language")),
        **_license(card, _config(folder), hub_id, commit),
    )


def card_metadata(
    folder: Path | None, repo_id: str | None, revision: str | None, *, repo_type: str = "model"
) -> dict[str, Any]:
    """Return the front matter of a card: the folder's, else the Hub's; empty where there is none."""
    file = folder / CARD if folder else None
    if file is None or not file.is_file():
        file = hub_file(repo_id, CARD, revision, repo_type) if repo_id else None
    if file is None:
        return {}
    try:
        return metadata_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError):  # somebody's own README, or YAML that is none
        return {}


@cache
def hub_file(repo_id: str, name: str, revision: str | None, repo_type: str) -> Path | None:
    """Return a small file of a Hub repository, from the cache or the Hub; None where neither has it."""
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, repo_type=repo_type, etag_timeout=5))
    except Exception:  # no network, no such file, no right to read it: a card is no reason to fail
        return None


def _license(
    card: Mapping[str, Any], config: Mapping[str, Any], hub_id: str | None, commit: str | None
) -> dict[str, str | None]:
    """Return the licence as its owners wrote it: of the card, else of timm's config; nothing where neither says."""
    stated = card.get("license")
    if isinstance(stated, list):
        stated = stated[0] if len(stated) == 1 else None
    if isinstance(stated, str) and stated.lower() != "unknown":
        link = card.get("license_link")
        if isinstance(link, str) and "://" not in link:  # a file of the base's repository
            link = f"{constants.ENDPOINT}/{hub_id}/blob/{commit or 'main'}/{link}" if hub_id else None
        name = card.get("license_name")
        return {
            "license": stated,
            "license_name": str(name) if name else None,
            "license_link": link if isinstance(link, str) else None,
            "license_from": CARD,
        }
    in_config = config.get("pretrained_cfg", {}).get("license") or config.get("license")
    if isinstance(in_config, str) and in_config.lower() != "unknown":
        return {"license": in_config, "license_from": "config.json"}
    return {}


def _config(folder: Path | None) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _texts(value: Any) -> tuple[str, ...]:
    """Return one text or a list of them as a tuple. YAML reads the language code `no` as false."""
    values = value if isinstance(value, list) else [value]
    return tuple("no" if each is False else str(each) for each in values if each is not None)
