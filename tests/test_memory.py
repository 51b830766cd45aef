"""The process stays within what the plan states, in a fresh process and in a memory cgroup."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from covering import Parts, choose, parts_of, programs_with
from safetensors.torch import load_file, save_file

from streammerge.methods import discover_methods
from streammerge.methods.base import Locality
from streammerge.methods.describing import localities_of
from streammerge.native.library import SWITCH, load_kernels
from streammerge.units import MIB

CGROUP_V1 = Path("/sys/fs/cgroup/memory")
MAKE_CHECKPOINT = Path(__file__).resolve().parent.parent / "scripts" / "make_checkpoint.py"
STATUS = Path("/proc/self/status")
RUNNER = """
import json, re, sys
import streammerge as sm
from streammerge.errors import MemoryBudgetError
recipe, out, memory, *or_more = sys.argv[1:]
try:
    plan = sm.plan(recipe, memory=memory)
except MemoryBudgetError as error:
    if not or_more:
        raise
    plan = sm.plan(recipe, memory=re.search(r"--memory (\\w+)", str(error))[1])
sm.merge(plan, out)
# VmHWM belongs to this program alone; ru_maxrss would begin with the parent's size.
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps({"planned": plan.memory.peak, "budget": plan.memory.budget, "peak": peak}))
"""

pytestmark = pytest.mark.skipif(
    not STATUS.exists(), reason="the peak of a process is read from /proc"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base and two fine-tunes with one tensor larger than a small budget's buffers."""
    return make_models(tmp_path_factory.mktemp("models"), rows=18_000, sources=2)


@pytest.fixture(scope="module")
def matrices(tmp_path_factory) -> Path:
    """The same with matrices that are decomposed in a second or two, all of them."""
    return make_models(tmp_path_factory.mktemp("matrices"), rows=1_500, sources=2, layers=2)


def make_models(directory: Path, *, rows: int, sources: int, layers: int = 10) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = {
        "embed.weight": torch.randn(rows, 1_000, generator=generator).bfloat16(),
        **{f"layers.{i}.weight": torch.randn(1_000, 600).bfloat16() for i in range(layers)},
    }
    save_file(base, directory / "base.safetensors")
    for index in range(sources):
        tuned = {
            name: (
                tensor.float() + 0.01 * torch.randn(tensor.shape, generator=generator)
            ).bfloat16()
            for name, tensor in base.items()
        }
        save_file(tuned, directory / f"tuned-{index}.safetensors")
    return directory


def write_recipe(
    models: Path, path: Path, method: str, parameters: dict[str, object], sources: int = 2
) -> Path:
    most = discover_methods()[method].sources[1]
    count = sources if most is None else min(most, sources)
    document = {
        "method": method,
        "base": str(models / "base.safetensors"),
        "sources": [{"path": str(models / f"tuned-{index}.safetensors")} for index in range(count)],
        "parameters": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in parameters.items()
        },
    }
    path.write_text(yaml.safe_dump(document))
    return path


def run_merge(
    recipe: Path,
    out: Path,
    memory: str,
    preexec=None,
    *,
    kernels: bool = True,
    or_more: bool = False,
) -> dict[str, int]:
    """Merge in a fresh process and return what it planned and took, in bytes.

    Args:
        recipe: The recipe.
        out: Where the result goes.
        memory: The budget.
        preexec: What the process calls first.
        kernels: Whether it may use compiled kernels.
        or_more: Whether to take the budget that a refusal names, where there is one. The same process
            does so: to start one takes longer than to merge.
    """
    finished = subprocess.run(
        [sys.executable, "-c", RUNNER, str(recipe), str(out), memory, *["or more"] * or_more],
        env=os.environ | ({} if kernels else {SWITCH: "0"}),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=preexec,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def parts_and_registers(case: tuple[str, dict[str, Any]]) -> Parts:
    """Return what a method is made of, and what decides how much the plain way takes."""
    name, example = case
    programs = programs_with(name, example, has_base=True)
    counts = (
        max(program.registers for program in programs.all),
        programs.ranked,
        programs.row_counts,
    )
    return parts_of(name, example, has_base=True) | {counts}


CASES = [
    pytest.param(name, example, kernels, id=f"{name}-{'compiled' if kernels else 'plain'}")
    # How much a program takes is a matter of its parts, and which method it is of none.
    for number, kernels in ((0, True), (-1, False))
    for name, example in choose(
        [(method.name, method.examples[number]) for method in discover_methods().values()],
        parts_and_registers,
        lambda _: "",
    )
]


def sees_whole_tensors(method: str) -> bool:
    return Locality.TENSOR in localities_of(discover_methods()[method])


@pytest.mark.parametrize(("method", "example", "kernels"), CASES)
def test_measured_peak_stays_within_the_plan(request, tmp_path, method, example, kernels):
    """With a small budget; with the smallest that will do, where that is larger."""
    models = request.getfixturevalue("matrices" if sees_whole_tensors(method) else "models")
    recipe = write_recipe(models, tmp_path / "recipe.yaml", method, example)

    # Torch alone takes 185 MiB.
    memory = "230MiB" if kernels and load_kernels() is not None else "420MiB"
    measured = run_merge(recipe, tmp_path / "out", memory, kernels=kernels, or_more=True)

    assert measured["planned"] <= measured["budget"]
    assert measured["peak"] <= measured["planned"]


def _write(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return directory


def _codes(directory: Path) -> tuple[Path, Path]:
    shape = (9_000, 2_000)
    scales = torch.rand(71, 16)
    codes = torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    base = _write(directory / "base", {"x.weight": codes, "x.weight_scale_inv": scales})
    return base, _write(directory / "tuned", {"x.weight": torch.randn(shape).bfloat16()})


def _transposed_codes(directory: Path) -> tuple[Path, Path]:
    blocks = torch.randint(0, 256, (8, 1_200, 60, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (8, 1_200, 60), dtype=torch.uint8)
    base = _write(directory / "base", {"x_blocks": blocks, "x_scales": scales})
    return base, _write(directory / "tuned", {"x": torch.randn(8, 1_920, 1_200).bfloat16()})


def _stacks(directory: Path) -> tuple[Path, Path]:
    ones = {
        f"l.experts.{expert}.{part}.weight": torch.randn(shape).bfloat16()
        for expert in range(32)
        for part, shape in {
            "gate_proj": (256, 512),
            "up_proj": (256, 512),
            "down_proj": (512, 256),
        }.items()
    }
    stacks = {"l.experts.gate_up_proj": torch.randn(32, 512, 512).bfloat16()}
    stacks["l.experts.down_proj"] = torch.randn(32, 512, 256).bfloat16()
    return _write(directory / "base", stacks), _write(directory / "tuned", ones)


def _wider(directory: Path) -> tuple[Path, Path]:
    base = _write(directory / "base", {"x": torch.randn(3_000, 4_000).bfloat16()})
    return base, _write(directory / "tuned", {"x": torch.randn(3_000, 3_500).bfloat16()})


@pytest.mark.parametrize("kernels", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("make", [_codes, _transposed_codes, _stacks, _wider])
def test_tensors_in_parts_stay_within_the_plan(make, kernels, tmp_path):
    base, tuned = make(tmp_path)
    document = {
        "method": "ties",
        "base": str(base),
        "sources": [{"path": str(tuned)}],
        "parameters": {"density": 0.3},
        "mismatch": "common",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))

    memory = "256MiB" if kernels and load_kernels() is not None else "460MiB"
    measured = run_merge(recipe, tmp_path / "out", memory, kernels=kernels)

    assert measured["peak"] <= measured["planned"] <= measured["budget"]


@pytest.fixture
def limited_group() -> Iterator[Callable[[int], Callable[[], None]]]:
    """Give a function that sets a memory limit and returns what a child calls to come under it."""
    if not os.access(CGROUP_V1, os.W_OK) or not (CGROUP_V1 / "memory.limit_in_bytes").exists():
        pytest.skip("no right to make memory cgroups (v1) here")
    group = CGROUP_V1 / f"streammerge-{uuid.uuid4().hex}"
    group.mkdir()

    def limit(nbytes: int) -> Callable[[], None]:
        (group / "memory.limit_in_bytes").write_text(str(nbytes))
        return lambda: (group / "cgroup.procs").write_text(str(os.getpid()))

    yield limit
    group.rmdir()


@pytest.mark.cgroup
@pytest.mark.parametrize(("kernels", "mib"), [(True, 210), (False, 400)])
def test_a_merge_runs_in_a_cgroup_as_small_as_its_budget(
    models, tmp_path, limited_group, kernels, mib
):
    if kernels and load_kernels() is None:
        pytest.skip("no compiler was found at installation")
    recipe = write_recipe(models, tmp_path / "recipe.yaml", "ties", {"density": 0.2})

    limit = limited_group(mib * MIB)
    measured = run_merge(recipe, tmp_path / "small", f"{mib}MiB", limit, kernels=kernels)
    run_merge(recipe, tmp_path / "large", "4GiB")

    assert measured["peak"] <= mib * MIB
    small, large = (next((tmp_path / name).glob("*.safetensors")) for name in ("small", "large"))
    assert filecmp.cmp(small, large, shallow=False)


@pytest.mark.slow
@pytest.mark.cgroup
@pytest.mark.parametrize("method", [m for m in discover_methods() if not sees_whole_tensors(m)])
def test_sixteen_sources_merge_in_a_cgroup_of_400_mib(method, sixteen, tmp_path, limited_group):
    example = next(
        each
        for each in discover_methods()[method].examples
        if not any(isinstance(value, tuple) for value in each.values())
    )
    recipe = write_recipe(sixteen, tmp_path / "recipe.yaml", method, example, sources=16)

    measured = run_merge(recipe, tmp_path / "out", "400MiB", preexec=limited_group(400 * MIB))

    assert measured["peak"] <= measured["planned"] <= 400 * MIB


@pytest.mark.cgroup
def test_layers_of_three_models_merge_in_a_cgroup_of_400_mib(models, tmp_path, limited_group):
    paths = [models / name for name in ("base", "tuned-0", "tuned-1")]
    spans = [(0, 0, 8), (1, 2, 10), (2, 0, 10), (0, 4, 9)]
    document = {
        "method": "passthrough",
        "sources": [{"path": f"{path}.safetensors"} for path in paths],
        "layers": [{"sources": [{"source": i, "layers": [a, b]}]} for i, a, b in spans],
        "parameters": {"scale": {"gradient": [1, 0.5]}},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))

    measured = run_merge(recipe, tmp_path / "small", "400MiB", preexec=limited_group(400 * MIB))
    run_merge(recipe, tmp_path / "large", "4GiB")

    assert measured["peak"] <= measured["planned"] <= 400 * MIB
    small, large = (next((tmp_path / name).glob("*.safetensors")) for name in ("small", "large"))
    assert filecmp.cmp(small, large, shallow=False)


@pytest.mark.cgroup
def test_a_union_of_256_000_rows_is_merged_in_a_cgroup_of_512_mib(tmp_path, limited_group):
    rows, own = 256_000, 20_000
    for index, name in enumerate(("base", "one", "other")):
        words = [f"token{number:06}" for number in range(rows - own)]
        words += [f"own{index}x{number:05}" for number in range(own)]
        # In another order in each.
        vocabulary = {word: (number + index * 999) % rows for number, word in enumerate(words)}
        special = {"id": index * 999, "content": words[0], "special": True}
        tokenizer = {"added_tokens": [special], "model": {"type": "WordLevel", "vocab": vocabulary}}
        tensors = {
            "model.embed_tokens.weight": torch.randn(rows, 64).bfloat16(),
            "lm_head.weight": torch.randn(rows, 64).bfloat16(),
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": rows}))
    document = {
        "method": "ties",
        "base": str(tmp_path / "base"),
        "sources": [{"path": str(tmp_path / name)} for name in ("one", "other")],
        "parameters": {"density": 0.3},
        "vocabulary": "union",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))

    measured = run_merge(recipe, tmp_path / "out", "512MiB", preexec=limited_group(512 * MIB))

    assert measured["peak"] <= measured["planned"] <= 512 * MIB
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {len(tensor) for tensor in merged.values()} == {rows + 2 * own}


@pytest.mark.cgroup
def test_a_grid_of_nine_outputs_is_merged_in_a_cgroup_of_512_mib(models, tmp_path, limited_group):
    recipe = write_recipe(models, tmp_path / "recipe.yaml", "ties", {"density": 0.5, "lambda": 1.5})
    grid = yaml.safe_load(recipe.read_text())
    grid["grid"] = {"parameters.density": [0.2, 0.5, 0.8], "parameters.lambda": [0.5, 1.0, 1.5]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = [sys.executable, "-m", "streammerge", "merge", tmp_path / "grid.yaml"]

    done = subprocess.run(
        [*command, tmp_path / "made", "--memory", "512MiB", "--json"],
        preexec_fn=limited_group(512 * MIB),
        capture_output=True,
        text=True,
        check=True,
    )
    run_merge(recipe, tmp_path / "alone", "4GiB")

    events = [each for each in map(json.loads, done.stdout.splitlines()) if each["event"] == "done"]
    assert len(events) == 9
    assert max(each["measured_memory"] for each in events) <= 512 * MIB
    one, alone = (
        next((tmp_path / name).glob("*.safetensors"))
        for name in ("made/density=0.5,lambda=1.5", "alone")
    )
    assert filecmp.cmp(one, alone, shallow=False)


@pytest.mark.cgroup
def test_a_result_that_is_computed_while_it_is_read_fits_a_cgroup(models, tmp_path, limited_group):
    base, one, two = (f"{models / name}.safetensors" for name in ("base", "tuned-0", "tuned-1"))
    documents = [
        {"name": "mean", "method": "linear", "sources": [{"path": one}, {"path": two}]},
        {
            "name": "more",
            "method": "task_arithmetic",
            "base": base,
            "sources": [{"path": "mean"}],
            "parameters": {"lambda": 0.5},
        },
        {
            "method": "ties",
            "base": base,
            "sources": [{"path": "more"}, {"path": one}],
            "parameters": {"density": 0.3},
        },
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump_all(documents))
    command = [sys.executable, "-m", "streammerge", "merge", recipe]

    done = subprocess.run(
        [*command, tmp_path / "small", "--memory", "300MiB", "--json"],
        preexec_fn=limited_group(300 * MIB),
        capture_output=True,
        text=True,
        check=True,
    )
    subprocess.run([*command, tmp_path / "large", "--memory", "4GiB"], check=True)

    (event,) = [e for e in map(json.loads, done.stdout.splitlines()) if e["event"] == "done"]
    assert event["measured_memory"] <= event["projected_memory"] <= 300 * MIB
    manifest = json.loads((tmp_path / "small" / "streammerge_manifest.json").read_text())
    assert [note["topic"] for note in manifest["notes"]].count("fused") == 2
    small, large = (next((tmp_path / name).glob("*.safetensors")) for name in ("small", "large"))
    assert filecmp.cmp(small, large, shallow=False)


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory) -> Path:
    """A base and sixteen fine-tunes with one giant tensor."""
    return make_models(tmp_path_factory.mktemp("sixteen"), rows=18_000, sources=16)


@pytest.mark.slow
@pytest.mark.cgroup
def test_three_models_of_two_gigabytes_merge_in_a_cgroup_of_768_mib(tmp_path, limited_group):
    subprocess.run(
        [sys.executable, MAKE_CHECKPOINT, tmp_path, "--size", "1.1B", "--finetunes", "2"],
        check=True,
        capture_output=True,
    )
    sources = [{"path": str(tmp_path / f"tuned-{index}")} for index in range(2)]
    document = {"method": "ties", "base": str(tmp_path / "base"), "sources": sources}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**document, "parameters": {"density": 0.2}}))

    measured = run_merge(recipe, tmp_path / "small", "768MiB", preexec=limited_group(768 * MIB))
    run_merge(recipe, tmp_path / "large", "6GiB")

    assert measured["peak"] <= measured["planned"] <= 768 * MIB
    small, large = (next((tmp_path / name).glob("*.safetensors")) for name in ("small", "large"))
    assert filecmp.cmp(small, large, shallow=False)
