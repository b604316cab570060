"""Recipes from YAML to `Recipe` and back: layers, overrides, places, and the answers to broken ones."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml

from broken_recipes import BROKEN, Broken
from hf_finetune.augment.spec import AUGMENTATIONS
from hf_finetune.errors import RecipeError
from hf_finetune.recipe import Recipe, dump_recipe, load_recipe, parse_recipe, shipped_recipes
from hf_finetune.schedule import SCHEDULES, Cosine
from hf_finetune.spec import Duration, Rate
from hf_finetune.strategies import STRATEGIES
from hf_finetune.strategies.frozen import Frozen

TEXTS = ("backbone=shipped/minilm", "data=shipped/reviews")
HEAVY = ("torch", "transformers", "timm", "datasets", "peft", "sklearn", "matplotlib", "numpy", "evaluate")
PHASES = [
    {"train": "head", "for": "2 epochs"},
    {"train": ["last:2", {"match": "a.*"}], "until": {"plateau": {"patience": 3}}, "lr": 0.01},
    {"train": "all", "for": "20%", "until": "plateau", "backbone_lr": "0.1x", "batch_norm": "adapt"},
    {"train": "all", "layer_decay": 0.5},
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "recipe.yaml") -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text).removeprefix("\n"), encoding="utf-8")
    return name


def at(recipe: Recipe, key: str) -> Any:
    value: Any = recipe.model_dump(by_alias=True)
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


# -------------------------------------------------------------------------------------------- broken recipes


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_recipe_is_answered_by_its_exact_message(broken: Broken) -> None:
    for name, text in broken.files.items():
        write(text, name)
    with pytest.raises(RecipeError) as error:
        load_recipe(write(broken.recipe), broken.overrides)
    assert str(error.value) == dedent(broken.message).strip()
    assert error.value.exit_code == 2


def test_the_table_of_broken_recipes_is_long_and_repeats_nothing() -> None:
    assert len({broken.name for broken in BROKEN}) == len(BROKEN) >= 45


def test_a_file_that_cannot_be_read_is_answered() -> None:
    write("strategy: full", "full.yaml")
    Path("latin.yaml").write_bytes(b"strategy: full\n# caf\xe9\n")
    Path("zero.yaml").write_bytes(b"strategy: full\ntask: \x00\n")
    shipped = f"  shipped recipes: {', '.join(shipped_recipes())}"
    missing = "there is no such file"
    cases = {
        "fulll.yaml": f"fulll.yaml\n  {missing}\n  did you mean 'full.yaml'?\n{shipped}",
        "frozne": f"frozne\n  {missing}\n  did you mean the shipped recipe 'frozen'?\n{shipped}",
        "no/x.yaml": f"no/x.yaml\n  {missing}\n  check the path\n{shipped}",
        ".": f".\n  a folder is no recipe\n  name a recipe in it: full.yaml, latin.yaml, zero.yaml\n{shipped}",
        "latin.yaml": "latin.yaml:2\n  not UTF-8 text\n  save the file as UTF-8",
        "zero.yaml": "zero.yaml:2\n  not text: it holds the control character 0x00\n"
        "  save the file as plain UTF-8 text",
    }
    for name, message in cases.items():
        with pytest.raises(RecipeError) as error:
            load_recipe(name)
        assert str(error.value) == f"{message}\n1 problem in {name}"


ODD_VALUES = [
    None,
    True,
    -1,
    0.5,
    "",
    "x",
    "3",
    "1 epoch",
    [],
    [1],
    {},
    {"a": 1},
    {"name": "x"},
    {"name": [1]},
    [{}],
    float("nan"),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_odd_value_anywhere_gets_past_or_breaks_the_checks(strategy: str) -> None:
    """Every key in turn takes every odd value: it loads, or is answered in our words."""
    full = parse_recipe(
        {
            "strategy": {"name": strategy, **({"phases": PHASES} if strategy == "phases" else {})},
            "augment": ["mixup", "random_erasing"],
            "training": {"ema": {}},
            "monitor": {"early_stopping": {}},
        }
    ).model_dump(by_alias=True)
    keys = [key for section in ([], ["strategy"], ["training"], ["augment", 1], ["strategy", "phases", 1])
            for key in _keys(full, section)]  # fmt: skip
    for key in keys:
        for value in ODD_VALUES:
            section = data = deepcopy(full)
            for part in key[:-1]:
                section = section[part]
            section[key[-1]] = value
            try:
                recipe = parse_recipe(data)
            except RecipeError as error:
                text = str(error)
                assert f"{key[0]}" in text
                assert not any(
                    word in text for word in ("pydantic", "Input should", "Spec", "validator", "Literal")
                )
            else:
                assert isinstance(recipe, Recipe)


def _keys(data: Any, section: list[Any]) -> list[list[Any]]:
    for part in section:
        try:
            data = data[part]
        except (KeyError, IndexError):
            return []
    return [[*section, key] for key in data]


# ---------------------------------------------------------------------------------- what must not be refused

SOUND = [
    ("batches that fill up", "training: {batch_size: 30, micro_batch_size: 10}", ()),
    ("pairs", "augment: [mixup, cutmix]\ntraining: {batch_size: 10, micro_batch_size: 2}", ()),
    ("a fraction where validation is the test", "data: {path: shipped/digits, validation: 0.2, test: validation}", ()),
    ("a slice of a split", "data: {path: shipped/digits, train: 'train[:50%]', validation: 'train[50%:]'}", ()),
    ("a rising curve with warmup auto", "schedule: one_cycle", ()),
    ("patience that can run out", "training: {epochs: 4}\nmonitor: {early_stopping: {patience: 3}}", ()),
    ("an evaluation at the end", "monitor: {evaluate: 100%}", ()),
    ("steps against epochs", "training: {steps: 5}\nmonitor: {evaluate: 1 epoch, early_stopping: {}}", ()),
    ("an open last phase", "strategy: {phases: [{train: head, for: 9 epochs}, {train: all}]}", ()),
    ("phases that share", "strategy: {phases: [{train: head}, {train: all}]}", ()),
    ("phases that fill the run", "strategy: {phases: [{train: head, for: 40%}, {train: all, for: 6 epochs}]}", ()),
    ("a foreign metric with its mode", "monitor: {metric: evaluate/meteor, mode: max, metrics: [loss]}", ()),
    ("a foreign metric beside", "monitor: {metrics: [evaluate/meteor, f1_macro]}", ()),
    ("values", "data: {path: a.csv, labels: regression}\nbackbone: user/net\nmonitor: {metric: r2}", ()),
    ("random weights", "strategy: scratch\nbackbone: {pretrained: false}", ()),
    ("pinned code", "backbone: {id: user/net, trust_remote_code: true, revision: 0123456789abcdef0123456789abcdef01234567}", ()),
    ("text augmentation", "augment: [word_dropout]", TEXTS),
    ("a preset on texts", "augment: standard", TEXTS),
    ("label names that are numbers", "data: {path: user/set, class_weights: {0: 1.0, true: 2}}", ()),
    ("options of any kind", "backbone: {options: {drop_path_rate: 0.1, list: [1, {a: b}]}}", ()),
    ("anchors", "augment: &same [mixup]\ntrackers: &none []\nmonitor: {metrics: *none}", ()),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides"), [case[1:] for case in SOUND], ids=[case[0] for case in SOUND])
def test_a_sound_recipe_loads(text: str, overrides: tuple[str, ...]) -> None:
    loaded = load_recipe(write(text if "strategy:" in text else f"strategy: full\n{text}"), overrides)
    assert parse_recipe(yaml.safe_load(dump_recipe(loaded))) == loaded, (
        "written out in full it is the same recipe"
    )


# -------------------------------------------------------------------------------------------- YAML and forms


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 1e-3), ("1E-3", 1e-3), ("1e4", 1e4), ("1.5e3", 1500.0), (".5", 0.5), ("5.", 5.0), ("+2", 2),
        ("0x1f", 31), ("0o17", 15), ("012", 12), (".inf", float("inf")), ("-.INF", float("-inf")),
        ("~", None), ("", None), ("Null", None), ("true", True), ("FALSE", False), ("yes", "yes"), ("off", "off"),
        ("1_000", "1_000"), ("1:30", "1:30"), ("2024-01-31", "2024-01-31"), ("e3", "e3"), ("1e", "1e"),
        ("'1'", "1"), ("=", "="), ("train[:90%]", "train[:90%]"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(written: str, value: Any) -> None:
    recipe = load_recipe(write(f"strategy: full\nbackbone:\n  options:\n    x: {written}\n"))
    assert recipe.backbone.options == {"x": value}
    assert type(recipe.backbone.options["x"]) is type(value)
    assert load_recipe(write(dump_recipe(recipe))).backbone.options == {"x": value}


def test_every_key_with_its_default_is_the_default() -> None:
    text = """
        task: auto
        backbone: {id: shipped/tiny-resnet, revision: null, pretrained: true, options: {}}
        data:
          path: shipped/digits
          config: null
          train: train
          validation: auto
          test: null
          columns: {image: image, text: text, label: label}
          labels: single
          max_samples: null
        augment: auto
        strategy: frozen
        optimizer: {name: auto, lr: auto, weight_decay: auto}
        schedule: {name: cosine, warmup: auto}
        training: {epochs: 10, batch_size: 32, micro_batch_size: null, precision: auto, clip_norm: 1.0, seed: 0}
        monitor: {evaluate: 1 epoch, early_stopping: null}
        trackers: []
        output: null
        """
    assert load_recipe(write(text)) == load_recipe(write("strategy: frozen"))


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("strategy: frozen", "strategy: {name: frozen}"),
        ("strategy: {phases: [{train: all}]}", "strategy: {name: phases, phases: [{train: all}]}"),
        ("strategy: full\nbackbone: timm/x", "strategy: {name: full}\nbackbone: {id: timm/x}"),
        ("strategy: full\ndata: user/set", "strategy: full\ndata: {path: user/set}"),
        ("strategy: full\ndata: [a.csv, b.csv]", "strategy: full\ndata: {path: [a.csv, b.csv]}"),
        ("strategy: full\noptimizer: sgd", "strategy: full\noptimizer: {name: sgd}"),
        ("strategy: full\nschedule: linear", "strategy: full\nschedule: {name: linear}"),
        ("strategy: full\nschedule: {floor: 0.1}", "strategy: full\nschedule: {name: cosine, floor: 0.1}"),
        ("strategy: full\naugment: [mixup]", "strategy: full\naugment: [{name: mixup}]"),
        ("strategy: full\ntraining: {steps: 5}", "strategy: full\ntraining: {epochs: null, steps: 5}"),
    ],
)
def test_a_short_form_is_the_long_one(short: str, long: str) -> None:
    assert load_recipe(write(short)) == load_recipe(write(long))


def every_choice() -> list[dict[str, Any]]:
    strategies = [{"strategy": {"name": name}} for name in STRATEGIES if name != "phases"]
    schedules = [{"strategy": "full", "schedule": name} for name in SCHEDULES]
    augmentations = [
        {"strategy": "full", "augment": [name], "backbone": "user/net", "data": "user/set"}
        for name in AUGMENTATIONS
    ]
    others = [
        {"strategy": {"phases": PHASES}},
        {"strategy": {"name": "discriminative", "layer_decay": "auto"}},
        {"strategy": {"name": "discriminative", "backbone_lr": 1e-5}},
        {"strategy": {"name": "gradual", "every": "plateau", "decay": 2.6}},
        {"strategy": "full", "training": {"steps": 100, "ema": {"decay": 0.99}, "clip_norm": None}},
        {"strategy": "full", "schedule": {"name": "linear", "warmup": None}},
        {"strategy": "full", "monitor": {"early_stopping": {"patience": 2}, "evaluate": "25%"}},
        {
            "strategy": "full",
            "data": {"path": "a b: c", "class_weights": {"0": 1.0, "null": 2.0}, "validation": 0.25},
        },
        {
            "strategy": "full",
            "data": {"path": ["ä.csv"], "columns": {"text": ["1e3", "yes"]}},
            "backbone": "user/net",
        },
    ]
    return strategies + schedules + augmentations + others


@pytest.mark.parametrize("data", every_choice(), ids=str)
def test_a_dumped_recipe_loads_to_an_equal_one(data: dict[str, Any]) -> None:
    recipe = parse_recipe(data)
    text = dump_recipe(recipe)
    assert load_recipe(write(text)) == recipe
    assert dump_recipe(load_recipe("recipe.yaml")) == text
    assert set(recipe.model_dump()) == {
        line.split(":")[0] for line in text.splitlines() if line[0] not in " -"
    }


# ---------------------------------------------------------------------------------------------------- layers


def test_a_file_is_merged_over_what_it_extends() -> None:
    write(
        "training: {epochs: 7, batch_size: 8}\naugment: [mixup, cutmix]\ndata: {path: user/a, labels: single}",
        "root.yaml",
    )
    write("extends: ../root.yaml\nstrategy: full\ntraining: {batch_size: 16, seed: 1}", "mine/base.yaml")
    recipe = load_recipe(
        write("extends: mine/base.yaml\ndata: user/b\naugment: [mixup]\ntraining: {seed: 2}")
    )
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.seed) == (7, 16, 2)
    assert [each.name for each in recipe.augment] == ["mixup"]  # type: ignore[union-attr]
    assert (recipe.data.path, recipe.data.labels) == ("user/b", "single")
    assert recipe.where("training.seed") == "recipe.yaml:4: training.seed"
    assert recipe.where("training.batch_size") == "mine/base.yaml:3: training.batch_size"
    assert recipe.where("training.epochs") == "root.yaml:1: training.epochs"
    assert recipe.where("data.path") == "recipe.yaml:2: data.path"
    assert recipe.where("optimizer.lr") == "default: optimizer.lr"


@pytest.mark.parametrize(
    ("base", "child", "key", "value"),
    [
        ("strategy: {name: gradual, every: 2 epochs}", "strategy: full", "strategy", {"name": "full", "batch_norm": "auto"}),
        ("strategy: {name: gradual, every: 2 epochs}", "strategy: {groups: 2}", "strategy.every", "2 epochs"),
        ("strategy: {name: gradual, every: 2 epochs}", "strategy: {name: gradual, groups: 2}", "strategy.every", "2 epochs"),
        ("strategy: {name: gradual, groups: 2}", "strategy: {phases: [{train: all}]}", "strategy.name", "phases"),
        ("strategy: {phases: [{train: all}]}", "strategy: {name: frozen}", "strategy.name", "frozen"),
        ("schedule: {warmup: 5%}", "schedule: {name: linear}", "schedule.warmup", "auto"),
        ("schedule: {warmup: 5%}", "schedule: cosine", "schedule.warmup", "5%"),
        ("optimizer: {name: sgd, momentum: 0.5}", "optimizer: {name: lion}", "optimizer.momentum", 0.9),
        ("optimizer: {name: sgd, momentum: 0.5}", "optimizer: {lr: 0.1}", "optimizer.momentum", 0.5),
        ("training: {epochs: 3}", "training: {steps: 7}", "training.epochs", None),
        ("training: {steps: 7}", "training: {epochs: 3}", "training.steps", None),
        ("training: {steps: 7, seed: 1}", "training: {epochs: null}", "training.steps", 7),
        ("training: {ema: {decay: 0.9}}", "training: {ema: null}", "training.ema", None),
        ("data: {path: user/a, class_weights: {x: 1.0}}", "data: {class_weights: {y: 2.0}}", "data.class_weights",
         {"x": 1.0, "y": 2.0}),
    ],
)  # fmt: skip
def test_what_a_layer_says_of_the_one_below(base: str, child: str, key: str, value: Any) -> None:
    write(base, "base.yaml")
    strategy = "" if "strategy" in base + child else "strategy: full\n"
    assert at(load_recipe(write(f"extends: base.yaml\n{strategy}{child}")), key) == value


def test_extends_finds_a_shipped_recipe_by_name_from_anywhere() -> None:
    for name in ("gradual", "gradual.yaml"):
        recipe = load_recipe(write(f"extends: {name}\nstrategy: {{groups: 2}}"))
        assert at(recipe, "strategy.groups") == 2
        assert recipe.where("strategy.name").endswith("recipes/gradual.yaml:7: strategy.name")


def test_a_file_beside_wins_over_a_shipped_recipe() -> None:
    write("strategy: frozen\ntraining: {seed: 5}", "full")
    assert load_recipe("full").training.seed == 5


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["training.epochs=3"], "training.epochs", 3),
        (["optimizer.lr=1e-3"], "optimizer.lr", 1e-3),
        (["training.clip_norm="], "training.clip_norm", None),
        (["~training.batch_size"], "training.batch_size", 32),
        (["~training.precision"], "training.precision", "auto"),
        (["~training.ema.decay"], "training.ema", None),
        (["training.ema.decay=0.5"], "training.ema.decay", 0.5),
        (["training.steps=9"], "training.epochs", None),
        (["training.steps=9", "training.epochs=2", "~training.steps"], "training.epochs", 2),
        (["data=user/b"], "data.columns.label", "label"),
        (["data={path: user/b, labels: multi}"], "data.columns.label", "label"),
        (["data.path=user/b"], "data.columns.label", "target"),
        (["data.train=train[:90%]"], "data.train", "train[:90%]"),
        (["backbone=timm/x", "backbone.revision=v1"], "backbone.revision", "v1"),
        (["strategy=frozen"], "strategy", {"name": "frozen", "batch_norm": "auto", "solver": None}),
        (["strategy.every=plateau"], "strategy.every", "plateau"),
        (["strategy.name=lp_ft"], "strategy.probe", "auto"),
        (["strategy.probe=2 epochs", "strategy.name=lp_ft"], "strategy.probe", "2 epochs"),
        (["strategy={phases: [{train: head, for: 1 epoch}, {train: all}]}", "strategy.phases.1.lr=0.1x"],
         "strategy.phases.1.lr", "0.1x"),
        (["optimizer.name=lion"], "optimizer.momentum", 0.5),
        (["optimizer=lion"], "optimizer.momentum", 0.9),
        (["schedule=linear"], "schedule.name", "linear"),
        (["augment=none"], "augment", "none"),
        (["augment=[cutmix]"], "augment.0.alpha", 1.0),
        (["augment.0.alpha=0.4"], "augment.0.alpha", 0.4),
        (["augment.0=cutmix"], "augment.0.name", "cutmix"),
        (["~augment.1"], "augment", [{"name": "mixup", "alpha": 0.3, "p": 1.0}]),
        (["output=a=b"], "output", "a=b"),
        (["data.class_weights.7=2.0"], "data.class_weights", {"7": 2.0}),
        (["data.class_weights.7=2.0", "~data.class_weights.7"], "data.class_weights", {}),
        (["trackers=[wandb]"], "trackers", ["wandb"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else None,
)  # fmt: skip
def test_an_override_changes_what_it_names(overrides: list[str], key: str, value: Any) -> None:
    name = write(
        """
        backbone: user/net
        data: {path: user/a, columns: {label: target}, class_weights: {}}
        strategy: {name: gradual, every: 2 epochs}
        optimizer: {name: sgd, momentum: 0.5}
        schedule: cosine
        augment: [{name: mixup, alpha: 0.3}, horizontal_flip]
        training: {epochs: 20, batch_size: 8}
        """
    )
    recipe = load_recipe(name, overrides)
    assert at(recipe, key) == value


def test_an_override_is_placed_on_the_command_line() -> None:
    recipe = load_recipe(write("strategy: full\ntraining: {seed: 1}"), ["training.seed=2", "data=user/set"])
    assert recipe.where("training.seed") == "command line: training.seed"
    assert recipe.where("data.path") == "command line: data.path"


def test_overrides_after_a_broken_name_are_answered_too() -> None:
    with pytest.raises(RecipeError, match=r"given \[1\]; allowed: constant, linear"):
        load_recipe(write("strategy: full"), ["schedule.name=[1]", "~schedule.factor"])


def test_where_a_recipe_came_from_does_not_tell_it_apart() -> None:
    one = load_recipe(write("strategy: full", "one.yaml"))
    two = load_recipe(write("# a comment\nstrategy: {name: full}", "two.yaml"))
    assert one == two
    assert (one.name, two.name, parse_recipe({"strategy": "full"}).name) == ("one", "two", "full")
    assert one.model_copy().where("strategy.name") == "one.yaml:1: strategy.name"


# ----------------------------------------------------------------------------------------------- from Python


def test_a_recipe_from_python() -> None:
    recipe = parse_recipe({"strategy": "frozen", "data": {"path": Path("a.csv")}}, ["training.seed=3"])
    assert (recipe.data.path, recipe.training.seed) == ("a.csv", 3)
    assert recipe.where("data.path") == "recipe: data.path"
    assert recipe.strategy == Frozen()
    assert Recipe(strategy="frozen", schedule={"warmup": "5%"}).schedule == Cosine(warmup=Duration(5, "%"))  # type: ignore[arg-type]
    assert Recipe(strategy=Frozen(), schedule=Cosine()) == Recipe.model_validate(
        {"strategy": {"name": "frozen"}}
    )
    assert at(parse_recipe({"extends": "full", "training": {"seed": 1}}), "strategy.name") == "full"


def test_units_are_read_where_they_stand() -> None:
    recipe = load_recipe(
        write(
            "strategy: {name: discriminative, backbone_lr: 0.1x}\nmonitor: {evaluate: 25%}\nschedule: {warmup: 3 steps}"
        )
    )
    assert recipe.strategy.backbone_lr == Rate(0.1, relative=True)  # type: ignore[attr-defined]
    assert (recipe.monitor.evaluate, recipe.schedule.warmup) == (Duration(25, "%"), Duration(3, "steps"))


def test_problems_from_python_are_placed_in_the_recipe() -> None:
    with pytest.raises(
        RecipeError,
        match=r"^recipe: training\.epochs\n  given -1; allowed: null or a number above 0\n1 problem",
    ):
        parse_recipe({"strategy": "full", "training": {"epochs": -1}})


# --------------------------------------------------------------------------------------------------- shipped


def test_every_strategy_of_the_contract_is_shipped() -> None:
    names = (
        "scratch full frozen discriminative layer_decay gradual gradual_plateau lp_ft surgical bitfit norms"
    )
    assert set(names.split()) <= set(shipped_recipes())
    assert "base" not in shipped_recipes()


@pytest.mark.parametrize("name", shipped_recipes())
@pytest.mark.parametrize("overrides", [(), TEXTS], ids=["images", "texts"])
def test_a_shipped_recipe_serves_images_and_texts(name: str, overrides: tuple[str, ...]) -> None:
    recipe = load_recipe(name, overrides)
    assert load_recipe(write(dump_recipe(recipe))) == recipe
    assert recipe.optimizer.lr == recipe.optimizer.weight_decay == recipe.schedule.warmup == "auto"


@pytest.mark.parametrize("shipped", shipped_recipes().values(), ids=lambda shipped: shipped.name)
def test_a_shipped_recipe_says_what_it_is_for_and_how_to_run_it(shipped: Any) -> None:
    header = [line for line in shipped.path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    command = f"accelerate launch scripts/train.py --recipe recipes/{shipped.name}.yaml"
    assert shipped.purpose.endswith(".")
    assert f"# Run:    {command}" in header
    assert f"# Texts:  {command} {' '.join(TEXTS)}" in header
    assert any(line.startswith("# Expect: ") for line in header)


def test_a_copy_of_a_shipped_recipe_loads_elsewhere() -> None:
    for shipped in shipped_recipes().values():
        Path(f"{shipped.name}.yaml").write_text(shipped.path.read_text(encoding="utf-8"), encoding="utf-8")
    for shipped in shipped_recipes().values():
        assert load_recipe(f"{shipped.name}.yaml") == load_recipe(shipped.path)


# ------------------------------------------------------------------------------------------------------ cost


def test_loading_a_recipe_loads_nothing_heavy() -> None:
    code = dedent(
        f"""
        import sys
        from hf_finetune.recipe import dump_recipe, load_recipe, shipped_recipes
        for name in shipped_recipes():
            dump_recipe(load_recipe(name, ["training.epochs=3"]))
        loaded = [name for name in {HEAVY!r} if name in sys.modules]
        sys.exit(f"loaded {{loaded}}" if loaded else 0)
        """
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
