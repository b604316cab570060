"""The server of the tests speaks to the unmodified clients as the Hub does."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import tiny
from hub_server import Hub


@pytest.fixture
def hub(hub: Hub, online: None) -> Hub:
    return hub


@pytest.fixture
def me(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.user("me", orgs=("team",)))


@pytest.fixture
def somebody(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.user("somebody"))


def test_repositories_and_who_may_see_them(hub: Hub, me: HfApi, somebody: HfApi) -> None:
    assert me.whoami()["name"] == "me"
    assert me.create_repo("me/open").repo_id == "me/open"
    assert me.create_repo("team/open", repo_type="dataset").repo_id == "team/open"
    me.create_repo("me/page", repo_type="space", space_sdk="gradio")
    me.create_repo("me/closed", private=True)
    me.create_repo("me/closed", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already created"):
        me.create_repo("me/closed")
    info = me.model_info("me/closed")
    assert (info.private, info.id, [file.rfilename for file in info.siblings or []]) == (
        True,
        "me/closed",
        [".gitattributes"],
    )
    assert somebody.model_info("me/open").private is False
    for api in (somebody, HfApi(endpoint=hub.url, token=False)):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("me/closed")
        assert not api.repo_exists("me/closed")
    me.auth_check("me/open", write=True)
    somebody.auth_check("me/open")
    with pytest.raises(HfHubHTTPError, match="403"):
        somebody.auth_check("me/open", write=True)
    with pytest.raises(HfHubHTTPError, match="rights"):
        somebody.create_repo("me/theirs")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_wrong").whoami()
    me.delete_repo("me/closed")
    assert not me.repo_exists("me/closed")


def test_commits_are_atomic_and_stored_by_hash(hub: Hub, me: HfApi, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "a b.txt").write_text("text")
    (tmp_path / "README.md").write_text("---\ntags: [small]\nlicense: mit\n---\n# Card\n")
    me.create_repo("me/model")
    first = me.upload_folder(repo_id="me/model", folder_path=tmp_path, commit_message="all")
    assert me.model_info("me/model").sha == first.oid
    assert hub.files("me/model")["model.safetensors"] == b"weights" * 1000
    info = me.model_info("me/model", files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or []}
    assert files["model.safetensors"].lfs.size == 7000
    assert files["README.md"].lfs is None
    assert info.card_data.license == "mit"
    puts = sum(call.method == "PUT" for call in hub.calls)
    me.upload_folder(repo_id="me/model", folder_path=tmp_path, path_in_repo="copy", commit_message="again")
    assert sum(call.method == "PUT" for call in hub.calls) == puts, "what is held is not sent again"
    unchanged = me.upload_folder(repo_id="me/model", folder_path=tmp_path, commit_message="nothing new")
    assert unchanged.oid == me.model_info("me/model").sha
    with pytest.raises(HfHubHTTPError, match="commit has happened"):
        me.upload_file(repo_id="me/model", path_or_fileobj=b"x", path_in_repo="x", parent_commit=first.oid)
    me.create_commit(
        "me/model",
        [
            CommitOperationDelete("copy/"),
            CommitOperationDelete("nested/a b.txt"),
            CommitOperationAdd("new", b"n"),
        ],
        commit_message="out",
    )
    assert sorted(hub.files("me/model")) == [".gitattributes", "README.md", "model.safetensors", "new"]
    before = hub.files("me/model")
    operations = [CommitOperationAdd("half", b"half"), CommitOperationDelete("not there")]
    with pytest.raises(EntryNotFoundError):
        me.create_commit("me/model", operations, commit_message="half")
    assert hub.files("me/model") == before
    hub.objects.clear()
    with pytest.raises(HfHubHTTPError, match="was not uploaded"):
        hub_commit_without_upload(me)
    assert [commit.title for commit in me.list_repo_commits("me/model")] == [
        "out",
        "again",
        "all",
        "initial commit",
    ]
    with pytest.raises(ValueError, match="Invalid metadata"):
        me.upload_file(repo_id="me/model", path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md")


def hub_commit_without_upload(api: HfApi) -> Any:
    operation = CommitOperationAdd("other.safetensors", b"never sent")
    operation._upload_mode, operation._is_uploaded, operation._should_ignore = "lfs", True, False
    return api.create_commit("me/model", [operation], commit_message="hollow")


def test_revisions_tags_and_pull_requests(hub: Hub, me: HfApi, somebody: HfApi, tmp_path: Path) -> None:
    me.create_repo("me/model")
    me.upload_file(repo_id="me/model", path_or_fileobj=b"one", path_in_repo="file")
    me.create_tag("me/model", tag="v1")
    me.create_branch("me/model", branch="feature/x")
    me.create_branch("me/model", branch="feature/x", exist_ok=True)
    on_branch = me.upload_file(
        repo_id="me/model", path_or_fileobj=b"two", path_in_repo="file", revision="feature/x"
    )
    with pytest.raises(HfHubHTTPError, match="403"):
        somebody.upload_file(repo_id="me/model", path_or_fileobj=b"bad", path_in_repo="file")
    pull = somebody.upload_file(
        repo_id="me/model", path_or_fileobj=b"\0" * 10, path_in_repo="file", create_pr=True
    )
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    read = {
        revision: Path(
            me.hf_hub_download("me/model", "file", revision=revision, cache_dir=tmp_path)
        ).read_bytes()
        for revision in ("main", "v1", "feature/x", on_branch.oid, "refs/pr/1")
    }
    assert list(read.values()) == [b"one", b"one", b"two", b"two", b"\0" * 10]
    refs = me.list_repo_refs("me/model", include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "feature/x"}
    assert ([ref.name for ref in refs.tags], [ref.ref for ref in refs.pull_requests or []]) == (
        ["v1"],
        ["refs/pr/1"],
    )
    me.merge_pull_request("me/model", 1)
    assert me.get_discussion_details("me/model", 1).status == "merged"
    assert hub.files("me/model")["file"] == b"\0" * 10
    draft = somebody.create_pull_request("me/model", title="draft")
    assert [each.num for each in me.get_repo_discussions("me/model")] == [draft.num, 1]
    with pytest.raises(RevisionNotFoundError):
        me.model_info("me/model", revision="v2")
    with pytest.raises(HfHubHTTPError, match="409"):
        me.create_tag("me/model", tag="v1")
    me.delete_tag("me/model", tag="v1")
    me.delete_branch("me/model", branch="feature/x")
    assert list(hub.repos["model", "me/model"].refs) == ["refs/heads/main", "refs/pr/1", "refs/pr/2"]


def test_downloads_ranges_and_trees(hub: Hub, me: HfApi, tmp_path: Path) -> None:
    from huggingface_hub import HfFileSystem

    content = bytes(range(256)) * 40
    for name in ("a/b/c.txt", "a/d.bin", "e.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content if name.endswith("bin") else name.encode())
    hub.upload(tmp_path / "in", "me/data", "dataset", private=True)
    folder = Path(me.snapshot_download("me/data", repo_type="dataset", cache_dir=tmp_path / "cache"))
    assert (folder / "a" / "d.bin").read_bytes() == content
    assert (folder / "a" / "b" / "c.txt").read_text() == "a/b/c.txt"
    hub.page = 2
    paths = [
        entry.path for entry in me.list_repo_tree("me/data", repo_type="dataset", recursive=True, expand=True)
    ]
    assert paths == [".gitattributes", "a", "a/b", "a/b/c.txt", "a/d.bin", "e.txt"]
    assert [entry.path for entry in me.list_repo_tree("me/data", "a", repo_type="dataset")] == [
        "a/b",
        "a/d.bin",
    ]
    assert [
        entry.path for entry in me.get_paths_info("me/data", ["a", "x", "e.txt"], repo_type="dataset")
    ] == ["a", "e.txt"]
    with pytest.raises(EntryNotFoundError):
        me.hf_hub_download("me/data", "none", repo_type="dataset", cache_dir=tmp_path / "cache")
    files = HfFileSystem(endpoint=hub.url, token=me.token)
    with files.open("datasets/me/data/a/d.bin", "rb", block_size=100) as file:
        file.seek(5000)
        assert file.read(50) == content[5000:5050]
    assert any(call.status == 206 for call in hub.calls), "a range was asked for, and answered"
    large = [call for call in hub.calls if call.path.startswith("/storage/")]
    assert large
    assert not any(call.token for call in large), "no token leaves for the storage"


def test_gated_repositories(hub: Hub, me: HfApi, somebody: HfApi, tmp_path: Path) -> None:
    hub.create("me/gated", gated=True)
    assert somebody.model_info("me/gated").gated == "manual"
    with pytest.raises(GatedRepoError):
        somebody.hf_hub_download("me/gated", ".gitattributes", cache_dir=tmp_path)
    hub.repos["model", "me/gated"].readers.add("somebody")
    assert somebody.hf_hub_download("me/gated", ".gitattributes", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "kind", ["500", "503", "429", "cut request", "cut response", "lost", "corrupt", "403"]
)
def test_faults_reach_the_client(
    kind: str, hub: Hub, me: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client tries again where it does so by itself; a refusal and a wrong hash reach the caller."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    me.create_repo("me/model")
    hub.fail(kind, "PUT /storage/", times=1)
    send = {"repo_id": "me/model", "path_or_fileobj": b"w" * 999, "path_in_repo": "model.safetensors"}
    if kind in ("corrupt", "403"):
        with pytest.raises(RuntimeError, match="Error while uploading"):
            me.upload_file(**send)
        assert list(hub.files("me/model")) == [".gitattributes"]
        assert len(hub.objects) == 1, "damaged content is not stored"
    me.upload_file(**send)
    assert hub.files("me/model")["model.safetensors"] == b"w" * 999
    assert [call.fault for call in hub.calls if call.fault] == [kind]


def test_slow_answers_and_random_faults_are_as_told(hub: Hub, me: HfApi) -> None:
    hub.fail("slow", "GET")
    with pytest.raises(Exception, match="timed out"):
        me.model_info("me/model", timeout=0.05)
    hub.create("me/model")
    drawn = []
    for _ in range(2):
        hub.fail_at_random(0.5, seed=3, kinds=("500",))
        start = len(hub.calls)
        for _ in range(20):
            with suppress(HfHubHTTPError):
                me.model_info("me/model")
        drawn.append([call.fault for call in hub.calls[start:]])
    assert drawn[0] == drawn[1]
    assert 4 < drawn[0].count("500") < 16


def test_large_files_go_in_parts(hub: Hub, me: HfApi) -> None:
    hub.multipart_over = 1000
    me.create_repo("me/model")
    content = bytes(range(256)) * 10
    me.upload_file(repo_id="me/model", path_or_fileobj=content, path_in_repo="model.safetensors")
    assert hub.files("me/model")["model.safetensors"] == content
    assert sum(call.method == "PUT" for call in hub.calls) == 3


CLIENTS = """
import sys, torch, datasets, timm
from pathlib import Path
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

vit, bert = sys.argv[1:]

# datasets: pushed, read back by revision, an image folder
rows = datasets.Dataset.from_dict({"text": ["a good film", "a bad film"] * 4, "label": [1, 0] * 4})
rows.push_to_hub("me/rows", private=True)
rows.select(range(2)).push_to_hub("me/rows", split="validation")
read = datasets.load_dataset("me/rows")
assert {name: len(split) for name, split in read.items()} == {"train": 8, "validation": 2}, read
assert datasets.load_dataset("me/rows", split="train", streaming=True).take(1) is not None
assert len(datasets.load_dataset("me/folder", split="train")) == 3

# timm
model = timm.create_model("local-dir:" + vit, pretrained=True).eval()
timm.models.push_to_hf_hub(model, "me/vit", model_config={"label_names": list("abcdefg")})
again = timm.create_model("hf-hub:me/vit", pretrained=True).eval()
image = torch.rand(1, 3, 32, 32)
assert torch.equal(model(image), again(image))

# transformers
AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).push_to_hub("me/bert", private=True)
AutoTokenizer.from_pretrained(bert).push_to_hub("me/bert")
text = AutoModelForSequenceClassification.from_pretrained("me/bert")
assert pipeline("text-classification", model="me/bert")("a good film")[0]["label"].startswith("LABEL_")

# peft
peft_model = get_peft_model(text, LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False))
peft_model.push_to_hub("me/adapter")
tokens = AutoTokenizer.from_pretrained("me/bert")("a good film", return_tensors="pt")
base = AutoModelForSequenceClassification.from_pretrained("me/bert")
adapted = PeftModel.from_pretrained(base, "me/adapter").eval()
assert torch.allclose(adapted(**tokens).logits, peft_model.eval()(**tokens).logits)
print("all read back")
"""


def test_the_other_libraries_push_and_load(hub: Hub, tmp_path: Path) -> None:
    """In a process of their own, with an empty cache: datasets, timm, transformers, peft."""
    tiny.timm_folder(tmp_path / "vit", "vit")
    tiny.transformers_folder(tmp_path / "bert", "bert")
    from PIL import Image

    for name in ("red", "green", "blue"):
        path = tmp_path / "images" / "train" / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), name).save(path)
    hub.upload(tmp_path / "images", "me/folder", "dataset")
    token = hub.user("me")
    done = subprocess.run(
        [sys.executable, "-c", CLIENTS, str(tmp_path / "vit"), str(tmp_path / "bert")],
        env=hub.environment(token, tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all read back" in done.stdout
    assert token not in done.stdout + done.stderr
    assert not any(call.token for call in hub.calls if call.path.startswith("/storage/"))
    assert not hub.unknown, "an address that the clients use is missing"
