"""The recipes of a file, merged one after the other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.chaining.between import Begun, begin, clear, find_begun
from streammerge.chaining.foreseeing import foresee, foresee_chain, naming, plan_stage
from streammerge.chaining.stages import Chain, dump_chain
from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.checkpoint.finished import find_finished
from streammerge.checkpoint.journal import JOURNAL_NAME
from streammerge.checkpoint.manifest import Manifest, read_manifest
from streammerge.checkpoint.permitting import check_place
from streammerge.checkpoint.places import choose_place
from streammerge.checkpoint.types import Note, ShardFile
from streammerge.engine.progress import OnProgress
from streammerge.errors import CheckpointError
from streammerge.plan.fusing import Earlier
from streammerge.plan.types import MergePlan
from streammerge.run import merge
from streammerge.storage.urls import refuse_store
from streammerge.together import check_room


def merge_chain(
    chain: Chain,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    byte_source: ByteSourceKind | str = ByteSourceKind.PREAD,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Manifest:
    """Merge all stages one after the other; the last one's result is ``out``.

    Args:
        chain: The recipes.
        out: As for :func:`streammerge.run.merge`.
        resume: Whether to go on where an earlier run stopped.
        overwrite: Whether what an earlier run left may be replaced.
        byte_source: As for :func:`streammerge.run.merge`.
        on_progress: Told how far each stage is.
        options: What :func:`streammerge.run.plan` takes.

    Raises:
        StreamMergeError: As for :func:`streammerge.run.merge`; what is done stays for a resume.
    """
    refuse_store(out, "several recipes of a file are merged to")
    # Neither links nor dots: the results in between lie beside it.
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at OUT
    between = out.with_name(f"{out.name}.stages") if out.name else out
    plans, fused = foresee_chain(chain, options)
    files = {file.path: file for planned in plans for file in planned.files}
    inputs = [file for path, file in files.items() if path.exists()]
    identity = _identify(chain, inputs)
    done = _find_done(out, identity) if resume else None
    if done is not None:
        clear(between)
        return done
    found = find_begun(chain, between, resume=resume, overwrite=overwrite)
    begun = found or Begun(tuple(sorted(fused)), overwrite)
    check_place(out, _places(plans, inputs), overwrite=begun.overwrite)
    check_place(between, _places(plans, inputs), overwrite=True, look=False)
    if found is None:
        begin(chain, between, begun)
    elif set(begun.fused) != fused:
        # With another budget it was decided otherwise, and that is how it goes on.
        plans, fused = foresee_chain(chain, options, begun.fused)
    folders = {stage.name: between / stage.name for stage in chain.stages[:-1]}
    results = {stage.name: folders.get(stage.name, out) for stage in chain.stages}
    # A result in between that is there is complete.
    missing = [
        (planned, place)
        for planned, (name, place) in zip(plans, results.items(), strict=True)
        if name not in fused and (place is out or not place.is_dir())
    ]
    check_room([planned for planned, _ in missing], [place for _, place in missing])
    earlier: dict[str, Earlier] = {}
    for stage in chain.stages:
        last = stage is chain.stages[-1]
        read = [earlier[name] for name in stage.uses if name in fused]
        planned = plan_stage(stage, folders, read, options)
        for each in read:
            _forget(each)
        if stage.name in fused:
            foresee(planned, folders[stage.name])
            earlier[stage.name] = Earlier(stage.name, folders[stage.name], planned)
            continue
        if last:
            notes = _notes(chain, identity, fused)
            planned = replace(planned, notes=(*planned.notes, *notes), chain=dump_chain(chain))
        # The last one replaces what is there, unless that is what it was doing already.
        replaces = last and begun.overwrite and not (resume and _has_begun(out))
        with naming(stage):
            manifest = merge(
                planned,
                results[stage.name],
                # Stages that are done are found to be.
                resume=not replaces and (resume or not last),
                overwrite=replaces,
                byte_source=byte_source,
                on_progress=on_progress,
            )
    clear(between)
    return manifest


def _has_begun(out: Path) -> bool:
    """Return whether an earlier run has begun with the last result."""
    return (choose_place(out).partial / JOURNAL_NAME).is_file()


def _forget(earlier: Earlier) -> None:
    """Remove the files of a result that are there for their headers alone, and hold no values."""
    for shard in earlier.plan.layout.shards:
        (earlier.folder / shard.name).unlink()


def _places(plans: Sequence[MergePlan], inputs: Sequence[ShardFile]) -> list[Path]:
    """Return what is read and no result: models that are there, and their files."""
    models = (Path(model.path) for planned in plans for model in planned.models)
    return [*(path for path in models if path.exists()), *(file.path for file in inputs)]


def _identify(chain: Chain, inputs: Sequence[ShardFile]) -> str:
    """Return a digest of the recipes and of all files that are no results of them."""
    digest = hashlib.sha256(chain.text.encode())
    for file in inputs:
        # Where the header of what lies in a store was copied to differs from run to run.
        version = "" if file.remote is None else f" {file.remote.version}"
        what = f"{file.origin} {file.nbytes} {file.mtime_ns} {file.header_digest}{version}\n"
        digest.update(what.encode(errors="backslashreplace"))
    return digest.hexdigest()


def _notes(chain: Chain, identity: str, fused: Collection[str]) -> Iterator[Note]:
    """Yield what the last result's manifest says of those before, which are gone."""
    for stage in chain.stages[:-1]:
        gone = "computed while it was read" if stage.name in fused else "removed"
        yield Note("chain", f"{stage.name} is {stage.recipe.method} of an earlier recipe, {gone}")
    yield Note("chain", f"recipes and inputs: SHA-256 {identity}")


def _find_done(out: Path, identity: str) -> Manifest | None:
    """Return the manifest of a result of these very recipes and inputs; None if there is none."""
    try:
        document = read_manifest(out)
    except (CheckpointError, OSError):
        return None
    notes, run = document.get("notes"), document.get("run")
    said = isinstance(notes, list) and any(
        isinstance(note, dict) and str(note.get("text", "")).endswith(identity) for note in notes
    )
    if not said or not isinstance(run, dict):
        return None
    # Its inputs are gone, and were made of those that the note is about.
    return find_finished(out, identity=str(run.get("identity")), shards={}, inputs=())
