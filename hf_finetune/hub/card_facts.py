"""What a card tells: collected once from the plan of a run and from its folder, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_finetune.data.labels import Labels
from hf_finetune.data.report import DataReport
from hf_finetune.data.tokens import MAX_LENGTH
from hf_finetune.hub.base_model import BaseModel, card_metadata, find_base
from hf_finetune.hub.published import is_local, published_name, published_recipe, published_split
from hf_finetune.models.backbone import Library, TextInput
from hf_finetune.recipe import Recipe
from hf_finetune.report.results import Answers
from hf_finetune.report.tables import Table, layer_table, phase_table
from hf_finetune.runfolder import Row, Run

if TYPE_CHECKING:
    from hf_finetune.setup import Setup


@dataclass(frozen=True)
class Measured:
    """The rows the figures were measured on."""

    name: str
    """Of the data set, for people."""
    split: str
    """The data set's own split, or a slice of it; with `held_out` the split it was drawn from."""
    rows: int
    held_out: float | None = None
    """Share of `split` that was drawn for it."""
    seed: int = 0
    drawn_from: int | None = None
    """Rows there were, when only some of them were used."""
    hub_id: str | None = None
    """None for data of this machine or of this package."""
    config: str | None = None
    revision: str | None = None
    languages: tuple[str, ...] = ()

    @property
    def is_whole_split(self) -> bool:
        """Whether all rows of a split of the data set were measured, and no others."""
        return self.held_out is None and self.drawn_from is None and "[" not in self.split

    @property
    def arguments(self) -> dict[str, Any]:
        """What else it takes to find the same rows."""
        given = {"held_out": self.held_out, "max_samples": self.rows if self.drawn_from else None}
        found = {key: value for key, value in given.items() if value is not None}
        return found | {"seed": self.seed} if found else {}


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says; the sections only put it into words."""

    recipe: Recipe
    """As published."""
    base: BaseModel
    measured: Measured
    report: DataReport
    labels: Labels
    library: Library
    trainable_size: int
    total_size: int
    layers: Table
    phases: Table | None
    """None where the run had one phase."""
    best: Mapping[str, Any] | None
    """The evaluation of these very weights; None when they were never measured."""
    rows: list[Row] = field(default_factory=list)
    run: Mapping[str, Any] = field(default_factory=dict)
    """run.json."""
    adapter: Mapping[str, Any] | None = None
    """What run.json says of the adapters."""
    quantized: Mapping[str, Any] | None = None
    """What run.json says of a base model in 8 or 4 bits."""
    merged: bool = False
    """The adapters were merged into the weights."""
    answers: Answers | None = None
    """Of the weights on the validation rows."""
    max_length: int | None = None
    """Tokens of a text."""
    pictures: frozenset[str] = frozenset()
    """Files beside the card."""

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are an adapter, to be put on the base model."""
        return self.adapter is not None and not self.merged

    @property
    def solved(self) -> list[Mapping[str, Any]]:
        """What run.json says of output layers that a solver fitted, by phase."""
        return list(self.run.get("solved", {}).values())

    @property
    def evaluations(self) -> int:
        """Number of evaluations so far."""
        return sum(row.get("split") == "validation" for row in self.rows)


def collect(
    setup: Setup, run: Run, *, final: bool = False, pictures: frozenset[str] = frozenset()
) -> CardFacts:
    """Return the facts of the weights that `run.best` measured.

    Args:
        setup: the plan.
        run: as its folder stands.
        final: predictions.json is of these weights.
        pictures: names of the files beside the card.
    """
    recipe, splits, backbone = setup.recipe, setup.splits, setup.backbone
    base_lr = float(recipe.optimizer.lr)
    adapter = backbone.adapter
    limit = MAX_LENGTH if recipe.data.max_length == "auto" else recipe.data.max_length
    return CardFacts(
        recipe=published_recipe(recipe, commit=backbone.source["commit"], data_commit=splits.report.commit),
        base=find_base(recipe.backbone, backbone.source),
        measured=measured(recipe, splits.report),
        report=splits.report,
        labels=splits.labels,
        library=backbone.library,
        trainable_size=setup.trainable_size,
        total_size=setup.total_size,
        layers=layer_table(setup.plans, backbone.anatomy, base_lr),
        phases=phase_table(setup.plans, backbone.anatomy, base_lr) if len(setup.plans) > 1 else None,
        best=run.best,
        rows=run.rows,
        run=run.status,
        adapter=adapter.facts() if adapter else None,
        quantized=backbone.source.get("quantize"),
        merged=adapter is not None and adapter.spec.merge,
        answers=run.predictions() if final and run.best else None,
        max_length=min(backbone.input.max_length, limit) if isinstance(backbone.input, TextInput) else None,
        pictures=pictures,
    )


def measured(recipe: Recipe, report: DataReport) -> Measured:
    """Return where the validation rows of a run come from."""
    data, split = recipe.data, report.splits.get("validation", "validation")
    paths = [data.path] if isinstance(data.path, str) else data.path
    from_hub = isinstance(data.path, str) and not data.path.startswith("shipped/") and not is_local(data.path)
    hub_id = str(data.path) if from_hub else None
    names = ", ".join(published_name(path).removeprefix("./") for path in paths)
    card = card_metadata(None, hub_id, report.commit or data.revision, repo_type="dataset") if hub_id else {}
    stated = card.get("language")
    languages = stated if isinstance(stated, list) else [stated] if stated else []
    return Measured(
        name=names,
        split=published_split(split),
        rows=report.rows["validation"],
        held_out=report.held_out,
        seed=recipe.training.seed,
        drawn_from=report.whole.get("validation"),
        hub_id=hub_id,
        config=data.config,
        revision=report.commit or data.revision,
        languages=tuple(str(each) for each in languages),
    )
