"""What models differ in, against plain comparisons; from Python and from the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from models import MEMORY, Models, load_model, write_adapter

import streammerge
from streammerge.cli.arguments import main


def model(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.layers.0.a.weight": (40, 30), "model.layers.1.a.weight": (40, 30), "b": (7,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | more


def diff_of(*paths: Any) -> dict[str, Any]:
    return streammerge.diff(list(paths), memory=MEMORY).document


def test_models_of_the_same_values_are_identical_however_they_are_stored(models: Models) -> None:
    tensors = model(0, ids=torch.arange(5))
    one = models.write(tensors, shards=2)
    other = models.write(tensors, "other.bin", binary=True)

    found = diff_of(one, other)

    assert found["identical"] == ["b", "ids", "model.layers.0.a.weight", "model.layers.1.a.weight"]
    assert found["changed"] == []
    assert not any(found[name]["name"] for name in ("partial", "shapes", "types"))


def test_a_change_has_its_numbers_and_its_place(models: Models) -> None:
    one, other = model(0), model(0)
    other["model.layers.1.a.weight"][3, 4] += 2.0
    other["model.layers.1.a.weight"][5, 6] -= 1.0

    found = diff_of(models.write(one), models.write(other))

    assert found["changed"] == ["model.layers.1.a.weight"]
    table = found["tables"]["tensors"]
    row = table["name"].index("model.layers.1.a.weight")
    change = (other["model.layers.1.a.weight"] - one["model.layers.1.a.weight"]).double()
    assert table["norm.0"][row] == pytest.approx(float(change.norm()), rel=1e-12)
    norm = one["model.layers.1.a.weight"].double().norm()
    assert table["relative.0"][row] == pytest.approx(float(change.norm() / norm), rel=1e-12)
    assert table["unchanged.0"][row] == 1 - 2 / 1200
    assert table["largest.0"][row] == float(change.abs().max())
    assert table["largest_at.0"][row] == 3 * 30 + 4
    assert found["tables"]["model"]["largest_in.0"] == ["model.layers.1.a.weight"]


def test_three_models_have_the_cosine_between_their_changes(models: Models) -> None:
    base = model(0)
    tuned = [
        {name: each + 0.1 * model(seed)[name] for name, each in base.items()} for seed in (1, 2)
    ]

    found = diff_of(models.write(base), *(models.write(each) for each in tuned))

    first, second = (
        torch.cat([(each[name] - base[name]).double().flatten() for name in base]) for each in tuned
    )
    cosine = float(first @ second / first.norm() / second.norm())
    assert found["tables"]["model"]["cosine.0.1"][0] == pytest.approx(cosine, rel=1e-9)


def test_tensors_that_only_some_have_are_compared_among_those(models: Models) -> None:
    base, one, other = model(0, x=torch.zeros(9)), model(0, x=torch.ones(9)), model(0)
    other["new"] = torch.ones(2)

    found = diff_of(models.write(base), models.write(one), models.write(other))

    assert found["partial"] == {
        "name": ["new", "x"],
        "only_in": [["models[2]"], ["models[0]", "models[1]"]],
    }
    assert found["changed"] == ["x"]
    table = found["tables"]["tensors"]
    row = table["name"].index("x")
    assert table["norm.0"][row] == 3.0
    assert table["norm.1"][row] is None


def test_other_shapes_and_types_are_named(models: Models) -> None:
    base = model(0, x=torch.zeros(4, 2), y=torch.arange(3).float())
    other = model(0, x=torch.zeros(4, 3), y=torch.arange(3).bfloat16())

    found = diff_of(models.write(base), models.write(other))

    assert found["shapes"] == {"name": ["x"], "shapes": [[[4, 2], [4, 3]]]}
    assert found["types"] == {"name": ["y"], "types": [["F32", "BF16"]]}
    assert "y" in found["identical"]
    assert "x" not in found["identical"] + found["changed"]


@pytest.mark.parametrize("more", [0, 1])
def test_integers_are_compared_by_their_bytes(more: int, models: Models) -> None:
    one, other = (model(0, ids=torch.arange(400_000)) for _ in range(2))
    other["ids"][399_999] += more

    found = diff_of(models.write(one), models.write(other))

    assert "ids" in found["changed" if more else "identical"]
    assert "ids" not in found["identical" if more else "changed"]


def test_adapters_alone_are_compared_by_their_files(models: Models) -> None:
    one, other = (
        write_adapter(models.root / f"adapter{seed}", {"m.weight": (8, 6)}, seed=seed)
        for seed in (1, 2)
    )

    found = diff_of(one, other)

    names = ["base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"]
    assert found["changed"] == names
    factors = [load_model(each)[names[0]].double() for each in (one, other)]
    table = found["tables"]["tensors"]
    norm = float((factors[1] - factors[0]).norm())
    assert table["norm.0"][table["name"].index(names[0])] == pytest.approx(norm, rel=1e-6)


def test_an_adapter_after_a_model_is_what_it_makes_of_it(models: Models) -> None:
    name = "model.layers.0.a.weight"
    adapter = write_adapter(models.root / "adapter", {name: (40, 30)}, seed=1)

    found = diff_of(models.write(model(0)), adapter)

    assert found["changed"] == [name]


def test_a_model_after_an_adapter_is_refused(models: Models) -> None:
    adapter = write_adapter(models.root / "adapter", {"b.weight": (4, 4)}, seed=1)

    with pytest.raises(streammerge.StreamMergeError, match="name the model first"):
        diff_of(adapter, models.write(model(0)))


def test_one_model_is_nothing_to_compare(models: Models) -> None:
    with pytest.raises(ValueError, match="two or more"):
        diff_of(models.write(model(0)))


def test_models_without_a_tensor_in_common_are_no_error(models: Models) -> None:
    found = diff_of(models.write({"a": torch.ones(2)}), models.write({"b": torch.ones(2)}))

    assert found["identical"] == found["changed"] == []
    assert found["partial"]["name"] == ["a", "b"]


def test_what_is_not_finite_is_named(models: Models) -> None:
    one, other = model(0), model(0)
    other["b"][2] = torch.nan

    with pytest.raises(streammerge.StreamMergeError, match=r"b: .* holds nan at"):
        diff_of(models.write(one), models.write(other))


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    code = main([*map(str, words), "--memory", MEMORY])
    return code, capsys.readouterr().out


def test_the_exit_code_tells_scripts_whether_models_differ(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    one, same, other = models.write(model(0)), models.write(model(0)), models.write(model(1))

    assert run(capsys, "diff", one, same)[0] == 0
    code, text = run(capsys, "diff", one, other)
    assert code == 1
    assert "0 tensor(s) identical, 3 changed" in text
    assert "largest change of models[1]" in text
    assert run(capsys, "diff", one, models.write(model(0, more=torch.ones(1))))[0] == 1
    assert run(capsys, "diff", one, models.root / "nowhere")[0] == 1


def test_a_comparison_is_json_on_request(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [models.write(model(seed)) for seed in (0, 1)]

    code, text = run(capsys, "diff", *paths, "--json")

    assert code == 1
    assert json.loads(text) == json.loads(streammerge.diff(paths, memory=MEMORY).as_json())


def test_an_analysis_is_text_and_json(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [models.write(model(seed)) for seed in range(3)]
    words = ["analyze", "--method", "ties", "-p", "density=0.3", "--base", *paths, "--quiet"]

    code, text = run(capsys, *words)
    assert code == 0
    assert "conflicts" in text
    assert "sources[1]" in text
    recipe = models.root / "recipe.json"
    recipe.write_text(
        json.dumps({"method": "linear", "sources": [{"path": str(each)} for each in paths]})
    )
    code, text = run(capsys, "analyze", recipe, "--json")
    assert code == 0
    assert json.loads(text)["kind"] == "analysis"


def test_a_comparison_is_a_page_on_request_and_nothing_is_overwritten(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vl_convert", reason="pip install 'streammerge[report]'")
    paths = [models.write(model(seed)) for seed in (0, 1)]
    page = models.root / "page.html"

    assert run(capsys, "diff", *paths, "--page", page)[0] == 1
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert run(capsys, "diff", *paths, "--page", page)[0] == 4
    assert page.read_text() == text
