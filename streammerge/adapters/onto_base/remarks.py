"""What an adapter's configuration says that its file, or the base, does not bear out: told, and not refused."""

from __future__ import annotations

from collections.abc import Iterator

from streammerge.adapters.files.patterns import matches_targets
from streammerge.adapters.files.types import Adapter, Naming, strip_wrappers
from streammerge.checkpoint.inputs import listed
from streammerge.checkpoint.types import Checkpoint
from streammerge.storage.copies import origin_of

_ALL_LINEAR = "all-linear"
"""What PEFT takes for a list of all linear layers, where somebody wrote it into the file."""


def remark_on_origin(adapter: Adapter, base: Checkpoint) -> Iterator[str]:
    """Yield what users should know of an adapter that is merged into a base.

    Args:
        adapter: The adapter.
        base: The base's headers.
    """
    named = adapter.config.base_model
    if named:
        last = named.rstrip("/\\").replace("\\", "/").rpartition("/")[2].casefold()
        if last not in str(base.path).casefold():
            yield f"was trained on {named}, as its configuration says; the base is {origin_of(base.path)}"
    targets = adapter.config.target_modules
    if adapter.naming is not Naming.PEFT or targets is None or targets == _ALL_LINEAR:
        return
    if adapter.config.target_parameters:
        return
    beside = [
        stem
        for stem in adapter.stems
        if not matches_targets(targets, strip_wrappers(stem), where=str(adapter.path))
    ]
    if beside:
        yield (
            f"has {len(beside)} module(s) that target_modules of its configuration does not name, "
            f"{listed(beside)}: they are merged, and PEFT would leave them out"
        )
