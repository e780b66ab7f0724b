"""A hub on loopback: the addresses, headers and redirects that huggingface_hub, transformers and datasets use."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE_FILES = (".bin", ".safetensors", ".model", ".parquet")
"""Kept in Git LFS: `resolve` sends the reader on to another address."""


@dataclass
class Repository:
    kind: str
    """model or dataset."""
    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    """Its description is public, its files are not."""

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Put `files` in a new commit that `ref` then names."""
        seed = [self.name, ref, *sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())]
        sha = hashlib.sha1(repr(seed).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


class FakeHub:
    """Serves `repositories`; `faults` maps the end of a file's path to what befalls its download.

    stall: half of it, then nothing. cut: half of it, then the connection ends. reset: half of it, then a
    TCP reset. short: the server itself takes half of it for the whole.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: dict[str, str] = {}
        self.answers: dict[str, tuple[int, str]] = {}
        """Part of an address -> (status, X-Error-Code) that is given there."""
        self.silent = False
        """Take connections and say nothing."""
        self.pace_s = 0.0
        """Waited in the middle of each answer's body."""
        self.address = ""
        """`http://127.0.0.1:PORT`, while it is up."""
        self.requests: list[str] = []
        self._closing = threading.Event()

    def add(self, kind: str, name: str, files: dict[str, bytes] | None = None, **fields) -> Repository:
        repository = self.repositories[kind, name] = Repository(kind, name, **fields)
        if files is not None:
            repository.commit(files)
        return repository

    @contextmanager
    def serve(self) -> Iterator[FakeHub]:
        """Up while the context lasts. May be entered again: the address is another one then."""
        self._closing.clear()
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            self.address = f"http://127.0.0.1:{server.server_address[1]}"
            yield self
        finally:
            self._closing.set()
            server.shutdown()
            server.server_close()

    def downloads(self) -> list[str]:
        """Paths of the files whose contents were asked for."""
        gets = [request.removeprefix("GET ") for request in self.requests if request.startswith("GET ")]
        return [
            path.split("/", 6)[6] if path.startswith("/lfs/") else path.split("/resolve/")[1].split("/", 1)[1]
            for path in gets
            if path.startswith("/lfs/") or "/resolve/" in path
        ]

    def wait(self, seconds: float) -> None:
        self._closing.wait(seconds)


def point_at(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's huggingface_hub and datasets ask `hub`, cache under `home`, and not wait long."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    for module in (file_download, _http):  # they sleep between their own tries
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
    monkeypatch.setattr(
        datasets.config, "HUB_DATASETS_URL", hub.address + "/datasets/{repo_id}/resolve/{revision}/{path}"
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", home / "datasets" / "downloads")
    huggingface_hub.HfFileSystem.clear_instance_cache()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None: ...

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_POST(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.silent:
            self.hub.wait(60)
            self.close_connection = True
            return
        for part, answer in self.hub.answers.items():
            if part in self.path:
                self._refuse(*answer)
                return
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        query = parse_qs(address.query)
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            self._api(parts[1][:-1], parts[2:], query, sent)
        elif parts[0] == "lfs":
            kind, name, sha, path = parts[1], "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
            self._file(path, self.hub.repositories[kind, name].commits[sha][path], {}, body)
        else:
            kind = "dataset" if parts[0] == "datasets" else "model"
            parts = parts[1:] if kind == "dataset" else parts
            if len(parts) < 5 or parts[2] != "resolve":
                self._refuse(404, "")
                return
            self._resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)

    # ---- what the hub says of a repository ---------------------------------------------------

    def _api(self, kind: str, parts: list[str], query: dict, sent: bytes) -> None:
        repository = self._repository(kind, "/".join(parts[:2]))
        if repository is None:
            return
        what, rest = (parts[2], parts[3:]) if len(parts) > 2 else ("revision", ["main"])
        sha = repository.find(rest[0]) if rest else None
        if sha is None:
            self._refuse(404, "RevisionNotFound")
            return
        files = repository.commits[sha]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            about = {"_id": sha[:24], "id": repository.name, "sha": sha, "siblings": siblings}
            self._json(about | {"private": False, "gated": repository.gated, "tags": [], "downloads": 0, "likes": 0})
        elif what == "tree":
            self._tree(files, "/".join(rest[1:]), "recursive" in query and query["recursive"][0].lower() != "false")
        elif what == "paths-info":
            form = parse_qs(sent.decode())
            wanted = json.loads(sent)["paths"] if sent.startswith(b"{") else form["paths"]
            found = [_entry(p, files[p]) for p in wanted if p in files]
            found += [_folder(p) for p in wanted if any(name.startswith(f"{p}/") for name in files)]
            self._json(found)
        else:
            self._refuse(404, "")

    def _tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        inside = {p: data for p, data in files.items() if not folder or p.startswith(f"{folder}/")}
        if folder and not inside:
            self._refuse(404, "EntryNotFound")
            return
        skip = len(folder) + 1 if folder else 0
        folders = {p[: p.index("/", skip)] for p in inside if "/" in p[skip:]}
        shown = [p for p in inside if recursive or "/" not in p[skip:]]
        self._json([*map(_folder, sorted(folders)), *(_entry(p, files[p]) for p in shown)])

    # ---- files -------------------------------------------------------------------------------

    def _resolve(self, kind: str, name: str, revision: str, path: str, body: bool) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        if repository.gated and self.headers.get("Authorization") != "Bearer hf_member":
            self._refuse(401, "GatedRepo")
            return
        sha = repository.find(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound")
        elif path not in repository.commits[sha]:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
        elif path.endswith(LARGE_FILES):
            data = repository.commits[sha][path]
            headers = {"X-Linked-Etag": f'"{_etag(path, data)}"', "X-Linked-Size": str(len(data))}
            port = self.server.server_address[1]
            address = f"http://localhost:{port}/lfs/{kind}/{name}/{sha}/{path}"  # another host, as the hub's is
            self._send(302, b"", headers | {"X-Repo-Commit": sha, "Location": address})
        else:
            self._file(path, repository.commits[sha][path], {"X-Repo-Commit": sha}, body)

    def _file(self, path: str, data: bytes, headers: dict[str, str], body: bool) -> None:
        fault = next((fault for end, fault in self.hub.faults.items() if path.endswith(end)), None)
        headers = headers | {"ETag": f'"{_etag(path, data)}"', "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if body and (asked := self.headers.get("Range")):
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body and fault is not None:
            self._break_off(fault, status, data, start, headers)
        else:
            self._send(status, data[start:], headers, body)

    def _break_off(self, fault: str, status: int, data: bytes, start: int, headers: dict[str, str]) -> None:
        half = data[start : max(start, len(data) // 2)]
        if fault == "short":
            self._send(status, half, headers)
            return
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data) - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(half)
        self.wfile.flush()
        self.close_connection = True
        if fault == "stall":
            self.hub.wait(60)
        elif fault == "reset":
            time.sleep(0.05)  # so that the half is read first
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    # ---- answers -----------------------------------------------------------------------------

    def _repository(self, kind: str, name: str) -> Repository | None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            self._refuse(401, "", {"X-Error-Message": "Invalid username or password."})  # as to anyone not logged in
        return repository

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, **(headers or {})} if code else headers or {})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            half = len(data) // 2
            self.wfile.write(data[:half])
            if self.hub.pace_s:
                self.wfile.flush()
                self.hub.wait(self.hub.pace_s)
            self.wfile.write(data[half:])


def _etag(path: str, data: bytes) -> str:
    if path.endswith(LARGE_FILES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}
    if path.endswith(LARGE_FILES):
        entry["lfs"] = {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}
    return entry


def _folder(path: str) -> dict:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
