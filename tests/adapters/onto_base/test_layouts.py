"""Adapters in the authors' names merge into diffusers' files of the same model, and the reverse.

The oracle is the same adapter on a base of its own names, whose result is then renamed, cut and put
together as the converters of diffusers do it; written out here by hand, module by module.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import MEMORY, Models, assert_same_model, recut
from safetensors.torch import save_file
from torch import Tensor

import streammerge
from streammerge.adapters.onto_base.layouts import RULES
from streammerge.errors import HeaderError, ShapeMismatchError, UnsupportedAdapterError

Tensors = dict[str, Tensor]
D, IN = 48, 20
FF = 4 * D


def linears(shapes: dict[str, tuple[int, int]]) -> Tensors:
    """Return weights and biases of linear layers."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, (rows, columns) in shapes.items():
        made[f"{name}.weight"] = torch.randn(rows, columns, generator=generator)
        made[f"{name}.bias"] = torch.randn(rows, generator=generator)
    return made


def flux() -> Tensors:
    """Return two blocks of Flux as its authors name them."""
    shapes = {
        "img_in": (D, IN),
        "txt_in": (D, IN),
        "time_in.in_layer": (D, IN),
        "guidance_in.out_layer": (D, D),
        "vector_in.in_layer": (D, IN),
        "final_layer.linear": (IN, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    for n in range(2):
        double, single = f"double_blocks.{n}", f"single_blocks.{n}"
        shapes |= {f"{single}.linear1": (3 * D + FF, D), f"{single}.linear2": (D, D + FF)}
        shapes[f"{single}.modulation.lin"] = 3 * D, D
        for side in ("img", "txt"):
            shapes |= {
                f"{double}.{side}_attn.qkv": (3 * D, D),
                f"{double}.{side}_attn.proj": (D, D),
                f"{double}.{side}_mlp.0": (FF, D),
                f"{double}.{side}_mlp.2": (D, FF),
                f"{double}.{side}_mod.lin": (6 * D, D),
            }
    return linears(shapes)


def sd3() -> Tensors:
    shapes = {
        "context_embedder": (D, IN),
        "t_embedder.mlp.2": (D, D),
        "y_embedder.mlp.0": (D, IN),
        "final_layer.linear": (IN, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    for n in range(2):
        for side in ("x", "context"):
            block = f"joint_blocks.{n}.{side}_block"
            shapes |= {
                f"{block}.attn.qkv": (3 * D, D),
                f"{block}.attn.proj": (D, D),
                f"{block}.mlp.fc1": (FF, D),
                f"{block}.mlp.fc2": (D, FF),
            }
        shapes |= {
            f"joint_blocks.{n}.x_block.attn2.qkv": (3 * D, D),
            f"joint_blocks.{n}.x_block.adaLN_modulation.1": (9 * D, D),
        }
    return linears(shapes)


def hunyuan() -> Tensors:
    refiner = "txt_in.individual_token_refiner.blocks.1"
    shapes = {
        "time_in.mlp.0": (D, IN),
        "guidance_in.mlp.2": (D, D),
        "txt_in.c_embedder.linear_1": (D, IN),
        f"{refiner}.self_attn_qkv": (3 * D, D),
        f"{refiner}.self_attn_proj": (D, D),
        f"{refiner}.mlp.fc1": (FF, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
        "single_blocks.11.linear1": (3 * D + FF, D),
        "single_blocks.11.linear2": (D, D + FF),
        "single_blocks.11.modulation.linear": (3 * D, D),
    }
    for side in ("img", "txt"):
        shapes |= {
            f"double_blocks.3.{side}_attn_qkv": (3 * D, D),
            f"double_blocks.3.{side}_attn_proj": (D, D),
            f"double_blocks.3.{side}_mlp.fc1": (FF, D),
            f"double_blocks.3.{side}_mod.linear": (6 * D, D),
        }
    return linears(shapes)


def wan() -> Tensors:
    shapes = {"text_embedding.0": (D, IN), "time_projection.1": (6 * D, D), "head.head": (IN, D)}
    for n in range(2):
        shapes |= {f"blocks.{n}.self_attn.{letter}": (D, D) for letter in "qkvo"}
        shapes |= {f"blocks.{n}.cross_attn.{letter}": (D, D) for letter in "qkvo"}
        shapes |= {
            f"blocks.{n}.cross_attn.k_img": (D, D),
            f"blocks.{n}.ffn.0": (FF, D),
            f"blocks.{n}.ffn.2": (D, FF),
        }
    return linears(shapes)


def split(tensor: Tensor, *names: str) -> Tensors:
    return dict(zip(names, tensor.chunk(len(names)), strict=True))


def convert_joined(name: str, tensor: Tensor) -> Tensors:
    """Return a tensor of Flux, SD3 or HunyuanVideo as diffusers' converters make it."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    if module == "final_layer.adaLN_modulation.1":
        shift, scale = tensor.chunk(2)
        return {f"norm_out.linear.{kind}": torch.cat([scale, shift])}
    fixed = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "context_embedder": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
        "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
        "final_layer.linear": "proj_out",
    }
    if module in fixed:
        return {f"{fixed[module]}.{kind}": tensor}
    if parts[0] == "txt_in":
        block = f"context_embedder.token_refiner.refiner_blocks.{parts[3]}"
        if parts[4] == "self_attn_qkv":
            return split(tensor, *(f"{block}.attn.to_{c}.{kind}" for c in "qkv"))
        last = {"self_attn_proj": "attn.to_out.0", "mlp": "ff.net.0.proj"}[parts[4]]
        return {f"{block}.{last}.{kind}": tensor}
    if parts[0] == "single_blocks":
        block = f"single_transformer_blocks.{parts[1]}"
        if parts[2] == "linear1":
            q, k, v, mlp = tensor.split([D, D, D, FF])
            attention = {
                f"{block}.attn.to_{c}.{kind}": t for c, t in zip("qkv", (q, k, v), strict=True)
            }
            return attention | {f"{block}.proj_mlp.{kind}": mlp}
        last = "proj_out" if parts[2] == "linear2" else "norm.linear"
        return {f"{block}.{last}.{kind}": tensor}
    block, rest = f"transformer_blocks.{parts[1]}", ".".join(parts[2:])
    text = rest.startswith(("txt", "context"))
    if rest.endswith("qkv"):
        if text:
            return split(tensor, *(f"{block}.attn.add_{c}_proj.{kind}" for c in "qkv"))
        attention = "attn2" if "attn2" in rest else "attn"
        return split(tensor, *(f"{block}.{attention}.to_{c}.{kind}" for c in "qkv"))
    if "mod" in rest:
        last = "norm1_context.linear" if text else "norm1.linear"
    elif "proj" in rest:
        last = "attn.to_add_out" if text else "attn.to_out.0"
    else:
        inner = "net.0.proj" if rest.endswith(("mlp.0", "fc1")) else "net.2"
        last = f"ff_context.{inner}" if text else f"ff.{inner}"
    return {f"{block}.{last}.{kind}": tensor}


def convert_wan(name: str, tensor: Tensor) -> Tensors:
    for one, other in (
        (".self_attn.", ".attn1."),
        (".cross_attn.", ".attn2."),
        (".k_img.", ".add_k_proj."),
        (".o.", ".to_out.0."),
        (".q.", ".to_q."),
        (".k.", ".to_k."),
        (".v.", ".to_v."),
        (".ffn.0.", ".ffn.net.0.proj."),
        (".ffn.2.", ".ffn.net.2."),
        ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
        ("time_projection.1.", "condition_embedder.time_proj."),
        ("head.head.", "proj_out."),
    ):
        name = name.replace(one, other)
    return {name: tensor}


Convert = Callable[[str, Tensor], Tensors]
MODELS: dict[str, tuple[Callable[[], Tensors], Convert]] = {
    "Flux": (flux, convert_joined),
    "SD3": (sd3, convert_joined),
    "HunyuanVideo": (hunyuan, convert_joined),
    "Wan": (wan, convert_wan),
}
"""Tensors in the authors' names, and what a converter makes of each."""


def converted(tensors: Tensors, convert: Convert) -> Tensors:
    made: Tensors = {}
    for name, tensor in tensors.items():
        parts = convert(name, tensor)
        assert not made.keys() & parts.keys()
        made |= parts
    return made


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) / 2


def lora(rows: int, columns: int) -> Tensors:
    return {"lora_A.weight": random(4, columns), "lora_B.weight": random(rows, 4)}


def dora(rows: int, columns: int) -> Tensors:
    return lora(rows, columns) | {"lora_magnitude_vector": torch.rand(rows) + 0.5}


def kohya(rows: int, columns: int) -> Tensors:
    return {"lora_down.weight": random(4, columns), "lora_up.weight": random(rows, 4)}


def kohya_dora(rows: int, columns: int) -> Tensors:
    return kohya(rows, columns) | {"dora_scale": torch.rand(rows, 1) + 0.5}


def lokr(rows: int, columns: int) -> Tensors:
    return {
        "lokr_w1": random(4, 4),
        "lokr_w2_a": random(rows // 4, 2),
        "lokr_w2_b": random(2, columns // 4),
    }


def loha(rows: int, columns: int) -> Tensors:
    return {
        f"hada_w{i}_{side}": random(*shape)
        for i in (1, 2)
        for side, shape in {"a": (rows, 3), "b": (3, columns)}.items()
    }


def glora(rows: int, columns: int) -> Tensors:
    # Beside others, which tell a file of adapters from one of layers of these names.
    factors = {
        "a1.weight": random(columns, 3),
        "a2.weight": random(3, columns),
        "b1.weight": random(rows, 3),
        "b2.weight": random(3, columns),
    }
    return {name: tensor / 3 for name, tensor in factors.items()}


RAW = {"lora": kohya, "dora": kohya_dora, "lokr": lokr, "loha": loha, "glora": glora}
DOTTED = {"lora": lora, "dora": dora, "lokr": lokr, "glora": glora}
Make = Callable[[int, int], Tensors]


def adapt(path: Path, base: Tensors, make: Make, spell: Callable[[str], str]) -> Path:
    """Write an adapter of every linear layer of a base, and of its biases."""
    torch.manual_seed(9)
    tensors = {}
    for name, weight in base.items():
        stem = spell(name.rpartition(".")[0])
        if name.endswith(".bias"):
            tensors[f"{stem}.diff_b"] = random(*weight.shape)
            continue
        parts = make(*weight.shape)
        tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, path)
    return path


def recipe_for(base: Path, adapter: Path) -> dict[str, object]:
    return {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(adapter)}],
    }


def dotted(stem: str) -> str:
    return f"diffusion_model.{stem}"


def flat(stem: str) -> str:
    return f"lora_unet_{stem.replace('.', '_')}"


@pytest.mark.parametrize("spell", [dotted, flat])
@pytest.mark.parametrize("kind", RAW)
@pytest.mark.parametrize("model", MODELS)
def test_the_authors_names_merge_into_diffusers_files(
    model: str, kind: str, spell: Callable[[str], str], tmp_path: Path, models: Models
) -> None:
    make, convert = MODELS[model]
    original = make()
    adapter = adapt(tmp_path / "a.safetensors", original, RAW[kind], spell)
    expected, _ = models.merge(recipe_for(models.write(original), adapter))

    plan = streammerge.plan(
        recipe_for(models.write(converted(original, convert)), adapter), memory=MEMORY, workers=2
    )
    merged, _ = models.merge(plan)
    again, _ = models.merge(recut(plan, slots=1, workers=1))

    assert_same_model(again, merged)
    wanted = converted(expected, convert)
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.allclose(tensor, converted(original, convert)[name])


@pytest.mark.parametrize("kind", DOTTED)
@pytest.mark.parametrize("model", MODELS)
def test_diffusers_names_merge_into_the_authors_files(
    model: str, kind: str, tmp_path: Path, models: Models
) -> None:
    make, convert = MODELS[model]
    original = make()
    split_base = converted(original, convert)
    # Without a mark before, the names of GLoRA could be those of layers.
    spell = ("diffusion_model.{}" if kind == "glora" else "transformer.{}").format
    adapter = adapt(tmp_path / "a.safetensors", split_base, DOTTED[kind], spell)
    expected, _ = models.merge(recipe_for(models.write(split_base), adapter))
    inside = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    # One file of a whole pipeline has other names beside these.
    base = models.write(inside | {"vae.encoder.weight": torch.ones(3)})

    plan = streammerge.plan(recipe_for(base, adapter), memory=MEMORY, workers=2)
    merged, _ = models.merge(plan)
    again, _ = models.merge(recut(plan, slots=1, workers=1))

    assert_same_model(again, merged)
    assert torch.equal(merged.pop("vae.encoder.weight"), torch.ones(3))
    got = converted(
        {name.removeprefix("model.diffusion_model."): each for name, each in merged.items()},
        convert,
    )
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_only_the_rows_of_an_adapted_part_change(tmp_path: Path, models: Models) -> None:
    original = flux()
    parts = {
        f"transformer.single_transformer_blocks.1.attn.to_k.{k}": v for k, v in lora(D, D).items()
    }
    adapter = tmp_path / "a.safetensors"
    save_file(parts, adapter)

    merged, _ = models.merge(recipe_for(models.write(original), adapter))

    for name, tensor in original.items():
        if name != "single_blocks.1.linear1.weight":
            assert torch.equal(merged[name], tensor), name
    changed = merged["single_blocks.1.linear1.weight"] != original["single_blocks.1.linear1.weight"]
    plan = streammerge.plan(recipe_for(models.write(original), adapter), memory=MEMORY)
    assert "changes 1 tensor(s): low rank x 1, 1 of them in rows of layers" in str(plan)
    assert changed[D : 2 * D].all()
    assert not changed[:D].any()
    assert not changed[2 * D :].any()


@pytest.mark.parametrize("spell", ["diffusion_model.{}", "transformer.{}", "{}"])
def test_names_of_qwen_image_are_alike_in_both(spell: str, tmp_path: Path, models: Models) -> None:
    base = linears(
        {
            "transformer_blocks.0.attn.to_q": (D, D),
            "transformer_blocks.0.attn.add_q_proj": (D, D),
            "transformer_blocks.0.img_mlp.net.0.proj": (FF, D),
            "transformer_blocks.0.img_mod.1": (6 * D, D),
            "proj_out": (IN, D),
        }
    )
    adapter = adapt(tmp_path / "a.safetensors", base, lora, spell.format)
    expected, _ = models.merge(recipe_for(models.write(base), adapter))
    inside = {f"model.diffusion_model.{name}": tensor for name, tensor in base.items()}
    inside["vae.proj_out.weight"] = torch.ones(IN, D)

    merged, _ = models.merge(recipe_for(models.write(inside), adapter))

    assert torch.equal(merged.pop("vae.proj_out.weight"), torch.ones(IN, D))
    assert all(not torch.equal(expected[name], tensor) for name, tensor in base.items())
    assert_same_model(
        {name.removeprefix("model.diffusion_model."): each for name, each in merged.items()},
        expected,
    )


def test_text_encoders_of_one_file_go_where_the_component_says(
    tmp_path: Path, models: Models
) -> None:
    t5 = linears({"encoder.block.0.layer.0.SelfAttention.q": (D, D)})
    clip = linears({"text_model.encoder.layers.0.self_attn.q_proj": (D, D)})
    denoiser = converted(flux(), convert_joined)
    tensors = {}
    for mark, module in {
        "lora_te1": "text_model.encoder.layers.0.self_attn.q_proj",
        "lora_te3": "encoder.block.0.layer.0.SelfAttention.q",
        "lora_unet": "double_blocks.0.img_attn.qkv",
    }.items():
        rows = 3 * D if mark == "lora_unet" else D
        stem = f"{mark}_{module.replace('.', '_')}"
        tensors |= {
            f"{stem}.lora_down.weight": random(4, D),
            f"{stem}.lora_up.weight": random(rows, 4),
        }
    adapter = tmp_path / "a.safetensors"
    tensors |= {
        f"text_encoders.clip_g.transformer.{'.'.join(name.split('.')[:-1])}.lora_{side}.weight": each
        for name in clip
        if name.endswith("weight")
        for side, each in {"down": random(4, D), "up": random(D, 4)}.items()
    }
    save_file(tensors, adapter)

    for component, base in {
        "text_encoder": clip,
        "text_encoder_2": clip,
        "text_encoder_3": t5,
        "unet": denoiser,
    }.items():
        recipe = recipe_for(models.write(base), adapter)
        recipe["sources"] = [{"path": str(adapter), "component": component}]
        merged, _ = models.merge(recipe)
        changed = {name for name, each in merged.items() if not torch.equal(each, base[name])}
        assert changed
        assert len(changed) == (3 if component == "unet" else 1)


@pytest.mark.parametrize("before", ["", "model.diffusion_model."])
def test_parameters_without_a_layer_take_their_differences(
    before: str, tmp_path: Path, models: Models
) -> None:
    """As in files of Wan, whose blocks have a table of shifts and scales."""
    name = f"{before}blocks.0.modulation"
    base = {name: random(1, 6, D), f"{before}blocks.0.norm3.weight": random(D)}
    added = {"modulation": random(1, 6, D), "norm3": random(D)}
    adapter = tmp_path / "a.safetensors"
    save_file({f"diffusion_model.blocks.0.{k}.diff": v for k, v in added.items()}, adapter)

    merged, _ = models.merge(recipe_for(models.write(base), adapter))

    for key, tensor in base.items():
        part = "modulation" if key == name else "norm3"
        assert torch.equal(merged[key], tensor + added[part])


def test_a_layer_of_another_size_is_refused(tmp_path: Path, models: Models) -> None:
    adapter = tmp_path / "a.safetensors"
    parts = lora(3 * D + 3, D)
    save_file(
        {f"diffusion_model.double_blocks.0.img_attn.qkv.{k}": v for k, v in parts.items()}, adapter
    )
    base = models.write(converted(flux(), convert_joined))

    with pytest.raises(ShapeMismatchError, match=r"changes 147 rows of 48.*has 144 rows"):
        streammerge.plan(recipe_for(base, adapter), memory=MEMORY)


def test_norms_of_inputs_need_the_layer_whole(tmp_path: Path, models: Models) -> None:
    adapter = tmp_path / "a.safetensors"
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    parts = {
        "lora_down.weight": random(4, D),
        "lora_up.weight": random(3 * D, 4),
        "dora_scale": torch.rand(1, D),
    }
    save_file({f"{stem}.{k}": v for k, v in parts.items()}, adapter)
    base = models.write(converted(flux(), convert_joined))

    with pytest.raises(UnsupportedAdapterError, match=r"norms the inputs.*in 3 tensors"):
        streammerge.plan(recipe_for(base, adapter), memory=MEMORY)


def test_the_same_rows_twice_are_refused(tmp_path: Path, models: Models) -> None:
    adapter = tmp_path / "a.safetensors"
    tensors = {f"double_blocks.0.img_attn.qkv.{k}": v for k, v in lora(3 * D, D).items()}
    tensors |= {f"transformer_blocks.0.attn.to_q.{k}": v for k, v in lora(D, D).items()}
    save_file(tensors, adapter)

    with pytest.raises(HeaderError, match="both belong to"):
        streammerge.plan(recipe_for(models.write(flux()), adapter), memory=MEMORY)


def test_the_tables_are_bijections() -> None:
    for rules in RULES.values():
        originals = [rule.original for rule in rules]
        modules = [(piece.module, piece.before) for rule in rules for piece in rule.pieces]
        assert len(set(originals)) == len(originals)
        assert len(set(modules)) == len(modules)
        for rule in rules:
            ends = sorted((piece.original, piece.original + piece.share) for piece in rule.pieces)
            assert ends[0][0] == 0
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
