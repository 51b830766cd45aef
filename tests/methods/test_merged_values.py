"""Merged files hold what the twins compute in memory, for every method and all its definitions.

The values are float32 numbers whose differences are, too, so that what is trimmed is the same in
float32 and float64. Each model holds every shape with every kind of data that is particular, since
what happens to a tensor depends on no other, but under ``scope: model``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import Parts, cover, parts_of
from models import BLOCK, Models, recipe_of, write_model
from twins.calling import TWINS, Grid, Twin, ask_mergekit, merge_models
from twins.shapes import Array

from streammerge.methods import discover_methods
from streammerge.methods.base import MergeMethod, Operand
from streammerge.recipe.types import Semantics
from streammerge.rng import keep_mask_by, stream_key

SHAPES = ((), (0,), (1,), (5, 1), (1, 5), (7, 5), (2, 3, 4), (2, 0, 3))
LARGE = ((BLOCK + 99,), (3, BLOCK // 2 + 1))
"""Several blocks that are not whole, and rows that end within blocks."""
SEED = 7
TOLERANCES = {"float64": 1e-12, "float32": 1e-5}
"""Of the largest magnitude among a tensor's inputs and its result."""
LEAST_CHANGE = 2.0**-19
"""Below any change of an entry that is chosen, and above what rounding makes of none."""


def draw(shape: tuple[int, ...], seed: int, grid: Grid) -> Array:
    """Return values whose sums of a few are exact in float32.

    Squares of the coarse ones are, too, and means of three and five, of which they are multiples.
    """
    generator = np.random.default_rng([seed, *shape])
    if grid == "coarse":
        return generator.integers(-20, 21, shape) * (15 / 64)
    values = generator.standard_normal(shape).clip(-4, 4) * (0.25 if grid == "small" else 1.0)
    return np.asarray(np.round(values * 2.0**12) / 2.0**12)


def make_inputs(shape: tuple[int, ...], count: int, grid: Grid) -> dict[str, list[Array]]:
    """Return bases, each with its sources, by what is particular about them."""
    base, *others = (draw(shape, seed, grid) for seed in range(count + 1))
    one, zeros = others[0], np.zeros(shape)
    signs = [(-1.0) ** source for source in range(count)]
    return {
        "any": [base, *others],
        "identical": [base, *[one] * count],
        "opposite": [zeros, *(sign * one for sign in signs)],
        "opposite task vectors": [base, *(base + sign * one for sign in signs)],
        "opposite the base": [base, *[-base] * count],
        "the base": [base, *[base] * count],
        "the base and others": [base, base, *others[1:]],
        "the last zero": [base, *others[1:], zeros],
        "zeros": [zeros, *[zeros] * count],
    }


def make_models(count: int, grid: Grid, *, large: bool) -> list[dict[str, Array]]:
    """Return a base and so many sources."""
    models: list[dict[str, Array]] = [{} for _ in range(count + 1)]
    for shape in SHAPES:
        for label, tensors in make_inputs(shape, count, grid).items():
            for model, tensor in zip(models, tensors, strict=True):
                model[f"{label} {shape}"] = tensor
    for shape in LARGE if large else ():
        for seed, model in enumerate(models):
            model[f"large {shape}"] = draw(shape, seed, grid)
    return models


@dataclass(frozen=True)
class Case:
    """A method with some parameters, under one definition, of a number of sources."""

    method: MergeMethod
    semantics: Semantics
    parameters: Mapping[str, Any]
    count: int
    has_base: bool

    @property
    def id(self) -> str:
        said = ",".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.method.name}-{self.semantics}-{self.count}{'-base' * self.has_base}-{said.replace(' ', '')}"

    @property
    def refused(self) -> bool:
        """Whether the method refuses what these semantics make of the parameters."""
        values = []
        for spec in self.method.parameters:
            value = self.parameters.get(spec.name, spec.default_of(self.semantics))
            each = value[: self.count] if isinstance(value, tuple) else (value,) * self.count
            values.append((spec.name, each if spec.per_source else value))
        return self.method.refuse(self.method.bind(values)) is not None

    @property
    def twin(self) -> Twin:
        return TWINS[self.method.name]

    def recipe(self, paths: list[Path], **document: Any) -> dict[str, Any]:
        # A list has a value for each source.
        cut = {
            name: value[: self.count] if isinstance(value, tuple) else value
            for name, value in self.parameters.items()
        }
        return recipe_of(
            self.method.name,
            paths[0] if self.has_base else None,
            paths[1 : 1 + self.count],
            parameters=cut,
            semantics=self.semantics.value,
            seed=SEED,
            **document,
        )


def cases() -> Iterator[Case]:
    """Yield all that is tried: every definition of a method, with all parameters.

    Of the first definition also examples with every number of sources. Parameters beside those are tried
    with an even and an odd number, since how a parameter enters a formula is the same for any number,
    but votes of two can be undecided.
    """
    for method in discover_methods().values():
        twin = TWINS.get(method.name)
        for semantics in method.semantics if twin is not None else ():
            for parameters in unique(
                [*method.examples, *twin.tries, *({},) * can_be_empty(method)]
            ):
                given = {len(v) for v in parameters.values() if isinstance(v, tuple)} - {5}
                counts = given or set(twin.counts)
                if parameters not in method.examples and len(counts) > 2:
                    counts = {2, 3} & counts
                if semantics is not method.semantics[0]:
                    counts = {max(count for count in counts if count <= 3)}
                for count in sorted(counts):
                    for has_base in bases(method):
                        case = Case(method, semantics, parameters, count, has_base)
                        if not case.refused:
                            yield case


def unique(tries: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({repr(sorted(each.items())): each for each in tries}.values())


def can_be_empty(method: MergeMethod) -> bool:
    return all(spec.default is not None for spec in method.parameters)


def bases(method: MergeMethod) -> tuple[bool, ...]:
    if method.operand is Operand.EITHER:
        return (True, False)
    return (method.operand is Operand.TASK_VECTORS,)


@dataclass(frozen=True)
class Stored:
    """The same models in memory, and as files of both types."""

    arrays: list[dict[str, Array]]
    paths: dict[str, list[Path]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Stored]:
    made: dict[tuple[int, Grid, bool], Stored] = {}

    def store(case: Case) -> Stored:
        # What a parameter means does not depend on how many blocks there are; that blocks join is a
        # law of its own, for every example.
        by_example = case.parameters in case.method.examples
        large = case.count == 2 and by_example and not case.twin.small_only
        key = (case.count, case.twin.grid, large)
        if key not in made:
            root = tmp_path_factory.mktemp("models")
            arrays = make_models(case.count, case.twin.grid, large=large)
            paths = {
                dtype: [
                    write_model(root / f"{dtype}{index}", as_tensors(model, dtype))
                    for index, model in enumerate(arrays)
                ]
                for dtype in TOLERANCES
            }
            made[key] = Stored(arrays, paths)
        return made[key]

    return store


def as_tensors(model: Mapping[str, Array], dtype: str) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(a, dtype=getattr(torch, dtype)) for name, a in model.items()}


def keep_at_random(name: str) -> Callable[[int, Array], Array]:
    """Return what draws the masks that a merge draws for one tensor."""

    def keep(source: int, chances: Array) -> Array:
        mask = keep_mask_by(stream_key(SEED, source, name), 0, chances.ravel())
        return np.asarray(mask.reshape(chances.shape), np.float64)

    return keep


def skip_unknown(case: Case) -> None:
    """Skip what a twin can do and no method yet."""
    known = {spec.name for spec in case.method.parameters}
    if unknown := case.parameters.keys() - known:
        pytest.skip(f"{case.method.name} has no parameter {min(unknown)}")


def test_every_method_has_a_twin() -> None:
    missing = set(discover_methods()) - set(TWINS)
    assert not missing, "TWINS in tests/twins/calling.py has a row for each"


def parts_of_case(case: Case) -> Parts:
    parts = parts_of(
        case.method.name, dict(case.parameters), has_base=case.has_base, sources=case.count
    )
    return parts | {("sources", case.count), ("semantics", case.semantics)}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.id}-{dtype}")
        for case, dtype in cover(cases(), list(TOLERANCES), parts_of_case)
    ],
)
def test_merged_files_hold_what_the_twins_compute(
    case: Case, dtype: str, stored: Callable[[Case], Stored], models: Models
) -> None:
    skip_unknown(case)
    inputs = stored(case)
    base, *sources = inputs.arrays
    expected = merge_models(
        case.twin,
        base if case.has_base else None,
        sources,
        case.parameters,
        semantics=case.semantics.value,
        draw=keep_at_random,
    )
    merged, _ = models.merge(case.recipe(inputs.paths[dtype], compute_dtype=dtype))
    assert sorted(merged) == sorted(expected)
    for name, values in expected.items():
        actual = merged[name].to(torch.float64).numpy()
        what = f"{name} in {dtype}"
        allowed = TOLERANCES[dtype] * case.twin.loosely
        check_values(actual, values, [model[name] for model in inputs.arrays], allowed, what)
        if case.twin.chooses:
            check_chosen(actual - base[name], values - base[name], what)


def of_mergekit() -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yield what mergekit can be asked for, with its parameters."""
    for case in cases():
        given = ask_mergekit(case.twin, case.parameters, case.count)
        if case.semantics is Semantics.MERGEKIT and given is not None:
            yield case, given


def make_like_finetunes(count: int, step: float) -> list[dict[str, Array]]:
    """Return a base and sources whose task vectors hardly have two entries of one magnitude."""
    models: list[dict[str, Array]] = []
    for seed in range(count + 1):
        generator = np.random.default_rng([77, seed])
        values = {str(shape): generator.standard_normal(shape) for shape in OF_MERGEKIT}
        models.append({n: np.round(v.clip(-7, 7) / step) * step for n, v in values.items()})
    return models


OF_MERGEKIT = ((), (1,), (5,), (5, 1), (1, 5), (7, 5), (2, 3, 4), (40, 250))


def ask(case: Case, inputs: list[torch.Tensor], given: dict[str, Any]) -> Array:
    from mergekit.merge_methods import merge_tensors

    tensors = inputs if case.has_base else inputs[1:]
    index = 0 if case.has_base else None
    merged = merge_tensors(tensors, case.method.name, parameters=given, base_index=index)
    # Of bfloat16 it makes float32 now and then.
    return merged.to(inputs[0].dtype).to(torch.float64).numpy()


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")
@pytest.mark.parametrize(
    ("case", "given"), [pytest.param(*each, id=each[0].id) for each in of_mergekit()]
)
def test_merged_files_hold_what_mergekit_computes(
    case: Case, given: dict[str, Any], models: Models
) -> None:
    """In float64 on both sides; mergekit ranks magnitudes in float32, which these values are."""
    skip_unknown(case)
    inputs = make_like_finetunes(case.count, 2.0**-16)
    paths = [models.write(as_tensors(model, "float64")) for model in inputs]

    merged, _ = models.merge(case.recipe(paths, compute_dtype="float64"))

    for name, tensor in merged.items():
        expected = ask(case, [torch.tensor(model[name]) for model in inputs], given)
        tolerance = 2e-7 if case.twin.coarsely else 1e-12 * case.twin.loosely
        check_values(tensor.numpy(), expected, [model[name] for model in inputs], tolerance, name)


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")
@pytest.mark.parametrize(
    ("case", "given"), [pytest.param(*each, id=each[0].id) for each in of_mergekit()]
)
def test_merged_bfloat16_is_no_farther_from_float64_than_mergekits(
    case: Case, given: dict[str, Any], models: Models
) -> None:
    skip_unknown(case)
    tensors = [as_tensors(model, "bfloat16") for model in make_like_finetunes(case.count, 2.0**-4)]
    inputs = [{name: t.to(torch.float64).numpy() for name, t in each.items()} for each in tensors]
    paths = [models.write(each) for each in tensors]

    merged, _ = models.merge(case.recipe(paths))

    base, *sources = inputs
    exact = merge_models(
        case.twin,
        base if case.has_base else None,
        sources,
        case.parameters,
        semantics=case.semantics.value,
        draw=keep_at_random,
    )
    for name, tensor in merged.items():
        theirs = np.abs(ask(case, [each[name] for each in tensors], given) - exact[name])
        ours = np.abs(tensor.to(torch.float64).numpy() - exact[name])
        assert np.max(ours) <= np.max(theirs), name
        assert np.mean(ours) <= np.mean(theirs), name


def check_values(
    actual: Array, expected: Array, inputs: list[Array], tolerance: float, what: str
) -> None:
    assert actual.shape == expected.shape, what
    assert np.isfinite(actual).all(), what
    scale = max(np.max(np.abs(each), initial=0.0) for each in (expected, *inputs))
    off = float(np.max(np.abs(actual - expected), initial=0.0))
    assert off <= tolerance * scale, f"{what}: off by {off:.3g}, with values up to {scale:.3g}"


def check_chosen(actual: Array, expected: Array, what: str) -> None:
    """Check that the same entries change, however little."""
    differing = (np.abs(actual) > LEAST_CHANGE) != (np.abs(expected) > LEAST_CHANGE)
    assert not differing.any(), f"{what}: {np.argwhere(differing)[:5].tolist()} are chosen by one"
