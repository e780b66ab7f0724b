"""As much of a W&B server, on loopback, as a run and `wandb sync` need; it keeps what they send."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "canary" + "0123456789abcdef" * 3


class WandbServer(ThreadingHTTPServer):
    """One run. `lines` is its history as the real server keeps it: by offset, a later line replacing an earlier."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lines: dict[int, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] | None = None
        self.exit_code: int | None = None
        self.keys: set[str] = set()

    def handle_error(self, *request: Any) -> None:
        """A client that is killed resets its connection."""

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        return kept | {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The lines that have `key`, in order."""
        return [line for _, line in sorted(self.lines.items()) if key in line]

    def sync(self, *paths: Path) -> None:
        """`wandb sync`, the real one."""
        command = [sys.executable, "-m", "wandb", "sync", "--include-synced", *map(str, paths)]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "Finished syncing" in done.stderr, done.stderr

    def answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        if operation == "UpsertBucket":
            self.config = json.loads(values["config"]) if values.get("config") else self.config
            run = {"id": "r", "name": values["name"], "displayName": "", "config": "{}", "project": _project(values)}
            return {"upsertBucket": {"bucket": run | {"historyLineCount": 0}, "inserted": True}}
        if operation == "RunResumeStatus":
            return {"model": _project(values) | {"bucket": self._bucket(values["name"])}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in values["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "u", "entity": "someone", "flags": "{}"}, "serverInfo": {"features": []}}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if self.config is None:
            return None
        counts = {"historyLineCount": len(self.lines), "eventsLineCount": 0, "logLineCount": 0}
        last = [json.dumps(self.lines[max(self.lines)])] if self.lines else []
        tails = {"historyTail": json.dumps(last), "eventsTail": "[]", "summaryMetrics": json.dumps(self.summary)}
        return {"id": "r", "name": name, "config": "{}", "wandbConfig": '{"t": 1}', "tags": []} | counts | tails


def _project(values: dict[str, Any]) -> dict[str, Any]:
    return {"id": "p", "name": values["project"], "entity": {"id": "e", "name": "someone"}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: Any) -> None: ...

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, values: Any) -> None:
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        server, sent = self.server, json.loads(self._body())
        server.keys.add(self.headers.get("Authorization", ""))
        if self.path == "/graphql":
            return self._reply({"data": server.answer(sent.get("operationName", ""), sent.get("variables") or {})})
        files = sent.get("files", {})
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for i, line in enumerate(history["content"]):
            server.lines[history["offset"] + i] = json.loads(line)
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            server.summary = json.loads(line)
        server.exit_code = sent.get("exitcode", server.exit_code)
        return self._reply({"exitcode": None, "limits": {}})


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


def files_with(text: str, folder: Path) -> list[Path]:
    """Every file under `folder` that has the text in it, whatever its format."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
