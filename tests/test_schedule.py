"""Curves of the learning rate, the units of a recipe, and phases on the timeline."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hf_finetune.monitor import Best, Patience, PatienceSpec
from hf_finetune.schedule import SCHEDULES, ScheduleSpec, multiple_at
from hf_finetune.spec import Duration, Rate, parse_duration, parse_rate
from hf_finetune.strategies.phase import PhasePlan
from hf_finetune.timeline import Timeline, phase_end, reachable

# name, options, multiples at progress 0, 1/4, 1/2, 1
CURVES: list[tuple[str, dict[str, Any], tuple[float, float, float, float]]] = [
    ("constant", {}, (1, 1, 1, 1)),
    ("linear", {}, (1, 0.75, 0.5, 0)),
    ("linear", {"floor": 0.2}, (1, 0.8, 0.6, 0.2)),
    ("cosine", {}, (1, 0.5 + 0.25 * math.sqrt(2), 0.5, 0)),
    ("cosine", {"floor": 0.5}, (1, 0.75 + 0.125 * math.sqrt(2), 0.75, 0.5)),
    ("cosine_restarts", {"cycles": 1}, (1, 0.5 + 0.25 * math.sqrt(2), 0.5, 0)),
    ("cosine_restarts", {"cycles": 2}, (1, 0.5, 1, 0)),
    ("cosine_restarts", {"cycles": 4, "decay": 0.5}, (1, 0.5, 0.25, 0)),
    ("cosine_restarts", {"cycles": 2, "stretch": 3}, (1, 1, 0.75, 0)),
    ("polynomial", {}, (1, 0.5625, 0.25, 0)),
    ("polynomial", {"power": 1, "floor": 0.1}, (1, 0.775, 0.55, 0.1)),
    ("one_cycle", {}, (0.04, 1, 1e-5 + (1 - 1e-5) * 0.75, 1e-5)),
    ("one_cycle", {"rise": 0.5, "start": 0.2, "end": 0.1}, (0.2, 0.6, 1, 0.1)),
    ("slanted_triangular", {"rise": 0.25}, (1 / 32, 1, (1 + 31 * 2 / 3) / 32, 1 / 32)),
    ("warmup_stable_decay", {"decay": 0.5}, (1, 1, 1, 0)),
    ("warmup_stable_decay", {"decay": 1, "floor": 0.2}, (1, 0.8, 0.6, 0.2)),
    ("reduce_on_plateau", {}, (1, 1, 1, 1)),
]


def schedule(name: str, options: dict[str, Any]) -> ScheduleSpec:
    return SCHEDULES[name].model_validate(
        {key: float(v) if isinstance(v, float) else v for key, v in options.items()}
    )


@pytest.mark.parametrize(("name", "options", "expected"), CURVES)
def test_curve(name: str, options: dict[str, Any], expected: tuple[float, ...]) -> None:
    curve = schedule(name, options)
    assert [curve.multiple(at) for at in (0, 0.25, 0.5, 1)] == pytest.approx(expected)


def test_every_schedule_has_a_curve_here() -> None:
    assert {name for name, _, _ in CURVES} == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("span", [1, 2, 3, 7, 30, 100, 997])
@pytest.mark.parametrize("warmup_share", [0, 0.1, 0.5])
def test_multiples_lie_in_0_1_and_no_step_is_wasted(name: str, span: int, warmup_share: float) -> None:
    warmup = int(span * warmup_share)
    multiples = [
        multiple_at(SCHEDULES[name](), step, span_steps=span, warmup_steps=warmup) for step in range(span)
    ]
    assert all(0 < multiple <= 1 for multiple in multiples)
    # A cosine of 997 steps ends at 2.5e-6 of its peak: small, but a step.
    assert min(multiples) > 1e-6


@pytest.mark.parametrize("stretch", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("cycles", [2, 3, 5, 7])
@pytest.mark.parametrize("shortest", [1, 3, 7, 10])
def test_restarts_start_on_their_step(stretch: float, cycles: int, shortest: int) -> None:
    """Rounding at a boundary must not turn the first step of a cycle into the very end of the one before."""
    curve = SCHEDULES["cosine_restarts"].model_validate({"cycles": cycles, "stretch": stretch})
    lengths = [round(shortest * stretch**cycle) for cycle in range(cycles)]
    starts = [sum(lengths[:cycle]) for cycle in range(cycles)]
    multiples = [multiple_at(curve, step, span_steps=sum(lengths), warmup_steps=0) for step in starts]
    assert multiples == pytest.approx([1] * cycles)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "warmup_stable_decay"])
def test_falls_only(name: str) -> None:
    multiples = [SCHEDULES[name]().multiple(step / 50) for step in range(51)]
    assert multiples == sorted(multiples, reverse=True)


@pytest.mark.parametrize("name", ["one_cycle", "slanted_triangular"])
def test_rises_once_then_falls(name: str) -> None:
    multiples = [SCHEDULES[name]().multiple(step / 200) for step in range(201)]
    top = multiples.index(max(multiples))
    assert max(multiples) == pytest.approx(1)
    assert multiples[: top + 1] == sorted(multiples[: top + 1])
    assert multiples[top:] == sorted(multiples[top:], reverse=True)


def test_restarts_count_their_cycles() -> None:
    curve = SCHEDULES["cosine_restarts"].model_validate({"cycles": 5})
    multiples = [multiple_at(curve, step, span_steps=50, warmup_steps=0) for step in range(50)]
    rises = [step for step in range(1, 50) if multiples[step] > multiples[step - 1]]
    assert rises == [10, 20, 30, 40]
    assert [multiples[step] for step in rises] == pytest.approx([1] * 4)


@pytest.mark.parametrize(("total", "cut_frac", "ratio"), [(100, 0.1, 32), (40, 0.25, 10), (10, 0.5, 2)])
def test_slanted_triangular_is_the_paper_s(total: int, cut_frac: float, ratio: float) -> None:
    """ULMFiT, equation 3, with t counted from 0."""
    curve = SCHEDULES["slanted_triangular"].model_validate({"rise": cut_frac, "ratio": float(ratio)})
    cut = math.floor(total * cut_frac)
    for t in range(total):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        paper = (1 + p * (ratio - 1)) / ratio
        assert multiple_at(curve, t, span_steps=total, warmup_steps=0) == pytest.approx(paper)


def test_warmup_rises_in_equal_parts_to_the_curve_s_start() -> None:
    multiples = [
        multiple_at(SCHEDULES["linear"](), step, span_steps=14, warmup_steps=4) for step in range(14)
    ]
    assert multiples[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert multiples[5:] == pytest.approx([1 - step / 10 for step in range(1, 10)])


# ---- units -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "steps"),
    [
        ("1 epoch", Duration(1, "epochs"), 10),
        ("2 epochs", Duration(2, "epochs"), 20),
        ("0.5 epochs", Duration(0.5, "epochs"), 5),
        ("0.01 epochs", Duration(0.01, "epochs"), 1),
        ("7 steps", Duration(7, "steps"), 7),
        ("1 step", Duration(1, "steps"), 1),
        ("25%", Duration(25, "%"), 50),
        (" 100 % ", Duration(100, "%"), 200),
    ],
)
def test_durations(text: str, expected: Duration, steps: int) -> None:
    duration = parse_duration(text)
    assert duration == expected
    assert duration.to_steps(steps_per_epoch=10, total_steps=200) == steps
    assert parse_duration(str(duration)) == duration


@pytest.mark.parametrize(
    "value", ["", "3", 3, 3.0, True, None, "3 hours", "-1 epochs", "0 epochs", "101%", "1.5 steps", "epochs"]
)
def test_no_durations(value: Any) -> None:
    with pytest.raises(ValueError, match=r"duration|whole"):
        parse_duration(value)


@pytest.mark.parametrize(
    ("value", "expected", "multiple"),
    [
        (3e-4, Rate(3e-4, relative=False), 0.03),
        (0, Rate(0.0, relative=False), 0),
        ("0.1x", Rate(0.1, relative=True), 0.1),
        ("1e-3x", Rate(1e-3, relative=True), 1e-3),
        ("0x", Rate(0.0, relative=True), 0),
        (" 2 x ", Rate(2.0, relative=True), 2),
    ],
)
def test_rates(value: Any, expected: Rate, multiple: float) -> None:
    assert parse_rate(value) == expected
    assert expected.multiple_of(1e-2) == pytest.approx(multiple)


@pytest.mark.parametrize("value", ["x", "-1x", "0.1", "auto", -1e-3, math.inf, math.nan, True, None, "x0.1"])
def test_no_rates(value: Any) -> None:
    with pytest.raises(ValueError, match="rate"):
        parse_rate(value)


# ---- phases on the timeline --------------------------------------------------------------------------------------


def plan(duration: str | None = None, *, plateau: bool = False) -> PhasePlan:
    patience = PatienceSpec(patience=1) if plateau else None
    return PhasePlan("p", {"w": 1.0}, "frozen", parse_duration(duration) if duration else None, patience)


OPEN, PLATEAU = plan(), plan(plateau=True)
# phases -> the step at which each ends at the latest, in a run of 100 steps, 10 an epoch
SPANS: list[tuple[str, list[PhasePlan], list[int]]] = [
    ("one", [OPEN], [100]),
    ("the last takes what is left", [plan("2 epochs"), plan("1 epoch")], [20, 100]),
    ("share", [OPEN, OPEN, OPEN], [33, 66, 100]),
    ("share after the fixed", [plan("50%"), OPEN, OPEN], [50, 75, 100]),
    ("share what later ones leave", [OPEN, plan("40 steps"), OPEN], [30, 70, 100]),
    ("plateau may take all", [PLATEAU, OPEN], [100]),
    ("plateau with a limit", [plan("30 steps", plateau=True), OPEN], [30, 100]),
    ("too long", [plan("8 epochs"), plan("8 epochs"), OPEN], [80, 100]),
    ("fixed ones leave nothing", [OPEN, plan("100 steps"), OPEN], [1, 100]),
]


@pytest.mark.parametrize(("plans", "ends"), [case[1:] for case in SPANS], ids=[case[0] for case in SPANS])
def test_phase_ends(plans: list[PhasePlan], ends: list[int]) -> None:
    timeline, found, start = Timeline(10, 100, 10), [], 0
    for index in range(len(plans)):
        if start >= 100:
            break
        start = phase_end(plans, index, start, timeline)
        found.append(start)
    assert found == ends


@pytest.mark.parametrize(
    ("plans", "total", "count"),
    [
        ([OPEN, OPEN, OPEN], 100, 3),
        ([OPEN, OPEN, OPEN], 2, 2),
        ([plan("5 steps")] * 4, 12, 3),
        ([PLATEAU] * 4, 3, 3),
        ([PLATEAU, plan("200 steps"), OPEN], 100, 2),
        ([plan("2 epochs"), OPEN], 20, 1),
    ],
)
def test_reachable_phases(plans: list[PhasePlan], total: int, count: int) -> None:
    assert len(reachable(plans, Timeline(10, total, 10))) == count


# ---- the monitor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "patience", "min_delta", "values", "stops_at"),
    [
        ("max", 1, 0.0, [0.5, 0.5], 2),
        ("max", 2, 0.0, [0.5, 0.4, 0.6, 0.6, 0.5], 5),
        ("min", 2, 0.0, [1.0, 0.9, 0.9, 0.95], 4),
        ("max", 2, 0.1, [0.5, 0.55, 0.59, 0.9], 3),
        ("max", 2, 0.0, [math.nan, 0.5, 0.6, 0.7, 0.8], None),
        ("min", 2, 0.0, [0.5, math.nan, math.nan], 3),
        ("max", 2, 0.0, [math.nan, math.nan, 0.5], 2),
    ],
)
def test_patience(
    mode: Any, patience: int, min_delta: float, values: list[float], stops_at: int | None
) -> None:
    watch = Patience(mode, patience, min_delta)
    stopped = next((n for n, value in enumerate(values, 1) if watch.exhausted_by(value)), None)
    assert stopped == stops_at


def test_best_keeps_the_earlier_of_equals_and_never_nan() -> None:
    best = Best("max")
    found = [
        best.update(v, step=n, epoch=n, metrics={}) for n, v in enumerate([math.nan, 0.5, 0.5, 0.6, math.nan])
    ]
    assert found == [False, True, False, True, False]
    assert (best.value, best.step) == (0.6, 3)
