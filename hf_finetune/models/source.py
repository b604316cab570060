"""Where a backbone comes from: an id becomes a folder in Hub layout, or an architecture of timm's registry.

A Hub repository is fetched into the Hub's cache first, so everything behind this module reads folders.
This module is light: timm and huggingface_hub are imported when an id needs them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_finetune import shipped
from hf_finetune.errors import ModelError, did_you_mean
from hf_finetune.models.backbone import Library, Modality
from hf_finetune.models.spec import BackboneSpec

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_SHARDED_WEIGHTS = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHT_FILES = (WEIGHTS, "model-*-of-*.safetensors", "adapter_model.safetensors")
_CONVERT = (
    "Convert them to safetensors (`save_pretrained` of transformers does it, or "
    "https://huggingface.co/spaces/safetensors/convert), or take a revision that has them."
)


@dataclass(frozen=True)
class Source:
    """A backbone that was found, before anything is built."""

    id: str
    library: Library
    architecture: str
    """timm's architecture name, or transformers' model type."""
    config: dict[str, Any]
    """The folder's config.json; empty for an architecture from timm's registry."""
    folder: Path | None
    """None when timm's registry knows the architecture and no weights are wanted."""
    revision: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        if self.commit:
            return f"{self.id}@{self.commit[:12]}"
        return str(self.folder or f"timm's registry, {self.architecture}")

    def as_dict(self) -> dict[str, Any]:
        """Return what a run records about it."""
        return {
            "id": self.id,
            "library": self.library,
            "architecture": self.architecture,
            "folder": str(self.folder) if self.folder else None,
            "revision": self.revision,
            "commit": self.commit,
        }


def find_source(spec: BackboneSpec) -> Source:
    """Find the backbone a spec names; fetches from the Hub what its cache lacks.

    Raises:
        ModelError: nothing is there, a file is missing or not allowed, or the Hub does not answer.
    """
    if spec.id.startswith("shipped/"):
        return _from_folder(spec, shipped.backbone_folder(spec.id.removeprefix("shipped/")))
    path = Path(spec.id).expanduser()
    if path.is_dir():
        return _from_folder(spec, path)
    if _names_a_path(spec.id):
        raise ModelError(f"backbone '{spec.id}': there is no such folder.{_near_folder(path)} {_ALLOWED}")
    hub_id = spec.id
    if "/" not in hub_id or hub_id.startswith("timm/"):
        architecture = _registered(spec)
        if architecture and not spec.pretrained and not spec.revision:
            return Source(spec.id, "timm", architecture, {}, None)
        if architecture and "/" not in hub_id:
            hub_id = _published_as(spec, architecture)
    folder = _fetch(spec, hub_id)
    return _from_folder(spec, folder, hub_id=hub_id)


def find_trained(place: str) -> Path:
    """Return the folder of a trained model or adapter: a local one, or a Hub repository's in the Hub's cache.

    Raises:
        ModelError: nothing is there.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        folder = path
    elif _names_a_path(place) or place.startswith("shipped/"):
        found = find_source(BackboneSpec(id=place)).folder
        assert found is not None, "pretrained weights have a folder"
        return found
    else:
        folder = _fetch(BackboneSpec(id=place), place)
    if not (folder / ADAPTER_CONFIG).is_file():
        _from_folder(BackboneSpec(id=place), folder, hub_id=None if folder == path else place)
    return folder


def expected_modality(spec: BackboneSpec) -> Modality | None:
    """Return what a backbone reads, from names and config.json alone; None when they do not tell.

    Asks neither the network nor a heavy import, so that a recipe can be checked with it.
    """
    if spec.id.startswith("shipped/"):
        known = shipped.BACKBONES.get(spec.id.removeprefix("shipped/"))
        return known.modality if known else None
    if spec.id.startswith("timm/"):
        return "image"
    config_file = Path(spec.id).expanduser() / CONFIG
    if not config_file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(spec.id, CONFIG, revision=spec.revision)
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        config_file = Path(cached)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _modality_of(config) if isinstance(config, dict) else None


def _modality_of(config: dict[str, Any]) -> Modality | None:
    if "architecture" in config:
        return "image"
    reads_text = "vocab_size" in config
    reads_images = any(key in config for key in ("image_size", "num_channels", "patch_size"))
    if reads_text == reads_images:
        return None
    return "text" if reads_text else "image"


_ALLOWED = (
    "A backbone is a local folder in Hub layout, a Hub id such as `timm/resnet18.a1_in1k`, or `shipped/…`."
)


def _names_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def _near_folder(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        existing = next((p for p in path.parents if p.is_dir()), None)
        return f" The part that exists is '{existing}'." if existing else ""
    return did_you_mean(path.name, (p.name for p in parent.iterdir() if p.is_dir()))


def _from_folder(spec: BackboneSpec, folder: Path, *, hub_id: str | None = None) -> Source:
    where = f"backbone '{spec.id}'"
    if spec.revision and not hub_id:
        raise ModelError(
            f"{where}: `revision` is '{spec.revision}', but a folder has no revisions, only a Hub id has. "
            "Remove it."
        )
    config = _read_config(where, folder)
    if "architecture" in config:
        library, architecture = "timm", str(config["architecture"])
    elif "model_type" in config:
        library, architecture = "transformers", str(config["model_type"])
    else:
        raise ModelError(
            f"{where}: its {CONFIG} names neither a timm `architecture` nor a transformers `model_type`. "
            "Give a folder or repository saved by one of the two libraries."
        )
    if spec.pretrained:
        _require_weights(where, folder, library)
    commit = folder.name if hub_id else None
    return Source(hub_id or spec.id, library, architecture, config, folder, spec.revision, commit)  # type: ignore[arg-type]


def _read_config(where: str, folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        hint = f" Its sub-folder '{inner[0]}' has one: name that." if inner else ""
        raise ModelError(
            f"{where}: {folder} holds no {CONFIG}.{hint} A folder in Hub layout holds {CONFIG} and {WEIGHTS} "
            "(timm's `save_for_hf`, transformers' `save_pretrained`)."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: {file} cannot be read as JSON ({error}). Save the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{where}: {file} is not a JSON object. Save the model again.")
    return config


def _require_weights(where: str, folder: Path, library: str) -> None:
    if (folder / WEIGHTS).is_file() or (library == "transformers" and (folder / _SHARDED_WEIGHTS).is_file()):
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{where}: it is an adapter, not a backbone. Start from its base model (`base_model_name_or_path` in its "
            f"{ADAPTER_CONFIG}), or train with `merge: true` to get a model to start from."
        )
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{where}: its weights are in {pickles[0]}, a format that can run code when it is read; "
            f"only safetensors are loaded. {_CONVERT}"
        )
    raise ModelError(
        f"{where}: {folder} holds no {WEIGHTS}. Weights in other formats are not loaded. {_CONVERT} "
        "For random weights set `backbone.pretrained: false`."
    )


def _registered(spec: BackboneSpec) -> str | None:
    """Return the id as `architecture.tag` when timm's registry has the architecture."""
    import timm

    name = spec.id.removeprefix("timm/")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return None
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags and not spec.pretrained:
        raise ModelError(
            f"backbone '{spec.id}': timm has no weights '{tag}' for {architecture}.{did_you_mean(tag, tags)} "
            f"It has {', '.join(tags) or 'none'}."
        )
    return name


def _published_as(spec: BackboneSpec, name: str) -> str:
    import timm

    cfg = timm.get_pretrained_cfg(name)
    tag = f".{cfg.tag}" if cfg and cfg.tag else ""
    if not cfg or not cfg.hf_hub_id:
        raise ModelError(
            f"backbone '{spec.id}': timm publishes no weights for it on the Hub. "
            "Take another architecture, or set `backbone.pretrained: false`."
        )
    repository = cfg.hf_hub_id
    return f"{repository}{cfg.architecture}{tag}" if repository.endswith("/") else repository


def _fetch(spec: BackboneSpec, hub_id: str) -> Path:
    """Return the folder of a Hub repository's files in the Hub's cache, fetched when they are not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"backbone '{spec.id}'"
    patterns = [
        *_SMALL_FILES,
        *(_WEIGHT_FILES if spec.pretrained else ()),
        *(["*.py"] if spec.trust_remote_code else ()),
    ]
    try:
        return Path(
            snapshot_download(
                hub_id, revision=spec.revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
    except HFValidationError:
        raise ModelError(
            f"{where}: this is no folder and no valid Hub id.{_near_folder(Path(spec.id))} {_ALLOWED}"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"{where}: the repository is gated. Accept its terms on https://huggingface.co/{hub_id}, "
            "then log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{where}: the repository has no revision '{spec.revision}'. "
            "Give a branch, tag or commit of it, or leave `backbone.revision` out."
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{where}: there is no such folder here and no such repository on the Hub "
            f"(or it is private: `hf auth login`).{_near_name(spec)} {_ALLOWED}"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        # The Hub's client tells "offline by choice" and "no network" apart only by this variable.
        offline = next(
            (v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(os.environ.get(v))), None
        )
        if offline:
            problem = f"{offline}={os.environ[offline]} is set and it is not in the Hub's cache"
            remedy = f"Unset {offline} to fetch it once"
        else:
            problem = f"it is not in the Hub's cache and the Hub cannot be reached ({type(error).__name__})"
            remedy = "Check the network and run again"
        raise ModelError(
            f"{where}: there is no such folder here, {problem}.{_near_name(spec)} {remedy}, or name a local "
            f"folder or a shipped backbone ({', '.join('shipped/' + name for name in shipped.BACKBONES)})."
        ) from None


def _is_on(value: str | None) -> bool:
    return value is not None and value.upper() in {"1", "ON", "YES", "TRUE"}


def _near_name(spec: BackboneSpec) -> str:
    if "/" in spec.id and not spec.id.startswith("timm/"):
        return _near_folder(Path(spec.id)) if Path(spec.id).parent.is_dir() else ""
    import timm

    bare = "/" not in spec.id
    known = timm.list_models() if bare else [f"timm/{name}" for name in timm.list_pretrained()]
    return did_you_mean(spec.id, known)
