"""The compiled machine gives the bits of the interpreter, whatever the program."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs_at_random import (
    Case,
    ModelsInMemory,
    Ran,
    Trim,
    cases,
    draw_values,
    interpret,
    random_numbers,
    run_by_machine,
)

from streammerge.native import machine
from streammerge.native.library import Kernels, load_kernels
from streammerge.native.machine import ALL_TIES, EncodedProgram
from streammerge.rng import stream_key
from streammerge.tiles.compiling import compile_result, compile_sinks
from streammerge.tiles.functions import (
    exponential,
    exponential_less_one,
    logarithm,
    logarithm_of_one_more,
)
from streammerge.tiles.program import Op, Program, Step, Vote
from streammerge.tiles.writing import (
    Row,
    Sheet,
    keep_largest,
    keep_random,
    majority_mean,
    ranked,
    total,
    weighted_sum,
)
from streammerge.tiles.writing import exponential as exponential_of
from streammerge.tiles.writing import exponential_less_one as exponential_less_one_of
from streammerge.tiles.writing import logarithm as logarithm_of
from streammerge.tiles.writing import logarithm_of_one_more as logarithm_of_one_more_of

MAYBE_KERNELS = load_kernels()
pytestmark = pytest.mark.skipif(
    MAYBE_KERNELS is None, reason="no compiler was found at installation"
)
BLOCK = 65_536


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    assert MAYBE_KERNELS is not None
    return MAYBE_KERNELS


def assert_same(found: Ran, expected: Ran, out: torch.dtype) -> None:
    """Compare all that a job leaves behind; what is no number equals what is none."""
    assert found.kept == expected.kept
    assert found.refused == expected.refused
    if expected.outcome.result is not None and not expected.refused:
        assert found.outcome.result is not None
        stored = expected.outcome.result.to(out)
        np.testing.assert_array_equal(bits_of(found.outcome.result), bits_of(stored))
    assert_same_bits(found.outcome.totals, expected.outcome.totals)
    assert len(found.ranked) == len(expected.ranked)
    for mine, plain in zip(found.ranked, expected.ranked, strict=True):
        assert_same_bits(mine, plain)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    is_number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found[is_number]), np.signbit(expected[is_number]))


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


@settings(deadline=None, max_examples=600)
@given(case=cases())
def test_any_program_gives_the_bits_of_the_interpreter(case: Case, kernels: Kernels) -> None:
    found = run_by_machine(kernels, case)

    for index, mine in enumerate(found):
        assert_same(mine, interpret(case, index), case.out)


INSTRUCTION_SETS = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "fma", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
"""Every one that the kernels are compiled for, and what it takes."""


@pytest.mark.slow
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_every_instruction_set_gives_the_same_bits(instructions: str, tmp_path: Path) -> None:
    """Above all those that could round a product and a sum at once."""
    compiler, flags = shutil.which("gcc"), Path("/proc/cpuinfo")
    if compiler is None or not flags.exists():
        pytest.skip("gcc and a processor that says what it can do are needed")
    if not INSTRUCTION_SETS[instructions] <= set(flags.read_text().split()):
        pytest.skip(f"this processor is no {instructions}")
    native = Path(machine.__file__).parent
    project = tomllib.loads((native.parents[1] / "pyproject.toml").read_text())
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    library = tmp_path / "kernels.so"
    subprocess.run(
        [
            compiler,
            *extension["extra-compile-args"],
            "-fwrapv",
            f"-march={instructions}",
            "-DFOR_ONE_CPU",
            "-fPIC",
            "-shared",
            "-o",
            library,
            *(native.parents[1] / source for source in extension["sources"]),
        ],
        check=True,
    )
    kernels = Kernels(library)

    @settings(deadline=None, max_examples=1000, database=None)
    @given(case=cases())
    def compare(case: Case) -> None:
        for index, mine in enumerate(run_by_machine(kernels, case)):
            assert_same(mine, interpret(case, index), case.out)

    compare()


def models_of(
    sources: int, numel: int, dtype: torch.dtype, trims: list[Trim] | None = None
) -> ModelsInMemory:
    generator = torch.Generator().manual_seed(sources)
    base, *tuned = (draw_values(numel, dtype, generator, huge=False) for _ in range(sources + 1))
    keys = [stream_key(1, source, "w") for source in range(sources)]
    return ModelsInMemory(base, tuned, [], trims or [], keys, BLOCK)


def case_of(program: Program, models: ModelsInMemory, *, has_base: bool = True) -> Case:
    numel = models.base_values.numel()
    none = np.zeros((1, 1))
    return Case(program, has_base, [models], [], [none], [numel], models.base_values.dtype)


def check(kernels: Kernels, case: Case) -> Ran:
    (found,) = run_by_machine(kernels, case)
    assert_same(found, interpret(case, 0), case.out)
    assert not found.refused
    return found


SOURCES = (1, 2, 3, 4, 5, 8, 16, 64)


def weights_of(sources: int) -> list[float]:
    return [(1.0, -0.7, 0.3)[index % 3] for index in range(sources)]


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vote", Vote)
def test_ties_of_any_number_of_sources(
    vote: Vote, dtype: torch.dtype, sources: int, kernels: Kernels
) -> None:
    sheet = Sheet(sources, has_base=True)
    vectors = [keep_largest(each, index) for index, each in enumerate(sheet.task_vectors)]
    mean = majority_mean(vectors, vote=vote, factors=weights_of(sources), shares=[1.0] * sources)
    program = compile_result(sheet.base + mean)
    trims = [Trim(1.0, (0, 40, ALL_TIES)[index % 3], everything=False) for index in range(sources)]

    check(kernels, case_of(program, models_of(sources, 3001, dtype, trims)))


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("has_base", [True, False])
def test_sums_of_any_number_of_sources(*, has_base: bool, sources: int, kernels: Kernels) -> None:
    sheet = Sheet(sources, has_base)
    merged = weighted_sum(sheet.vectors, weights_of(sources))
    program = compile_result(sheet.base + merged if has_base else merged / 2.0)

    models = models_of(sources, 3001, torch.bfloat16)
    check(kernels, case_of(program, models, has_base=has_base))


@pytest.mark.parametrize("elects", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.3, 1e-7, 1.0])
def test_sources_dropped_at_random(*, density: float, elects: bool, kernels: Kernels) -> None:
    sheet = Sheet(3, has_base=True)
    vectors: list[Row] = [
        keep_random(each, index, density) / (density or 1.0)
        for index, each in enumerate(sheet.task_vectors)
    ]
    weights = weights_of(3)
    mean = majority_mean(vectors, vote=Vote.TOTAL, factors=weights, shares=weights)
    program = compile_result(sheet.base + (mean if elects else weighted_sum(vectors, weights)))

    check(kernels, case_of(program, models_of(3, 2 * BLOCK, torch.float32)))


def test_one_number_decides_about_the_second_stream(kernels: Kernels) -> None:
    """A row of probabilities, one by one around what an element's number is."""
    sheet = Sheet(1, has_base=False)
    program = compile_result(keep_random(sheet.values[0], 0, sheet.computed(0)))
    models = models_of(1, BLOCK, torch.float32)
    models.sources = [torch.ones(BLOCK)]
    upper = torch.arange(BLOCK) % 4 == 0
    numbers = random_numbers(models.keys[0], models.start, BLOCK)
    near = torch.from_numpy(numbers.astype(np.float64) / 2**32).float()
    models.computed_rows = [torch.where(upper, torch.nextafter(near, torch.tensor(2.0)), near)]

    found = check(kernels, case_of(program, models, has_base=False))

    assert 0 < found.kept[0] < BLOCK


@pytest.mark.parametrize("where", ["base", "source"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float, where: str, kernels: Kernels) -> None:
    sheet = Sheet(2, has_base=True)
    program = compile_result(sheet.base + weighted_sum(sheet.task_vectors, [0.5, 0.5]))
    models = models_of(2, 1200, torch.bfloat16)
    (models.base_values if where == "base" else models.sources[1])[1100] = bad

    (found,) = run_by_machine(kernels, case_of(program, models))

    assert found.refused


def test_a_result_that_does_not_fit_is_refused(kernels: Kernels) -> None:
    sheet = Sheet(1, has_base=False)
    program = compile_result(sheet.values[0] * 70000.0)
    models = models_of(1, 600, torch.float16)
    models.sources = [torch.ones(600, dtype=torch.float16)]

    (found,) = run_by_machine(kernels, case_of(program, models, has_base=False))

    assert found.refused


def test_exponential_and_logarithm_are_those_of_the_library(kernels: Kernels) -> None:
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 0x7F800000, BLOCK, dtype=np.int32).view(np.float32)
    signed = np.concatenate([patterns, -patterns, generator.uniform(-110, 100, BLOCK)])
    models = models_of(1, 3 * BLOCK, torch.float32)
    sheet = Sheet(1, has_base=False)
    for of, function, values in (
        (exponential_of, exponential, signed),
        (exponential_less_one_of, exponential_less_one, signed),
        (logarithm_of_one_more_of, logarithm_of_one_more, np.maximum(signed, -0.9999)),
        (logarithm_of, logarithm, np.abs(signed)),
    ):
        single = values.astype(np.float32)
        models.sources = [torch.from_numpy(single)]
        case = case_of(compile_sinks([ranked(of(sheet.values[0]))]), models, has_base=False)
        (found,) = run_by_machine(kernels, case)
        with np.errstate(over="ignore"):
            expected = np.abs(function(single.astype(np.float64), single=True).astype(np.float32))
        np.testing.assert_array_equal(
            found.ranked[0].view(np.int32), expected.view(np.int32), err_msg=of.__name__
        )


def test_totals_do_not_depend_on_the_cut_into_tiles(kernels: Kernels) -> None:
    """A row of a job that is longer than a tile, and shorter than one vector."""
    sheet = Sheet(2, has_base=True)
    program = compile_sinks([total(each) for each in sheet.task_vectors])
    for numel, row_numel in ((65_551, 65_551), (9 * 700, 700), (99, 3)):
        models = models_of(2, numel, torch.bfloat16)
        case = case_of(program, models)
        rows = np.zeros((numel // row_numel, 1))
        case = Case(program, True, case.jobs, [], [rows], [row_numel], case.out)
        check(kernels, case)


def test_a_register_may_be_read_by_the_step_that_fills_it(kernels: Kernels) -> None:
    """The base's tile stays as it is."""
    steps = (
        Step(Op.BASE, 0),
        Step(Op.ADD, 0, 0, 0),
        Step(Op.SOURCE, 1, 0),
        Step(Op.SUBTRACT, 1, 0, 1),
        Step(Op.BASE, 0),
        Step(Op.STORE, 0, 1, 0),
    )
    check(kernels, case_of(Program(steps, 2, ()), models_of(1, 1000, torch.bfloat16)))


def test_adapters_are_not_for_the_machine() -> None:
    program = Program((Step(Op.BASE, 0), Step(Op.CHANGED, 0, 0, c=0), Step(Op.STORE, 0, 0)), 1, ())
    with pytest.raises(ValueError, match="does not run adapters"):
        EncodedProgram(program, sources=1, has_base=True)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_numbers_of_16_bits_come_and_go_as_they_are(
    seed: int, dtype: torch.dtype, kernels: Kernels
) -> None:
    sheet = Sheet(1, has_base=False)
    models = models_of(1, 700, dtype)
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(-(2**15), 2**15, (700,), generator=generator).to(torch.int16).view(dtype)
    models.sources = [torch.where(halves.isfinite(), halves, -0.0)]

    found = check(kernels, case_of(compile_result(sheet.values[0]), models, has_base=False))

    assert found.outcome.result is not None
    np.testing.assert_array_equal(bits_of(found.outcome.result), bits_of(models.sources[0]))
