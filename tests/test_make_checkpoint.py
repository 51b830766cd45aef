"""scripts/make_checkpoint.py: what it writes is a model, and depends on the seed alone."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_checkpoint.py"


def load_script():
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules["make_checkpoint"] = module
    spec.loader.exec_module(module)
    return module


make_checkpoint = load_script()
DENSE = make_checkpoint.ModelSpec(
    hidden=64, layers=2, intermediate=96, vocab=500, heads=4, kv_heads=2
)
MIXTURE = make_checkpoint.ModelSpec(
    hidden=64,
    layers=2,
    intermediate=96,
    vocab=500,
    heads=4,
    kv_heads=2,
    experts=3,
    expert_intermediate=32,
)
# The embedding and the head have more than one block each, the last one partly filled.
WIDE = make_checkpoint.ModelSpec(
    hidden=64, layers=1, intermediate=64, vocab=40_000, heads=4, kv_heads=2
)


def read_model(directory):
    tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def write_and_read(directory, spec, **options):
    make_checkpoint.write_model(directory, spec, **options)
    return read_model(directory)


def assert_same_bits(expected, actual):
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.view(torch.uint8), actual[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_safetensors_library_opens_every_shard(tmp_path, dtype):
    nbytes = make_checkpoint.write_model(tmp_path, DENSE, dtype=dtype, shards=3)

    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(set(weight_map.values())) == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    for name, file_name in weight_map.items():
        with safe_open(tmp_path / file_name, "pt") as shard:
            assert shard.get_tensor(name).dtype == getattr(torch, dtype)
    tensors = read_model(tmp_path)
    assert tensors.keys() == weight_map.keys()
    assert sum(tensor.nbytes for tensor in tensors.values()) == nbytes


@pytest.mark.parametrize("spec", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_names_and_shapes_are_those_of_the_model_in_the_config(tmp_path, spec):
    transformers = pytest.importorskip("transformers")
    make_checkpoint.write_model(tmp_path, spec, shards=2)

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert [type(model).__name__] == json.loads((tmp_path / "config.json").read_text())[
        "architectures"
    ]
    assert not any(report.values()), report


def test_one_seed_gives_one_model(tmp_path):
    first = write_and_read(tmp_path / "first", DENSE, seed=7)
    again = write_and_read(tmp_path / "again", DENSE, seed=7)
    other = write_and_read(tmp_path / "other", DENSE, seed=8)

    assert_same_bits(first, again)
    assert all(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("finetune", [None, 0])
def test_values_do_not_depend_on_chunks_and_shards(tmp_path, dtype, finetune):
    whole = write_and_read(tmp_path / "whole", WIDE, dtype=dtype, finetune=finetune)
    parts = write_and_read(
        tmp_path / "parts",
        WIDE,
        dtype=dtype,
        finetune=finetune,
        chunk_nbytes=99_991,
        max_shard_nbytes=100_000,
    )

    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert_same_bits(whole, parts)


def test_finetunes_change_the_base_a_little_and_each_its_own_way(tmp_path):
    base, first, second = (
        write_and_read(tmp_path / str(finetune), WIDE, finetune=finetune)[
            "model.embed_tokens.weight"
        ].float()
        for finetune in (None, 0, 1)
    )

    changes = torch.stack([first - base, second - base]).flatten(1)
    assert torch.all(changes.std(dim=1) / base.std() < 0.03)
    assert torch.all(changes.std(dim=1) / base.std() > 0.003)
    assert abs(torch.corrcoef(changes)[0, 1]) < 0.01
    # In bfloat16 a small change of a large weight rounds to none.
    assert torch.all((changes == 0).float().mean(dim=1) > 0.05)


def test_values_are_spread_as_asked_and_do_not_repeat(tmp_path):
    weights = write_and_read(tmp_path, WIDE, dtype="float32")

    embedding = weights["model.embed_tokens.weight"].flatten()
    assert embedding.std().item() == pytest.approx(0.02, rel=0.15)
    assert weights["model.norm.weight"].mean().item() == pytest.approx(1, abs=0.1)
    block = embedding[: make_checkpoint.BLOCK_NUMEL]
    # A period would show as a peak of the autocorrelation.
    spectrum = torch.fft.rfft(block, n=2 * block.numel()).abs() ** 2
    autocorrelation = torch.fft.irfft(spectrum)[1 : block.numel()] / (block**2).sum()
    assert autocorrelation.abs().max() < 0.01


def test_existing_files_are_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(FileExistsError, match="has files in it already"):
        make_checkpoint.write_model(tmp_path, DENSE)


def test_the_command_writes_a_base_and_finetunes(tmp_path):
    shape = ["--hidden=64", "--layers=1", "--vocab=100", "--heads=4", "--kv-heads=2"]
    experts = ["--experts=4", "--expert-intermediate=16", "--finetunes=2", "--shards=2"]

    assert make_checkpoint.main([str(tmp_path), *shape, *experts]) == 0

    models = [read_model(tmp_path / name) for name in ("base", "tuned-0", "tuned-1")]
    assert models[0].keys() == models[1].keys() == models[2].keys()
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in models[0]
