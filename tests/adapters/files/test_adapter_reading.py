"""Adapters are read whole or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.adapters.files.inspecting import describe_adapter, describe_adapter_as_json
from streammerge.adapters.files.reading import is_adapter, read_adapter
from streammerge.adapters.files.types import AdapterKind, LayerKind, Naming
from streammerge.cli.arguments import main
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    MissingTensorError,
    ShapeMismatchError,
    TruncatedShardError,
    UnsupportedAdapterError,
)
from tests.adapters.tiny import (
    bert,
    convnet,
    gpt2,
    llama,
    load_peft,
    make_ia3,
    make_lora,
    mixtral,
    read_tensors,
    rewrite,
)

VARIANTS = {
    "all linear": (llama, {"target_modules": "all-linear", "r": 4}),
    "rslora": (llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*\.v_proj": 3},
            "alpha_pattern": {"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 7},
        },
    ),
    "DoRA": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "lora_bias": (bert, {"target_modules": ["query"], "lora_bias": True}),
    "modules_to_save": (
        bert,
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
    "bias all": (bert, {"target_modules": ["query"], "bias": "all"}),
    "convolutions": (convnet, {"target_modules": ["conv1d", "conv2d", "point", "embed", "head"]}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "experts": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "r": 2,
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaling_and_rank_of_every_module_are_those_peft_uses(variant: str, tmp_path: Path):
    build, config = VARIANTS[variant]
    adapter = read_adapter(make_lora(tmp_path / "a", build(), seed=1, **config))

    inside = load_peft(build(), tmp_path / "a")
    by_name = {
        name.removeprefix("base_model.model."): module
        for name, module in inside.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and "a0" in module.scaling
    }
    assert sorted(by_name) == sorted(module.stem for module in adapter.modules)
    for module in adapter.modules:
        assert module.scaling == by_name[module.stem].scaling["a0"], module.stem
        if module.layer is not LayerKind.EXPERTS:
            assert module.rank == by_name[module.stem].r["a0"], module.stem


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_has_a_home(variant: str, tmp_path: Path):
    build, config = VARIANTS[variant]
    path = make_lora(tmp_path / "a", build(), seed=1, **config)

    adapter = read_adapter(path)

    assert sorted(entry.name for entry in adapter.entries) == sorted(read_tensors(path))
    json.dumps(describe_adapter_as_json(adapter))
    assert str(path) in describe_adapter(adapter)


def test_layers_are_told_apart(tmp_path: Path):
    build, config = VARIANTS["convolutions"]
    adapter = read_adapter(make_lora(tmp_path / "a", build(), seed=1, **config))

    found = {module.name: module.layer for module in adapter.modules}
    assert found == {
        "conv1d": LayerKind.CONVOLUTION,
        "conv2d": LayerKind.CONVOLUTION,
        "embed": LayerKind.EMBEDDING,
        "head": LayerKind.LINEAR,
        "point": LayerKind.CONVOLUTION,
    }


def test_whole_tensors_are_told_apart(tmp_path: Path):
    build, config = VARIANTS["modules_to_save"]
    saved = read_adapter(make_lora(tmp_path / "a", build(), seed=1, **config))
    build, config = VARIANTS["bias all"]
    biases = read_adapter(make_lora(tmp_path / "b", build(), seed=1, **config))
    build, config = VARIANTS["embedding"]
    replaced = read_adapter(make_lora(tmp_path / "c", build(), seed=1, **config))
    build, config = VARIANTS["tokens"]
    tokens = read_adapter(make_lora(tmp_path / "d", build(), seed=1, **config))

    assert sorted(saved.saved) == ["classifier.bias", "classifier.weight"]
    assert "bert.encoder.layer.0.attention.self.query.bias" in biases.biases
    assert "classifier.bias" in biases.biases
    assert list(replaced.replaced) == ["model.embed_tokens.weight"]
    assert [(each.stem, each.indices) for each in tokens.tokens] == [("model.embed_tokens", (3, 5))]


def test_ia3_is_read(tmp_path: Path):
    path = make_ia3(
        tmp_path / "a",
        llama(),
        seed=1,
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )

    adapter = read_adapter(path)

    assert adapter.kind is AdapterKind.IA3
    assert {vector.vector.shape for vector in adapter.vectors} == {(16, 1), (1, 48)}


def test_bin_and_names_with_the_adapter_inside_read_alike(tmp_path: Path):
    path = make_lora(tmp_path / "a", llama(), seed=1, target_modules=["q_proj", "embed_tokens"])
    expected = [(m.stem, m.down.shape, m.scaling) for m in read_adapter(path).modules]
    raw = {}
    for name, tensor in read_tensors(path).items():
        inside = name.replace(".lora_A.", ".lora_A.x.").replace(".lora_B.", ".lora_B.x.")
        raw[inside + (".x" if "lora_embedding" in name else "")] = tensor
    torch.save(raw, path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()

    found = [(m.stem, m.down.shape, m.scaling) for m in read_adapter(path).modules]

    assert found == expected
    assert read_adapter(path / "adapter_model.bin").modules == read_adapter(path).modules


def test_kohya_names_are_read_with_their_alphas(tmp_path: Path):
    tensors = {
        "lora_unet_down_0_to_q.lora_down.weight": torch.randn(4, 8),
        "lora_unet_down_0_to_q.lora_up.weight": torch.randn(6, 4),
        "lora_unet_down_0_to_q.alpha": torch.tensor(2.0),
        "lora_te1_mlp_fc1.lora_down.weight": torch.randn(2, 8, dtype=torch.bfloat16),
        "lora_te1_mlp_fc1.lora_up.weight": torch.randn(6, 2, dtype=torch.bfloat16),
        "lora_te1_mlp_fc1.alpha": torch.tensor(3.0, dtype=torch.bfloat16),
        "lora_unet_conv.lora_down.weight": torch.randn(4, 8, 3, 3),
        "lora_unet_conv.lora_up.weight": torch.randn(6, 4, 1, 1),
    }
    save_file(tensors, tmp_path / "kohya.safetensors")

    adapter = read_adapter(tmp_path / "kohya.safetensors")

    assert adapter.naming is Naming.KOHYA
    assert {module.stem: module.scaling for module in adapter.modules} == {
        "lora_te1_mlp_fc1": 1.5,
        "lora_unet_conv": 1.0,
        "lora_unet_down_0_to_q": 0.5,
    }


@pytest.mark.parametrize(
    ("down", "up", "stem"),
    [
        ("unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight", "unet.a.to_q"),
        ("unet.a.to_q.lora.down.weight", "unet.a.to_q.lora.up.weight", "unet.a.to_q"),
        (
            "unet.a.attn1.processor.to_q_lora.down.weight",
            "unet.a.attn1.processor.to_q_lora.up.weight",
            "unet.a.attn1.to_q",
        ),
        (
            "unet.a.attn1.processor.to_out_lora.down.weight",
            "unet.a.attn1.processor.to_out_lora.up.weight",
            "unet.a.attn1.to_out.0",
        ),
        (
            "text_encoder.a.q_proj.lora_linear_layer.down.weight",
            "text_encoder.a.q_proj.lora_linear_layer.up.weight",
            "text_encoder.a.q_proj",
        ),
    ],
)
def test_both_generations_of_diffusers_names_are_read(
    down: str, up: str, stem: str, tmp_path: Path
):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({down: torch.randn(4, 8), up: torch.randn(6, 4)}, path)

    adapter = read_adapter(path)

    assert adapter.naming is Naming.DIFFUSERS
    assert [(module.stem, module.scaling) for module in adapter.modules] == [(stem, 1.0)]


def test_diffusers_configuration_in_the_metadata_counts(tmp_path: Path):
    metadata = {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.use_rslora": True,
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 1,
        "text_encoder.alpha_pattern": {"q_proj": 6},
    }
    tensors = {
        "unet.a.to_q.lora_A.weight": torch.randn(4, 8),
        "unet.a.to_q.lora_B.weight": torch.randn(6, 4),
        "text_encoder.b.q_proj.lora_A.weight": torch.randn(2, 8),
        "text_encoder.b.q_proj.lora_B.weight": torch.randn(6, 2),
    }
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})

    scalings = {module.stem: module.scaling for module in read_adapter(path).modules}

    assert scalings == {"unet.a.to_q": 4.0, "text_encoder.b.q_proj": 3.0}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter to damage."""
    return make_lora(tmp_path / "a", llama(), seed=1, r=4, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedAdapterError, ["pissa", "convert"]),
        ({"init_lora_weights": "olora"}, UnsupportedAdapterError, ["olora", "convert"]),
        ({"init_lora_weights": "corda"}, UnsupportedAdapterError, ["corda"]),
        ({"init_lora_weights": "loftq"}, UnsupportedAdapterError, ["loftq"]),
        ({"init_lora_weights": "lora_ga"}, UnsupportedAdapterError, ["lora_ga"]),
        ({"init_lora_weights": "newest"}, UnsupportedAdapterError, ["newest"]),
        ({"kasa_config": {"beta": 1}}, UnsupportedAdapterError, ["kasa_config", "PEFT"]),
        ({"alora_invocation_tokens": [1]}, UnsupportedAdapterError, ["activated LoRA"]),
        ({"use_qalora": True}, UnsupportedAdapterError, ["use_qalora"]),
        ({"layer_replication": [[0, 1]]}, UnsupportedAdapterError, ["layer_replication"]),
        ({"arrow_config": {"top_k": 1}}, UnsupportedAdapterError, ["arrow_config"]),
        ({"use_bdlora": {"nblocks": 2}}, UnsupportedAdapterError, ["use_bdlora"]),
        ({"peft_type": "FOURIERFT"}, UnsupportedAdapterError, ["FOURIERFT", "convert_to_lora"]),
        ({"peft_type": None}, HeaderError, ["peft_type", "LORA or IA3"]),
        ({"tomorrow": 1}, UnsupportedAdapterError, ["unknown setting 'tomorrow'"]),
        ({"r": 8}, ShapeMismatchError, ["rank 4", "says 8"]),
        ({"rank_pattern": {"q_proj": 2}}, ShapeMismatchError, ["rank 4", "says 2"]),
        ({"r": 0}, HeaderError, ["r: expected a whole number from 1"]),
        ({"r": True}, HeaderError, ["r: expected a whole number"]),
        ({"lora_alpha": "8"}, HeaderError, ["lora_alpha: expected a finite number"]),
        ({"use_dora": True}, MissingTensorError, ["DoRA magnitude", "use_dora: true"]),
        ({"lora_bias": True}, MissingTensorError, ["bias of B", "lora_bias: true"]),
        ({"use_rslora": "yes"}, HeaderError, ["use_rslora: expected true or false"]),
        ({"rank_pattern": {"(a+)+": 4}}, HeaderError, ["rank_pattern", "very long"]),
        ({"alpha_pattern": {".*.*.*.*": 4}}, HeaderError, ["alpha_pattern", "very long"]),
        ({"alpha_pattern": {"(": 4}}, HeaderError, ["alpha_pattern", "no pattern"]),
        ({"trainable_token_indices": ["a"]}, HeaderError, ["trainable_token_indices"]),
    ],
)
def test_configurations_are_refused_by_name(config, error, words, adapter: Path):
    rewrite(adapter, **config)

    with pytest.raises(error) as caught:
        read_adapter(adapter)

    for word in [*words, "adapter_config.json"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: {**t, "base_model.model.x.weight": torch.ones(2)}, HeaderError, ["no home"]),
        (
            lambda t: {k: v for k, v in t.items() if "0.self_attn.q_proj.lora_A" not in k},
            MissingTensorError,
            ["layers.0", "one pair of factors"],
        ),
        (
            lambda t: {k: v.reshape(-1)[:0] if "lora_B" in k else v for k, v in t.items()},
            ShapeMismatchError,
            ["ZeRO-3", "[0]"],
        ),
        (
            lambda t: {k: v.reshape(-1) if "lora_A" in k else v for k, v in t.items()},
            ShapeMismatchError,
            ["ZeRO-3"],
        ),
        (
            lambda t: {k: v[:, :3] if "lora_B" in k else v for k, v in t.items()},
            ShapeMismatchError,
            ["do not fit"],
        ),
        (
            lambda t: {k: v.to(torch.int8) for k, v in t.items()},
            UnsupportedAdapterError,
            ["quantised", "I8"],
        ),
        (
            lambda t: (
                {k.replace("weight", "x.weight"): v for k, v in t.items()}
                | {k.replace("weight", "y.weight"): v for k, v in t.items()}
            ),
            HeaderError,
            ["both the"],
        ),
        (
            lambda t: {
                k.replace("weight", f"{'xy'[i % 2]}.weight"): v
                for i, (k, v) in enumerate(t.items())
            },
            HeaderError,
            ["2 adapters: x, y"],
        ),
        (
            lambda t: {**t, "model.layers.0.self_attn.v_proj.lora_A.weight": torch.ones(2, 2)},
            HeaderError,
            ["some names begin"],
        ),
        (
            lambda t: {**t, "base_model.model.a.hada_w1_a": torch.ones(2)},
            CheckpointError,
            ["hada_w1_a", "no home"],
        ),
        (
            lambda t: {**t, "base_model.model.a.lora_diag.weight": torch.ones(2)},
            CheckpointError,
            ["KaSA"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, error, words, adapter: Path):
    rewrite(adapter, change)

    with pytest.raises(error) as caught:
        read_adapter(adapter)

    for word in [*words, "adapter_model.safetensors"]:
        assert word in str(caught.value)


def test_missing_files_are_named(adapter: Path):
    config = (adapter / "adapter_config.json").read_bytes()
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is missing; it holds"):
        read_adapter(adapter)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is missing"):
        read_adapter(adapter / "adapter_model.safetensors")

    (adapter / "adapter_config.json").write_bytes(config)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors or"):
        read_adapter(adapter)


def test_a_file_that_ends_early_is_named(adapter: Path):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])

    with pytest.raises(TruncatedShardError, match="copy it again"):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"r": NaN}', '{"r": 1, "r": 2}', '{"a": ' + "[" * 40 + "]" * 40 + "}"],
    ids=["empty", "list", "torn", "NaN", "twice", "deep"],
)
def test_configurations_that_are_no_json_are_refused(text: str, adapter: Path):
    (adapter / "adapter_config.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_adapter(adapter)


def test_a_checkpoint_is_no_adapter(tmp_path: Path):
    llama().save_pretrained(tmp_path / "model")
    adapter = make_lora(tmp_path / "a", llama(), seed=1, target_modules=["q_proj"])

    assert not is_adapter(tmp_path / "model")
    assert not is_adapter(tmp_path / "model" / "model.safetensors")
    assert not is_adapter(tmp_path / "nothing")
    assert is_adapter(adapter)
    assert is_adapter(adapter / "adapter_model.safetensors")


def test_inspect_shows_an_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(adapter)]) == 0
    shown = capsys.readouterr().out
    assert "4 x 2" in shown
    assert "q_proj x 2" in shown

    assert main(["inspect", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "LORA"


def test_reading_does_not_import_torch(adapter: Path):
    script = (
        "import sys; from pathlib import Path; from streammerge.cli.arguments import main; "
        f"main(['inspect', {str(adapter)!r}]); assert 'torch' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
