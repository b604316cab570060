"""Batches: every sample once, in an order that neither processes, workers nor resuming change."""

from __future__ import annotations

import itertools
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import runs
from hf_finetune.augment.spec import HorizontalFlip, Mixup, RandomResizedCrop, WordDropout
from hf_finetune.data.labels import Labels
from hf_finetune.data.loaders import (
    EvalSet,
    TrainSet,
    epoch_batches,
    eval_loader,
    eval_tokens,
    iterate_batches,
    iterate_epochs,
    share,
    train_loader,
)
from hf_finetune.data.order import cut_by_tokens, share_by_tokens
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.splits import load_splits
from hf_finetune.errors import DataError, RecipeError
from hf_finetune.explain import explain_recipe
from hf_finetune.models.backbone import ImageInput, TextInput
from hf_finetune.setup import MOST_WORKERS, SMALL_IMAGE_SET, worker_count

IMAGES = ImageInput((16, 16), (0.5,) * 3, (0.5,) * 3, 1.0, "center", "bilinear")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CROP_AND_FLIP = [RandomResizedCrop(), HorizontalFlip()]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=30,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def texts(n: int = 40) -> Dataset:
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(WORDS, size=1 + (7 * i) % 20)) for i in range(n)]
    return Dataset.from_dict({"text": words, "label": [i % 2 for i in range(n)], "row": list(range(n))})


@pytest.fixture(scope="module")
def digits():
    return load_splits(DataSpec(max_samples=50), seed=0)


# ---- order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, np.arange(1000) % 37], ids=["images", "texts"])
@pytest.mark.parametrize(("n", "batch_size"), [(1000, 32), (1000, 1000), (7, 3), (5, 8), (1, 1), (64, 32)])
def test_every_sample_is_in_one_batch_and_the_order_follows_seed_and_epoch(n, batch_size, lengths):
    lengths = None if lengths is None else lengths[:n]
    batches = epoch_batches(n, batch_size, seed=3, epoch=2, lengths=lengths)
    assert sorted(index for batch in batches for index in batch) == list(range(n))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    assert len(batches) == -(-n // batch_size)
    assert batches == epoch_batches(n, batch_size, seed=3, epoch=2, lengths=lengths)
    if n > 10:
        assert batches != epoch_batches(n, batch_size, seed=3, epoch=3, lengths=lengths)
        assert batches != epoch_batches(n, batch_size, seed=4, epoch=2, lengths=lengths)


def test_texts_of_similar_length_share_a_batch_and_long_ones_come_at_any_time():
    lengths = np.random.default_rng(0).integers(5, 200, 5000)
    batches = epoch_batches(5000, 16, seed=0, epoch=0, lengths=lengths)
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.1 * lengths.sum()  # in random order it is 1.8 times
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


SHARES = [
    # global batch, processes, micro-batch, pairs
    (32, 1, 32, False),
    (32, 1, 8, False),
    (32, 2, 4, False),
    (33, 1, 8, False),
    (33, 4, 3, False),
    (33, 4, 4, True),
    (31, 2, 5, True),
    (7, 2, 2, True),
    (3, 4, 2, False),
    (3, 4, 2, True),
    (1, 3, 1, False),
    (2, 2, 1, True),
    (5, 1, 1, True),
]


@pytest.mark.parametrize(("n", "world", "micro", "pairs"), SHARES)
def test_processes_share_a_batch(n, world, micro, pairs):
    batch = [100 + i for i in range(n)]
    shares = [share(batch, rank, world, micro, pairs) for rank in range(world)]
    assert len({len(each) for each in shares}) == 1  # all processes step together
    real = [
        i for each in shares for indices, weights in each for i, w in zip(indices, weights, strict=True) if w
    ]
    assert real == batch  # contiguous, and each sample once
    for indices, weights in (micro_batch for each in shares for micro_batch in each):
        assert min(micro, 2) <= len(indices) <= max(micro, 2 if pairs else 1)
        if pairs and weights[0]:
            assert (indices[0] - 100) % 2 == 0
            assert len(indices) % 2 == 0 or indices[-1] == batch[-1]
    sizes = [sum(weights) for _, weights in shares[0]]
    assert max(sizes) - min(sizes) <= (2 if pairs else 1)


def test_a_sample_left_alone_is_repeated_without_weight():
    assert share([4], 0, 1, 8) == [([4, 4], [1.0, 0.0])]
    assert share([4], 0, 1, 8, pairs=True) == [([4, 4], [1.0, 0.0])]
    assert share([4, 5, 6], 1, 2, 8) == [([6, 6], [1.0, 0.0])]
    assert share([4], 1, 2, 8) == [([4, 4], [0.0, 0.0])]
    assert share([4, 5], 0, 1, 1) == [([4], [1.0]), ([5], [1.0])]


LENGTHS = np.random.default_rng(0).integers(3, 31, 64)


@pytest.mark.parametrize("tokens", [30, 60, 100, 1000])
@pytest.mark.parametrize(
    ("n", "world", "micro"), [(32, 1, 32), (32, 2, 16), (33, 4, 3), (7, 2, 2), (1, 3, 1), (2, 4, 8)]
)
def test_micro_batches_hold_as_many_tokens_as_they_may(n, world, micro, tokens):
    batch = sorted(range(n), key=LENGTHS.__getitem__)
    shares = [share_by_tokens(batch, rank, world, micro, LENGTHS, tokens) for rank in range(world)]
    assert len({len(each) for each in shares}) == 1  # all processes step together
    flat = [micro_batch for each in shares for micro_batch in each]
    assert [i for indices, weights in flat for i, w in zip(indices, weights, strict=True) if w] == batch
    assert all(len(indices) * LENGTHS[indices].max() <= tokens for indices, _ in flat)
    assert all(len(indices) <= max(micro, 2) for indices, _ in flat)
    if tokens == 1000 and n > world:
        assert shares == [
            share(batch, rank, world, micro) for rank in range(world)
        ]  # room for all: nothing is cut


def test_no_run_of_samples_could_hold_the_next():
    order = np.argsort(-LENGTHS).tolist()
    cut = cut_by_tokens(order, LENGTHS, 90)
    assert [index for each in cut for index in each] == order
    for one, other in itertools.pairwise(cut):
        assert len(one) * LENGTHS[one].max() <= 90 < (len(one) + 1) * LENGTHS[[*one, other[0]]].max()


# ---- samples -----------------------------------------------------------------------------------------------


def test_a_view_is_the_same_whenever_it_is_asked_for(digits):
    first = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP, seed=1)
    second = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP, seed=1)
    torch.rand(5)
    for index in (3, 0, 7):
        assert torch.equal(
            first[4, index]["inputs"]["pixel_values"], second[4, index]["inputs"]["pixel_values"]
        )
    views = {tuple(first[epoch, 3]["inputs"]["pixel_values"].flatten().tolist()) for epoch in range(5)}
    assert len(views) == 5


def test_texts_are_tokenised_padded_and_cut(tokenizer):
    evalset = EvalSet(texts(), Labels("single", ("a", "b")), TextInput(tokenizer, 30), max_length=12)
    batch = next(iter(eval_loader(evalset, batch_size=40)))
    ids, mask = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]
    assert ids.shape == (40, 12)
    assert torch.equal(mask, (ids != 0).long())
    expected = [min(12, 2 + len(text.split())) for text in texts()["text"]]
    assert [expected[i] for i in batch["indices"]] == mask.sum(1).tolist()
    assert evalset.notes == ["50.0% of the texts are longer than 12 tokens and are cut"]
    assert EvalSet(texts(), Labels("single", ("a", "b")), TextInput(tokenizer, 30)).notes == []


def test_the_backbones_limit_holds_when_it_is_smaller(tokenizer):
    evalset = EvalSet(texts(), Labels("single", ("a", "b")), TextInput(tokenizer, 8), max_length=100)
    assert max(evalset.lengths) == 8


def test_pairs_of_texts_are_told_apart(tokenizer):
    rows = Dataset.from_dict({"text": ["one two"], "text_pair": ["three"], "label": [0]})
    evalset = EvalSet(rows, Labels("single", ("a", "b")), TextInput(tokenizer, 30))
    inputs = evalset[0]["inputs"]
    assert tokenizer.decode(inputs["input_ids"]) == "[CLS] one two [SEP] three [SEP]"
    assert inputs["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_changed_words_follow_seed_epoch_and_index(tokenizer):
    train = TrainSet(
        texts(), Labels("single", ("a", "b")), TextInput(tokenizer, 30), [WordDropout(p=0.5)], seed=0
    )
    assert train[0, 5]["inputs"] == train[0, 5]["inputs"]
    assert len({tuple(train[epoch, 5]["inputs"]["input_ids"]) for epoch in range(5)}) > 1
    assert len(train[0, 5]["inputs"]["input_ids"]) <= len(train.tokens[5]["input_ids"])


LABELS = {
    "single": ([1, 0], Labels("single", ("a", "b")), torch.long, (2,)),
    "multi": ([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], Labels("multi", ("a", "b", "c")), torch.float32, (2, 3)),
    "regression": ([0.5, 2.0], Labels("regression", ("y",)), torch.float32, (2,)),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_each_kind(tokenizer, kind):
    values, labels, dtype, shape = LABELS[kind]
    rows = Dataset.from_dict({"text": ["one", "two two"], "label": values})
    batch = next(iter(eval_loader(EvalSet(rows, labels, TextInput(tokenizer, 9)), batch_size=2)))
    assert batch["labels"].dtype == dtype
    assert batch["labels"].shape == shape
    assert batch["labels"].tolist() == [values[i] for i in batch["indices"]]
    assert batch["weights"].tolist() == [1.0, 1.0]


def test_rows_without_labels_make_batches_without(tokenizer):
    rows = Dataset.from_dict({"text": ["one", "two two"]})
    batch = next(
        iter(eval_loader(EvalSet(rows, Labels("single", ("a", "b")), TextInput(tokenizer, 9)), batch_size=2))
    )
    assert "labels" not in batch


def test_an_augmentation_of_the_other_modality_is_refused(digits, tokenizer):
    with pytest.raises(RecipeError, match="word_dropout cannot be applied to images"):
        TrainSet(digits.train, digits.labels, IMAGES, [WordDropout()])
    with pytest.raises(RecipeError, match="horizontal_flip cannot be applied to texts"):
        TrainSet(texts(), Labels("single", ("a", "b")), TextInput(tokenizer, 9), [HorizontalFlip()])


# ---- loaders -----------------------------------------------------------------------------------------------


def epoch_of(train: TrainSet, *, epoch: int = 0, start: int = 0, **options) -> list[list[dict]]:
    return list(iterate_batches(train_loader(train, **options), epoch, start))


def joined(batches: list[list[dict]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices and pixels of the real samples in the order of training."""
    micro = [each for batch in batches for each in batch]
    real = torch.cat([each["weights"] for each in micro]) > 0
    return (
        torch.cat([each["indices"] for each in micro])[real],
        torch.cat([each["inputs"]["pixel_values"] for each in micro])[real],
    )


def test_the_batches_are_those_of_the_order(digits):
    train = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP, seed=5)
    batches = epoch_of(train, batch_size=8, micro_batch_size=3, epoch=2)
    assert [[i for micro in batch for i in micro["indices"].tolist()] for batch in batches] == epoch_batches(
        50, 8, 5, 2
    )
    assert [batch[0]["batch_size"] for batch in batches] == [8] * 6 + [2]
    assert [len(batch) for batch in batches] == [3] * 6 + [1]


def test_micro_batches_and_processes_do_not_change_what_is_seen(digits):
    train = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP, seed=5)
    indices, pixels = joined(epoch_of(train, batch_size=8))
    for world, micro in ((1, 3), (2, 4), (2, 1), (3, 2)):
        ranks = [
            epoch_of(train, batch_size=8, micro_batch_size=micro, rank=rank, world=world)
            for rank in range(world)
        ]
        together = [[each for rank in ranks for each in rank[step]] for step in range(7)]
        assert torch.equal(joined(together)[0], indices), (world, micro)
        assert torch.equal(joined(together)[1], pixels), (world, micro)


def test_workers_do_not_change_what_is_seen_epoch_after_epoch(digits):
    train = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP, seed=5)
    plain = train_loader(train, batch_size=8, micro_batch_size=4)
    workers = train_loader(train, batch_size=8, micro_batch_size=4, workers=2)
    for epoch, start in ((0, 0), (1, 0), (1, 3)):
        expected = joined(list(iterate_batches(plain, epoch, start)))
        actual = joined(list(iterate_batches(workers, epoch, start)))
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_follows_epoch(digits, workers):
    train = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP, seed=5)
    loader = train_loader(train, batch_size=8, micro_batch_size=4, workers=workers)
    batches = iterate_epochs(loader, 1, 5, steps=2 + 7 + 3)
    found = list(batches)  # to the end of the third epoch
    expected = epoch_of(train, batch_size=8, micro_batch_size=4, epoch=1, start=5)
    for epoch in (2, 3):
        expected += epoch_of(train, batch_size=8, micro_batch_size=4, epoch=epoch)
    assert [len(batch) for batch in found] == [len(batch) for batch in expected]
    for one, other in zip(joined(found), joined(expected), strict=True):
        assert torch.equal(one, other)
    left = iterate_epochs(loader, 3, 0, steps=100)
    for _ in range(7):
        next(left)  # the next epoch has begun by now
    again = list(iterate_epochs(loader, 7, 2, steps=1))
    assert torch.equal(joined(again)[1], joined(epoch_of(train, batch_size=8, epoch=7, start=2))[1])


def test_an_epoch_left_early_leaves_nothing_behind(digits):
    train = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP, seed=5)
    workers = train_loader(train, batch_size=8, workers=1)
    next(iterate_batches(workers, 0))
    assert torch.equal(
        joined(list(iterate_batches(workers, 1)))[1], joined(epoch_of(train, batch_size=8, epoch=1))[1]
    )


def test_reading_data_leaves_torchs_generator_alone(digits):
    train = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP, seed=5)
    loaders = [train_loader(train, batch_size=25, workers=workers) for workers in (0, 1)]
    state = torch.get_rng_state()
    for loader in loaders:
        list(iterate_batches(loader, 0))
    list(eval_loader(EvalSet(digits.train, digits.labels, IMAGES), batch_size=50))
    assert torch.equal(torch.get_rng_state(), state)


def test_sets_can_be_sent_to_workers_that_are_not_forked(digits, tokenizer):
    image = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP)
    text = TrainSet(texts(), Labels("single", ("a", "b")), TextInput(tokenizer, 30), [WordDropout()])
    sent = pickle.loads(pickle.dumps((image, text)))
    assert torch.equal(sent[0][1, 2]["inputs"]["pixel_values"], image[1, 2]["inputs"]["pixel_values"])
    assert sent[1][1, 2]["inputs"] == text[1, 2]["inputs"]


@pytest.mark.parametrize("start", [0, 1, 6, 7])
def test_an_epoch_can_start_in_the_middle(digits, start):
    train = TrainSet(digits.train, digits.labels, IMAGES, CROP_AND_FLIP, seed=5)
    whole = epoch_of(train, batch_size=8, epoch=1)
    rest = epoch_of(train, batch_size=8, epoch=1, start=start)
    assert len(rest) == 7 - start
    assert [batch[0]["indices"].tolist() for batch in rest] == [
        batch[0]["indices"].tolist() for batch in whole[start:]
    ]


def test_mixed_pairs_stay_together(digits):
    train = TrainSet(digits.train, digits.labels, IMAGES, [Mixup()], seed=5)
    order = epoch_batches(50, 10, 5, 0)
    ranks = [epoch_of(train, batch_size=10, micro_batch_size=3, rank=rank, world=2) for rank in range(2)]
    for step, batch in enumerate(order):
        pairs = {tuple(batch[i : i + 2]) for i in range(0, len(batch), 2)}
        for micro in (each for rank in ranks for each in rank[step]):
            indices = micro["indices"][micro["weights"] > 0].tolist()
            assert {tuple(indices[i : i + 2]) for i in range(0, len(indices), 2)} <= pairs


@pytest.mark.parametrize("world", [1, 2, 3, 60])
def test_evaluation_measures_every_sample_once(digits, world):
    evalset = EvalSet(digits.train, digits.labels, IMAGES)
    indices = [
        index
        for rank in range(world)
        for batch in eval_loader(evalset, batch_size=8, rank=rank, world=world)
        for index in batch["indices"].tolist()
    ]
    assert indices == list(range(50))


@pytest.mark.parametrize("world", [1, 3])
def test_short_texts_share_larger_batches(tokenizer, world):
    evalset = EvalSet(texts(), Labels("single", ("a", "b")), TextInput(tokenizer, 30))
    tokens = eval_tokens(evalset.lengths, 4, torch.device("cuda"))
    assert tokens == 4 * max(evalset.lengths)
    batches = [
        batch
        for rank in range(world)
        for batch in eval_loader(evalset, batch_size=4, tokens=tokens, rank=rank, world=world)
    ]
    assert sorted(index for batch in batches for index in batch["indices"].tolist()) == list(range(40))
    assert all(batch["inputs"]["input_ids"].numel() <= tokens for batch in batches)
    assert len(batches) < 10  # of four each
    assert eval_tokens(evalset.lengths, 4, torch.device("cpu")) is None
    assert eval_tokens(evalset.lengths, 4, torch.device("cpu"), 50) == 50
    assert eval_tokens(None, 4, torch.device("cuda"), None) is None


def test_text_evaluation_measures_every_sample_once(tokenizer):
    evalset = EvalSet(texts(), Labels("single", ("a", "b")), TextInput(tokenizer, 30))
    batches = [b for rank in range(3) for b in eval_loader(evalset, batch_size=4, rank=rank, world=3)]
    assert sorted(torch.cat([batch["indices"] for batch in batches]).tolist()) == list(range(40))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_on_the_way_is_named_without_a_traceback(tmp_path, workers):
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        for n in range(3):
            Image.new("RGB", (30, 30)).save(tmp_path / label / f"{n}.png")
    splits = load_splits(DataSpec(path=str(tmp_path), validation="train"), seed=0)
    broken = tmp_path / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    loader = eval_loader(EvalSet(splits.validation, splits.labels, IMAGES), batch_size=2, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    if workers:
        loader._iterator._shutdown_workers()  # left to the garbage collector it takes torch 5 seconds
    assert str(caught.value).startswith(f"data: the image '{broken}' cannot be decoded: ")
    assert str(caught.value).endswith("or set `data.on_error: skip` to leave such rows out.")
    assert "Traceback" not in str(caught.value)


def test_worker_count():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert worker_count(3, "text", 9, 1, cpu)[0] == 3
    assert worker_count("auto", "text", 10_000, 1, gpu)[0] == 0
    assert worker_count("auto", "image", SMALL_IMAGE_SET, 1, gpu)[0] == 0
    assert (
        1
        <= worker_count("auto", "image", 10_000, 1000, gpu)[0]
        <= worker_count("auto", "image", 10_000, 1, gpu)[0]
        <= MOST_WORKERS
    )
    assert 1 <= worker_count("auto", "image", 10_000, 1, cpu)[0] <= 2


def test_images_that_lie_in_a_table(tmp_path: Path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    rows = Dataset.from_dict(
        {"image": [(tmp_path / "red.png").read_bytes()] * 4, "label": ["x", "y"] * 2},
        features=Features({"image": ImageFeature(), "label": Value("string")}),
    )
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    splits = load_splits(DataSpec(path=str(tmp_path / "rows.parquet")), seed=0)
    pixels = EvalSet(splits.train, splits.labels, IMAGES)[0]["inputs"]["pixel_values"]
    assert pixels[:, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_explain_says_how_many_texts_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain_recipe(runs.recipe("bert", strategy="frozen", data={"max_length": 5}), tmp_path)
    shown = capsys.readouterr().out
    for split in ("train", "validation"):
        assert re.search(
            rf"note: {split}: [1-9][\d.]*% of the texts are longer than 5 tokens and are cut", shown
        )
