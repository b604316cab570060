import io
import math
import random
import time
from pathlib import Path

import pytest
from rich.console import Console

from hf_finetune.models.anatomy import Anatomy, Parameter
from hf_finetune.progress import Progress
from hf_finetune.report.compare import arms, comparison_table, paired_p_value, wilson_interval
from hf_finetune.report.curves import save_comparison, save_curves
from hf_finetune.report.tables import layer_table, phase_table, print_table, short_count
from hf_finetune.runfolder import Run, RunFolder, load_run
from hf_finetune.spec import Duration
from hf_finetune.strategies.phase import PhasePlan

GROUPS = ("stem", "block.0", "block.1", "block.2", "head")


def made_up_rows(phases, epochs=1, steps=6, seed=0, top=0.9):
    """Rows of a run through phases, each a list of the groups that learn."""
    chance = random.Random(seed)
    rows, step, total = [], 0, len(phases) * epochs * steps
    for index, groups in enumerate(phases):
        where = {"phase": f"last:{index + 1}", "phase_index": index}
        for _ in range(epochs):
            for _ in range(steps):
                step += 1
                lr = {
                    g: 1e-3 * 0.3 ** (len(GROUPS) - GROUPS.index(g)) * (1 - step / (total + 1))
                    for g in groups
                }
                loss = math.exp(-step / total) + chance.gauss(0, 0.05)
                rows.append(
                    {"step": step, "epoch": step / steps, "split": "train", "loss": loss, "lr": lr, **where}
                )
            metrics = {"accuracy": top - 0.4 * math.exp(-4 * step / total), "f1_macro": 0.5}
            seen = {"epoch": step / steps, "split": "validation", "loss": 0.5, "metrics": metrics}
            rows.append({"step": step, **seen, **where})
    return rows


def best_of(rows):
    row = max(
        (row for row in rows if row["split"] == "validation"), key=lambda row: row["metrics"]["accuracy"]
    )
    return {
        "metric": "accuracy",
        "value": row["metrics"]["accuracy"],
        "step": row["step"],
        "epoch": row["epoch"],
    }


def width_and_ink(path):
    """Width of a picture and the share of pixels that are not white."""
    image = pytest.importorskip("PIL.Image").open(path).convert("L")
    histogram = image.histogram()
    return image.width, 1 - histogram[255] / sum(histogram)


GRADUAL = [GROUPS[-1 - i :] for i in range(len(GROUPS))]
BROKEN = [
    *made_up_rows([GROUPS])[:4],
    {"step": 5, "epoch": 0.8, "split": "train", "loss": None, "lr": {"head": 0.0}},
]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(made_up_rows(GRADUAL), id="gradual"),
        pytest.param(made_up_rows([GROUPS], epochs=3, steps=1), id="three points"),
        pytest.param(made_up_rows([GROUPS] * 40, steps=2), id="40 phases"),
        pytest.param(
            [row for row in made_up_rows([GROUPS]) if row["split"] == "validation"], id="no train rows"
        ),
        pytest.param([row for row in made_up_rows([GROUPS]) if row["split"] == "train"], id="no evaluation"),
        pytest.param(BROKEN, id="a loss that is not finite"),
        pytest.param([{**made_up_rows([("head",)])[0], "step": 0, "epoch": 0.0}], id="step 0"),
        pytest.param([], id="nothing"),
    ],
)
def test_curves_of_any_run(tmp_path, rows):
    best = best_of(rows) if any(row["split"] == "validation" for row in rows) else None
    save_curves(rows, best, tmp_path / "curves.png", "a $title_with {odd} signs$")
    width, ink = width_and_ink(tmp_path / "curves.png")
    assert width == 1200
    assert ink > 0.01


def test_curves_leave_matplotlib_as_it_was(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    rows = made_up_rows(GRADUAL[:2])
    save_curves(rows, best_of(rows), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


def a_run(path, seed=0, value=0.9, true=(), predicted=(), **status):
    rows = made_up_rows([GROUPS], epochs=2, seed=seed)
    folder = RunFolder.create(str(path), "r", "b")
    Path(path, "recipe.yaml").write_text(
        f"strategy: {{name: {path.parent.name}}}\ntraining: {{seed: {seed}}}\n"
    )
    for row in rows:
        folder.log(row)
    status = {"status": "done", "wall_seconds": 12.0, "parameters": {"total": 1000, "trainable": 10}} | status
    folder.write_status(best=best_of(rows) | {"value": value}, **status)
    if true:
        folder.write_predictions(true, predicted)
    return load_run(path)


def test_comparison_pairs_predictions_and_names_what_failed(tmp_path):
    true = [0] * 100
    runs = {
        "frozen": a_run(
            tmp_path / "frozen/0", value=0.90, validation_rows=100, true=true, predicted=[0] * 90 + [1] * 10
        ),
        "full": a_run(
            tmp_path / "full/0", value=0.91, validation_rows=100, true=true, predicted=[0] * 91 + [1] * 9
        ),
        "scratch": a_run(
            tmp_path / "scratch/0", value=0.5, validation_rows=100, true=true, predicted=[0, 1] * 50
        ),
        "lp_ft": a_run(tmp_path / "lp_ft/0", value=None, status="failed", why="non-finite loss"),
    }
    table = comparison_table(runs)
    assert [row[0] for row in table.rows] == ["full", "frozen", "scratch", "lp_ft"]
    assert [row[-1] for row in table.rows] == [
        "best", "within noise, p=1.00", "worse, p<0.001", "failed: non-finite loss"
    ]  # fmt: skip
    assert table.rows[0][1] == "0.910 (0.838-0.952)"
    assert "McNemar" in table.note
    assert "1 k parameters" in table.note
    save_comparison(runs, "accuracy", tmp_path / "compare.png")
    assert width_and_ink(tmp_path / "compare.png")[0] == 1200


def test_seeds_of_one_recipe_are_one_arm(tmp_path):
    values = {"full": (0.95, 0.96, 0.955), "scratch": (0.70, 0.72, 0.69)}
    runs = {
        f"{name}-seed{seed}": a_run(tmp_path / name / str(seed), seed=seed, value=value)
        for name in values
        for seed, value in enumerate(values[name])
    }
    full, scratch = comparison_table(runs).rows
    assert full[:2] == ["full", "0.9550 ± 0.0050 (3 seeds)"]
    assert full[-1] == "best"
    assert scratch[0] == "scratch"
    assert scratch[-1].startswith("worse, p")
    save_comparison(runs, "accuracy", tmp_path / "compare.png")


def test_the_same_seed_twice_is_no_further_evidence(tmp_path):
    runs = {name: a_run(tmp_path / "full" / name, seed=0) for name in ("a", "b")}
    assert [arm.name for arm in arms(runs, "accuracy")] == ["a", "b"]


def test_lower_is_better_for_errors():
    def with_mse(value):
        return Run(Path("none"), {"status": "done", "best": {"metric": "mse", "value": value, "step": 1}})

    table = comparison_table({"a": with_mse(0.3), "b": with_mse(0.2)})
    assert [row[:2] for row in table.rows] == [["b", "0.2000"], ["a", "0.3000"]]


def test_comparison_of_nothing(tmp_path):
    assert comparison_table({}).rows == []
    save_comparison({"a": Run(Path("none"))}, "accuracy", tmp_path / "compare.png")


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    # 2 * sum(C(n, k) for k <= min) / 2**n, at most 1
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 9, 22 / 1024), (3, 9, 2 * 299 / 4096)],
)
def test_paired_p_value(only_a, only_b, p):
    both = 20
    a = [True] * both + [True] * only_a + [False] * only_b
    b = [True] * both + [False] * only_a + [True] * only_b
    assert paired_p_value(a, b) == pytest.approx(p)


def test_paired_p_value_of_many_samples():
    a, b = [True, False] * 20_000, [False, True] * 20_000
    assert paired_p_value(a, b) == 1.0


def test_wilson_interval():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_plain_table_is_aligned_without_boxes_or_colour():
    file = io.StringIO()
    print_table(
        "Arms",
        ("run", "accuracy", "rows", "note"),
        [["a [b]", 0.51234, 1234, "x"], ["bcd", None, 5, ""]],
        "n",
        file=file,
    )
    assert file.getvalue() == (
        "Arms\n"
        "run    accuracy   rows  note\n"
        "a [b]    0.5123  1,234  x\n"
        "bcd           -      5\n"
        "n\n"
    )  # fmt: skip


def test_table_on_a_terminal_shows_brackets_as_they_are():
    file = io.StringIO()
    print_table("Arms", ("run", "value"), [["[red]a", 1.0]], file=file, color=True)
    assert "[red]a" in file.getvalue()


def small_anatomy():
    parameters = [
        Parameter(f"{group}.{kind}", (size,), group, kind == "bias", False, kind != "bias")
        for group in GROUPS
        for kind, size in (("weight", 1000), ("bias", 10))
    ]
    return Anatomy("cnn", GROUPS, tuple(parameters))


def plan(groups, anatomy, duration=None, bias_only=False):
    multiples = {
        p.name: 1.0 if p.group == "head" else 0.1
        for p in anatomy.parameters
        if p.group in groups and (p.is_bias or not bias_only)
    }
    return PhasePlan("+".join(groups), multiples, "frozen", duration, None)


def test_phase_and_layer_tables():
    anatomy = small_anatomy()
    plans = [
        plan(("head",), anatomy, Duration(2, "epochs")),
        plan(("block.2", "head"), anatomy, bias_only=True),
    ]
    rows = phase_table(plans, anatomy, 1e-2).rows
    assert rows[0] == [1, "head", "2 epochs", "1.01 k", "20 %", "0.01", "-", "frozen"]
    assert rows[1][2:7] == ["the rest", "20", "0.396 %", "0.01", "0.001"]
    assert phase_table(plans, anatomy, 1e-2, [80, 1200]).rows[1][2] == "1,200 steps"
    layers = layer_table(plans, anatomy, 1e-2)
    assert layers.columns[-2:] == ("1: head", "2: block.2+head")
    assert [row[3:] for row in layers.rows[-2:]] == [["-", "0.001 (part)"], ["0.01", "0.01 (part)"]]
    many = layer_table([plan(groups, anatomy) for groups in [*GRADUAL, ("head",)]], anatomy, 1e-2)
    assert [row[3:] for row in many.rows[-2:]] == [["2-5", "0.001"], ["1-6", "0.01"]]


@pytest.mark.parametrize(
    ("count", "text"), [(812, "812"), (5130, "5.13 k"), (999_600, "1000 k"), (2.22e6, "2.22 M")]
)
def test_short_count(count, text):
    assert short_count(count) == text


def train_a_little(progress, steps=40):
    with progress:
        progress.say("frozen on shipped/tiny-resnet")
        for step in range(1, steps + 1):
            progress.step(
                step=step, epoch=step / 20, phase="last:2", loss=1 / step, lrs={"stem": 1e-5, "head": 1e-3},
                samples_per_second=321.0,
            )  # fmt: skip
            if step % 20 == 0:
                metrics = {"f1_macro": 0.5, "accuracy": 0.8}
                progress.evaluated(step=step, epoch=step / 20, loss=0.4, metrics=metrics, is_best=step == 20)


def test_without_a_terminal_one_line_per_evaluation(capsys):
    train_a_little(Progress(40, metric="accuracy"))
    out, err = capsys.readouterr()
    assert err == ""
    first, second, third = out.splitlines()
    assert first == "frozen on shipped/tiny-resnet"
    assert second.startswith("epoch     1  step 20/40  loss 0.4000 (train ")
    assert second.endswith("accuracy 0.8000  f1_macro 0.5000  [last:2]  * best")
    assert third.endswith("[last:2]")


@pytest.mark.parametrize("options", [{"quiet": True}, {"is_main": False}])
def test_quiet_and_other_processes_say_nothing(capsys, options):
    screen = io.StringIO()
    train_a_little(Progress(40, console=Console(file=screen, force_terminal=True), **options))
    assert capsys.readouterr() == ("", "")
    assert screen.getvalue() == ""


@pytest.mark.parametrize("width", [40, 80, 160])
@pytest.mark.parametrize("total", [40, None])
def test_on_a_terminal_a_live_bar(capsys, width, total):
    screen = io.StringIO()
    train_a_little(
        Progress(total, metric="accuracy", console=Console(file=screen, force_terminal=True, width=width))
    )
    text = screen.getvalue()
    assert "last:2" in text
    assert "0.8000 (best 0.8000)" in text if width >= 80 else "loss" in text
    assert f"40/{total or '?'}" in text
    assert capsys.readouterr().out.count("\n") == 3  # a redirected stdout still gets the results
    assert text.count("last:2") <= 8  # 40 steps took no time: next to no redraws


def test_a_step_costs_next_to_nothing(capsys):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(20_000, console=screen) as progress:
        start = time.perf_counter()
        for step in range(20_000):
            progress.step(step=step, epoch=0.0, phase="head", loss=0.1, lrs={}, samples_per_second=1.0)
        assert (time.perf_counter() - start) / 20_000 < 100e-6
