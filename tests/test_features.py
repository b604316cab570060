"""What is frozen is computed once, and nothing else changes: cached runs end where uncached ones do."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

import nursery
import runs
import tiny
from hf_finetune.cli import main
from hf_finetune.data.labels import Labels
from hf_finetune.errors import Interrupted
from hf_finetune.features import compute, disk, feed, store
from hf_finetune.features.spec import CacheSpec
from hf_finetune.features.trials import NoCutError, find_cut
from hf_finetune.freeze import FreezeScope, fingerprints, frozen_tensors, sleeping_modules
from hf_finetune.models.load import forward, load_backbone, module_groups
from hf_finetune.models.spec import BackboneSpec
from hf_finetune.recipe import Recipe, dump_recipe
from hf_finetune.runfolder import Run
from hf_finetune.setup import prepare
from hf_finetune.spec import Size, parse_size
from hf_finetune.strategies.phase import Phase, plan_phases
from test_processes import SEVERAL

FAMILIES = [
    *(("image", f"timm-{name}") for name in tiny.TIMM),
    *(("text", name) for name in tiny.TEXT),
    *(("image", f"vision-{name}") for name in tiny.VISION),
]
UNCUT = {("albert", "last:2"): "no block"}
"""Where nothing but embeddings is frozen."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "cache"))


# ---- the cut -------------------------------------------------------------------------------------------------------


def cut_of(folder: Path, modality: Any, family: str, train: str) -> tuple[Any, Any, list[str]]:
    """Return a backbone that is set up for a phase, its cut, and what sleeps."""
    timm = family.startswith("timm-")
    (tiny.timm_folder if timm else tiny.transformers_folder)(folder, family.removeprefix("timm-"))
    loaded = load_backbone(BackboneSpec(id=str(folder)), Labels("single", ("a", "b", "c")), modality, seed=0)
    (plan,), _ = plan_phases([Phase(train=train, batch_norm="frozen")], loaded.anatomy, 1e-3)
    homes = module_groups(loaded.model, loaded.anatomy)
    asleep = sleeping_modules(loaded.model, plan, loaded.anatomy, homes)
    FreezeScope(loaded.model).apply(plan, loaded.anatomy, homes)
    batches = [tiny.batch(modality, 2, seed=1), tiny.batch(modality, 3, seed=2)]
    if modality == "text":
        batches[0] = {name: tensor[:, :5] for name, tensor in batches[0].items()}
    return loaded, find_cut(loaded.model, plan.multiples.keys(), set(asleep), batches), asleep


@torch.no_grad()
@pytest.mark.parametrize(("modality", "family"), FAMILIES, ids=[family for _, family in FAMILIES])
def test_the_rest_of_every_family_runs_on_what_was_stored(modality: str, family: str, tmp_path: Path) -> None:
    for train in ("head", "last:2"):
        loaded, cut, asleep = cut_of(tmp_path / train, modality, family, train)
        model = loaded.model
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_()  # a new output layer says nothing
        batch = tiny.batch(modality, 4, seed=3)
        frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.train()
        captured = cut.capture(model, batch)
        assert runs.same(frozen, model.state_dict())
        model.eval()
        assert runs.same(
            captured, cut.capture(model, batch)
        )  # whatever mode is asked for, what sleeps is the same
        texts = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
        for name, leaf in cut.stored.items():
            if leaf.ragged:  # padding is not stored
                captured[name] = captured[name] * batch["attention_mask"][..., None]
        assert torch.allclose(cut.forward(model, texts | captured), forward(model, batch), atol=1e-5)
        assert torch.equal(cut.forward(model, batch), forward(model, batch))
        assert all("forward" not in module.__dict__ for module in model.modules())
        assert set(cut.modules) <= set(asleep) | {
            name for name, m in model.named_modules() if not list(m.parameters())
        }


def test_one_token_is_stored_where_one_is_classified(tmp_path: Path) -> None:
    for family, entries in (("timm-vit", 1), ("vision-dinov2", 17)):
        _, cut, _ = cut_of(tmp_path / family, "image", family, "head")
        assert [leaf.shape(1, 0)[1] for leaf in cut.stored.values()] == [entries]


def test_a_network_that_reads_past_the_cut_is_not_cut(tmp_path: Path) -> None:
    class Leaky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.head = torch.nn.Linear(3, 2)
            self.seen: Any = None

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            hidden = self.first(pixels)
            # the sign of a hidden value is read by no other means than Python's
            bonus = 1.0 if float(hidden.sum()) > 0 else 0.0
            return self.head(self.second(hidden)) + bonus

    model = Leaky().eval()
    batches = [{"pixel_values": torch.rand(rows, 3) + 5} for rows in (2, 3)]
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    with pytest.raises(NoCutError, match="reads more than its frozen layers return"):
        find_cut(model, {"head.weight", "head.bias"}, {"first", "second"}, batches)


def test_layers_that_compute_otherwise_while_others_train_are_not_cut() -> None:
    class Dropping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            hidden = torch.nn.functional.dropout(self.first(pixels), 0.5, self.training)
            return self.head(self.second(hidden))

    batches = [{"pixel_values": torch.rand(rows, 8)} for rows in (2, 3)]
    with pytest.raises(NoCutError, match="something else while the others train"):
        find_cut(Dropping(), {"head.weight", "head.bias"}, {"first", "second"}, batches)


def test_a_container_of_sleeping_layers_sleeps(tmp_path: Path) -> None:
    loaded, _, asleep = cut_of(tmp_path, "text", "bert", "head")
    assert "bert.encoder" in asleep
    loaded.model.train()
    forward(loaded.model, tiny.batch("text"))
    assert not loaded.model.bert.encoder.training
    assert loaded.model.training


# ---- cached runs end where uncached ones do -------------------------------------------------------------------------

LONG = {"training": {"steps": 8}, "monitor": {"evaluate": "2 steps"}}
FROZEN = {"strategy": "frozen"} | LONG
LAST = {"strategy": {"phases": [{"train": "last:2"}]}} | LONG
GRADUAL = {"strategy": {"name": "gradual", "every": "2 steps"}} | LONG
LP_FT = {"strategy": {"name": "lp_ft", "probe": "5 steps", "full_lr": "0.1x"}} | LONG
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn frozen": ("resnet", FROZEN),
    "cnn gradual, BatchNorm trains": ("resnet", {**GRADUAL, "strategy": {**GRADUAL["strategy"], "batch_norm": "train"}}),
    "vit last:2, dropout, EMA": ("vit", LAST | {
        "training": {"steps": 8, "ema": {"decay": 0.5}}, "data": {}, "augment": "none"}),
    "vit gradual, micro-batches": ("vit", GRADUAL | {"training": {"steps": 8, "micro_batch_size": 4}}),
    "bert frozen": ("bert", FROZEN),
    "bert last:2, dropout": ("bert", LAST),
    "bert lp_ft": ("bert", LP_FT),
    "lora after the head": ("bert", {"strategy": {"adapter": "lora", "phases": [
        {"train": "head", "for": "4 steps"}, {"train": ["adapters", "head"]}]}} | LONG),
}  # fmt: skip


def finished(name: str, output: Path, **changes: Any) -> Run:
    family, given = ARMS[name]
    return runs.run(family, output, **{**given, **changes})


def cached(run: Run) -> list[str]:
    """Return the phases of a run that read features of both splits."""
    return [
        phase
        for phase, note in run.status["features"].items()
        if note.startswith("computed once") and ";" not in note
    ]


@pytest.mark.parametrize("name", ARMS)
def test_cached_and_uncached_runs_agree(name: str, tmp_path: Path) -> None:
    on, off = finished(name, tmp_path / "on"), finished(name, tmp_path / "off", cache="off")
    assert cached(on)
    assert not cached(off)
    assert "all" not in "".join(cached(on))
    for one, other in zip(on.rows, off.rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one.get("lr") == other.get("lr")
        assert one.get("metrics") == other.get("metrics")
    assert runs.same(runs.weights(on), runs.weights(off), tolerance=1e-5)


def test_a_second_run_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = finished("cnn gradual, BatchNorm trains", tmp_path / "one")
    assert len(cached(first)) == 4
    monkeypatch.setattr(compute, "_batches", lambda *_: pytest.fail("a prefix ran again"))
    second = finished("cnn gradual, BatchNorm trains", tmp_path / "two")
    assert [row["loss"] for row in first.rows] == [row["loss"] for row in second.rows]
    # another rate, another number of epochs, the probe of another strategy
    assert cached(runs.run("resnet", tmp_path / "three", optimizer={"name": "sgd", "lr": 0.1}, **FROZEN))
    assert cached(runs.run("resnet", tmp_path / "four", **LP_FT)) == ["1 head"]


def test_one_pass_computes_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = compute._batches
    monkeypatch.setattr(compute, "_batches", lambda *given: passes.append(1) or real(*given))
    assert len(cached(finished("cnn gradual, BatchNorm trains", tmp_path / "run"))) == 4
    assert len(passes) == 2  # train and validation


# ---- what is not cached, and why ---------------------------------------------------------------------------------------

REASONS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "augmentation": ("resnet", FROZEN | {"augment": ["horizontal_flip"]},
        ["computed once up to global_pool for 7 validation rows", "not for train: augmentation shows other views"]),
    "mixing": ("resnet", FROZEN | {"augment": ["mixup"], "cache": {"views": 2}}, ["not for train: mixup and cutmix"]),
    "read once": ("resnet", {"strategy": "frozen", "training": {"steps": 2}},
        ["not for train: 1 epochs read each of 1 views less than twice", "not for validation: measured once"]),
    "budget": ("resnet", FROZEN | {"cache": {"budget": "1KB"}}, ["no: 1.216KB exceed `cache.budget` (1KB)"]),
    "half the bytes": ("resnet", FROZEN | {"cache": {"budget": "2KB"}}, ["7 validation rows (1.216KB)"]),
    "everything learns": ("resnet", {"strategy": "full"} | LONG, ["no: no block is frozen"]),
    "checkpointing": ("vit", FROZEN | {"training": {"steps": 4, "gradient_checkpointing": True}}, ["no: gradient checkpointing"]),
    "statistics move": ("resnet", {"strategy": {"phases": [{"train": "head", "batch_norm": "adapt"}]}} | LONG, ["no: BatchNorm statistics move"]),
    "a moving average": ("resnet", {"strategy": {"phases": [{"train": "all", "for": "4 steps"}, {"train": "head"}]},
        "training": {"steps": 10, "ema": {"decay": 0.9}}, "monitor": {"evaluate": "2 steps"}},
        ["12 train rows", "not for validation: the average of the weights still moves"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_cached_is_told(name: str, tmp_path: Path) -> None:
    family, changes, texts = REASONS[name]
    run = runs.run(family, tmp_path / "run", **changes)
    assert run.status["status"] == "done"
    told = list(run.status["features"].values())[-1]
    assert all(text in told for text in texts), told


def test_views_are_those_of_the_first_epochs(tmp_path: Path) -> None:
    changes = FROZEN | {
        "augment": ["horizontal_flip", "random_resized_crop"],
        "schedule": {"name": "constant", "warmup": None},
    }
    views = runs.run("vit", tmp_path / "views", **changes, cache={"views": 2})
    free = runs.run("vit", tmp_path / "free", **changes)
    assert "24 train rows and 7 validation rows" in views.status["features"]["1 head"]
    same = [
        one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        for one, two in zip(views.rows, free.rows, strict=True)
    ]
    assert all(same[:6])  # two epochs of two steps
    assert not all(same[6:])


def test_views_of_texts_have_lengths_of_their_own(tmp_path: Path) -> None:
    changes = LAST | {"augment": [{"name": "word_dropout", "p": 0.4}]}
    views = runs.run("bert-dry", tmp_path / "views", **changes, cache={"views": 2})
    free = runs.run("bert-dry", tmp_path / "free", **changes)
    assert "24 train rows and 4 validation rows" in views.status["features"]["1 last:2"]
    for one, two in list(zip(views.rows, free.rows, strict=True))[:6]:
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


# ---- the key -------------------------------------------------------------------------------------------------------


def wanted(
    recipe: Recipe, split: str = "train", change: Callable[[Any], None] = lambda setup: None
) -> compute.Want:
    """Return what the first phase of a recipe wants."""
    setup = prepare(recipe, world_size=1, device=torch.device("cpu"))
    change(setup.backbone.model)
    AcceleratorState._reset_state()
    source = feed.Feed(setup, Accelerator(cpu=True), setup.backbone.model)
    still = fingerprints(frozen_tensors(source.model, setup.plans[0]))
    return source.plan(0, still, source.model).wants[split]


def other_image(folder: Path) -> str:
    """Copy the images and change one, keeping its name and size."""
    source = Path(runs.images())
    for path in source.rglob("*.png"):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    victim = next((folder / "train").rglob("*.png"))
    size = victim.stat().st_size
    Image.new("RGB", (36, 36)).save(victim)
    victim.write_bytes(victim.read_bytes().ljust(size, b"\0"))
    return str(folder)


@torch.no_grad()
def nudge(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            tensors[name].view(-1)[0] += 1e-3

    return change


def test_everything_that_changes_features_changes_their_key(tmp_path: Path) -> None:
    views = FROZEN | {"augment": ["horizontal_flip"], "cache": {"views": 2}}
    base = wanted(runs.recipe("resnet", **FROZEN))
    shown = wanted(runs.recipe("resnet", **views))
    text = wanted(runs.recipe("bert", **FROZEN))
    shorter = json.loads((Path(runs.backbone("resnet")) / "config.json").read_text())
    shorter["pretrained_cfg"]["crop_pct"] = 0.5
    cropped = tmp_path / "cropped"
    cropped.mkdir()
    (cropped / "config.json").write_text(json.dumps(shorter))
    os.link(Path(runs.backbone("resnet")) / "model.safetensors", cropped / "model.safetensors")
    keys = {
        "base": base,
        "content of a row": wanted(
            runs.recipe("resnet", **FROZEN, data={"path": other_image(tmp_path / "copy")})
        ),
        "fewer rows": wanted(runs.recipe("resnet", **FROZEN, data={"path": runs.images(9)})),
        "another split": wanted(runs.recipe("resnet", **FROZEN), "validation"),
        "a weight": wanted(runs.recipe("resnet", **FROZEN), change=nudge("layer2.0.conv1.weight")),
        "a statistic": wanted(runs.recipe("resnet", **FROZEN), change=nudge("bn1.running_mean")),
        "the crop": wanted(replace_backbone(runs.recipe("resnet", **FROZEN), cropped)),
        "the boundary": wanted(runs.recipe("resnet", **LAST)),
        "the format on disk": wanted(runs.recipe("resnet", **FROZEN, cache={"dtype": "fp16"})),
        "the precision": wanted(
            runs.recipe("resnet", **(FROZEN | {"training": {"steps": 8, "precision": "bf16"}}))
        ),
        "views": shown,
        "more views": wanted(
            runs.recipe("resnet", **(views | {"training": {"steps": 16}, "cache": {"views": 3}}))
        ),
        "the seed of views": wanted(runs.recipe("resnet", **(views | {"training": {"steps": 8, "seed": 1}}))),
        "other augmentation": wanted(runs.recipe("resnet", **(views | {"augment": ["vertical_flip"]}))),
        "texts": text,
        "cut texts": wanted(runs.recipe("bert", **FROZEN, data={"max_length": 4})),
    }
    found = {name: want.key for name, want in keys.items()}
    assert len(set(found.values())) == len(found), found
    unchanged = {
        "the seed": runs.recipe("resnet", **(FROZEN | {"training": {"steps": 8, "seed": 3}})),
        "the rate": runs.recipe("resnet", **FROZEN, optimizer={"name": "adamw", "lr": 1.0}),
        "the batch": runs.recipe("resnet", **(FROZEN | {"training": {"steps": 20, "batch_size": 4}})),
    }
    assert {name: wanted(recipe).key for name, recipe in unchanged.items()} == dict.fromkeys(
        unchanged, base.key
    )
    assert wanted(runs.recipe("resnet", **FROZEN), change=nudge("fc.weight")).key == base.key
    for part in base.parts:  # versions and all
        assert store.key_of(base.parts | {part: "another"}) != base.key


def replace_backbone(recipe: Recipe, folder: Path) -> Recipe:
    return recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"id": str(folder)})})


# ---- the disk ------------------------------------------------------------------------------------------------------


def entries() -> list[Path]:
    return [each.folder for each in disk.kept()]


def spoil_bytes(folder: Path) -> None:
    path = folder / "0.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 255
    path.write_bytes(content)


def spoil_features(folder: Path) -> None:
    """Store other values under a hash of their own: what the key does not tell, the comparison does."""
    path = folder / "0.bin"
    values = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32) + 1
    path.write_bytes(values.numpy().tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    next(iter(manifest["columns"].values()))["hash"] = store._hash(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cut_short(folder: Path) -> None:
    (folder / "0.bin").write_bytes((folder / "0.bin").read_bytes()[:-1])


def no_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_features, cut_short, no_json, no_manifest])
def test_spoiled_features_are_computed_anew(
    spoil: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = finished("cnn frozen", tmp_path / "one")
    assert len(entries()) == 2
    for folder in entries():
        spoil(folder)
    second = runs.finetune(runs.recipe("resnet", tmp_path / "two", **FROZEN))
    assert capsys.readouterr().out.count("those on disk are computed anew") == 2
    assert [row["loss"] for row in first.rows] == [row["loss"] for row in second.rows]
    assert len(entries()) == 2


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate"])
def test_a_full_disk_means_no_cache(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = finished("cnn frozen", tmp_path / "off", cache="off")
    monkeypatch.setattr(store.os, call, full)
    run = finished("cnn frozen", tmp_path / "run")
    assert "not for train" in run.status["features"]["1 head"]
    assert "No space left" in run.status["features"]["1 head"]
    assert [row["loss"] for row in run.rows] == [row["loss"] for row in off.rows]
    assert not list((tmp_path / "cache" / "features").iterdir())


def test_a_folder_that_cannot_be_written_means_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "file"))
    run = finished("cnn frozen", tmp_path / "run")
    assert run.status["status"] == "done"
    assert "cannot be written" in run.status["features"]["1 head"]


KILLED = """
import os
from hf_finetune.features import store
from hf_finetune.recipe import load_recipe
from hf_finetune.train import finetune
def die(*_, **__): os._exit(9)
setattr({owner}, {name!r}, die)
finetune(load_recipe({recipe!r}), quiet=True)
"""


@pytest.mark.parametrize(("owner", "name"), [("store", "_write_all"), ("store", "_hash")])
def test_a_process_killed_while_writing_leaves_nothing_that_counts(
    owner: str, name: str, tmp_path: Path
) -> None:
    recipe = runs.recipe("resnet", tmp_path / "killed", **FROZEN)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(
        KILLED.format(owner=owner, name=name, recipe=str(tmp_path / "recipe.yaml")), encoding="utf-8"
    )
    codes, printed = nursery.run(script, log=tmp_path / "log")
    assert codes == [9], printed
    assert not entries()
    assert len(list((tmp_path / "cache" / "features").glob(".*"))) == 1
    assert cached(finished("cnn frozen", tmp_path / "run"))
    assert len(entries()) == 2
    assert not list((tmp_path / "cache" / "features").glob(".*"))


def test_two_writers_of_the_same_features_get_along(tmp_path: Path) -> None:
    want = wanted(runs.recipe("resnet", **FROZEN))
    values = {name: torch.rand(want.rows, *column.shape) for name, column in want.columns.items()}
    folders = [store.Writer.reserve(want.key, want.columns, want.ends, want.rows) for _ in range(2)]
    for folder in folders:
        writer = store.Writer(folder, want.columns, want.ends, want.rows)
        writer.write(range(want.rows), values)
        writer.close()
        writer.finish(want.key, want.parts)
    stored = store.open_features(want.key)
    assert stored is not None
    for name, rows in values.items():
        assert torch.equal(torch.stack([stored(row)[name] for row in range(want.rows)]), rows)
    assert entries() == [disk.features_folder() / want.key]
    assert not list(disk.features_folder().glob(".*"))


def test_values_beyond_the_format_are_not_stored(tmp_path: Path) -> None:
    want = wanted(runs.recipe("resnet", **FROZEN, cache={"dtype": "fp16"}))
    folder = store.Writer.reserve(want.key, want.columns, want.ends, want.rows)
    writer = store.Writer(folder, want.columns, want.ends, want.rows)
    with pytest.raises(store.StoreError, match="fp16 is too small for its values"):
        writer.write(
            [0], {name: torch.full((1, *column.shape), 1e5) for name, column in want.columns.items()}
        )


def test_the_cache_is_listed_and_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        main(["cache", *arguments])
        return capsys.readouterr().out

    assert said().startswith("0 kept, 0B, in ")
    finished("cnn frozen", tmp_path / "run")
    size = max(each.size for each in disk.kept())
    assert "12 rows  up to global_pool, fp32" in said("list")
    assert said("prune", "--keep", f"{size}B").endswith(f"in {disk.features_folder()}\n")
    assert len(entries()) == 1
    assert said("prune").count("removed") == 1
    assert not entries()
    for wrong in (["wipe"], ["prune", "--keep", "lots"]):
        with pytest.raises(SystemExit) as left:
            main(["cache", *wrong])
        assert left.value.code == 2


def test_sizes() -> None:
    for text, count in (("8GB", 8 * 10**9), ("1.5 MB", 1_500_000), ("10kB", 10_000), ("7B", 7)):
        assert parse_size(text) == Size(count) == parse_size(str(Size(count)))
    for wrong in ("8", "0GB", "8 apples", -1, True, None, 1.5):
        with pytest.raises(ValueError, match="8GB"):
            parse_size(wrong)
    assert CacheSpec(budget="2GB").model_dump(mode="json")["budget"] == "2GB"  # type: ignore[arg-type]


# ---- resume and processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps"), [("cnn gradual, BatchNorm trains", 8), ("bert last:2, dropout", 4)]
)
def test_a_run_stopped_at_every_step_ends_the_same(name: str, steps: int, tmp_path: Path) -> None:
    family, changes = ARMS[name]

    def recipe(folder: str, **training: Any) -> Recipe:
        return runs.recipe(family, tmp_path / folder, **changes | {"training": {"steps": steps} | training})

    whole = runs.finetune(recipe("whole"), quiet=True)
    assert cached(whole)
    for stop in range(steps):
        if stop % 3 == 2:
            disk.prune(0)  # what was computed is computed again, to the bit
        with pytest.raises(Interrupted):
            runs.finetune(recipe("torn", max_hours=1e-9), resume=True, quiet=True)
    torn = runs.finetune(recipe("torn"), resume=True, quiet=True)
    assert runs.same(runs.weights(whole), runs.weights(torn))
    assert cached(torn) == cached(whole)
    for one, other in zip(whole.rows, torn.rows, strict=True):
        assert (one["loss"], one.get("metrics")) == (other["loss"], other.get("metrics"))


def test_a_signal_while_features_are_computed_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished("cnn frozen", tmp_path / "whole")
    disk.prune(0)
    real = compute.run_prefix

    def stopping(*given: Any) -> Any:
        os.kill(os.getpid(), 15)
        return real(*given)

    monkeypatch.setattr(compute, "run_prefix", stopping)
    with pytest.raises(Interrupted, match="SIGTERM"):
        finished("cnn frozen", tmp_path / "torn")
    assert not list(disk.features_folder().iterdir())
    monkeypatch.setattr(compute, "run_prefix", real)
    torn = runs.finetune(runs.recipe("resnet", tmp_path / "torn", **FROZEN), resume=True, quiet=True)
    assert runs.same(runs.weights(whole), runs.weights(torn))


def test_two_processes_compute_and_read_the_same(tmp_path: Path) -> None:
    names = ["vit gradual, micro-batches", "bert lp_ft"]
    for name in names:
        family, changes = ARMS[name]
        family = "bert-dry" if family == "bert" else family
        recipe = runs.recipe(family, tmp_path / f"two {name}", **changes)
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    codes, printed = nursery.run(SEVERAL, str(tmp_path), log=tmp_path / "log", processes=2)
    assert codes == [0, 0], printed[-3000:]
    assert not list(tmp_path.glob("*.error")), printed
    by_two = {
        folder.name: [path.read_bytes() for path in sorted(folder.glob("*.bin"))] for folder in entries()
    }
    disk.prune(0)
    for name in names:
        from hf_finetune.runfolder import load_run

        double = load_run(tmp_path / f"two {name}")
        family, changes = ARMS[name]
        single = runs.run("bert-dry" if family == "bert" else family, tmp_path / f"one {name}", **changes)
        assert double.status["processes"] == 2
        assert cached(double) == cached(single) != []
        assert runs.same(runs.weights(single), runs.weights(double), tolerance=1e-5)
        for one, other in zip(single.rows, double.rows, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    by_one = {
        folder.name: [path.read_bytes() for path in sorted(folder.glob("*.bin"))] for folder in entries()
    }
    assert by_two == by_one  # to the bit: the batches that run through a prefix are always the same
