"""The real CUDA path; ``python -m pytest -m gpu`` runs these alone.

Everything that the other tests here claim of a fake device is claimed of a real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    BLOCK,
    MEMORY,
    Models,
    assert_same_bits,
    assert_same_model,
    load_model,
    recipe_of,
    recut,
)
from test_device_merge import (
    CASES,
    adds_up,
    check_close,
    check_equal,
    draw,
    in_steps,
    plan_on,
    recipe_for,
)
from test_device_norms import recipe_of_dora
from test_device_products import CASES as PRODUCTS
from test_device_products import recipe_of_parts, write_case
from test_device_rows import METHODS as ROWS
from test_device_rows import recipe_for as recipe_for_rows
from test_kernels import divide

import streammerge
from streammerge.engine.accelerator.cuda import CudaBackend
from streammerge.engine.accelerator.opening import count_devices
from streammerge.errors import DeviceError, MemoryBudgetError, NonFiniteError
from streammerge.rng import keep_mask, stream_key
from streammerge.statistics.topk import TopK
from streammerge.statistics.trimming import trim_, trim_unseen_
from streammerge.tiles.masks import draw_keep_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_devices() == 0, reason="torch finds no CUDA device here"),
]


@pytest.mark.parametrize(("method", "parameters", "dtype"), CASES)
def test_every_method_has_the_bytes_of_the_cpu(
    method: str, parameters: dict[str, Any], dtype: torch.dtype, models: Models
) -> None:
    paths = [models.write(each) for each in draw(dtype)]
    document = {"compute_dtype": "float64"} if dtype == torch.float64 else {}
    recipe = recipe_for(method, paths, parameters, **document)
    expected, manifest = models.merge(recipe, device="cpu", workers=1)
    plan = plan_on(recipe)
    inputs = len(plan.models)
    tight = in_steps(recut(plan, slots=inputs, workers=1, statistics_bytes=1), 1)
    assert tight.device is not None
    if not tight.device.fused and adds_up(plan):
        on_the_cpu = expected
        expected, manifest = models.merge(plan)
        check_close(expected, on_the_cpu)
    for each in (plan, tight, in_steps(recut(plan, slots=4 * inputs, slot_blocks=3), 2)):
        found, again = models.merge(each)

        assert_same_model(found, expected)
        assert again.tensors == manifest.tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chosen", ROWS, ids=str)
def test_rows_have_the_bytes_of_the_cpu(
    chosen: tuple[str, dict[str, Any]], dtype: torch.dtype, models: Models
) -> None:
    recipe = recipe_for_rows(models, chosen, dtype)
    expected = models.merge(recipe, device="cpu", workers=1)
    plan = plan_on(recipe)
    small = in_steps(recut(plan, slots=len(plan.models), workers=1, slot_blocks=1), 1)

    check_equal(models.merge(plan), expected)
    check_equal(models.merge(small), expected)


@pytest.mark.parametrize("case", [*PRODUCTS, "rows of a fused layer"])
def test_products_have_the_bytes_of_the_cpu(case: str, models: Models, tmp_path: Path) -> None:
    if case in PRODUCTS:
        recipe = write_case(case, tmp_path, "task_arithmetic", torch.bfloat16)
    else:
        recipe = recipe_of_parts("qv", "ties", tmp_path)

    check_equal(models.merge(plan_on(recipe)), models.merge(recipe, device="cpu"))


def test_what_dora_makes_has_the_bytes_of_the_cpu(models: Models, tmp_path: Path) -> None:
    recipe = recipe_of_dora(tmp_path)
    expected = models.merge(recipe, device="cpu")
    plan = plan_on(recipe)
    assert plan.device is not None
    assert plan.device.norms == 2 * plan.device.fused

    check_equal(models.merge(plan), expected)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_other_output_types_are_rounded_alike(dtype: str, models: Models) -> None:
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("ties", paths, {"density": 0.3}, output={"dtype": dtype})
    expected, _ = models.merge(recipe, device="cpu")

    assert_same_model(models.merge(recipe, device="cuda:0")[0], expected)


def test_many_sources_are_added_in_the_order_of_the_cpu(models: Models) -> None:
    paths = [models.write({"w": each["smooth"]}) for each in draw(torch.float32, sources=7)]
    recipe = recipe_for("task_arithmetic", paths, {"weight": 1 / 7})
    expected, _ = models.merge(recipe, device="cpu")
    plan = plan_on(recipe)

    assert_same_model(models.merge(plan)[0], expected)
    for blocks in (1, 2):
        again, _ = models.merge(in_steps(recut(plan, slots=16, slot_blocks=blocks), blocks))
        assert_same_model(again, expected)


def test_a_value_that_is_not_finite_is_named(models: Models) -> None:
    drawn = draw(torch.float32)
    drawn[1]["smooth"][3 * BLOCK + 5] = float("nan")
    paths = [models.write(each) for each in drawn]

    with pytest.raises(NonFiniteError, match=r"smooth: sources\[0\].* holds nan at element"):
        models.merge(recipe_for("ties", paths, {"density": 0.3}), device="cuda:0")


def test_every_device_there_is_takes_part(models: Models) -> None:
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    recipe = recipe_for("ties", paths, {"density": 0.2})
    expected, _ = models.merge(recipe, device="cpu")
    every = ",".join(f"cuda:{index}" for index in range(count_devices()))

    assert_same_model(models.merge(plan_on(recipe, every, workers=4))[0], expected)


def test_the_device_gives_no_more_than_was_stated(models: Models) -> None:
    shapes = {"w": torch.randn(40 * BLOCK)}
    paths = [models.write({"w": shapes["w"] + n}) for n in range(3)]
    for method in ("ties", "dare_ties"):
        recipe = recipe_of(method, paths[0], paths[1:], parameters={"density": 0.2})
        plan = recut(plan_on(recipe), slots=64, slot_blocks=8)
        torch.cuda.empty_cache()
        _, manifest = models.merge(plan)

        assert 0 < manifest.run.measured_device_memory <= manifest.run.projected_device_memory


def test_memory_that_others_hold_is_met_with_the_budget_error(models: Models) -> None:
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("ties", paths, {"density": 0.2})
    plan = plan_on(recipe)
    torch.cuda.set_per_process_memory_fraction(1e-6, 0)
    try:
        with pytest.raises(MemoryBudgetError, match="ran out of memory twice"):
            models.merge(plan)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_a_merge_on_a_device_is_resumed_on_the_cpu(models: Models, tmp_path: Path) -> None:
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    recipe = recipe_for("ties", paths, {"density": 0.2})
    expected, _ = models.merge(recipe, device="cpu")
    seen = iter(range(10**6))

    def interrupt(_: object) -> None:
        if next(seen) == 1:
            raise KeyboardInterrupt

    out = tmp_path / "resumed"
    try:
        streammerge.merge(recipe, out, memory=MEMORY, device="cuda:0", on_progress=interrupt)
    except KeyboardInterrupt:
        streammerge.merge(recipe, out, memory=MEMORY, device="cpu", resume=True)
    assert_same_model(load_model(out), expected)


def test_a_device_beyond_the_last_is_refused() -> None:
    with pytest.raises(DeviceError, match=f"there is no cuda:{count_devices()}"):
        streammerge.plan({}, device=f"cuda:{count_devices()}")


def test_kernels_equal_those_of_the_cpu() -> None:
    device = torch.device("cuda:0")
    key = stream_key(2**64 - 1, 3, "model.weight")
    mask = draw_keep_mask(key, 16 * 7, 2**21 + 5, 0.3, device=device)
    np.testing.assert_array_equal(mask.cpu().numpy(), keep_mask(key, 16 * 7, 2**21 + 5, 0.3))
    row = torch.randint(-3, 4, (BLOCK,)) / 4
    top = TopK(0.5, BLOCK, 10, 1000, 700, 1, 100)
    assert_same_bits(trim_unseen_(row.to(device), top, 1).cpu(), trim_(row.clone(), top, 1))
    smooth = torch.randn(BLOCK)
    assert_same_bits(divide(smooth.to(device), 0.3).cpu(), divide(smooth, 0.3))


def test_a_copy_from_page_locked_memory_does_not_wait_for_the_device() -> None:
    backend = CudaBackend(0)
    stream, event = backend.make_stream(), backend.make_event()
    pinned = torch.from_numpy(backend.pin(2**24))
    target = backend.allocate(2**24)
    assert pinned.is_pinned()
    stream.run(lambda: torch.cuda._sleep(10**9))
    stream.copy(target, pinned)
    stream.record(event)

    # Half a second of sleep is still before the copy.
    assert not event.event.query()
    event.synchronize()
    assert torch.equal(target.cpu(), pinned)
