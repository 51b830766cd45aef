"""DoRA's norms are found on a device with the bits of the CPU, in the memory that the plan states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_backend import FakeBackend, MakeDevices
from models import MEMORY, Tensors, assert_same_model, load_model, write_model
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from test_device_merge import refuse_on_both
from torch import nn

import streammerge
from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.adapters.onto_base.deltas import WORK_NUMEL, Delta
from streammerge.adapters.onto_base.norms import rounded_roots
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.engine.accelerator.fused import norms
from streammerge.engine.accelerator.norms import NormBench, NormsOnDevices
from streammerge.engine.factors import NormWork
from streammerge.engine.pieces import torch_dtype
from streammerge.errors import DeviceError, DeviceLostError
from streammerge.plan import device_norms
from streammerge.plan.asking import find_method
from streammerge.plan.device_norms import NormsShape
from streammerge.plan.types import MergePlan
from streammerge.tiles.fusing import Layout

ROWS, COLUMNS = 600, 700


class Drawn:
    """A stored matrix, and what DoRA adds to it."""

    def __init__(
        self, shape: tuple[int, int], dtype: DType, *, rank: int, along_rows: bool, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows, columns = shape
        self.stored = torch.randn(shape, generator=generator).to(torch_dtype(dtype))
        factors = [torch.randn(rank, columns, generator=generator)]
        factors.append(torch.randn(rows, rank, generator=generator))
        factors.append(torch.ones(rows if along_rows else columns))
        entries = tuple(TensorEntry("x", DType.F32, tuple(f.shape), 0, 0) for f in factors)
        self.change = Change(ChangeKind.NORMED, entries, shape, scaling=0.3, along_rows=along_rows)
        self.delta = Delta(self.change, factors)
        product = self.delta.product()
        assert product is not None
        self.work = NormWork(product, dtype, self.read, along_rows=along_rows)

    def read(self, start: int, numel: int, memory: NDArray[np.uint8]) -> None:
        own = self.stored.view(-1)[start : start + numel].view(torch.uint8).numpy()
        memory[:] = own

    def shape(self) -> NormsShape:
        numels = [entry.numel for entry in self.change.factors[:2]]
        rows_numel = max(device_norms._ROWS_NUMEL, self.stored.shape[1])
        return NormsShape(
            1, rows_numel, self.work.dtype.itemsize, sum(numels), max(self.stored.shape)
        )

    def on_cpu(self) -> torch.Tensor:
        def read_rows(begin: int, end: int) -> torch.Tensor:
            return self.stored[begin:end].flatten().to(torch.float32)

        return self.delta.norms(read_rows, torch.empty(WORK_NUMEL))


@pytest.mark.parametrize("along_rows", [True, False])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F16, DType.F64])
@pytest.mark.parametrize("shape", [(411, 77), (3, 5000), (700, 1), (1, 1), (64, 256)], ids=str)
def test_norms_have_the_bits_of_the_cpu(
    shape: tuple[int, int],
    dtype: DType,
    devices: MakeDevices,
    monkeypatch: pytest.MonkeyPatch,
    *,
    along_rows: bool,
) -> None:
    """Whatever is brought at once: here seldom a whole number of kernels' tiles."""
    backend = devices(tile=2**14)["cuda:0"]
    for rows_numel, rank, seed in ((10_000, 1, 1), (1_000, 13, 2)):
        monkeypatch.setattr(device_norms, "_ROWS_NUMEL", rows_numel)
        drawn = Drawn(shape, dtype, rank=rank, along_rows=along_rows, seed=seed)
        bench = NormBench(backend, drawn.shape())

        # Twice, where memory holds what the first left.
        for _ in range(2):
            found = rounded_roots(bench.square(drawn.work), torch.float32)
            assert torch.equal(found, drawn.on_cpu())


def test_the_numbers_of_a_kernel_fit_a_bench() -> None:
    assert Layout(norms._CHANGED, products=1).size <= device_norms.CONSTANTS


def test_a_bench_takes_what_is_stated(devices: MakeDevices) -> None:
    backend = devices()["cuda:0"]
    pinned: list[int] = []
    pin = backend.pin

    def count(nbytes: int) -> Any:
        pinned.append(nbytes)
        return pin(nbytes)

    backend.pin = count  # type: ignore[method-assign]
    drawn = Drawn((2000, 700), DType.BF16, rank=40, along_rows=True)
    shape = drawn.shape()

    NormBench(backend, shape).square(drawn.work)

    assert sum(pinned) == shape.host_bytes
    assert backend.peak == shape.device_bytes
    assert backend.temporary == 0


# -- merges


class Wide(nn.Module):
    """Matrices of several blocks, all changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(COLUMNS, ROWS, bias=False)
        self.second = nn.Linear(COLUMNS, 610, bias=False)
        self.third = nn.Linear(COLUMNS, 3, bias=False)


@pytest.fixture(name="recipe")
def write_recipe(tmp_path: Path) -> dict[str, Any]:
    """Return a recipe that bakes an adapter with magnitudes."""
    return recipe_of_dora(tmp_path)


def recipe_of_dora(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    base = Wide()
    write_model(tmp_path / "base", base.state_dict())
    targets = ["first", "second", "third"]
    config = LoraConfig(r=5, target_modules=targets, init_lora_weights=False, use_dora=True)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    sources = [{"path": str(tmp_path / "adapter")}]
    return {"method": "task_arithmetic", "base": str(tmp_path / "base"), "sources": sources}


@pytest.fixture
def expected(recipe: dict[str, Any], tmp_path: Path) -> Tensors:
    streammerge.merge(recipe, tmp_path / "cpu", memory=MEMORY)
    return load_model(tmp_path / "cpu")


@pytest.fixture
def squared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the devices of benches that have found something, in order."""
    found: list[str] = []
    square = NormBench.square

    def tell(self: NormBench, work: NormWork) -> Any:
        result = square(self, work)
        found.append(self.backend.name)
        return result

    monkeypatch.setattr(NormBench, "square", tell)
    return found


def plan_on(recipe: dict[str, Any], device: str = "cuda:0", **more: Any) -> MergePlan:
    planned = streammerge.plan(recipe, memory=MEMORY, device=device, workers=1, **more)
    assert isinstance(planned, MergePlan)
    return planned


def check(planned: MergePlan, expected: Tensors, out: Path) -> None:
    streammerge.merge(planned, out)
    assert_same_model(load_model(out), expected)


def test_what_a_device_merges_is_normed_there(
    recipe: dict[str, Any],
    expected: Tensors,
    devices: MakeDevices,
    squared: list[str],
    tmp_path: Path,
) -> None:
    """A tensor of at most a block is the CPU's, and so are its norms."""
    devices()

    check(plan_on(recipe), expected, tmp_path / "out")

    assert squared == ["cuda:0"] * 2


def test_several_devices_have_benches(
    recipe: dict[str, Any],
    expected: Tensors,
    devices: MakeDevices,
    squared: list[str],
    tmp_path: Path,
) -> None:
    devices()
    planned = plan_on(recipe, "cuda:0,cuda:1")

    check(planned, expected, tmp_path / "out")

    assert planned.device is not None
    assert planned.device.norm_benches == -(-planned.resources.readers // 2)
    assert len(squared) == 2


def test_without_room_for_a_bench_readers_find_norms_themselves(
    recipe: dict[str, Any],
    expected: Tensors,
    devices: MakeDevices,
    squared: list[str],
    tmp_path: Path,
) -> None:
    devices()
    roomy = plan_on(recipe).device
    assert roomy is not None
    steps = roomy.peak - roomy.norm_benches * 20 * 2**20

    planned = plan_on(recipe, device_memory=steps)

    assert planned.device is not None
    assert (planned.device.norms, planned.device.norm_benches) == (0, 0)
    assert planned.device.peak <= steps
    assert "norms" not in str(planned)
    check(planned, expected, tmp_path / "out")
    assert not squared


def test_a_bench_that_finds_no_memory_is_given_up(
    recipe: dict[str, Any],
    expected: Tensors,
    devices: MakeDevices,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    backend = devices()["cuda:0"]
    planned = plan_on(recipe)
    allocate = FakeBackend.allocate

    def refuse(self: FakeBackend, nbytes: int) -> torch.Tensor:
        # That of a bench; others come in other sizes.
        return allocate(self, 2**41 if nbytes == 20 * 2**20 else nbytes)

    monkeypatch.setattr(FakeBackend, "allocate", refuse)

    check(planned, expected, tmp_path / "out")

    assert planned.device is not None
    assert backend.refusals == backend.trims == min(2, planned.device.norm_benches)


def test_a_device_that_fails_ends_the_merge_and_another_goes_on(
    recipe: dict[str, Any],
    expected: Tensors,
    devices: MakeDevices,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    backend = devices()["cuda:0"]
    planned = plan_on(recipe)
    square = NormBench.square

    def fail(self: NormBench, work: NormWork) -> Any:
        backend.lost_after = 0
        return square(self, work)

    with monkeypatch.context() as patch:
        patch.setattr(NormBench, "square", fail)
        with pytest.raises(DeviceLostError, match=r"cuda:0 failed: .*continue with --resume"):
            streammerge.merge(planned, tmp_path / "out")

    backend.lost_after = None
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY, resume=True)
    assert_same_model(load_model(tmp_path / "out"), expected)


def test_what_is_not_finite_is_refused_as_on_the_cpu(
    recipe: dict[str, Any], devices: MakeDevices, tmp_path: Path
) -> None:
    devices()
    base = Wide().state_dict()
    base["second.weight"][7, 9] = float("inf")
    write_model(tmp_path / "infinite", base)
    recipe["base"] = str(tmp_path / "infinite")

    assert "second.weight" in refuse_on_both(recipe, tmp_path)


def test_what_is_not_finite_and_kept_is_what_the_cpu_makes_of_it(
    recipe: dict[str, Any], devices: MakeDevices, squared: list[str], tmp_path: Path
) -> None:
    devices()
    base = Wide().state_dict()
    base["second.weight"][7, 9] = float("nan")
    write_model(tmp_path / "none", base)
    recipe |= {"base": str(tmp_path / "none"), "non_finite": "keep"}
    for device in ("cpu", "cuda:0"):
        streammerge.merge(plan_on(recipe, device), tmp_path / device.replace(":", ""))

    assert len(squared) == 2
    cpu, there = (load_model(tmp_path / name) for name in ("cpu", "cuda0"))
    assert all(torch.equal(cpu[n].nan_to_num(7), there[n].nan_to_num(7)) for n in cpu)
    assert cpu["second.weight"].isnan().sum() == COLUMNS


def test_readers_beyond_the_benches_do_not_wait(
    recipe: dict[str, Any], devices: MakeDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for while the only bench is at work is the reader's own."""
    backend = devices()["cuda:0"]
    planned = plan_on(recipe)
    drawn = Drawn((ROWS, COLUMNS), DType.F32, rank=5, along_rows=True)
    finder = NormsOnDevices(planned, find_method("task_arithmetic"), [backend], 1)
    task = next(task for task in planned.tasks if task.name == "first.weight")
    square, meanwhile = NormBench.square, []

    def ask(self: NormBench, work: NormWork) -> NDArray[np.float64]:
        meanwhile.append(finder.find(task, drawn.change, drawn.work))
        return square(self, work)

    monkeypatch.setattr(NormBench, "square", ask)
    for _ in range(2):
        found = finder.find(task, drawn.change, drawn.work)
        assert found is not None
        assert torch.equal(found, drawn.on_cpu())
    assert meanwhile == [None, None]


def test_norms_are_tried_before_a_merge(
    recipe: dict[str, Any], devices: MakeDevices, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    devices(proves=True)
    planned = plan_on(recipe)
    square: Callable[[NormBench, NormWork], NDArray[np.float64]] = NormBench.square

    def wrong(self: NormBench, work: NormWork) -> NDArray[np.float64]:
        found = square(self, work)
        found[17] *= 1 + 2**-20
        return found

    monkeypatch.setattr(NormBench, "square", wrong)

    with pytest.raises(DeviceError, match=r"it made .* of norm 17, and the CPU .*--device cpu"):
        streammerge.merge(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
