"""A merge in parts has the bytes of a merge by one process: in any order, side by side, and whatever ends one."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from covering import Parts, choose, parts_of
from models import MEMORY, Models, recipe_of
from test_kill_loops import JOBS, command

import streammerge
from streammerge import merging, parting
from streammerge.checkpoint import locking, outputdir, outputfile
from streammerge.checkpoint.attempts import epoch_of, read_attempts
from streammerge.checkpoint.journal import (
    JOURNAL_NAME,
    PieceDone,
    ScopeFound,
    iter_records,
    read_journal,
)
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.verifying import verify_files
from streammerge.cli.arguments import main
from streammerge.errors import (
    BusyError,
    CheckpointError,
    OutputError,
    OutputExistsError,
    RecipeError,
    ResumeError,
)
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand
from streammerge.plan.dividing import divide, find_seams
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.name != "posix", reason="processes share locks as POSIX does"),
]


@pytest.fixture
def recipe(models: Models) -> dict[str, Any]:
    return ties_of(models)


def ties_of(models: Models, *, seed: int = 7, **parameters: Any) -> dict[str, Any]:
    """Several shards, with large tensors and a crowd of small ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[str, torch.Tensor]:
        large = {f"large.{i}": torch.randn(3 * BLOCK + i, generator=generator) for i in range(4)}
        small = {f"small.{i}": torch.randn(40, 10, generator=generator) for i in range(30)}
        return {k: v.bfloat16() for k, v in (large | small).items()} | {"ids": torch.arange(9)}

    base, *sources = (models.write(draw()) for _ in range(3))
    parameters = {"density": 0.3} | parameters
    return recipe_of("ties", base, sources, parameters=parameters, output={"max_shard_size": "3MB"})


def plan_of(recipe: Any, *, blocks: int = 2) -> MergePlan:
    planned = streammerge.plan(recipe, memory=MEMORY, workers=2)
    assert isinstance(planned, MergePlan)
    resources = replace(
        planned.resources,
        slot_bytes=blocks * BLOCK,
        slots=40,
        output_slot_bytes=blocks * BLOCK,
        output_slots=3,
    )
    return replace(planned, resources=resources)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def merge_parts(
    planned: Any, out: Path, parts: int, order: Any = None, **options: Any
) -> list[Any]:
    order = range(1, parts + 1) if order is None else order
    return [
        streammerge.merge_part(planned, out, part=part, parts=parts, **options) for part in order
    ]


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def interrupt_part(planned: MergePlan, out: Path, part: int, parts: int, *, writes: int) -> None:
    """Begin a part and end it once so many pieces were written, all of them safely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputfile, "SYNC_BYTES", 1)
        write_at = outputfile.OutputFile.write_at
        counted = itertools.count(1)

        def stop(self: outputfile.OutputFile, *arguments: Any, **keywords: Any) -> None:
            write_at(self, *arguments, **keywords)
            if arguments[0] and next(counted) >= writes:
                raise RuntimeError("Stop")

        patch.setattr(outputfile.OutputFile, "write_at", stop)
        with pytest.raises(streammerge.StreamMergeError, match="Stop"):
            streammerge.merge_part(planned, out, part=part, parts=parts)


# -- the same bytes


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 60])
def test_any_number_of_parts_has_the_same_bytes(
    parts: int, recipe: dict[str, Any], tmp_path: Path
) -> None:
    planned = plan_of(recipe)
    alone = streammerge.merge(planned, tmp_path / "alone")

    *others, last = merge_parts(planned, tmp_path / "out", parts)

    assert others == [None] * (parts - 1)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert last.tensors == alone.tensors
    shards = [shard.name for shard in planned.layout.shards]
    assert {name: last.files[name] for name in shards} == {n: alone.files[n] for n in shards}
    assert not verify_files(tmp_path / "out").damages
    assert not list(tmp_path.glob("out.*")) + list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3])), ids=str)
def test_any_order_has_the_same_bytes(
    order: tuple[int, ...], recipe: dict[str, Any], tmp_path: Path
) -> None:
    planned = plan_of(recipe)
    streammerge.merge(planned, tmp_path / "alone")

    # Each plans within another budget, and cuts the work otherwise.
    for part in order:
        cut = plan_of(recipe, blocks=2 * part)
        streammerge.merge_part(cut, tmp_path / "out", part=part, parts=3)

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


EXAMPLES = [
    (method.name, number, method.operand is not Operand.WEIGHTS)
    for method in discover_methods().values()
    for number in range(len(method.examples))
]


def parts_of_example(example: tuple[str, int, bool]) -> Parts:
    name, number, has_base = example
    return parts_of(name, discover_methods()[name].examples[number], has_base=has_base)


METHODS = [
    pytest.param(*example, id="-".join(map(str, example)))
    for example in choose(EXAMPLES, parts_of_example, lambda example: example[0])
]


@pytest.mark.parametrize(("name", "number", "has_base"), METHODS)
def test_every_method_has_the_same_bytes_in_parts(
    name: str,
    number: int,
    has_base: bool,  # noqa: FBT001
    models: Models,
) -> None:
    method = discover_methods()[name]
    generator = torch.Generator().manual_seed(3)
    shapes = {"a.weight": (300, 300), "b.weight": (7, 5), "c.weight": (3, BLOCK // 2), "d": (11,)}

    def draw() -> Path:
        return models.write({k: torch.randn(s, generator=generator) for k, s in shapes.items()})

    base, *sources = (draw() for _ in range(3))
    most = method.sources[1]
    recipe = recipe_of(
        name,
        base if has_base else None,
        sources[:most],
        parameters=method.examples[number],
        output={"max_shard_size": "400KB"},
    )
    streammerge.merge(recipe, models.root / "alone", memory=MEMORY)

    merge_parts(recipe, models.root / "out", 3, order=(2, 3, 1), memory=MEMORY)

    assert bytes_of(models.root / "out") == bytes_of(models.root / "alone")


_ONE_OUTPUT = [job for job in JOBS if job != "a chain"]
"""What several processes may do together: chains are merged by one."""


@pytest.mark.parametrize("job", _ONE_OUTPUT)
def test_every_kind_of_work_has_the_same_bytes_in_parts(job: str, tmp_path: Path) -> None:
    recipe = JOBS[job](tmp_path)
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)

    for parts in (2, 4):
        merge_parts(recipe, tmp_path / f"out-{parts}", parts, memory=MEMORY)

        assert bytes_of(tmp_path / f"out-{parts}") == bytes_of(tmp_path / "alone")
        assert not verify_files(tmp_path / f"out-{parts}").damages


def test_an_output_of_one_file_is_made_in_parts(recipe: dict[str, Any], tmp_path: Path) -> None:
    del recipe["output"]
    streammerge.merge(recipe, tmp_path / "alone.safetensors", memory=MEMORY)

    merge_parts(recipe, tmp_path / "out.safetensors", 3, memory=MEMORY)

    expected = (tmp_path / "alone.safetensors").read_bytes()
    assert (tmp_path / "out.safetensors").read_bytes() == expected
    assert {path.name for path in tmp_path.glob("out*")} == {
        "out.safetensors",
        "out.manifest.json",
        "out.recipe.yaml",
    }


# -- what a part is


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_disjoint_complete_and_nearly_equal(parts: int, recipe: dict[str, Any]) -> None:
    planned = plan_of(recipe)

    divided = divide(planned, parts)

    assert sorted(itertools.chain(*divided)) == list(range(len(planned.tasks)))
    numels = [sum(planned.tasks[index].numel for index in part) for part in divided]
    largest = max(task.numel for task in planned.tasks)
    even = sum(numels) / parts
    # As near as whole tensors allow, and a sixteenth at each end for the sake of ending with a shard.
    assert all(abs(numel - even) <= largest + even / 8 for numel in numels)


def test_parts_depend_on_the_work_alone(recipe: dict[str, Any]) -> None:
    assert divide(plan_of(recipe, blocks=2), 3) == divide(plan_of(recipe, blocks=8), 3)


def test_parts_end_where_shards_do_if_that_is_near(models: Models) -> None:
    model = models.write({f"{i:02}": torch.ones(1_000) for i in range(12)})
    recipe = recipe_of("linear", None, [model, model], output={"max_shard_size": "16KB"})
    planned = streammerge.plan(recipe, memory=MEMORY)
    assert isinstance(planned, MergePlan)
    assert len(planned.layout.shards) == 3

    assert find_seams(planned, divide(planned, 3)) == {}
    assert len(find_seams(planned, divide(planned, 2))) == 1


def test_no_byte_of_an_input_is_read_twice(recipe: dict[str, Any], tmp_path: Path) -> None:
    alone = streammerge.merge(plan_of(recipe, blocks=16), tmp_path / "alone")

    last = merge_parts(plan_of(recipe, blocks=16), tmp_path / "out", 4)[-1]

    for stage in ("read", "write"):
        parts = [part.bytes_by_stage[stage] for part in last.run.parts]
        assert sum(parts) == alone.run.bytes_by_stage[stage]
        assert all(parts)
        assert last.run.bytes_by_stage[stage] == 0


def test_the_manifest_lists_what_each_part_did(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = plan_of(recipe)
    interrupt_part(planned, tmp_path / "out", 2, 3, writes=2)

    last = merge_parts(planned, tmp_path / "out", 3)[-1]

    assert [(each.part, each.parts, each.attempts) for each in last.run.parts] == [
        (1, 3, 1),
        (2, 3, 2),
        (3, 3, 1),
    ]
    assert all(each.host and each.workers == 2 for each in last.run.parts)
    assert all(0 < each.measured_memory <= each.memory_budget for each in last.run.parts)
    document = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert len(document["run"]["parts"]) == 3


def test_thresholds_of_the_model_that_one_part_found_serve_the_others(
    models: Models, tmp_path: Path
) -> None:
    planned = plan_of(ties_of(models, scope="model"))
    alone = streammerge.merge(planned, tmp_path / "alone")

    last = merge_parts(planned, tmp_path / "out", 3)[-1]

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    read = sum(part.bytes_by_stage["read"] for part in last.run.parts)
    assert read == alone.run.bytes_by_stage["read"]


# -- going on


def test_a_part_that_was_interrupted_goes_on_where_it_stopped(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    planned = plan_of(recipe)
    streammerge.merge(planned, tmp_path / "alone")
    fresh = merge_parts(planned, tmp_path / "fresh", 2)[-1].run.parts[0]

    for writes in (3, 2, 1):
        interrupt_part(planned, tmp_path / "out", 1, 2, writes=writes)
    last = merge_parts(planned, tmp_path / "out", 2)[-1]

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert last.run.parts[0].bytes_by_stage["write"] < fresh.bytes_by_stage["write"]
    assert last.run.parts[0].attempts == 4


def test_what_was_damaged_of_an_interrupted_part_is_made_again(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    planned = plan_of(recipe)
    streammerge.merge(planned, tmp_path / "alone")
    interrupt_part(planned, tmp_path / "out", 1, 2, writes=3)
    for shard in partial_of(tmp_path / "out").glob("*.safetensors"):
        shard.write_bytes(bytes(shard.stat().st_size))

    last = merge_parts(planned, tmp_path / "out", 2)[-1]

    assert last.run.parts[0].damaged
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


def test_one_process_finishes_what_parts_began(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = plan_of(recipe)
    alone = streammerge.merge(planned, tmp_path / "alone")
    merge_parts(planned, tmp_path / "out", 3, order=[2])
    interrupt_part(planned, tmp_path / "out", 3, 3, writes=2)
    with pytest.raises(OutputExistsError, match="--resume"):
        streammerge.merge(planned, tmp_path / "out")

    manifest = streammerge.merge(planned, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert manifest.run.bytes_by_stage["read"] < alone.run.bytes_by_stage["read"]
    assert [each.part for each in manifest.run.parts] == [2]
    assert manifest.tensors == alone.tensors


def test_parts_finish_what_one_process_began(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = plan_of(recipe)
    alone = streammerge.merge(planned, tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: Any) -> None:
            raise OutputError("Stop")

        patch.setattr(merging, "check_shards", stop)
        patch.setattr(outputfile, "SYNC_BYTES", 1)
        with pytest.raises(OutputError, match="Stop"):
            streammerge.merge(planned, tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--resume"):
        merge_parts(planned, tmp_path / "out", 2)

    last = merge_parts(planned, tmp_path / "out", 2, resume=True)[-1]

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert sum(part.bytes_by_stage["read"] for part in last.run.parts) == 0
    assert last.tensors == alone.tensors


def test_a_part_that_is_done_is_not_done_again(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = plan_of(recipe)
    assert merge_parts(planned, tmp_path / "out", 2, order=[1, 1]) == [None, None]
    partial = partial_of(tmp_path / "out")
    found = read_journal(partial / JOURNAL_NAME)
    assert found is not None

    attempts = read_attempts(partial, epoch_of(found.identity, partial), count=True)

    assert sum(each.done_numel > 0 for each in attempts) == 1


def test_any_part_again_finds_the_merge_complete(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = plan_of(recipe)
    expected = merge_parts(planned, tmp_path / "out", 2)[-1]

    assert merge_parts(planned, tmp_path / "out", 2) == [expected, expected]
    assert merge_parts(planned, tmp_path / "out", 2, overwrite=True) == [expected, expected]


def test_any_part_again_puts_in_place_what_the_last_one_could_not(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    planned = plan_of(recipe)
    streammerge.merge(planned, tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:

        def stop(_: Any) -> None:
            raise OSError(5, "Stop")

        patch.setattr(outputdir, "put_in_place", stop)
        with pytest.raises(OutputError, match="Stop"):
            merge_parts(planned, tmp_path / "out", 2)
    assert "2 of 2 parts are done" in str(streammerge.read_status(tmp_path / "out"))

    assert merge_parts(planned, tmp_path / "out", 2, order=[1])[0] is not None

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


def test_bytes_where_two_parts_meet_are_read_again_and_mended(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """As a page that two machines wrote to may have lost what one of them had written."""
    del recipe["output"]
    planned = plan_of(recipe)
    streammerge.merge(planned, tmp_path / "alone")
    (seam,) = {at for own in find_seams(planned, divide(planned, 2)).values() for at in own[1:]}
    publish = parting.finish_parts

    def damage(*arguments: Any, **keywords: Any) -> Any:
        path = partial_of(tmp_path / "out") / planned.layout.shards[0].name
        with path.open("r+b") as stream:
            stream.seek(seam - 100)
            stream.write(bytes(150))
        return publish(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parting, "finish_parts", damage)
        last = merge_parts(planned, tmp_path / "out", 2)[-1]

    assert last.run.damaged
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert not verify_files(tmp_path / "out").damages


def test_parts_replace_an_earlier_merge_when_told_to(models: Models, tmp_path: Path) -> None:
    earlier, later = plan_of(ties_of(models, seed=1)), plan_of(ties_of(models, seed=2))
    streammerge.merge(earlier, tmp_path / "out")
    streammerge.merge(later, tmp_path / "alone")
    before = bytes_of(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        merge_parts(later, tmp_path / "out", 2)

    assert merge_parts(later, tmp_path / "out", 2, order=[1], overwrite=True) == [None]
    assert bytes_of(tmp_path / "out") == before
    # The first one said so for all.
    assert merge_parts(later, tmp_path / "out", 2, order=[2])[0] is not None

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert not list(tmp_path.glob("out.*"))


def test_a_part_that_fails_at_once_leaves_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = plan_of(recipe)
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise CheckpointError("Stop")

        patch.setattr(parting, "write_shards", fail)
        with pytest.raises(CheckpointError, match="Stop"):
            merge_parts(planned, tmp_path / "out", 2)

    assert not partial_of(tmp_path / "out").exists()


def test_inputs_that_change_meanwhile_spoil_the_part_alone(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    planned = plan_of(recipe)
    merge_parts(planned, tmp_path / "out", 2, order=[1])
    check = parting.check_unchanged

    def touch(files: Any, sources: Any) -> None:
        os.utime(planned.files[0].path)
        check(files, sources)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parting, "check_unchanged", touch)
        with pytest.raises(CheckpointError, match="changed"):
            merge_parts(planned, tmp_path / "out", 2, order=[2])

    status = streammerge.read_status(tmp_path / "out")
    assert [part.state for part in status.parts] == ["done", "not begun"]
    with pytest.raises(ResumeError, match=r"inputs .* was .* is "):
        merge_parts(plan_of(recipe), tmp_path / "out", 2, order=[2])


def test_no_room_is_reserved_where_several_write(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system cannot, the C library would read a byte of every block, and write zeros."""

    def reserve(*_: Any) -> None:
        raise AssertionError("reserved")

    monkeypatch.setattr(os, "posix_fallocate", reserve)

    assert merge_parts(plan_of(recipe), tmp_path / "out", 2)[-1] is not None


# -- what is refused


def test_another_number_of_parts_is_refused_by_name(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = plan_of(recipe)
    merge_parts(planned, tmp_path / "out", 3, order=[1])

    with pytest.raises(ResumeError, match=r"in 3 parts, and 2 are asked for; give --part K/3"):
        merge_parts(planned, tmp_path / "out", 2, order=[2])
    merge_parts(planned, tmp_path / "out", 2, overwrite=True)

    assert not verify_files(tmp_path / "out").damages


def test_another_recipe_is_refused_by_name(models: Models, tmp_path: Path) -> None:
    recipe = ties_of(models)
    merge_parts(plan_of(recipe), tmp_path / "out", 2, order=[1])
    recipe["parameters"]["density"] = 0.4

    with pytest.raises(
        ResumeError, match=r"another one: parameters.density was 0.\d+, is 0.4; make it"
    ):
        merge_parts(plan_of(recipe), tmp_path / "out", 2, order=[2])


def test_another_version_is_refused_by_name(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = plan_of(recipe)
    merge_parts(planned, tmp_path / "out", 2, order=[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streammerge.identity.VERSION", "9.9")
        with pytest.raises(ResumeError, match=r"versions streammerge was .*, is 9\.9"):
            merge_parts(planned, tmp_path / "out", 2, order=[2])


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/", "/2", "-1/2", "a/b", "1/0"])
def test_parts_that_cannot_be_are_refused_by_the_command(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["merge", "recipe.yaml", str(tmp_path / "out"), f"--part={text}"])

    assert refused.value.code == 2
    assert repr(text) in capsys.readouterr().err


@pytest.mark.parametrize(("part", "parts"), [(0, 2), (3, 2), (True, 2), (1, 1.0), ("1", 2)])
def test_parts_that_cannot_be_are_refused_in_python(
    part: Any, parts: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="part: expected"):
        streammerge.merge_part(recipe, tmp_path / "out", part=part, parts=parts)


def test_grids_and_other_outputs_are_not_done_in_parts(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(recipe | {"grid": {"parameters.density": [0.2, 0.3]}}))
    out = str(tmp_path / "out")
    for asked in ([str(grid), out], [str(path), out, "--also", str(path), f"{out}-2"]):
        assert main(["merge", *asked, "--part", "1/2"]) == 2
        assert "--part: " in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_combinations_of_adapters_are_not_done_in_parts(tmp_path: Path) -> None:
    from models import write_adapter

    adapters = [
        write_adapter(tmp_path / name, {"layer.weight": (8, 8)}, seed=seed)
        for seed, name in enumerate("ab")
    ]
    recipe = {"method": "linear", "sources": [{"path": str(path)} for path in adapters]}
    with pytest.raises(RecipeError, match="leave --part and --on out"):
        streammerge.merge_part(recipe, tmp_path / "out", part=1, parts=2)


def test_a_merge_in_parts_and_one_by_one_process_do_not_get_in_each_others_way(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    planned = plan_of(recipe)
    refused = []

    def look(_: Any) -> None:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            try:
                streammerge.merge(planned, tmp_path / "out", **options)
            except (BusyError, OutputExistsError) as error:
                refused.append(error)

    merge_parts(planned, tmp_path / "out", 2, order=[1], on_progress=look)

    assert refused
    assert all(isinstance(error, BusyError) for error in refused)


def test_parts_wait_for_one_process_that_has_the_directory_and_then_say_so(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.checkpoint.partdir._JOIN_SECONDS", 0.3)
    planned = plan_of(recipe)
    refused: list[BusyError] = []

    def look(_: Any) -> None:
        if not refused:
            with pytest.raises(BusyError, match="another merge is writing there now") as caught:
                merge_parts(planned, tmp_path / "out", 2, order=[1], resume=True)
            refused.append(caught.value)

    streammerge.merge(planned, tmp_path / "out", on_progress=look)

    assert refused


def test_parts_of_another_merge_that_live_are_not_overwritten_but_named(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.checkpoint.partdir._JOIN_SECONDS", 0.3)
    one, other = plan_of(ties_of(models, seed=1)), plan_of(ties_of(models, seed=2))
    refused: list[BusyError] = []

    def look(_: Any) -> None:
        if not refused:
            with pytest.raises(BusyError) as caught:
                merge_parts(other, tmp_path / "out", 2, order=[1], overwrite=True)
            refused.append(caught.value)

    merge_parts(one, tmp_path / "out", 2, order=[2], on_progress=look)

    assert f"(part 2/2: process {os.getpid()} on " in str(refused[0])
    assert merge_parts(one, tmp_path / "out", 2, order=[1])[0] is not None


def test_parts_of_another_merge_that_are_about_to_end_are_waited_for(
    models: Models, tmp_path: Path
) -> None:
    one, other = plan_of(ties_of(models, seed=1)), plan_of(ties_of(models, seed=2))
    streammerge.merge(other, tmp_path / "alone")
    merge_parts(one, tmp_path / "out", 2, order=[2])
    lock = locking.FileLock(partial_of(tmp_path / "out") / ".streammerge-partial")
    assert lock.acquire(shared=True)
    ending = threading.Timer(1.0, lock.close)
    ending.start()

    merge_parts(other, tmp_path / "out", 2, overwrite=True)

    ending.join()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


def test_a_file_system_without_locks_is_refused(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def knows_none(self: locking.FileLock, *, shared: bool = False) -> bool:
        self.known = False
        return True

    monkeypatch.setattr(locking.FileLock, "acquire", knows_none)

    with pytest.raises(OutputError, match="knows no locks"):
        merge_parts(plan_of(recipe), tmp_path / "out", 2)


# -- orphans


@pytest.mark.parametrize("moment", ["open", "write", "finish"])
@pytest.mark.parametrize("parts", [None, 2])
def test_what_was_given_up_never_gets_its_bytes_into_another_merge(
    parts: int | None, moment: str, models: Models, tmp_path: Path
) -> None:
    """Its machine is cut off, so nobody sees its locks; it goes on when another merge is under way."""
    old, new = plan_of(ties_of(models, seed=1)), plan_of(ties_of(models, seed=2))
    assert [s.name for s in old.layout.shards] == [s.name for s in new.layout.shards]
    streammerge.merge(new, tmp_path / "alone")
    out = tmp_path / "out"

    def take_over() -> None:
        begun.append(True)
        if parts is None:
            streammerge.merge(new, out, overwrite=True)
        else:
            merge_parts(new, out, parts, order=[1], overwrite=True)

    begun: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locking.FileLock, "acquire", lambda *_, **__: True)
        _at(moment, patch, lambda: None if begun else take_over())
        with pytest.raises(OutputError, match=r"given up|cannot be created"):
            merge_parts(old, out, 2, order=[1])
    assert begun
    if parts is not None:
        merge_parts(new, out, parts, order=[2])

    assert bytes_of(out) == bytes_of(tmp_path / "alone")
    assert not verify_files(out).damages
    assert not partial_of(out).exists() or parts is None


def _at(moment: str, patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Act when a process is at some moment of its work."""
    if moment == "open":
        opened = outputfile.open_own

        def open_then(path: Path, flags: int) -> int:
            act()
            return opened(path, flags)

        patch.setattr(outputfile, "open_own", open_then)
    elif moment == "write":
        write_at = outputfile.OutputFile.write_at

        def write_then(self: outputfile.OutputFile, offset: int, *rest: Any, **more: Any) -> None:
            if offset:
                act()
            write_at(self, offset, *rest, **more)

        patch.setattr(outputfile.OutputFile, "write_at", write_then)
    else:
        check = parting.check_unchanged

        def check_then(*arguments: Any) -> None:
            act()
            check(*arguments)

        patch.setattr(parting, "check_unchanged", check_then)


def test_a_part_hears_in_the_middle_that_it_was_given_up(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parting, "_SECONDS_BETWEEN_CHECKS", 0.0)
    old, new = plan_of(ties_of(models, seed=1)), plan_of(ties_of(models, seed=2))
    begun: list[bool] = []

    def take_over(_: Any) -> None:
        if not begun:
            begun.append(True)
            merge_parts(new, tmp_path / "out", 2, order=[1], overwrite=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locking.FileLock, "acquire", lambda *_, **__: True)
        with pytest.raises(OutputError, match="was given up, and another one has begun there"):
            merge_parts(old, tmp_path / "out", 2, order=[1], on_progress=take_over)


# -- status


def test_status_shows_every_part(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned, out = plan_of(recipe), tmp_path / "out"
    with pytest.raises(OutputError, match="neither a merged model nor an unfinished merge"):
        streammerge.read_status(out)
    merge_parts(planned, out, 4, order=[3])
    interrupt_part(planned, out, 1, 4, writes=2)
    seen = []
    merge_parts(
        planned, out, 4, order=[2], on_progress=lambda _: seen.append(streammerge.read_status(out))
    )

    assert main(["status", str(out)]) == 0
    text = capsys.readouterr().out
    assert main(["status", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)

    assert "running" in {status.parts[1].state for status in seen}
    assert [part["state"] for part in document["parts"]] == [
        "interrupted",
        "done",
        "done",
        "not begun",
    ]
    assert [part["attempts"] for part in document["parts"]] == [1, 1, 1, 0]
    assert 0 < document["parts"][0]["done"] < 1
    assert document["unfinished"]
    assert not document["complete"]
    assert "2 of 4 parts are done" in text
    assert f"process {os.getpid()} on " in text
    merge_parts(planned, out, 4)
    assert str(streammerge.read_status(out)) == f"{out}: is complete"


def test_status_of_a_merge_by_one_process(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned, out = plan_of(recipe), tmp_path / "out"
    seen = []
    streammerge.merge(planned, out, on_progress=lambda _: seen.append(streammerge.read_status(out)))

    assert all(status.running and status.unfinished for status in seen)
    assert "is being merged" in str(seen[0])


# -- real processes


def start(recipe: Path, out: Path, part: int, parts: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "streammerge", "merge", str(recipe), str(out)]
    return subprocess.Popen(
        [*command, "--part", f"{part}/{parts}", "--memory", "700MiB", *options],
        stderr=subprocess.PIPE,
        text=True,
    )


def test_parts_side_by_side_put_one_output_in_place(recipe: dict[str, Any], tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)

    processes = [start(path, out, part, 3) for part in (1, 2, 3)]
    said = [process.communicate(timeout=120)[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert bytes_of(out) == bytes_of(tmp_path / "alone")
    assert not verify_files(out).damages
    assert sum("in 3 parts" in text for text in said) == 1, said


def test_a_part_tells_in_json_what_is_left(
    recipe: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    command = ["merge", str(path), str(out), "--memory", MEMORY, "--json", "--part"]

    assert main([*command, "2/2"]) == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert main([*command, "1/2"]) == 0
    done = json.loads(capfd.readouterr().out.splitlines()[-1])

    assert (last["event"], last["part"], last["left"]) == ("part_done", 2, [1])
    assert (done["event"], done["parts"]) == ("done", 2)
    planned = streammerge.plan(recipe, memory=MEMORY)
    assert isinstance(planned, MergePlan)
    assert done["bytes_by_stage"]["write"] == planned.layout.data_nbytes


def test_entries_of_parts_are_of_their_own_tensors(models: Models, tmp_path: Path) -> None:
    planned = plan_of(ties_of(models, scope="model"))
    merge_parts(planned, tmp_path / "out", 3, order=[2, 1])
    partial = partial_of(tmp_path / "out")
    found = read_journal(partial / JOURNAL_NAME)
    assert found is not None

    divided = divide(planned, 3)
    for attempt in read_attempts(partial, epoch_of(found.identity, partial), count=True):
        records = [record for _, record in iter_records(attempt.path)]
        entries = [r for r in records if isinstance(r, PieceDone | ScopeFound)]
        assert {entry.task for entry in entries} <= divided[attempt.part - 1] | {-1}
        assert attempt.done is not None
        assert attempt.done_numel == attempt.numel


def test_time_passes_while_nobody_publishes(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A lock that outlives its process, as on a machine that was lost, keeps the output from its place."""
    planned = plan_of(recipe)
    merge_parts(planned, tmp_path / "out", 2, order=[1])
    lock = locking.FileLock(partial_of(tmp_path / "out") / ".streammerge-partial")
    assert lock.acquire(shared=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parting, "_PUBLISH_SECONDS", 0.5)
        began = time.monotonic()
        assert merge_parts(planned, tmp_path / "out", 2, order=[2]) == [None]
        assert time.monotonic() - began >= 0.5
    assert not (tmp_path / "out").exists()
    lock.close()

    assert merge_parts(planned, tmp_path / "out", 2, order=[2])[0] is not None


_KILLED = {"ties over the model", "float8 codes", "baked adapters"}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "job",
    [
        # The others are like these for whoever does the parts.
        pytest.param(job, marks=() if job in _KILLED else pytest.mark.slow)
        for job in _ONE_OUTPUT
    ],
)
def test_parts_that_are_killed_again_and_again_end_with_the_right_bytes(
    job: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    rounds = 20 if request.config.getoption("--runslow") else 1
    tries = rounds + 10
    chance = random.Random(f"{job} in parts")  # noqa: S311 - it only chooses when to kill
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(JOBS[job](tmp_path)))
    subprocess.run([*command(recipe, tmp_path / "reference", chance)], check=True)

    kills = 0
    for done in range(tries):
        kills += _shake(recipe, out, chance)
        assert bytes_of(out) == bytes_of(tmp_path / "reference")
        assert not verify_files(out).damages
        assert not list(tmp_path.glob("out.*"))
        shutil.rmtree(out)
        # On a fast machine parts may be through before their instants: then once more.
        if kills and done + 1 >= rounds:
            break

    assert kills
    record_property("kills", kills)


def _shake(recipe: Path, out: Path, chance: random.Random) -> int:
    """Start parts side by side, kill them, and start others, until one has put the output in place.

    Now and then one process without parts goes on instead.
    """
    kills = 0
    seconds = chance.uniform(0.2, 0.7)
    while not out.exists():
        kinds = [["--part", f"{part}/3"] for part in (1, 2, 3)]
        chance.shuffle(kinds)
        chosen = [["--resume"]] if kills and chance.random() < 0.2 else kinds
        processes = []
        for options in chosen[: chance.choice([1, 2, 3, 3])]:
            process = subprocess.Popen(
                [*command(recipe, out, chance), *options], stderr=subprocess.PIPE, text=True
            )
            # Not SIGINT, which Python takes for an error before the command line has begun.
            number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            processes.append((process, number, chance.uniform(0.5, 1.5) * seconds))
        for process, number, patience in processes:
            try:
                _, said = process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                _, said = process.communicate(timeout=120)
                kills += process.returncode != 0
            assert process.returncode in {0, 130, -number}, said
        if out.exists():
            assert not [d for d in verify_files(out).damages if d.kind != "extra"]
        # Every job comes to its end: each run has more time than the one before.
        seconds += chance.uniform(0.2, 0.6)
    # Whatever was killed after the last rename is tidied up by whoever comes next.
    subprocess.run([*command(recipe, out, chance), "--part", "1/3"], check=True)
    return kills
