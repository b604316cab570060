"""What a recipe's parts must agree on, beyond what each part checks alone: one small function for each rule.

Only what can be known without loading anything is checked here; what needs the data, the backbone or the
hardware is checked where those are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_finetune.augment.spec import BATCH_AUGMENTATIONS, IMAGE_AUGMENTATIONS, TEXT_AUGMENTATIONS
from hf_finetune.data.spec import DataSpec
from hf_finetune.errors import nearest
from hf_finetune.fetch import COMMIT
from hf_finetune.models.spec import PICKLE_SUFFIXES
from hf_finetune.recipe_spec import Recipe
from hf_finetune.shipped import BACKBONES, DATASETS, ShippedDataset
from hf_finetune.spec import Duration
from hf_finetune.strategies.methods import METHODS
from hf_finetune.strategies.phase import SOLVERS
from hf_finetune.tasks import TASKS
from hf_finetune.tasks.metrics import EVALUATE_PREFIX, LOSS, METRICS, metric_names

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
"""accelerate's own."""

_SHIPPED = "shipped/"
_VALIDATION_NAMES = ("validation", "val", "valid", "dev", "eval")
# Strategies whose frozen layers only make sense with pretrained weights.
_NEEDS_PRETRAINED = ("frozen", "lp_ft", "gradual", "bitfit", "norms", "surgical", "peft", *METHODS)


@dataclass(frozen=True)
class Conflict:
    """Keys that cannot stand together, or a value that cannot be met."""

    keys: tuple[str, ...]
    """The one to report first, then those it depends on."""
    reason: str
    remedy: str


def _modality(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, modality) for everything in the recipe that says whether it is about images or texts."""
    if recipe.task != "auto":
        yield "task", TASKS[recipe.task].modality
    if data := _shipped_data(recipe):
        yield "data.path", TASKS[data.task].modality
    backbone = BACKBONES.get(recipe.backbone.id.removeprefix(_SHIPPED))
    if backbone and recipe.backbone.id.startswith(_SHIPPED):
        yield "backbone.id", backbone.modality


def shipped_names(recipe: Recipe) -> Iterator[Conflict]:
    """A `shipped/…` name is one of the package's."""
    paths = recipe.data.path if isinstance(recipe.data.path, list) else [recipe.data.path]
    named = [("backbone.id", recipe.backbone.id, list(BACKBONES))]
    named += [("data.path", path, list(DATASETS)) for path in paths]
    for key, name, known in named:
        if name.startswith(_SHIPPED) and name.removeprefix(_SHIPPED) not in known:
            match = nearest(name.removeprefix(_SHIPPED), known)
            yield Conflict(
                (key,),
                f"the package ships {_listed([_SHIPPED + each for each in known])}",
                f"did you mean '{_SHIPPED}{match}'?"
                if match
                else "choose one of them, a Hub id or a local path",
            )


def modalities_agree(recipe: Recipe) -> Iterator[Conflict]:
    """Task, data and backbone are all about images, or all about texts."""
    said = dict(_modality(recipe))
    other = next((key for key, kind in said.items() if kind != next(iter(said.values()))), None)
    if other is None:
        return
    wanted = said.get("task", said.get("data.path", ""))
    data = " or ".join(_SHIPPED + name for name, d in DATASETS.items() if TASKS[d.task].modality == wanted)
    backbones = " or ".join(_SHIPPED + name for name, b in BACKBONES.items() if b.modality == wanted)
    yield Conflict(
        (other, *(key for key in said if key != other)),
        ", ".join(f"{key} is about {kind}s" for key, kind in said.items()),
        f"for {wanted}s there are data: {data} and backbone: {backbones}, or your own",
    )


def augmentations_fit_the_modality(recipe: Recipe) -> Iterator[Conflict]:
    """Image augmentations for images, text augmentations for texts."""
    if not isinstance(recipe.augment, list):
        return
    kinds = dict.fromkeys(IMAGE_AUGMENTATIONS | BATCH_AUGMENTATIONS, "image")
    kinds |= dict.fromkeys(TEXT_AUGMENTATIONS, "text")
    said = list(_modality(recipe))
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


def decoding_needs_images(recipe: Recipe) -> Iterator[Conflict]:
    """Only images are decoded."""
    text = next((key for key, modality in _modality(recipe) if modality == "text"), None)
    if recipe.data.cache and text:
        yield Conflict(
            ("data.cache", text),
            "images are decoded; texts are tokenised once in any case",
            "remove the key",
        )


def only_images_go_to_the_accelerator(recipe: Recipe) -> Iterator[Conflict]:
    """Words are changed before they are tokenised."""
    text = next((key for key, modality in _modality(recipe) if modality == "text"), None)
    if recipe.data.augment_on == "accelerator" and text:
        yield Conflict(
            ("data.augment_on", text),
            "the accelerator augments images; words are changed before they are tokenised",
            "remove the key",
        )


def mixing_needs_pairs(recipe: Recipe) -> Iterator[Conflict]:
    """mixup and cutmix blend samples 2k and 2k+1 of a forward pass, so their number is even."""
    for key in _mixing(recipe):
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
    for key in _mixing(recipe):
        if recipe.data.labels == "regression":
            yield Conflict(
                (key, "data.labels"), "it blends the targets of classes; values are not classes", "remove it"
            )


def smoothing_needs_classes(recipe: Recipe) -> Iterator[Conflict]:
    """Label smoothing spreads one class's target over the others."""
    if recipe.training.label_smoothing and recipe.data.labels != "single":
        yield Conflict(
            ("training.label_smoothing", "data.labels"),
            "smoothing spreads the target of one class over the others, so it needs single labels",
            "set training.label_smoothing: 0",
        )


def weights_need_classes(recipe: Recipe) -> Iterator[Conflict]:
    """Class weights need classes."""
    if recipe.data.class_weights != "none" and recipe.data.labels == "regression":
        yield Conflict(
            ("data.class_weights", "data.labels"),
            "regression has no classes to weigh",
            "set data.class_weights: none",
        )


def run_has_a_length(recipe: Recipe) -> Iterator[Conflict]:
    """Epochs or steps, one of them."""
    training, keys = recipe.training, ("training.steps", "training.epochs")
    if training.epochs is None and training.steps is None:
        yield Conflict(keys, "the run has no length", "set training.epochs or training.steps")
    elif training.epochs is not None and training.steps is not None:
        yield Conflict(keys, "both say how long the run is", "keep one, remove the other")


def micro_batches_hold_a_text(recipe: Recipe) -> Iterator[Conflict]:
    """A bound on tokens is for texts, and holds the longest of them."""
    tokens, longest = recipe.training.micro_batch_tokens, recipe.data.max_length
    if tokens is None:
        return
    image = next((key for key, modality in _modality(recipe) if modality == "image"), None)
    if image:
        yield Conflict(
            ("training.micro_batch_tokens", image),
            "images have no tokens",
            "set training.micro_batch_size instead",
        )
    elif longest != "auto" and tokens < longest:
        yield Conflict(
            ("training.micro_batch_tokens", "data.max_length"),
            f"{tokens} tokens do not hold one text of {longest}",
            f"set training.micro_batch_tokens: {longest} or more, or data.max_length: {tokens} or less",
        )


def micro_batches_fill_the_batch(recipe: Recipe) -> Iterator[Conflict]:
    """An optimizer step takes a whole number of forward passes."""
    batch, micro = recipe.training.batch_size, recipe.training.micro_batch_size
    if not isinstance(micro, int) or batch % micro == 0:
        return
    rounded = micro * max(1, round(batch / micro))
    divisors = [size for size in range(batch, 0, -1) if batch % size == 0 and size <= max(micro, 1)]
    larger = "is larger than" if micro > batch else "does not divide"
    yield Conflict(
        ("training.micro_batch_size", "training.batch_size"),
        f"it {larger} the batch of an optimizer step, which takes a whole number of forward passes",
        f"set training.micro_batch_size: {divisors[0]}, or training.batch_size: {rounded}",
    )


def metrics_fit_the_labels(recipe: Recipe) -> Iterator[Conflict]:
    """Every metric is known and for the kind of labels the data has."""
    kind = recipe.data.labels
    keys = [("monitor.metric", recipe.monitor.metric)]
    keys += [(f"monitor.metrics.{i}", name) for i, name in enumerate(recipe.monitor.metrics)]
    for key, name in keys:
        allowed = f"for {kind} labels there are {', '.join(metric_names(kind))}"
        if name in (LOSS, *(["auto"] if key == "monitor.metric" else [])) or name in metric_names(kind):
            continue
        if name.startswith(EVALUATE_PREFIX) and name != EVALUATE_PREFIX:
            continue
        if name in METRICS:
            yield Conflict(
                (key, "data.labels"), f"{name} is for {_listed(METRICS[name].kinds)} labels", allowed
            )
            continue
        longer = (each for each in metric_names(kind) if each.startswith(name))
        match = nearest(name, metric_names(kind)) or next(longer, None)
        yield Conflict(
            (key,),
            "no metric has this name" + (f"; did you mean '{match}'?" if match else ""),
            f"{allowed}; a metric of Hugging Face evaluate is written {EVALUATE_PREFIX}<name>",
        )


def better_is_known(recipe: Recipe) -> Iterator[Conflict]:
    """More or less of the monitored metric is better, and the recipe does not say the opposite."""
    metric, mode = recipe.monitor.metric, recipe.monitor.mode
    if metric.startswith(EVALUATE_PREFIX) and mode == "auto":
        yield Conflict(
            ("monitor.metric", "monitor.mode"),
            "the metrics of Hugging Face evaluate do not say which way is better",
            "set monitor.mode: max, or min",
        )
    right = "min" if metric == LOSS else METRICS[metric].mode if metric in METRICS else mode
    if mode not in ("auto", right):
        yield Conflict(
            ("monitor.mode", "monitor.metric"),
            f"the run would keep its worst weights: {metric} is better at its "
            f"{'highest' if right == 'max' else 'lowest'}",
            "set monitor.mode: auto",
        )


def evaluations_happen(recipe: Recipe) -> Iterator[Conflict]:
    """The run is at least as long as the time between two evaluations."""
    share = _share_of_run(recipe.monitor.evaluate, recipe)
    if share is not None and share > 1:
        yield Conflict(
            ("monitor.evaluate", _length_key(recipe)),
            "the run ends before its first evaluation",
            f"evaluate at most every {_length(recipe)}, or train longer",
        )


def patience_can_run_out(recipe: Recipe) -> Iterator[Conflict]:
    """What waits for a plateau gets enough evaluations: one to compare with, then `patience` more."""
    share = _share_of_run(recipe.monitor.evaluate, recipe)
    if share is None or share > 1:
        return
    evaluations = int(1 / share + 1e-9)
    for keys, patience, what in _waits(recipe):
        if patience >= evaluations:
            remedy = "evaluate more often (monitor.evaluate: 20%) or train longer"
            if evaluations > 1 and patience > 1:
                remedy = f"set a patience of at most {evaluations - 1}, or {remedy}"
            yield Conflict(
                (*keys, "monitor.evaluate", _length_key(recipe)),
                f"{what} takes {patience + 1} evaluations, the run has {evaluations}",
                remedy,
            )


def warmup_suits_the_schedule(recipe: Recipe) -> Iterator[Conflict]:
    """A curve that rises by itself takes no warmup, and a warmup ends before the run does."""
    schedule = recipe.schedule
    if not isinstance(schedule.warmup, Duration):
        return
    if not schedule.warms_up:
        yield Conflict(
            ("schedule.warmup", "schedule.name"),
            "this curve rises by itself, so a warmup would come on top",
            "remove schedule.warmup; schedule.rise sets how long the curve rises",
        )
        return
    share = _share_of_run(schedule.warmup, recipe)
    if share is not None and share >= 1:
        yield Conflict(
            ("schedule.warmup", _length_key(recipe)),
            "the rate would rise until the run ends",
            f"warm up for less than {_length(recipe)}, such as 10%",
        )


def phases_fill_the_run(recipe: Recipe) -> Iterator[Conflict]:
    """Phases of fixed length fit into the run, and the last one lasts until its end."""
    numbered = [each for each in enumerate(getattr(recipe.strategy, "phases", [])) if not each[1].solver]
    phases = [phase for _, phase in numbered]
    shares = {i: _share_of_run(phase.for_, recipe) for i, phase in numbered if phase.for_ is not None}
    fixed = [(i, share) for i, share in shares.items() if share is not None]
    total, keys = sum(share for _, share in fixed), tuple(f"strategy.phases.{i}.for" for i, _ in fixed)
    ends = phases and phases[-1].for_ is not None
    if total > 1 + 1e-9:
        yield Conflict(
            (keys[-1], *keys[:-1], _length_key(recipe)),
            f"the phases take {total:.0%} of the run",
            "shorten them, or train longer; the last phase needs no `for`: it takes what is left",
        )
    elif ends and len(fixed) == len(phases) and total < 1 - 1e-9:
        yield Conflict(
            (keys[-1], *keys[:-1], _length_key(recipe)),
            f"the phases take only {total:.0%} of the run",
            "remove `for` from the last phase: it takes what is left",
        )


def both_stages_happen(recipe: Recipe) -> Iterator[Conflict]:
    """The probe of lp_ft leaves time for what follows it."""
    probe = getattr(recipe.strategy, "probe", None)
    share = _share_of_run(probe, recipe) if isinstance(probe, Duration) else None
    if share is not None and share >= 1:
        yield Conflict(
            ("strategy.probe", _length_key(recipe)),
            "the run would end before all layers train",
            f"probe for less than {_length(recipe)}, such as 40%",
        )


def solvers_have_features(recipe: Recipe) -> Iterator[Conflict]:
    """A solver fits what frozen layers compute once, of rows as they are measured or in the views that are kept."""
    solved = _solved(recipe)
    if not solved:
        return
    key, solver = next(iter(solved.items()))
    if recipe.cache == "off":
        yield Conflict(
            (key, "cache"),
            f"{solver} fits features that are computed once, and `off` keeps none",
            "set cache: auto, or remove the solver",
        )
    if recipe.training.gradient_checkpointing:
        yield Conflict(
            (key, "training.gradient_checkpointing"),
            f"{solver} fits features that are computed once, and checkpointing runs layers again",
            "remove training.gradient_checkpointing, or the solver",
        )
    if mixing := _mixing(recipe):
        yield Conflict(
            (key, mixing[0]),
            f"{solver} fits rows one by one, and mixing blends the targets of two",
            "remove the solver, or what mixes",
        )
    views = getattr(recipe.cache, "views", None)
    if recipe.strategy.solver_steps and recipe.augment not in ("auto", "none", []) and not views:
        yield Conflict(
            ("augment", key),
            f"{solver} fits the rows as they are measured, so nothing would be augmented",
            "remove augment, or keep random views of each row: cache: {views: 4}",
        )


def a_solver_takes_one_step(recipe: Recipe) -> Iterator[Conflict]:
    """The probe of lp_ft has a length only where it takes gradient steps."""
    probe, solver = getattr(recipe.strategy, "probe", None), getattr(recipe.strategy, "solver", None)
    if solver in SOLVERS and isinstance(probe, Duration) and probe != Duration(1, "steps"):
        yield Conflict(
            ("strategy.probe", "strategy.solver"),
            f"{solver} fits the head to convergence in one step",
            "remove strategy.probe, or set strategy.solver: null for gradient steps",
        )


def solved_heads_are_measured(recipe: Recipe) -> Iterator[Conflict]:
    """A head is fitted to features of the weights that are measured: not of weights whose average is measured."""
    phases = getattr(recipe.strategy, "phases", [])
    late = [i for i, phase in enumerate(phases) if phase.solver and not all(p.solver for p in phases[:i])]
    if late and recipe.training.ema is not None:
        yield Conflict(
            ("training.ema", f"strategy.phases.{late[0]}.solver"),
            "the head would be fitted to the weights as they are and measured on their average",
            "remove training.ema, or put the solver's phase first",
        )


def frozen_layers_are_pretrained(recipe: Recipe) -> Iterator[Conflict]:
    """Layers that do not learn need weights from somewhere."""
    if recipe.backbone.pretrained:
        return
    phases = getattr(recipe.strategy, "phases", [])
    if recipe.strategy.name in _NEEDS_PRETRAINED or (phases and phases[0].train == "head"):
        yield Conflict(
            ("backbone.pretrained", "strategy.phases.0.train" if phases else "strategy.name"),
            "layers that do not learn would keep their random weights",
            "set backbone.pretrained: true, or strategy: scratch",
        )


def quantised_weights_stay(recipe: Recipe) -> Iterator[Conflict]:
    """What is kept in 8 or 4 bits does not learn, and what is saved answers as what was measured."""
    kind, strategy, adapter = recipe.backbone.quantize, recipe.strategy, recipe.strategy.to_adapter()
    if kind is None:
        return
    phases: list[Any] = getattr(strategy, "phases", [])
    allowed: tuple[str, ...] = _BESIDE_WEIGHTS if phases else (*_NO_WEIGHTS_LEARN, *METHODS, "peft")
    asked = {f"strategy.phases.{i}.train": phase.train for i, phase in enumerate(phases)}
    able = [name for name, method in METHODS.items() if kind in method.on]
    for key, value in (asked or {"strategy.name": strategy.name}).items():
        words = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
        if other := next((word for word in words if word not in allowed), None):
            choice = allowed if phases else (*(_NO_WEIGHTS_LEARN if kind == "4bit" else ()), *able)
            yield Conflict(
                ("backbone.quantize", key),
                f"quantised weights cannot learn, and {other} trains them",
                f"choose from {', '.join(choice)}, or remove backbone.quantize",
            )
            return
    if adapter and kind not in adapter.table_row.on:
        yield Conflict(
            ("backbone.quantize", "strategy.name"),
            f"peft computes no {adapter.method} on layers in {kind}",
            f"methods that can: {', '.join(able)}",
        )
    elif kind == "8bit" and (adapter is None or adapter.merge):
        yield Conflict(
            ("backbone.quantize", "strategy.name"),
            "layers in 8bit round what they are given, so a plain model would not answer as the one measured",
            "set backbone.quantize: 4bit, or train adapters with merge: false",
        )


_NO_WEIGHTS_LEARN = ("frozen", "bitfit", "norms")
_BESIDE_WEIGHTS = ("head", "last:1", "adapters", "biases", "norms")
"""Selectors that mean no weights of the blocks."""


def remote_code_is_pinned(recipe: Recipe) -> Iterator[Conflict]:
    """Code from the Hub is run as it was when somebody looked at it."""
    backbone = recipe.backbone
    if not backbone.trust_remote_code or not _on_hub(backbone.id):
        return
    if backbone.revision is None:
        yield Conflict(
            ("backbone.trust_remote_code", "backbone.id"),
            "code from the Hub may change between two runs",
            "read it, then set backbone.revision to that commit",
        )
    elif not COMMIT.fullmatch(backbone.revision):
        yield Conflict(
            ("backbone.revision", "backbone.trust_remote_code"),
            "a branch or tag may mean other code tomorrow",
            "read the code, then set backbone.revision to that commit, all 40 digits of it",
        )


def pickles_are_files(recipe: Recipe) -> Iterator[Conflict]:
    """What is allowed to be read although it is a pickle is one file, by its exact name."""
    name = recipe.backbone.allow_pickle
    if name is None:
        return
    endings = f"{', '.join(PICKLE_SUFFIXES[:-1])} or {PICKLE_SUFFIXES[-1]}"
    if not name.endswith(PICKLE_SUFFIXES) or any(sign in name for sign in "/\\*?["):
        yield Conflict(
            ("backbone.allow_pickle",),
            f"it is the exact name of one file, which ends in {endings}",
            "name the file, such as pytorch_model.bin",
        )


def revisions_are_of_the_hub(recipe: Recipe) -> Iterator[Conflict]:
    """What is on this machine has no revisions or configurations of the Hub."""
    data = recipe.data.path
    for key, value, where, name in [
        ("backbone.revision", recipe.backbone.revision, "backbone.id", recipe.backbone.id),
        ("data.revision", recipe.data.revision, "data.path", data if isinstance(data, str) else data[0]),
        ("data.config", recipe.data.config, "data.path", data if isinstance(data, str) else data[0]),
    ]:
        if value is not None and not _on_hub(name):
            what = "configuration" if key == "data.config" else "revision"
            yield Conflict((key, where), f"only a Hub id has a {what}", f"remove {key}")


def splits_exist(recipe: Recipe) -> Iterator[Conflict]:
    """Splits of a shipped set are among those it has."""
    shipped = _shipped_data(recipe)
    if shipped is None:
        return
    for role in ("train", "validation", "test"):
        value = getattr(recipe.data, role)
        name = re.fullmatch(r"([\w-]+)(\[.*\])?", value) if isinstance(value, str) else None
        if name and name[1] not in (*shipped.splits, "auto"):
            match = nearest(name[1], shipped.splits)
            yield Conflict(
                (f"data.{role}", "data.path"),
                f"its splits are {_listed(shipped.splits)}",
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


def trackers_are_known(recipe: Recipe) -> Iterator[Conflict]:
    """Trackers are accelerate's own."""
    for i, name in enumerate(recipe.trackers):
        if name not in TRACKERS:
            match = nearest(name, TRACKERS)
            yield Conflict(
                (f"trackers.{i}",),
                "no tracker has this name" + (f"; did you mean '{match}'?" if match else ""),
                f"choose from {', '.join(TRACKERS)}",
            )


CHECKS: tuple[Callable[[Recipe], Iterator[Conflict]], ...] = (
    shipped_names,
    modalities_agree,
    augmentations_fit_the_modality,
    decoding_needs_images,
    only_images_go_to_the_accelerator,
    mixing_needs_pairs,
    mixing_needs_classes,
    smoothing_needs_classes,
    weights_need_classes,
    run_has_a_length,
    micro_batches_fill_the_batch,
    micro_batches_hold_a_text,
    metrics_fit_the_labels,
    better_is_known,
    evaluations_happen,
    patience_can_run_out,
    warmup_suits_the_schedule,
    phases_fill_the_run,
    both_stages_happen,
    solvers_have_features,
    a_solver_takes_one_step,
    solved_heads_are_measured,
    frozen_layers_are_pretrained,
    quantised_weights_stay,
    remote_code_is_pinned,
    pickles_are_files,
    revisions_are_of_the_hub,
    splits_exist,
    fraction_needs_no_validation_split,
    streams_are_read_once_through,
    trackers_are_known,
)


def conflicts(recipe: Recipe) -> list[Conflict]:
    """Return everything in a recipe that does not fit together."""
    return [conflict for check in CHECKS for conflict in check(recipe)]


def _shipped_data(recipe: Recipe) -> ShippedDataset | None:
    path = recipe.data.path
    return (
        DATASETS.get(path.removeprefix(_SHIPPED))
        if isinstance(path, str) and path.startswith(_SHIPPED)
        else None
    )


def _solved(recipe: Recipe) -> dict[str, str]:
    """Return the keys that ask for a solver by name, each with its name."""
    given = {"strategy.solver": getattr(recipe.strategy, "solver", None)}
    phases = getattr(recipe.strategy, "phases", [])
    given |= {f"strategy.phases.{i}.solver": phase.solver for i, phase in enumerate(phases)}
    return {key: solver for key, solver in given.items() if solver in SOLVERS}


def _mixing(recipe: Recipe) -> list[str]:
    """Return the keys of augmentations that blend samples."""
    if not isinstance(recipe.augment, list):
        return []
    return [f"augment.{i}.name" for i, each in enumerate(recipe.augment) if each.name in BATCH_AUGMENTATIONS]


def _waits(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], int, str]]:
    """Yield (keys, patience, what it is) for everything that waits for a plateau."""
    strategy: Any = recipe.strategy
    if recipe.monitor.early_stopping is not None:
        yield ("monitor.early_stopping.patience",), recipe.monitor.early_stopping.patience, "early stopping"
    if recipe.schedule.name == "reduce_on_plateau":
        yield ("schedule.patience", "schedule.name"), recipe.schedule.patience, "a plateau"  # type: ignore[attr-defined]
    if getattr(strategy, "every", None) == "plateau":
        yield ("strategy.every", "strategy.patience"), strategy.patience, "a plateau"
    for i, phase in enumerate(getattr(strategy, "phases", [])):
        if phase.patience is not None:
            yield (f"strategy.phases.{i}.until",), phase.patience.patience, "a plateau"


def _share_of_run(duration: Duration, recipe: Recipe) -> float | None:
    """Return a duration as a share of the run; None where that takes the size of the data."""
    if duration.unit == "%":
        return duration.amount / 100
    length = {"epochs": recipe.training.epochs, "steps": recipe.training.steps}[duration.unit]
    return duration.amount / length if length else None


def _length_key(recipe: Recipe) -> str:
    return "training.steps" if recipe.training.steps is not None else "training.epochs"


def _length(recipe: Recipe) -> str:
    steps, epochs = recipe.training.steps, recipe.training.epochs
    return str(Duration(steps, "steps") if steps is not None else Duration(epochs or 0, "epochs"))


def _on_hub(name: str) -> bool:
    return not (name.startswith((_SHIPPED, "/", "./", "../", "~")) or Path(name).exists())


def _validation_split(recipe: Recipe) -> str | None:
    """Return the name of the data's own validation split where that is known without opening it."""
    shipped, path = _shipped_data(recipe), recipe.data.path
    names: list[str] = list(shipped.splits) if shipped else []
    if not shipped and isinstance(path, str) and Path(path).is_dir():
        names = [child.stem for child in sorted(Path(path).iterdir()) if not child.name.startswith(".")]
    return next((name for name in names if name.lower() in _VALIDATION_NAMES), None)


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
