import math

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_finetune.errors import UserError
from hf_finetune.tasks.metrics import METRICS, compute, default_metric, metric_mode, metric_names

RNG = np.random.default_rng(0)
SINGLE = (RNG.integers(0, 6, 60), RNG.normal(size=(60, 6)).astype(np.float32))
BINARY = (RNG.integers(0, 2, 60), RNG.normal(size=(60, 2)).astype(np.float32))
MULTI = ((RNG.random((60, 4)) > 0.6).astype(np.float32), RNG.normal(size=(60, 4)).astype(np.float32))
VALUES = (RNG.normal(size=60).astype(np.float32), RNG.normal(size=(60, 1)).astype(np.float32))
DATA = {"single": SINGLE, "multi": MULTI, "regression": VALUES}


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


EXPECTED = [
    ("accuracy", "single", SINGLE, sk.accuracy_score(SINGLE[0], SINGLE[1].argmax(1))),
    ("top5_accuracy", "single", SINGLE, sk.top_k_accuracy_score(SINGLE[0], SINGLE[1], k=5)),
    ("f1_micro", "single", SINGLE, sk.accuracy_score(SINGLE[0], SINGLE[1].argmax(1))),
    ("f1_macro", "multi", MULTI, sk.f1_score(MULTI[0], MULTI[1] > 0, average="macro")),
    ("roc_auc", "single", BINARY, sk.roc_auc_score(BINARY[0], softmax(BINARY[1])[:, 1])),
    (
        "roc_auc",
        "single",
        SINGLE,
        sk.roc_auc_score(SINGLE[0], softmax(SINGLE[1].astype(float)), multi_class="ovr"),
    ),
    ("roc_auc", "multi", MULTI, sk.roc_auc_score(*MULTI)),
    ("average_precision", "multi", MULTI, sk.average_precision_score(*MULTI)),
    ("subset_accuracy", "multi", MULTI, sk.accuracy_score(MULTI[0], MULTI[1] > 0)),
    ("log_loss", "single", SINGLE, sk.log_loss(SINGLE[0], softmax(SINGLE[1].astype(float)))),
    ("rmse", "regression", VALUES, sk.root_mean_squared_error(VALUES[0], VALUES[1][:, 0])),
    ("mae", "regression", VALUES, sk.mean_absolute_error(VALUES[0], VALUES[1][:, 0])),
    ("pearson", "regression", VALUES, np.corrcoef(VALUES[0], VALUES[1][:, 0])[0, 1]),
]


@pytest.mark.parametrize(
    ("name", "kind", "data", "expected"), EXPECTED, ids=[f"{e[0]}-{e[1]}" for e in EXPECTED]
)
def test_a_metric_agrees_with_scikit_learn(name, kind, data, expected):
    assert compute([name], kind, *data)[name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, k) for name, metric in METRICS.items() for k in metric.kinds]
)
def test_perfect_answers_are_at_least_as_good_as_random_ones(name, kind):
    labels, logits = DATA[kind]
    perfect = {
        "single": lambda: 20.0 * np.eye(6)[labels],
        "multi": lambda: 40 * labels - 20,
        "regression": lambda: labels[:, None],
    }
    best, other = (compute([name], kind, labels, answers)[name] for answers in (perfect[kind](), logits))
    assert isinstance(best, float)
    assert best >= other if metric_mode(name) == "max" else best <= other


def test_a_metric_that_is_not_defined_is_nan_and_quiet(recwarn):
    labels = np.zeros(4, dtype=int)
    assert math.isnan(compute(["roc_auc"], "single", labels, np.zeros((4, 3)))["roc_auc"])
    assert math.isnan(compute(["pearson"], "regression", np.ones(4), np.ones((4, 1)))["pearson"])
    assert not recwarn.list


def test_the_default_of_every_kind_is_one_of_its_metrics():
    for kind in DATA:
        assert default_metric(kind) in metric_names(kind)


def test_a_wrong_metric_is_named_with_what_is_allowed():
    with pytest.raises(UserError, match=r"'acuracy' is not one for single labels\. Did you mean 'accuracy'"):
        compute(["acuracy"], "single", *SINGLE)
    with pytest.raises(UserError, match=r"Set monitor\.mode"):
        metric_mode("evaluate/meteor")
