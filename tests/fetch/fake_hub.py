"""A hub on this machine: the two addresses that `k2 fetch` asks, and a second server where the large files lie."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class FakeHub:
    """Serves `files` {name: bytes} as one repository. Attributes change how it behaves; `seen` records every request as
    (server, path, token, range)."""

    def __init__(self, repo: str, kind: str, files: dict[str, bytes], large: int = 1000) -> None:
        self.repo, self.kind, self.files, self.large = repo, kind, dict(files), large
        self.gated = False  # files are refused without the token "secret"
        self.served = dict(files)  # what is really sent; may differ from what is announced
        self.break_after: dict[str, int] = {}  # name -> bytes after which the connection is cut
        self.breaks = 10**9  # how often that happens
        self.ranges = True
        self.status: dict[str, int] = {}  # name -> HTTP status instead of the file
        self.seen: list[tuple[str, str, str | None, str | None]] = []
        self._servers = [self._server("hub"), self._server("store")]

    def _server(self, name: str) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.seen.append((name, self.path, self.headers.get("Authorization"), self.headers.get("Range")))
                hub.answer(name, self)

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                return None

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True, args=(0.02,)).start()
        return server

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _send(self, handler: Any, status: int, body: bytes, **headers: str) -> None:
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    def _siblings(self) -> list[dict[str, Any]]:
        rows = []
        for name, content in self.files.items():
            row: dict[str, Any] = {"rfilename": name, "size": len(content)}
            row["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if len(content) >= self.large:
                row["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            rows.append(row)
        return rows

    def answer(self, server: str, handler: Any) -> None:
        path = handler.path.split("?")[0]
        folder = "models" if self.kind == "model" else "datasets"
        prefix = "" if self.kind == "model" else "datasets/"
        if path.startswith("/api/"):
            if path == f"/api/{folder}/{self.repo}/revision/nowhere":
                return self._send(handler, 404, b'{"error":"x"}', X_Error_Code="RevisionNotFound")
            if path.rstrip("/") not in (f"/api/{folder}/{self.repo}", f"/api/{folder}/{self.repo}/revision/main"):
                return self._send(handler, 401, b'{"error":"x"}', X_Error_Code="RepoNotFound")
            about = {"id": self.repo, "sha": COMMIT, "private": False, "tags": [], "siblings": self._siblings()}
            about |= {"gated": "auto" if self.gated else False, "cardData": {"license": "other", "license_name": "modified-mit"}}
            return self._send(handler, 200, json.dumps(about).encode(), Content_Type="application/json")
        name = path.removeprefix(f"/{prefix}{self.repo}/resolve/{COMMIT}/")
        if name in self.status:
            return self._send(handler, self.status[name], b"")
        if name not in self.served:
            return self._send(handler, 404, b"")
        if self.gated and server == "hub" and handler.headers.get("Authorization") != "Bearer secret":
            return self._send(handler, 403, b"", X_Error_Code="GatedRepo")
        if server == "hub" and len(self.served[name]) >= self.large:
            there = f"http://127.0.0.1:{self._servers[1].server_address[1]}{handler.path}"
            return self._send(handler, 302, b"", Location=there)
        return self._file(handler, name)

    def _file(self, handler: Any, name: str) -> None:
        body, status = self.served[name], 200
        wanted = handler.headers.get("Range")
        if wanted and self.ranges:
            body, status = body[int(wanted.removeprefix("bytes=").removesuffix("-")) :], 206
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        cut = self.break_after.get(name)
        if cut is not None and self.breaks > 0:
            self.breaks -= 1
            handler.wfile.write(body[:cut])
            handler.wfile.flush()
            handler.close_connection = True
            return
        handler.wfile.write(body)
