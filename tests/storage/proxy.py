"""A proxy on loopback before a server that speaks S3: it fails requests to order, as networks do."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PASSING = ("500", "503", "429", "truncated", "reset", "lost", "silent")
"""What passes: an error, a request to wait, a body that ends early, a connection that is reset before the
request has been heard or after it was done, and one on which nothing is said."""


@dataclass
class Proxy:
    """Sends requests on, but for those that fail."""

    upstream: str
    """Host and port."""
    fault_of: Callable[[int, str], str] = lambda *_: ""
    """What happens to a request, by its number from 1 and its method; nothing where it is empty."""
    silent_seconds: float = 3.0
    """How long nothing is said."""
    address: str = ""
    count: int = 0
    """Requests so far."""
    faults: Counter[str] = field(default_factory=Counter)
    seen: list[str] = field(default_factory=list)
    """Method and path of each request."""

    def restart(self, fault_of: Callable[[int, str], str] = lambda *_: "") -> None:
        """Count from 1 again, and fail others."""
        self.fault_of, self.count = fault_of, 0
        self.seen.clear()


def _error(status: int, code: str) -> bytes:
    text = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
    return (
        f"HTTP/1.1 {status} no\r\nRetry-After: 0\r\nContent-Length: {len(text)}\r\n"
        f"Content-Type: application/xml\r\nConnection: close\r\n\r\n{text}"
    ).encode()


_ERRORS = {
    "500": _error(500, "InternalError"),
    "503": _error(503, "SlowDown"),
    "429": _error(429, "TooManyRequests"),
    "expired": _error(400, "ExpiredToken"),
    "denied": _error(403, "AccessDenied"),
}


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_one(self) -> None:
            with lock:
                proxy.count += 1
                number = proxy.count
                proxy.seen.append(f"{self.command} {self.path}")
            fault = proxy.fault_of(number, self.command)
            with lock:
                proxy.faults[fault] += 1
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault == "reset":
                self.reset()
                return
            if fault == "silent":
                time.sleep(proxy.silent_seconds)
                self.reset()
                return
            if fault in _ERRORS:
                self.close_connection = True
                self.wfile.write(_ERRORS[fault])
                return
            self.send_on(body, fault)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one  # noqa: N815 - as the library calls them

        def send_on(self, body: bytes, fault: str) -> None:
            upstream = http.client.HTTPConnection(proxy.upstream, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            upstream.request(self.command, self.path, body=body or None, headers=headers)
            answer = upstream.getresponse()
            content = answer.read()
            if fault == "lost" or (fault == "truncated" and len(content) < 2):
                self.reset()
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"transfer-encoding", "content-length", "connection"}:
                    self.send_header(name, value)
            nbytes = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(nbytes or 0))
            self.end_headers()
            if fault == "truncated":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.reset()
                return
            self.wfile.write(content)

        def reset(self) -> None:
            """End the connection without a word."""
            self.close_connection = True
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

    return Handler


@contextlib.contextmanager
def proxying(address: str) -> Iterator[Proxy]:
    """Stand before a server, on a port of the system's choice."""
    proxy = Proxy(address.removeprefix("http://"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy))
    server.daemon_threads = True
    # Connections that were reset are no errors here.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    proxy.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
