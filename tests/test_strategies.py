"""Strategies through whole runs: what learns, at what rate, when; and that what is frozen does not move by one bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import runs
from hf_finetune.data.loaders import EvalSet, collate
from hf_finetune.errors import RecipeError, TrainingError
from hf_finetune.inference import load_trained
from hf_finetune.models.anatomy import HEAD, Anatomy, Parameter
from hf_finetune.models.load import forward, load_backbone
from hf_finetune.models.spec import BackboneSpec
from hf_finetune.optim import group_parameters
from hf_finetune.recipe import load_recipe
from hf_finetune.setup import prepare
from hf_finetune.strategies import STRATEGIES
from hf_finetune.strategies.methods import METHODS
from hf_finetune.strategies.phase import plan_phases

FAMILIES = ("resnet", "vit", "bert")
Belongs = Callable[[Parameter, Anatomy], bool]


def first_third(parameter: Parameter, anatomy: Anatomy) -> bool:
    return parameter.group in {*anatomy.groups[: max(1, (len(anatomy.groups) - 1) // 3)], HEAD}


STEP = "1 steps"
FLAT = {"name": "constant", "warmup": None}
# strategy section -> which parameters learn in 9 steps
LEARNS: dict[str, tuple[Any, Belongs]] = {
    "scratch": ("scratch", lambda p, a: True),
    "full": ("full", lambda p, a: True),
    "frozen": ("frozen", lambda p, a: p.group == HEAD),
    "discriminative": ("discriminative", lambda p, a: True),
    "layer_decay": ({"name": "discriminative", "layer_decay": 0.8}, lambda p, a: True),
    "gradual": ({"name": "gradual", "every": STEP}, lambda p, a: True),
    "lp_ft": ({"name": "lp_ft", "solver": None, "full_lr": "0.5x"}, lambda p, a: True),
    "surgical": ("surgical", first_third),
    "bitfit": ("bitfit", lambda p, a: p.is_bias or p.group == HEAD),
    "norms": ("norms", lambda p, a: p.in_norm or p.group == HEAD),
    "phases": (
        {"phases": [{"train": "head", "for": "2 steps"}, {"train": ["last:2", "stem"], "lr": "0.5x"}]},
        lambda p, a: p.group in {*a.groups[-2:], "stem"},
    ),
    "regex": ({"phases": [{"train": [{"match": r"\.1\..*weight"}, "head"]}]}, lambda p, a: (".1." in p.name and "weight" in p.name.partition(".1.")[2]) or p.group == HEAD),
    "first": ({"phases": [{"train": ["first:1", "head"]}]}, lambda p, a: p.group in {a.groups[0], HEAD}),
    "block": ({"phases": [{"train": ["block.1", "head"]}]}, lambda p, a: p.group in {"block.1", HEAD}),
}  # fmt: skip


def test_every_strategy_is_run_here() -> None:
    adapters = {*METHODS, "peft"}  # tests/test_adapters.py runs these
    assert set(STRATEGIES) - adapters <= set(LEARNS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", LEARNS)
def test_exactly_what_should_learn_moves(case: str, family: str, tmp_path: Path) -> None:
    section, learns = LEARNS[case]
    run = runs.run(family, tmp_path / "run", strategy=section, training={"steps": 9})
    assert (run.status["status"], run.status["why"]) == ("done", "all steps done")
    start = runs.start(run)
    anatomy = start.anatomy
    expected = {p.name for p in anatomy.parameters if learns(p, anatomy)}
    buffers = {name for name, _ in start.model.named_buffers()}
    if case == "scratch":
        expected |= {name for name in start.model.state_dict() if name in buffers}
    # softmax does not see what a key's bias adds, so its gradient is rounding, or nothing
    assert {n for n in runs.moved(run) ^ expected if not n.endswith("key.bias")} == set()
    assert run.status["parameters"]["trainable"] == sum(
        p.size for p in anatomy.parameters if learns(p, anatomy)
    )
    if case != "scratch":
        is_small = run.status["auto"]["backbone.head_init"].startswith("small")
        assert run.rows[0]["loss"] == pytest.approx(
            math.log(len(run.status["labels"])), abs=0.05 if is_small else 1e-6
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["full", "gradual", "lp_ft", "phases", "layer_decay"])
def test_the_rate_logged_is_base_times_multiple_times_schedule(
    case: str, family: str, tmp_path: Path
) -> None:
    recipe = runs.recipe(family, tmp_path / "run", strategy=LEARNS[case][0], training={"steps": 9})
    run = runs.finetune(recipe, quiet=True)
    resolved = load_recipe(run.path / "recipe.yaml")
    anatomy = runs.start(run).anatomy
    plans, _ = plan_phases(resolved.strategy.to_phases(anatomy), anatomy, 1e-2)
    groups = group_parameters(plans, anatomy)
    rows = runs.train_rows(run)
    spans = {
        index: [row["step"] for row in rows if row["phase_index"] == index] for index in range(len(plans))
    }
    assert len(rows) == 9
    for row in rows:
        steps = spans[row["phase_index"]] if resolved.schedule.scope == "phase" else range(1, 10)
        share = (row["step"] - steps[0]) / len(steps)
        expected = {
            group.name: 1e-2 * group.multiples[row["phase_index"]] * 0.5 * (1 + math.cos(math.pi * share))
            for group in groups
            if group.multiples[row["phase_index"]]
        }
        assert row["lr"] == pytest.approx(expected), row["step"]


@pytest.mark.parametrize(
    ("name", "strategy", "asked", "start"),
    [
        ("bert", "full", "auto", "small"),
        ("bert", "lora", "auto", "small"),
        ("bert", {"name": "discriminative", "layer_decay": "auto"}, "auto", "zero"),
        ("bert", "frozen", "auto", "zero"),
        ("vit", "full", "auto", "zero"),
        ("resnet", "full", "auto", "zero"),
        ("resnet", "full", "small", "small"),
        ("bert", "full", "zero", "zero"),
    ],
)
def test_a_head_at_a_small_rate_starts_small(name: str, strategy: Any, asked: str, start: str) -> None:
    backbone = {"id": runs.backbone(name), "head_init": asked}
    setup = prepare(
        runs.recipe(name, strategy=strategy, backbone=backbone), world_size=1, device=torch.device("cpu")
    )
    assert setup.recipe.backbone.head_init == start
    assert any(choice.key == "backbone.head_init" for choice in setup.choices) == (asked == "auto")
    weights = setup.backbone.model.state_dict()
    for each in (each for each in setup.backbone.anatomy.parameters if each.is_output):
        std = float(weights[each.name].std(correction=0))
        if start == "small" and not each.is_bias:
            assert std == pytest.approx(0.02, rel=0.3)
        else:
            assert not weights[each.name].any()


@pytest.mark.parametrize("family", ["resnet", "vit", "bert-dry"])
@pytest.mark.parametrize(
    ("strategy", "multiple"),
    [
        ("full", lambda depth: 1.0),
        ({"name": "discriminative", "backbone_lr": "0.1x"}, lambda depth: 0.1 if depth else 1.0),
        ({"name": "discriminative", "backbone_lr": 2e-3}, lambda depth: 0.02 if depth else 1.0),
        ({"name": "discriminative", "layer_decay": 0.5}, lambda depth: 0.5**depth),
    ],
    ids=["full", "two rates", "absolute", "layer_decay"],
)
def test_each_layer_gets_the_rate_it_reads(
    strategy: Any, multiple: Callable[[int], float], family: str, tmp_path: Path
) -> None:
    """One step of plain SGD moves every parameter by its rate times its gradient, computed here without the loop."""
    recipe = runs.recipe(
        family, tmp_path / "run", strategy=strategy, training={"steps": 1, "batch_size": 16, "clip_norm": None},
        optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}, schedule={"name": "constant", "warmup": None},
        backbone={"id": runs.backbone(family), "head_init": "library"},
    )  # fmt: skip
    setup = prepare(recipe, world_size=1, device=torch.device("cpu"))
    rows = EvalSet(setup.splits.train, setup.splits.labels, setup.backbone.input)
    tokenizer = getattr(setup.backbone.input, "tokenizer", None)
    batch = collate([rows[i] for i in range(len(rows))], tokenizer=tokenizer)
    model = setup.backbone.model  # in eval mode: BatchNorm is frozen here and there is no dropout
    nn.functional.cross_entropy(forward(model, batch["inputs"]), batch["labels"]).backward()
    run = runs.finetune(recipe, quiet=True)
    (row,), after = runs.train_rows(run), runs.weights(run)
    places = {p.name: p for p in setup.backbone.anatomy.parameters}
    for name, parameter in model.named_parameters():
        place, rate = places[name], 0.1 * multiple(setup.backbone.anatomy.depth_from_top(places[name].group))
        label = place.group if place.decays else f"{place.group}/no_decay"
        assert row["lr"][label] == pytest.approx(rate)
        assert parameter.grad is not None
        torch.testing.assert_close(
            after[name] - parameter.detach(), -rate * parameter.grad, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", LEARNS)
def test_each_trained_parameter_is_in_one_group_and_norms_do_not_decay(case: str, family: str) -> None:
    setup = prepare(runs.recipe(family, strategy=LEARNS[case][0]), world_size=1, device=torch.device("cpu"))
    modules, parameters = (
        dict(setup.backbone.model.named_modules()),
        dict(setup.backbone.model.named_parameters()),
    )
    names = [name for group in setup.groups for name in group.parameters]
    assert len(names) == len(set(names))
    assert set(names) == {name for plan in setup.plans for name in plan.multiples}
    for group in setup.groups:
        for name in group.parameters:
            owner = modules[name.rpartition(".")[0]]
            exempt = name.endswith("bias") or isinstance(owner, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))
            assert not (exempt and group.decays), name
            if isinstance(owner, (nn.Linear, nn.Conv2d)) and parameters[name].ndim > 1:
                assert group.decays, name


def test_weight_decay_shrinks_weights_and_nothing_else(tmp_path: Path) -> None:
    """With a gradient of zero (a head that stays at zero would need one) decay is all that moves the backbone."""
    given = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.5}
    run = runs.run("resnet", tmp_path / "run", strategy="full", optimizer=given, training={"steps": 1},
                   schedule={"name": "constant", "warmup": None})  # fmt: skip
    start, after = runs.start(run), runs.weights(run)
    for p in start.anatomy.parameters:
        before = start.model.state_dict()[p.name]
        if p.group != HEAD:
            torch.testing.assert_close(
                after[p.name], before * 0.95 if p.decays else before, rtol=1e-6, atol=1e-7
            )


# ---- frozen means frozen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_and_a_backbone_rate_of_0_give_the_same_bits(family: str, tmp_path: Path) -> None:
    frozen = runs.run(family, tmp_path / "a", strategy="frozen")
    zero = runs.run(family, tmp_path / "b", strategy={"name": "discriminative", "backbone_lr": "0x"})
    assert runs.same(runs.weights(frozen), runs.weights(zero))
    assert [row["loss"] for row in frozen.rows] == [row["loss"] for row in zero.rows]
    assert any("frozen" in note and "rate of 0" in note for note in zero.status["notes"])
    assert frozen.status["notes"] == []


# batch_norm, strategy -> do scale and shift learn, do statistics follow, in the backbone
BATCH_NORM = [
    ("full", "frozen", True, False),
    ("full", "adapt", False, True),
    ("full", "train", True, True),
    ("frozen", "frozen", False, False),
    ("frozen", "adapt", False, True),
    ("frozen", "train", False, False),
]


@pytest.mark.parametrize(("strategy", "batch_norm", "learns", "follows"), BATCH_NORM)
def test_batch_norm(strategy: str, batch_norm: str, learns: bool, follows: bool, tmp_path: Path) -> None:
    run = runs.run("resnet", tmp_path / "run", strategy={"name": strategy, "batch_norm": batch_norm})
    start, moved = runs.start(run), runs.moved(run)
    norms = {n for n, m in start.model.named_modules() if isinstance(m, _BatchNorm)}
    scales = {f"{name}.{part}" for name in norms for part in ("weight", "bias")}
    statistics = {
        f"{name}.{part}" for name in norms for part in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert moved & scales == (scales if learns else set())
    assert moved & statistics == (statistics if follows else set())
    assert ("conv1.0.weight" in moved) == (strategy == "full")


def test_batch_norm_of_a_sleeping_block_keeps_its_statistics(tmp_path: Path) -> None:
    strategy = {"phases": [{"train": "last:2", "batch_norm": "train"}]}
    moved = runs.moved(runs.run("resnet", tmp_path / "run", strategy=strategy))
    assert {name.partition(".")[0] for name in moved} == {"layer4", "fc"}
    assert "layer4.0.bn1.running_mean" in moved


@pytest.mark.parametrize("family", FAMILIES)
def test_no_train_call_wakes_what_is_frozen(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_finetune.train as loop

    real = loop.evaluate

    def rude(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = real(model, *args, **kwargs)
        model.train()
        return result

    monkeypatch.setattr(loop, "evaluate", rude)
    every = {"monitor": {"evaluate": "1 steps", "metric": "loss"}}
    run = runs.run(family, tmp_path / "run", strategy="frozen", training={"steps": 6}, **every)
    head = {p.name for p in runs.start(run).anatomy.parameters if p.group == HEAD}
    assert runs.moved(run) == head
    monkeypatch.undo()
    polite = runs.run(family, tmp_path / "polite", strategy="frozen", training={"steps": 6}, **every)
    assert runs.same(runs.weights(run), runs.weights(polite))


@pytest.mark.parametrize(
    ("strategy", "stem_drops", "head_drops"),
    [
        ("frozen", False, True),
        ("full", True, True),
        ({"phases": [{"train": "first:1"}, {"train": "head"}]}, True, False),
    ],
    ids=["frozen", "full", "first phase trains the stem"],
)
def test_dropout_is_on_where_layers_learn_and_off_elsewhere(
    strategy: Any, stem_drops: bool, head_drops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_finetune.features.feed as feed

    seen: list[tuple[bool, bool]] = []

    def spy(model: Any, inputs: Any) -> torch.Tensor:
        logits = forward(model, inputs)
        seen.append((model.bert.embeddings.dropout.training, model.dropout.training))
        return logits

    monkeypatch.setattr(feed, "forward", spy)
    runs.run("bert", tmp_path / "run", strategy=strategy, training={"steps": 2}, cache="off")
    assert seen[0] == (stem_drops, head_drops)


@pytest.mark.parametrize(
    "tensor", ["layer1.0.bn1.running_mean", "layer1.0.bn1.num_batches_tracked", "layer1.0.conv1.weight"]
)
def test_a_frozen_tensor_that_moves_stops_the_run(
    tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_finetune.features.feed as feed

    def corrupting(model: nn.Module, inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            model.state_dict()[tensor].add_(1)
        return forward(model, inputs)

    monkeypatch.setattr(feed, "forward", corrupting)
    with pytest.raises(TrainingError, match=f"phase 'head': 1 frozen tensors moved, first of all {tensor}"):
        runs.run("resnet", tmp_path / "run", strategy="frozen", cache="off")
    assert load_status(tmp_path / "run")["status"] == "failed"


def load_status(path: Path) -> dict[str, Any]:
    from hf_finetune.runfolder import read_status

    return read_status(path)


# ---- phases in time ----------------------------------------------------------------------------------------------


def layers(row: dict[str, Any]) -> set[str]:
    return {name.partition("/")[0] for name in row["lr"]}


def test_gradual_opens_one_group_from_the_top_at_a_time(tmp_path: Path) -> None:
    strategy = {"name": "gradual", "every": "2 steps", "backbone_lr": "0.5x"}
    run = runs.run("resnet", tmp_path / "run", strategy=strategy, training={"steps": 14})
    order = ["head", "block.3", "block.2", "block.1", "block.0", "stem"]
    for row in runs.train_rows(run):
        opened = min(6, 1 + (row["step"] - 1) // 2)
        assert layers(row) == set(order[:opened]), row["step"]
        assert row["phase_index"] == opened - 1


def test_gradual_two_at_a_time_with_ulmfit_s_decay(tmp_path: Path) -> None:
    strategy = {"name": "gradual", "every": STEP, "groups": 2, "decay": 2.6}
    run = runs.run("resnet", tmp_path / "run", strategy=strategy, training={"steps": 5}, schedule=FLAT)
    assert [len(layers(row)) for row in runs.train_rows(run)] == [1, 3, 5, 6, 6]
    rates = runs.train_rows(run)[-1]["lr"]
    order = ["head", "block.3", "block.2", "block.1", "block.0", "stem"]
    assert [rates[name] for name in order] == pytest.approx([1e-2 / 2.6**depth for depth in range(6)])


def test_gradual_by_plateau(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric improves at the first two evaluations and stagnates from then on."""
    import hf_finetune.evaluation as evaluation

    values = iter([0.1, 0.2] + [0.2] * 20)
    monkeypatch.setattr(evaluation.Evaluation, "value", lambda self, metric: next(values))
    strategy = {"name": "gradual", "every": "plateau", "patience": 2}
    run = runs.run(
        "vit", tmp_path / "run", strategy=strategy, training={"steps": 10}, monitor={"evaluate": STEP}
    )
    # evaluations 3 and 4 bring nothing: block 1 opens at step 5. A phase measures its own first evaluation as its best.
    assert [row["phase_index"] for row in runs.train_rows(run)] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [layers(row) for row in runs.train_rows(run)[::4]] == [
        {"head"},
        {"head", "block.1"},
        {"head", "block.1", "block.0"},
    ]


def test_lp_ft_goes_on_from_the_probe_s_head(tmp_path: Path) -> None:
    probe = runs.run("resnet", tmp_path / "probe", strategy="frozen", training={"steps": 3})
    both = runs.run(
        "resnet", tmp_path / "both", strategy={"name": "lp_ft", "probe": "3 steps", "full_lr": "0.001x"},
        training={"steps": 4}, monitor={"evaluate": "3 steps", "metric": "loss"},
    )  # fmt: skip
    assert [row["loss"] for row in runs.train_rows(both)[:3]] == [
        row["loss"] for row in runs.train_rows(probe)
    ]
    assert runs.evaluations(both)[0]["loss"] == runs.evaluations(probe)[0]["loss"]
    head, after = runs.weights(probe)["fc.weight"], runs.weights(both)["fc.weight"]
    assert (after - head).abs().max() < 2e-5
    assert [row["phase"] for row in runs.train_rows(both)] == ["head"] * 3 + ["all"]
    # each phase has a curve of its own
    assert [row["lr"]["head"] for row in runs.train_rows(both)] == pytest.approx([1e-2, 7.5e-3, 2.5e-3, 1e-5])


def test_a_layer_that_goes_back_to_sleep_stays_as_it_was(tmp_path: Path) -> None:
    """Momentum and weight decay of a phase that is over move nothing."""
    strategy = {"phases": [{"train": "all", "for": "2 steps"}, {"train": "head"}]}
    optimizer = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1}
    two = runs.run(
        "vit",
        tmp_path / "a",
        strategy="full",
        training={"steps": 2},
        optimizer=optimizer,
        schedule="constant",
    )
    five = runs.run(
        "vit",
        tmp_path / "b",
        strategy=strategy,
        training={"steps": 5},
        optimizer=optimizer,
        schedule="constant",
    )
    differ = {
        name
        for name, tensor in runs.weights(two).items()
        if not torch.equal(tensor, runs.weights(five)[name])
    }
    assert differ == {"head.weight", "head.bias", "norm.weight", "norm.bias"}


def test_phases_the_run_has_no_time_for_are_left_out_and_noted(tmp_path: Path) -> None:
    run = runs.run(
        "resnet", tmp_path / "run", strategy={"name": "gradual", "every": "2 steps"}, training={"steps": 4}
    )
    assert run.status["phases"] == ["head", "last:2"]
    assert "ends before 4 of 6 phases" in run.status["notes"][0]


@pytest.mark.parametrize("case", ["full", "gradual", "lp_ft", "phases", "layer_decay", "bitfit"])
def test_the_recipe_kept_with_a_run_repeats_it(case: str, tmp_path: Path) -> None:
    sections = {"optimizer": {"name": "auto"}, "schedule": {"name": "cosine"}}
    first = runs.run("vit", tmp_path / "a", strategy=LEARNS[case][0], **sections)
    resolved = load_recipe(first.path / "recipe.yaml", [f"output={tmp_path / 'b'}"])
    second = runs.finetune(resolved, quiet=True)
    assert runs.same(runs.weights(first), runs.weights(second))
    assert second.status["auto"] == {}


# ---- what cannot be ----------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, str]] = [
    ("resnet", {"phases": [{"train": ["head", {"match": "attention"}]}]}, "match 'attention' finds none of 47 parameters"),
    ("resnet", {"phases": [{"train": "last:99"}]}, "'last:99' asks for 99 layer groups; this backbone has 6 (stem, block.0"),
    ("vit", {"phases": [{"train": ["block.7", "head"]}]}, "has no block.7; its layer groups are stem, block.0, block.1, head"),
    ("vit", {"name": "surgical", "block": "block.9"}, "has no block.9"),
    ("vit", {"phases": [{"train": "first:1"}]}, "the output layer (head.weight) is new and no phase trains it"),
    ("vit", {"phases": [{"train": "biases"}]}, "the output layer (head.weight) is new and no phase trains it"),
    ("bert", {"phases": [{"train": "head", "lr": 0}]}, "phase 1 trains nothing: every rate in it is 0"),
    ("bert", {"phases": [{"train": "first:2", "backbone_lr": "0x"}, {"train": "head"}]}, "phase 1 trains nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "strategy", "text"), WRONG)
def test_what_cannot_be_is_said_before_training(
    family: str, strategy: Any, text: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        runs.run(family, tmp_path / "run", strategy=strategy)
    assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("block", ["block.x", "block.", "top", "block.1.2"])
def test_a_block_s_name_is_checked_with_the_recipe(block: str) -> None:
    with pytest.raises(RecipeError, match=r"strategy\.block"):
        runs.recipe("vit", strategy={"name": "surgical", "block": block})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_answers_as_what_was_trained(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder reloads through its own library with equal logits: those the run measured."""
    import hf_finetune.train as loop

    real, kept = loop.evaluate, []

    def listening(*args: Any, **kwargs: Any) -> Any:
        kept.append(real(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(loop, "evaluate", listening)
    run = runs.run(family, tmp_path / "run", strategy="full")
    trained = load_trained(str(run.path))
    again = load_backbone(
        BackboneSpec(id=str(run.model_folder)),
        trained.labels,
        "text" if family == "bert" else "image",
        seed=3,
    )
    assert again.report.new == again.report.missing == ()
    setup = prepare(runs.recipe(family, strategy="full"), world_size=1, device=torch.device("cpu"))
    rows = EvalSet(setup.splits.validation, setup.splits.labels, again.input)
    batch = collate([rows[i] for i in range(len(rows))], tokenizer=getattr(again.input, "tokenizer", None))
    with torch.no_grad():
        logits = forward(again.model, batch["inputs"])
    torch.testing.assert_close(logits, torch.tensor(kept[0].logits), rtol=1e-5, atol=1e-6)
