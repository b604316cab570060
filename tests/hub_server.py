"""A Hub on loopback: the protocol that huggingface_hub speaks, over real HTTP, with faults on demand.

`with Hub() as hub:` serves at `hub.url`. Content is stored by its sha256, a commit is a table of paths, a reference
names a commit. Large files go through presigned addresses on another host name, as on the real Hub, so that a client
that sends its token there is seen in `hub.calls`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import threading
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hub_protocol import LARGE, ROUTES, Account, Ask, Blob, Commit, Refusal, Repo, git_oid, is_large

FAULTS = ("500", "503", "429", "cut request", "cut response", "lost", "slow", "403", "corrupt")
"""Kinds of fault: a status; a connection cut before the request is read, in the middle of the answer, or after the
request was carried out; a slow answer; an upload that arrives damaged."""


@dataclass
class Call:
    """One request, as it came and as it was answered."""

    method: str
    path: str
    host: str
    token: str | None
    status: int = 0
    fault: str | None = None


@dataclass
class Fault:
    """Makes requests whose `METHOD path` matches fail: the next `times` of them, after `skip`, each by `share`."""

    kind: str
    match: str = ""
    times: int | None = None
    skip: int = 0
    share: float = 1.0
    retry_after: int = 0


class Hub:
    """The server, its accounts, its repositories, and what was asked of it."""

    def __init__(self, *, multipart_over: int | None = None, page: int = 1000, slowness: float = 0.2) -> None:
        self.accounts: dict[str, Account] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[Call] = []
        self.unknown: list[str] = []
        """`METHOD path` of requests that nothing here answers."""
        self.faults: list[Fault] = []
        self.kinds: tuple[str, ...] = FAULTS
        self.multipart_over, self.page, self.slowness = multipart_over, page, slowness
        self.parts: dict[str, dict[int, bytes]] = {}
        self._rng = random.Random(0)
        self.key = os.urandom(8).hex()
        self.url = self.storage = ""

    # -- for tests ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Hub:
        config = uvicorn.Config(self, host="127.0.0.1", port=0, log_level="critical", http="h11", lifespan="off",
                                timeout_graceful_shutdown=1)  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            self._thread.join(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def user(self, name: str, *, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """Make an account and return its token; of an existing account, another token."""
        token = f"hf_{name}{os.urandom(12).hex()}"
        self.accounts[token] = Account(name, role, orgs)
        return token

    def create(self, repo_id: str, kind: str = "model", **fields: Any) -> Repo:
        """Make a repository, with the first commit that every repository has."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, **fields)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE)
        self.commit(repo, None, {".gitattributes": self.store(attributes.encode())}, "initial commit")
        return repo

    def upload(self, folder: Path, repo_id: str, kind: str = "model", **fields: Any) -> Repo:
        """Make a repository of a folder's files, without HTTP."""
        repo = self.repos.get((kind, repo_id)) or self.create(repo_id, kind, **fields)
        files = dict(repo.commits[repo.refs["refs/heads/main"]].files)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            files[name] = self.store(path.read_bytes(), lfs=is_large(name, 0, b""))
        self.commit(repo, repo.refs["refs/heads/main"], files, "upload")
        return repo

    def store(self, content: bytes, *, lfs: bool = False) -> Blob:
        """Keep a content and return its hashes."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return Blob(sha256, git_oid(content, lfs), len(content), lfs)

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Return the content of every file of a revision."""
        repo = self.repos[kind, repo_id]
        found = repo.commits[repo.find(revision) or ""].files
        return {path: self.objects[blob.sha256] for path, blob in found.items()}

    def fail(
        self, kind: str, match: str = "", *, times: int = 1, skip: int = 0, retry_after: int = 0
    ) -> None:
        """Make the next requests whose `METHOD path` matches fail."""
        self.faults.append(Fault(kind, match, times, skip, retry_after=retry_after))

    def fail_at_random(self, share: float, seed: int, kinds: tuple[str, ...] = FAULTS) -> None:
        """Make a share of all requests fail, in ways drawn by a seed; 0 ends it."""
        self._rng, self.kinds = random.Random(seed), kinds
        self.faults = [Fault("any", share=share)] if share else []

    def environment(self, token: str | None, home: Path, **more: str) -> dict[str, str]:
        """Return the environment of a process that knows this Hub alone, with its caches under `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
               "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        return kept | own | ({"HF_TOKEN": token} if token else {}) | more

    # -- HTTP --------------------------------------------------------------------------------------------------

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        path = scope["raw_path"].decode()
        token = request.headers.get("authorization", "").removeprefix("Bearer ") or None
        call = Call(request.method, path, request.headers.get("host", ""), token)
        self.calls.append(call)
        fault = self._fault(call)
        call.fault = fault.kind if fault else None
        transport = send.__self__.transport
        if call.fault == "cut request":
            await receive()
            return transport.abort()
        body = await request.body()
        if call.fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault and call.fault in ("429", "403", "500", "503"):
            said = {"429": "Too many requests", "403": "You may not do this now"}.get(
                call.fault, "Try again later"
            )
            answer: Response = JSONResponse({"error": said}, int(call.fault))
            answer.headers["X-Error-Message"] = said
            if call.fault == "429":
                answer.headers["Retry-After"] = str(fault.retry_after)
        else:
            try:
                answer = self._route(request, path, body)
            except Refusal as refusal:
                answer = refusal.answer
        call.status = answer.status_code
        if call.fault == "lost":
            return transport.abort()
        if call.fault in ("slow", "cut response"):
            half = len(answer.body) // 2
            await send({"type": "http.response.start", "status": call.status, "headers": answer.raw_headers})
            await send({"type": "http.response.body", "body": answer.body[:half], "more_body": True})
            await asyncio.sleep(
                self.slowness if call.fault == "slow" else 0.01
            )  # what was sent must leave first
            if call.fault == "cut response":
                return transport.abort()
            return await send({"type": "http.response.body", "body": answer.body[half:]})
        await answer(scope, receive, send)

    def _fault(self, call: Call) -> Fault | None:
        for fault in list(self.faults):
            if not re.search(fault.match, f"{call.method} {call.path}"):
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
            elif self._rng.random() >= fault.share:
                continue
            kind = self._rng.choice(self.kinds) if fault.kind == "any" else fault.kind
            uploads = call.method == "PUT" and call.path.startswith("/storage/")
            return replace(fault, kind="500" if kind == "corrupt" and not uploads else kind)
        return None

    def _route(self, request: Request, path: str, body: bytes) -> Response:
        for method, pattern, handler in ROUTES:
            if found := re.fullmatch(pattern, path):
                if request.method not in method.split():
                    continue
                words = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                ask = Ask(self, request, body, self._account(request), words)
                return handler(ask)
        self.unknown.append(f"{request.method} {path}")
        raise Refusal(404, f"There is no {request.method} {path} here.")

    def _account(self, request: Request) -> Account | None:
        given = request.headers.get("authorization")
        if given is None:
            return None
        account = self.accounts.get(given.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def commit(
        self, repo: Repo, parent: str | None, files: dict[str, Blob], title: str, description: str = "",
        author: str = "server", ref: str = "refs/heads/main",
    ) -> Commit:  # fmt: skip
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        sha = hashlib.sha1(os.urandom(20)).hexdigest()
        repo.commits[sha] = Commit(sha, parent, title, description, author, date, dict(sorted(files.items())))
        repo.refs[ref] = sha
        return repo.commits[sha]
