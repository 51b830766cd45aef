"""Where a model lies that a recipe names: a path, a cache's folder, or a name on the Hugging Face hub.

``org/model[@revision]`` is looked up in the local cache of the hub, as huggingface_hub lays it out:
``models--org--model`` with ``refs/`` (the commit that a branch or tag meant when it was downloaded)
and ``snapshots/<commit>/``. Nothing is imported and nothing leaves the machine, unless a download is
asked for.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from streammerge.checkpoint.hubfiles import choose_files
from streammerge.checkpoint.inputs import absolute, is_directory, is_there, listed
from streammerge.checkpoint.remote import bring
from streammerge.errors import CheckpointError, DependencyError
from streammerge.storage.urls import url_of

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?", re.ASCII)
_ROOT = re.compile(r"models--(.+?)--(.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PREFIX = re.compile(r"[0-9a-f]{6,39}")
_MAX_REF_BYTES = 100
_DEFAULT_REVISION = "main"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
# The files of these name what lies in folders below.
_OF_PARTS = frozenset({"model_index.json", "modules.json"})


@dataclass(frozen=True, slots=True)
class HubName:
    """A model as the hub names it."""

    organisation: str
    """Who publishes it."""
    model: str
    """Its name there."""
    revision: str | None
    """A branch, a tag, a commit or the beginning of one; None for the main branch."""

    @property
    def repository(self) -> str:
        """``org/model``."""
        return f"{self.organisation}/{self.model}"

    @property
    def command(self) -> str:
        """The command that downloads it."""
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return f"hf download {self.repository}{revision}"


def locate_model(path: Path, *, download: bool) -> Path:
    """Return where a model is that a recipe names.

    What is there by its path is meant, whatever else could have the name. ``~`` is the home
    directory. A cache's folder of a model stands for the snapshot in it: the one that the main branch
    meant, or the only one.

    Args:
        path: What the recipe gives: a path, ``org/model[@revision]``, or the address of a store, of which
            headers and small files are then copied to this machine.
        download: Whether to fetch from the hub what is not there.

    Returns:
        A path; where nothing is found and the name cannot be one of the hub's, the path as it is,
        for the reader to say what is wrong.

    Raises:
        CheckpointError: The name may be one of the hub's and the cache has no such model, or no such
            revision of it, or not all files; or the download failed.
        DependencyError: A download is asked for, and huggingface_hub is not installed.
    """
    url = url_of(path)
    if url is not None:
        return bring(url)
    if not is_there(path) and path.parts[:1] and path.parts[0].startswith("~"):
        path = _expand_home(path)
    if is_there(path):
        return _snapshot_of_root(path) if _is_root(path) else path
    name = parse_hub_name(path)
    if name is None:
        return path
    cache = hub_cache(os.environ)
    snapshot = _find_snapshot(cache, name)
    lacks = None if snapshot is None else _lacks(snapshot)
    if snapshot is not None and lacks is None:
        return snapshot
    if download:
        return _download(cache, name)
    if snapshot is not None:
        raise CheckpointError(
            f"{path}: the Hugging Face cache has {snapshot}, without {lacks}; download the rest: "
            f"{name.command}, or give --download"
        )
    raise CheckpointError(
        f"{path}: No such file or directory{_looked_in(path)}, and the Hugging Face cache ({cache}) has no such model"
        f"{_known_revisions(cache, name)}; if it is on the hub, download it: {name.command}, or give "
        "--download"
    )


def _looked_in(path: Path) -> str:
    """Return where a relative path was looked for, and what there is called nearly like it."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(each.name for each in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1)
    meant = f" (did you mean {path.parent / close[0]}?)" if close else ""
    try:
        return f" in {Path.cwd()}{meant}"
    except OSError:
        # The working directory has been removed.
        return meant


def hub_revision(path: Path) -> str | None:
    """Return ``org/model@commit`` for a path in a snapshot of the hub's cache; None for others."""
    parts = path.parts
    for index, part in enumerate(parts[:-2]):
        root = _ROOT.fullmatch(part)
        if root is not None and parts[index + 1] == "snapshots":
            return f"{root[1]}/{root[2]}@{parts[index + 2]}"
    return None


def parse_hub_name(path: Path) -> HubName | None:
    """Return the model on the hub that a path could name; None where it can only be a path."""
    match = _NAME.fullmatch(path.as_posix())
    if match is None or match[2].endswith((*_WEIGHTS, ".json")):
        return None
    revision = match[3]
    if revision is not None and ".." in PurePosixPath(revision).parts:
        return None
    return HubName(match[1], match[2], revision)


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Return the directory of the hub's cache, as huggingface_hub finds it.

    Args:
        environment: The variables ``HF_HUB_CACHE``, ``HUGGINGFACE_HUB_CACHE``, ``HF_HOME`` and
            ``XDG_CACHE_HOME``, of which the first that is set decides.
    """
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{caches}/huggingface"
    cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(os.path.expanduser(cache or f"{home}/hub")))  # noqa: PTH111 - no error without a home


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: no home directory of that user; write the path in full"
        ) from error


def _is_root(path: Path) -> bool:
    return _ROOT.fullmatch(path.name) is not None and is_directory(path / "snapshots")


def _snapshot_of_root(root: Path) -> Path:
    """Return the snapshot that a cache's folder of a model stands for."""
    commit = _read_ref(root, _DEFAULT_REVISION)
    if commit is not None and is_directory(root / "snapshots" / commit):
        return root / "snapshots" / commit
    commits = _snapshots(root)
    if len(commits) == 1:
        return root / "snapshots" / commits[0]
    raise CheckpointError(
        f"{root}: is a model's folder in the Hugging Face cache, with {len(commits)} snapshots and "
        f"none for the main branch; name one: "
        f"{listed([str(root / 'snapshots' / commit) for commit in commits]) or 'none is there'}"
    )


def _find_snapshot(cache: Path, name: HubName) -> Path | None:
    """Return the directory of a revision in the cache, whether or not all files are there."""
    root = _root(cache, name)
    revision = name.revision or _DEFAULT_REVISION
    commit: str | None = revision if _COMMIT.fullmatch(revision) else _read_ref(root, revision)
    if commit is None and _PREFIX.fullmatch(revision):
        begun = [each for each in _snapshots(root) if each.startswith(revision)]
        commit = begun[0] if len(begun) == 1 else None
    if commit is None or not is_directory(root / "snapshots" / commit):
        return None
    return absolute(root / "snapshots" / commit)


def _root(cache: Path, name: HubName) -> Path:
    return cache / f"models--{name.organisation}--{name.model}"


def _snapshots(root: Path) -> list[str]:
    try:
        return sorted(each.name for each in (root / "snapshots").iterdir())
    except OSError:
        return []


def _read_ref(root: Path, revision: str) -> str | None:
    """Return the commit that a branch or a tag meant when it was downloaded last."""
    try:
        with (root / "refs" / revision).open("rb") as stream:
            text = stream.read(_MAX_REF_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return text if _COMMIT.fullmatch(text) else None


def _known_revisions(cache: Path, name: HubName) -> str:
    """Return what a message says about other revisions of the model in the cache."""
    commits = _snapshots(_root(cache, name))
    if not commits:
        return ""
    return f" at {name.revision or _DEFAULT_REVISION}, only the commits {listed(commits)}"


def _lacks(snapshot: Path) -> str | None:
    """Return what a snapshot lacks to be merged; None where nothing is known to be missing.

    Programs fetch what they need: whoever has used a model's tokenizer has a snapshot of it.
    """
    try:
        names = sorted(each.name for each in snapshot.iterdir())
    except OSError:
        return "a directory that can be listed"
    if _OF_PARTS & set(names):
        return None
    for suffix in (".safetensors.index.json", ".bin.index.json"):
        for index in (name for name in names if name.endswith(suffix)):
            absent = [name for name in _shards(snapshot / index) if not is_there(snapshot / name)]
            if absent:
                return f"{len(absent)} of the shards that {index} names ({listed(absent)})"
            return None
    weights = [name for name in names if name.endswith(_WEIGHTS) and is_there(snapshot / name)]
    return None if weights else "any weights"


def _shards(index: Path) -> Sequence[str]:
    """Return the names of the files in an index; none of one that cannot be read."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return sorted({name for name in weight_map.values() if isinstance(name, str)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()


def _download(cache: Path, name: HubName) -> Path:
    """Fetch the files that a merge needs, by huggingface_hub, and return their directory."""
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise DependencyError(
            f"{name.repository}: --download needs huggingface_hub: pip install 'streammerge[hub]'"
        ) from error
    try:
        about = hub.HfApi().model_info(name.repository, revision=name.revision)
        files = _choose(name, [str(each.rfilename) for each in about.siblings])
        path = hub.snapshot_download(
            repo_id=name.repository,
            revision=name.revision,
            cache_dir=str(cache),
            # Patterns: a bracket in a name has to stand for itself.
            allow_patterns=[file.replace("[", "[[]") for file in files],
        )
    except CheckpointError:
        raise
    # Networks, permissions and disks fail in ways of many libraries' own.
    except Exception as error:
        raise CheckpointError(
            f"{name.repository}: cannot be downloaded: {type(error).__name__}: {error}; if the model "
            f"asks for it, log in (hf auth login), or try {name.command}"
        ) from error
    return absolute(Path(path))


def _choose(name: HubName, published: list[str]) -> list[str]:
    files = choose_files(published)
    if not any(file.endswith(_WEIGHTS) for file in files):
        raise CheckpointError(
            f"{name.repository}: none of its {len(published)} files holds weights that are read "
            f"here: {listed(published)}"
        )
    return files
