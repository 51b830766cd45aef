"""Copies as many bytes as a merge through a store, with boto3's own transfers.

    python -m benchmarks.run_boto3 one-by-one DIR OUT LIKE INPUT...

Downloads all objects below each ``INPUT`` into ``DIR``, and uploads the files of the directory ``LIKE``
to ``OUT``: first the one and then the other, or ``at-once``, on two threads. Each transfer is
boto3's, of parts on threads of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3

WAYS = ("one-by-one", "at-once")


def main(arguments: Sequence[str]) -> int:
    """Copy, and return the exit code."""
    way, directory, out, like, *inputs = arguments
    if way not in WAYS:
        raise SystemExit(f"expected one of {', '.join(WAYS)}, got {way}")
    client = boto3.client("s3")
    with ThreadPoolExecutor(1 if way == "one-by-one" else 2) as pool:
        tasks = [
            pool.submit(download, client, inputs, Path(directory)),
            pool.submit(upload, client, Path(like), out),
        ]
        for task in tasks:
            task.result()
    return 0


def download(client: Any, urls: Sequence[str], directory: Path) -> None:
    """Copy all objects below some addresses into a directory."""
    for number, url in enumerate(urls):
        bucket, prefix = split(url)
        place = directory / str(number)
        place.mkdir(parents=True)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        for each in (each for page in pages for each in page.get("Contents", ())):
            client.download_file(bucket, each["Key"], str(place / Path(each["Key"]).name))


def upload(client: Any, directory: Path, url: str) -> None:
    """Copy all files of a directory to an address."""
    bucket, prefix = split(url)
    for path in sorted(directory.iterdir()):
        client.upload_file(str(path), bucket, f"{prefix}/{path.name}")


def split(url: str) -> tuple[str, str]:
    """Return the bucket and the rest of an address."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, prefix


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
