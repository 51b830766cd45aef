"""Servers that answer to ranges over HTTP, by urllib3.

Every read names the version that was planned, and looks whether that is what it gets.

Memory: 1 MiB per connection; bytes go into the caller's, step by step.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Never
from urllib.parse import urljoin, urlsplit

from streammerge.errors import CheckpointError
from streammerge.storage.copies import forget_places
from streammerge.storage.objects import Listed, RemoteObject
from streammerge.storage.retrying import PassingError, persist
from streammerge.storage.s3 import pause_of, refuse_changed
from streammerge.storage.stores import READ_STEP, import_library

_CONNECTIONS = 64
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOVED = frozenset({301, 302, 303, 307, 308})
_MOST_MOVES = 5
_MOVED_SECONDS = 600.0
"""How long it is remembered where an object has moved to: such addresses end after an hour or so."""
_MOST_INDEX_BYTES = 100_000_000
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_HEADS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    "adapter_model.safetensors",
)
_BESIDE = (
    *("config.json", "generation_config.json", "adapter_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "preprocessor_config.json"),
    *("processor_config.json", "README.md", "LICENSE"),
)
"""What may lie beside a model: a web server does not say what it has."""


class WebStore:
    """Reads from web servers."""

    def __init__(self) -> None:
        """Make connections possible."""
        self._urllib3 = import_library("urllib3", "http", "https://")
        self._pool: Any = self._urllib3.PoolManager(
            num_pools=16,
            maxsize=_CONNECTIONS,
            retries=False,
            timeout=self._urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
        )
        self._lock = threading.Lock()
        self._moved: dict[str, tuple[str, float]] = {}

    def find(self, url: str) -> Sequence[Listed]:
        """Return the object at an address, or what usually lies below one that has a model."""
        if url.rsplit("/", 1)[-1].endswith(".safetensors"):
            own = self.look(url)
            return [] if own is None else [Listed("", own)]
        folder = url.rstrip("/")
        names = list(_HEADS)
        found: list[Listed] = []
        for name in names:
            what = self.look(f"{folder}/{name}")
            if what is None:
                continue
            found.append(Listed(name, what))
            if name.endswith(".index.json"):
                names.extend(self._shards(what))
        if found:
            beside = ((name, self.look(f"{folder}/{name}")) for name in _BESIDE)
            found += [Listed(name, what) for name, what in beside if what is not None]
        return found

    def _shards(self, index: RemoteObject) -> list[str]:
        """Return the files that an index names; none of what is no index: reading it says why."""
        if index.nbytes > _MOST_INDEX_BYTES:
            return []
        content = bytearray(index.nbytes)
        persist(index.url, lambda: self.read_into(index, 0, memoryview(content)))
        try:
            names = set(json.loads(content)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
        return sorted(each for each in names if isinstance(each, str) and "/" not in each)

    def look(self, url: str, headers: Mapping[str, str] | None = None) -> RemoteObject | None:
        """Return what lies at an address; None if nothing does.

        Raises:
            CheckpointError: The server refuses, or says nothing by which a change would be noticed.
        """

        def ask() -> RemoteObject | None:
            # A range of one byte: servers that answer to it are asked for others later.
            with self._request(url, {"Range": "bytes=0-0", **(headers or {})}) as answer:
                if answer.status in {404, 410}:
                    return None
                if answer.status == 416:
                    return RemoteObject(url, 0, _version_of(url, answer.headers))
                total = self._check_range(url, answer, 0, 1)
                return RemoteObject(url, total, _version_of(url, answer.headers))

        return persist(url, ask)

    def read_into(self, what: RemoteObject, offset: int, buffer: memoryview) -> None:
        """Fill a buffer by one request."""
        condition = {} if what.version.startswith("W/") else {"If-Match": what.version}
        if not what.version.startswith(('"', "W/")):
            condition = {"If-Unmodified-Since": what.version}
        with self.open_range(what, what.url, offset, len(buffer), condition) as answer:
            if _version_of(what.url, answer.headers) != what.version:
                refuse_changed(what)
            self.fill(answer, buffer)

    def open_range(
        self,
        what: RemoteObject,
        url: str,
        offset: int,
        nbytes: int,
        headers: Mapping[str, str],
    ) -> Any:
        """Return the answer to a request for a range, of which the body is still to be read."""
        asked = {"Range": f"bytes={offset}-{offset + nbytes - 1}", **headers}
        answer = self._request(url, asked)
        try:
            self._check_answer(what, answer, offset, nbytes)
        except BaseException:
            answer.close()
            raise
        return answer

    def _check_answer(self, what: RemoteObject, answer: Any, offset: int, nbytes: int) -> None:
        if answer.status == 412:
            refuse_changed(what)
        if answer.status in {404, 410}:
            forget_places()
            raise CheckpointError(f"{what.url}: is gone since it was planned; plan again")
        if self._check_range(what.url, answer, offset, nbytes) != what.nbytes:
            refuse_changed(what)

    def fill(self, answer: Any, buffer: memoryview) -> None:
        """Read the body of an answer into a buffer."""
        done = 0
        try:
            while done < len(buffer):
                count = answer.readinto(buffer[done : done + READ_STEP])
                if not count:
                    break
                done += count
        except (self._urllib3.exceptions.HTTPError, OSError) as error:
            raise PassingError(
                f"{type(error).__name__} after {done} of {len(buffer)} bytes"
            ) from error
        if done < len(buffer):
            raise PassingError(f"the answer ended after {done} of {len(buffer)} bytes")

    def _request(self, url: str, headers: Mapping[str, str]) -> Any:
        """Return an answer, from wherever the address leads to."""
        with self._lock:
            place, until = self._moved.get(url, (url, 0.0))
        if until < time.monotonic():
            place = url
        for _ in range(_MOST_MOVES):
            answer = self._ask(url, place, headers)
            if answer.status in {401, 403} and place != url:
                # Where it had moved to may be so no longer.
                answer.close()
                self._forget(url)
                raise PassingError(
                    f"the server answers {answer.status} where the object had moved to"
                )
            if answer.status not in _MOVED:
                return answer
            place = urljoin(place, answer.headers.get("Location", ""))
            answer.close()
            with self._lock:
                self._moved[url] = (place, time.monotonic() + _MOVED_SECONDS)
        self._forget(url)
        raise CheckpointError(f"{url}: moved more than {_MOST_MOVES} times")

    def _forget(self, url: str) -> None:
        with self._lock:
            self._moved.pop(url, None)

    def _ask(self, url: str, place: str, headers: Mapping[str, str]) -> Any:
        # What lets us in there is nobody's business elsewhere.
        home = urlsplit(url).netloc == urlsplit(place).netloc
        sent = {k: v for k, v in headers.items() if home or k != "Authorization"}
        try:
            answer = self._pool.request(
                "GET",
                place,
                headers={"Accept-Encoding": "identity", "User-Agent": "streammerge", **sent},
                preload_content=False,
                redirect=False,
            )
        except (self._urllib3.exceptions.HTTPError, OSError) as error:
            raise PassingError(type(error).__name__) from error
        if answer.status in _BUSY:
            pause = pause_of(answer.headers)
            answer.close()
            raise PassingError(f"the server answers {answer.status}", pause=pause)
        return answer

    def _check_range(self, url: str, answer: Any, offset: int, nbytes: int) -> int:
        """Return the size of an object by the answer to a request for a range of it."""
        if answer.status == 200:
            raise CheckpointError(
                f"{url}: the server gives the whole file where a range of it is asked for; download it"
            )
        if answer.status != 206:
            _refuse(url, answer.status)
        said = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if said is None or (int(said[1]), int(said[2])) != (offset, offset + nbytes - 1):
            raise PassingError(
                f"asked for bytes {offset} to {offset + nbytes - 1}, the answer has "
                f"{answer.headers.get('Content-Range', 'no Content-Range')}"
            )
        return int(said[3])


def _version_of(url: str, headers: Mapping[str, str]) -> str:
    version = headers.get("ETag") or headers.get("Last-Modified")
    if not version:
        raise CheckpointError(
            f"{url}: the server says neither ETag nor Last-Modified, so that nobody would notice if the file "
            "changed meanwhile; download it"
        )
    return str(version)


def _refuse(url: str, status: int) -> Never:
    advice = "; it may want credentials, which are not sent here" if status in {401, 403} else ""
    raise CheckpointError(f"{url}: the server answers {status}{advice}")
