"""Results in a bucket on loopback: what is there, what was begun, and copies of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OUT = "s3://results/folder/merged"


def names_in(client: Any, prefix: str = "folder/merged/") -> list[str]:
    found = client.list_objects_v2(Bucket="results", Prefix=prefix).get("Contents", ())
    return [each["Key"][len(prefix) :] for each in found]


def fetch(client: Any, directory: Path) -> Path:
    for name in names_in(client):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        client.download_file("results", f"folder/merged/{name}", str(directory / name))
    return directory


def leftovers(client: Any) -> list[str]:
    return [
        each["Key"] for each in client.list_multipart_uploads(Bucket="results").get("Uploads", ())
    ]


def with_shards(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"output": {"max_shard_size": "12MB"}}


def shards_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}
