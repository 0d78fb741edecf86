"""A small Hugging Face hub on loopback, with only the endpoints that `huggingface_hub` needs to download a model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repository: the commit of each branch and tag, and the directory with the files of each commit."""

    refs: dict[str, str]
    commits: dict[str, Path]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class SmallHub:
    repos: dict[str, Repo] = field(default_factory=dict)
    token: str = "hf_right"
    requests: list[str] = field(default_factory=list)
    """`METHOD path` of each request, in order."""
    broken: bool = False
    """Answer every request with 503."""
    closed: str = ""
    """If not empty: answer requests for files with 403 and this message. Their list may still be read."""
    tells_sizes: bool = True
    """Include the sizes of files, which not every mirror does."""
    silent: str | None = None
    """Requests whose path contains this are accepted and never answered."""
    url: str = ""

    def add(self, name: str, folder: Path, *, gated: bool = False) -> str:
        """Publishes `folder` as the newest commit of the main branch; returns the commit."""
        names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        content = b"".join(name.encode() + (folder / name).read_bytes() for name in names)
        commit = hashlib.sha1(content).hexdigest()  # noqa: S324  -- git's commits are SHA-1, too
        repo = self.repos.setdefault(name, Repo({}, {}, gated))
        repo.commits[commit] = folder
        repo.refs["main"] = commit
        return commit

    def downloads(self) -> list[str]:
        """The names of the files that were downloaded, in order."""
        return [
            request.rpartition("/")[2]
            for request in self.requests
            if request.startswith("GET") and "/resolve/" in request
        ]


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    hub = SmallHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.silent is not None and self.hub.silent in path:
            self.rfile.read()  # blocks until the client closes the connection
            return
        if self.hub.broken:
            self._error(503, "", "the hub is being repaired")
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        else:
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._file(repo, revision, file)

    def _found(self, name: str, revision: str) -> tuple[str, Path] | None:
        """The commit and its folder; None if an error was sent, with a code as the real hub sends it."""
        repo = self.hub.repos.get(name)
        if repo is None:
            self._error(401, "", "Invalid username or password.")  # the same as for a private repository
            return None
        if repo.gated and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._error(401, "GatedRepo", f"Access to model {name} is restricted.")
            return None
        commit = repo.commit(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repo.commits[commit]

    def _api(self, path: str) -> None:
        for kind in ("revision", "tree"):
            name, separator, revision = path.partition(f"/{kind}/")
            if separator:
                break
        found = self._found(name, revision if separator else "main")
        if found is None:
            return
        commit, folder = found
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if kind == "tree":
            self._json([_tree_entry(file, folder) for file in files])
        else:
            siblings: list[dict[str, Any]] = [{"rfilename": str(file.relative_to(folder))} for file in files]
            if self.hub.tells_sizes:
                for sibling, file in zip(siblings, files, strict=True):
                    sibling["size"] = file.stat().st_size
            self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0})

    def _file(self, name: str, revision: str, file: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return
        if self.hub.closed:
            self._error(403, "", self.hub.closed)
            return
        commit, folder = found
        path = folder / file
        if not path.is_file():
            self._error(404, "EntryNotFound", f"no file {file}", {"X-Repo-Commit": commit})
            return
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(content)}"'}
        self._send(200, content, headers | {"Content-Type": "application/octet-stream"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        coded = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._send(
            status, body, {"Content-Type": "application/json", "X-Error-Message": message} | coded | (headers or {})
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree_entry(file: Path, folder: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"type": "file", "path": str(file.relative_to(folder)), "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()  # noqa: S324  -- git's blobs are SHA-1, too
