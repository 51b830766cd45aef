"""The compiled machine at work equals the plain way, bit for bit; tests/methods has the laws."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import Parts, choose, parts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    BLOCK,
    Models,
    Tensors,
    assert_same_bits,
    assert_same_model,
    count_sources,
    recipe_of,
    required,
    without_kernels,
)

import streammerge
from streammerge.dtypes import DType
from streammerge.engine.asking import Asking
from streammerge.engine.compiled.bench import Bench
from streammerge.engine.compiled.measuring import CompiledMeasuring
from streammerge.engine.compiled.rows import CompiledRows
from streammerge.engine.pieces import Part, PieceInMemory, Stored
from streammerge.engine.plain import PlainStage
from streammerge.errors import NonFiniteError
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand
from streammerge.methods.programs import Programs, programs_of
from streammerge.native import library
from streammerge.native.library import Kernels, load_kernels
from streammerge.native.machine import EncodedProgram, Jobs
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan
from streammerge.statistics.magnitude import MOST_CROWDS, Band, Bins, Question, answer_block
from streammerge.statistics.rounds import NOTHING
from streammerge.statistics.selecting import select_block
from streammerge.statistics.topk import TiePolicy, kept_count
from streammerge.tiles.compiling import compile_result
from streammerge.tiles.writing import Sheet

KERNELS = load_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no compiler was found at installation")

METHODS = discover_methods()
HALVES = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
"""Every pattern of 16 bits."""
TAIL = 1000
"""Elements beyond a whole number of blocks: neither tiles nor vectors divide them."""
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def convert(values: torch.Tensor, code: int, out: torch.Tensor, out_code: int) -> bool:
    """Store one source alone; returns whether the machine took it."""
    assert KERNELS is not None
    program = compile_result(Sheet(1, has_base=False).values[0])
    encoded = EncodedProgram(program, sources=1, has_base=False)
    memory = np.empty(encoded.memory_numel, dtype=np.float32)
    jobs = Jobs([encoded], 1)
    jobs.fill(
        0,
        encoded,
        [values.data_ptr(), code],
        numel=values.numel(),
        out=out.data_ptr(),
        out_code=out_code,
        limit=torch.finfo(out.dtype).max,
    )
    return KERNELS.run(jobs.calls, 0, 1, memory=memory.ctypes.data) == 0


@pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, 1), (torch.float16, 2)])
def test_all_numbers_of_16_bits_are_read_as_torch_reads_them(dtype: torch.dtype, code: int) -> None:
    every = HALVES.view(dtype)
    finite = every[every.isfinite()]
    out = torch.empty(finite.numel())

    assert convert(finite, code, out, 0)
    assert_same_bits(out, finite.float())
    for special in every[~every.isfinite()]:
        assert not convert(special.reshape(1), code, out, 0)


@pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, 1), (torch.float16, 2)])
def test_numbers_are_rounded_as_torch_rounds_them(dtype: torch.dtype, code: int) -> None:
    """Everything that lies in the middle of two numbers, next to it, and at random."""
    largest = torch.finfo(dtype).max
    every = HALVES.view(dtype)
    exact = every[every.isfinite()].float()
    middle = (exact[:-1].double() + exact[1:].double()).div_(2).float()
    around = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (-1e30, 1e30)]
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32)
    values = torch.cat([exact, middle, *around, patterns.view(torch.float32)])
    values = values[values.abs() <= largest]
    out = torch.empty(values.numel(), dtype=dtype)

    assert convert(values, 0, out, code)
    assert_same_bits(out, values.to(dtype))
    beyond = torch.tensor([largest]).nextafter(torch.tensor([float("inf")]))
    assert not convert(beyond, 0, out, code)


def draw(sources: int, dtype: torch.dtype, seed: int) -> list[Tensors]:
    """Return a base and sources: smooth, of few values, with subnormal numbers, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"smooth": BLOCK + TAIL, "few": 5000, "tiny": 3000, "small": 64, "one": 1}
    models = []
    for model in range(sources + 1):
        tensors = {
            name: torch.randn(numel, generator=generator) * (0.1 if model else 1.0)
            for name, numel in shapes.items()
        }
        tensors["few"] = (tensors["few"] * 8).round() / 8
        # Subnormal numbers of every type: below 2^-14, 2^-126.
        tensors["tiny"] *= 2.0**-15 if dtype is torch.float16 else 2.0**-126
        tensors["few"][::7] = -0.0
        models.append(tensors)
    base, *tuned = models
    tuned = [{name: base[name] + t for name, t in each.items()} for each in tuned]
    return [{name: t.to(dtype) for name, t in each.items()} for each in (base, *tuned)]


def document(method: str, paths: list[Path], **parameters: Any) -> dict[str, Any]:
    """Return a recipe whose sources differ in what can differ."""
    known = {spec.name for spec in METHODS[method].parameters}
    sources: list[dict[str, Any]] = []
    given = {name: value for name, value in required(METHODS[method]).items() if name != "density"}
    for index, path in enumerate(paths[1:]):
        source: dict[str, Any] = {"path": str(path)}
        if "weight" in known:
            source["weight"] = (1.0, -0.7, 0.3)[index % 3]
        if "density" in known:
            source["density"] = (0.3, 0.81, 1.0, 0.0, 3e-6)[index % 5]
        if "epsilon" in known and "density" in known:
            source["epsilon"] = (0.15, 0.1, 0.0, 0.0, 2e-6)[index % 5]
        sources.append(source)
    return {
        "method": method,
        "base": str(paths[0]),
        "sources": sources,
        "parameters": given | {key: value for key, value in parameters.items() if key in known},
    }


def parts_with(case: tuple[str, int]) -> Parts:
    method, sources = case
    has_base = METHODS[method].operand is not Operand.WEIGHTS
    return parts_of(method, required(METHODS[method]), has_base=has_base, sources=sources)


@pytest.mark.parametrize(
    ("method", "sources"),
    [
        case
        for sources in (1, 2, 3, 4, 5, 8, 16, 17)
        for case in choose(
            [
                (name, sources)
                for name in METHODS
                if count_sources(METHODS[name], sources) == sources
            ],
            parts_with,
            # Few and many of every method; between them, every step of their programs.
            lambda case: case[0] if case[1] in (1, 2, 5) else "",
        )
    ],
)
def test_any_number_of_sources_gives_the_bits_of_the_plain_way(
    method: str, sources: int, models: Models
) -> None:
    dtype = list(STORED.values())[sources % 3]
    paths = [models.write(tensors) for tensors in draw(sources, dtype, sources)]
    recipe = document(method, paths, majority_sign_method="frequency" if sources % 2 else "total")
    with without_kernels():
        expected, plain = models.merge(recipe)

    merged, manifest = models.merge(recipe)

    assert_same_model(merged, expected)
    assert {n: t.density for n, t in manifest.tensors.items()} == {
        n: t.density for n, t in plain.tensors.items()
    }


@pytest.mark.parametrize("out", STORED.values(), ids=str)
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("policy", ["exact", "inclusive", "strict"])
def test_types_may_differ_between_models_and_ties_are_told_apart(
    out: torch.dtype, scope: str, policy: str, models: Models
) -> None:
    drawn = [draw(3, dtype, 4)[index] for index, dtype in enumerate(STORED.values())]
    paths = [models.write(tensors) for tensors in drawn]
    recipe = document("ties", paths, scope=scope, tie_policy=policy)
    recipe["output"] = {"dtype": str(out).removeprefix("torch.")}
    with without_kernels():
        expected, plain = models.merge(recipe)

    merged, manifest = models.merge(recipe)

    assert_same_model(merged, expected)
    assert [t.density for t in manifest.tensors.values()] == [
        t.density for t in plain.tensors.values()
    ]


@pytest.mark.parametrize("method", METHODS)
def test_blocks_in_usual_types_are_not_merged_plainly(
    method: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the tests here would compare the plain way with itself."""
    sources = count_sources(METHODS[method], 2)
    paths = [models.write(tensors) for tensors in draw(sources, torch.bfloat16, 1)]
    recipe = document(method, paths)
    (programs,) = programs_of_plan(streammerge.plan(recipe, memory="4GiB"), METHODS[method])
    if programs.work.whole is not None:
        pytest.skip("takes whole matrices, whose singular vectors are torch's")
    monkeypatch.setattr(PlainStage, "__init__", None)

    models.merge(recipe)


def test_what_the_plain_way_refuses_is_refused_in_its_words(models: Models) -> None:
    base, first, second = draw(2, torch.float16, 2)
    second["smooth"][BLOCK + 3] = float("nan")
    paths = [models.write(tensors) for tensors in (base, first, second)]
    recipe = document("ties", paths)
    messages = []
    with pytest.raises(NonFiniteError) as refused:
        models.merge(recipe)
    messages.append(str(refused.value))
    with without_kernels(), pytest.raises(NonFiniteError) as refused:
        models.merge(recipe)
    messages.append(str(refused.value))

    assert f"element [{BLOCK + 3}]" in messages[0]
    assert messages[0] == messages[1]


def measuring_of(plan: MergePlan, programs: list[Programs] | None = None) -> CompiledMeasuring:
    """Return what measures for one worker."""
    assert KERNELS is not None
    programs = programs or programs_of_plan(plan, METHODS[plan.method])
    bench = Bench(KERNELS, plan, programs, [])
    return CompiledMeasuring(bench, CompiledRows(bench, programs), programs, None)


def asking(*questions: Question | None) -> Asking:
    """Return what the first round asks about each task vector."""
    return Asking(0, NOTHING, questions, totals=False)


def trimming(density: float, policy: TiePolicy) -> Programs:
    """Return what ``ties`` does with one source."""
    defaults = {
        spec.name: (spec.default,) if spec.per_source else spec.default
        for spec in METHODS["ties"].parameters
    }
    values = defaults | {"density": (density,), "tie_policy": policy.value}
    return programs_of(METHODS["ties"], values.items(), sources=1, has_base=True)


def stored(tensor: torch.Tensor) -> Stored:
    """Return a tensor as a piece holds it."""
    names = {dtype: name for name, dtype in STORED.items()}
    return Stored(tensor.view(torch.uint8).numpy(), DType(names[tensor.dtype]))


def only(found: Any) -> Any:
    """Return the only one of several."""
    assert len(found) == 1
    return found[0]


@st.composite
def questions(draw: st.DrawFn, magnitudes: np.ndarray) -> Question:
    """Ask about an interval whose ends are values that occur, as a rule."""
    ends = st.sampled_from([0.0, *np.unique(magnitudes[~np.isnan(magnitudes)]).tolist(), np.inf])
    low, high = sorted((draw(ends), draw(ends)))
    if draw(st.booleans()):
        low_bits, high_bits = (int(np.float32(end).view(np.uint32)) for end in (low, high))
        return Bins(low_bits, high_bits)
    inside = [end for end in np.unique(magnitudes).tolist() if low <= end <= high]
    crowded = (
        draw(st.lists(st.sampled_from(inside), unique=True, max_size=MOST_CROWDS)) if inside else []
    )
    return Band(low, high, tuple(sorted(crowded, reverse=True)))


@settings(deadline=None, max_examples=200)
@given(data=st.data(), seed=st.integers(0, 99), numel=st.integers(1, 2000), spread=st.booleans())
def test_answers_are_those_of_the_plain_way(
    data: st.DataObject, seed: int, numel: int, spread: object, one_tensor: Any
) -> None:
    plan = one_tensor
    generator = torch.Generator().manual_seed(seed)
    base, tuned = (torch.randn(numel, generator=generator) for _ in range(2))
    if not spread:
        base, tuned = (base * 2).round(), (tuned * 2).round()
    base, tuned = base.bfloat16(), tuned.bfloat16()
    piece = PieceInMemory((Part(plan.tasks[0], 0, 0, numel),), (stored(base), stored(tuned)), ())
    magnitudes = (tuned.float() - base.float()).abs().numpy()
    question = data.draw(questions(magnitudes))
    measuring = measuring_of(plan)

    found = only(only(list(measuring.answer(piece, asking(question)))).counted)

    expected = answer_block(question, magnitudes, np.empty((2, numel), dtype=np.bool_))
    assert found is not None
    assert (found.above, found.crowds) == (expected.above, expected.crowds)
    for mine, plain in ((found.values, expected.values), (found.histogram, expected.histogram)):
        assert (mine is None) == (plain is None)
        if mine is not None and plain is not None:
            np.testing.assert_array_equal(mine, plain)


@pytest.fixture(scope="module")
def one_tensor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A plan of one source's ``ties``."""
    models = Models(tmp_path_factory.mktemp("one"))
    paths = [models.write({"weight": torch.ones(8).bfloat16()}) for _ in range(2)]
    return streammerge.plan(document("ties", paths), memory="4GiB")


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("sources", [1, 3])
def test_what_bands_collect_from_many_blocks_is_told_apart(
    sources: int, spread: object, models: Models
) -> None:
    """Also where the room is too small for what all of them collect."""
    drawn = draw(sources, torch.bfloat16, 3)
    numel = 5 * BLOCK + TAIL
    flat = [torch.cat([model["smooth"]] * 5)[:numel] for model in drawn]
    if not spread:
        flat = [(each * 4).round() for each in flat]
    paths = [models.write({"weight": each}) for each in flat]
    plan = streammerge.plan(document("ties", paths), memory="4GiB")
    piece = PieceInMemory((Part(plan.tasks[0], 0, 0, numel),), tuple(map(stored, flat)), ())
    measuring = measuring_of(plan)
    asked = [Band(0.01, 0.3), Bins(0, 2**31 - 1), Band(0.0, float("inf"))][:sources]

    found = list(measuring.answer(piece, asking(*asked)))

    assert found is not None
    assert len(found) == 6
    for block, row in enumerate(found):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        for source, (question, mine) in enumerate(zip(asked, row.counted, strict=True)):
            magnitudes = (flat[1 + source][part].float() - flat[0][part].float()).abs().numpy()
            plain = answer_block(question, magnitudes, np.empty((2, BLOCK), dtype=np.bool_))
            assert mine is not None
            assert mine.above == plain.above
            if mine.values is not None:
                np.testing.assert_array_equal(mine.values, plain.values)
            else:
                np.testing.assert_array_equal(mine.histogram, plain.histogram)


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=70),
    seed=st.integers(0, 99),
    density=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-4, 0.5, 1.0])),
    policy=st.sampled_from(TiePolicy),
    spread=st.booleans(),
)
def test_thresholds_of_small_tensors_are_those_of_the_plain_way(
    *,
    sizes: list[int],
    seed: int,
    density: float,
    policy: TiePolicy,
    spread: object,
    one_tensor: Any,
) -> None:
    plan = one_tensor
    generator = torch.Generator().manual_seed(seed)
    numel = sum(sizes)
    base, tuned = (torch.randn(numel, generator=generator).float() for _ in range(2))
    if not spread:
        base, tuned = (base * 2).round(), (tuned * 2).round()
    if seed % 5 == 0:
        tuned[::11] = float("inf")
    parts = tuple(Part(plan.tasks[0], 0, 0, size) for size in sizes)
    piece = PieceInMemory(parts, (stored(base), stored(tuned)), ())
    measuring = measuring_of(plan, [trimming(density, policy)])
    ranges = [(begin, end) for _, begin, end in piece.ranges()]

    try:
        found = measuring.settle(piece)
    except NonFiniteError:
        # Where all or nothing is kept, nobody looks.
        assert any(
            not tuned[begin:end].isfinite().all()
            and 0 < kept_count(density, end - begin) < end - begin
            for begin, end in ranges
        )
        return

    magnitudes = (tuned - base).abs().numpy()
    assert found is not None
    assert [known.tops for known in found] == [
        (select_block(magnitudes[begin:end], kept_count(density, end - begin), policy),)
        for begin, end in ranges
    ]


def test_a_threshold_that_is_no_number_is_an_error(one_tensor: Any) -> None:
    plan = one_tensor
    values = torch.tensor([1.0, float("nan")]).bfloat16()
    piece = PieceInMemory(
        (Part(plan.tasks[0], 0, 0, 2),), tuple(map(stored, (torch.ones(2).bfloat16(), values)))
    )
    measuring = measuring_of(plan, [trimming(0.5, TiePolicy.EXACT)])

    with pytest.raises(NonFiniteError, match=r"sources\[0\] .* holds nan at element \[1\]"):
        measuring.settle(piece)


def test_a_question_about_a_value_that_is_no_number_is_an_error(one_tensor: Any) -> None:
    plan = one_tensor
    values = torch.tensor([1.0, float("nan")]).bfloat16()
    piece = PieceInMemory(
        (Part(plan.tasks[0], 0, 0, 2),), tuple(map(stored, (torch.ones(2).bfloat16(), values)))
    )
    measuring = measuring_of(plan)

    with pytest.raises(NonFiniteError, match=r"sources\[0\] .* holds nan at element \[1\]"):
        list(measuring.answer(piece, asking(Band(0.0, 1.0))))


def test_samples_are_the_magnitudes_in_order(one_tensor: Any) -> None:
    plan = one_tensor
    generator = torch.Generator().manual_seed(5)
    base, tuned = (torch.randn(3000, generator=generator).bfloat16() for _ in range(2))
    piece = PieceInMemory((Part(plan.tasks[0], 0, 0, 3000),), (stored(base), stored(tuned)), ())
    measuring = measuring_of(plan)
    found = np.empty((1, 1024), dtype=np.float32)

    runs = [(500, 450), (1500, 574)]
    assert measuring.sample(piece, runs, asking(None), found)
    magnitudes = (tuned.float() - base.float()).abs().numpy()
    expected = np.concatenate([magnitudes[begin : begin + count] for begin, count in runs])
    np.testing.assert_array_equal(found[0], expected)

    tuned[900] = float("-inf")
    with pytest.raises(NonFiniteError, match=r"sources\[0\] .* holds -inf at element"):
        measuring.sample(piece, runs, asking(None), found)


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")

    assert load_kernels.__wrapped__() is None


def test_a_library_of_other_sources_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also one that is no library at all, and none."""
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert load_kernels.__wrapped__() is None

    here = Path(streammerge.__file__).parent / "native"
    compiled = next(
        path for s in library.EXTENSION_SUFFIXES if (path := here / f"_kernels{s}").exists()
    )
    copy = tmp_path / compiled.name
    shutil.copy(compiled, copy)
    assert isinstance(load_kernels.__wrapped__(), Kernels)

    sizes = library.list_sizes()
    monkeypatch.setattr(library, "list_sizes", lambda: [*sizes[:-1], sizes[-1] + 1])
    assert load_kernels.__wrapped__() is None

    copy.unlink()
    copy.write_bytes(b"no library")
    assert load_kernels.__wrapped__() is None


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_conversions_keep_every_value(
    stored: torch.dtype, output: torch.dtype, models: Models
) -> None:
    """Zeros of both signs, subnormal numbers, several blocks: the bits of torch's own conversion."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(BLOCK + 999, generator=generator)
    values[:4] = torch.tensor([0.0, -0.0, 1e-41, -6e-8])
    tensors = {"large": values.to(stored), "small": torch.tensor([-0.0, 3.0]).to(stored)}
    path = models.write(tensors | {"merged": torch.ones(3)})
    recipe = recipe_of(
        "linear",
        None,
        [path, path],
        rules=[{"tensors": name, "copy": 0} for name in tensors],
        output={"dtype": str(output).removeprefix("torch.")},
    )
    assert not streammerge.plan(recipe, memory="4GiB").needs_torch
    merged, _ = models.merge(recipe)
    for name, tensor in tensors.items():
        assert_same_bits(merged[name], tensor.to(output))


def test_a_conversion_that_overflows_is_refused_by_name(models: Models) -> None:
    path = models.write({"x": torch.tensor([1.0, 70_000.0]), "y": torch.ones(2)})
    rules = [{"tensors": "x", "copy": 0}]
    recipe = recipe_of("linear", None, [path], rules=rules, output={"dtype": "float16"})
    with pytest.raises(NonFiniteError, match=r"x: the merged value 70000 at element \[1\]"):
        models.merge(recipe)


@pytest.mark.skipif(
    shutil.which("x86_64-w64-mingw32-gcc") is None, reason="no compiler for Windows is installed"
)
def test_the_sources_compile_for_windows(tmp_path: Path) -> None:
    project = Path(streammerge.__file__).parents[1]
    extension = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]
    (kernels,) = extension["ext-modules"]
    library = tmp_path / "_kernels.pyd"
    compiler = ["x86_64-w64-mingw32-gcc", "-shared", "-Wall", "-Werror"]

    subprocess.run(
        [*compiler, *kernels["extra-compile-args"], "-o", str(library), *kernels["sources"]],
        cwd=project,
        check=True,
    )

    exported = library.read_bytes()
    wanted = (
        "sm_run",
        "sm_rank_rows",
        "sm_product",
        "sm_row_squares",
        "sm_column_squares",
        "sm_copy_mapped",
        "sm_machine_size_of",
    )
    assert [name for name in wanted if name.encode() not in exported] == []
