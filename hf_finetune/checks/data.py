"""Rules about data and augmentation, and whether they are the backbone's and the task's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hf_finetune.augment.spec import BATCH_AUGMENTATIONS, IMAGE_AUGMENTATIONS, TEXT_AUGMENTATIONS
from hf_finetune.checks.conflict import (
    SHIPPED,
    Conflict,
    listed,
    mixing_keys,
    modalities,
    shipped_data,
)
from hf_finetune.data.spec import DataSpec
from hf_finetune.errors import nearest
from hf_finetune.recipe_spec import Recipe
from hf_finetune.shipped import BACKBONES, DATASETS
from hf_finetune.tasks import TASKS

_VALIDATION_NAMES = ("validation", "val", "valid", "dev", "eval")


def shipped_names(recipe: Recipe) -> Iterator[Conflict]:
    """A `shipped/…` name is one of the package's."""
    paths = recipe.data.path if isinstance(recipe.data.path, list) else [recipe.data.path]
    named = [("backbone.id", recipe.backbone.id, list(BACKBONES))]
    named += [("data.path", path, list(DATASETS)) for path in paths]
    for key, name, known in named:
        if name.startswith(SHIPPED) and name.removeprefix(SHIPPED) not in known:
            match = nearest(name.removeprefix(SHIPPED), known)
            yield Conflict(
                (key,),
                f"the package ships {listed([SHIPPED + each for each in known])}",
                f"did you mean '{SHIPPED}{match}'?"
                if match
                else "choose one of them, a Hub id or a local path",
            )


def modalities_agree(recipe: Recipe) -> Iterator[Conflict]:
    """Task, data and backbone are all about images, or all about texts."""
    said = dict(modalities(recipe))
    other = next((key for key, kind in said.items() if kind != next(iter(said.values()))), None)
    if other is None:
        return
    wanted = said.get("task", said.get("data.path", ""))
    data = " or ".join(SHIPPED + name for name, d in DATASETS.items() if TASKS[d.task].modality == wanted)
    backbones = " or ".join(SHIPPED + name for name, b in BACKBONES.items() if b.modality == wanted)
    yield Conflict(
        (other, *(key for key in said if key != other)),
        ", ".join(f"{key} is about {kind}s" for key, kind in said.items()),
        f"for {wanted}s there are data: {data} and backbone: {backbones}, or your own",
    )


def splits_exist(recipe: Recipe) -> Iterator[Conflict]:
    """Splits of a shipped set are among those it has."""
    shipped = shipped_data(recipe)
    if shipped is None:
        return
    for role in ("train", "validation", "test"):
        value = getattr(recipe.data, role)
        name = re.fullmatch(r"([\w-]+)(\[.*\])?", value) if isinstance(value, str) else None
        if name and name[1] not in (*shipped.splits, "auto"):
            match = nearest(name[1], shipped.splits)
            yield Conflict(
                (f"data.{role}", "data.path"),
                f"its splits are {listed(shipped.splits)}",
                f"did you mean '{match}'?" if match else "choose one of them",
            )


def fraction_needs_no_validation_split(recipe: Recipe) -> Iterator[Conflict]:
    """A fraction of train is held out only where the data has no validation split that would go unused."""
    own = _validation_split(recipe)
    if isinstance(recipe.data.validation, float) and own is not None and recipe.data.test != own:
        yield Conflict(
            ("data.validation", "data.path"),
            f"the data has its own validation split, '{own}', which would go unused",
            f"set data.validation: auto, or keep the fraction and set data.test: {own}",
        )


def streams_are_read_once_through(recipe: Recipe) -> Iterator[Conflict]:
    """What needs all rows of train at once, or their number by class, cannot be had of a stream."""
    data = recipe.data
    if not data.streaming:
        for key, idle in {
            "rows": data.rows is None,
            "classes": data.classes is None,
            "shuffle_buffer": data.shuffle_buffer == DataSpec().shuffle_buffer,
        }.items():
            if not idle:
                yield Conflict(
                    (f"data.{key}", "data.streaming"),
                    "it is about streams; other data are counted, searched and shuffled as a whole",
                    f"remove data.{key}, or set data.streaming: true",
                )
        return
    if data.max_samples is not None:
        yield Conflict(
            ("data.max_samples", "data.streaming"),
            "samples are drawn from all rows, which a stream does not hold",
            "remove data.max_samples; training.steps sets how much is read",
        )
    if data.class_weights != "none":
        yield Conflict(
            ("data.class_weights", "data.streaming"),
            "weights go by the rows of each class, which nobody has counted in a stream",
            "remove data.class_weights, or data.streaming",
        )
    if data.cache is not None:
        yield Conflict(
            ("data.cache", "data.streaming"),
            "a stream is never kept whole, decoded or not",
            "remove data.cache, or data.streaming",
        )
    if recipe.training.micro_batch_tokens is not None:
        yield Conflict(
            ("training.micro_batch_tokens", "data.streaming"),
            "texts of a stream are tokenised after they have been shared out",
            "remove training.micro_batch_tokens; a smaller training.micro_batch_size saves memory too",
        )
    if data.classes is not None and data.labels == "regression":
        yield Conflict(("data.classes", "data.labels"), "regression has no classes", "remove data.classes")
    if data.classes is not None and len(set(data.classes)) < len(data.classes):
        yield Conflict(("data.classes",), "it names a label twice", "name each label once")
    for role in ("train", "validation"):
        if "[" in str(getattr(data, role)):
            yield Conflict(
                (f"data.{role}", "data.streaming"),
                "a stream has no slices",
                "name a whole split or file"
                + ("; a fraction such as 0.1 sets rows aside" if role == "validation" else ""),
            )


def decoding_needs_images(recipe: Recipe) -> Iterator[Conflict]:
    """Only images are decoded."""
    text = next((key for key, modality in modalities(recipe) if modality == "text"), None)
    if recipe.data.cache and text:
        yield Conflict(
            ("data.cache", text),
            "images are decoded; texts are tokenised once in any case",
            "remove the key",
        )


def only_images_go_to_the_accelerator(recipe: Recipe) -> Iterator[Conflict]:
    """Words are changed before they are tokenised."""
    text = next((key for key, modality in modalities(recipe) if modality == "text"), None)
    if recipe.data.augment_on == "accelerator" and text:
        yield Conflict(
            ("data.augment_on", text),
            "the accelerator augments images; words are changed before they are tokenised",
            "remove the key",
        )


def augmentations_fit_the_modality(recipe: Recipe) -> Iterator[Conflict]:
    """Image augmentations for images, text augmentations for texts."""
    if not isinstance(recipe.augment, list):
        return
    kinds = dict.fromkeys(IMAGE_AUGMENTATIONS | BATCH_AUGMENTATIONS, "image")
    kinds |= dict.fromkeys(TEXT_AUGMENTATIONS, "text")
    said = list(modalities(recipe))
    if len({modality for _, modality in said}) > 1:
        return  # reported as such
    listed = [(f"augment.{i}.name", kinds[each.name]) for i, each in enumerate(recipe.augment)]
    witness, modality = (said or listed or [("", "")])[0]
    allowed = {"image": [*IMAGE_AUGMENTATIONS, *BATCH_AUGMENTATIONS], "text": [*TEXT_AUGMENTATIONS]}
    for key, kind in listed:
        if kind != modality:
            yield Conflict(
                (key, witness),
                f"{'an' if kind == 'image' else 'a'} {kind} augmentation does nothing for {modality}s",
                f"remove it, or choose from {', '.join(allowed[modality])}",
            )


def mixing_needs_pairs(recipe: Recipe) -> Iterator[Conflict]:
    """mixup and cutmix blend samples 2k and 2k+1 of a forward pass, so their number is even."""
    for key in mixing_keys(recipe):
        size_key = "micro_batch_size" if isinstance(recipe.training.micro_batch_size, int) else "batch_size"
        size = getattr(recipe.training, size_key)
        if size % 2:
            yield Conflict(
                (f"training.{size_key}", key),
                "samples are blended in pairs, so a forward pass takes an even number of them",
                f"set training.{size_key}: {size + 1}"
                if size_key == "batch_size"
                else "choose an even number",
            )
            return


def mixing_needs_classes(recipe: Recipe) -> Iterator[Conflict]:
    """mixup and cutmix blend class targets."""
    for key in mixing_keys(recipe):
        if recipe.data.labels == "regression":
            yield Conflict(
                (key, "data.labels"), "it blends the targets of classes; values are not classes", "remove it"
            )


def _validation_split(recipe: Recipe) -> str | None:
    """Return the name of the data's own validation split where that is known without opening it."""
    shipped, path = shipped_data(recipe), recipe.data.path
    names: list[str] = list(shipped.splits) if shipped else []
    if not shipped and isinstance(path, str) and Path(path).is_dir():
        names = [child.stem for child in sorted(Path(path).iterdir()) if not child.name.startswith(".")]
    return next((name for name in names if name.lower() in _VALIDATION_NAMES), None)
