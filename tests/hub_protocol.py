"""The Hub's protocol: one function for each address, and the table of them; `hub_server.Hub` serves it."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from hub_server import Hub

KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}
LARGE = ("*.safetensors", "*.bin", "*.parquet", "*.arrow", "*.onnx", "*.pt", "*.pth", "*.zip", "*.msgpack")


@dataclass(frozen=True)
class Blob:
    """A file's content, by its hashes."""

    sha256: str
    oid: str
    size: int
    lfs: bool

    def entry(self, path: str) -> dict[str, Any]:
        found = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        return found | (
            {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.lfs else {}
        )


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    """Who was let into a gated repository."""
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    """`refs/heads/…`, `refs/tags/…`, `refs/pr/…` -> commit."""
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        """Return the commit that a branch, a tag, a reference or a commit's name means."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        return revision if revision in self.commits else None

    def log(self, revision: str) -> list[Commit]:
        """Return the commits of a revision, the newest first."""
        found, sha = [], self.find(revision)
        while sha is not None:
            found.append(self.commits[sha])
            sha = found[-1].parent
        return found


@dataclass
class Account:
    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.answer = JSONResponse({"error": message}, status)
        self.answer.headers["X-Error-Message"] = message
        if code:
            self.answer.headers["X-Error-Code"] = code
        for name, value in headers.items():
            self.answer.headers[name.replace("_", "-")] = value


@dataclass
class Ask:
    """A request, by whom, and what its address names."""

    hub: Hub
    request: Request
    body: bytes
    account: Account | None
    words: dict[str, str]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    @property
    def kind(self) -> str:
        return (self.words.get("kind") or "models").removesuffix("s")

    def on(self, name: str) -> bool:
        """Whether a query parameter is set."""
        return self.request.query_params.get(name, "").lower() in ("1", "true")

    def owns(self, namespace: str) -> bool:
        return self.account is not None and namespace in (self.account.name, *self.account.orgs)

    def repo(self) -> Repo:
        """Return the repository; a private one is not there for others."""
        found = self.hub.repos.get((self.kind, self.words["repo"]))
        if found is None or (found.private and not self.owns(found.id.split("/")[0])):
            raise Refusal(404 if self.account else 401, "Repository not found", "RepoNotFound")
        return found

    def writable(self) -> Repo:
        repo = self.repo()
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        if not self.owns(repo.id.split("/")[0]) or self.account.role != "write":
            raise Refusal(403, f"Forbidden: you don't have write access to {repo.id}")
        return repo

    def opened(self) -> Repo:
        """Return the repository if its files may be read."""
        repo = self.repo()
        known = self.account is not None and self.account.name in repo.readers
        if repo.gated and not known and not self.owns(repo.id.split("/")[0]):
            said = f"Access to {self.kind} {repo.id} is restricted. You must have access to it and be authenticated."
            raise Refusal(403 if self.account else 401, said, "GatedRepo")
        return repo

    def commit(self, repo: Repo) -> Commit:
        revision = self.words.get("revision", "main")
        sha = repo.find(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[sha]

    def address(self, repo: Repo) -> str:
        return f"{self.hub.url}/{'' if repo.kind == 'model' else KINDS[repo.kind] + '/'}{repo.id}"


def whoami(ask: Ask) -> Response:
    if ask.account is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in ask.account.orgs]
    access = {"type": "access_token", "accessToken": {"displayName": "test", "role": ask.account.role}}
    return JSONResponse({"type": "user", "id": "1", "name": ask.account.name, "orgs": orgs, "auth": access})


def create_repo(ask: Ask) -> Response:
    asked = ask.json
    kind = asked.get("type") or "model"
    if ask.account is None:
        raise Refusal(401, "Invalid username or password.")
    namespace = asked.get("organization") or ask.account.name
    repo_id = f"{namespace}/{asked['name']}"
    if not ask.owns(namespace) or ask.account.role != "write":
        raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    there = (kind, repo_id) in ask.hub.repos
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repo = ask.hub.repos[kind, repo_id] if there else ask.hub.create(repo_id, kind, private=private)
    repo.sdk = asked.get("sdk") or repo.sdk
    found = {"url": ask.address(repo), "name": repo_id, "id": "1"}
    return JSONResponse(
        found | ({"error": f"You already created this {kind} repo"} if there else {}), 409 if there else 200
    )


def delete_repo(ask: Ask) -> Response:
    asked = ask.json
    ask.words |= {
        "kind": KINDS[asked.get("type") or "model"],
        "repo": f"{asked.get('organization')}/{asked['name']}",
    }
    repo = ask.writable()
    del ask.hub.repos[repo.kind, repo.id]
    return JSONResponse({})


def settings(ask: Ask) -> Response:
    repo, asked = ask.writable(), ask.json
    repo.private = (
        asked.get("visibility", "private" if asked.get("private", repo.private) else "public") == "private"
    )
    repo.gated = bool(asked.get("gated", repo.gated))
    return JSONResponse({"private": repo.private, "gated": repo.gated})


def info(ask: Ask) -> Response:
    repo = ask.repo()
    commit = ask.commit(repo)
    readme = commit.files.get("README.md")
    card = _front_matter(ask.hub.objects[readme.sha256].decode(errors="replace")) if readme else {}
    tags = [
        *_list(card.get("tags")),
        *(
            f"{key}:{name}"
            for key in ("dataset", "license")
            for name in _list(card.get(f"{key}s", card.get(key)))
        ),
    ]
    siblings = []
    for path, blob in commit.files.items():
        details = {"blobId": blob.oid, "size": blob.size}
        large = {"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
        siblings.append({"rfilename": path} | (details | large if ask.on("blobs") else {}))
    found = {
        "_id": repo.id, "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha,
        "lastModified": commit.date, "createdAt": repo.log(commit.sha)[-1].date, "private": repo.private,
        "gated": "manual" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0, "tags": tags,
        "cardData": card, "siblings": siblings, "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"), "sdk": repo.sdk,
    }  # fmt: skip
    if wanted := ask.request.query_params.getlist("expand"):
        found = {key: value for key, value in found.items() if key in {"_id", "id", "modelId", *wanted}}
    return JSONResponse(found)


def auth_check(ask: Ask) -> Response:
    ask.writable() if ask.words.get("write") else ask.opened()
    return JSONResponse({})


def tree(ask: Ask) -> Response:
    repo = ask.repo()
    commit, folder = ask.commit(repo), ask.words.get("path", "").rstrip("/")
    entries = _entries(commit, folder, recursive=ask.on("recursive"), expand=ask.on("expand"))
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist on this revision", "EntryNotFound")
    start, limit = int(ask.request.query_params.get("cursor", 0)), ask.hub.page
    answer = JSONResponse(entries[start : start + limit])
    if start + limit < len(entries):
        answer.headers["Link"] = f'<{ask.hub.url}{ask.request.url.include_query_params(cursor=start + limit).path}?' \
            f'{ask.request.url.include_query_params(cursor=start + limit).query}>; rel="next"'  # fmt: skip
    return answer


def paths_info(ask: Ask) -> Response:
    repo = ask.repo()
    if ask.request.headers.get("content-type", "").startswith("application/json"):
        paths, expand = ask.json["paths"], bool(ask.json.get("expand"))
    else:
        form = parse_qs(ask.body.decode())
        paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
    entries = {
        entry["path"]: entry for entry in _entries(ask.commit(repo), "", recursive=True, expand=expand)
    }
    return JSONResponse([entries[path.strip("/")] for path in paths if path.strip("/") in entries])


def commits(ask: Ask) -> Response:
    repo = ask.repo()
    log = repo.log(ask.commit(repo).sha)
    return JSONResponse([{"id": one.sha, "title": one.title, "message": one.description, "date": one.date,
                          "authors": [{"user": one.author}]} for one in log])  # fmt: skip


def refs(ask: Ask) -> Response:
    repo = ask.repo()
    listed: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    keys = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    for ref, sha in repo.refs.items():
        _, group, name = ref.split("/", 2)
        listed[keys[group]].append({"name": name, "ref": ref, "targetCommit": sha})
    return JSONResponse(listed)


def make_ref(ask: Ask) -> Response:
    """Make a branch from a starting point, or a tag on a revision."""
    repo, tag = ask.writable(), ask.json.get("tag")
    if tag is None:
        ref, start = f"refs/heads/{ask.words['name']}", ask.json.get("startingPoint") or "main"
    else:
        ref, start = f"refs/tags/{tag}", ask.words["name"]
    if ref in repo.refs:
        raise Refusal(409, f"Reference {ref} already exists")
    ask.words["revision"] = start
    repo.refs[ref] = ask.commit(repo).sha
    return JSONResponse({})


def delete_ref(ask: Ask) -> Response:
    repo, group = ask.writable(), {"branch": "heads", "tag": "tags"}[ask.words["what"]]
    if repo.refs.pop(f"refs/{group}/{ask.words['name']}", None) is None:
        raise Refusal(404, "Reference does not exist", "RevisionNotFound")
    return JSONResponse({})


def discussions(ask: Ask) -> Response:
    repo = ask.repo()
    if ask.request.method == "GET":
        found = [_discussion(repo, number) for number in sorted(repo.pulls, reverse=True)]
        return JSONResponse({"discussions": found, "count": len(found), "start": 0})
    if ask.account is None:
        raise Refusal(401, "Invalid username or password.")
    asked = ask.json
    number = _open_pull(repo, ask.account, asked["title"], pull=bool(asked.get("pullRequest")))
    if asked.get("pullRequest"):
        repo.refs[f"refs/pr/{number}"] = repo.refs["refs/heads/main"]
    return JSONResponse({"num": number, "pullRequest": bool(asked.get("pullRequest"))})


def discussion(ask: Ask) -> Response:
    repo, number = ask.repo(), int(ask.words["number"])
    if number not in repo.pulls:
        raise Refusal(404, "Discussion not found")
    if ask.words.get("verb") == "merge":
        ask.writable()
        changed = repo.commits[repo.refs[f"refs/pr/{number}"]]
        merged = ask.hub.commit(
            repo, repo.refs["refs/heads/main"], changed.files, f"{changed.title} (#{number})"
        )
        repo.pulls[number] |= {"status": "merged", "merged": merged.sha}
    return JSONResponse(_discussion(repo, number))


def preupload(ask: Ask) -> Response:
    repo = ask.repo() if ask.on("create_pr") and ask.account else ask.writable()
    commit, found = ask.commit(repo), []
    for file in ask.json["files"]:
        large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
        there = commit.files.get(file["path"])
        found.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                      "oid": there.oid if there and not there.lfs else there.sha256 if there else None})  # fmt: skip
    return JSONResponse({"files": found, "commitOid": commit.sha})


def lfs_batch(ask: Ask) -> Response:
    """Say where each object goes; those that are held need no upload."""
    repo = ask.writable() if "ref" in ask.json else ask.repo()
    if ask.account is None:
        raise Refusal(401, "Invalid username or password.")
    answers = []
    for wanted in ask.json["objects"]:
        answer, oid, size = {"oid": wanted["oid"], "size": wanted["size"]}, wanted["oid"], wanted["size"]
        if oid not in ask.hub.objects:
            store = f"{ask.hub.storage}/storage/{oid}"
            header: dict[str, str] = {}
            limit = ask.hub.multipart_over
            if limit is not None and size > limit and "multipart" in ask.json.get("transfers", []):
                parts = range(1, -(-size // limit) + 1)
                header = {"chunk_size": str(limit)} | {
                    str(n): f"{store}/{n}?X-Amz-Signature={ask.hub.key}" for n in parts
                }
            upload = {"href": f"{store}?X-Amz-Signature={ask.hub.key}", "header": header}
            verify = {"href": f"{ask.address(repo)}.git/info/lfs/verify", "header": {}}
            answer["actions"] = {"upload": upload, "verify": verify}
        answers.append(answer)
    answer = JSONResponse({"transfer": "basic", "objects": answers})
    return answer


def put_object(ask: Ask) -> Response:
    """Take an object, or one part of it, at a presigned address; content whose hash is wrong is refused."""
    _signed(ask)
    oid, part = ask.words["oid"], ask.words.get("part")
    if part is not None:
        ask.hub.parts.setdefault(oid, {})[int(part)] = ask.body
        return Response(headers={"ETag": f'"{hashlib.md5(ask.body).hexdigest()}"'})
    if ask.request.method == "POST":  # all parts are there
        parts = ask.hub.parts.pop(oid, {})
        sent = [(n, f'"{hashlib.md5(parts[n]).hexdigest()}"') for n in sorted(parts)]
        if sent != [(each["partNumber"], each["etag"]) for each in ask.json["parts"]]:
            raise Refusal(400, "Parts do not match")
        ask.body = b"".join(parts[n] for n in sorted(parts))
    if hashlib.sha256(ask.body).hexdigest() != oid:
        raise Refusal(400, "The provided 'x-amz-content-sha256' does not match what was computed")
    ask.hub.objects[oid] = ask.body
    return Response(headers={"ETag": f'"{hashlib.md5(ask.body).hexdigest()}"'})


def verify(ask: Ask) -> Response:
    held = ask.hub.objects.get(ask.json["oid"])
    if held is None or len(held) != ask.json["size"]:
        raise Refusal(404, "Object does not exist")
    return JSONResponse({})


def make_commit(ask: Ask) -> Response:
    """Carry out all operations or none."""
    pull = ask.on("create_pr")
    repo = ask.repo() if pull and ask.account else ask.writable()
    account, revision = ask.account, ask.words["revision"]
    assert account is not None
    parent = ask.commit(repo)
    ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
    if ref not in repo.refs:
        raise Refusal(400, "A commit can be made on a branch only")
    files, header = dict(parent.files), {}
    for line in ask.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            header = value
        elif key == "file":
            content = (
                base64.b64decode(value["content"])
                if value.get("encoding") == "base64"
                else value["content"].encode()
            )
            files[value["path"]] = ask.hub.store(content)
        elif key == "lfsFile":
            if value["oid"] not in ask.hub.objects:
                raise Refusal(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
            files[value["path"]] = ask.hub.store(ask.hub.objects[value["oid"]], lfs=True)
        elif key == "copyFile":
            source = repo.commits[repo.find(value.get("srcRevision") or parent.sha) or ""].files
            files[value["path"]] = source[value["srcPath"]]
        elif key in ("deletedFile", "deletedFolder"):
            gone = [
                path
                for path in files
                if path == value["path"]
                or (key == "deletedFolder" and path.startswith(value["path"].rstrip("/") + "/"))
            ]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for path in gone:
                del files[path]
        else:
            raise Refusal(400, f"unknown operation {key}")
    if header.get("parentCommit", parent.sha) != parent.sha:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    if not header.get("summary"):
        raise Refusal(400, "summary is required")
    address = None
    if pull:
        number = _open_pull(repo, account, header["summary"], pull=True)
        ref, address = f"refs/pr/{number}", f"{ask.address(repo)}/discussions/{number}"
    made = ask.hub.commit(
        repo, parent.sha, files, header["summary"], header.get("description", ""), account.name, ref
    )
    return JSONResponse({"success": True, "commitOid": made.sha, "commitUrl": f"{ask.address(repo)}/commit/{made.sha}",
                         "hookOutput": "", "pullRequestUrl": address})  # fmt: skip


def resolve(ask: Ask) -> Response:
    """Answer with a file: small ones by way of the commit's cache address, large ones from storage."""
    repo = ask.opened()
    commit, path = ask.commit(repo), ask.words["path"]
    found = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    blob = commit.files.get(path)
    if blob is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", **found)
    if blob.lfs:
        found |= {
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(blob.size),
            "ETag": f'"{blob.oid}"',
        }
        return RedirectResponse(
            f"{ask.hub.storage}/storage/{blob.sha256}?X-Amz-Signature={ask.hub.key}", 302, found
        )
    if not ask.words.get("cached"):
        cache = f"/api/resolve-cache/{KINDS[repo.kind]}/{repo.id}/{commit.sha}/{quote(path)}"
        return RedirectResponse(cache, 307, found | {"ETag": f'"{blob.oid}"'})
    return _content(ask, ask.hub.objects[blob.sha256], found | {"ETag": f'"{blob.oid}"'})


def get_object(ask: Ask) -> Response:
    _signed(ask)
    content = ask.hub.objects.get(ask.words["oid"])
    if content is None:
        raise Refusal(404, "NoSuchKey")
    return _content(ask, content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Accept-Ranges": "bytes"})


def validate_yaml(ask: Ask) -> Response:
    problems = []
    try:
        card = _front_matter(ask.json["content"], strict=True)
        for key in ("base_model", "datasets"):
            problems += [f'"{key}" with value "{name}" is not valid. Use an id from the Hub.' for name in _list(card.get(key))
                         if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))]  # fmt: skip
        if "model-index" in card:
            from huggingface_hub.repocard_data import model_index_to_eval_results

            model_index_to_eval_results(card["model-index"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        problems.append(f"{type(error).__name__}: {error}")
    found = {"errors": [{"message": problem} for problem in problems], "warnings": []}
    return JSONResponse(found, 400 if problems else 200)


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+?)"
ROUTES: list[tuple[str, str, Callable[[Ask], Response]]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("DELETE", r"/api/repos/delete", delete_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    (
        "GET HEAD",
        r"/api/resolve-(?P<cached>cache)/(?P<kind>\w+)/(?P<repo>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<path>.+)",
        resolve,
    ),
    ("GET", _API, info),
    ("GET", _API + r"/revision/(?P<revision>[^/]+)", info),
    ("PUT", _API + r"/settings", settings),
    ("GET", _API + r"/auth-check(?P<write>/write)?", auth_check),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", paths_info),
    ("GET", _API + r"/commits/(?P<revision>[^/]+)", commits),
    ("GET", _API + r"/refs", refs),
    ("POST", _API + r"/(?:branch|tag)/(?P<name>[^/]+)", make_ref),
    ("DELETE", _API + r"/(?P<what>branch|tag)/(?P<name>[^/]+)", delete_ref),
    ("GET POST", _API + r"/discussions", discussions),
    ("GET", _API + r"/discussions/(?P<number>\d+)", discussion),
    ("POST", _API + r"/discussions/(?P<number>\d+)/(?P<verb>merge)", discussion),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", make_commit),
    ("POST", _PAGE + r"\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", _PAGE + r"\.git/info/lfs/verify", verify),
    ("GET HEAD", _PAGE + r"/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ("PUT POST", r"/storage/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", put_object),
    ("GET HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", get_object),
]


def _signed(ask: Ask) -> None:
    if ask.request.query_params.get("X-Amz-Signature") != ask.hub.key:
        raise Refusal(403, "SignatureDoesNotMatch")


def _content(ask: Ask, content: bytes, headers: dict[str, str]) -> Response:
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", ask.request.headers.get("range", ""))
    if asked is None or not content:
        return Response(content, headers=headers)
    first, last = asked[1], asked[2]
    start = int(first) if first else max(0, len(content) - int(last))
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= len(content):
        raise Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{len(content)}")
    return Response(
        content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
    )


def _entries(commit: Commit, folder: str, *, recursive: bool, expand: bool) -> list[dict[str, Any]]:
    """Return files and folders below a folder, or the folder's own alone."""
    start = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, blob in commit.files.items():
        if not path.startswith(start):
            continue
        parts = path.removeprefix(start).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            place = start + "/".join(parts[:depth])
            found[place] = {
                "type": "directory",
                "path": place,
                "size": 0,
                "oid": hashlib.sha1(place.encode()).hexdigest(),
            }
        if recursive or len(parts) == 1:
            found[path] = blob.entry(path)
    last = {"lastCommit": {"id": commit.sha, "title": commit.title, "date": commit.date}} if expand else {}
    return [entry | last for _, entry in sorted(found.items())]


def _open_pull(repo: Repo, account: Account, title: str, *, pull: bool) -> int:
    number = len(repo.pulls) + 1
    repo.pulls[number] = {
        "title": title,
        "author": account.name,
        "pull": pull,
        "status": "draft" if pull else "open",
    }
    return number


def _discussion(repo: Repo, number: int) -> dict[str, Any]:
    found = repo.pulls[number]
    changes = {"base": "refs/heads/main", "mergeCommitId": found.get("merged")}
    return {"num": number, "title": found["title"], "author": {"name": found["author"]}, "status": found["status"],
            "createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": repo.id, "type": repo.kind}, "events": [],
            "isPullRequest": found["pull"], "changes": changes, "filesWithConflicts": [], "diff": ""}  # fmt: skip


def is_large(path: str, size: int, sample: bytes) -> bool:
    return (
        size > 10_000_000
        or b"\0" in sample
        or any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in LARGE)
    )


def git_oid(content: bytes, lfs: bool) -> str:
    """Return git's hash of a file, of a large one that of the pointer to it."""
    if lfs:
        oid = hashlib.sha256(content).hexdigest()
        content = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
        )
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _front_matter(text: str, *, strict: bool = False) -> dict[str, Any]:
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        card = yaml.safe_load(found[1]) if found else {}
        if not isinstance(card or {}, dict):
            raise ValueError("the metadata is not a mapping")
    except (yaml.YAMLError, ValueError):
        if strict:
            raise
        card = {}
    return json.loads(json.dumps(card or {}, default=str))


def _list(value: Any) -> Iterable[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
