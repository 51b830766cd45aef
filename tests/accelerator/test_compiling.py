"""The kernels of every method compile for a device, without one, and round once per operation."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_backend import MakeDevices
from models import Models
from test_device_merge import EXAMPLES, draw, plan_on, recipe_for

from streammerge.dtypes import DType
from streammerge.engine.accelerator.fused.writing import Kind
from streammerge.plan.asking import find_method
from streammerge.plan.devices import runs_on_device
from streammerge.plan.sweeps import programs_of_plan

COMPILE = """
import json, pickle, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from streammerge.dtypes import DType
from streammerge.engine.accelerator.fused.kernels import kernel_of
from streammerge.engine.accelerator.fused import functions
from streammerge.engine.accelerator.fused.running import count_warps

OTHERS = {"TILE": "constexpr", "constants": "*i64", "lasts": "*i64", "counts": "*i64", "notes": "*i32",
          "computed": "*fp32", "row_numbers": "*fp64"}

def type_of(name, kind):
    if name.startswith(("up", "down", "vector")):
        return "*fp32"
    if name.startswith("model") or (name == "out" and kind.out is not None):
        return "*i16"
    return "*fp32" if name == "out" else OTHERS.get(name, "i32")

def instructions_of(kind):
    kernel = kernel_of(kind)
    types = {name: type_of(name, kind) for name in kernel.arg_names}
    return compiled(kernel, types, {"TILE": 2048}, count_warps(kind.program))

def compiled(kernel, types, numbers, warps):
    options = {"enable_fp_fusion": False, "num_warps": warps}
    source = ASTSource(kernel, types, numbers)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return sorted(set(re.findall(r"^\\t*(?:@%p\\d+ )?([a-z][\\w.:]*)", text, re.M)))

def adding(name, warps=1, **numbers):
    # What is done with rows and columns, for which nothing is generated.
    types = {"rows": "i32", "columns": "i32", "values": "*fp32", "totals": "*fp64", "a": "*fp32", "b": "*fp32",
             "ranks": "*fp32"}
    kernel = getattr(functions, name)
    types |= dict.fromkeys(numbers, "constexpr")
    return compiled(kernel, {each: types.get(each, "i32") for each in kernel.arg_names}, numbers, warps)

found = [instructions_of(kind) for kind in pickle.load(sys.stdin.buffer)]
found.append(adding("add_square_columns", TILE=64, UNROLL=16))
found.append(adding("add_up", SQUARES=True, UNROLL=32))
found.append(adding("rank_rows", 8, WIDE=4096))
json.dump(found, sys.stdout)
"""


def kinds_of(method: str, parameters: dict[str, object], paths: list[Path]) -> list[Kind]:
    """Return the kernels of a method's example on models in bfloat16."""
    plan = plan_on(recipe_for(method, paths, parameters), workers=1)
    programs = programs_of_plan(plan, find_method(method))
    if not any(runs_on_device(task, programs, plan.settings, fused=True) for task in plan.tasks):
        return []
    bf16 = DType.BF16
    return [
        Kind(
            program,
            bf16 if one.has_base else None,
            (bf16,) * one.sources,
            DType.F32,
            bf16 if program is one.merge else None,
            models=one.sources + one.has_base,
            has_base=one.has_base,
            counts=program is one.merge,
        )
        for one in programs
        for program in one.all
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
def test_the_kernels_of_every_method_compile_for_a_device(
    devices: MakeDevices, models: Models, tmp_path: Path
) -> None:
    devices()
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    found = [kinds_of(method, parameters, paths) for method, _, parameters in EXAMPLES]
    kinds = list(dict.fromkeys(kind for some in found for kind in some))
    assert len(kinds) > 50
    from streammerge.engine.accelerator.fused.norms import changing_kind

    kinds.append(changing_kind(DType.BF16))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], input=pickle.dumps(kinds), env=environment,
        capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:].decode()

    compiled = [*kinds, "sums of columns", "sums of rows", "ranks"]
    for kind, instructions in zip(compiled, json.loads(run.stdout), strict=True):
        words = {word for each in instructions for word in each.split(".")}
        assert not words & {"fma", "ftz", "approx", "full"}, kind
