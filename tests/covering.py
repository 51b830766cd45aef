"""Which cases are tried in which circumstances, where all with all would take long.

What a method does is a program, and what runs programs knows their steps and not the methods. So a
circumstance, like an element type or a device, under which every step and every way to ask about
tensors keeps a law, has nothing left that could break it for another method made of the same steps.
``parts_of`` names what a case is made of; ``cover`` lets every case meet one circumstance, and every
part meet all of them; a step that is new brings its cases with it. ``--runslow`` tries all with all.

What a method computes and keeps is its own: laws about that are asked of every example.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from streammerge.methods import discover_methods
from streammerge.methods.programs import Programs, programs_of

Case = TypeVar("Case")
Kind = TypeVar("Kind")
Parts = frozenset[Hashable]


_all_pairs = False


def try_all_pairs(*, all_pairs: bool) -> None:
    """Let whatever is chosen from now on be all there is; for modules that pytest collects later."""
    global _all_pairs  # noqa: PLW0603 - parameters of tests are made while modules are imported
    _all_pairs = all_pairs


def cover(
    cases: Iterable[Case], kinds: Sequence[Kind], parts_of: Callable[[Case], Parts]
) -> list[tuple[Case, Kind]]:
    """Pair every case with a kind, and every kind with cases that have all parts between them.

    Args:
        cases: What is tried.
        kinds: In which circumstances.
        parts_of: What a case is made of.

    Returns:
        The pairs, those of a case side by side.
    """
    cases = list(cases)
    if _all_pairs:
        return list(itertools.product(cases, kinds))
    parts = [parts_of(case) for case in cases]
    chosen = {(index, index % len(kinds)) for index in range(len(cases))}
    for kind in range(len(kinds)):
        met = {part for index, of in enumerate(parts) if (index, kind) in chosen for part in of}
        # Those with the most parts first, so that few are enough.
        for index in sorted(range(len(cases)), key=lambda index: -len(parts[index])):
            if not parts[index] <= met:
                chosen.add((index, kind))
                met |= parts[index]
    return [(cases[index], kinds[kind]) for index, kind in sorted(chosen)]


def share(
    cases: Iterable[Case],
    kinds: Sequence[Kind],
    parts_of: Callable[[Case], Parts],
    name_of: Callable[[Case], Hashable],
) -> dict[Hashable, list[Kind]]:
    """Return which kinds :func:`cover` pairs with each case, by its name."""
    shares: dict[Hashable, list[Kind]] = {}
    for case, kind in cover(cases, kinds, parts_of):
        shares.setdefault(name_of(case), []).append(kind)
    return shares


def choose(
    cases: Iterable[Case],
    parts_of: Callable[[Case], Parts],
    method_of: Callable[[Case], str],
) -> list[Case]:
    """Return the first case of every method, and others until there is one with every part."""
    cases = list(cases)
    if _all_pairs:
        return cases
    parts = [parts_of(case) for case in cases]
    firsts: dict[str, int] = {}
    for index, case in enumerate(cases):
        firsts.setdefault(method_of(case), index)
    chosen = set(firsts.values())
    met = {part for index in chosen for part in parts[index]}
    for index in sorted(range(len(cases)), key=lambda index: -len(parts[index])):
        if not parts[index] <= met:
            chosen.add(index)
            met |= parts[index]
    return [cases[index] for index in sorted(chosen)]


def programs_with(
    method: str, parameters: dict[str, Any], *, has_base: bool, sources: int = 2
) -> Programs:
    """Return the programs of a method with some parameters.

    Args:
        method: Its name.
        parameters: Those that are given; others have their defaults.
        has_base: Whether there is a base.
        sources: How many sources there are, if the method takes so many.
    """
    found = discover_methods()[method]
    count = sources if found.sources[1] is None else min(sources, found.sources[1])
    values = []
    for spec in found.parameters:
        value = parameters.get(spec.name, spec.default)
        each = value if isinstance(value, tuple) else (value,) * count
        values.append((spec.name, each[:count] if spec.per_source else value))
    return programs_of(found, values, sources=count, has_base=has_base)


def parts_of(method: str, parameters: dict[str, Any], *, has_base: bool, sources: int = 2) -> Parts:
    """Return what a method does to elements, and how it asks about tensors; see :func:`programs_with`."""
    programs = programs_with(method, parameters, has_base=has_base, sources=sources)
    work = programs.work
    steps = {
        (step.op, step.majority, None if step.number < 0 else program.numbers[step.number].origin)
        for program in programs.all
        for step in program.steps
    }
    asked = {
        ("locality", work.locality),
        ("scope", work.scope if work.rounds else None),
        ("rounds", len(work.rounds)),
        ("rounds about rows", len(work.row_rounds)),
        ("ranks within rows", work.row_ranks is not None),
        ("operand", has_base),
    }
    return frozenset(steps | asked)
