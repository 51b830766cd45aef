"""What a merge says when it has ended: on standard error, or with ``--json`` as a line on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.cli.streams import as_courtesy
from streammerge.errors import printable
from streammerge.units import format_size

_SHOWN_REMARKS = 12

if TYPE_CHECKING:
    from streammerge.checkpoint.manifest import Manifest


def time_of(out: str) -> int | None:
    """Return when the manifest of an output was written; None if there is none."""
    from streammerge.checkpoint.outputform import form_of

    try:
        return form_of(Path(out)).manifest_path.stat().st_mtime_ns
    except (OSError, ValueError):
        return None


def tell_complete(
    options: argparse.Namespace, manifest: Manifest, place: str | None = None
) -> None:
    """Tell that nothing was left to do."""
    tensors = len(manifest.tensors)
    out = options.out if place is None else place
    if options.json:
        event = {"event": "complete", "out": str(out), "tensors": tensors}
        print(json.dumps(event), file=as_courtesy(sys.stdout), flush=True)
    elif not options.quiet:
        print(
            f"{printable(out)}: is complete already, with {tensors} tensors",
            file=sys.stderr,
        )


def tell_done(
    options: argparse.Namespace,
    manifest: Manifest,
    place: str | None = None,
    earlier: Sequence[Manifest] = (),
) -> None:
    """Tell what the merge took, and what is to be remarked on it that was not of earlier ones."""
    run = manifest.run
    out = options.out if place is None else place
    moved = {
        stage: nbytes + sum(part.bytes_by_stage[stage] for part in run.parts)
        for stage, nbytes in run.bytes_by_stage.items()
    }
    if options.json:
        print(
            json.dumps(
                {
                    "event": "done",
                    "out": str(out),
                    "tensors": len(manifest.tensors),
                    "seconds": run.seconds,
                    "seconds_by_stage": run.seconds_by_stage,
                    "bytes_by_stage": moved,
                    "parts": len(run.parts),
                    "projected_memory": run.projected_memory,
                    "measured_memory": run.measured_memory,
                    "damaged": run.damaged,
                }
            ),
            file=as_courtesy(sys.stdout),
            flush=True,
        )
    elif not options.quiet:
        if run.damaged:
            print(
                f"{printable(out)}: {run.damaged} piece(s) of the unfinished merge had "
                "changed since, and were made again",
                file=sys.stderr,
            )
        how = f"{len(run.parts)} parts" if run.parts else f"{run.seconds:.1f} s"
        print(
            f"{printable(out)}: {len(manifest.tensors)} tensors in {how}, read "
            f"{format_size(moved['read'])}, wrote {format_size(moved['write'])}, peak memory "
            f"{format_size(run.measured_memory)} of {format_size(run.memory_budget)}",
            file=sys.stderr,
        )
        _tell_remarks(manifest, out, earlier)
        from streammerge.checkpoint.outputform import form_of

        form = form_of(Path(out))
        page = form.reports[1]
        if page in manifest.files:
            # An address is no path, whose slashes would be put together.
            where = f"{str(out).rstrip('/')}/{page}" if form.file is None else form.folder / page
            print(f"{printable(out)}: its report is {printable(str(where))}", file=sys.stderr)


def _remarks(manifest: Manifest) -> list[str]:
    """Return what was decided without being asked for, what differs, and what is not in the output."""
    rows = [f"differs: {each}" for each in manifest.differences]
    if manifest.left_behind:
        rows.append(f"left behind: {', '.join(manifest.left_behind)}")
    run = manifest.run
    if run.device_choice and run.device != "cpu":
        rows.append(f"device: {run.device_choice}")
    return rows + [f"{note.topic}: {note.text}" for note in manifest.notes]


def _tell_remarks(manifest: Manifest, out: Any, earlier: Sequence[Manifest]) -> None:
    told = {row for each in earlier for row in _remarks(each)}
    rows = [row for row in _remarks(manifest) if row not in told]
    for row in rows[:_SHOWN_REMARKS]:
        print(f"  {printable(row)}", file=sys.stderr)
    if len(rows) > _SHOWN_REMARKS:
        print(
            f"  and {len(rows) - _SHOWN_REMARKS} more; the manifest of {printable(out)} has all",
            file=sys.stderr,
        )


def tell_part(options: argparse.Namespace, part: int, parts: int) -> None:
    """Tell that a part is done, and which others are not."""
    from streammerge.checkpoint.status import read_status

    left = [each.part for each in read_status(options.out).parts if each.state != "done"]
    if options.json:
        event = {
            "event": "part_done",
            "out": options.out,
            "part": part,
            "parts": parts,
            "left": left,
        }
        print(json.dumps(event), file=as_courtesy(sys.stdout), flush=True)
    elif not options.quiet:
        rest = (
            f"left to do: {', '.join(map(str, left[:20]))}{' ...' if len(left) > 20 else ''}"
            if left
            else "all others are, too; somebody else has the directory, so if nobody puts the output in "
            "place, do any part again"
        )
        print(f"{printable(options.out)}: part {part}/{parts} is done; {rest}", file=sys.stderr)
