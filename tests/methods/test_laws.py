"""What holds for every method, on each of its examples.

Nothing here knows a method by name. A method that cannot keep a law declares it with the reason; a
test fails when the waiver is no longer needed.

The models are small, but two tensors span several blocks, so that tiny buffers give many chunks.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import Parts, choose, cover, parts_of, share
from models import (
    BLOCK,
    Models,
    Tensors,
    assert_same_bits,
    assert_same_model,
    recipe_of,
    recut,
    residence_of,
    tight_plan,
    without_kernels,
    write_model,
    write_shard_in_order,
)
from oracles import IN_MEMORY, apply_to_whole_tensors, merge_in_memory

import streammerge
from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.methods import discover_methods
from streammerge.methods.base import Law, Operand, Scope
from streammerge.methods.programs import programs_of
from streammerge.plan.chunking import Residence
from streammerge.plan.sweeps import asks as statistics_ask
from streammerge.plan.types import MergePlan

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
SHAPES = {
    "z.grid": (3, BLOCK + 37),  # not a whole number of blocks, nor its rows
    "m.smooth": (128, 2048),  # exactly a block, and decomposed at once
    "column": (9, 1),
    "empty": (0,),
    "one": (1,),
    "scalar": (),
    "zeros": (300,),
    "a.small": (7, 5),
}

WAIVERS = [
    pytest.param(law, method.name, id=f"{method.name}-{law}")
    for method in discover_methods().values()
    for law in method.waived
]


@dataclass(frozen=True)
class Case:
    """One example of one method."""

    method: str
    number: int
    parameters: dict[str, Any]
    has_base: bool = True
    """Whether there is a base; methods without task vectors have none."""

    @property
    def id(self) -> str:
        based = discover_methods()[self.method].operand is Operand.EITHER
        return f"{self.method}-{self.number}{'-base' if based and self.has_base else ''}"

    def of(self, count: int) -> int:
        """Return how many sources to merge where a test has so many."""
        most = discover_methods()[self.method].sources[1]
        return count if most is None else min(count, most)

    def parameter(self, name: str) -> Any:
        for spec in discover_methods()[self.method].parameters:
            if spec.name == name:
                return self.parameters.get(name, spec.default)
        return None

    @property
    def on_tasks(self) -> bool:
        return self.has_base

    @property
    def parts(self) -> Parts:
        return parts_of(self.method, self.parameters, has_base=self.has_base)

    @property
    def random(self) -> bool:
        return discover_methods()[self.method].random

    def recipe(self, base: Path, sources: list[Path], **document: Any) -> dict[str, Any]:
        return recipe_of(
            self.method,
            base if self.on_tasks else None,
            sources[: self.of(len(sources))],
            parameters=self.parameters,
            **document,
        )


BASES = {
    Operand.WEIGHTS: (False,),
    Operand.TASK_VECTORS: (True,),
    Operand.EITHER: (True, False),
}
CASES = [
    Case(method.name, number, example, has_base)
    for method in discover_methods().values()
    for number, example in enumerate(method.examples)
    for has_base in BASES[method.operand]
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def waived(law: Law, case: Case) -> None:
    """Skip a method that declares that it breaks this law."""
    reason = discover_methods()[case.method].waived.get(law)
    if reason is not None:
        pytest.skip(reason)


def draw(dtype: torch.dtype, sources: int = 2) -> list[Tensors]:
    """Return a base and its sources: one tensor full of equal magnitudes, the others smooth."""
    generator = torch.Generator().manual_seed(7)

    def values(name: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        if name == "zeros":
            return torch.zeros(shape)
        if name == "z.grid":
            # Sixteenths: exact in every dtype, also after a subtraction.
            return torch.randint(-24, 25, shape, generator=generator) / 16
        return torch.randn(shape, generator=generator) * scale

    base = {name: values(name, shape, 1.0) for name, shape in SHAPES.items()}
    tuned = [{n: t + values(n, SHAPES[n], 0.25) for n, t in base.items()} for _ in range(sources)]
    return [{name: tensor.to(dtype) for name, tensor in model.items()} for model in [base, *tuned]]


def asks(case: Case) -> bool:
    """Return whether a case asks about the tensors that span several blocks."""
    method = discover_methods()[case.method]
    n = case.of(2)
    programs = programs_of(method, values_of(case).items(), sources=n, has_base=case.has_base)
    numel = SHAPES["z.grid"][0] * SHAPES["z.grid"][1]
    needs = bool(programs.rounds) and programs.work.scope is Scope.TENSOR
    return needs and statistics_ask(programs, numel)


def keeps_base(case: Case) -> bool:
    """Return whether a case's parameters leave what all sources share."""
    method = discover_methods()[case.method]
    return method.keeps_base(method.bind(values_of(case).items()))


def values_of(case: Case) -> dict[str, Any]:
    """Return all parameters of a case, those of sources one by one."""
    n = case.of(2)
    return {
        spec.name: value if isinstance(value, tuple) or not spec.per_source else (value,) * n
        for spec in discover_methods()[case.method].parameters
        for value in [case.parameter(spec.name)]
    }


def is_plain(case: Case) -> bool:
    """Return whether a case has but those parameters that the functions in memory know."""
    known = {"weight", "density", "majority_sign_method", "scope", "tie_policy", "normalize"}
    return case.parameters.keys() <= known


@dataclass(frozen=True)
class Stored:
    """The same models on disk in two ways."""

    tensors: list[Tensors]
    plain: list[Path]
    """One file each, tensors in the order that safetensors prefers."""
    resharded: list[Path]
    """Three shards, one file in reverse order, two shards: different for every model."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    """Return the models of every dtype."""
    found = {}
    for name, dtype in DTYPES.items():
        root = tmp_path_factory.mktemp(name)
        models = draw(dtype)
        base, first, second = models
        found[name] = Stored(
            models,
            [write_model(root / f"plain{index}", model) for index, model in enumerate(models)],
            [
                write_model(root / "shards3", base, shards=3, layout="reversed"),
                write_shard_in_order(
                    root / "reverse.safetensors", dict(reversed(list(first.items())))
                ),
                write_model(root / "shards2", second, shards=2, layout="interleaved"),
            ],
        )
    return found


@dataclass(frozen=True)
class Reference:
    """One case in one dtype, merged in the plainest way: all in memory, one worker."""

    case: Case
    dtype: str
    stored: Stored
    document: dict[str, Any]
    merged: Tensors


IN_TYPES = cover(CASES, list(DTYPES), lambda case: case.parts)
CUTS = share(
    IN_TYPES,
    ["tightest", "resharded", "kept", "two blocks", "without kernels"],
    lambda pair: pair[0].parts | {("dtype", pair[1])},
    lambda pair: (pair[0].id, pair[1]),
)
"""How each case in each type is merged once more."""


@pytest.fixture(
    scope="module",
    params=IN_TYPES,
    ids=lambda param: f"{param[0].id}-{param[1]}",
)
def reference(
    request: pytest.FixtureRequest,
    stored: dict[str, Stored],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Reference]:
    """Return every case, merged once for all tests on it; every step of programs in every dtype."""
    case, dtype = request.param
    document = {"compute_dtype": "float64"} if dtype == "float64" else {}
    base, *sources = stored[dtype].plain
    recipe = case.recipe(base, sources, **document)
    merged, _ = Models(tmp_path_factory.mktemp("reference")).merge(recipe, workers=1)
    return Reference(case, dtype, stored[dtype], document, merged)


def test_output_bytes_depend_on_nothing_but_recipe_and_inputs(
    reference: Reference, models: Models
) -> None:
    """Budgets, buffers, threads, byte sources, sharding and compiled kernels change no bit."""
    case, document = reference.case, reference.document
    base, *sources = reference.stored.plain
    recipe = case.recipe(base, sources, **document)
    plan = streammerge.plan(recipe, memory="3GiB", workers=3)
    n_models = case.of(2) + case.on_tasks
    # The smallest cut: one chunk of one block per input, and no room to collect magnitudes.
    tightest = recut(plan, slots=n_models, workers=1, statistics_bytes=1)
    kept = recut(plan, slots=8 * n_models, workers=4, output_slots=5)
    two_blocks = recut(plan, slots=2 * n_models - 1, slot_blocks=2, workers=2)
    if asks(case):
        assert residence_of(tightest, "z.grid") is Residence.STREAMED
        if not any(task.row for task in plan.tasks):
            # Buffers that hold the ends of its rows as well hold all of it.
            assert residence_of(two_blocks, "z.grid") is Residence.STREAMED
        assert residence_of(kept, "z.grid") is Residence.RESIDENT
    base, *sources = reference.stored.resharded
    resharded = case.recipe(base, sources, output={"max_shard_size": BLOCK * 4}, **document)
    variants: dict[str, tuple[Callable[[], MergePlan], dict[str, Any]]] = {
        "tightest": (lambda: tightest, {}),
        # All at once: the smallest budget, files cut otherwise on both sides.
        "resharded": (lambda: tight_plan(resharded, workers=2), {}),
        "kept": (lambda: kept, {"byte_source": ByteSourceKind.MMAP}),
        "two blocks": (lambda: two_blocks, {}),
        "without kernels": (lambda: tightest, {}),
    }
    for what in CUTS[case.id, reference.dtype]:
        asked, options = variants[what]
        with without_kernels() if what == "without kernels" else contextlib.nullcontext():
            merged, _ = models.merge(asked(), **options)
        assert sorted(merged) == sorted(reference.merged)
        for name, tensor in reference.merged.items():
            assert_same_bits(merged[name], tensor, f"{what}: {name}")


def test_streaming_equals_whole_tensors_in_memory(reference: Reference) -> None:
    """Against the method's own function on one chunk per tensor, and against functional's."""
    case = reference.case
    base, *sources = reference.stored.tensors
    compute = torch.float64 if reference.dtype == "float64" else torch.float32
    sources = sources[: case.of(2)]
    whole = apply_to_whole_tensors(
        case.method,
        base,
        sources,
        case.parameters,
        compute_dtype=compute,
        has_base=case.on_tasks,
    )
    assert_same_model(reference.merged, whole)
    if case.method in IN_MEMORY and is_plain(case):
        plain = merge_in_memory(
            case.method,
            base if case.on_tasks else None,
            sources,
            case.parameters,
            compute_dtype=compute,
        )
        assert_same_model(reference.merged, plain)


@pytest.mark.parametrize(
    "case",
    choose(CASES, lambda case: case.parts, lambda case: case.method),
    ids=lambda case: case.id,
)
def test_inputs_are_unmodified(case: Case, models: Models) -> None:
    paths = [models.write(tensors) / "model.safetensors" for tensors in draw(torch.float16)]

    def state() -> list[tuple[str, int, int]]:
        return [
            (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns, p.stat().st_size)
            for p in paths
        ]

    before = state()
    # Mapped, what a method wrote into its operands would be written into files.
    models.merge(case.recipe(paths[0], paths[1:]), byte_source=ByteSourceKind.MMAP)

    assert state() == before


def fixed_point(case: Case, models: Models, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Merge a model with itself; returns the result and what it should be."""
    base = {name: tensor.clone() for name, tensor in draw(dtype, sources=0)[0].items()}
    for tensor in base.values():
        # A sum starts from +0.0, so that -0.0 comes back as +0.0, here as in torch.
        tensor[tensor == 0] = 0.0
    path = models.write(base)
    merged, _ = models.merge(case.recipe(path, [path, path]))
    return merged, base


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.id}-{dtype}")
        for case, dtype in cover(CASES, ["float32", "bfloat16"], lambda case: case.parts)
    ],
)
def test_sources_equal_to_the_base_give_the_base(case: Case, dtype: str, models: Models) -> None:
    if dtype == "float32":
        waived(Law.FIXED_POINT, case)
    if not keeps_base(case):
        pytest.skip("its parameters do not add up to one")
    merged, base = fixed_point(case, models, DTYPES[dtype])

    assert_same_model(merged, base)


def dyadic(sources: int) -> list[Tensors]:
    """Return a base of zeros and sources: one smooth tensor, and one with ties everywhere.

    The values are multiples of 2^-12, so that sums of a few are exact in any order.
    """
    generator = torch.Generator().manual_seed(11)
    models: list[Tensors] = [{"smooth": torch.zeros(BLOCK + 99), "grid": torch.zeros(2000)}]
    for _ in range(sources):
        smooth = (torch.randn(BLOCK + 99, generator=generator) * 4096).round() / 4096
        grid = torch.randint(-3, 4, (2000,), generator=generator) / 4
        models.append({"smooth": smooth, "grid": grid})
    return models


def scaled(case: Case, models: Models, factor: float) -> tuple[Tensors, Tensors]:
    """Merge sources over a zero base as they are, then times ``factor``; returns both results."""
    base, *sources = dyadic(case.of(2))
    base_path = models.write(base)
    results = []
    for scale in (1.0, factor):
        paths = [models.write({k: t * scale for k, t in each.items()}) for each in sources]
        results.append(models.merge(case.recipe(base_path, paths))[0])
    return results[0], results[1]


@every_case
def test_doubled_task_vectors_double_the_change(case: Case, models: Models) -> None:
    """A power of two scales every rounding with it."""
    waived(Law.SCALING, case)
    once, twice = scaled(case, models, 2.0)

    assert_same_model(twice, {name: tensor * 2 for name, tensor in once.items()})


@every_case
def test_negated_task_vectors_negate_the_change(case: Case, models: Models) -> None:
    waived(Law.NEGATION, case)
    plus, minus = scaled(case, models, -1.0)

    # Adding +0.0 turns -0.0 into the +0.0 that every sum has.
    assert_same_model(
        {name: tensor + 0.0 for name, tensor in minus.items()},
        {name: -tensor + 0.0 for name, tensor in plus.items()},
    )


def reordered(case: Case, models: Models) -> tuple[Tensors, Tensors]:
    """Merge in two orders of the sources, parameters moving with them; returns both results."""
    lists = [len(v) for v in case.parameters.values() if isinstance(v, tuple)]
    n_sources = lists[0] if lists else case.of(3)
    paths = [models.write(tensors) for tensors in dyadic(n_sources)]
    order = [n_sources - 1, *range(n_sources - 1)]
    moved = {
        name: tuple(value[index] for index in order) if isinstance(value, tuple) else value
        for name, value in case.parameters.items()
    }
    straight, _ = models.merge(case.recipe(paths[0], paths[1:]))
    turned, _ = models.merge(
        replace(case, parameters=moved).recipe(paths[0], [paths[1 + index] for index in order])
    )
    return straight, turned


@every_case
def test_the_order_of_sources_does_not_matter_but_for_rounding(case: Case, models: Models) -> None:
    waived(Law.ORDER, case)
    straight, turned = reordered(case, models)

    for name, tensor in straight.items():
        torch.testing.assert_close(turned[name], tensor, rtol=1e-6, atol=1e-6)


@every_case
def test_the_seed_decides_the_bits_of_random_methods_alone(case: Case, models: Models) -> None:
    base, *sources = [models.write(tensors) for tensors in dyadic(case.of(2))]
    first, other = 3, 2**64 - 1
    merged = [
        models.merge(case.recipe(base, sources, seed=seed))[0]["smooth"]
        for seed in (first, *(first,) * case.random, other)
    ]

    if case.random:
        assert_same_bits(merged[1], merged[0])
    density = case.parameter("density")
    densities = density if isinstance(density, tuple) else (density,)
    drops_some = case.random and any(0 < each < 1 for each in densities)
    assert torch.equal(merged[-1], merged[0]) is not drops_some


def with_densities() -> Iterator[Case]:
    """Yield the examples that still differ when all have the same density."""
    seen = set()
    for case in CASES:
        rest = (case.method, *sorted((case.parameters | {"density": 0}).items()))
        if case.parameter("density") is not None and rest not in seen:
            seen.add(rest)
            yield case


@pytest.mark.parametrize("case", with_densities(), ids=lambda case: case.id)
def test_density_zero_keeps_the_base_and_density_one_everything(case: Case, models: Models) -> None:
    tensors = dyadic(2)
    base, *sources = [models.write(each) for each in tensors]

    def at(density: float) -> tuple[Tensors, Any]:
        changed = replace(case, parameters=case.parameters | {"density": density})
        return models.merge(changed.recipe(base, sources))

    nothing, manifest = at(0.0)
    assert_same_model(nothing, tensors[0])
    assert {record.density for record in manifest.tensors.values()} == {(0.0, 0.0)}
    everything, manifest = at(1.0)
    whole = apply_to_whole_tensors(
        case.method, tensors[0], tensors[1:], case.parameters | {"density": 1.0}
    )
    assert_same_model(everything, whole)
    assert {record.density for record in manifest.tensors.values()} == {(1.0, 1.0)}


@pytest.mark.parametrize(("law", "method"), WAIVERS)
def test_every_waiver_is_still_needed(law: Law, method: str, tmp_path: Path) -> None:
    broken = False
    for case in (case for case in CASES if case.method == method):
        models = Models(tmp_path / case.id)
        if law in (Law.NEGATION, Law.SCALING):
            factor = -1.0 if law is Law.NEGATION else 2.0
            once, again = scaled(case, models, factor)
            broken |= any(not torch.equal(again[name], once[name] * factor) for name in once)
        elif law is Law.ORDER:
            straight, turned = reordered(case, models)
            broken |= any(not torch.allclose(turned[name], straight[name]) for name in straight)
        elif keeps_base(case):
            merged, base = fixed_point(case, models, torch.float32)
            broken |= any(not torch.equal(merged[name], base[name]) for name in base)
    assert broken
