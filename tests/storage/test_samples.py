"""Samples of what lies in stores take few requests, and change no bit of what is merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import Models, assert_same_model, load_model, recut, residence_of
from servers import Server, serving
from stored_models import recipe_at

import streammerge
from streammerge.plan import sweeps
from streammerge.plan.chunking import Residence
from streammerge.storage import copies


def count_ranges(server: Server, recipe: dict[str, object], out: Path, gathered: int) -> list[int]:
    """Merge with little memory; return the bytes of each request for a range of tensors."""
    copies.forget_places()
    plan = recut(streammerge.plan(recipe, memory="3GiB"), slots=4)
    assert scope_of(recipe) == "model" or residence_of(plan, "large") is Residence.STREAMED
    server.requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "_GATHERED_RUNS", gathered)
        streammerge.merge(plan, out)
    found = []
    for path, asked in server.requests:
        if path.endswith(".safetensors"):
            first, last = (int(each) for each in asked.removeprefix("bytes=").split("-"))
            found.append(last - first + 1)
    return found


def scope_of(recipe: dict[str, object]) -> object:
    parameters = recipe["parameters"]
    return isinstance(parameters, dict) and parameters["scope"]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_samples_are_gathered(scope: str, tmp_path: Path) -> None:
    models = Models(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            "large": torch.randn((8 * 512, 512), generator=generator),
            "next": torch.randn((512, 512), generator=generator),
        }
        models.write({key: each.bfloat16() for key, each in tensors.items()}, name)
    with serving(tmp_path) as server:
        recipe = recipe_at(server.address)
        recipe["parameters"] = {"density": 0.3, "scope": scope}
        scattered = count_ranges(server, recipe, tmp_path / "scattered", 1)
        gathered = count_ranges(server, recipe, tmp_path / "gathered", 4)
    recipe = recipe_at(str(tmp_path)) | {"parameters": recipe["parameters"]}
    streammerge.merge(recipe, tmp_path / "local")

    expected = load_model(tmp_path / "local")
    assert_same_model(load_model(tmp_path / "scattered"), expected)
    assert_same_model(load_model(tmp_path / "gathered"), expected)
    short = [sum(nbytes < 2**14 for nbytes in each) for each in (scattered, gathered)]
    # No more elements, in a quarter of the places.
    assert sum(gathered) <= sum(scattered)
    assert short[1] <= short[0] // 3
