"""Small checkpoints for tests: made, written in any layout, merged, and read back as bits.

path = write_model(tmp_path / "base", tensors, shards=3, layout="reversed")
recipe = recipe_of("ties", base, sources, parameters={"density": 0.2})
merged = load_model(tmp_path / "out")
assert_same_bits(merged["weight"], expected)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge.adapters.onto_base.products import multiply_in_order
from streammerge.assignment.types import Action
from streammerge.checkpoint.digests import digest_shard
from streammerge.checkpoint.header import read_safetensors_header
from streammerge.checkpoint.manifest import Manifest
from streammerge.errors import MemoryBudgetError
from streammerge.methods.base import MergeMethod
from streammerge.plan import kernels
from streammerge.plan.chunking import Residence, iter_units, most_around
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK

Tensors = dict[str, Tensor]
Layout = Literal["given", "reversed", "interleaved"]

INDEX_NAME = "model.safetensors.index.json"
MEMORY = "4GiB"
"""Far more than any model here needs."""
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_model(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    shards: int = 1,
    layout: Layout = "given",
    binary: bool = False,
) -> Path:
    """Write a checkpoint and return ``path``.

    Args:
        path: A single ``.safetensors`` or ``.bin`` file if it has such a suffix; else a directory.
        tensors: What it holds.
        shards: Files in the directory; more than one brings an index.
        layout: Order of the tensors over and within files. safetensors itself sorts each file by
            dtype and name, so for a file of one dtype only the split over shards changes; see
            :func:`write_shard_in_order` for the order within a file.
        binary: Whether the directory holds torch.save files instead of safetensors.
    """
    names = _ordered(list(tensors), layout)
    if path.suffix in {".safetensors", ".bin"}:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, {name: tensors[name] for name in names})
        return path
    path.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("pytorch_model", ".bin") if binary else ("model", ".safetensors")
    if shards == 1:
        _write_file(path / f"{stem}{suffix}", {name: tensors[name] for name in names})
        return path
    weight_map = {}
    for index in range(shards):
        # Round robin: neighbours of one file are never neighbours of another split.
        part = {name: tensors[name] for name in names[index::shards]}
        file = f"{stem}-{index + 1:05d}-of-{shards:05d}{suffix}"
        _write_file(path / file, part)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index_document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / f"{stem}{suffix}.index.json").write_text(json.dumps(index_document))
    return path


def write_shard_in_order(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write one safetensors file with its data in exactly the order given, and return ``path``."""
    codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
    codes |= {torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}
    path.parent.mkdir(parents=True, exist_ok=True)
    header, blobs, cursor = {}, [], 0
    for name, tensor in tensors.items():
        blob = bits(tensor).numpy().tobytes()
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [cursor, cursor + len(blob)],
        }
        blobs.append(blob)
        cursor += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return path


def write_adapter(
    path: Path, weights: Mapping[str, tuple[int, int]], *, seed: int, dora: bool = False
) -> Path:
    """Write a LoRA of rank 4 as PEFT does, and return ``path``.

    Args:
        path: The directory to make.
        weights: The rows and columns of every weight of the base that it changes, by name.
        seed: Chooses the factors.
        dora: Whether it has a magnitude for each row (DoRA).
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {name.removesuffix(".weight"): shape for name, shape in weights.items()}
    tensors = {}
    for module, (rows, columns) in modules.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
        if dora:
            magnitude = torch.rand(rows, generator=generator) + 0.5
            tensors[f"{name}.lora_magnitude_vector"] = magnitude
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config: dict[str, object] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    config |= {"target_modules": targets, "use_dora": dora}
    write_model(path / "adapter_model.safetensors", tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def load_model(directory: Path) -> Tensors:
    """Read a merged directory the way transformers does: by its index, or its only file."""
    index = next(directory.glob("*.safetensors.index.json"), None)
    if index is None:
        (only,) = directory.glob("*.safetensors")
        return load_file(only)
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {name: load_file(directory / name) for name in sorted(set(weight_map.values()))}
    assert sorted(itertools.chain.from_iterable(files.values())) == sorted(weight_map)
    return {name: files[file][name] for name, file in weight_map.items()}


def product_of(left: Tensor, right: Tensor) -> Tensor:
    """Multiply factors as adapters' are: in float32 term by term, in float64 as torch does."""
    if left.dtype is not torch.float32:
        return left @ right
    out = torch.empty(left.shape[0], right.shape[1])
    multiply_in_order(left, right, out)
    return out


def date_back(out: Path, document: dict[str, Any], make_hash: Callable[[Any], Any]) -> None:
    """Give a manifest's shards the digests that another hash makes of them."""
    for name, fields in document["files"].items():
        if fields["tree"]:
            _, entries = read_safetensors_header(out / name, file_index=0)
            start = min(entry.offset for entry in entries)
            fields["digest"] = digest_shard(out / name, entries, start, make_hash)


def bits(tensor: Tensor) -> Tensor:
    """Return the bit patterns as flat integers, so that -0.0 and NaN compare as what they are."""
    return tensor.contiguous().reshape(-1).view(_INT_OF_SIZE[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Check dtype, shape and every bit; the message names the first difference."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    differing = (bits(actual) != bits(expected)).nonzero().flatten()
    if differing.numel():
        first = int(differing[0])
        a, e = actual.reshape(-1)[first], expected.reshape(-1)[first]
        raise AssertionError(
            f"{what}: {differing.numel()} of {actual.numel()} elements differ; "
            f"element {first} is {a.item()!r}, expected {e.item()!r}"
        )


def assert_same_model(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that two models have the same tensors, bit for bit."""
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


def recipe_of(
    method: str,
    base: Path | None,
    sources: Sequence[Path | Mapping[str, Any]],
    **document: Any,
) -> dict[str, Any]:
    """Return a recipe document; a source may be a path or a mapping with one."""
    recipe: dict[str, Any] = {"method": method, "sources": []}
    if base is not None:
        recipe["base"] = str(base)
    for source in sources:
        entry = {"path": source} if isinstance(source, Path) else dict(source)
        recipe["sources"].append(entry | {"path": str(entry["path"])})
    # A recipe spells one value per source as a list.
    if "parameters" in document:
        document["parameters"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in document["parameters"].items()
        }
    return recipe | document


def count_sources(method: MergeMethod, wanted: int) -> int:
    """Return how many sources to give a method where a test would give it so many."""
    least, most = method.sources
    return max(least, wanted if most is None else min(wanted, most))


def required(method: MergeMethod) -> dict[str, Any]:
    """Return values of the parameters that have no default, as the first example has them."""
    names = [spec.name for spec in method.parameters if spec.default is None]
    return {name: method.examples[0][name] for name in names}


def recut(
    plan: MergePlan,
    *,
    slots: int,
    slot_blocks: int = 1,
    workers: int = 2,
    output_slots: int = 2,
    statistics_bytes: int | None = None,
) -> MergePlan:
    """Return the plan with its work cut otherwise than any budget would.

    Args:
        plan: What :func:`streammerge.plan` returned.
        slots: Input buffers; fewer than a tensor has chunks times inputs make it STREAMED.
        slot_blocks: Blocks of the widest input that one buffer holds.
        workers: Compute threads.
        output_slots: Output buffers.
        statistics_bytes: Room for statistics; None keeps the plan's.
    """
    old = plan.resources
    widest = max(e.dtype.itemsize for task in plan.tasks for e in task.inputs if e is not None)
    around = max(most_around(task.row) for task in plan.tasks)
    slot_bytes = (slot_blocks * BLOCK + around) * widest
    resources = dataclasses.replace(
        old,
        slots=slots,
        slot_bytes=slot_bytes,
        output_slots=output_slots,
        output_slot_bytes=old.output_slot_bytes * slot_bytes // old.slot_bytes,
        workers=workers,
        statistics_bytes=old.statistics_bytes if statistics_bytes is None else statistics_bytes,
    )
    return dataclasses.replace(plan, resources=resources)


def residence_of(plan: MergePlan, name: str) -> Residence:
    """Return how the inputs of a tensor are held while its own statistics are found."""
    for unit in iter_units(plan, must_look=lambda task: task.action is Action.MERGE):
        for chunk in unit.chunks:
            if any(plan.tasks[piece.task].name == name for piece in chunk.pieces):
                return unit.residence
    raise KeyError(name)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Merge with the operations of torch alone, as where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "load_kernels", lambda: None)
        yield


def tight_plan(recipe: Any, *, workers: int = 1) -> MergePlan:
    """Plan with the smallest budget, which the refusal of a tiny one names."""
    with pytest.raises(MemoryBudgetError) as caught:
        streammerge.plan(recipe, memory=1, workers=workers)
    found = re.search(r"--memory (\w+) or more", str(caught.value))
    assert found is not None
    return streammerge.plan(recipe, memory=found[1], workers=workers)


class Models:
    """Makes models below one directory, and merges them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._count = itertools.count()

    def write(self, tensors: Mapping[str, Tensor], name: str = "", **options: Any) -> Path:
        """Write a model under a new name; options as for :func:`write_model`."""
        return write_model(self.root / (name or f"model{next(self._count)}"), tensors, **options)

    def new_output(self) -> Path:
        """Return a directory that does not exist yet."""
        return self.root / f"out{next(self._count)}"

    def merge(self, recipe: Any, **options: Any) -> tuple[Tensors, Manifest]:
        """Merge into a new directory; returns its tensors and the manifest."""
        out = self.new_output()
        if not isinstance(recipe, MergePlan):
            options = {"memory": MEMORY} | options
        manifest = streammerge.merge(recipe, out, **options)
        return load_model(out), manifest


def _ordered(names: list[str], layout: Layout) -> list[str]:
    if layout == "given":
        return names
    if layout == "reversed":
        return names[::-1]
    return names[1::2] + names[::2]


def _write_file(path: Path, tensors: Tensors) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
