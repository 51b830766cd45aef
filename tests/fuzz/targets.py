"""What is fuzzed: how an input is made, how it is read, and what reading it may cost.

An input passes if it is read, or refused by one of the errors of :mod:`streammerge.errors` whose
message can be printed and is not as long as the input makes it; within a stated multiple of its size
in memory, and within seconds of processor time.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType

import generators

from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.assignment.types import Action
from streammerge.checkpoint.inspecting import describe
from streammerge.checkpoint.manifest import read_manifest_files
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.quantised import check_not_quantized
from streammerge.checkpoint.reading import read_checkpoint
from streammerge.checkpoint.sidecars import read_companions, write_sidecars
from streammerge.checkpoint.types import Checkpoint, TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import MAX_LINE_CHARACTERS, StreamMergeError
from streammerge.methods import discover_methods
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.types import (
    PLAN_VERSION,
    MemoryProjection,
    MergePlan,
    OutputLayout,
    OutputShard,
    Resources,
    TensorInput,
    TensorTask,
)
from streammerge.recipe.dumping import dump_recipe
from streammerge.recipe.parsing import MAX_PROBLEMS, parse_recipe
from streammerge.recipe.resolving import build_resolver

MAX_CPU_SECONDS = 10
"""Processor time, so that a busy machine fails nothing; inputs of some kilobytes take milliseconds."""
FIXED_BYTES = 2**20
"""What reading may take besides a multiple of the input: caches that fill at the first use."""


class TooSlow(BaseException):
    """Reading takes longer than any input of this size may; no ``except Exception`` stops it."""


@dataclass(frozen=True)
class Target:
    """One parser, with a directory of its own to read from."""

    name: str
    """What messages and ``scripts/fuzz`` call it."""
    make: Callable[[Random], bytes]
    """Makes an input."""
    read: Callable[[bytes, Path], None]
    """Writes the input into the directory and reads it."""
    multiple: int
    """Bytes of memory that each byte of the input may take."""
    prepare: Callable[[Path], None] = lambda _: None
    """Puts beside the input what it refers to, once."""


def check(target: Target, content: bytes, directory: Path) -> bool:
    """Return whether the parser accepts the input; fail unless it is read or refused properly."""
    message = ""
    with _limited_time():
        try:
            target.read(content, directory)
        except StreamMergeError as error:
            message = str(error)
        else:
            return True
    lines = message.split("\n")
    assert message
    assert all(line.isprintable() for line in lines), message
    # An escape may take ten characters.
    assert max(map(len, lines)) < 11 * MAX_LINE_CHARACTERS
    assert len(lines) <= MAX_PROBLEMS + 1, message
    return False


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# --- readers


def _read_shard(content: bytes, directory: Path) -> None:
    _check_places(_read_file(content, directory / "model.safetensors"))


def _read_torch(content: bytes, directory: Path) -> None:
    _check_places(_read_file(content, directory / "model.bin"))


def _read_file(content: bytes, path: Path) -> Checkpoint:
    path.write_bytes(content)
    return read_checkpoint(path)


def _check_places(checkpoint: Checkpoint) -> None:
    """Every tensor lies inside its file, and can be spoken of."""
    for entry in checkpoint.tensors.values():
        nbytes = checkpoint.files[entry.file].nbytes
        assert 0 <= entry.offset <= entry.offset + entry.nbytes <= nbytes
        entry.name.encode()
    check_not_quantized(checkpoint)
    assert all(line.isprintable() for line in describe(checkpoint).split("\n"))


def _write_shards(directory: Path) -> None:
    for number, name in (("1", "a"), ("2", "b")):
        header = f'{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}'.encode()
        shard = len(header).to_bytes(8, "little") + header + bytes(8)
        (directory / f"{number}.safetensors").write_bytes(shard)
    (directory / "out").symlink_to("/")


def _read_index(content: bytes, directory: Path) -> None:
    _check_places(_read_file(content, directory / "model.safetensors.index.json"))


def _write_model(directory: Path) -> None:
    model = directory / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (model / "code.py").write_bytes(b"from .other import x\n")


def _read_config(content: bytes, directory: Path) -> None:
    model = directory / "model"
    (model / "config.json").write_bytes(content)
    _check_places(read_checkpoint(model))
    written = write_sidecars(model, read_companions(model), directory / "out", dtype="bfloat16")
    assert set(written) <= {"config.json", "code.py"}


def _read_manifest(content: bytes, directory: Path) -> None:
    (directory / MANIFEST_NAME).write_bytes(content)
    read_manifest_files(directory)


def _read_recipe(content: bytes, directory: Path) -> None:
    del directory
    methods = {name: method.parameters for name, method in _methods().items()}
    text = content.decode("utf-8", "surrogatepass")
    recipe = parse_recipe(text, origin="recipe", methods=methods)
    assert parse_recipe(dump_recipe(recipe), origin="dump", methods=methods) == recipe
    build_resolver(recipe, methods[recipe.method])("model.layers.0.mlp.weight")


_methods = cache(discover_methods)


def _make_recipe(random: Random) -> bytes:
    return generators.recipe(random).encode("utf-8", "surrogatepass")


def _read_plan(content: bytes, directory: Path) -> None:
    plan = parse_plan(content.decode("utf-8", "replace"))
    for shard in plan.layout.shards:
        assert (directory / shard.name).parent == directory
        assert shard.name not in {"", ".", ".."}


def _adapted_task() -> TensorTask:
    """A tensor that an adapter changes."""
    factor = TensorEntry("lora_A.weight", DType.BF16, (1, 2), 0, 8)
    return TensorTask(
        name="w",
        shape=(2, 2),
        numel=4,
        dtype=DType.BF16,
        action=Action.MERGE,
        inputs=(TensorInput(0, 8, DType.BF16), None),
        setting=0,
        scope_block=0,
        shard=0,
        offset=8,
        changes=(Change(ChangeKind.NORMED, (factor,), (2, 2), indices=(1,)),),
    )


@cache
def _sound_plan() -> bytes:
    plan = MergePlan(
        version=PLAN_VERSION,
        method="linear",
        semantics="peft",
        recipe="",
        seed=0,
        keep_non_finite=False,
        compute_dtype=DType.F32,
        has_base=False,
        models=(),
        files=(),
        settings=(),
        tasks=(_adapted_task(),),
        model_scope=False,
        layout=OutputLayout((OutputShard("model.safetensors", 8, 0, ()),), None),
        resources=Resources(1, 1, 1, 1, 1, 1, 1, 1),
        memory=MemoryProjection(0, 0, 0, 0, 0, 0, 0),
        bytes_to_read=0,
        input_nbytes=0,
        dropped=(),
        copied_from_base=(),
    )
    return dump_plan(plan).encode()


def _make_plan(random: Random) -> bytes:
    return generators.plan_from(random, _sound_plan())


TARGETS = {
    target.name: target
    for target in (
        Target("shard", generators.shard, _read_shard, 60),
        Target("index", generators.index, _read_index, 60, _write_shards),
        Target("config", generators.config, _read_config, 60, _write_model),
        Target("manifest", generators.manifest, _read_manifest, 60),
        Target("pickle", generators.torch_file, _read_torch, 120),
        Target("archive", generators.torch_archive, _read_torch, 120),
        # PyYAML makes tokens, events and nodes, each with two marks, of every other character.
        Target("recipe", _make_recipe, _read_recipe, 500),
        Target("plan", _make_plan, _read_plan, 60),
    )
}
