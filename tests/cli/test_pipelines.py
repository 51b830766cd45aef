"""Models of several parts: pipelines of diffusers, and modules of sentence-transformers with weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY, recipe_of, write_adapter, write_model
from safetensors.torch import load_file

import streammerge
from streammerge.checkpoint.composite import read_model
from streammerge.checkpoint.foreseeing import foresee_headers
from streammerge.cli.arguments import main
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    OutputError,
    RecipeError,
    StreamMergeError,
)
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.types import MergePlan

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text": "model"}
INDEX: dict[str, Any] = {
    "_class_name": ["mine", "MyPipeline"],
    "_diffusers_version": "0.42",
    "unet": ["diffusers", "UNet2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
}


def write_pipeline(root: Path, value: float, *, parts: tuple[str, ...] = tuple(PARTS)) -> Path:
    for part in parts:
        tensors = {"a.weight": torch.full((4, 3), value), "b.weight": torch.full((5,), value * 2)}
        write_model(root / part / f"{PARTS[part]}.safetensors", tensors)
        (root / part / "config.json").write_text(json.dumps({"_class_name": part}))
    (root / "text" / "config.json").parent.mkdir(exist_ok=True)
    (root / "text" / "config.json").write_text(
        json.dumps({"model_type": "clip_text_model", "torch_dtype": "float32"})
    )
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text('{"steps": 1000}')
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text('{"a": 0, "b": 1}')
    (root / "mine.py").write_text("class MyPipeline: ...")
    (root / "other.py").write_text("")
    index = {name: INDEX[name] for name in INDEX if name not in PARTS or name in parts}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def plan(base: Path, *sources: Any, **document: Any) -> MergePlan:
    planned = streammerge.plan(
        recipe_of("task_arithmetic", base, sources, **document), memory=MEMORY
    )
    assert isinstance(planned, MergePlan)
    return planned


def values(out: Path) -> dict[str, float]:
    """Return the first value of ``a.weight`` in every part."""
    return {
        path.parent.name: float(load_file(path)["a.weight"][0, 0])
        for path in out.glob("*/*.safetensors")
    }


def test_a_pipeline_is_merged_part_by_part(tmp_path: Path) -> None:
    base, source = (
        write_pipeline(tmp_path / name, v) for name, v in (("base", 1.0), ("source", 4.0))
    )

    planned = plan(base, {"path": source, "weight": 0.5})
    streammerge.merge(planned, tmp_path / "out")

    assert values(tmp_path / "out") == {"unet": 2.5, "vae": 2.5, "text": 2.5}
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert files == {
        *(f"{part}/{stem}.safetensors" for part, stem in PARTS.items()),
        *(f"{part}/config.json" for part in PARTS),
        *("model_index.json", "mine.py", "scheduler/scheduler_config.json", "tokenizer/vocab.json"),
        *("README.md", "streammerge_manifest.json", "streammerge_recipe.yaml"),
    }
    assert planned.left_behind == ("other.py",)
    assert not streammerge.verify_files(tmp_path / "out").damages
    assert parse_plan(dump_plan(planned)) == planned
    card = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(card)["library_name"] == "diffusers"
    again = streammerge.verify_against(
        tmp_path / "out" / "streammerge_recipe.yaml", tmp_path / "out", fraction=1, memory=MEMORY
    )
    assert not again.differing


def test_parts_without_partners_are_copied_and_the_recipe_says_so(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 1.0)
    source = write_pipeline(tmp_path / "source", 4.0, parts=("unet", "vae"))
    other = write_pipeline(tmp_path / "other", 7.0, parts=("unet", "text"))
    (base / "vae").rename(tmp_path / "vae")
    index = {name: value for name, value in INDEX.items() if name != "vae"}
    (base / "model_index.json").write_text(json.dumps(index))

    planned = plan(base, source, other, parameters={"weight": 0.5})
    streammerge.merge(planned, tmp_path / "out")

    parts = [
        line.split(maxsplit=1)[1] for line in str(planned).splitlines() if line.startswith("part ")
    ]
    assert parts == ["text/: 2 merged", "unet/: 2 merged"]
    # The unet of all three; the text of the one source that has it; no vae, which the base lacks.
    assert values(tmp_path / "out") == {"unet": 1 + 1.5 + 3, "text": 1 + 3.0}
    rules = yaml.safe_load(planned.recipe)["rules"]
    assert rules == [{"tensors": "vae/*", "drop": True}]
    again = streammerge.merge(
        tmp_path / "out" / "streammerge_recipe.yaml", tmp_path / "again", memory=MEMORY
    )
    assert again.recipe == planned.recipe
    assert set(planned.dropped) == {"vae/a.weight", "vae/b.weight"}


def test_rules_of_the_recipe_come_first(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 1.0)
    source = write_pipeline(tmp_path / "source", 4.0, parts=("unet", "vae"))
    rules = [{"tensors": "text/*", "drop": True}, {"tensors": "vae/a.*", "copy": 0}]

    planned = plan(base, source, rules=rules)
    streammerge.merge(planned, tmp_path / "out")

    assert yaml.safe_load(planned.recipe)["rules"] == rules
    assert values(tmp_path / "out") == {"unet": 4.0, "vae": 4.0}


@pytest.mark.parametrize("how", ["by its folder", "by component"])
def test_a_part_alone_is_merged_into_its_place(how: str, tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 1.0)
    source: dict[str, Any] = {"path": write_pipeline(tmp_path / "source", 4.0) / "unet"}
    if how == "by component":
        source = {"path": source["path"].rename(tmp_path / "mine"), "component": "unet"}

    planned = plan(base, source)
    streammerge.merge(planned, tmp_path / "out")

    assert values(tmp_path / "out") == {"unet": 4.0, "vae": 1.0, "text": 1.0}


def test_a_part_of_a_pipeline_is_merged_into_that_part_alone(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 1.0)
    source = write_pipeline(tmp_path / "source", 4.0)

    streammerge.merge(plan(base / "unet", source), tmp_path / "out")

    merged = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert float(merged["a.weight"][0, 0]) == 4.0


def test_without_a_base_the_first_source_is_what_the_others_are_like(tmp_path: Path) -> None:
    first = write_pipeline(tmp_path / "first", 1.0)
    second = write_pipeline(tmp_path / "second", 4.0, parts=("unet",))

    streammerge.merge(recipe_of("linear", None, [first, second]), tmp_path / "out", memory=MEMORY)

    assert values(tmp_path / "out") == {"unet": 2.5, "vae": 1.0, "text": 1.0}


def test_shards_of_a_part_have_their_own_index(tmp_path: Path) -> None:
    base, source = (
        write_pipeline(tmp_path / name, v) for name, v in (("base", 1.0), ("source", 4.0))
    )
    shutil.rmtree(base / "text")
    write_model(base / "text", {"a.weight": torch.ones(4, 3), "b.weight": torch.ones(5)}, shards=2)
    recipe = recipe_of("task_arithmetic", base, [source], output={"max_shard_size": 60})

    planned = streammerge.plan(recipe, memory=MEMORY)
    streammerge.merge(planned, tmp_path / "out")

    index = json.loads((tmp_path / "out" / "text" / "model.safetensors.index.json").read_text())
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert index["weight_map"] == {"a.weight": names[0], "b.weight": names[1]}
    assert index["metadata"] == {"total_size": 68, "total_parameters": 17}
    for name in names:
        assert (tmp_path / "out" / "text" / name).exists()
    stem = "diffusion_pytorch_model"
    assert (tmp_path / "out" / "unet" / f"{stem}.safetensors.index.json").exists()
    assert not streammerge.verify_files(tmp_path / "out").damages


def test_the_type_of_a_merged_part_is_that_of_its_tensors(tmp_path: Path) -> None:
    base, source = (
        write_pipeline(tmp_path / name, v) for name, v in (("base", 1.0), ("source", 4.0))
    )

    streammerge.merge(plan(base, source, output={"dtype": "bfloat16"}), tmp_path / "out")

    config = json.loads((tmp_path / "out" / "text" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "unet" / "config.json").read_bytes() == (
        base / "unet" / "config.json"
    ).read_bytes()


def test_what_differs_in_a_part_is_told_with_its_folder(tmp_path: Path) -> None:
    base, source = (
        write_pipeline(tmp_path / name, v) for name, v in (("base", 1.0), ("source", 4.0))
    )
    (source / "scheduler" / "scheduler_config.json").write_text('{"steps": 5}')
    (source / "text" / "config.json").write_text('{"model_type": "other"}')
    (source / "tokenizer" / "vocab.json").write_text('{"a": 1, "b": 0}')

    with pytest.raises(CheckpointError, match="2 numbers stand for other tokens"):
        plan(base, source)
    planned = plan(base, source, vocabulary="ignore")

    assert [each.key for each in planned.differences] == ["text/model_type", "tokenizer/vocabulary"]


def test_a_merge_of_parts_that_stops_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, source = (
        write_pipeline(tmp_path / name, v) for name, v in (("base", 1.0), ("source", 4.0))
    )
    planned = plan(base, source)

    def stop(*_: object, **__: object) -> None:
        raise OutputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("streammerge.merging.check_shards", stop)
        with pytest.raises(OutputError, match="stopped"):
            streammerge.merge(planned, tmp_path / "out")
    assert (tmp_path / "out.partial" / "unet").is_dir()

    manifest = streammerge.merge(planned, tmp_path / "out", resume=True)

    assert manifest.run.resumed
    assert values(tmp_path / "out") == {"unet": 4.0, "vae": 4.0, "text": 4.0}
    streammerge.merge(planned, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: write_model(root / "one", {"a": torch.ones(1)}), "say which of them it is with `component`"),
        (lambda root: {"path": write_model(root / "one", {"a": torch.ones(1)}), "component": "unit"}, 'did you mean "unet"'),
        (lambda root: write_adapter(root / "lora", {"a.weight": (4, 3)}, seed=1), "name the folder of the part that it changes as the base"),
    ],
)  # fmt: skip
def test_what_is_no_part_of_a_pipeline_is_refused(make: Any, says: str, tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 1.0)

    with pytest.raises(StreamMergeError) as caught:
        plan(base, make(tmp_path))

    assert says in str(caught.value)


def test_a_component_of_models_without_parts_is_refused(tmp_path: Path) -> None:
    base, source = (write_model(tmp_path / name, {"a": torch.ones(1)}) for name in "bs")

    alone = recipe_of("linear", None, [{"path": source, "component": "unet"}])
    with pytest.raises(RecipeError, match=r"component: unet: .* neither has parts"):
        plan(base, {"path": source, "component": "unet"})
    with pytest.raises(RecipeError, match=r"component: unet: .* neither has parts"):
        streammerge.plan(alone, memory=MEMORY)


def test_inspect_shows_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_pipeline(tmp_path / "base", 1.0)

    assert main(["inspect", str(base), "--json"]) == 0

    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert sorted(tensors) == [f"{part}/{name}.weight" for part in sorted(PARTS) for name in "ab"]


def test_headers_of_all_parts_are_foreseen(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 1.0)

    assert foresee_headers(base).tensors >= 6


def test_a_pipeline_is_no_single_file(tmp_path: Path) -> None:
    base, source = (
        write_pipeline(tmp_path / name, v) for name, v in (("base", 1.0), ("source", 4.0))
    )

    with pytest.raises(RecipeError, match=r"out\.safetensors is one file, and the first model has"):
        streammerge.merge(plan(base, source), tmp_path / "out.safetensors")


@pytest.mark.parametrize("folder", ["../elsewhere", "a/b", "..", "a\\b", "a\nb"])
def test_a_pipeline_names_folders_beside_its_index_only(folder: str, tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 1.0)
    (base / "model_index.json").write_text(json.dumps({folder: ["diffusers", "X"]}))

    with pytest.raises(HeaderError, match="is not the name of a folder beside it"):
        read_model(base)


def test_a_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 1.0)
    (base / "unet").rename(tmp_path / "elsewhere")
    (base / "unet").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match="leads out of the directory"):
        read_model(base)


# sentence-transformers


def make_embedder(path: Path, seed: int) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    inner = path.parent / f"{path.name}-transformer"
    config = BertConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(inner)
    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *"abcdefghij"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",  # noqa: S106
        pad_token="[PAD]",  # noqa: S106
        model_max_length=16,
    ).save_pretrained(inner)
    modules = [Transformer(str(inner), max_seq_length=16), Pooling(8), Dense(8, 4)]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save(str(path), create_model_card=False)
    return model


@pytest.mark.filterwarnings("ignore")
def test_modules_with_weights_are_merged_as_part_of_the_model(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    models = [make_embedder(tmp_path / f"in-{seed}", seed) for seed in range(2)]
    paths = [tmp_path / f"in-{seed}" for seed in range(2)]
    assert (paths[0] / "2_Dense" / "model.safetensors").exists()

    planned = streammerge.plan(recipe_of("linear", None, paths), memory=MEMORY)
    streammerge.merge(planned, tmp_path / "out")

    assert isinstance(planned, MergePlan)
    assert "2_Dense/linear.weight" in {task.name for task in planned.tasks}
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    states = [model.state_dict() for model in models]
    found = loaded.state_dict()
    assert found.keys() == states[0].keys()
    for name in found:
        torch.testing.assert_close(found[name], (states[0][name] + states[1][name]) / 2)
    assert (tmp_path / "out" / "2_Dense" / "config.json").read_bytes() == (
        paths[0] / "2_Dense" / "config.json"
    ).read_bytes()
    assert loaded.encode(["a b c"]).shape == (1, 4)
    assert not streammerge.verify_files(tmp_path / "out").damages


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_in_a_folder_of_its_own_keeps_its_tokenizer(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    models = [make_embedder(tmp_path / f"in-{seed}", seed) for seed in range(2)]
    for seed in range(2):
        root = tmp_path / f"in-{seed}"
        (root / "0_Transformer").mkdir()
        for path in [*root.glob("*.safetensors"), *root.glob("*token*"), root / "config.json"]:
            path.rename(root / "0_Transformer" / path.name)
        (root / "sentence_bert_config.json").rename(
            root / "0_Transformer" / "sentence_bert_config.json"
        )
        (root / "0_Transformer" / "vocab.txt").write_text("a\nb\n")
        modules = json.loads((root / "modules.json").read_text())
        modules[0]["path"] = "0_Transformer"
        (root / "modules.json").write_text(json.dumps(modules))
    recipe = recipe_of("linear", None, [tmp_path / "in-0", tmp_path / "in-1"])

    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)

    assert (tmp_path / "out" / "0_Transformer" / "vocab.txt").exists()
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu").state_dict()
    states = [model.state_dict() for model in models]
    for name, found in loaded.items():
        torch.testing.assert_close(found, (states[0][name] + states[1][name]) / 2)


@pytest.mark.filterwarnings("ignore")
def test_the_file_of_the_transformer_alone_is_not_the_whole_model(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        make_embedder(tmp_path / f"in-{seed}", seed)
        paths.append(tmp_path / f"in-{seed}" / "model.safetensors")

    with pytest.raises(CheckpointError, match="2_Dense: weights of a sentence-transformers module"):
        streammerge.plan(recipe_of("linear", None, paths), memory=MEMORY)


# The pipeline itself, loaded by diffusers.


def make_stable_diffusion(path: Path, seed: int) -> Any:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    files = path.parent / f"{path.name}-tokenizer"
    files.mkdir()
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdef",
        *(f"{c}</w>" for c in ("a", "b", "c", "d", "e", "f", "ab")),
    ]
    (files / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (files / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 8})
    )
    pipeline = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=16,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=8,
            )
        ),
        tokenizer=CLIPTokenizer.from_pretrained(files),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)
    return pipeline


@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_the_pipeline_that_comes_out(tmp_path: Path) -> None:
    diffusers = pytest.importorskip(
        "diffusers", reason="needs diffusers, a development extra: pip install 'streammerge[dev]'"
    )
    pipelines = [make_stable_diffusion(tmp_path / f"in-{seed}", seed) for seed in range(3)]
    # The second source brings only what was tuned.
    shutil.rmtree(tmp_path / "in-2" / "vae")
    recipe = recipe_of(
        "task_arithmetic",
        tmp_path / "in-0",
        [tmp_path / "in-1", tmp_path / "in-2"],
        parameters={"weight": 0.25},
    )

    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)

    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    for part, weights in (
        ("unet", (0.5, 0.25, 0.25)),
        ("text_encoder", (0.5, 0.25, 0.25)),
        ("vae", (0.75, 0.25, 0)),
    ):
        states = [getattr(pipeline, part).state_dict() for pipeline in pipelines]
        for name, found in getattr(loaded, part).state_dict().items():
            terms = (w * state[name] for w, state in zip(weights, states, strict=True))
            expected = states[0][name] if not found.is_floating_point() else sum(terms)
            torch.testing.assert_close(found, expected, msg=f"{part} {name}")
    images = loaded("a b", num_inference_steps=1, output_type="np", height=8, width=8).images
    assert images.shape[0] == 1


def test_a_part_of_a_pipeline_with_an_adapter_is_no_source(tmp_path: Path) -> None:
    """The adapter changes tensors under the names that they have in the part."""
    first = write_pipeline(tmp_path / "first", 1.0)
    other = write_pipeline(tmp_path / "other", 2.0)
    adapter = write_adapter(tmp_path / "lora", {"a.weight": (4, 3)}, seed=1)
    sources = [
        {"path": str(first)},
        {"path": str(other / "unet"), "component": "unet", "adapter": str(adapter)},
    ]

    with pytest.raises(StreamMergeError, match=r"sources\[1\]\.adapter: .* part of a pipeline"):
        streammerge.plan(recipe_of("linear", None, sources))
