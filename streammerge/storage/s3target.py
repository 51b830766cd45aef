"""A folder in S3 that gets a result."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from streammerge.errors import OutputError
from streammerge.storage.objects import Listed
from streammerge.storage.retrying import persist
from streammerge.storage.s3 import S3Store
from streammerge.storage.targets import SentPart, Slice, Small

_TOKEN = "streammerge-attempt"  # noqa: S105 - a key of metadata
_CONDITION_FAILED = (409, 412)
_NOT_IMPLEMENTED = 501
"""Small servers cannot list uploads and their parts: what was killed there is sent again."""

_T = TypeVar("_T")


class S3Target:
    """See :class:`streammerge.storage.targets.Target`."""

    def __init__(self, store: S3Store, url: str) -> None:
        """Write below an address."""
        self._store = store
        self._url = url.rstrip("/")
        self._bucket, _, prefix = self._url.removeprefix("s3://").partition("/")
        if not prefix:
            raise OutputError(
                f"{url}: is a bucket; name a folder in it, for a result has files of its own"
            )
        self._prefix = f"{prefix}/"

    def list(self) -> Sequence[Listed]:
        """Return what is there."""
        return self._store.find(f"{self._url}/")

    def begin(self, name: str, token: str) -> str:
        """Begin an object that comes in parts."""
        made = self._do(
            name, lambda c, at: c.create_multipart_upload(**at, Metadata={_TOKEN: token})
        )
        return str(made["UploadId"])

    def parts(self, name: str, upload: str) -> Mapping[int, SentPart] | None:
        """Return the parts that have come."""
        found: dict[int, SentPart] = {}

        def ask(client: Any, at: Mapping[str, str]) -> Mapping[int, SentPart] | None:
            found.clear()
            marker = 0
            while True:
                page = client.list_parts(**at, UploadId=upload, PartNumberMarker=marker)
                for each in page.get("Parts", ()):
                    found[each["PartNumber"]] = SentPart(each["ETag"], each["Size"])
                if not page.get("IsTruncated"):
                    return found
                marker = page["NextPartNumberMarker"]

        return self._do(name, ask, missing=None, unmet=(_NOT_IMPLEMENTED,))

    def put_part(self, name: str, upload: str, number: int, part: Slice) -> str:
        """Send a part."""

        def send(client: Any, at: Mapping[str, str]) -> str:
            with part.path.open("rb") as stream:
                body = _Range(stream, part.offset, part.nbytes)
                sent = client.upload_part(
                    **at,
                    UploadId=upload,
                    PartNumber=number,
                    Body=body,
                    ContentLength=part.nbytes,
                )
            return str(sent["ETag"])

        return self._do(name, send)

    def complete(self, name: str, upload: str, parts: Mapping[int, str]) -> bool:
        """Make an object of its parts; return whether there was such an upload."""
        listed = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(parts.items())]
        done = self._do(
            name,
            lambda c, at: c.complete_multipart_upload(
                **at, UploadId=upload, MultipartUpload={"Parts": listed}
            ),
            missing=None,
        )
        return done is not None

    def uploads(self) -> Sequence[tuple[str, str]]:
        """Return uploads that never ended."""

        def ask(client: Any, _: Mapping[str, str]) -> list[tuple[str, str]]:
            pages = client.get_paginator("list_multipart_uploads")
            return [
                (each["Key"][len(self._prefix) :], each["UploadId"])
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix)
                for each in page.get("Uploads", ())
            ]

        return self._do("", ask, missing=(), unmet=(_NOT_IMPLEMENTED,))

    def abort(self, name: str, upload: str) -> None:
        """Throw an upload away."""
        self._do(name, lambda c, at: c.abort_multipart_upload(**at, UploadId=upload), missing=None)

    def token_of(self, name: str) -> str | None:
        """Return an object's token."""
        found = self._do(name, lambda c, at: c.head_object(**at), missing=None)
        return None if found is None else found.get("Metadata", {}).get(_TOKEN)

    def get(self, name: str) -> Small | None:
        """Return a small object."""

        def ask(client: Any, at: Mapping[str, str]) -> Small:
            found = client.get_object(**at)
            now = _date_of(found)
            age = 0.0 if now is None else (now - found["LastModified"]).total_seconds()
            with found["Body"] as body:
                return Small(body.read(), found["ETag"], age, found.get("Metadata", {}).get(_TOKEN))

        return self._do(name, ask, missing=None)

    def put(
        self,
        name: str,
        content: bytes,
        *,
        token: str = "",
        new: bool = False,
        instead_of: str | None = None,
    ) -> str | None:
        """Write a small object."""
        marked = {"Metadata": {_TOKEN: token}} if token else {}
        condition = {"IfNoneMatch": "*"} if new else {}
        if instead_of is not None:
            condition = {"IfMatch": instead_of}
        put = self._do(
            name,
            lambda c, at: c.put_object(**at, Body=content, **marked, **condition),
            missing=None,
            unmet=_CONDITION_FAILED if condition else (),
        )
        return None if put is None else str(put["ETag"])

    def put_file(self, name: str, path: Path, token: str) -> None:
        """Write an object of a file."""

        def send(client: Any, at: Mapping[str, str]) -> None:
            with path.open("rb") as stream:
                nbytes = os.fstat(stream.fileno()).st_size
                client.put_object(
                    **at,
                    Body=_Range(stream, 0, nbytes),
                    ContentLength=nbytes,
                    Metadata={_TOKEN: token},
                )

        self._do(name, send)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._do(name, lambda c, at: c.delete_object(**at), missing=None)

    def _do(
        self,
        name: str,
        action: Callable[[Any, Mapping[str, str]], _T],
        **absent: Any,
    ) -> _T:
        """Do something with an object, again and again while it fails in passing.

        Args:
            name: The object.
            action: Gets the client, and what names the object.
            absent: ``missing``: what to return where there is no such object or upload; ``unmet``: the
                answers that say that a condition is not met, for which that is returned too.
        """
        at = {"Bucket": self._bucket, "Key": self._prefix + name}
        url = f"{self._url}/{name}"
        return persist(url, lambda: self._store.attempt(url, lambda c: action(c, at), **absent))


class _Range(io.RawIOBase):
    """A range of an open file, as a file: what boto3 sends without holding it."""

    def __init__(self, stream: io.BufferedReader, offset: int, nbytes: int) -> None:
        self._stream = stream
        self._offset = offset
        self._nbytes = nbytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        self._at = min(max(0, origin + offset), self._nbytes)
        return self._at

    def tell(self) -> int:
        return self._at

    def __len__(self) -> int:
        return self._nbytes

    def read(self, size: int | None = -1) -> bytes:
        left = self._nbytes - self._at
        wanted = left if size is None or size < 0 else min(size, left)
        self._stream.seek(self._offset + self._at)
        content = self._stream.read(wanted)
        self._at += len(content)
        return content


def _date_of(answer: Any) -> datetime | None:
    """Return the time of an answer by the clock of the store."""
    said = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        return datetime.strptime(said, "%a, %d %b %Y %H:%M:%S %Z").replace(tzinfo=UTC)
    except (TypeError, ValueError):
        return None
