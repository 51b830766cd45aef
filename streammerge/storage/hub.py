"""The Hugging Face hub without local copies: files of a commit, read by ranges.

huggingface_hub knows endpoint (``HF_ENDPOINT``), token and what a revision is; ranges go the way of
:mod:`streammerge.storage.web`. A commit never changes, so it is the version of all files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.errors import CheckpointError
from streammerge.storage.objects import Listed, RemoteObject
from streammerge.storage.s3 import refuse_changed
from streammerge.storage.stores import import_library
from streammerge.storage.web import WebStore


class HubStore:
    """Reads from the hub."""

    def __init__(self) -> None:
        """Look for the library."""
        self._hub = import_library("huggingface_hub", "hub", "hf://")
        self._web = WebStore()

    def find(self, url: str) -> Sequence[Listed]:
        """Return the files of a model, or of a folder in it, at the commit that its revision is now."""
        repository, revision, inner = _parts(url)
        try:
            about = self._hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        # Networks and permissions fail in ways of many libraries' own, whose texts may name tokens.
        except Exception as error:
            raise CheckpointError(
                f"{url}: cannot be found: {type(error).__name__}; check name and revision, and if the model asks "
                "for it, log in (hf auth login)"
            ) from error
        found = []
        for each in about.siblings:
            name = str(each.rfilename)
            place = f"hf://{repository}@{about.sha}/{name}"
            if name == inner:
                return [Listed("", RemoteObject(place, int(each.size), str(about.sha)))]
            if not inner or name.startswith(f"{inner}/"):
                below = name[len(inner) :].lstrip("/")
                found.append(Listed(below, RemoteObject(place, int(each.size), str(about.sha))))
        return found

    def read_into(self, what: RemoteObject, offset: int, buffer: memoryview) -> None:
        """Fill a buffer by one request."""
        repository, revision, name = _parts(what.url)
        url = str(self._hub.hf_hub_url(repository, name, revision=revision))
        with self._web.open_range(what, url, offset, len(buffer), self._headers()) as answer:
            if answer.headers.get("X-Repo-Commit", what.version) != what.version:
                refuse_changed(what)
            self._web.fill(answer, buffer)

    def _headers(self) -> Mapping[str, str]:
        token: Any = self._hub.get_token()
        return {} if token is None else {"Authorization": f"Bearer {token}"}


def _parts(url: str) -> tuple[str, str | None, str]:
    """Return repository, revision and what is named within: ``hf://org/model@revision/folder/file``."""
    organisation, _, rest = url.removeprefix("hf://").partition("/")
    model, _, inner = rest.partition("/")
    name, _, revision = model.partition("@")
    if not organisation or not name:
        raise CheckpointError(f"{url}: expected hf://org/model[@revision]")
    return f"{organisation}/{name}", revision or None, inner.strip("/")
