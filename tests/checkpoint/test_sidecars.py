"""The files beside the shards reach the output, and config.json tells the dtype of the result."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import math
import os
import re
import tracemalloc
from pathlib import Path
from typing import Self

import pytest

from streammerge.checkpoint import sidecars
from streammerge.checkpoint.inputs import MAX_JSON_DEPTH
from streammerge.checkpoint.reading import MAX_CONFIG_BYTES
from streammerge.checkpoint.sidecars import (
    COPY_BYTES,
    MAX_SIDECAR_BYTES,
    list_left_behind,
    plan_sidecars,
    read_companions,
    write_sidecars,
)
from streammerge.errors import (
    CheckpointError,
    DiskSpaceError,
    HeaderError,
    OutputError,
    StreamMergeError,
)

COPIED = (
    "LICENSE",
    "License.txt",
    "NOTICE.md",
    "SYSTEM_PROMPT.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    "generation_config.json",
    "image_processor_config.json",
    "merges.txt",
    "open_clip_config.json",
    "params.json",
    "policy_postprocessor.json",
    "policy_preprocessor.json",
    "policy_preprocessor_step_5_normalizer_processor.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "prompts/default.md",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
LEFT = (
    ".git/config.json",
    ".gitattributes",
    ".tokenizer.model",
    "README.md",
    "additional_chat_templates/.hidden.jinja",
    "additional_chat_templates/notes.txt",
    "custom_generate/weights.bin",
    "hf_quant_config.json",
    "policy.safetensors",
    "spk_dict.pt",
    "system_prompt.bin",
    "licensed.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_unnamed.py",
    "notice.bin",
    "optimizer.pt",
    "original/tokenizer.model",
    "pytorch_model.bin",
    "trainer_state.json",
    "training_args.bin",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An empty directory for a model."""
    directory = tmp_path / "model"
    directory.mkdir()
    return directory


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty directory for the output."""
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def put(directory: Path, *names: str, content: object = "{}") -> None:
    raw = content if isinstance(content, str) else json.dumps(content)
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(raw, encoding="utf-8")


def planned(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in plan_sidecars(directory)]


def refusal(directory: Path, error_type: type[StreamMergeError] = CheckpointError) -> str:
    with pytest.raises(error_type) as caught:
        plan_sidecars(directory)
    assert type(caught.value) is error_type
    assert str(directory) in str(caught.value)
    return str(caught.value)


def rewritten(model: Path, out: Path, config: object, dtype: str = "bfloat16") -> object:
    put(model, "config.json", content=config)
    write_sidecars(model, read_companions(model), out, dtype=dtype)
    return json.loads((out / "config.json").read_text())


def test_plan_holds_what_a_model_needs_and_nothing_else(model: Path) -> None:
    put(model, *COPIED, *LEFT)

    assert planned(model) == sorted(COPIED)


def test_what_is_left_behind_is_named_but_for_hidden_files_and_the_readme(model: Path) -> None:
    put(model, *COPIED, *LEFT)
    shards = ["model.safetensors", "model.safetensors.index.json"]

    left = list_left_behind(model, [*planned(model), *shards])

    hidden = {name for name in LEFT if any(part.startswith(".") for part in name.split("/"))}
    expected = {*LEFT} - hidden - {*shards, "README.md", "original/tokenizer.model"}
    assert left == tuple(sorted(expected | {"original/"}))


def test_plan_of_a_directory_without_such_files_is_empty(model: Path) -> None:
    put(model, "model.safetensors", "README.md")

    assert plan_sidecars(model) == ()


def test_every_tokenizer_file_that_transformers_reads_is_in_the_plan(model: Path) -> None:
    """The names are read from the source text: importing every tokenizer takes minutes."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not installed")
    names = {"tokenizer.json"}
    for module in Path(spec.origin).parent.glob("models/*/tokenization_*.py"):
        for table in re.findall(
            r"^VOCAB_FILES_NAMES = \{(.*?)\}", module.read_text(), re.MULTILINE | re.DOTALL
        ):
            names |= set(re.findall(r':\s*"([^"]+\.[^"]+)"', table))
    put(model, *names)

    assert len(names) > 10
    assert planned(model) == sorted(names)


def test_directories_with_the_name_of_a_file_are_passed_over(model: Path) -> None:
    (model / "LICENSES").mkdir()
    (model / "tokenizer.model").mkdir()

    assert planned(model) == []


def test_written_names_are_sorted_and_contents_equal(model: Path, out: Path) -> None:
    for index, name in enumerate(COPIED):
        put(model, name, content=json.dumps({"value": index}))

    written = write_sidecars(model, read_companions(model), out, dtype=None)

    assert tuple(written) == tuple(sorted(COPIED))
    for name in COPIED:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert sum(path.is_file() for path in out.rglob("*")) == len(COPIED)


def test_a_second_write_gives_the_same_bytes(model: Path, out: Path) -> None:
    put(model, "config.json", content={"z": 1, "a": 2})
    put(model, "LICENSE", content="terms")
    write_sidecars(model, read_companions(model), out, dtype="float16")
    first = (out / "config.json").read_bytes()
    put(out, "LICENSE", content="cut off in the middle, and longer than the original")

    write_sidecars(model, read_companions(model), out, dtype="float16")

    assert (out / "config.json").read_bytes() == first
    assert (out / "LICENSE").read_bytes() == b"terms"


def test_links_are_followed_and_the_output_holds_files(model: Path, out: Path) -> None:
    """The Hugging Face cache: snapshots are links to blobs elsewhere."""
    blobs = model.parent / "blobs"
    put(blobs, "4c1f", content='{"torch_dtype": "float32"}')
    put(blobs, "77aa", content="a tokenizer")
    (model / "config.json").symlink_to(blobs / "4c1f")
    (model / "tokenizer.json").symlink_to(Path("..") / "blobs" / "77aa")

    written = write_sidecars(model, read_companions(model), out, dtype="float16")

    assert tuple(written) == ("config.json", "tokenizer.json")
    assert (out / "tokenizer.json").read_bytes() == b"a tokenizer"
    assert not (out / "tokenizer.json").is_symlink()
    assert (blobs / "4c1f").read_text() == '{"torch_dtype": "float32"}'


def test_large_files_are_copied_in_pieces(model: Path, out: Path) -> None:
    content = os.urandom(9 * COPY_BYTES + 1)
    (model / "tokenizer.json").write_bytes(content)
    tracemalloc.start()
    write_sidecars(model, read_companions(model), out, dtype=None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert (out / "tokenizer.json").read_bytes() == content
    assert peak < 4 * COPY_BYTES


def test_custom_code_comes_with_what_it_imports_from_beside_it(model: Path) -> None:
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "other/repository--modeling_elsewhere.Model",
        "AutoModelForCausalLM": "not_here.Model",
    }
    put(model, "config.json", content={"auto_map": auto_map})
    put(
        model,
        "tokenizer_config.json",
        content={"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}},
    )
    put(model, "configuration_own.py", content="from .helpers import (\n  a,\n)\nimport json\n")
    put(
        model,
        "helpers.py",
        content="import torch\nif True:\n    import .deeper\nfrom .gone import b",
    )
    put(model, "deeper.py", content="from .helpers import c  # a circle\n")
    put(model, "tokenization_own.py", "modeling_elsewhere.py", "json.py", "train.py", content="")

    assert planned(model) == [
        "config.json",
        "configuration_own.py",
        "deeper.py",
        "helpers.py",
        "tokenization_own.py",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "reference", ["../outside.Model", "/etc/passwd.x", "sub/module.Model", "", ".", 7, {"a": []}]
)
def test_an_auto_map_reaches_no_file_outside_the_directory(model: Path, reference: object) -> None:
    put(model.parent, "outside.py", content="")
    put(model, "sub/module.py", ".py", content="")
    put(model, "config.json", content={"auto_map": {"AutoModel": reference}})

    assert planned(model) == ["config.json"]


def test_sentence_transformers_modules_are_in_the_plan(model: Path) -> None:
    names = ["1_Pooling/config.json", "config.json", "config_sentence_transformers.json"]
    names += ["custom_st.py", "modules.json", "sentence_bert_config.json"]
    put(model, *names, "1_Pooling/README.md", "runs/config.json", "2_Normalize/.keep")
    modules = [{"path": "", "type": "custom_st.Transformer"}, {"path": "1_Pooling", "type": "x.y"}]
    put(model, "modules.json", content=modules)

    assert planned(model) == names


def test_numbered_directories_are_nothing_special_without_modules(model: Path) -> None:
    put(model, "1_Pooling/config.json", "2_Dense/model.safetensors")

    assert planned(model) == []


def test_a_module_with_weights_that_nobody_reads_is_refused(model: Path) -> None:
    put(model, "modules.json", content=[])
    put(model, "2_Dense/config.json", "2_Dense/model.h5")

    assert "2_Dense/model.h5: weights of a sentence-transformers module" in refusal(model)
    put(model, "2_Dense/model.safetensors")
    assert planned(model) == ["2_Dense/config.json", "modules.json"]


def test_dtype_is_replaced_in_place(model: Path, out: Path) -> None:
    put(model, "config.json", content='{"z": 1, "dtype": "float32", "a": [1e-05, "\\u00e9"]}')
    write_sidecars(model, read_companions(model), out, dtype="bfloat16")

    assert (out / "config.json").read_bytes() == (
        b'{\n  "z": 1,\n  "dtype": "bfloat16",\n  "a": [\n    1e-05,\n    "\\u00e9"\n  ]\n}\n'
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": 1}, {"a": 1, "dtype": "bfloat16"}),  # neither: the newer key
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),  # older key only
        (
            {"dtype": "float32", "torch_dtype": "float32"},
            {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
        ),
        ({"torch_dtype": None}, {"torch_dtype": "bfloat16"}),  # null is a dtype left open
        ({"dtype": {"": "float32", "vision": "float16"}}, {"dtype": "bfloat16"}),  # one per part
        (
            {  # sub-models, at any depth
                "torch_dtype": "float16",
                "text_config": {"torch_dtype": "float16", "hidden_size": 8},
                "thinker_config": {"vision_config": {"dtype": "float32"}},
            },
            {
                "torch_dtype": "bfloat16",
                "text_config": {"torch_dtype": "bfloat16", "hidden_size": 8},
                "thinker_config": {"vision_config": {"dtype": "bfloat16"}},
            },
        ),
        (
            {"decoder": {"model_type": "gpt2", "dtype": "float32"}},  # encoder-decoder
            {"decoder": {"model_type": "gpt2", "dtype": "bfloat16"}, "dtype": "bfloat16"},
        ),
        (
            {"text_config": {"hidden_size": 8}},  # nothing is added to a sub-model
            {"text_config": {"hidden_size": 8}, "dtype": "bfloat16"},
        ),
        (
            {"vocabulary_map": {"dtype": 77}, "labels": {"dtype": "a label"}},  # other meanings
            {
                "vocabulary_map": {"dtype": 77},
                "labels": {"dtype": "a label"},
                "dtype": "bfloat16",
            },
        ),
        (
            {"_class_name": "UNet2DConditionModel"},  # diffusers keeps no dtype
            {"_class_name": "UNet2DConditionModel"},
        ),
    ],
)
def test_every_dtype_of_the_model_becomes_the_new_one(
    model: Path, out: Path, config: object, expected: object
) -> None:
    result = rewritten(model, out, config)

    assert result == expected
    assert json.dumps(result) == json.dumps(expected), "the order of keys changed"


def test_infinity_survives_the_rewrite(model: Path, out: Path) -> None:
    result = rewritten(model, out, '{"time_step_limit": [0.0, Infinity]}')

    assert result == {"time_step_limit": [0.0, math.inf], "dtype": "bfloat16"}


def test_config_is_copied_byte_for_byte_without_a_dtype(model: Path, out: Path) -> None:
    put(model, "config.json", content='{ "dtype" :"float32"}\n\n')
    write_sidecars(model, read_companions(model), out, dtype=None)

    assert (out / "config.json").read_bytes() == b'{ "dtype" :"float32"}\n\n'


def test_only_the_config_of_the_model_is_rewritten(model: Path, out: Path) -> None:
    put(model, "modules.json", content=[])
    put(model, "1_Pooling/config.json", "generation_config.json", content='{"dtype":"float32"}')
    write_sidecars(model, read_companions(model), out, dtype="bfloat16")

    assert (out / "1_Pooling/config.json").read_bytes() == b'{"dtype":"float32"}'
    assert (out / "generation_config.json").read_bytes() == b'{"dtype":"float32"}'


def test_a_file_at_the_limit_is_planned_and_one_above_is_refused(model: Path) -> None:
    path = model / "tokenizer.model"
    path.touch()
    os.truncate(path, MAX_SIDECAR_BYTES)

    assert planned(model) == ["tokenizer.model"]

    os.truncate(path, MAX_SIDECAR_BYTES + 1)

    assert "tokenizer.model: has 256.0 MiB" in refusal(model)


def test_a_config_too_large_to_parse_is_refused(model: Path) -> None:
    put(model, "config.json")
    os.truncate(model / "config.json", MAX_CONFIG_BYTES + 1)

    assert f"has {MAX_CONFIG_BYTES + 1} bytes, the limit is" in refusal(model, HeaderError)


def test_a_missing_directory_is_refused(model: Path) -> None:
    assert "cannot be listed: No such file" in refusal(model / "gone")


def test_a_link_to_a_file_that_is_gone_is_refused(model: Path) -> None:
    (model / "tokenizer.json").symlink_to(model / "gone")

    assert "tokenizer.json: is a link to a file that is gone" in refusal(model)


def test_a_link_to_itself_is_refused(model: Path) -> None:
    (model / "tokenizer.json").symlink_to(model / "tokenizer.json")

    assert "tokenizer.json: cannot be read" in refusal(model)


def test_a_pipe_is_refused_and_not_waited_for(model: Path) -> None:
    os.mkfifo(model / "merges.txt")

    assert "merges.txt: expected a regular file" in refusal(model)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_file_is_refused(model: Path) -> None:
    put(model, "vocab.txt")
    (model / "vocab.txt").chmod(0)

    assert "vocab.txt: cannot be read: Permission denied" in refusal(model)


@pytest.mark.parametrize("name", [b"LICENSE\n.txt", b"LICENSE\xff", b"a\x1b[2J.model"])
def test_a_name_that_cannot_be_printed_is_refused(model: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(model) + b"/" + name)).touch()
    message = refusal(model)

    assert "holds characters that cannot be printed" in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_config_that_is_not_json_is_refused(model: Path, content: str, message: str) -> None:
    put(model, "tokenizer_config.json", content=content)

    assert message in refusal(model, HeaderError)


def test_modules_that_are_not_text_are_refused(model: Path) -> None:
    (model / "modules.json").write_bytes(b"\xff\xfe\xff")

    assert "expected UTF-8" in refusal(model, HeaderError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object, got list"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    ],
)
def test_a_config_that_cannot_be_rewritten_is_refused(
    model: Path, out: Path, content: str, message: str
) -> None:
    put(model, "config.json", content=content)
    with pytest.raises(HeaderError, match=message):
        write_sidecars(model, read_companions(model), out, dtype="bfloat16")

    assert not (out / "config.json").exists()


def test_json_is_written_up_to_the_limit_of_its_depth_and_refused_above(
    model: Path, out: Path
) -> None:
    """Python's reader and writer give up at different depths, which differ between versions."""
    for depth in (MAX_JSON_DEPTH, MAX_JSON_DEPTH + 1, 990, 9000):
        put(model, "config.json", content='{"config": ' * depth + "1" + "}" * depth)
        with (
            contextlib.nullcontext()
            if depth == MAX_JSON_DEPTH
            else pytest.raises(HeaderError, match=f"{depth} levels, the limit is {MAX_JSON_DEPTH}")
        ):
            write_sidecars(model, read_companions(model), out, dtype="bfloat16")


def test_the_input_is_never_the_output(model: Path) -> None:
    put(model, "config.json", content='{"a":1}')
    with pytest.raises(OutputError, match="is the directory of the input"):
        write_sidecars(
            model, read_companions(model), model.parent / "out" / ".." / "model", dtype="bfloat16"
        )

    assert (model / "config.json").read_bytes() == b'{"a":1}'


def test_an_output_that_cannot_be_written_is_an_output_error(model: Path, out: Path) -> None:
    put(model, "config.json", "merges.txt")
    (out / "merges.txt").mkdir()

    with pytest.raises(OutputError, match=r"merges\.txt: cannot be written: Is a directory"):
        write_sidecars(model, read_companions(model), out, dtype=None)


@pytest.mark.parametrize(
    ("number", "error_type"), [(errno.ENOSPC, DiskSpaceError), (errno.EIO, CheckpointError)]
)
def test_a_full_disk_is_told_from_a_failing_input(
    model: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error_type: type[StreamMergeError],
) -> None:
    """ENOSPC comes from the file written, EIO from the file read."""
    failing = out if error_type is DiskSpaceError else model
    put(model, "merges.txt", content="merges")
    plain_open = Path.open

    class Failing:
        def __init__(self, stream: object) -> None:
            self._stream = stream

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self._stream.close()

        def fileno(self) -> int:
            return self._stream.fileno()

        def read(self, _: int) -> bytes:
            raise OSError(number, os.strerror(number))

        write = read

    def open_path(path: Path, mode: str) -> object:
        stream = plain_open(path, mode)
        return Failing(stream) if path.parent == failing else stream

    def open_descriptor(descriptor: int, mode: str) -> object:
        stream = plain_fdopen(descriptor, mode)
        return Failing(stream) if failing == out else stream

    plain_fdopen = os.fdopen
    monkeypatch.setattr(sidecars.Path, "open", open_path)
    monkeypatch.setattr(os, "fdopen", open_descriptor)
    with pytest.raises(error_type, match=r"merges\.txt"):
        write_sidecars(model, read_companions(model), out, dtype=None)
