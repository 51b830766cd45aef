"""The experiment about methods and scopes: what its table says of what was found."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import (
    DENSITIES,
    TRIMMING,
    Merge,
    compare_scopes,
    list_merges,
    name_of,
    render,
)


def test_every_merge_has_a_name_of_its_own() -> None:
    merges = list(list_merges())

    assert len({name_of(each) for each in merges}) == len(merges)
    assert name_of(Merge("ties", "model", 0.2)) == "ties model 0.2"


def test_models_are_as_far_apart_as_they_differ_beside_what_they_change() -> None:
    base = {"w": torch.zeros(4)}
    made = {}
    for method, scopes in TRIMMING.items():
        for number, scope in enumerate(scopes):
            for density in DENSITIES:
                vector = torch.zeros(4)
                vector[number] = 2.0
                made[Merge(method, scope, density)] = {"w": vector}

    found = compare_scopes(made, base)

    assert all(each == pytest.approx(2**0.5) for each in found.values())
    assert f"distance ties {DENSITIES[0]:g}" in found


def test_a_table_has_means_and_deviations() -> None:
    names = [name_of(each) for each in list_merges()] + ["base", "expert 0-4", "expert 5-9"]
    names += [f"distance {m} {d:g}" for m in ("ties", "magnitude_prune") for d in DENSITIES]
    rows = {name: [0.5, 0.7] for name in names}

    lines = render(rows).splitlines()

    assert lines[1] == "base             60.0% ±14.1%"
    assert sum(line.startswith("ties, ") for line in lines) == 2
