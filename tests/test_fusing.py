"""Results that are computed where they are read: the same bytes as those that are written first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from adapters import tiny
from models import Models, Tensors, assert_same_model, load_model, recut, write_adapter

from streammerge.chaining import foreseeing, running
from streammerge.chaining.foreseeing import plan_chain
from streammerge.chaining.running import merge_chain
from streammerge.chaining.stages import Chain, read_recipes
from streammerge.cli.arguments import main
from streammerge.engine import computing
from streammerge.errors import CheckpointError, MemoryBudgetError, NonFiniteError, RecipeError
from streammerge.methods import discover_methods
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.run import merge
from streammerge.statistics import BLOCK

NAMES = ("base", "a", "b", "c")


def draw(seed: int) -> Tensors:
    """Return a model with tensors of less than a block, of several, and of types that are copied."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model.embed_tokens.weight": normal(300, 64).bfloat16(),
        "model.layers.0.mlp.weight": normal(1024, 1300).bfloat16(),
        "model.layers.0.norm.weight": normal(64),
        "model.layers.1.mlp.weight": normal(1024, 1300).bfloat16(),
        "model.layers.1.norm.weight": normal(64),
        "model.steps": torch.arange(5),
        "model.nothing": torch.empty((0, 4)),
        "model.one": normal().half(),
    }


@pytest.fixture
def paths(models: Models) -> dict[str, Path]:
    return {name: models.write(draw(seed), name, shards=2) for seed, name in enumerate(NAMES)}


@pytest.fixture
def chain(tmp_path: Path, paths: dict[str, Path]) -> Callable[..., Chain]:
    def make(*documents: dict[str, object] | str) -> Chain:
        texts = [each if isinstance(each, str) else yaml.safe_dump(each) for each in documents]
        path = tmp_path / "chain.yaml"
        text = "---\n".join(texts)
        for name in NAMES:
            text = text.replace(f"@{name}", str(paths[name]))
        path.write_text(text)
        found = read_recipes(path, download=False)
        assert isinstance(found, Chain)
        return found

    return make


Make = Callable[..., Chain]


def apart(chain: Chain, out: Path) -> Tensors:
    """Merge one recipe after the other, each result written first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreseeing, "why_apart", lambda _: "the test says so")
        merge_chain(chain, out)
    return load_model(out)


def fused_names(out: Path) -> list[str]:
    notes = json.loads((out / "streammerge_manifest.json").read_text())["notes"]
    return [note["text"].split(" ")[0] for note in notes if note["topic"] == "fused"]


MEAN = {"name": "mean", "method": "linear", "sources": [{"path": "@a"}, {"path": "@b"}]}
TIES = {
    "method": "ties",
    "base": "@base",
    "sources": [{"path": "mean"}, {"path": "@c"}],
    "parameters": {"density": 0.4},
}
LAST = {"method": "linear", "sources": [{"path": "mean", "weight": 2}, {"path": "@c"}]}


def element_by_element() -> list[str]:
    """Return the methods that may be fused with their defaults, or first examples."""
    return [
        "dare_linear",
        "linear",
        "magmax",
        "nearswap",
        "passthrough",
        "task_arithmetic",
    ]


@pytest.mark.parametrize("name", element_by_element())
def test_every_such_method_leaves_in_the_reader_what_it_would_write(
    name: str, chain: Make, tmp_path: Path
) -> None:
    method = discover_methods()[name]
    count = method.sources[1] or 2
    first = {
        "name": "mean",
        "method": name,
        "sources": [{"path": f"@{each}"} for each in "ab"[:count]],
        "parameters": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in next(iter(method.examples)).items()
        },
    }
    if method.operand.value != "weights" or name == "nearswap":
        first["base"] = "@base"
    made = chain(first, LAST)

    merge_chain(made, tmp_path / "out")

    assert fused_names(tmp_path / "out") == ["mean"]
    assert_same_model(load_model(tmp_path / "out"), apart(made, tmp_path / "apart"))


@pytest.mark.parametrize(
    "method", ["ties", "slerp", "model_stock", "della", "dare_ties", "breadcrumbs"]
)
def test_the_later_recipe_may_look_at_whole_tensors(
    method: str, chain: Make, tmp_path: Path
) -> None:
    last = {"method": method, "base": "@base", "sources": [{"path": "mean"}, {"path": "@c"}]}
    last["parameters"] = {"density": 0.5}
    if method == "slerp":
        last |= {"sources": [{"path": "mean"}], "parameters": {"t": 0.3}}
    if method == "model_stock":
        del last["parameters"]
    made = chain(MEAN, last)

    merge_chain(made, tmp_path / "out")

    assert fused_names(tmp_path / "out") == ["mean"]
    assert_same_model(load_model(tmp_path / "out"), apart(made, tmp_path / "apart"))


def test_a_fused_result_may_be_read_by_another_one(chain: Make, tmp_path: Path) -> None:
    second = {
        "name": "more",
        "method": "task_arithmetic",
        "base": "@base",
        "sources": [{"path": "mean"}],
    }
    last = {"method": "linear", "sources": [{"path": "more"}, {"path": "@c"}]}
    made = chain(MEAN, second, last)

    merge_chain(made, tmp_path / "out")

    assert fused_names(tmp_path / "out") == ["mean", "more"]
    assert_same_model(load_model(tmp_path / "out"), apart(made, tmp_path / "apart"))


def test_its_layers_may_be_rearranged_and_its_rows_drawn(chain: Make, tmp_path: Path) -> None:
    last = {
        "method": "passthrough",
        "sources": [{"path": "mean"}, {"path": "@c"}],
        "layers": [
            {"sources": [{"source": 0, "layers": [0, 2]}]},
            {"sources": [{"source": 1, "layers": [1, 2]}]},
            {"sources": [{"source": 0, "layers": [1, 2]}]},
        ],
    }
    made = chain(MEAN, last)

    merge_chain(made, tmp_path / "out")

    assert fused_names(tmp_path / "out") == ["mean"]
    assert_same_model(load_model(tmp_path / "out"), apart(made, tmp_path / "apart"))


def test_it_may_be_the_base_of_adapters(chain: Make, tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.weight": (1024, 1300)}
    adapters = [write_adapter(tmp_path / f"lora{i}", shapes, seed=i) for i in range(2)]
    last = {
        "method": "ties",
        "base": "mean",
        "sources": [{"path": str(path)} for path in adapters],
        "parameters": {"density": 0.5},
    }
    made = chain(MEAN, last)

    merge_chain(made, tmp_path / "out")

    assert fused_names(tmp_path / "out") == ["mean"]
    assert_same_model(load_model(tmp_path / "out"), apart(made, tmp_path / "apart"))


@pytest.mark.parametrize("slots", [3, 4, 9])
def test_it_does_not_matter_how_the_work_is_cut(
    slots: int, chain: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chain(MEAN, TIES)
    monkeypatch.setattr(
        running,
        "merge",
        lambda planned, out, **options: merge(
            recut(planned, slots=slots, workers=1 + slots % 3), out, **options
        ),
    )

    merge_chain(made, tmp_path / "out")
    monkeypatch.undo()

    assert fused_names(tmp_path / "out") == ["mean"]
    assert_same_model(load_model(tmp_path / "out"), apart(made, tmp_path / "apart"))


def test_nothing_of_it_is_written(
    chain: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def watch(planned, out, **options):
        folder = tmp_path / "out.stages" / "mean"
        seen.append(sorted(each.name for each in folder.iterdir()))
        return merge(planned, out, **options)

    monkeypatch.setattr(running, "merge", watch)
    merge_chain(chain(MEAN, LAST), tmp_path / "out")

    assert seen == [[]]
    assert not (tmp_path / "out.stages").exists()


def test_the_plan_says_it(chain: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain(MEAN, LAST)

    assert main(["plan", str(tmp_path / "chain.yaml")]) == 0

    said = " ".join(capsys.readouterr().out.split())
    assert "chain the result is computed where it is read, and not written" in said
    assert (
        "fused mean (linear) is computed while it is read: 10.2 MiB of its inputs take the " in said
    )
    # Nothing but the last result.
    assert "5.1 MiB needed for all" in said


@pytest.mark.parametrize(
    ("first", "last", "why"),
    [
        (
            {**MEAN, "method": "ties", "base": "@base", "parameters": {"density": 0.4}},
            LAST,
            "ties looks at more of a tensor than the element",
        ),
        (
            MEAN,
            {"method": "linear", "sources": [{"path": "mean"}, {"path": "mean", "weight": 2}]},
            "a source more than once",
        ),
        ({**MEAN, "compute_dtype": "float64"}, LAST, "compiled kernels do not merge all of it"),
    ],
)
def test_the_plan_says_why_a_result_is_written_first(
    first: dict[str, object], last: dict[str, object], why: str, chain: Make, tmp_path: Path
) -> None:
    made = chain(first, last)

    (note,) = [each.text for each in plan_chain(made)[0].notes if each.topic == "chain"]
    merge_chain(made, tmp_path / "out")

    assert note.startswith("the result is written before it is read: ")
    assert why in note
    assert fused_names(tmp_path / "out") == []


def test_what_is_read_twice_is_written_where_that_moves_fewer_bytes(
    chain: Make, tmp_path: Path
) -> None:
    many = {
        "name": "mean",
        "method": "linear",
        "sources": [{"path": f"@{each}"} for each in ("a", "b", "c", "base", "a", "b")],
    }
    whole = {
        "method": "ties",
        "base": "@base",
        "sources": [{"path": "mean"}],
        "parameters": {"scope": "model", "density": 0.4},
    }
    once = {"method": "linear", "sources": [{"path": "mean"}]}

    (note,) = [e.text for e in plan_chain(chain(many, whole))[0].notes if e.topic == "chain"]

    assert note.endswith("result reads it more than once")
    (note,) = [e.text for e in plan_chain(chain(many, once))[0].notes if e.topic == "chain"]
    assert note.endswith("and not written")


def test_a_resume_goes_on_as_it_was_decided(
    chain: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chain(MEAN, LAST)

    def cut(self: computing.StageComputer, index: int, element: int) -> None:
        raise CheckpointError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(computing.StageComputer, "compute", cut)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            merge_chain(made, tmp_path / "out")
    # Now it would be decided otherwise.
    with monkeypatch.context() as patch:
        patch.setattr(foreseeing, "_pays", lambda *_: False)
        merge_chain(made, tmp_path / "out", resume=True)

    assert fused_names(tmp_path / "out") == ["mean"]
    assert_same_model(load_model(tmp_path / "out"), apart(made, tmp_path / "apart"))
    again = merge_chain(made, tmp_path / "out", resume=True)
    assert again.run.resumed is False


def test_what_is_wrong_with_its_inputs_is_said_of_them(
    chain: Make, models: Models, tmp_path: Path, paths: dict[str, Path]
) -> None:
    bad = draw(7)
    bad["model.layers.1.mlp.weight"][700, 3] = float("nan")
    path = models.write(bad, "bad")
    first = {**MEAN, "sources": [{"path": "@a"}, {"path": str(path)}]}

    with pytest.raises(NonFiniteError) as caught:
        merge_chain(chain(first, LAST), tmp_path / "out")

    assert f"sources[1] ({path})" in str(caught.value)
    assert "model.layers.1.mlp.weight" in str(caught.value)
    assert "holds nan at element [700, 3]" in str(caught.value)
    assert caught.value.__notes__.count("in the recipe named mean") == 1
    assert not (tmp_path / "out").exists()


def test_inputs_that_differ_where_they_are_copied_are_refused(
    chain: Make, models: Models, tmp_path: Path
) -> None:
    other = draw(7)
    other["model.steps"] = torch.arange(5) + 1
    path = models.write(other, "other")
    first = {**MEAN, "sources": [{"path": "@a"}, {"path": str(path)}]}

    with pytest.raises(CheckpointError, match="only copied, but") as caught:
        merge_chain(chain(first, LAST), tmp_path / "out")

    assert "in the recipe named mean" in caught.value.__notes__


def test_an_input_that_changes_meanwhile_is_refused(
    chain: Make, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = computing.StageComputer.compute
    file = next(paths["a"].glob("*.safetensors"))

    def touch(self, index, element):
        file.touch()
        return whole(self, index, element)

    monkeypatch.setattr(computing.StageComputer, "compute", touch)
    with pytest.raises(CheckpointError, match="changed since it was planned"):
        merge_chain(chain(MEAN, LAST), tmp_path / "out")


def test_the_budget_holds_what_readers_compute_with(chain: Make) -> None:
    made = chain(MEAN, LAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreseeing, "why_apart", lambda _: "the test says so")
        plain = plan_chain(made, memory="6GiB")[-1]
    fused = plan_chain(made, memory="6GiB")[-1]

    # Two inputs and the result of at most 2 MiB each, and 3 MiB of their work, for each reader.
    more = fused.memory.scratch - plain.memory.scratch
    assert more == fused.resources.readers * (3 * 4 * BLOCK * 2 + 3 * 2**20)
    with pytest.raises(MemoryBudgetError):
        plan_chain(made, memory=plain.memory.baseline)


def test_a_plan_with_it_survives_a_file(chain: Make, tmp_path: Path) -> None:
    planned = plan_chain(chain(MEAN, LAST))[-1]

    assert parse_plan(dump_plan(planned)) == planned


def adapter_of(tmp_path: Path) -> Path:
    shapes = {f"model.layers.{i}.mlp.weight": (1024, 1300) for i in range(2)}
    return write_adapter(tmp_path / "lora", shapes, seed=5)


def on_adapted_base(adapter: Path, **more: object) -> dict[str, object]:
    return {**TIES, "base": {"path": "@base", "adapter": str(adapter)}, "sources": [], **more}


@pytest.mark.parametrize("among", [False, True])
def test_a_base_may_have_an_adapter(
    among: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
    paths: dict[str, Path],
) -> None:
    adapter = adapter_of(tmp_path)
    base = {"path": str(paths["base"]), "adapter": str(adapter)}
    sources: list[dict[str, object]] = [{"path": str(paths["a"])}, {"path": str(paths["b"])}]
    recipe = tmp_path / "recipe.yaml"
    document = {**TIES, "base": base, "sources": [*sources, *([base] if among else [])]}
    recipe.write_text(yaml.safe_dump(document))

    assert main(["merge", str(recipe), str(tmp_path / "out"), "--quiet"]) == 0

    # The same by hand: a model that is stored, and then taken as the base.
    baked = tmp_path / "baked"
    merge(bake_of(base), baked)
    sources = [*sources, *([{"path": str(baked)}] if among else [])]
    merge({**TIES, "base": str(baked), "sources": sources}, tmp_path / "alone")
    assert fused_names(tmp_path / "out") == ([] if among else ["base-of-result"])
    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "alone"))


def test_of_several_recipes_each_may_have_such_a_base(chain: Make, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    first = on_adapted_base(
        adapter, name="one", method="task_arithmetic", sources=[{"path": "@a"}], parameters={}
    )
    last = on_adapted_base(adapter, sources=[{"path": "one"}, {"path": "@b"}])
    made = chain(first, last)

    merge_chain(made, tmp_path / "out")

    assert [stage.name for stage in made.stages] == [
        *("base-of-one", "one", "base-of-result", "result"),
    ]
    assert sorted(fused_names(tmp_path / "out")) == ["base-of-one", "base-of-result", "one"]
    assert_same_model(load_model(tmp_path / "out"), apart(made, tmp_path / "apart"))


def test_an_adapter_that_kernels_do_not_merge_makes_a_base_that_is_written(
    tmp_path: Path, paths: dict[str, Path]
) -> None:

    model = tiny.llama()
    model.save_pretrained(tmp_path / "tiny")
    tiny.make_lora(tmp_path / "dora", model, seed=1, r=4, use_dora=True)
    base = {"path": str(tmp_path / "tiny"), "adapter": str(tmp_path / "dora")}
    document = {**TIES, "base": base, "sources": [{"path": str(tmp_path / "tiny")}]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))

    assert main(["merge", str(recipe), str(tmp_path / "out"), "--quiet"]) == 0

    assert fused_names(tmp_path / "out") == []
    found = load_model(tmp_path / "out")
    merge(bake_of(base), tmp_path / "baked")
    alone = {**document, "base": str(tmp_path / "baked")}
    merge(alone, tmp_path / "alone")
    assert_same_model(found, load_model(tmp_path / "alone"))


def bake_of(base: dict[str, str]) -> dict[str, object]:
    """Return the recipe of a base with its adapter merged into it."""
    return {
        "method": "task_arithmetic",
        "base": base["path"],
        "sources": [{"path": base["adapter"]}],
    }


def test_a_single_merge_has_no_place_for_making_a_base_first(
    tmp_path: Path, paths: dict[str, Path]
) -> None:
    base = {"path": str(paths["base"]), "adapter": str(adapter_of(tmp_path))}

    with pytest.raises(
        RecipeError, match=r"base\.adapter: the base is made first, of .* does both"
    ):
        merge({**TIES, "base": base, "sources": [{"path": str(paths["a"])}]}, tmp_path / "out")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"path": "x"}, "base.adapter: this key is required"),
        ({"adapter": "x"}, "base.path: this key is required"),
        ({"path": "x", "adapter": "y", "weight": 1}, "base.weight"),
        (3, "base: expected text, got 3"),
        (["x"], "base: expected text, got a list of 1"),
        ("", "base: expected text, got an empty one"),
    ],
)
def test_a_base_that_is_none_is_refused_by_its_key(base: object, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        merge({"method": "ties", "base": base, "sources": [{"path": "a"}]}, "out")

    assert said in str(caught.value)
