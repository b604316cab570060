"""Where a backbone comes from: an id becomes a folder in Hub layout, or an architecture of timm's registry.

A Hub repository is fetched into the Hub's cache first, so everything behind this module reads folders.
This module is light: timm and huggingface_hub are imported when an id needs them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_finetune import shipped
from hf_finetune.errors import ModelError, did_you_mean
from hf_finetune.fetch import Pinned, Wanted, download, pin
from hf_finetune.models.backbone import Library, Modality
from hf_finetune.models.layout import (
    ADAPTER_CONFIG,
    CONFIG,
    RECIPE,
    WEIGHTS,
    allowed_pickle,
    base_of,
    file_names,
    has_weights,
    read_config,
)
from hf_finetune.models.spec import BackboneSpec

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md", RECIPE)
_WEIGHT_FILES = (WEIGHTS, "model-*-of-*.safetensors", "adapter_model.safetensors")


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
    note: str | None = None
    """What a run should say of how it was found."""
    base: BackboneSpec | None = None
    """Of an adapter: the backbone it belongs on."""
    pickle: str | None = None
    """The file that holds the weights where they are not safetensors."""
    prepared: Path | None = None
    """A folder that any loader reads: an adapter merged into its base, or weights that were a pickle."""

    def __str__(self) -> str:
        if self.commit:
            return f"{self.id}@{self.commit[:12]}"
        return str(self.folder or f"timm's registry, {self.architecture}")

    @property
    def readable(self) -> Path | None:
        """The folder to load from."""
        return self.prepared or self.folder

    def as_dict(self) -> dict[str, Any]:
        """Return what a run records about it."""
        found: dict[str, Any] = {
            "id": self.id,
            "library": self.library,
            "architecture": self.architecture,
            "folder": str(self.folder) if self.folder else None,
            "revision": self.revision,
            "commit": self.commit,
        }
        if self.base is not None:
            found["adapter_of"] = {"id": self.base.id, "revision": self.base.revision}
        return found


def find_source(spec: BackboneSpec) -> Source:
    """Find the backbone a spec names; fetches from the Hub what its cache lacks.

    Raises:
        ModelError: nothing is there, a file is missing or not allowed.
        HubError: the Hub does not answer, and the cache lacks it.
    """
    where = f"backbone '{spec.id}'"
    if spec.id.startswith("shipped/"):
        return _from_folder(where, spec, shipped.backbone_folder(spec.id.removeprefix("shipped/")))
    path = Path(spec.id).expanduser()
    if path.is_dir():
        return _from_folder(where, spec, path)
    if _names_a_path(spec.id):
        raise ModelError(f"{where}: there is no such folder.{_near_folder(path)} {_ALLOWED}")
    hub_id = spec.id
    if "/" not in hub_id or hub_id.startswith("timm/"):
        architecture = _registered(spec)
        if architecture and not spec.pretrained and not spec.revision:
            return Source(spec.id, "timm", architecture, {}, None)
        if architecture and "/" not in hub_id:
            hub_id = _published_as(spec, architecture)
    pinned, folder = _fetch(where, spec, hub_id)
    return _from_folder(where, spec, folder, pinned)


def find_trained(place: str) -> tuple[Path, Pinned | None]:
    """Return the folder of a trained model or adapter, and its repository if it comes from the Hub.

    Args:
        place: a local folder, or `user/name`, or `user/name@revision`.

    Raises:
        ModelError: nothing is there.
        HubError: the Hub does not answer, and the cache lacks it.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        pinned, folder, spec = None, path, BackboneSpec(id=place)
    elif _names_a_path(place.partition("@")[0]) or place.startswith("shipped/"):
        found = find_source(BackboneSpec(id=place)).folder
        assert found is not None, "pretrained weights have a folder"
        return found, None
    else:
        name, _, revision = place.partition("@")
        spec = BackboneSpec(id=name, revision=revision or None) if name else BackboneSpec(id=place)
        pinned, folder = _fetch(f"'{place}'", spec, spec.id)
    _from_folder(f"'{place}'", spec, folder, pinned)
    return folder, pinned


def again(source: Source) -> str:
    """Return what to do about weights that cannot be read."""
    if source.commit and source.folder:
        return f"Its copy in the Hub's cache is damaged: remove {source.folder.parents[1]} and run again."
    return "Save them again."


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


def _from_folder(where: str, spec: BackboneSpec, folder: Path, pinned: Pinned | None = None) -> Source:
    if spec.revision and not pinned:
        raise ModelError(
            f"{where}: `revision` is '{spec.revision}', but a folder has no revisions, only a Hub id has. "
            "Remove it."
        )
    files = file_names(folder, pinned)
    if ADAPTER_CONFIG in files and CONFIG not in files:
        raise ModelError(
            f"{where}: it is an adapter without a {CONFIG} beside it, so its labels are unknown. Merge it into its "
            "base model (peft's `merge_and_unload`, then `save_pretrained`) and give the folder that makes."
        )
    config = read_config(where, folder, pinned)
    if "architecture" in config:
        library, architecture = "timm", str(config["architecture"])
    elif "model_type" in config:
        library, architecture = "transformers", str(config["model_type"])
    else:
        raise ModelError(
            f"{where}: its {CONFIG} names neither a timm `architecture` nor a transformers `model_type`. "
            "Give a folder or repository saved by one of the two libraries."
        )
    base, pickle = None, None
    if spec.pretrained and not has_weights(where, folder, library):
        if ADAPTER_CONFIG in files:
            base = base_of(where, folder, spec)
        else:
            pickle = allowed_pickle(where, spec, folder, files, pinned)
    return Source(
        pinned.wanted.id if pinned else spec.id,
        library,  # type: ignore[arg-type]
        architecture,
        config,
        folder,
        spec.revision,
        pinned.commit if pinned else None,
        pinned.note if pinned else None,
        base,
        pickle,
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


def _fetch(where: str, spec: BackboneSpec, hub_id: str) -> tuple[Pinned, Path]:
    """Return a Hub repository and the folder of its files in the Hub's cache, fetched when they are not there."""
    pinned = pin(Wanted(where, hub_id, "model", spec.revision, hint=lambda: _hint(spec)))
    weights = [*_WEIGHT_FILES, *([spec.allow_pickle] if spec.allow_pickle else [])]
    code = ["*.py"] if spec.trust_remote_code else []
    return pinned, download(pinned, [*_SMALL_FILES, *(weights if spec.pretrained else []), *code])


def _hint(spec: BackboneSpec) -> str:
    shipped_ones = ", ".join(f"shipped/{name}" for name in shipped.BACKBONES)
    return f"{_near_name(spec)} {_ALLOWED} Shipped are {shipped_ones}."


def _near_name(spec: BackboneSpec) -> str:
    if "/" in spec.id and not spec.id.startswith("timm/"):
        return _near_folder(Path(spec.id)) if Path(spec.id).parent.is_dir() else ""
    import timm

    bare = "/" not in spec.id
    known = timm.list_models() if bare else [f"timm/{name}" for name in timm.list_pretrained()]
    return "" if spec.id in known else did_you_mean(spec.id, known)
