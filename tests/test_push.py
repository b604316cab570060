"""Pushing a run: what reaches the Hub, what is said when it refuses, and that the run is never the price."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import hf_finetune.hub.push as push
import runs
from hf_finetune.cli import main
from hf_finetune.hub.retry import Patience, scrub
from hf_finetune.hub.upload import MANIFEST
from hf_finetune.runfolder import Run, load_run
from hub_server import FAULTS, Hub, git_oid

QUICK = Patience(tries=4, first=0.01, longest=0.02, silence=2.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.run("vit", tmp_path_factory.mktemp("push") / "run", strategy="frozen", training={"steps": 2})


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the same kind that keeps an adapter."""
    return runs.run(
        "vit", tmp_path_factory.mktemp("push") / "adapted", strategy="lora", training={"steps": 2}
    )


@pytest.fixture
def token(hub: Hub, online: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The account `me` of a Hub, logged in; nobody waits."""
    made = hub.user("me")
    monkeypatch.setenv("HF_TOKEN", made)
    monkeypatch.setattr(push, "PATIENT", QUICK)
    monkeypatch.setattr(push, "BRIEF", QUICK)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return made


def call(*words: str) -> int:
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(run: Run, repo_id: str) -> dict[str, bytes]:
    """What a repository holds of a run: its model folder, the card with the repository's name, the list of files."""
    files = snapshot(run.model_folder)
    files["README.md"] = push.with_repo_id(files["README.md"].decode(), repo_id).encode()
    return files | {MANIFEST: (json.dumps({"files": sorted(files)}, indent=1) + "\n").encode()}


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def test_a_push_is_one_commit_of_the_model_folder(
    trained: Run, hub: Hub, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(trained.path)
    options = ["--private", "--branch", "try/it", "--tag", "v1", "--message", "first try"]
    assert call("push", str(trained.path), "me/model", *options) == 0
    repo = hub.repos["model", "me/model"]
    assert repo.private
    assert without_attributes(hub.files("me/model", "try/it")) == expected(trained, "me/model")
    assert list(hub.files("me/model")) == [".gitattributes"], "main is as it was"
    assert [commit.title for commit in repo.log("try/it")] == ["first try", "initial commit"]
    assert repo.find("v1") == repo.find("try/it")
    printed = capsys.readouterr()
    assert printed.out == f"pushed: {hub.url}/me/model/commit/{repo.find('try/it')}\n"
    assert printed.err == ""
    assert snapshot(trained.path) == before
    assert call("push", str(trained.path), "me/model", *options) == 0, "again, with nothing new"
    assert len(repo.log("try/it")) == 2
    assert "held these very files already" in capsys.readouterr().err


def test_a_push_removes_what_an_earlier_push_left_and_nothing_else(
    trained: Run, adapted: Run, hub: Hub, token: str
) -> None:
    assert call("push", str(trained.path), "me/model") == 0
    hand = {"notes/by_hand.txt": b"mine", "extra.safetensors": b"mine too"}
    repo = hub.repos["model", "me/model"]
    files = repo.commits[repo.find("main") or ""].files | {
        path: hub.store(text) for path, text in hand.items()
    }
    hub.commit(repo, repo.find("main"), files, "by hand")
    assert call("push", str(adapted.path), "me/model") == 0
    assert without_attributes(hub.files("me/model")) == expected(adapted, "me/model") | hand
    assert "model.safetensors" not in hub.files("me/model")
    assert repo.log("main")[0].title.startswith("accuracy ")


def test_a_card_keeps_what_people_wrote(
    trained: Run, hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "keep_edits", lambda new, old: f"{new}\n{old.splitlines()[-1]}")
    assert call("push", str(trained.path), "me/model") == 0
    repo = hub.repos["model", "me/model"]
    files = repo.commits[repo.find("main") or ""].files
    card = hub.objects[files["README.md"].sha256] + b"\nby hand"
    hub.commit(repo, repo.find("main"), files | {"README.md": hub.store(card)}, "by hand")
    assert call("push", str(trained.path), "me/model") == 0
    kept = hub.files("me/model")["README.md"].decode()
    assert kept == expected(trained, "me/model")["README.md"].decode() + "\nby hand"


def test_a_pull_request_takes_no_right_to_write(
    trained: Run, hub: Hub, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.user("you")
    hub.create("you/model")
    assert call("push", str(trained.path), "you/model") == 1
    assert "open a pull request with --pr" in capsys.readouterr().err
    assert call("push", str(trained.path), "you/model", "--pr") == 0
    assert capsys.readouterr().out == f"pushed: {hub.url}/you/model/discussions/1\n"
    assert without_attributes(hub.files("you/model", "refs/pr/1")) == expected(trained, "you/model")
    assert list(hub.files("you/model")) == [".gitattributes"]
    hub.fail("lost", "POST .*/commit/")
    assert call("push", str(trained.path), "you/model", "--pr") == 0
    assert list(hub.repos["model", "you/model"].pulls) == [1, 2], "a lost answer opens no further one"


LOST = [
    "POST .*/commit/",
    "POST .*/preupload",
    "POST .*/create",
    "PUT /storage",
    "POST .*/batch",
    "POST .*/tag/",
]


@pytest.mark.parametrize("where", LOST)
@pytest.mark.parametrize("kind", ["lost", "503", "429", "cut request", "cut response", "slow"])
def test_what_passes_is_tried_again(
    kind: str, where: str, trained: Run, hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(push, "PATIENT", Patience(tries=4, first=0, longest=0, silence=0.1))
    hub.fail(kind, where, times=2)
    assert call("push", str(trained.path), "me/model", "--tag", "v1") == 0
    repo = hub.repos["model", "me/model"]
    assert [commit.title for commit in repo.log("v1")][1:] == ["initial commit"], "one commit, no second"
    assert repo.find("v1") == repo.find("main")
    carried_out = "commit" in where and kind in ("lost", "cut response", "slow")
    assert sum(call.fault == kind for call in hub.calls) == (1 if carried_out else 2)
    assert "already" not in capsys.readouterr().err
    held = {call.path.split("?")[0] for call in hub.calls if call.method == "PUT" and call.status == 200}
    sent = [call for call in hub.calls if call.method == "PUT" and not call.fault]
    assert len(sent) <= len(held), "what arrived is not sent again"


def test_waiting_is_told_in_one_quiet_line(
    trained: Run, hub: Hub, token: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.fail("429", "POST .*/commit/", retry_after=7)
    hub.fail("503", "PUT /storage/")
    assert call("push", str(trained.path), "me/model") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line]
    assert told == ["commit: 429: Too many requests. Trying again in 7 s."]
    assert 7 in waits, "the Hub says how long"


def test_a_branch_that_moves_on_is_looked_at_again(
    trained: Run, adapted: Run, hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes into the card just before the second push commits; it is kept."""
    monkeypatch.setattr(push, "keep_edits", lambda new, old: f"{new}{'by hand' * old.endswith('by hand')}")
    assert call("push", str(trained.path), "me/model") == 0
    repo = hub.repos["model", "me/model"]
    card = hub.files("me/model")["README.md"] + b"by hand"

    def route(request: Any, path: str, body: bytes) -> Any:
        files = repo.log("main")[0].files
        if "/commit/" in path and not hub.files("me/model")["README.md"].endswith(b"by hand"):
            hub.commit(repo, repo.find("main"), files | {"README.md": hub.store(card)}, "meanwhile")
        return Hub._route(hub, request, path, body)

    monkeypatch.setattr(hub, "_route", route)
    assert call("push", str(adapted.path), "me/model") == 0
    whole = expected(adapted, "me/model")
    assert without_attributes(hub.files("me/model")) == whole | {"README.md": whole["README.md"] + b"by hand"}
    assert [commit.title for commit in repo.log("main")][1] == "meanwhile"
    assert len(repo.log("main")) == 4


def test_a_refusal_after_a_commit_without_an_answer_is_not_the_end(
    trained: Run, hub: Hub, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.create("me/model")
    hub.fail("lost", "POST .*/commit/")
    hub.fail("403", "GET .*/models/me/model", skip=1)
    assert call("push", str(trained.path), "me/model") == 0
    assert len(hub.repos["model", "me/model"].log("main")) == 2
    assert [call.fault for call in hub.calls if call.fault] == ["lost", "403"]


REFUSALS: list[tuple[str, str, str, list[str]]] = [
    ("403 at the commit", "403", "POST .*/commit/", ["push to me/model failed: 403: You may not do this now."]),
    ("403 before", "403", "POST .*/preupload", ["me/model cannot be written to: 403", "hf auth login"]),
    ("down", "503", "", ["me/model cannot be written to: 503: Try again later.", "to be reached?"]),
    ("down at the commit", "503", "POST .*/commit/", ["push to me/model failed: 503: Try again later."]),
    ("no storage", "corrupt", "PUT /storage/", ["push to me/model failed: 400", "does not match"]),
    ("never answers", "lost", "POST .*/commit/|GET .*/models/me/model", ["push to me/model failed"]),
    ("no tag", "403", "POST .*/tag/", ["is pushed, but the tag 'v1' failed: 403"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "where", "said"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS]
)
def test_a_refusal_is_one_message_and_costs_nothing(
    kind: str,
    where: str,
    said: list[str],
    trained: Run,
    hub: Hub,
    token: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(trained.path)
    hub.fail(kind, where, times=10_000)
    assert call("push", str(trained.path), "me/model", "--tag", "v1", "--message", "it's mine") == 1
    printed = capsys.readouterr()
    for text in said:
        assert text in printed.err
    if "cannot be written" not in printed.err:
        assert f"hf-finetune push {trained.path} me/model --tag v1 --message 'it'\"'\"'s mine'" in printed.err
    assert "Traceback" not in printed.err
    assert token not in printed.err + printed.out
    assert "X-Amz" not in printed.err
    assert snapshot(trained.path) == before
    if kind not in ("lost",) and "/tag/" not in where and ("model", "me/model") in hub.repos:
        assert list(hub.files("me/model")) == [".gitattributes"], "nothing is half published"


def test_a_tag_that_is_taken(trained: Run, hub: Hub, token: str, capsys: pytest.CaptureFixture[str]) -> None:
    repo = hub.create("me/model")
    repo.refs["refs/tags/v1"] = repo.refs["refs/heads/main"]
    assert call("push", str(trained.path), "me/model", "--tag", "v1") == 1
    assert "the tag 'v1' is there already, on commit" in capsys.readouterr().err


def test_who_may_not_is_told_at_once(
    hub: Hub, token: str, trained: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`create_repo` is content with a repository one may only read; the check is not."""
    hub.create("you/model")
    for given, said in [
        (hub.user("me", role="read"), "403: Forbidden: you don't have write access to you/model."),
        (
            "hf_" + "x" * 20,
            "401: Invalid user token. The token from HF_TOKEN environment variable is invalid.",
        ),
        (None, "You are not logged in. Log in with `hf auth login`, or set HF_TOKEN"),
    ]:
        monkeypatch.setenv("HF_TOKEN", given) if given else monkeypatch.delenv("HF_TOKEN")
        assert call("push", str(trained.path), "you/model") == 1
        printed = capsys.readouterr().err
        assert said in printed
        assert "hf_x" not in printed
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert call("push", str(trained.path), "me/model") == 1
    assert "HF_HUB_OFFLINE=1 keeps this process off the Hub" in capsys.readouterr().err


RECIPE = ["data.max_samples=20", "training.steps=1", "-q"]


def test_rights_are_checked_before_training(
    tmp_path: Path, hub: Hub, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.create("you/model")
    recipe = ["frozen", "hub={repo_id: you/model}", *RECIPE]
    assert call("train", *recipe, "--output", str(tmp_path / "run")) == 1
    printed = capsys.readouterr().err
    assert "you/model cannot be written to: 403" in printed
    assert "train with `hub=` and push later" in printed
    assert not (tmp_path / "run").exists()
    assert len(hub.repos["model", "you/model"].commits) == 1, "asking makes no commit"


@pytest.mark.parametrize(("when", "commits"), [("end", 1), ("best", 2)])
def test_a_recipe_pushes(when: str, commits: int, tmp_path: Path, hub: Hub, token: str) -> None:
    recipe = ["frozen", f"hub={{repo_id: me/model, when: {when}, private: true}}", *RECIPE]
    assert call("train", *recipe, "--output", str(tmp_path / "run")) == 0
    run, repo = load_run(tmp_path / "run"), hub.repos["model", "me/model"]
    assert repo.private
    assert len(repo.log("main")) == commits + 1
    assert without_attributes(hub.files("me/model")) == expected(run, "me/model")
    assert run.status["status"] == "done"
    told = run.status["push"]
    assert re.match(r"20\d\d-", told.pop("when"))
    sha = repo.find("main")
    assert told == {"repo_id": "me/model", "commit": sha, "url": f"{hub.url}/me/model/commit/{sha}"}


def test_a_failed_push_does_not_cost_the_run(
    tmp_path: Path, hub: Hub, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("503", "POST .*/commit/", times=10_000)
    recipe = ["frozen", "hub={repo_id: me/model, when: best}", *RECIPE]
    assert call("train", *recipe, "--output", str(tmp_path / "run")) == 1, "the push at the end counts"
    printed = capsys.readouterr().err
    assert printed.count("warning: push to me/model failed: 503") == 1
    assert printed.count("error: push to me/model failed: 503") == 1
    assert f"Try again: hf-finetune push {tmp_path / 'run'} me/model" in printed
    run = load_run(tmp_path / "run")
    assert run.status["status"] == "done"
    assert run.status["push"]["error"].startswith("push to me/model failed: 503")
    hub.faults.clear()
    assert call("push", str(tmp_path / "run"), "me/model") == 0, "the command that was printed"
    assert token not in "".join(
        path.read_text(errors="replace") for path in run.path.rglob("*") if path.is_file()
    )


def _no_config(run: Run) -> None:
    (run.model_folder / "config.json").unlink()


def _no_weights(run: Run) -> None:
    (run.model_folder / "model.safetensors").unlink()


def _cut_weights(run: Run) -> None:
    weights = run.model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _no_shard(run: Run) -> None:
    (run.model_folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (run.model_folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_config, "config.json missing"),
        (_no_weights, "model.safetensors or adapter_model.safetensors missing"),
        (_cut_weights, "model.safetensors: damaged"),
        (_no_shard, "model-00001-of-00001.safetensors missing"),
        (lambda run: shutil.rmtree(run.model_folder), "this run kept no model"),
    ],
)
def test_half_a_model_is_not_pushed(
    damage: Callable[[Run], None], said: str, trained: Run, tmp_path: Path, hub: Hub, token: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = load_run(shutil.copytree(trained.path, tmp_path / "run"))
    damage(run)
    assert call("push", str(run.path), "me/model") == 2
    assert said in capsys.readouterr().err
    assert hub.calls == []


def test_a_run_in_progress_is_pushed_with_a_note(
    trained: Run, tmp_path: Path, hub: Hub, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(shutil.copytree(trained.path, tmp_path / "run"))
    (run.path / "run.json").write_text(json.dumps(run.status | {"status": "running"}))
    assert call("push", str(run.path), "me/model") == 0
    assert "is still running: what is pushed is its best model so far" in capsys.readouterr().err
    assert without_attributes(hub.files("me/model")) == expected(trained, "me/model")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("no hf_AbCdEfGh1234567890 here, in hf_finetune", "no *** here, in hf_finetune"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("get http://me:secret@host/x failed", "get http://***@host/x failed"),
        ("PUT https://s3/x?X-Amz-Signature=1&y=2 failed", "PUT https://s3/x failed"),
        ("the repository me/hf_model", "the repository me/hf_model"),
    ],
)
def test_secrets_are_scrubbed(text: str, clean: str) -> None:
    assert scrub(text) == clean


@pytest.mark.parametrize(
    ("name", "strategy"), [("vit", "frozen"), ("bert", "frozen"), ("bert", "lora"), ("vit", "lora")]
)
def test_a_space_answers_with_the_pushed_model(
    name: str, strategy: str, hub: Hub, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download
    from PIL import Image

    base = "me/base"
    hub.upload(Path(runs.backbone(name)), base)
    run = runs.run(name, tmp_path / "run", strategy=strategy, training={"steps": 2})
    if strategy == "lora":
        config = run.model_folder / "adapter_config.json"
        known = json.loads(config.read_text())
        config.write_text(json.dumps(known | {"base_model_name_or_path": base, "revision": None}))
    assert call("push", str(run.path), "me/model", "--space") == 0
    assert hub.repos["space", "me/model-demo"].sdk == "gradio"
    files = {path: content.decode() for path, content in hub.files("me/model-demo", kind="space").items()}
    front = yaml.safe_load(files["README.md"].split("---")[1])
    assert (front["sdk"], front["models"], front["app_file"]) == ("gradio", ["me/model"], "app.py")
    assert ("peft" in files["requirements.txt"]) == (strategy == "lora")
    seen: dict[str, Any] = {}

    def interface(predict: Any, widgets: Any, output: Any, title: str) -> Any:
        seen.update(predict=predict, title=title)
        return SimpleNamespace(launch=lambda: seen.update(launched=True))

    stub = SimpleNamespace(
        Interface=interface, Image=SimpleNamespace, Label=SimpleNamespace, Textbox=SimpleNamespace
    )
    monkeypatch.setitem(sys.modules, "gradio", stub)
    app = {"__name__": "__main__"}
    exec(compile(files["app.py"], "app.py", "exec"), app)
    assert seen["launched"]
    given = Image.new("RGB", (40, 36), "red") if name == "vit" else "the good film"
    answer = seen["predict"](given)
    labels = run.status["labels"]
    assert set(answer) == set(labels)
    assert sum(answer.values()) == pytest.approx(1, abs=1e-5)
    # the same as what the run itself answers
    from hf_finetune.inference import load_trained

    own = load_trained(str(run.path))
    if name == "bert":
        tokens = own.backbone.input.tokenizer(given, return_tensors="pt")
        with torch.inference_mode():
            logits = own.backbone.model.eval()(**tokens).logits[0]
        for label, score in zip(labels, logits.softmax(-1).tolist(), strict=True):
            assert answer[label] == pytest.approx(score, abs=1e-5)
    assert snapshot_download("me/model")


@pytest.mark.parametrize("name", ["model", "me/model/main", "./model", "https://huggingface.co/me/model"])
def test_an_id_is_user_and_name(
    name: str, trained: Run, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("push", str(trained.path), name) == 2
    assert capsys.readouterr().err == f"error: push: '{name}' is no repository's id. Write user/name.\n"


def test_a_space_needs_a_base_on_the_hub(
    adapted: Run, hub: Hub, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("push", str(adapted.path), "me/model", "--space-id", "me/page") == 2
    assert "is not on the Hub. Push without --space" in capsys.readouterr().err
    assert hub.repos == {}


def _push_under_faults(
    seed: int, hub: Hub, token: str, old: Run, new: Run, capsys: pytest.CaptureFixture[str]
) -> tuple[str, int]:
    """Push over an older model while 30 % of all requests fail; return what became of it and how often it was retried."""
    hub.repos.clear()
    hub.objects.clear()
    repo = hub.create("me/model")
    hand = {"by_hand.txt": hub.store(b"mine")}
    left = {
        path: hub.store(text, lfs=path.endswith(("safetensors", "png")))
        for path, text in expected(old, "me/model").items()
    }
    start = hub.commit(repo, repo.find("main"), repo.log("main")[0].files | left | hand, "older push")
    before, first = snapshot(new.path), len(hub.calls)
    hub.fail_at_random(0.3, seed)
    code = call("push", str(new.path), "me/model")
    hub.fail_at_random(0, seed)
    printed = capsys.readouterr()
    calls, retries = hub.calls[first:], printed.err.count("Trying again in")
    assert code in (0, 1)
    assert snapshot(new.path) == before, "the run folder is bit-intact"
    assert token not in printed.out + printed.err
    assert "Traceback" not in printed.err
    assert not any(call.token for call in calls if call.path.startswith("/storage/"))
    head = repo.log("main")[0]
    complete = expected(new, "me/model") | {"by_hand.txt": b"mine"}
    if code == 0:
        assert without_attributes(hub.files("me/model")) == complete
        for path, blob in head.files.items():
            content = hub.files("me/model")[path]
            assert (blob.oid, blob.size) == (git_oid(content, blob.lfs), len(content))
        assert (head.parent, len(repo.log("main"))) == (start.sha, 3), "one commit"
        return "pushed", retries
    if head.sha != start.sha:  # carried out, and every answer since was lost
        assert without_attributes(hub.files("me/model")) == complete
        assert "Whether the commit was made is not known" in printed.err
        return "unsure", retries
    assert f"hf-finetune push {new.path} me/model" in printed.err or "cannot be written to" in printed.err
    return "refused", retries


def _pushes(
    seeds: range, hub: Hub, token: str, one: Run, other: Run, capsys: Any, monkeypatch: Any
) -> dict[str, int]:
    monkeypatch.setattr(push, "PATIENT", Patience(tries=6, first=0, longest=0, silence=0.25))
    hub.slowness = 0.4
    ended = [
        _push_under_faults(seed, hub, token, *((one, other) if seed % 2 else (other, one)), capsys)
        for seed in seeds
    ]
    faults = [call.fault for call in hub.calls if call.fault]
    share = len(faults) / len(hub.calls)
    assert 0.2 < share < 0.4
    assert set(faults) | {"corrupt"} == set(FAULTS)
    counts = {end: sum(each == end for each, _ in ended) for end in ("pushed", "refused", "unsure")}
    return counts | {
        "retries": sum(count for _, count in ended), "requests": len(hub.calls), "faults": len(faults)
    }  # fmt: skip


def test_pushes_under_faults_end_whole_or_not_at_all(
    trained: Run,
    adapted: Run,
    hub: Hub,
    token: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _pushes(range(20), hub, token, trained, adapted, capsys, monkeypatch)
    assert found["pushed"] >= 4
    assert found["refused"] >= 2


@pytest.mark.slow
def test_many_pushes_under_faults_end_whole_or_not_at_all(
    trained: Run,
    adapted: Run,
    hub: Hub,
    token: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _pushes(range(1000, 1120), hub, token, trained, adapted, capsys, monkeypatch)
    with capsys.disabled():
        print(f"\n120 pushes: {found}")
    assert found["pushed"] >= 30
    assert found["refused"] >= 15


def test_a_pushed_model_is_what_the_run_kept(trained: Run, hub: Hub, token: str) -> None:
    import timm

    assert call("push", str(trained.path), "me/model", "--private") == 0
    images = torch.rand(2, 3, 32, 32)
    pushed = timm.create_model("hf-hub:me/model", pretrained=True).eval()
    assert torch.equal(
        pushed(images), timm.create_model(f"local-dir:{trained.model_folder}", pretrained=True).eval()(images)
    )
