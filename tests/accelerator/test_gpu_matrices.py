"""Whole matrices on a real device; ``python -m pytest -m gpu`` runs these with the other tests of one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Models, recipe_of
from test_device_matrices import LARGEST_ERROR, METHODS, draw, error_of, plan_on

import streammerge
from streammerge.engine.accelerator.cuda import CudaBackend, full_products
from streammerge.engine.accelerator.matrices import MatrixBench, MatrixWork
from streammerge.engine.accelerator.opening import count_devices
from streammerge.plan import device_matrices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_devices() == 0, reason="torch finds no CUDA device here"),
]
SHAPES: dict[str, tuple[int, ...]] = {"square": (1024, 1024), "oblong": (640, 4096)}


def paths_of(models: Models, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Path]:
    return [models.write(each) for each in draw(shapes)]


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_the_error_is_a_few_units_of_float64(
    method: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very bound that the CPU is held to, of results that are known without rounding."""
    monkeypatch.setattr(device_matrices, "LEAST_SIDE", 256)

    assert error_of(method, "cuda:0", models) < LARGEST_ERROR


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_two_runs_have_the_same_bits_and_nearly_those_of_the_cpu(
    method: str, parameters: dict[str, Any], models: Models
) -> None:
    paths = paths_of(models)
    recipe = recipe_of(method, paths[0], paths[1:], parameters=parameters, compute_dtype="float64")
    expected, _ = models.merge(recipe, device="cpu")
    first, _ = models.merge(recipe, device="cuda:0", workers=1)
    again, _ = models.merge(recipe, device="cuda:0", workers=3)

    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        # Stored in float32: at most a rounding apart.
        torch.testing.assert_close(tensor, expected[name], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(("method", "parameters"), METHODS)
@pytest.mark.parametrize("shape", [(2048, 2048), (2048, 4000), (1024, 8192)], ids=str)
def test_a_decomposition_takes_no_more_than_was_stated(
    shape: tuple[int, int], method: str, parameters: dict[str, Any], models: Models
) -> None:
    """What cuSOLVER takes is known from no formula but this estimate."""
    paths = paths_of(models, {"w": shape, "v": (520, 530)})
    plan = plan_on(recipe_of(method, paths[0], paths[1:], parameters=parameters))
    torch.cuda.empty_cache()
    _, manifest = models.merge(plan)

    assert 0 < manifest.run.measured_device_memory <= manifest.run.projected_device_memory


def test_a_matrix_comes_back_as_it_went_there() -> None:
    """Through page-locked stages of several sizes, and with the device's memory given back after it."""
    backend = CudaBackend(0)
    bench = MatrixBench(backend, threading.Lock(), "go on")
    for nbytes in (1, device_matrices.STAGE_BYTES, 5 * device_matrices.STAGE_BYTES + 3):
        given = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
        made = np.zeros_like(given)
        bench.run(MatrixWork("w", 2 * nbytes, [given], [made], _copy))
        np.testing.assert_array_equal(made, given)
    assert torch.cuda.memory_allocated(0) < device_matrices.LIBRARIES_BYTES


def _copy(there: Any, back: Any) -> None:
    back[0].copy_(there[0])


@pytest.mark.parametrize("exact", [False, True])
def test_an_extraction_is_nearly_that_of_the_cpu_and_the_same_twice(
    models: Models, tmp_path: Path, *, exact: bool
) -> None:
    base, tuned, _ = paths_of(models, {"a.weight": (1024, 2048), "b.weight": (4096, 640)})
    options: dict[str, Any] = {"rank": 16, "exact": exact}
    on_cpu = streammerge.extract(base, tuned, tmp_path / "cpu", **options)
    torch.cuda.empty_cache()
    first = streammerge.extract(base, tuned, tmp_path / "first", device="cuda:0", **options)
    streammerge.extract(base, tuned, tmp_path / "again", device="cuda:0", workers=1, **options)

    files = [tmp_path / name / "adapter_model.safetensors" for name in ("first", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for name, record in on_cpu.tensors.items():
        for expected, found in zip(record.numbers, first.tensors[name].numbers, strict=True):
            # What is missing of each norm: with TF32 it would be off in the fourth digit.
            assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < first.run.measured_device_memory <= first.run.projected_device_memory


def test_products_in_float32_are_not_rounded_further() -> None:
    """With TF32 the error would be a thousand times larger."""
    generator = torch.Generator().manual_seed(3)
    one = torch.randn(1024, 1024, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_products():
            found = (one.cuda() @ one.cuda()).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    exact = one.double() @ one.double()

    assert float((found - exact).norm() / exact.norm()) < 2e-6
