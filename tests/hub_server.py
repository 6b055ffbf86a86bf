"""A stand-in for the hub on this machine: enough of its HTTP for huggingface_hub's own client to pull from."""

from __future__ import annotations

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

TOKEN = "hf_a_secret_that_is_nowhere_to_be_seen"
TINY = "someone/tiny"

# What real repositories hold beside what a pipeline is loaded from.
NOT_NEEDED = {
    "README.md": b"# A card",
    ".gitattributes": b"*.safetensors filter=lfs",
    "LICENSE": b"Apache-2.0",
    "assets/example.mp4": b"\0" * 5000,
    "original/model.safetensors": b"\1" * 5000,
    "model.safetensors": b"\2" * 5000,
    "transformer/diffusion_pytorch_model.bin": b"\3" * 5000,
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"\4" * 5000,
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json": b"{}",
    "text_encoder/pytorch_model.bin.index.json": b"{}",
    "text_encoder/model.onnx": b"\5" * 5000,
    "transformer/modeling.py": b"raise SystemExit",
    "transformer/nested/settings.json": b"{}",
}


@dataclass
class Repository:
    """Files by revision. Those above a kilobyte are kept as the hub keeps large ones: apart, named by their sha256."""

    revisions: dict[str, dict[str, bytes]]
    gated: int = 0  # the status for those who may not have it

    def commit(self, revision: str) -> str:
        """Return the commit of a revision, 40 digits."""
        if revision not in self.revisions:  # a commit already
            return revision
        content = sorted((path, blob_id(data)) for path, data in self.revisions[revision].items())
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Return the files of a revision or commit."""
        return next((files for name, files in self.revisions.items() if revision in (name, self.commit(name))), None)


@dataclass
class Hub:
    """What the hub has, what it was asked, and what goes wrong."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)  # path -> bytes after which the connection breaks, once
    wrong: dict[str, bytes] = field(default_factory=dict)  # path -> what is sent in its place
    broken: set[str] = field(default_factory=set)  # paths that answer 500
    endpoint: str = ""

    def paths(self, method: str = "GET") -> list[str]:
        """Return the paths of files that were asked for, in order."""
        return [path.split("/", 5)[-1] for verb, path, _ in self.asked if verb == method and "/resolve/" in path]


def blob_id(data: bytes) -> str:
    """Return what git names a file by."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(data: bytes) -> bool:
    """Return whether the hub keeps a file apart."""
    return len(data) > 1000


def files_of(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on the loopback for as long as the block runs."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, {key.title(): value for key, value in self.headers.items()}))
        if path.startswith("/cdn/"):
            _, _, owner, name, commit, file = path.split("/", 5)
            self.send_file(f"{owner}/{name}", commit, file)
            return
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").split("/")
        name, rest = "/".join(parts[1:3]), parts[3:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.send(404, headers={"X-Error-Code": "RepoNotFound"})
        elif repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(repository.gated, headers={"X-Error-Code": "GatedRepo"})
        elif repository.files(rest[1]) is None:
            self.send(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif is_api:
            self.send_listing(name, repository, what=rest[0], revision=rest[1])
        else:
            self.resolve(name, repository, repository.commit(rest[1]), "/".join(rest[2:]))

    def send_listing(self, name: str, repository: Repository, *, what: str, revision: str) -> None:
        files = repository.files(revision) or {}
        entries = [
            (path, data, hashlib.sha256(data).hexdigest() if is_large(data) else None) for path, data in files.items()
        ]
        if what == "tree":
            content: Any = [
                {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
                | ({"lfs": {"oid": sha, "size": len(data), "pointerSize": 130}} if sha else {})
                for path, data, sha in entries
            ]
        else:
            siblings = [
                {"rfilename": path, "size": len(data), "blobId": blob_id(data)}
                | ({"lfs": {"sha256": sha, "size": len(data), "pointerSize": 130}} if sha else {})
                for path, data, sha in entries
            ]
            content = {"id": name, "sha": repository.commit(revision), "siblings": siblings}
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, repository: Repository, commit: str, path: str) -> None:
        data = (repository.files(commit) or {}).get(path)
        if data is None:
            self.send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif is_large(data):
            headers = {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
                # Large files lie on another host, which is told no token.
                "Location": f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{name}/{commit}/{path}",
            }
            self.send(302, headers=headers)
        else:
            self.send_file(name, commit, path)

    def send_file(self, name: str, commit: str, path: str) -> None:
        data = (self.hub.repositories[name].files(commit) or {})[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(data)}"', "Accept-Ranges": "bytes"}
        data = self.hub.wrong.get(path, data)
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if path in self.hub.broken and self.command == "GET":
            self.send(500)
            return
        cut = self.hub.cut.pop(path, None) if self.command == "GET" else None
        self.send(206 if begin else 200, data[begin:], headers, cut=cut)

    def send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
