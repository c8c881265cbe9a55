"""A small Hub on this computer: an HTTP server that speaks what the real client speaks, with faults on demand.

It knows repositories of models and datasets as chains of commits, takes large files by the LFS protocol and the rest
inside a commit, and serves both by commit, branch or tag, in ranges. Xet is left out: `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_" + "p1antedT0ken" * 3
"""What everybody has to show who writes, or who reads what is private."""
LARGE = (".safetensors", ".parquet", ".webp")
"""Endings of what goes by LFS."""

Answer = Literal["drop", "lost", "corrupt"] | int
"""A fault: an HTTP status, or the connection dropped in the middle, or the work done and the answer lost, or bytes
damaged on their way."""


class Blob(NamedTuple):
    """A file's contents."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_oid

    def info(self, path: str) -> dict[str, Any]:
        """As the client's listings want it."""
        told = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid}
        return told | ({"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}} if self.large else {})


class Commit(NamedTuple):
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, title: str, files: dict[str, Blob]) -> Commit:
        told = [self.kind, self.id, len(self.commits), title, sorted((p, b.sha256) for p, b in files.items())]
        commit = Commit(hashlib.sha1(json.dumps(told).encode()).hexdigest(), title, files)
        self.commits.append(commit)
        return commit

    def at(self, revision: str) -> Commit | None:
        oid = self.tags.get(revision, revision)
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def files(self) -> dict[str, bytes]:
        """What stands at the head of its branch."""
        return {path: blob.data for path, blob in self.commits[-1].files.items() if path != ".gitattributes"}


class Asked(NamedTuple):
    """A line of the log."""

    method: str
    stage: str
    path: str
    token: bool


@dataclass
class Hub:
    """The server. Faults and its log are told by stage: create, info, validate, preupload, batch, upload, verify,
    commit, tree, resolve."""

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    log: list[Asked] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    def dataset(self, name: str) -> Repo:
        return self.repos["dataset", name]

    def put(self, kind: str, name: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        """A repository with files, or a further commit of one."""
        repo = self.repos.setdefault((kind, name), Repo(kind, name, private))
        before = repo.commits[-1].files if repo.commits else {}
        repo.add("by hand", {**before, **{path: Blob(data, path.endswith(LARGE)) for path, data in files.items()}})
        return repo

    def fail(self, stage: str, how: Answer, *, times: int = 1, on: str = "") -> None:
        """Answer the next requests of a stage, or those with `on` in their path, like this."""
        self.faults.append({"stage": stage, "how": how, "left": times, "on": on})

    def heads(self) -> dict[tuple[str, str], str]:
        """The newest commit of every repository that holds something."""
        return {key: repo.commits[-1].oid for key, repo in self.repos.items() if repo.files}

    def asked(self, stage: str, method: str = "") -> list[str]:
        """Paths of the requests of a stage, in order."""
        return [one.path for one in self.log if one.stage == stage and method in ("", one.method)]

    def fault(self, stage: str, path: str) -> Answer | None:
        with self.lock:
            for one in self.faults:
                if one["stage"] == stage and one["on"] in path and one["left"] > 0:
                    one["left"] -= 1
                    how: Answer = one["how"]
                    return how
        return None


_REPO = r"/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
ROUTES: tuple[tuple[str, str, str], ...] = (
    ("POST", "create", r"/api/repos/create"),
    ("POST", "validate", r"/api/validate-yaml"),
    ("POST", "preupload", rf"/api{_REPO}/preupload/(?P<revision>[^/]+)"),
    ("POST", "commit", rf"/api{_REPO}/commit/(?P<revision>[^/]+)"),
    ("GET", "tree", rf"/api{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"),
    ("GET", "info", rf"/api{_REPO}(/revision/(?P<revision>[^/]+))?"),
    ("POST", "batch", r"/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("PUT", "upload", r"/large/(?P<oid>\w+)"),
    ("POST", "verify", r"/verify/(?P<oid>\w+)"),
    ("GET", "resolve", r"/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client to confirm its headers
    hub: Hub
    how: Answer | None = None

    def log_message(self, *_: object) -> None:
        """Silence: the hub keeps a log of its own."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url, body = urlsplit(self.path), self._body()
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        found = ((stage, re.fullmatch(pattern, url.path)) for wanted, stage, pattern in ROUTES if wanted == method)
        stage, match = next(((stage, match) for stage, match in found if match), ("", None))
        if match is None:
            return self._json(404, {"error": f"no such address: {self.command} {url.path}"})
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        with self.hub.lock:
            self.hub.log.append(Asked(self.command, stage, unquote(url.path), authorized))
        self.how = self.hub.fault(stage, unquote(url.path))
        if isinstance(self.how, int):
            return self._json(self.how, {"error": f"fault {self.how}"}, {"Retry-After": "0"} if self.how == 429 else {})
        if self.how == "drop" and stage != "resolve":
            return self._hang_up()
        writes = stage in ("create", "preupload", "commit", "batch")
        if writes and not authorized:
            return self._json(401, {"error": "Invalid username or password."})
        groups: dict[str, Any] = {name: unquote(value or "") for name, value in match.groupdict().items()}
        if "id" in groups:
            kind = (groups.get("kind") or "models").removesuffix("s")
            repo = self.hub.repos.get((kind, groups["id"]))
            if repo is None or (repo.private and not authorized):
                return self._error(401 if repo is None and not authorized else 404, "RepoNotFound")
            groups["repo"] = repo
        act: Callable[..., None] = getattr(self, f"_{stage}")
        with self.hub.lock:
            return act(body, **groups)

    # --- writing ------------------------------------------------------------------------------------------------------

    def _create(self, body: bytes) -> None:
        told = json.loads(body)
        kind, name = told.get("type") or "model", f"{told['organization']}/{told['name']}"
        there = (kind, name) in self.hub.repos
        if not there:
            repo = Repo(kind, name, told.get("visibility") == "private")
            repo.add("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
            self.hub.repos[kind, name] = repo
        answer = {"url": f"{self.hub.url}/{name}"} | ({"error": "You already created this repo"} if there else {})
        self._json(409 if there else 200, answer)

    def _validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            fine = isinstance(yaml.safe_load(front[1] if front else ""), dict)
        except yaml.YAMLError:
            fine = False
        errors = [] if fine else [{"message": "the front matter is no YAML mapping"}]
        self._json(200 if fine else 400, {"errors": errors, "warnings": []})

    def _preupload(self, body: bytes, repo: Repo, **_: Any) -> None:
        now = repo.commits[-1].files
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": now[one["path"]].etag if one["path"] in now else None,
            }
            for one in json.loads(body)["files"]
        ]
        self._json(200, {"files": files})

    def _batch(self, body: bytes, **_: Any) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.large:
                upload, verify = (f"{self.hub.url}/{word}/{one['oid']}" for word in ("large", "verify"))
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        self._json(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        self.hub.large[oid] = _damaged(body) if self.how == "corrupt" else body
        self._json(200, {})

    def _verify(self, _: bytes, oid: str) -> None:
        fine = hashlib.sha256(self.hub.large.get(oid, b"")).hexdigest() == oid
        if not fine:
            self.hub.large.pop(oid, None)
        self._json(200 if fine else 422, {} if fine else {"error": "the contents have another hash"})

    def _commit(self, body: bytes, repo: Repo, **_: Any) -> None:
        header, *operations = (json.loads(line) for line in body.splitlines())
        if header["value"].get("parentCommit", repo.commits[-1].oid) != repo.commits[-1].oid:
            return self._json(412, {"error": "The branch has moved since."})
        files = dict(repo.commits[-1].files)
        for one in operations:
            value, path = one["value"], one["value"]["path"]
            if one["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif one["key"] == "deletedFile":
                del files[path]
            elif value["oid"] in self.hub.large:
                files[path] = Blob(self.hub.large[value["oid"]], True)
            else:
                return self._json(400, {"error": f"{path} was never uploaded"})
        commit = repo.add(header["value"]["summary"], files)
        if self.how == "lost":
            return self._hang_up()
        url = f"{self.hub.url}/{repo.id}/commit/{commit.oid}"
        return self._json(200, {"commitUrl": url, "commitOid": commit.oid, "pullRequestUrl": None})

    # --- reading ------------------------------------------------------------------------------------------------------

    def _info(self, _: bytes, repo: Repo, revision: str, **__: Any) -> None:
        commit = repo.at(revision or "main")
        if commit is None:
            return self._error(404, "RevisionNotFound")
        told = {"id": repo.id, "sha": commit.oid, "private": repo.private, "tags": [], "downloads": 0, "likes": 0}
        return self._json(200, told | {"siblings": [{"rfilename": path} for path in commit.files]})

    def _tree(self, _: bytes, repo: Repo, revision: str, path: str, **__: Any) -> None:
        commit = repo.at(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        under = f"{path}/" if path else ""
        files = {name: blob for name, blob in commit.files.items() if name.startswith(under)}
        if not files:
            return self._error(404, "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            direct = [blob.info(name) for name, blob in files.items() if "/" not in name.removeprefix(under)]
            return self._json(200, direct + _folders(files, under))
        return self._json(200, [blob.info(name) for name, blob in files.items()])

    def _resolve(self, _: bytes, repo: Repo, revision: str, path: str, **__: Any) -> None:
        commit = repo.at(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            return self._error(404, "EntryNotFound", headers)
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        data = _damaged(blob.data) if self.how == "corrupt" else blob.data
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 206 if wanted else 200
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        return self._send(status, data, headers)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._json(status, {"error": code}, {"X-Error-Code": code, **(headers or {})})

    def _json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.how == "drop":
            self.wfile.write(data[: len(data) // 2])
            self._hang_up()
        else:
            self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


def _damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _folders(files: dict[str, Blob], under: str) -> list[dict[str, Any]]:
    names = {name.removeprefix(under).split("/")[0] for name in files if "/" in name.removeprefix(under)}
    return [{"type": "directory", "path": f"{under}{name}", "oid": "0" * 40, "size": 0} for name in sorted(names)]


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that runs."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """What a program of its own needs in its environment to reach the hub; its caches lie under `home`."""
    told = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0"}
    told |= {"XDG_CACHE_HOME": str(home / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    return told | ({"HF_TOKEN": token} if token else {})


def point_client_at(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Make the client in this process, which read its environment when it was imported, use the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
