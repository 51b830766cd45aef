"""Fused kernels have the bits of the interpreter of programs, and of the CPU's masks, products and sums.

They run on a device where there is one, and else in Triton's own interpreter, on tensors of the CPU.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from programs_at_random import Case, ModelsInMemory, Outcome, Ran, cases, chance_of, interpret

from streammerge.adapters.onto_base.products import ProductKind, Tiles, multiply_in_order
from streammerge.dtypes import DType
from streammerge.engine.accelerator.fused import functions
from streammerge.engine.accelerator.fused.kernels import compile_source, kernel_of, launch
from streammerge.engine.accelerator.fused.writing import Kind
from streammerge.native.machine import TILE_COLUMNS
from streammerge.rng import keep_limit, keep_mask, keep_mask_by, stream_key
from streammerge.tiles import functions as on_the_cpu
from streammerge.tiles.functions import NOT_FOR_SINGLE
from streammerge.tiles.fusing import Layout, count_sink_rows, sink_rows
from streammerge.tiles.program import Op, Origin, Program, Step
from streammerge.tiles.totalling import add_up

pytestmark = pytest.mark.gpu
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = 2048
STORED = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}


def there(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor where kernels run, bfloat16 as patterns."""
    integers = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return integers.to(HERE).contiguous()


def bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def signed(word: int) -> int:
    return int(np.uint64(word & 2**64 - 1).astype(np.int64))


class Recorder:
    """Models that tell where the last tie lies that each trim keeps."""

    def __init__(self, models: ModelsInMemory, trims: int) -> None:
        self.models = models
        self.lasts = [-1] * trims

    def watch(self, row: torch.Tensor, trim: int) -> None:
        spec = self.models.trims[trim]
        ties = (row.abs().numpy() == np.float32(spec.threshold)).nonzero()[0]
        kept = ties[: max(spec.ties, 0)]
        self.lasts[trim] = int(kept[-1]) if kept.size else -1


def interpreted(case: Case, index: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Ran, list[int]]:
    """Run a job by the interpreter, and return the last ties that its trims keep."""
    recorder = Recorder(case.jobs[index], len(case.program.trims))
    for name in ("trim_", "mark_"):
        original = getattr(ModelsInMemory, name)

        def watched(
            self: ModelsInMemory, row: torch.Tensor, trim: int, original: object = original
        ) -> None:
            recorder.watch(row, trim)
            original(self, row, trim)  # type: ignore[operator]

        monkeypatch.setattr(ModelsInMemory, name, watched)
    ran = interpret(case, index)
    monkeypatch.undo()
    return ran, recorder.lasts


def constants_of(case: Case, index: int) -> torch.Tensor:
    """Return what a kernel is told of a job."""
    program, models = case.program, case.jobs[index]
    found = [
        # Those of rows come by themselves.
        case.found[number.index] if number.origin is Origin.FOUND else number.value
        for number in program.numbers
    ]
    written = [*map(bits, found), models.start]
    for trim in range(len(program.trims)):
        spec = models.trims[trim]
        written.append(bits(-1.0 if spec.everything else spec.threshold))
    for source in program.streams:
        key = models.keys[source]
        written += [signed(key), signed(key >> 64)]
    for stream in range(len(program.streams)):
        written += divmod(keep_limit(chance_of(case, stream) or 0.0), 2**16)
    assert len(written) == Layout(program).size
    return torch.tensor([*written, 0], dtype=torch.int64)


def is_for_kernels(case: Case) -> bool:
    """Return whether devices do such a program."""
    return all(models.start % 16 == 0 for models in case.jobs) or not case.program.streams


def placed(program: Program, lasts: list[int]) -> torch.Tensor:
    """Return the last ties where kernels look for them: by the ranks of the tensor."""
    found = torch.zeros(1 + max(program.trims, default=0), dtype=torch.int64)
    for trim, last in zip(program.trims, lasts, strict=True):
        found[trim] = last
    return found


def run_fused(case: Case, index: int, lasts: list[int]) -> Ran:
    """Run a job by a fused kernel; totals are left to others."""
    program, models = case.program, case.jobs[index]
    numel = models.base_values.numel()
    stores = program.uses(Op.STORE)
    sources = tuple(STORED[each.dtype] for each in models.sources)
    base = STORED[models.base_values.dtype] if case.has_base else None
    kind = Kind(
        program,
        base,
        sources,
        DType.F32,
        STORED[case.out] if stores else None,
        models=len(sources) + case.has_base,
        has_base=case.has_base,
        counts=True,
    )
    rows = torch.full((max(1, count_sink_rows(program)), max(1, numel)), torch.nan)
    out = there(torch.empty(max(1, numel), dtype=case.out) if stores else rows)
    notes = torch.zeros(kind.models + 1, device=HERE)
    counts = torch.zeros(max(1, len(program.trims), len(program.streams)), dtype=torch.int64)
    counts = counts.to(HERE)
    tensors = [there(each) for each in (models.base_values, *models.sources)]
    launch(
        kernel_of(kind),
        -(-numel // TILE),
        *tensors,
        out,
        there(constants_of(case, index)),
        there(placed(program, lasts)),
        notes.view(torch.int32),
        counts,
        there(torch.stack([*models.computed_rows]).view(-1)),
        there(torch.from_numpy(case.row_found[index]).view(-1)),
        max(1, case.row_numel[index]),
        case.row_found[index].shape[1],
        0,
        numel,
        rows.shape[1],
        TILE,
    )
    return finished(case, notes.cpu(), counts.cpu(), out.cpu())


def finished(case: Case, notes: torch.Tensor, counts: torch.Tensor, out: torch.Tensor) -> Ran:
    """Return what a kernel has left behind, as others say it."""
    program = case.program
    ranked, numel = [], case.jobs[0].base_values.numel()
    operands = notes[:-1]
    refused = not bool(torch.isfinite(operands).all())
    result = None
    if program.uses(Op.STORE):
        result = (out.view(torch.bfloat16) if case.out == torch.bfloat16 else out)[:numel]
        refused |= not bool(notes[-1] <= torch.finfo(case.out).max)
    else:
        places = {program.steps[i].out: a for i, (a, _) in sink_rows(program).items()
                  if program.steps[i].op is Op.RANK}  # fmt: skip
        ranked = [out[places[k]].numpy() for k in range(program.ranked)]
    kept = counts.tolist()[: len(program.trims) or len(program.streams)]
    return Ran(Outcome(result, np.zeros((1, 0))), ranked, kept, refused)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(
    deadline=None,
    # For a device each is compiled.
    max_examples=200 if HERE.type == "cpu" else 12,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(case=cases(row_by_row=False) | cases(row_by_row=True))
def test_any_program_gives_the_bits_of_the_interpreter(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    assume(is_for_kernels(case))
    for index, models in enumerate(case.jobs):
        expected, lasts = interpreted(case, index, monkeypatch)
        numel = models.base_values.numel()
        if not numel:
            continue
        single = Case(
            case.program, case.has_base, [models], case.found, [case.row_found[index]],
            [case.row_numel[index]], case.out,
        )  # fmt: skip
        # Triton's interpreter computes with numpy, which tells of infinities.
        with np.errstate(all="ignore"):
            found = run_fused(single, 0, lasts)

        if case.program.uses(Op.STORE):
            assert found.refused == expected.refused
            if not expected.refused:
                assert expected.outcome.result is not None
                assert found.outcome.result is not None
                assert_same_values(found.outcome.result, expected.outcome.result.to(case.out))
        for mine, plain in zip(found.ranked, expected.ranked, strict=True):
            np.testing.assert_array_equal(mine, plain)
        if case.program.uses(Op.KEEP_LARGEST, Op.IN_TOP) != bool(case.program.streams):
            assert found.kept == expected.kept


def assert_same_values(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare values, and signs of zeros too."""
    mine, plain = found.float().numpy(), expected.float().numpy()
    np.testing.assert_array_equal(mine, plain)
    np.testing.assert_array_equal(np.signbit(mine), np.signbit(plain))


def run_function(
    body: str, inputs: list[torch.Tensor], out: torch.Tensor, *numbers: int
) -> torch.Tensor:
    """Run a kernel of one expression on ``x`` and ``y``."""
    names = ["x", "y"][: len(inputs)]
    loads = "\n".join(f"    {n} = tl.load(p{n} + own, mask=own < n, other=0)" for n in names)
    extra = "".join(f", k{i}" for i in range(len(numbers)))
    source = (
        f"@triton.jit\ndef merge({''.join(f'p{n}, ' for n in names)}out, n{extra}, TILE: tl.constexpr):\n"
        f"    own = tl.program_id(0) * TILE + tl.arange(0, TILE)\n{loads}\n"
        f"    tl.store(out + own, {body}, mask=own < n)\n"
    )
    place = there(out)
    numel = out.numel()
    launch(
        compile_source(source), -(-numel // TILE), *map(there, inputs), place, numel, *numbers, TILE
    )
    return place.cpu()


@pytest.mark.parametrize("density", [0.3, 0.5, 2**-20, 1 - 2**-32])
@pytest.mark.parametrize("start", [0, 16 * 7, 2**33])
def test_masks_are_those_of_the_cpu(density: float, start: int) -> None:
    """In so many elements, some have an upper lane exactly at the limit."""
    key, count = stream_key(2**64 - 1, 3, "model.weight"), 2**19 + 5
    words = torch.tensor([signed(key), signed(key >> 64)])
    upper, lower = divmod(keep_limit(density), 2**16)
    body = (
        "functions.keep_random(tl.load(px).to(tl.uint64, bitcast=True), "
        "tl.load(px + 1).to(tl.uint64, bitcast=True), "
        "(k0 + tl.program_id(0) * TILE) // 16 + 1, k1, k2, TILE).to(tl.int8)"
    )
    padded = torch.cat([words, torch.zeros(count - 2, dtype=torch.int64)])
    kept = run_function(body, [padded], torch.zeros(count, dtype=torch.int8), start, upper, lower)

    np.testing.assert_array_equal(kept.numpy().astype(bool), keep_mask(key, start, count, density))


@pytest.mark.parametrize("start", [0, 16 * 7, 2**33])
def test_each_element_is_kept_with_its_own_probability(start: int) -> None:
    """Whose limits have lower halves, halves between numbers, and both ends."""
    key, count = stream_key(2**64 - 1, 3, "model.weight"), 2**18 + 5
    probabilities = torch.rand(count, generator=torch.Generator().manual_seed(2))
    probabilities[:6] = torch.tensor([0.0, 1.0, 2**-33, 3 * 2**-33, 0.5, 1 - 2**-24])
    low, high = (signed(key) & 2**64 - 1, key >> 64 & 2**64 - 1)
    body = (
        f"functions.keep_random_by(tl.full([], {low}, tl.uint64), tl.full([], {high}, tl.uint64), "
        "(k0 + tl.program_id(0) * TILE) // 16 + 1, x, TILE).to(tl.int8)"
    )
    kept = run_function(body, [probabilities], torch.zeros(count, dtype=torch.int8), start)

    expected = keep_mask_by(key, start, probabilities.numpy())
    np.testing.assert_array_equal(kept.numpy().astype(bool), expected)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    "name", ["exponential", "exponential_less_one", "logarithm", "logarithm_of_one_more"]
)
def test_functions_are_those_of_the_cpu(name: str, *, single: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(20_000, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1e-9, 1e-3, 0.4, 1.0, 30.0, 600.0], dtype=torch.float64)
    values = values * scales[torch.arange(values.numel()) % len(scales)]
    if name.startswith("logarithm"):
        values = values.abs() + 1e-300 * (name == "logarithm")
    values[:2] = torch.tensor([0.5, torch.nan])
    first = NOT_FOR_SINGLE if single else 0
    found = run_function(f"functions.{name}(x, {first})", [values], torch.empty_like(values))

    expected = getattr(on_the_cpu, name)(values.numpy(), single=single)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_bfloat16_is_rounded_to_even() -> None:
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    wide = run_function("functions.widen_bf16(x)", [patterns], torch.empty(2**16))
    expected = patterns.view(torch.bfloat16).float()
    np.testing.assert_array_equal(wide.view(torch.int32), expected.view(torch.int32))
    between = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (patterns.to(torch.int32)[:, None] << 16 | between).view(torch.float32).flatten()
    found = run_function(
        "functions.round_to_bf16(x)", [values], torch.empty(values.numel(), dtype=torch.int16)
    )

    rounded = values.to(torch.bfloat16)
    number = ~values.isnan()
    np.testing.assert_array_equal(found[number], rounded.view(torch.int16)[number])
    assert found.view(torch.bfloat16)[~number].isnan().all()


@pytest.mark.parametrize("rank", [0, 1, 7, 8, 9, 20])
@pytest.mark.parametrize("columns", [1, 63, 64, 150])
@pytest.mark.parametrize("tiled", [False, True])
def test_products_are_those_of_the_cpu(rank: int, columns: int, *, tiled: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = 40
    up = torch.randn(rows, rank, generator=generator)
    down = torch.randn(rank, columns, generator=generator)
    expected = torch.empty(rows, columns)
    multiply_in_order(up, down, expected)
    flat, wide = down.flatten(), columns
    if tiled:
        memory = np.empty(down.numel(), dtype=np.float32)
        Tiles(memory, (rank, columns)).put(0, down.flatten().numpy())
        flat, wide = torch.from_numpy(memory), TILE_COLUMNS
    start, numel = 3, rows * columns - 3
    padded = [torch.cat([each.flatten(), torch.zeros(1)]) for each in (up, flat)]
    source = (
        "@triton.jit\ndef merge(up, down, out, n, start, rank, columns, wide, TILE: tl.constexpr):\n"
        "    own = tl.program_id(0) * TILE + tl.arange(0, TILE)\n"
        "    begin = tl.load(start) + tl.program_id(0) * TILE\n"
        "    found = functions.multiply(up, down, begin, tl.load(rank), tl.load(columns),\n"
        "        tl.load(wide), own < n, TILE)\n"
        "    tl.store(out + own, found, mask=own < n)\n"
    )
    out = there(torch.empty(numel))
    numbers = [there(torch.tensor([number])) for number in (start, rank, columns, wide)]
    factors = map(there, padded)
    launch(compile_source(source), -(-numel // TILE), *factors, out, numel, *numbers, TILE)

    assert_same_values(out.cpu(), expected.flatten()[start:])


@pytest.mark.parametrize("op", [Op.SOURCE, Op.TASK_VECTOR])
def test_changes_of_one_tensor_are_made_in_turn(op: Op) -> None:
    """Sums and norms of rows and of columns, from the middle of a row on, in the order of `Delta.apply_`."""
    generator = torch.Generator().manual_seed(4)
    rows, columns, start = 40, 150, 3
    kinds = (
        ProductKind.ADDED,
        ProductKind.NORMED_ROWS,
        ProductKind.ADDED,
        ProductKind.NORMED_COLUMNS,
    )
    base = torch.randn(rows, columns, generator=generator)
    expected = base.clone()
    factors, constants = [], [start]
    for index, each in enumerate(kinds):
        rank, scaling = 3 + index, 0.3 + index
        up = torch.randn(rows, rank, generator=generator)
        down = torch.randn(rank, columns, generator=generator)
        product = torch.empty(rows, columns)
        multiply_in_order(up, down, product)
        expected += product.mul_(scaling)
        factors += [up, down]
        constants += [bits(scaling), rank, columns, columns, rows, 0, rows * columns]
        if each is not ProductKind.ADDED:
            count = rows if each is ProductKind.NORMED_ROWS else columns
            factors.append(torch.rand(count, generator=generator) + 0.5)
            expected *= factors[-1][:, None] if each is ProductKind.NORMED_ROWS else factors[-1]
    found, largest = run_changes(op, base, kinds, factors, constants)

    if op is Op.TASK_VECTOR:
        expected -= base
    assert_same_values(found, expected.flatten()[start:])
    assert largest == float(expected.flatten()[start:].abs().max())


def run_changes(
    op: Op,
    base: torch.Tensor,
    kinds: tuple[ProductKind, ...],
    factors: list[torch.Tensor],
    constants: list[int],
) -> tuple[torch.Tensor, float]:
    """Return what a kernel makes of a base and one source that changes it, and the largest that it notes."""
    program = Program((Step(op, 0, 0), Step(Op.STORE, 0, 0)), 1, (), (), ())
    kind = Kind(program, DType.F32, (None,), DType.F32, DType.F32, 2, True, products=(kinds,))
    # Where the tensor's first element that comes there is.
    start = constants[0]
    numel = base.numel() - start
    here = there(base.flatten()[start:])
    out, notes = there(torch.empty(numel)), torch.zeros(3, device=HERE)
    numbers, none = there(torch.tensor(constants)), there(torch.zeros(1, dtype=torch.int64))
    brought = map(there, factors)
    pointers = here, here, *brought, out, numbers, none, notes.view(torch.int32), none
    launch(kernel_of(kind), -(-numel // TILE), *pointers, none, none, 16, 16, 0, numel, numel, TILE)
    return out.cpu(), float(notes[1])


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize(("op", "zero"), [(Op.SOURCE, -0.0), (Op.TASK_VECTOR, 0.0)])
def test_placed_products_leave_other_elements_alone(op: Op, zero: float, matrices: int) -> None:
    """A zero of the base keeps its sign; a task vector is zero where nothing is added."""
    generator = torch.Generator().manual_seed(5)
    rows, columns, rank, begin, start = 7, 150, 3, 2 * 150, 3
    ups = torch.randn(matrices, rows, rank, generator=generator)
    downs = torch.randn(matrices, rank, columns, generator=generator)
    product = torch.empty(matrices, rows, columns)
    for one in range(matrices):
        multiply_in_order(ups[one], downs[one], product[one])
    end = begin + product.numel()
    base = torch.full((end + 4 * columns,), -0.0)
    expected = torch.full_like(base, zero)
    expected[begin:end] = product.flatten() * 0.5
    constants = [start, bits(0.5), rank, columns, columns, rows, begin, end]

    found, _ = run_changes(op, base, (ProductKind.PLACED,), [ups, downs], constants)

    assert_same_values(found, expected[start:])
    assert torch.equal(found.signbit(), expected[start:].signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("numel", "length"), [(5000, 1024), (1024, 1024), (17, 1024), (1, 64), (231, 77)]
)
@pytest.mark.parametrize("products", [False, True])
def test_sums_are_added_in_the_order_of_the_cpu(
    numel: int, length: int, dtype: torch.dtype, *, products: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(numel, generator=generator, dtype=dtype) for _ in range(2))
    blocks = -(-numel // length)
    totals = there(torch.full((2 * blocks,), torch.nan, dtype=torch.float64))
    arguments = there(a), there(b), totals, 2, numel, length, products, 8
    launch(functions.add_up, blocks, *arguments, warps=1)

    terms = a.double() * b.double() if products else a.double()
    expected = [add_up(block.numpy()[None])[0] for block in terms.split(length)]
    assert totals.cpu()[::2].tolist() == expected
    assert totals.cpu()[1::2].isnan().all()


PROBE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from streammerge.adapters.onto_base.products import ProductKind
from streammerge.dtypes import DType
from streammerge.engine.accelerator.fused import functions
from streammerge.engine.accelerator.fused.kernels import kernel_of
from streammerge.engine.accelerator.fused.writing import Kind
from streammerge.tiles.program import Majority, Number, Op, Origin, Program, Step, Vote

steps = (
    Step(Op.TASK_VECTOR, 0, 0, c=0), Step(Op.SOURCE, 1, 1), Step(Op.KEEP_RANDOM, 1, 1, c=0, number=0),
    Step(Op.MAJORITY_MEAN, 0, number=1, rows=(0, 1), majority=Majority(Vote.TOTAL, True)),
    Step(Op.SQUARE_ROOT, 1, 0), Step(Op.EXPONENTIAL, 2, 1), Step(Op.LOGARITHM, 1, 2),
    Step(Op.EXPONENTIAL_LESS_ONE, 1, 1), Step(Op.LOGARITHM_OF_ONE_MORE, 1, 1),
    Step(Op.DIVIDE, 1, 1, 2), Step(Op.MINIMUM, 2, 1, 0), Step(Op.DIVIDE, 2, 2, number=0),
    Step(Op.MAXIMUM, 2, 2, number=0), Step(Op.GREATER, 0, 1, number=1), Step(Op.EQUAL, 1, 1, 0),
    Step(Op.AT_LEAST, 0, 0, 1), Step(Op.SELECT, 0, 0, 1, 2), Step(Op.SIGN, 1, 0), Step(Op.FILL, 2, number=2),
    Step(Op.IN_TOP, 0, 0, c=0), Step(Op.ABSOLUTE, 0, 0), Step(Op.ADD_SCALED, 0, 1, 2, number=0),
    Step(Op.BASE, 1), Step(Op.STORE, 0, 0, 1),
)
program = Program(steps, 3, tuple(Number(Origin.CONSTANT, 1.0) for _ in range(6)), (0,), (0,))
TYPES = {DType.F32: "fp32", DType.BF16: "i16", DType.F16: "fp16", DType.F64: "fp64"}

def signature(kernel, stored, pattern):
    found = {}
    for name in kernel.arg_names:
        if name.startswith(("model", "out")):
            found[name] = "*" + stored
        elif name.startswith(("up", "down", "vector")):
            found[name] = "*fp32"
        else:
            found[name] = {"TILE": "constexpr", "constants": "*i64", "lasts": "*i64", "counts": "*i64",
                           "notes": "*" + pattern}.get(name, "i32")
    return found

def compiled(kernel, types, constants, warps):
    options = {"enable_fp_fusion": False, "num_warps": warps}
    source = ASTSource(kernel, types, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

texts = []
for compute, stored in ((DType.F32, DType.BF16), (DType.F32, DType.F16), (DType.F64, DType.F64)):
    products = ((ProductKind.NORMED_ROWS,), (ProductKind.PLACED, ProductKind.NORMED_COLUMNS)) if compute is DType.F32 else ()
    kind = Kind(program, stored, (stored, None), compute, stored, 2, True, True, True, products)
    kernel = kernel_of(kind)
    pattern = "i32" if compute is DType.F32 else "i64"
    texts.append(compiled(kernel, signature(kernel, TYPES[stored], pattern), {"TILE": 2048}, 4))
types = {"a": "*fp32", "b": "*fp32", "totals": "*fp64", "stride": "i32", "numel": "i32", "length": "i32",
         "SQUARES": "constexpr", "UNROLL": "constexpr"}
texts.append(compiled(functions.add_up, types, {"SQUARES": True, "UNROLL": 32}, 1))
json.dump([sorted(set(re.findall(r"^\\t*(?:@%p\\d+ )?([a-z][\\w.:]*)", text, re.M))) for text in texts], sys.stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
def test_compiled_kernels_round_once_per_operation(tmp_path: Path) -> None:
    """No multiplication is fused with a sum, no quotient or root is approximate, nothing is flushed."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]

    for instructions in json.loads(run.stdout):
        words = [set(each.split(".")) for each in instructions]
        assert not [each for each in words if each & {"fma", "ftz", "approx", "full"}]
        floats = [each for each in words if each & {"f32", "f64"} and each & {"div", "sqrt"}]
        assert all("rn" in each for each in floats)
    assert any("div.rn.f32" in each for each in json.loads(run.stdout))
    assert any("sqrt.rn.f64" in each for each in json.loads(run.stdout))
