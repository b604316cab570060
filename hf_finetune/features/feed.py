"""What each phase reads: samples, or what its frozen prefix made of them, computed once and kept on disk.

Features stand in for a split when they are read at least twice, when each view of a sample comes again, and when they
fit the budget; each split is decided by itself. The decision depends on the recipe and not on what the disk holds, so
that a resumed run reads what the interrupted one did.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_finetune.data.loaders import EvalSet, TrainSet, collate, loader_over
from hf_finetune.data.streams import Stream
from hf_finetune.errors import TrainingError
from hf_finetune.evaluation import to_device
from hf_finetune.features.compute import Want, compute, find, hold
from hf_finetune.features.cut import Cut, Inputs
from hf_finetune.features.decoded import Decoding, decode, survey
from hf_finetune.features.keys import architecture_digest, rows_digest, view_of
from hf_finetune.features.plan import Plan, column_of, within_budget
from hf_finetune.features.spec import CacheSpec
from hf_finetune.features.store import StoreError, key_of
from hf_finetune.features.trials import NoCutError, find_cut
from hf_finetune.freeze import sleeping_modules
from hf_finetune.models.load import forward, module_groups
from hf_finetune.parallel import gathered, tensors_of
from hf_finetune.runfolder import versions
from hf_finetune.setup import Setup, build_loaders, build_sets, cores_per_process
from hf_finetune.spec import Size
from hf_finetune.timeline import phase_end
from hf_finetune.together import together

SHAPING_PACKAGES = ("torch", "torchvision", "timm", "transformers", "peft", "pillow", "hf-finetune")
"""Packages whose other version may compute other features."""
SOLVER_BATCH = 512
"""Rows that a solver reads together."""


@dataclass(frozen=True)
class Source:
    """What a phase learns from and is measured on, and how its model runs on that."""

    train: DataLoader
    validation: DataLoader
    forward: Callable[[nn.Module, Inputs], Tensor]
    note: str = ""
    """What is computed once, in words, and why no more."""
    views: int = 1
    """For a solver, which reads all rows in their order, view after view: how many views of each."""


class Feed:
    """Gives every phase its source."""

    def __init__(self, setup: Setup, accelerator: Accelerator, model: nn.Module) -> None:
        self.setup, self.accelerator, self.model = setup, accelerator, model
        self.homes = module_groups(model, setup.backbone.anatomy)
        self.train, self.validation = build_sets(setup)
        self.measured_train = self.train.unchanged()
        """Training rows as they would be measured: what a solver fits."""
        self.plain = Source(*build_loaders(setup, accelerator, (self.train, self.validation)), forward)
        self._cuts: dict[int, Cut | NoCutError] = {}
        self._digests: dict[tuple[int, int], tuple[str, np.ndarray]] = {}
        self._decoded: dict[str, str] = {}
        """Split -> what became of its images under `data.cache: decoded`."""

    def enter(
        self,
        phase: int,
        still: dict[str, str],
        measured: nn.Module,
        *,
        say: Callable[[str], None] = lambda text: None,
        on_batch: Callable[[str], None] = lambda what: None,
    ) -> Source:
        """Return what a phase reads; its frozen prefix runs here over every sample, unless its features are on disk.

        Args:
            phase: its number; the model is set up for it.
            still: fingerprints of what is frozen in it.
            measured: the model that is evaluated: the one that trains, or its average.
            say: told what is computed once, and what is wrong with features on disk.
            on_batch: called after each batch, with what is being done; may raise to interrupt.

        Raises:
            TrainingError: a solver's phase has no features to fit.
        """
        with gathered(*dict.fromkeys((self.model, measured))):
            return self._enter(phase, still, measured, say=say, on_batch=on_batch)

    def _enter(
        self,
        phase: int,
        still: dict[str, str],
        measured: nn.Module,
        *,
        say: Callable[[str], None],
        on_batch: Callable[[str], None],
    ) -> Source:
        plan, found = self.plan(phase, still, measured), {}
        solver, workers = self.setup.plans[phase].solver, int(self.setup.recipe.data.workers)
        if solver and "train" not in plan.wants:
            raise TrainingError(
                f"`solver: {solver}` fits features of the frozen layers, and there are none: {plan}. "
                "Leave `solver` out (strategy.solver=null): gradient steps train the head."
            )
        for split, want in list(plan.wants.items()):
            try:
                found[split] = find(want, self.model, self.accelerator, say) or compute(
                    [want, *self._ahead(phase, split, want, still)],
                    self.model,
                    self.accelerator,
                    workers=workers,
                    on_batch=lambda: on_batch("computing features"),
                )
            except StoreError as error:
                plan.why_not[split] = str(error)
                if solver:  # a head that is fitted ends the same wherever its features lie
                    plan.why_not[split] += ", so they stay in memory"
                    found[split] = hold(
                        want,
                        self.model,
                        self.accelerator,
                        workers=workers,
                        on_batch=lambda: on_batch("computing features"),
                    )
                else:
                    del plan.wants[split]
        note = str(plan)
        if "" not in plan.why_not or self._depth(phase) > 1:
            say(f"frozen layers: {note}")
        if self.setup.recipe.data.cache == "decoded":
            for split in (each for each in ("train", "validation") if each not in found):
                if split not in self._decoded:
                    self._decoded[split] = self._decode(split, say, lambda: on_batch("decoding images"))
                    say(f"images: {self._decoded[split]}")
                note += f"; {self._decoded[split]}"
        if not found:
            return replace(self.plain, note=note)
        train, validation = copy.copy(self.train), copy.copy(self.validation)
        if solver:
            train = copy.copy(self._read_by_solver())
        train.features, validation.features = found.get("train"), found.get("validation")
        train.views = plan.wants["train"].views if "train" in found else None
        loaders = build_loaders(self.setup, self.accelerator, (train, validation))
        source = replace(self.plain, forward=plan.forward, note=note)
        if solver:
            want = plan.wants["train"]
            keys = [want.sample_key(row) for row in range(want.rows)]
            batches = [keys[start : start + SOLVER_BATCH] for start in range(0, len(keys), SOLVER_BATCH)]
            source = replace(source, train=loader_over(train, batches, workers=0), views=want.views)
        elif "train" in found:
            source = replace(source, train=loaders[0])
        if "validation" in found:
            source = replace(source, validation=loaders[1])
        return source

    def plan(self, phase: int, still: dict[str, str], measured: nn.Module) -> Plan:
        """Return what is to be computed once for a phase; arguments as for `enter`."""
        setup, spec = self.setup, self.setup.recipe.cache
        if spec == "off":
            return Plan(why_not={"": "the recipe says `cache: off`"})
        if setup.recipe.training.gradient_checkpointing:
            return Plan(why_not={"": "gradient checkpointing runs layers again in the backward pass"})
        if self._depth(phase) < 2:
            return Plan(why_not={"": "no block is frozen below the first layer that learns"})
        cut = self._cut(phase)
        if isinstance(cut, NoCutError):
            return Plan(why_not={"": str(cut)})
        if self._groups(cut) <= {setup.backbone.anatomy.groups[0]}:
            return Plan(why_not={"": "BatchNorm statistics move from the first block on"})
        spec = _spec(setup)
        plan, (epochs, evaluations) = Plan(), self._reads(phase)
        views = (spec.views or 0) if setup.augmentations else 1
        if setup.plans[phase].solver:
            evaluations += 2  # it measures as it goes
            plan.wants["train"] = self._want("train", cut, views or 1, still, spec, self._read_by_solver())
        elif isinstance(setup.splits.train, Stream):
            plan.why_not["train"] = "a stream may be larger than the disk"
        elif setup.mixes:
            plan.why_not["train"] = "mixup and cutmix make other images in every epoch"
        elif not views:
            plan.why_not["train"] = (
                "augmentation shows other views in every epoch; `cache: {views: 4}` keeps four"
            )
        elif epochs < 2 * views:
            plan.why_not["train"] = f"{epochs:.3g} epochs read each of {views} views less than twice"
        else:
            plan.wants["train"] = self._want("train", cut, views, still, spec, self.train)
        if evaluations < 2:
            plan.why_not["validation"] = "measured once"
        elif not self._same(measured, cut):
            plan.why_not["validation"] = "the average of the weights still moves in the frozen layers"
        else:
            plan.wants["validation"] = self._want("validation", cut, 1, still, spec, self.validation)
        return within_budget(plan, spec)

    def decoding(self, split: str) -> Decoding:
        """Return what `data.cache: decoded` keeps of a split; every process calls this."""
        data = self.train if split == "train" else self.validation
        return Decoding(data, split, *together(lambda: survey(data), main_only=True))

    def _decode(self, split: str, say: Callable[[str], None], on_batch: Callable[[], None]) -> str:
        """Let a split read its images from where they are kept, decoded; return what is kept, or why none is."""
        wanted, spec = self.decoding(split), self.setup.recipe.data
        if wanted.size > spec.cache_budget.bytes:
            return f"{split} not kept decoded: {Size(wanted.size)} exceed `data.cache_budget` ({spec.cache_budget})"
        data = wanted.data
        wanted = replace(wanted, digest=together(lambda: rows_digest(data, 1)[0], main_only=True))
        threads = cores_per_process(self.accelerator.num_processes)
        try:
            data.decoded = decode(wanted, self.accelerator, threads=threads, say=say, on_batch=on_batch)
        except StoreError as error:
            return f"{split} not kept decoded: {error}"
        return str(wanted)

    def starts_pass(self, phase: int) -> bool:
        """Return whether a phase is the first of those whose features one pass computes."""
        return self._chain(phase).start == phase

    def _read_by_solver(self) -> TrainSet:
        """Return the training rows that a solver fits: as they are measured, or in the views that are kept of them."""
        shown = not self.setup.augmentations or _spec(self.setup).views
        return self.train if shown else self.measured_train

    def _want(
        self, split: str, cut: Cut, views: int, still: dict[str, str], spec: CacheSpec, data: EvalSet
    ) -> Want:
        if (id(data), views) not in self._digests:
            self._digests[id(data), views] = rows_digest(data, views)
        digest, ends = self._digests[id(data), views]
        columns = {name: column_of(leaf, spec) for name, leaf in cut.stored.items()}
        known, recipe = versions(), self.setup.recipe
        parts = {
            "rows": digest,
            "view": view_of(data, views, recipe.training.seed),
            "cut": [cut.last, [f"{name} {leaf.dims} {leaf.first}" for name, leaf in cut.stored.items()]],
            "prefix": key_of(self._prefix(cut, still)),
            "architecture": architecture_digest(self.model, cut.modules, self.setup.backbone.source),
            "precision": recipe.training.precision,
            "device": self.accelerator.device.type,
            "dtype": [str(column.dtype) for column in columns.values()],
            "versions": {name: known.get(name) for name in SHAPING_PACKAGES},
        }
        return Want(data, views, cut, columns, ends, parts)

    def _ahead(self, phase: int, split: str, own: Want, still: dict[str, str]) -> list[Want]:
        """Return what later phases want of the same rows: one pass computes it along, as far as the budget goes."""
        found: list[Want] = []
        for later in range(phase + 1, self._chain(phase).stop):
            want = self.plan(later, still, self.model).wants.get(split)
            if (
                want is None
                or want.data is not own.data
                or sum(each.size for each in [*found, want]) > _spec(self.setup).budget.bytes
            ):
                break
            found.append(want)
        return found

    def _cut(self, phase: int) -> Cut | NoCutError:
        if phase not in self._cuts:
            plan = self.setup.plans[phase]
            asleep = sleeping_modules(self.model, plan, self.setup.backbone.anatomy, self.homes)
            try:
                with self.accelerator.autocast():
                    self._cuts[phase] = find_cut(
                        self.model, plan.multiples.keys(), set(asleep), self._trials()
                    )
            except NoCutError as error:
                self._cuts[phase] = error
        return self._cuts[phase]

    def _trials(self) -> list[Inputs]:
        """Return two small batches of unlike size and length."""
        data = self.validation
        order = np.arange(len(data)) if data.lengths is None else np.argsort(data.lengths, kind="stable")
        picks = [[int(order[at % len(order)]) for at in places] for places in ((0, 1), (-1, -2, 2))]
        tokenizer = None if data.tokens is None else data.tokens.tokenizer
        batches = [collate([data[row] for row in rows], tokenizer=tokenizer)["inputs"] for rows in picks]
        if data.tokens is not None and batches[0]["input_ids"].shape[1] == batches[1]["input_ids"].shape[1]:
            batches[0] = {name: tensor[:, :-1] for name, tensor in batches[0].items()}
        return [to_device(batch, self.accelerator.device) for batch in batches]

    def _depth(self, phase: int) -> int:
        """Return how many layer groups from the bottom up hold nothing that learns."""
        anatomy, plan = self.setup.backbone.anatomy, self.setup.plans[phase]
        learning = {parameter.group for parameter in anatomy.parameters if parameter.name in plan.multiples}
        return next((at for at, group in enumerate(anatomy.groups) if group in learning), len(anatomy.groups))

    def _chain(self, phase: int) -> range:
        """Return the phases around one of which each has its frozen prefix within that of the one before."""
        first = last = phase
        while first > 0 and self._depth(first - 1) >= self._depth(first):
            first -= 1
        while last + 1 < len(self.setup.plans) and 1 < self._depth(last + 1) <= self._depth(last):
            last += 1
        return range(first, last + 1)

    def _reads(self, phase: int) -> tuple[float, float]:
        """Return how many epochs and evaluations read what one pass can compute: those of the whole chain."""
        setup, timeline, start, steps = self.setup, self.setup.timeline, 0, 0
        for index in range(len(setup.plans)):
            end = phase_end(setup.plans, index, start, timeline)
            steps += end - start if index in self._chain(phase) else 0
            start = end
        return steps / timeline.steps_per_epoch, steps / timeline.evaluate_every

    def _prefix(self, cut: Cut, still: dict[str, str]) -> dict[str, str]:
        """Return the fingerprints of what is frozen in the layer groups of a cut's modules, and in the lowest."""
        anatomy = self.setup.backbone.anatomy
        inside = tuple(f"{name}." for name in cut.modules)
        groups = {group for name, group in self.homes.items() if f"{name}.".startswith(inside)} | {
            anatomy.groups[0]
        }
        owners = {parameter.name: parameter.group for parameter in anatomy.parameters}
        return {
            name: mark
            for name, mark in still.items()
            if owners.get(name, self.homes.get(name.rpartition(".")[0])) in groups
        }

    def _groups(self, cut: Cut) -> set[str]:
        inside = tuple(f"{name}." for name in cut.modules)
        return {group for name, group in self.homes.items() if f"{name}.".startswith(inside)}

    def _same(self, measured: nn.Module, cut: Cut) -> bool:
        """Return whether the model that is measured has the same prefix."""
        return measured is self.model or all(
            torch.equal(ours, theirs)
            for name in cut.modules
            for ours, theirs in zip(
                tensors_of(self.model.get_submodule(name)).values(),
                tensors_of(measured.get_submodule(name)).values(),
                strict=True,
            )
        )


def _spec(setup: Setup) -> CacheSpec:
    return setup.recipe.cache if isinstance(setup.recipe.cache, CacheSpec) else CacheSpec()
