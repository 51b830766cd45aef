"""What comes out of folders of diffusers is loaded by diffusers: single, sharded, a variant, with a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY, recipe_of

import streammerge

diffusers = pytest.importorskip(
    "diffusers", reason="needs diffusers, a development extra: pip install 'streammerge[dev]'"
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEM = "diffusion_pytorch_model"


def make_unet(seed: int) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def write_unets(directory: Path, **options: Any) -> tuple[list[Path], list[Any]]:
    unets = [make_unet(seed) for seed in range(3)]
    paths = [directory / f"unet-{index}" for index in range(3)]
    for unet, path in zip(unets, paths, strict=True):
        unet.save_pretrained(path, **options)
    return paths, unets


def average(unets: list[Any]) -> dict[str, torch.Tensor]:
    states = [unet.state_dict() for unet in unets]
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def load(path: Path, **options: Any) -> Any:
    """Load a model, and fail if a tensor is missing, unexpected or of another shape."""
    unet, info = diffusers.UNet2DConditionModel.from_pretrained(
        path, output_loading_info=True, low_cpu_mem_usage=False, **options
    )
    assert not any(info.values()), info
    return unet


def assert_state(unet: Any, expected: dict[str, torch.Tensor]) -> None:
    found = unet.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def weights_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if "safetensors" in path.name}


def test_a_single_file_is_loaded_under_its_own_name(tmp_path: Path) -> None:
    paths, unets = write_unets(tmp_path)
    out = tmp_path / "out"

    streammerge.merge(recipe_of("linear", None, paths), out, memory=MEMORY)

    assert weights_in(out) == {f"{STEM}.safetensors"}
    assert_state(load(out), average(unets))
    assert not streammerge.verify_files(out).damages
    front_matter = (out / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(front_matter)["library_name"] == "diffusers"


def test_shards_are_loaded_with_their_index(tmp_path: Path) -> None:
    paths, unets = write_unets(tmp_path, max_shard_size="100KB")
    assert (paths[0] / f"{STEM}.safetensors.index.json").exists()
    out = tmp_path / "out"
    recipe = recipe_of("linear", None, paths, output={"max_shard_size": "50KB"})

    streammerge.merge(recipe, out, memory=MEMORY)

    index = json.loads((out / f"{STEM}.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert weights_in(out) == {f"{STEM}.safetensors.index.json", *shards}
    assert f"{STEM}-00001-of-{len(shards):05d}.safetensors" in shards
    assert len(shards) > 2
    assert_state(load(out), average(unets))


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_a_variant_stays_one(shard: str, tmp_path: Path) -> None:
    paths, unets = write_unets(tmp_path, variant="fp16", max_shard_size=shard)
    before = weights_in(paths[0])
    out = tmp_path / "out"
    recipe = recipe_of("linear", None, paths, output={"max_shard_size": shard})

    streammerge.merge(recipe, out, memory=MEMORY)

    assert {name for name in weights_in(out) if "index" in name} == {
        name for name in before if "index" in name
    }
    assert all(name.startswith(f"{STEM}.fp16") for name in weights_in(out) if "index" not in name)
    assert_state(load(out, variant="fp16"), average(unets))


def test_a_lora_baked_in_gives_what_diffusers_fuses(tmp_path: Path) -> None:
    from peft import LoraConfig

    unet = make_unet(0)
    unet.save_pretrained(tmp_path / "base")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"]))
    torch.manual_seed(9)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) / 4
    unet.save_lora_adapter(tmp_path / "lora")
    base = make_unet(0)
    base.load_lora_adapter(
        tmp_path / "lora", prefix=None, weight_name="pytorch_lora_weights.safetensors"
    )
    base.fuse_lora()
    base.unload_lora()
    expected = base.state_dict()
    recipe = recipe_of(
        "task_arithmetic",
        tmp_path / "base",
        [tmp_path / "lora" / "pytorch_lora_weights.safetensors"],
    )

    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)

    assert_state(load(tmp_path / "out"), expected)
    before = make_unet(0).state_dict()
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, before[name])]
    assert len(changed) > 10


def test_a_folder_of_pytorch_files_becomes_safetensors_that_are_found(tmp_path: Path) -> None:
    paths, unets = write_unets(tmp_path, safe_serialization=False)
    assert not weights_in(paths[0])
    out = tmp_path / "out"

    streammerge.merge(recipe_of("linear", None, paths), out, memory=MEMORY)

    assert weights_in(out) == {f"{STEM}.safetensors"}
    assert_state(load(out), average(unets))
