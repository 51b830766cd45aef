"""S3 and what speaks like it, by boto3.

Addresses and credentials come from where the tools of AWS take them: ``AWS_PROFILE``,
``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``~/.aws``. Every read names the version that was
planned, and looks whether that is what it gets: not all stores know ``If-Match``.

Memory: what boto3 takes, about 8 MiB and 1 MiB per connection; bytes go into the caller's, step by step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Never, TypeVar

from streammerge.errors import CheckpointError
from streammerge.storage.copies import forget_places
from streammerge.storage.objects import Listed, RemoteObject
from streammerge.storage.retrying import PassingError, persist
from streammerge.storage.stores import READ_STEP, import_library

_CONNECTIONS = 64
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
_MOST_LISTED = 10_000
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_REFUSED = object()
_T = TypeVar("_T")
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired"})


class S3Store:
    """Reads from S3."""

    def __init__(self) -> None:
        """Make a client."""
        url = "s3://"
        boto3 = import_library("boto3", "s3", url)
        config = import_library("botocore.config", "s3", url)
        self._errors = import_library("botocore.exceptions", "s3", url)
        self._passing = (
            self._errors.HTTPClientError,
            self._errors.IncompleteReadError,
            import_library("urllib3.exceptions", "s3", url).HTTPError,
            OSError,
        )
        own = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        try:
            self._client: Any = boto3.client(
                "s3",
                config=config.Config(
                    max_pool_connections=_CONNECTIONS,
                    connect_timeout=_CONNECT_SECONDS,
                    read_timeout=_READ_SECONDS,
                    # Tried again here, where a broken body is noticed too.
                    retries={"total_max_attempts": 1},
                    # Names of buckets become hosts that only AWS has.
                    s3={"addressing_style": "path"} if own else {},
                    # Servers that know no others refuse requests with new checksums.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except (self._errors.BotoCoreError, ValueError) as error:
            raise CheckpointError(
                f"{url}: no client can be made: {error}; check AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL"
            ) from error

    def find(self, url: str) -> Sequence[Listed]:
        """Return the object at an address, or those below it."""
        bucket, key = _parts(url)
        if key and not key.endswith("/"):
            own = persist(url, lambda: self._look(url, bucket, key))
            if own is not None:
                return [Listed("", own)]
        prefix = f"{key.rstrip('/')}/" if key else ""
        return persist(url, lambda: self._list(url, bucket, prefix))

    def _look(self, url: str, bucket: str, key: str) -> RemoteObject | None:
        found = self.attempt(
            url, lambda client: client.head_object(Bucket=bucket, Key=key), missing=None
        )
        return found and RemoteObject(url, found["ContentLength"], found["ETag"])

    def _list(self, url: str, bucket: str, prefix: str) -> Sequence[Listed]:
        def ask(client: Any) -> list[Listed]:
            found: list[Listed] = []
            pages = client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=bucket, Prefix=prefix):
                for each in page.get("Contents", ()):
                    name = each["Key"][len(prefix) :]
                    place = f"s3://{bucket}/{each['Key']}"
                    if name and not name.endswith("/"):
                        what = RemoteObject(place, each["Size"], each["ETag"])
                        found.append(Listed(name, what))
                if len(found) > _MOST_LISTED:
                    raise CheckpointError(
                        f"{url}: has more than {_MOST_LISTED} objects below it; name the folder of the model"
                    )
            return found

        return self.attempt(url, ask)

    def read_into(self, what: RemoteObject, offset: int, buffer: memoryview) -> None:
        """Fill a buffer by one request."""
        bucket, key = _parts(what.url)
        done = 0
        try:
            answer = self._client.get_object(
                Bucket=bucket,
                Key=key,
                Range=f"bytes={offset}-{offset + len(buffer) - 1}",
                IfMatch=what.version,
            )
            if answer["ETag"] != what.version:
                refuse_changed(what)
            with answer["Body"] as body:
                while done < len(buffer):
                    count = body.readinto(buffer[done : done + READ_STEP])
                    if not count:
                        break
                    done += count
        except self._errors.ClientError as error:
            if _status(error) == 412:
                refuse_changed(what)
            self._refuse(what.url, error)
        except self._passing as error:
            raise PassingError(
                f"{type(error).__name__} after {done} of {len(buffer)} bytes"
            ) from error
        except self._errors.BotoCoreError as error:
            _refuse_client(what.url, error)
        if done < len(buffer):
            raise PassingError(f"the answer ended after {done} of {len(buffer)} bytes")

    def attempt(
        self,
        url: str,
        action: Callable[[Any], _T],
        *,
        missing: Any = _REFUSED,
        unmet: Sequence[int] = (),
    ) -> _T:
        """Return what an action with the client returns.

        Args:
            url: What it is about.
            action: Asks once.
            missing: What to return where the store has no such thing; without it, that is refused.
            unmet: Answers for which that is returned too.

        Raises:
            PassingError: It may be tried again.
            CheckpointError: The store refuses.
        """
        try:
            return action(self._client)
        except self._errors.ClientError as error:
            if missing is not _REFUSED and (_status(error) == 404 or _status(error) in unmet):
                return missing  # type: ignore[no-any-return]
            self._refuse(url, error)
        except self._passing as error:
            raise PassingError(type(error).__name__) from error
        except self._errors.BotoCoreError as error:
            _refuse_client(url, error)

    def _refuse(self, url: str, error: Any) -> Never:
        """Raise what the store's refusal comes to. Its own text is not repeated: some name keys."""
        status, code = _status(error), str(error.response.get("Error", {}).get("Code", ""))
        if status in _BUSY or code in {"SlowDown", "RequestTimeout", "InternalError"}:
            headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            raise PassingError(f"the store answers {status} {code}", pause=pause_of(headers))
        if status == 404:
            raise CheckpointError(f"{url}: is not there ({code}); check bucket and key") from None
        if code in _EXPIRED:
            advice = "its credentials have expired; renew them, and --resume goes on"
        else:
            advice = "check AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_REGION and AWS_ENDPOINT_URL"
        if code.isdigit():
            # Answers without a body do not say why.
            advice += "; credentials may have expired, --resume goes on with others"
        raise CheckpointError(f"{url}: the store answers {status} {code}; {advice}") from None


def refuse_changed(what: RemoteObject) -> Never:
    """Raise the error about an object that is another one than was planned, so that planning again helps."""
    forget_places()
    raise CheckpointError(
        f"{what.url}: changed since it was planned: it is no longer version {what.version} of {what.nbytes} "
        "bytes; plan again"
    )


def pause_of(headers: Any) -> float | None:
    """Return the seconds for which a server asks to be left alone; None where it does not say."""
    try:
        return float(headers.get("retry-after") or headers.get("Retry-After"))
    except (TypeError, ValueError):
        return None


def _parts(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _refuse_client(url: str, error: Exception) -> Never:
    """Raise the error about what boto3 itself refuses, such as having no credentials."""
    raise CheckpointError(
        f"{url}: cannot be read: {type(error).__name__}; check AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_REGION and "
        "AWS_ENDPOINT_URL"
    ) from error
