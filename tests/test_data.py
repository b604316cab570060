"""Data as people bring it: where it lies, how its columns and labels are written, what is wrong with it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List
from PIL import Image as PILImage

from hf_finetune.data import checks
from hf_finetune.data.columns import column_values
from hf_finetune.data.fingerprint import fingerprint
from hf_finetune.data.labels import Labels
from hf_finetune.data.spec import ColumnsSpec, DataSpec
from hf_finetune.data.splits import load_split, load_splits
from hf_finetune.data.targets import class_weights
from hf_finetune.errors import DataError

REVIEWS = [
    (f"film number {n} was {'good' if n % 2 else 'bad'}", "good" if n % 2 else "bad") for n in range(20)
]


def write_csv(
    path: Path, rows: list[tuple], header: tuple[str, ...] = ("text", "label"), sep: str = ","
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=sep).writerows([header, *rows])
    return path


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
    for label, count in classes.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            PILImage.new("RGB", size, (20 * n, 40, 60)).save(folder / label / f"{label}{n}.png")
    return folder


def load(path: object, *, seed: int = 0, **keys):
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return load_splits(DataSpec(path=path, **keys), seed=seed)


def sizes(splits) -> list[int]:
    return [len(splits.train), len(splits.validation)]


# ---- where the data lies -----------------------------------------------------------------------------------


def test_shipped_digits_are_images():
    splits = load("shipped/digits", test="test")
    assert splits.modality == "image"
    assert splits.labels == Labels("single", ("five", "six", "seven", "eight", "nine"))
    assert splits.train_counts == (20,) * 5
    assert splits.report.image_side == 32
    row = splits.validation[0]
    assert row["image"].mode == "RGB"
    assert isinstance(row["label"], int)
    assert splits.test is not None


@pytest.mark.parametrize(
    "names", [("train", "val"), ("train", "validation"), ("training", "dev"), ("Train", "Valid")]
)
def test_image_folder_with_splits(tmp_path, names):
    for name, count in zip(names, (5, 3), strict=True):
        write_images(tmp_path / name, {"ant": count, "bee": count})
    splits = load(tmp_path)
    assert sizes(splits) == [10, 6]
    assert splits.labels.names == ("ant", "bee")
    assert splits.train[9]["label"] == 1
    assert splits.report.class_counts["validation"] == {"ant": 3, "bee": 3}
    assert not splits.report.notes


def test_image_folder_without_splits_sets_a_stratified_fifth_aside(tmp_path):
    splits = load(write_images(tmp_path, {"ant": 10, "bee": 20, "cat": 1}))
    assert splits.report.class_counts["validation"] == {"ant": 2, "bee": 4, "cat": 0}
    assert splits.train_counts == (8, 16, 1)
    assert "20% of train is set aside" in splits.report.notes[0]
    assert "class 'cat' without a validation row" in splits.report.warnings[0]


def test_an_image_is_not_decoded_before_it_is_read(tmp_path, monkeypatch):
    splits = load(write_images(tmp_path, {"ant": 4, "bee": 4}))
    read = []
    original = PILImage.Image.load
    monkeypatch.setattr(PILImage.Image, "load", lambda self: read.append(1) or original(self))
    assert column_values(splits.train, "label") == [0, 0, 0, 1, 1, 1]
    assert not read
    assert splits.train[0]["image"].size == (12, 10)
    assert read


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


DICTS = [{"text": text, "label": label} for text, label in REVIEWS]
FILES = {
    "csv": lambda folder: write_csv(folder / "reviews.csv", REVIEWS),
    "tsv": lambda folder: write_csv(folder / "reviews.tsv", REVIEWS, sep="\t"),
    "jsonl": lambda folder: jsonl(folder / "reviews.jsonl", DICTS),
    "json": lambda folder: (folder / "reviews.json", (folder / "reviews.json").write_text(json.dumps(DICTS)))[
        0
    ],
    "parquet": lambda f: (f / "r.parquet", Dataset.from_list(DICTS).to_parquet(str(f / "r.parquet")))[0],
    "list of files": lambda f: [write_csv(f / "a.csv", REVIEWS[:10]), write_csv(f / "b.csv", REVIEWS[10:])],
    "folder of one file": lambda folder: write_csv(folder / "reviews.csv", REVIEWS).parent,
    "save_to_disk": lambda folder: (
        folder / "disk",
        Dataset.from_list(DICTS).save_to_disk(str(folder / "disk")),
    )[0],
}


@pytest.mark.parametrize("kind", FILES)
def test_table_files(tmp_path, kind):
    splits = load(FILES[kind](tmp_path))
    assert splits.modality == "text"
    assert splits.labels.names == ("bad", "good")
    assert sizes(splits) == [16, 4]
    texts = {
        row["text"]: splits.labels.names[row["label"]]
        for part in (splits.train, splits.validation)
        for row in part
    }
    assert texts == dict(REVIEWS)


def test_a_folder_of_files_named_like_splits(tmp_path):
    for name, rows in {"train": REVIEWS[:10], "dev": REVIEWS[10:14], "test": REVIEWS[14:]}.items():
        write_csv(tmp_path / f"{name}.csv", rows)
    (tmp_path / "README.md").write_text("not data")
    splits = load(tmp_path, test="test")
    assert [*sizes(splits), len(splits.test)] == [10, 4, 6]
    assert sizes(load(tmp_path, train="test.csv", validation="dev.csv")) == [6, 4]
    assert (
        load(tmp_path, train="dev.csv", validation="validation")
        .report.warnings[0]
        .startswith("4 rows are in both")
    )
    assert sizes(load(tmp_path, train=str(tmp_path / "test.csv"), validation="validation")) == [6, 4]


def test_sharded_files_in_a_data_folder_are_one_split(tmp_path):
    (tmp_path / "data").mkdir()
    for split, shards in {"train": 2, "validation": 1}.items():
        for shard in range(shards):
            name = f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            Dataset.from_list(DICTS).to_parquet(str(tmp_path / "data" / name))
    assert sizes(load(tmp_path)) == [40, 20]


def test_a_saved_dataset_dict_with_images_inside(tmp_path):
    image = PILImage.new("L", (9, 9), 200)
    features = Features({"img": Image(), "label": ClassLabel(names=["no", "yes"])})
    part = Dataset.from_dict({"img": [image] * 6, "label": [0, 1] * 3}, features=features)
    DatasetDict({"train": part, "val": part}).save_to_disk(str(tmp_path / "disk"))
    splits = load(tmp_path / "disk")
    assert splits.modality == "image"
    assert splits.labels.names == ("no", "yes")
    assert np.asarray(splits.train[0]["image"]).tolist()[0][0] == [200, 200, 200]
    assert "the image is read from the column 'img'" in splits.report.notes[0]


def test_a_table_of_image_paths(tmp_path):
    write_images(tmp_path / "pictures", {"ant": 5, "bee": 5})
    rows = [(f"pictures/{c}/{c}{n}.png", c) for c in ("ant", "bee") for n in range(5)]
    splits = load(write_csv(tmp_path / "table.csv", rows, header=("file_name", "label")))
    assert splits.modality == "image"
    assert splits.train[0]["image"].size == (12, 10)


def test_images_with_a_metadata_table(tmp_path):
    write_images(tmp_path, {"train": 4})
    rows = [(f"train{n}.png", ("x", "y")[n % 2]) for n in range(4)]
    write_csv(tmp_path / "train" / "metadata.csv", rows, header=("file_name", "label"))
    splits = load(tmp_path, validation="train")
    assert splits.labels.names == ("x", "y")
    assert splits.train[0]["image"].size == (12, 10)


def test_a_validation_folder_elsewhere(tmp_path):
    write_images(tmp_path / "a", {"ant": 3, "bee": 3})
    write_images(tmp_path / "b", {"ant": 2, "bee": 2})
    assert sizes(load(tmp_path / "a", validation=str(tmp_path / "b"))) == [6, 4]


def test_shared_hymenoptera_and_sst2(shared_data):
    splits = load(shared_data("hymenoptera"))
    assert (sizes(splits), splits.labels.names) == ([244, 153], ("ants", "bees"))
    splits = load(shared_data("sst2"), test="test")
    assert ([*sizes(splits), len(splits.test)], splits.labels.names) == ([6920, 872, 1821], ("0", "1"))
    assert splits.report.columns == {"text": "sentence", "label": "label"}


def test_files_that_are_no_images_are_noted(tmp_path):
    write_images(tmp_path, {"ant": 4, "bee": 4})
    (tmp_path / "bee" / "notes.txt").write_text("x")
    (tmp_path / "bee" / ".hidden").write_text("x")
    (tmp_path / "cat").mkdir()
    notes = load(tmp_path).report.notes
    assert notes[0].endswith("bee' are left out: by their ending they are no images (notes.txt)")
    assert notes[1].endswith("cat' holds no image and is left out")


# ---- which rows --------------------------------------------------------------------------------------------

SLICES = {
    "train[:50%]": [0, 10],
    "train[10:15]": [10, 15],
    "train[-5:]": [15, 20],
    "train[-10%:]": [18, 20],
    "train[ 5% : 10% ]": [1, 2],
    "train[:]": [0, 20],
}


@pytest.mark.parametrize("expression", SLICES)
def test_slices(tmp_path, expression):
    labels = Labels("single", ("bad", "good"))
    rows = load_split(DataSpec(path=str(write_csv(tmp_path / "r.csv", REVIEWS))), expression, labels)
    assert list(rows["row"]) == list(range(*SLICES[expression]))


def test_a_fraction_is_a_function_of_the_seed(tmp_path):
    path = write_csv(tmp_path / "r.csv", REVIEWS)
    rows = [list(load(path, validation=0.5, seed=seed).validation["row"]) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_max_samples_keeps_the_shares_of_the_classes(tmp_path):
    rows = [(f"text {n}", "rare" if n % 10 == 0 else "usual") for n in range(200)]
    splits = load(write_csv(tmp_path / "r.csv", rows), max_samples=30)
    assert splits.train_counts == (3, 27)
    assert len(splits.validation) == 30
    assert (
        load(write_csv(tmp_path / "r.csv", rows), max_samples=30).report.fingerprint
        == splits.report.fingerprint
    )
    assert (
        load(write_csv(tmp_path / "r.csv", rows), max_samples=30, seed=1).report.fingerprint
        != splits.report.fingerprint
    )


def test_rows_in_train_and_validation_are_warned_about(tmp_path):
    path = write_csv(tmp_path / "r.csv", REVIEWS)
    splits = load(path, train="train[:80%]", validation="train[50%:]")
    assert splits.report.warnings[0].startswith("6 rows are in both train and validation")
    assert not load(path, train="train[:80%]", validation="train[80%:]").report.warnings


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path):
    prints = [load(write_images(tmp_path / name, {"a": 4, "b": 4})).report.fingerprint for name in ("x", "y")]
    assert prints[0] == prints[1]
    write_images(tmp_path / "y", {"a": 5})
    assert load(tmp_path / "y").report.fingerprint != prints[0]
    one, two = (Dataset.from_dict({"text": [word], "label": [0]}) for word in ("one", "two"))
    assert fingerprint(one) != fingerprint(two)
    inside = [
        Dataset.from_dict({"image": [content, b"12"]}, features=Features({"image": Image(decode=False)}))
        for content in (b"12", b"21")
    ]
    assert fingerprint(inside[0]) != fingerprint(inside[1])
    assert fingerprint(inside[0].select([1, 0])) == fingerprint(inside[0])
    assert fingerprint(inside[1].select([1, 0])) != fingerprint(inside[1])


# ---- columns -----------------------------------------------------------------------------------------------


def test_columns_by_name_alias_and_type(tmp_path):
    rows = [(text, label, n) for n, (text, label) in enumerate(REVIEWS)]
    path = write_csv(tmp_path / "r.csv", rows, header=("words", "sentiment", "id"))
    splits = load(path)
    assert splits.report.columns == {"text": "words", "label": "sentiment"}
    assert [note.split(";")[0] for note in splits.report.notes[1:]] == [
        "the text is read from the column 'words'",
        "the label is read from the column 'sentiment'",
    ]
    named = load(path, columns=ColumnsSpec(text="words", label="sentiment"))
    assert len(named.report.notes) == 1
    assert named.report.fingerprint == splits.report.fingerprint


def test_pairs_of_texts(tmp_path):
    rows = [(f"question {n}", f"answer {n}", n % 2) for n in range(20)]
    path = write_csv(tmp_path / "r.csv", rows, header=("question", "answer", "label"))
    splits = load(path, columns=ColumnsSpec(text=["question", "answer"]))
    row = splits.train[0]
    assert (row["text"], row["text_pair"]) == ("question 0", "answer 0")
    assert splits.labels.names == ("0", "1")


def test_texts_that_read_like_missing_values_are_texts(tmp_path):
    rows = [(word, n % 2) for n, word in enumerate(["NA", "None", "null", "nan", "N/A", "12", "#", "ok"])]
    splits = load(write_csv(tmp_path / "r.csv", rows), validation="train")
    assert list(splits.train["text"]) == ["NA", "None", "null", "nan", "N/A", "12", "#", "ok"]


# ---- labels ------------------------------------------------------------------------------------------------

SINGLE = {
    "strings": (["b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0]),
    "whole numbers by value": ([10, 9, 10, 9], ("9", "10"), [1, 0, 1, 0]),
    "text numbers by value": (["10", "9", "10", "9"], ("9", "10"), [1, 0, 1, 0]),
    "booleans": ([True, False, True, False], ("False", "True"), [1, 0, 1, 0]),
    "whole floats": ([1.0, 0.0, 1.0, 0.0], ("0", "1"), [1, 0, 1, 0]),
    "negative numbers": ([-1, 1, -1, 1], ("-1", "1"), [0, 1, 0, 1]),
}


def disk(folder: Path, labels: list, feature=None) -> Path:
    data = Dataset.from_dict({"text": [f"text {n}" for n in range(len(labels))], "label": labels})
    (data.cast_column("label", feature) if feature else data).save_to_disk(str(folder / "disk"))
    return folder / "disk"


@pytest.mark.parametrize("case", SINGLE)
def test_single_labels(tmp_path, case):
    values, names, encoded = SINGLE[case]
    splits = load(disk(tmp_path, values), validation="train")
    assert splits.labels.names == names
    assert list(splits.train["label"]) == encoded


def test_class_label_names_are_kept_also_those_without_rows(tmp_path):
    splits = load(disk(tmp_path, [2, 0, 2, 0], ClassLabel(names=["z", "y", "x"])), validation="train")
    assert splits.labels.names == ("z", "y", "x")
    assert splits.train_counts == (2, 0, 2)
    assert "class 'y' without a training row" in splits.report.warnings[-1]


MULTI = {
    "lists of names": ([["red", "round"], [], ["red"], ["big"]], None),
    "lists of ClassLabel": ([[1, 2], [], [1], [0]], List(ClassLabel(names=["big", "red", "round"]))),
    "bars": (["red|round", "", "red", "big"], None),
    "commas": (["red, round", "", "red", "big"], None),
    "missing": (["red|round", None, "red", "big"], None),
}


@pytest.mark.parametrize("case", MULTI)
def test_multi_labels(tmp_path, case):
    values, feature = MULTI[case]
    splits = load(disk(tmp_path, values, feature), labels="multi", validation="train")
    assert splits.labels == Labels("multi", ("big", "red", "round"))
    assert list(splits.train["label"]) == [[0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert splits.train_counts == (1, 2, 1)


def test_regression(tmp_path):
    splits = load(disk(tmp_path, [0.5, 1.0, 2.5, -1.0, 3.0]), labels="regression")
    assert splits.labels == Labels("regression", ("label",))
    assert splits.train_counts == ()
    assert sizes(splits) == [4, 1]
    assert isinstance(splits.train[0]["label"], float)


def test_one_split_for_a_model_that_knows_its_labels(tmp_path):
    path = write_csv(tmp_path / "r.csv", [("fine", 1), ("poor", 0)])
    labels = Labels("single", ("negative", "positive"))
    assert list(load_split(DataSpec(path=str(path)), "train", labels)["label"]) == [1, 0]
    only_text = write_csv(tmp_path / "t.csv", [("fine",), ("poor",)], header=("text",))
    rows = load_split(DataSpec(path=str(only_text)), "train", labels, labelled=False)
    assert rows.column_names == ["text", "row"]
    with pytest.raises(DataError, match="no column 'label'"):
        load_split(DataSpec(path=str(only_text)), "train", labels)


WEIGHTS = {
    "none": ("none", None),
    "balanced": ("balanced", [2 / 3, 2.0]),
    "named": ({"b": 3.0}, [2 / 3, 2.0]),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_class_weights_have_mean_one_over_the_samples(case):
    given, expected = WEIGHTS[case]
    weights = class_weights(DataSpec(class_weights=given), Labels("single", ("a", "b")), (9, 3))
    assert weights == (expected if expected is None else pytest.approx(expected))
    if weights:
        assert weights[0] * 9 + weights[1] * 3 == pytest.approx(12)


# ---- images as files hold them -----------------------------------------------------------------------------


def palette(colour: tuple[int, ...]) -> PILImage.Image:
    image = PILImage.new("RGB", (4, 4), colour).convert("P", palette=PILImage.Palette.ADAPTIVE)
    image.info["transparency"] = bytes([255, 128])
    return image


MODES = {
    "greyscale": (PILImage.new("L", (4, 4), 90), "png", (90, 90, 90)),
    "16-bit greyscale": (PILImage.fromarray(np.full((4, 4), 90 * 256, np.uint16)), "png", (90, 90, 90)),
    "black and white": (PILImage.new("1", (4, 4), 1), "png", (255, 255, 255)),
    "palette": (palette((10, 200, 30)), "png", (10, 200, 30)),
    "alpha": (PILImage.new("RGBA", (4, 4), (10, 200, 30, 0)), "png", (10, 200, 30)),
    "grey alpha": (PILImage.new("LA", (4, 4), (90, 128)), "png", (90, 90, 90)),
    "cmyk": (PILImage.new("CMYK", (4, 4), (255, 0, 255, 0)), "tif", (0, 255, 0)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    image, ending, expected = MODES[mode]
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        image.save(tmp_path / label / f"x.{ending}")
    read = load(tmp_path, validation="train").train[0]["image"]
    assert (read.mode, read.getpixel((1, 1))) == ("RGB", expected)


def test_a_photo_that_lies_on_its_side_is_turned_upright(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6  # shot with the camera turned
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        PILImage.new("RGB", (8, 4)).save(tmp_path / label / "x.jpg", exif=exif)
    assert load(tmp_path, validation="train").train[0]["image"].size == (4, 8)


# ---- bad data, named ---------------------------------------------------------------------------------------


def broken_image(folder: Path) -> Path:
    write_images(folder, {"ant": 6, "bee": 6})
    (folder / "ant" / "ant3.png").write_bytes(b"this is no image")
    return folder


def truncated_image(folder: Path) -> Path:
    write_images(folder, {"ant": 6, "bee": 6}, size=(64, 64))
    path = folder / "bee" / "bee4.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PILImage.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    return folder


def with_row(text: str | None, label: object):
    return lambda folder: write_csv(folder / "r.csv", [*REVIEWS[:5], (text, label), *REVIEWS[5:]])


BAD_ROWS = {
    "empty text": (with_row("", "bad"), {}, "no text, 1 row: row 5 of 'train'"),
    "blank text": (with_row("  ", "bad"), {}, "empty text, 1 row: row 5 of 'train'"),
    "no label": (with_row("fine", ""), {}, "no label, 1 row: row 5 of 'train'"),
    "nan target": (
        lambda f: disk(f, [0.5, float("nan"), 1.5, 2.0, 3.0]),
        {"labels": "regression"},
        "label nan is not finite, 1 row: row 1 of 'train'",
    ),
    "infinite target": (
        lambda f: disk(f, [0.5, float("inf"), 1.5, 2.0, 3.0]),
        {"labels": "regression"},
        "label inf is not finite, 1 row: row 1 of 'train'",
    ),
    "target that is no number": (
        lambda f: disk(f, ["0.5", "much", "1.5", "2", "1"]),
        {"labels": "regression"},
        "label 'much' is no number, 1 row: row 1 of 'train'",
    ),
    "hidden label": (
        lambda f: disk(f, [0, -1, 1, 1, 0, 0, 1], ClassLabel(names=["a", "b"])),
        {},
        "no label, 1 row: row 1 of 'train'",
    ),
    "broken image": (broken_image, {}, "the image cannot be decoded (it is no image PIL knows), 1 row: '"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(tmp_path, case):
    make, keys, expected = BAD_ROWS[case]
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        load(path, **keys)
    message = str(caught.value)
    assert expected in message
    assert "1 of" in message
    assert "data.on_error: skip" in message
    report = load(path, on_error="skip", **keys).report
    assert report.skipped == {"train": 1}
    assert len(report.skipped_rows) == 1


def test_a_truncated_image_is_named_when_it_is_read_or_skipped_up_front(tmp_path):
    path = truncated_image(tmp_path)
    splits = load(path, validation="train")
    with pytest.raises(
        DataError, match=r"the image '.*bee4\.jpg' cannot be decoded: .*truncated.*on_error: skip"
    ):
        list(splits.train)
    splits = load(path, validation="train", on_error="skip")
    assert "bee4.jpg" in splits.report.skipped_rows[0]
    assert len(list(splits.train)) == 12


def test_a_missing_image_in_a_table_is_named(tmp_path):
    image = PILImage.new("RGB", (5, 5))
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    data = Dataset.from_dict({"image": [image, None, image, image], "label": [0, 1, 0, 1]}, features=features)
    data.save_to_disk(str(tmp_path / "disk"))
    expected = r"cannot be decoded \(the cell is empty\), 1 row: row 1 of 'train'"
    with pytest.raises(DataError, match=expected):
        load(tmp_path / "disk", validation="train")
    assert load(tmp_path / "disk", validation="train", on_error="skip").report.rows["train"] == 3


def test_of_very_many_images_only_a_sample_is_looked_at_up_front(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MAX_HEADERS", 10)
    splits = load(broken_image(tmp_path), validation="train")
    assert splits.report.image_side == 10
    with pytest.raises(DataError, match=r"ant3\.png' cannot be decoded"):
        list(splits.train)


def test_a_label_that_train_lacks_is_named_with_its_rows(tmp_path):
    write_csv(tmp_path / "train.csv", REVIEWS)
    write_csv(tmp_path / "dev.csv", [("so so", "mixed"), *REVIEWS[:4], ("hm", "mixed")])
    with pytest.raises(
        DataError,
        match=r"label 'mixed' is not one that is learned \(bad, good\), 2 rows: row 0 of 'dev', row 5 of 'dev'",
    ):
        load(tmp_path)
    report = load(tmp_path, on_error="skip").report
    assert (report.rows["validation"], report.skipped) == (4, {"validation": 2})


def test_many_bad_rows_are_counted(tmp_path):
    path = write_csv(tmp_path / "r.csv", [*REVIEWS, *[("", "bad")] * 30])
    with pytest.raises(DataError, match=r"30 of 50 rows cannot be used(?s:.*)row 20 of .* and 25 more"):
        load(path)


ERRORS = {
    "missing file": (lambda f: f / "reviews.csv", {}, "there is no such file or folder"),
    "nearest file": (
        lambda f: write_csv(f / "reviews.csv", REVIEWS).with_name("review.csv"),
        {},
        "Did you mean 'reviews.csv'?",
    ),
    "hub offline": (lambda f: "no-such-user/no-such-data", {}, "the Hub cannot be reached"),
    "empty folder": (lambda f: f, {}, "it holds nothing. Expected is one folder of images per class"),
    "other files": (lambda f: ((f / "x.doc").write_text("x"), f)[1], {}, "it holds x.doc."),
    "unreadable kind": (
        lambda f: ((f / "x.doc").write_text("x"), f / "x.doc")[1],
        {},
        "Allowed are .csv, .tsv",
    ),
    "two kinds at once": (
        lambda f: (write_csv(f / "a.csv", REVIEWS), jsonl(f / "b.jsonl", DICTS), f)[2],
        {},
        "different kinds",
    ),
    "broken csv": (
        lambda f: ((f / "x.csv").write_text('text,label\n"a,b\n'), f / "x.csv")[1],
        {},
        "cannot be read as",
    ),
    "unknown split": (
        lambda f: write_csv(f / "r.csv", REVIEWS),
        {"validation": "vaildation"},
        "there is no split or file 'vaildation'. Splits there are: train.",
    ),
    "nearest split": (lambda f: "shipped/digits", {"validation": "tset"}, "Did you mean 'test'?"),
    "bad slice": (
        lambda f: write_csv(f / "r.csv", REVIEWS),
        {"train": "train[:half]"},
        "cannot be read at 'half'. A slice is name[from:to]",
    ),
    "empty slice": (
        lambda f: write_csv(f / "r.csv", REVIEWS),
        {"train": "train[30:]"},
        "'train' has 20 rows",
    ),
    "fraction beside a split": (
        lambda f: "shipped/digits",
        {"validation": 0.25},
        "has its own split 'validation', which would go unused. Write `validation: auto` to measure on it, "
        "or name "
        "slices: `train: train[:75%]` and `validation: train[75%:]`.",
    ),
    "missing column": (
        lambda f: write_csv(f / "r.csv", REVIEWS, header=("reviewtext", "label")),
        {"columns": ColumnsSpec(text="review_text")},
        "there is no column 'review_text' to read the text from. Did you mean 'reviewtext'? "
        "The columns are reviewtext, label. Name the right one in data.columns.text.",
    ),
    "missing label": (
        lambda f: write_csv(f / "r.csv", REVIEWS, header=("text", "stars")),
        {},
        "no column 'label' to read the label from. The columns are text, stars.",
    ),
    "column missing in one split": (
        lambda f: (
            write_csv(f / "train.csv", REVIEWS),
            write_csv(f / "dev.csv", [("x",)], header=("text",)),
            f,
        )[2],
        {},
        "'dev' (validation) has no column 'label', which train has. Its columns are text.",
    ),
    "one class": (lambda f: disk(f, ["a"] * 5), {}, "only one class, 'a'; there is nothing to tell apart"),
    "lists as single": (lambda f: disk(f, [["a"], ["b"]]), {}, "Set `data.labels: multi`"),
    "numbers as single": (lambda f: disk(f, [0.5, 1.5]), {}, "Set `data.labels: regression`"),
    "zeros and ones as multi": (
        lambda f: disk(f, [[0, 1, 1], [1, 0, 0]]),
        {"labels": "multi"},
        "names a label twice",
    ),
    "lists as texts": (
        lambda f: (Dataset.from_dict({"text": [["a"]], "label": [1]}).save_to_disk(str(f / "d")), f / "d")[1],
        {},
        "holds lists, not texts",
    ),
    "one row of each class": (
        lambda f: write_csv(f / "r.csv", [("x", "a"), ("y", "b")]),
        {},
        "cannot be split into train and validation",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_said(tmp_path, case):
    make, keys, expected = ERRORS[case]
    with pytest.raises(DataError) as caught:
        load(make(tmp_path), **keys)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_task_that_does_not_fit_the_data_is_said(tmp_path):
    path = write_csv(tmp_path / "r.csv", REVIEWS)
    with pytest.raises(DataError, match="The data looks like texts: is `task` right"):
        load_splits(DataSpec(path=str(path)), seed=0, task="image-classification")


def test_class_weights_that_do_not_fit():
    labels = Labels("single", ("ants", "bees"))
    with pytest.raises(DataError, match=r"there is no label 'bee'\. Did you mean 'bees'"):
        class_weights(DataSpec(class_weights={"bee": 2.0}), labels, (1, 1))
    with pytest.raises(DataError, match=r"need `data\.labels: single`"):
        class_weights(DataSpec(class_weights="balanced"), Labels("multi", ("a", "b")), (1, 1))


def test_a_label_column_that_looks_like_an_id_is_warned_about(tmp_path):
    rows = [(f"text {n}", n // 2) for n in range(120)]
    splits = load(write_csv(tmp_path / "r.csv", rows), validation="train")
    assert not any("classes for" in warning for warning in splits.report.warnings)
    rows = [(f"text {n}", n) for n in range(120)]
    splits = load(write_csv(tmp_path / "r.csv", rows), validation="train")
    assert "120 classes for 120 training rows" in splits.report.warnings[-1]
