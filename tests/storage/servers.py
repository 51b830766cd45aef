"""Servers on loopback, with faults to order: a web server of a directory, the hub's interface, and S3 by moto."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Server:
    """A web server of a directory; ``faults`` are used up one per request for a range of tensors."""

    root: Path
    faults: list[str] = field(default_factory=list)
    """What happens to requests to come: a status, ``"500 after 2"``, ``short``, ``reset``, ``whole``, or ``""``."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and range of each request."""
    authorisations: list[str | None] = field(default_factory=list)
    """What each request was let in by."""
    etags: bool = True
    moved: bool = False
    """Whether files lie at another address, to which requests are sent on."""
    elsewhere: bool = False
    """Whether files of the hub lie at another host."""
    address: str = ""
    counts: Counter[str] = field(default_factory=Counter)


def etag_of(path: Path) -> str:
    status = path.stat()
    mark = f"{path.name} {status.st_size} {status.st_mtime_ns}"
    return f'"{hashlib.md5(mark.encode(), usedforsecurity=False).hexdigest()}"'


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def say(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if content:
                self.wfile.write(content)

        def do_GET(self) -> None:
            path = unquote(self.path)
            asked = self.headers.get("Range", "")
            with lock:
                server.requests.append((path, asked))
                server.authorisations.append(self.headers.get("Authorization"))
            if path.startswith("/api/models/"):
                self.about(path)
                return
            if "/resolve/" in path and server.elsewhere:
                port = server.address.rpartition(":")[2]
                inner = path.partition("/resolve/")[2].partition("/")[2]
                self.say(302, Location=f"http://localhost:{port}/moved/{inner}")
                return
            if "/resolve/" in path:
                path = path.partition("/resolve/")[2].partition("/")[2]
            elif server.moved and not path.startswith("/moved/"):
                self.say(302, Location=f"/moved{path}")
                return
            file = server.root / path.removeprefix("/moved").lstrip("/")
            if not file.is_file():
                self.say(404)
                return
            self.give(file, asked)

        def about(self, path: str) -> None:
            if "missing" in path:
                self.say(404, b"{}", Content_Type="application/json")
                return
            files = [each for each in sorted(server.root.rglob("*")) if each.is_file()]
            siblings = [
                {"rfilename": str(each.relative_to(server.root)), "size": each.stat().st_size}
                for each in files
            ]
            about = {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": siblings}
            self.say(200, json.dumps(about).encode(), Content_Type="application/json")

        def give(self, file: Path, asked: str) -> None:
            content = file.read_bytes()
            headers = {"Content_Type": "application/octet-stream"}
            if server.etags:
                headers["ETag"] = etag_of(file)
            wanted = self.headers.get("If-Match")
            if wanted is not None and wanted != headers.get("ETag"):
                self.say(412)
                return
            first, last = (int(each) for each in asked.removeprefix("bytes=").split("-"))
            if first >= len(content):
                self.say(416, **headers)
                return
            part = content[first : last + 1]
            headers["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            fault = ""
            if file.suffix == ".safetensors" and last - first > 0:
                with lock:
                    fault = server.faults.pop(0) if server.faults else ""
                    server.counts[fault] += 1
            if fault.isdigit():
                self.say(int(fault), Retry_After="0")
            elif fault == "whole":
                self.say(200, content)
            elif fault in {"short", "reset"}:
                self.send_response(206)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                if fault == "short":
                    self.wfile.write(part[: len(part) // 2])
                    self.wfile.flush()
                self.close_connection = True
                self.connection.close()
            else:
                self.say(206, part, **headers)

    return Handler


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Server]:
    """Serve a directory on a port of the system's choice."""
    server = Server(root)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
