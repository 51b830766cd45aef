"""A plan as a table that a person can read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from streammerge.assignment.types import Action
from streammerge.checkpoint.metadata import FORMAT
from streammerge.checkpoint.types import JsonChange
from streammerge.errors import printable
from streammerge.methods import discover_methods
from streammerge.plan.chunking import fits_one_slot
from streammerge.plan.device_matrices import gathering_bytes
from streammerge.plan.kernels import kernels_serve
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import DeviceResources, MergePlan
from streammerge.units import format_size

_SHOWN_SETTINGS = 5
_SHOWN_COMPANIONS = 4
_SHOWN_NAMES = 8
_SHOWN_DIFFERENCES = 12
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class PrintedPlan(MergePlan):
    """A plan that prints as a table for people; the others are the same data.

    The table says what the modules of this room conclude from a plan, and they know plans as plain
    data. So what prints one stands above them, and above its type.
    """

    def __str__(self) -> str:
        """Return the plan as a table for people."""
        return render_plan(self)


def printed_plan(plan: MergePlan) -> PrintedPlan:
    """Return a plan that prints."""
    return PrintedPlan(**{each.name: getattr(plan, each.name) for each in fields(plan)})


def render_plan(plan: MergePlan) -> str:
    """Return the plan in about twenty lines."""
    by = "by torch"
    if kernels_serve(plan) and plan.device is None:
        by = "by compiled kernels and torch" if plan.needs_torch else "by compiled kernels"
    how = f"({plan.semantics} semantics), computed in {plan.compute_dtype} {by}"
    rows: list[tuple[str, str]] = [("method", f"{plan.method} {how}")]
    for model in plan.models:
        rows.append((model.label, f"{model.hub}, {model.path}" if model.hub else model.origin))
        if model.adapter is not None:
            rows.append(("", f"with the adapter {model.adapter}"))
    rows += [
        ("left out", f"{', '.join(file.left_out)} of {file.path}")
        for file in plan.files
        if file.left_out
    ]
    rows += _tensor_rows(plan)
    rows += _setting_rows(plan)
    twice = plan.bytes_to_read - plan.input_nbytes
    again = f", {format_size(twice)} of it a second time for statistics" if twice else ""
    rows += _locality_rows(plan)
    rows.append(("passes", _passes(plan, twice)))
    rows.append(("read", f"{format_size(plan.bytes_to_read)}{again}"))
    shards = len(plan.layout.shards)
    names = plan.layout.shards[0].name if shards == 1 else f"{shards} shards"
    rows.append(("write", f"{format_size(plan.bytes_to_write)} in {names}"))
    rows += _header_rows(plan)
    rows += _companion_rows(plan)
    resources = plan.resources
    rows.append(
        (
            "pipeline",
            (
                f"{resources.readers} readers, {resources.workers} workers, "
                f"{resources.writers} writers; "
                f"{resources.slots} buffers of {format_size(resources.slot_bytes)}"
            ),
        )
    )
    memory = plan.memory
    parts = {
        "in use before": memory.baseline,
        "growth": memory.growth,
        "inputs": memory.inputs,
        "outputs": memory.outputs,
        "scratch": memory.scratch,
        "statistics": memory.statistics,
        "adapters": memory.factors,
        "other merges": memory.beside,
    }
    rows.append(
        (
            "peak memory",
            f"{format_size(memory.peak)} of {format_size(memory.budget)}: "
            + ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size),
        )
    )
    if plan.choice is not None:
        rows.append(("device", str(plan.choice)))
    if plan.device is not None:
        rows.append(("device" if plan.choice is None else "", _device(plan.device)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {printable(value)}" for name, value in rows)


def _device(device: DeviceResources) -> str:
    how = []
    if device.peak > device.matrix_bytes or not device.matrices:
        by = "fused kernels" if device.fused else "single operations"
        how.append(f"in steps of {device.step_numel:,} elements, by {by}")
    if device.kept_pieces:
        how.append(f"the inputs of {device.kept_pieces:,} chunks stay there until they are merged")
    if device.norms:
        how.append(f"DoRA's norms of {device.norms:,} matrices are found there")
    if device.matrices:
        how.append(
            f"{device.matrices:,} matrices are decomposed there, the largest in "
            f"{format_size(device.matrix_bytes)}"
        )
    return (
        f"{', '.join(device.names)}: up to {format_size(device.peak)} of "
        f"{format_size(device.budget)} on each, {'; '.join(how)}"
    )


def _tensor_rows(plan: MergePlan) -> list[tuple[str, str]]:
    actions = Counter(task.action for task in plan.tasks)
    dtypes = Counter(str(task.dtype) for task in plan.tasks)
    parts = [f"{actions[action]} {_DONE[action]}" for action in Action if actions[action]]
    if plan.dropped:
        parts.append(f"{len(plan.dropped)} dropped")
    rows = [
        ("tensors", f"{', '.join(parts)}; stored as {', '.join(sorted(dtypes))}"),
        ("parameters", f"{sum(task.numel for task in plan.tasks):,}"),
    ]
    rows += _part_rows(plan)
    if plan.copied_from_base:
        names = ", ".join(plan.copied_from_base[:_SHOWN_SETTINGS])
        rows.append(("from base", f"{len(plan.copied_from_base)} missing elsewhere: {names}"))
    return rows + [(note.topic, note.text) for note in plan.notes]


def _part_rows(plan: MergePlan) -> list[tuple[str, str]]:
    """Say what becomes of each part of a model in several folders."""
    folders = dict.fromkeys(shard.folder for shard in plan.layout.shards)
    if list(folders) == [""]:
        return []
    rows = []
    for folder in folders:
        indices = [i for shard in plan.layout.shards if shard.folder == folder for i in shard.tasks]
        actions = Counter(plan.tasks[index].action for index in indices)
        done = [f"{actions[action]} {_DONE[action]}" for action in Action if actions[action]]
        rows.append(("part", f"{folder or 'the directory itself'}: {', '.join(done)}"))
    return rows


_DONE = {
    Action.MERGE: "merged",
    Action.COPY: "copied",
    Action.COPY_IF_EQUAL: "copied if equal everywhere",
    Action.CONVERT: "converted",
    Action.SCALES: "of scales found anew",
}


def _companion_rows(plan: MergePlan) -> list[tuple[str, str]]:
    """Say what goes to the output beside the shards, from where, what changes, and what differs."""
    rows = []
    for directory in dict.fromkeys(each.directory for each in plan.companions):
        some = [each for each in plan.companions if each.directory == directory]
        nbytes = format_size(sum(each.nbytes for each in some))
        origin = plan.models[0].label if directory is None else directory
        names = _listed([each.name for each in some], _SHOWN_COMPANIONS)
        rows.append(("beside them", f"{names} ({nbytes}), from {origin}"))
    rows += [("changed", text) for text in changed_keys(plan)]
    if plan.left_behind:
        rows.append(("left behind", _listed(plan.left_behind)))
    rows += [("differs", str(each)) for each in plan.differences[:_SHOWN_DIFFERENCES]]
    more = len(plan.differences) - _SHOWN_DIFFERENCES
    if more > 0:
        rows.append(("", f"and {more} more differences; --json has all"))
    return rows


def changed_keys(plan: MergePlan) -> list[str]:
    """Return which keys of the files beside the tensors differ in the output, with values and reasons."""
    texts = []
    for each in plan.companions:
        if each.name == "config.json":
            told = {change.key for change in each.changes}
            texts += [
                f"config.json: {key} {_becomes(None if value is None else json.dumps(value))}"
                for key, value in plan.config
                if key not in told
            ]
        texts += [
            f"{each.name}: {_key(change)} {_becomes(change.value)} ({change.why})"
            for change in each.changes
        ]
    return texts


def _becomes(value: str | None) -> str:
    return "left out" if value is None else f"= {_short(value)}"


def _key(change: JsonChange) -> str:
    return f"{change.section}.{change.key}" if change.section else change.key


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}…"


def _header_rows(plan: MergePlan) -> list[tuple[str, str]]:
    """Say what of the base's headers goes to the output, if they say more than every file does."""
    said = dict.fromkeys(key for shard in plan.layout.shards for key, _ in shard.metadata)
    kept = [key for key in said if key != FORMAT[0]]
    rows = []
    if kept:
        rows.append(("header", f"{_listed(kept)} kept, from {plan.models[0].label}"))
    if plan.metadata_left_out:
        rows.append(("left out of it", f"{_listed(plan.metadata_left_out)} (no longer true)"))
    return rows


def _listed(names: Sequence[str], shown: int = _SHOWN_NAMES) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def _setting_rows(plan: MergePlan) -> list[tuple[str, str]]:
    uses = Counter(task.setting for task in plan.tasks)
    differ = len({setting.models for setting in plan.settings}) > 1
    rows = []
    for index, setting in list(enumerate(plan.settings))[:_SHOWN_SETTINGS]:
        values = ", ".join(f"{name}={_value(value)}" for name, value in setting.values)
        of = f" of {', '.join(plan.models[i].label for i in setting.models)}" if differ else ""
        rows.append(("settings", f"{values or 'no parameters'} for {uses[index]} tensor(s){of}"))
    if len(plan.settings) > _SHOWN_SETTINGS:
        rows.append(("", f"and {len(plan.settings) - _SHOWN_SETTINGS} more"))
    return rows


def _value(value: object) -> str:
    if isinstance(value, tuple):
        distinct = set(value)
        return str(value[0]) if len(distinct) == 1 else f"[{', '.join(map(str, value))}]"
    return str(value)


def _passes(plan: MergePlan, twice: int) -> str:
    again = ""
    encoded = [task for task in plan.tasks if task.encoding is not None]
    if not all(fits_one_slot(plan, task) for task in encoded):
        again = (
            "; one more for the scales of tensors that become codes and are larger than a buffer"
        )
    rounds = _count_rounds(plan)
    if plan.model_scope:
        asking = (
            "one over the whole model for its thresholds"
            if rounds == 1
            else f"{rounds} over the whole model for its statistics"
        )
        return f"{rounds + 1}: {asking}, one to merge{again}"
    if again:
        return f"1 or, for tensors too large to be kept, {rounds + 1}{again}"
    if twice and rounds:
        return f"{rounds + 1} for tensors too large to be kept, 1 for the others"
    return "1: every input byte is read once"


def _count_rounds(plan: MergePlan) -> int:
    """Return how often a tensor that is not kept is read before it is merged."""
    programs = programs_of_plan(plan, discover_methods()[plan.method])
    return max((len(each.rounds) if each.work.whole is None else 1 for each in programs), default=0)


def _locality_rows(plan: MergePlan) -> list[tuple[str, str]]:
    """Return what the method must see together, where that is more than single elements."""
    widest = max((task.row for task in plan.tasks), default=0)
    if widest:
        return [("sees", f"whole rows, the widest of {widest:,} elements")]
    largest = max((task.numel for task in plan.tasks if task.whole), default=0)
    if not largest:
        return []
    programs = programs_of_plan(plan, discover_methods()[plan.method])
    nbytes = max(
        gathering_bytes(
            task,
            programs[task.setting],
            plan.compute_dtype.itemsize,
            has_devices=plan.device is not None,
        )
        for task in plan.tasks
        if task.whole
    )
    size = format_size(nbytes)
    return [
        ("sees", f"whole tensors, the largest of {largest:,} elements, for which it takes {size}")
    ]
