"""Whatever is wrong is refused with a name, a place and two numbers, and leaves nothing behind.

Every test goes through the command line: exit code, class of the error, the words a person needs,
and a directory tree that is byte for byte what it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY, Models, load_model, recipe_of, write_shard_in_order

import streammerge
from streammerge import run
from streammerge.checkpoint import bytesource
from streammerge.checkpoint.bytesource import ByteSourceKind, PreadSource, choose_file_source
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.places import MARKER_NAME
from streammerge.cli.arguments import main
from streammerge.errors import CheckpointError, TruncatedShardError
from streammerge.native.library import load_kernels

FAILED, USAGE, DOES_NOT_FIT, EXISTS = 1, 2, 3, 4
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.arange(5.0)}
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "F32", "shape": [5], "data_offsets": [24, 44]}
"""The headers of ``TENSORS``."""

Refuse = Callable[..., str]


def tree(root: Path) -> dict[str, object]:
    """Return everything below ``root``: content and time of files, targets of links."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_dir():
            found[name] = "directory"
        else:
            found[name] = (path.read_bytes(), path.stat().st_mtime_ns)
    return found


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Merge by the command line, check that it refuses and touches nothing; return what it says."""

    def merge(
        recipe: object,
        *arguments: str,
        code: int,
        error: str,
        says: tuple[object, ...] = (),
        keeps_work: bool = False,
    ) -> str:
        out = str(tmp_path / "out")
        if arguments and not arguments[0].startswith("--"):
            out, *arguments = arguments
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
        before = tree(tmp_path)

        exit_code = main(["merge", str(file), out, "--memory", MEMORY, *arguments])

        printed = capsys.readouterr()
        assert (exit_code, printed.out) == (code, "")
        assert printed.err.startswith(f"{error}: "), printed.err
        for words in says:
            assert str(words) in printed.err
        after = tree(tmp_path)
        if keeps_work:
            after = {name: it for name, it in after.items() if not name.startswith("out.partial")}
        assert after == before
        return printed.err

    return merge


@pytest.fixture
def good(models: Models) -> Path:
    """A sound model."""
    return models.write(TENSORS, "good")


def shard_bytes(header: object, data: bytes = bytes(44)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_raw(directory: Path, content: bytes, name: str = "model.safetensors") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(content)
    return directory


# -- files that are not what they should be


def test_one_shard_of_several_is_no_model(refuse: Refuse, models: Models) -> None:
    sharded = models.write(TENSORS, "sharded", shards=2)
    shard = sharded / "model-00001-of-00002.safetensors"

    said = refuse(
        recipe_of("linear", None, [shard, shard]),
        code=FAILED,
        error="CheckpointError",
        says=(shard, "one shard of several", f"name the directory, {sharded}"),
    )

    assert "sources[0]" in said


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        # The data section has 40 of its 44 bytes.
        (shard_bytes({"a": A, "b": B}, bytes(40)), "TruncatedShardError", ("of", "copy it again")),
        # The length field promises more header than there is file.
        (struct.pack("<Q", 9_999) + b"{}" + bytes(50), "TruncatedShardError", (10_007, 60)),
        # A length field of random bytes: more than any header may have.
        (struct.pack("<Q", 2**62) + b"{}" + bytes(50), "HeaderError", (2**62, 100_000_000)),
        (
            shard_bytes({"a": A | {"data_offsets": [-8, 16]}, "b": B}),
            "HeaderError",
            ("'a'", "[-8, 16]"),
        ),
        (
            shard_bytes({"a": A, "b": B | {"data_offsets": [20, 40]}}, bytes(40)),
            "HeaderError",
            ("'b'", "overlaps", 20, 24),
        ),
        (
            shard_bytes({"a": A, "b": B | {"data_offsets": [28, 48]}}, bytes(48)),
            "HeaderError",
            ("'b'", "hole", 28, 24),
        ),
        # In order, without hole, and far beyond the end of the file.
        (
            shard_bytes(
                {"a": A, "b": B | {"shape": [10**9], "data_offsets": [24, 24 + 4 * 10**9]}}
            ),
            "TruncatedShardError",
            ("declares data through byte",),
        ),
        (
            shard_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(A).encode(),) * 2), bytes(24)),
            "HeaderError",
            ("'a'", "twice"),
        ),
        # Six elements of four bytes are 24, not 20.
        (
            shard_bytes({"a": A | {"data_offsets": [0, 20]}}, bytes(20)),
            "HeaderError",
            ("'a'", "[2, 3]", 24, 20),
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 90868376\n",
            "HeaderError",
            ("Git LFS pointer", "git lfs pull"),
        ),
        (
            b"To whom it may concern: there are no weights here at all.",
            "HeaderError",
            ("not a safetensors file",),
        ),
        (b"", "TruncatedShardError", ("empty (0 bytes)",)),
    ],
    ids=[
        "truncated",
        "header longer than the file",
        "header longer than allowed",
        "negative offset",
        "overlap",
        "hole",
        "offset beyond the file",
        "duplicate key",
        "wrong byte count",
        "LFS pointer",
        "not safetensors",
        "empty",
    ],
)
def test_a_broken_shard_is_refused_by_name(
    content: bytes, error: str, says: tuple[object, ...], good: Path, refuse: Refuse
) -> None:
    broken = write_raw(good.parent / "broken", content)
    recipe = recipe_of("linear", None, [good, broken])

    refuse(
        recipe,
        code=FAILED,
        error=error,
        says=(broken / "model.safetensors", "sources[1]", *says),
    )


def test_a_truncated_shard_is_told_with_both_sizes(
    tmp_path: Path, good: Path, refuse: Refuse
) -> None:
    whole = (good / "model.safetensors").read_bytes()
    broken = write_raw(tmp_path / "broken", whole[:-4])

    refuse(
        recipe_of("linear", None, [broken]),
        code=FAILED,
        error="TruncatedShardError",
        says=(len(whole), len(whole) - 4),
    )


def test_an_index_that_names_a_missing_shard_is_refused(models: Models, refuse: Refuse) -> None:
    sharded = models.write(TENSORS, shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()

    refuse(
        recipe_of("linear", None, [sharded]),
        code=FAILED,
        error="HeaderError",
        says=("model-00002-of-00002.safetensors", "2 shards, 1 are not there"),
    )


def test_a_tensor_that_an_index_promises_is_missed_where_it_is_needed(
    models: Models, refuse: Refuse
) -> None:
    whole = models.write(TENSORS | {"c.weight": torch.ones(3)})
    sharded = models.write(TENSORS, shards=2)
    index = sharded / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["c.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(document))

    refuse(
        recipe_of("linear", None, [whole, sharded]),
        code=FAILED,
        error="MissingTensorError",
        says=("not in sources[1]", "c.weight"),
    )


def test_a_source_that_is_not_there_is_refused(tmp_path: Path, good: Path, refuse: Refuse) -> None:
    refuse(
        recipe_of("linear", None, [good, tmp_path / "absent"]),
        code=FAILED,
        error="CheckpointError",
        says=(tmp_path / "absent", "No such file", "sources[1]"),
    )


def test_an_adapter_is_refused_as_what_it_is(tmp_path: Path, good: Path, refuse: Refuse) -> None:
    adapter = write_raw(tmp_path / "adapter", b"{}", "adapter_config.json")
    (adapter / "adapter_model.safetensors").write_bytes(shard_bytes({"a": A}, bytes(24)))

    refuse(
        recipe_of("linear", None, [good, adapter]),
        code=USAGE,
        error="RecipeError",
        says=(adapter, "is an adapter", "add `base: PATH`"),
    )


def test_the_base_is_named_as_such_when_it_is_broken(
    tmp_path: Path, good: Path, refuse: Refuse
) -> None:
    broken = write_raw(tmp_path / "broken", b"")

    refuse(
        recipe_of("task_arithmetic", broken, [good]),
        code=FAILED,
        error="TruncatedShardError",
        says=("while reading base",),
    )


# -- inputs that do not belong together


def test_two_shapes_of_a_tensor_are_refused(models: Models, good: Path, refuse: Refuse) -> None:
    other = models.write(TENSORS | {"a.weight": torch.zeros(3, 2)})

    refuse(
        recipe_of("linear", None, [good, other]),
        code=FAILED,
        error="ShapeMismatchError",
        says=("a.weight", "[2, 3] in sources[0]", "[3, 2] in sources[1]", "copy"),
    )


def test_missing_tensors_are_listed_with_who_lacks_them(
    models: Models, good: Path, refuse: Refuse
) -> None:
    extra = {f"extra.{index}": torch.ones(2) for index in range(13)}
    larger = models.write(TENSORS | extra)

    said = refuse(
        recipe_of("linear", None, [good, larger]),
        code=FAILED,
        error="MissingTensorError",
        says=(
            "13 tensor(s)",
            "not in sources[0]",
            "extra.0",
            "and 3 more",
            '{tensors: "extra.*", drop: true}',
        ),
    )
    # There is no base that could lend its tensors.
    assert "missing: base" not in said


def test_missing_base_copies_what_a_source_lacks(models: Models) -> None:
    base = models.write(TENSORS | {"c.weight": torch.tensor([-0.0, 1.5])})
    source = models.write(TENSORS)

    merged, manifest = models.merge(recipe_of("task_arithmetic", base, [source], missing="base"))

    assert manifest.copied_from_base == ("c.weight",)
    assert manifest.tensors["c.weight"].action == "copy"
    # Bits, so that the sign of the zero counts.
    assert merged["c.weight"].numpy().tobytes() == b"\0\0\0\x80\0\0\xc0\x3f"


def test_a_tensor_missing_from_the_base_is_refused_even_when_the_base_lends(
    models: Models, refuse: Refuse
) -> None:
    base = models.write({"a.weight": TENSORS["a.weight"]})
    source = models.write(TENSORS)

    refuse(
        recipe_of("task_arithmetic", base, [source], missing="base"),
        code=FAILED,
        error="MissingTensorError",
        says=("not in base", "b.weight"),
    )


def test_a_float_here_and_an_integer_there_is_refused(
    models: Models, good: Path, refuse: Refuse
) -> None:
    other = models.write(TENSORS | {"b.weight": torch.arange(5)}, "integers")

    refuse(
        recipe_of("linear", None, [good, other]),
        code=FAILED,
        error="UnsupportedDTypeError",
        says=("b.weight", "F32 in sources[0]", "I64 in sources[1]"),
    )


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (TENSORS, {"quantization_config": {"quant_method": "gptq"}}, ("config.json", "gptq")),
        (
            {"x.qweight": torch.zeros(4, 4, dtype=torch.int32), "x.scales": torch.ones(4)},
            {},
            ("x.qweight", "packed"),
        ),
        ({"x.weight": torch.zeros(4, 4, dtype=torch.uint8)}, {}, ("x.weight", "U8")),
        (
            {
                "x.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
                "x.weight_quantizer._amax": torch.ones(1),
            },
            {},
            ("x.weight", "F8_E4M3", "x.weight_quantizer._amax"),
        ),
    ],
    ids=["config", "packed integers", "integer weight", "scaled float8"],
)
def test_quantised_weights_are_never_averaged(
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    says: tuple[str, ...],
    models: Models,
    refuse: Refuse,
) -> None:
    quantised = models.write(tensors)
    (quantised / "config.json").write_text(json.dumps(config))

    refuse(
        recipe_of("linear", None, [quantised, quantised]),
        code=FAILED,
        error="QuantizedCheckpointError",
        says=("dequantise", *says),
    )


def test_integer_buffers_that_differ_are_refused_with_the_element(
    models: Models, refuse: Refuse
) -> None:
    ids = torch.arange(9)
    changed = ids.clone()
    changed[7] = 700
    first = models.write(TENSORS | {"position_ids": ids})
    second = models.write(TENSORS | {"position_ids": changed})

    refuse(
        recipe_of("linear", None, [first, second]),
        code=FAILED,
        error="CheckpointError",
        says=("position_ids", "I64", "sources[0]", "sources[1]", "element 7", "copy"),
    )


# -- numbers that would poison the result


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["base", "source"])
def test_a_value_that_is_not_finite_stops_the_merge(
    value: float, place: str, models: Models, good: Path, refuse: Refuse
) -> None:
    poisoned = TENSORS["a.weight"].clone()
    poisoned[1, 2] = value
    bad = models.write(TENSORS | {"a.weight": poisoned}, "bad")
    base, source = (bad, good) if place == "base" else (good, bad)
    label = "base" if place == "base" else "sources[0]"

    refuse(
        recipe_of("task_arithmetic", base, [source]),
        code=FAILED,
        error="NonFiniteError",
        says=("a.weight", f"{label} ({bad})", str(value), "element [1, 2]", "non_finite: keep"),
    )


def test_the_element_is_named_across_blocks(models: Models, refuse: Refuse) -> None:
    """The third block of a tensor of several; places inside a block must not be confused."""
    wide = torch.zeros(300, 1000)
    wide[200, 77] = float("nan")
    bad = models.write({"wide": wide})

    refuse(
        recipe_of("linear", None, [bad]),
        code=FAILED,
        error="NonFiniteError",
        says=("element [200, 77]",),
    )


def test_values_that_are_not_finite_are_kept_and_counted_on_request(models: Models) -> None:
    first = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    second = torch.tensor([1.0, 2.0, float("-inf"), float("inf")])
    recipe = recipe_of(
        "linear", None, [models.write({"a": first}), models.write({"a": second})], non_finite="keep"
    )

    merged, manifest = models.merge(recipe)

    expected = [1.0, float("nan"), float("-inf"), float("inf")]
    assert [str(value) for value in merged["a"].tolist()] == [str(value) for value in expected]
    assert manifest.tensors["a"].not_finite == 4


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_more_nan_than_the_density_keeps_is_kept_and_counted(
    method: str, scope: str, models: Models
) -> None:
    """NaN outranks every threshold, so none below it can be found."""
    nan = torch.full((100,), float("nan"))
    nan[:10] = 1.0
    base = models.write({"a": torch.zeros(100)})
    recipe = recipe_of(
        method,
        base,
        [models.write({"a": nan})],
        non_finite="keep",
        parameters={"density": 0.2, "scope": scope},
    )

    merged, manifest = models.merge(recipe)

    assert manifest.tensors["a"].not_finite == 90
    assert int(torch.isnan(merged["a"]).sum()) > 0


def test_a_sum_beyond_float16_is_refused(models: Models, refuse: Refuse) -> None:
    large = {"a": torch.tensor([1.0, 60_000.0], dtype=torch.float16)}
    recipe = recipe_of(
        "linear",
        None,
        [models.write(large), models.write(large)],
        parameters={"normalize": False},
    )

    refuse(
        recipe,
        code=FAILED,
        error="NonFiniteError",
        says=("a:", "120000", "element [1]", "65504", "F16", "output.dtype"),
    )


def test_a_task_vector_beyond_float32_is_refused(models: Models, refuse: Refuse) -> None:
    base = models.write({"a": torch.tensor([-3e38])})
    source = models.write({"a": torch.tensor([3e38])})

    refuse(
        recipe_of("task_arithmetic", base, [source]),
        code=FAILED,
        error="NonFiniteError",
        says=("a:", "overflows", "compute_dtype: float64"),
    )


# -- recipes that ask for what cannot be


@pytest.mark.parametrize("weights", [[0.5, -0.5], [0.0, 0.0]])
def test_weights_that_sum_to_zero_are_refused_where_they_divide(
    weights: list[float], good: Path, refuse: Refuse
) -> None:
    refuse(
        recipe_of("linear", None, [good, good], parameters={"weight": weights}),
        code=USAGE,
        error="RecipeError",
        says=("weight", weights, "sum to 0", "normalize: false"),
    )


def test_weights_that_sum_to_zero_are_fine_where_they_do_not_divide(
    models: Models, good: Path
) -> None:
    parameters = {"weight": [0.5, -0.5], "normalize": False}

    merged, _ = models.merge(recipe_of("linear", None, [good, good], parameters=parameters))

    assert merged["a.weight"].tolist() == [[0.0] * 3] * 2


def test_weights_that_a_rule_makes_sum_to_zero_are_refused(good: Path, refuse: Refuse) -> None:
    rules = [{"tensors": "b.*", "weight": [1.0, -1.0]}]

    refuse(
        recipe_of("linear", None, [good, good], rules=rules),
        code=USAGE,
        error="RecipeError",
        says=("sum to 0",),
    )


@pytest.mark.parametrize("density", [1.5, -0.1, float("nan"), float("inf"), True, "0,3", None])
@pytest.mark.parametrize("place", ["parameters", "source", "rule"])
def test_a_density_outside_its_range_is_refused_where_it_stands(
    density: object, place: str, good: Path, refuse: Refuse
) -> None:
    recipe = recipe_of("ties", good, [good], parameters={"density": 0.5})
    if place == "parameters":
        recipe["parameters"]["density"] = density
        path = "parameters.density"
    elif place == "source":
        recipe["sources"][0]["density"] = density
        path = "sources[0].density"
    else:
        recipe["rules"] = [{"tensors": "*", "density": density}]
        path = "rules[0].density"

    refuse(recipe, code=USAGE, error="RecipeError", says=(path, "number in [0, 1]"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "tise"}, ("method", '"tise"', 'did you mean "ties"?')),
        ({"parameters": {"densty": 0.5}}, ("parameters.densty", 'did you mean "density"?')),
        ({"sorces": []}, ("sorces", 'did you mean "sources"?')),
        ({"output": {"dtpye": "bfloat16"}}, ("output.dtpye", 'did you mean "dtype"?')),
        ({"output": {"dtype": "bfloat"}}, ("output.dtype", "bfloat16")),
        ({"seed": -1}, ("seed", "-1")),
        ({"rules": [{"tensors": "*", "copy": 7}]}, ("rules[0].copy", "7")),
        ({"merge_method": "ties"}, ("mergekit",)),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_an_unknown_word_is_refused_with_its_place(
    change: dict[str, Any], says: tuple[str, ...], good: Path, refuse: Refuse
) -> None:
    recipe = recipe_of("ties", good, [good], parameters={"density": 0.5}) | change

    refuse(recipe, code=USAGE, error="RecipeError", says=says)


def test_an_unknown_method_is_the_recipe_s_fault_before_the_files_are(
    tmp_path: Path, refuse: Refuse
) -> None:
    """A source that is not there would be exit code 1."""
    refuse(
        recipe_of("tise", None, [tmp_path / "absent"]),
        code=USAGE,
        error="RecipeError",
        says=("ties",),
    )


@pytest.mark.parametrize(
    "method", ["ties", "task_arithmetic", "magnitude_prune", "dare_linear", "dare_ties"]
)
def test_a_method_on_task_vectors_needs_a_base(method: str, good: Path, refuse: Refuse) -> None:
    parameters = {} if method == "task_arithmetic" else {"density": 0.5}

    refuse(
        recipe_of(method, None, [good], parameters=parameters),
        code=USAGE,
        error="RecipeError",
        says=(method, "base"),
    )


def test_one_threshold_for_the_model_takes_one_density(good: Path, refuse: Refuse) -> None:
    recipe = recipe_of(
        "ties",
        good,
        [good],
        parameters={"density": 0.5, "scope": "model"},
        rules=[{"tensors": "b.*", "density": 0.25}],
    )

    refuse(recipe, code=USAGE, error="RecipeError", says=("same density", "scope: model"))


def test_a_rule_that_copies_from_where_nothing_is_is_refused(
    models: Models, good: Path, refuse: Refuse
) -> None:
    small = models.write({"a.weight": TENSORS["a.weight"]})
    rules = [{"tensors": "b.*", "copy": 1}]

    refuse(
        recipe_of("linear", None, [good, small], rules=rules),
        code=USAGE,
        error="RecipeError",
        says=("b.weight", "sources[1]", "no such tensor"),
    )


def test_a_recipe_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["merge", str(tmp_path / "absent.yaml"), str(tmp_path / "out")])

    assert code == USAGE
    assert "RecipeError" in (said := capsys.readouterr().err)
    assert "absent.yaml: cannot be read: No such file" in said
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_is_a_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(tmp_path), str(tmp_path / "out")]) == USAGE
    assert "Is a directory" in capsys.readouterr().err


def test_a_recipe_that_is_not_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"method: ti\xffes")

    code = main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")])

    assert code == USAGE
    assert "not UTF-8 text at byte 10" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "method: [\n", "just words"])
def test_a_recipe_without_content_is_refused(text: str, tmp_path: Path, refuse: Refuse) -> None:
    refuse(text, code=USAGE, error="RecipeError", says=(tmp_path / "recipe.yaml",))


# -- places where the output may not go


def test_the_output_may_not_be_an_input(good: Path, refuse: Refuse) -> None:
    said = refuse(
        recipe_of("linear", None, [good]),
        str(good),
        "--overwrite",
        code=EXISTS,
        error="OutputExistsError",
    )
    assert "overlaps the input" in said


def test_the_output_may_not_lie_inside_an_input(good: Path, refuse: Refuse) -> None:
    refuse(
        recipe_of("linear", None, [good]),
        str(good / "merged"),
        code=EXISTS,
        error="OutputExistsError",
        says=("overlaps the input",),
    )


@pytest.mark.parametrize("as_file", [False, True])
def test_the_output_may_not_hold_an_input(
    as_file: bool,  # noqa: FBT001
    tmp_path: Path,
    models: Models,
    refuse: Refuse,
) -> None:
    model = models.write(TENSORS, "parent/model")
    given = model / "model.safetensors" if as_file else model

    refuse(
        recipe_of("linear", None, [given]),
        str(tmp_path / "parent"),
        "--overwrite",
        code=EXISTS,
        error="OutputExistsError",
        says=("overlaps the input",),
    )


def test_an_input_is_recognised_through_a_link(tmp_path: Path, good: Path, refuse: Refuse) -> None:
    (tmp_path / "alias").symlink_to(good)

    refuse(
        recipe_of("linear", None, [tmp_path / "alias"]),
        str(good),
        "--overwrite",
        code=EXISTS,
        error="OutputExistsError",
    )


def test_the_working_name_may_not_be_an_input(models: Models, refuse: Refuse) -> None:
    """``OUT.partial`` would be emptied."""
    model = models.write(TENSORS, "out.partial")

    refuse(
        recipe_of("linear", None, [model]),
        code=EXISTS,
        error="OutputExistsError",
        says=("overlaps the input",),
    )


def test_an_output_that_feeds_an_input_by_links_is_not_replaced(
    tmp_path: Path, models: Models, good: Path, refuse: Refuse
) -> None:
    """A directory of links, as the hub's cache is, whose files lie in the earlier merge."""
    out = tmp_path / "out"
    streammerge.merge(recipe_of("linear", None, [good]), out, memory=MEMORY)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(out / "model.safetensors")

    refuse(
        recipe_of("linear", None, [linked], parameters={"weight": 0.5, "normalize": False}),
        "--overwrite",
        code=EXISTS,
        error="OutputExistsError",
    )


def test_an_output_that_is_not_empty_is_not_touched(
    tmp_path: Path, good: Path, refuse: Refuse
) -> None:
    write_raw(tmp_path / "out", b"mine", "notes.txt")

    refuse(
        recipe_of("linear", None, [good]),
        code=EXISTS,
        error="OutputExistsError",
        says=("1 file(s)", "--overwrite"),
    )


def test_an_empty_directory_is_as_good_as_none(tmp_path: Path, good: Path) -> None:
    (tmp_path / "out").mkdir()

    streammerge.merge(recipe_of("linear", None, [good]), tmp_path / "out", memory=MEMORY)

    assert sorted(load_model(tmp_path / "out")) == sorted(TENSORS)
    assert not (tmp_path / "out.replaced").exists()


def test_overwrite_does_not_replace_what_no_merge_made(
    tmp_path: Path, good: Path, refuse: Refuse
) -> None:
    write_raw(tmp_path / "out", b"mine", "notes.txt")

    refuse(
        recipe_of("linear", None, [good]),
        "--overwrite",
        code=EXISTS,
        error="OutputExistsError",
        says=(MANIFEST_NAME, "remove it yourself"),
    )


def test_overwrite_does_not_believe_a_broken_manifest(
    tmp_path: Path, good: Path, refuse: Refuse
) -> None:
    write_raw(tmp_path / "out", b"[]", MANIFEST_NAME)

    refuse(
        recipe_of("linear", None, [good]),
        "--overwrite",
        code=FAILED,
        error="HeaderError",
        says=("not a manifest",),
    )


def test_overwrite_does_not_lose_foreign_files(tmp_path: Path, good: Path, refuse: Refuse) -> None:
    recipe = recipe_of("linear", None, [good])
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    (tmp_path / "out" / "notes.txt").write_text("mine")

    refuse(
        recipe,
        "--overwrite",
        code=EXISTS,
        error="OutputExistsError",
        says=("notes.txt", "would lose them"),
    )


def test_overwrite_does_not_lose_foreign_files_in_directories_of_ours(
    tmp_path: Path, models: Models, refuse: Refuse
) -> None:
    model = models.write(TENSORS)
    (model / "modules.json").write_text("[]")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    recipe = recipe_of("linear", None, [model])
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    (tmp_path / "out" / "1_Pooling" / "notes.txt").write_text("mine")

    refuse(recipe, "--overwrite", code=EXISTS, error="OutputExistsError", says=("notes.txt",))


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_a_partial_directory_that_no_merge_left_is_not_emptied(
    kind: str, tmp_path: Path, good: Path, refuse: Refuse
) -> None:
    partial = tmp_path / "out.partial"
    if kind == "file":
        partial.write_text("mine")
    elif kind == "directory":
        write_raw(partial, b"mine", "notes.txt")
    else:
        # Even a link to something that looks like ours: what it points to is somewhere else.
        write_raw(tmp_path / "elsewhere", b"", MARKER_NAME)
        partial.symlink_to(tmp_path / "elsewhere")

    refuse(
        recipe_of("linear", None, [good]),
        code=EXISTS,
        error="OutputExistsError",
        says=("out.partial", "in the way"),
    )


def test_a_partial_directory_that_a_merge_left_is_thrown_away(tmp_path: Path, good: Path) -> None:
    write_raw(tmp_path / "out.partial", b"", MARKER_NAME)
    write_raw(tmp_path / "out.partial", b"half a shard")

    streammerge.merge(recipe_of("linear", None, [good]), tmp_path / "out", memory=MEMORY)

    assert sorted(load_model(tmp_path / "out")) == sorted(TENSORS)
    assert not (tmp_path / "out.partial").exists()


def test_an_output_that_is_a_file_is_not_touched(
    tmp_path: Path, good: Path, refuse: Refuse
) -> None:
    (tmp_path / "out").write_text("mine")

    refuse(
        recipe_of("linear", None, [good]),
        "--overwrite",
        code=EXISTS,
        error="OutputExistsError",
        says=("not a directory",),
    )


@pytest.mark.parametrize("dangling", [False, True])
def test_an_output_that_is_a_link_is_not_followed(
    dangling: bool,  # noqa: FBT001
    tmp_path: Path,
    good: Path,
    refuse: Refuse,
) -> None:
    if not dangling:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")

    refuse(
        recipe_of("linear", None, [good]),
        "--overwrite",
        code=EXISTS,
        error="OutputExistsError",
        says=("out: is a link; choose another place, or name what it leads to",),
    )


def test_an_output_below_nothing_is_refused(tmp_path: Path, good: Path, refuse: Refuse) -> None:
    refuse(
        recipe_of("linear", None, [good]),
        str(tmp_path / "absent" / "out"),
        code=FAILED,
        error="OutputError",
        says=(tmp_path / "absent", "no such directory"),
    )


def test_the_root_of_the_disk_is_refused_as_output(good: Path, refuse: Refuse) -> None:
    """It has no name to which ``.partial`` could be added."""
    refuse(recipe_of("linear", None, [good]), "/", code=EXISTS, error="OutputExistsError")


def test_what_appears_at_the_output_during_a_merge_is_not_destroyed(
    tmp_path: Path, good: Path
) -> None:
    """Hours pass between the first check and the last rename."""
    out = tmp_path / "out"

    def meddle(_event: object) -> None:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")

    with pytest.raises(streammerge.StreamMergeError):
        streammerge.merge(recipe_of("linear", None, [good]), out, memory=MEMORY, on_progress=meddle)

    assert (out / "notes.txt").read_text() == "mine"


def test_foreign_files_that_appear_during_a_merge_are_not_overwritten(
    tmp_path: Path, good: Path
) -> None:
    out = tmp_path / "out"
    recipe = recipe_of("linear", None, [good])
    streammerge.merge(recipe, out, memory=MEMORY)

    def meddle(_event: object) -> None:
        (out / "notes.txt").write_text("mine")

    with pytest.raises(streammerge.StreamMergeError):
        streammerge.merge(recipe, out, memory=MEMORY, overwrite=True, on_progress=meddle)

    assert (out / "notes.txt").read_text() == "mine"


def test_a_second_merge_into_the_same_place_does_not_disturb_the_first(
    tmp_path: Path, good: Path
) -> None:
    """Two jobs of one schedule: the working directory of a live merge is not a leftover."""
    out = tmp_path / "out"
    recipe = recipe_of("linear", None, [good])
    refused: list[streammerge.StreamMergeError] = []

    def start_another(_event: object) -> None:
        try:
            streammerge.merge(recipe, out, memory=MEMORY)
        except streammerge.StreamMergeError as error:
            refused.append(error)

    streammerge.merge(recipe, out, memory=MEMORY, on_progress=start_another)

    assert refused
    assert sorted(load_model(out)) == sorted(TENSORS)


@pytest.mark.parametrize("kind", ["file", "empty directory", "directory"])
def test_what_stands_in_the_way_of_a_replacement_is_kept(
    kind: str, tmp_path: Path, good: Path
) -> None:
    """The old output steps aside under another name; whatever has that name belongs to somebody."""
    out, aside = tmp_path / "out", tmp_path / "out.replaced"
    recipe = recipe_of("linear", None, [good])
    streammerge.merge(recipe, out, memory=MEMORY)
    if kind == "file":
        aside.write_text("mine")
    elif kind == "directory":
        write_raw(aside, b"mine", "notes.txt")
    else:
        aside.mkdir()
    before = tree(tmp_path)
    del before["out"]

    # Refusing is as good as taking another name.
    with contextlib.suppress(streammerge.StreamMergeError):
        streammerge.merge(recipe, out, memory=MEMORY, overwrite=True)
    after = tree(tmp_path)

    assert {name: after.get(name) for name in before if name.startswith("out.replaced")} == {
        name: kept for name, kept in before.items() if name.startswith("out.replaced")
    }
    assert sorted(load_model(out)) == sorted(TENSORS)


def test_a_failed_replacement_leaves_the_earlier_merge_in_place(
    tmp_path: Path, good: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename that would have put the new directory in place fails, after the old one moved."""
    recipe = recipe_of("linear", None, [good])
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    rename = Path.rename

    def fail_on_partial(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_partial)

    refuse(
        recipe,
        "--overwrite",
        code=FAILED,
        error="OutputError",
        says=("cannot be put in place", "Input/output error", "--resume"),
        keeps_work=True,
    )


# -- too little of something


def test_too_little_disk_is_refused_before_anything_is_written(
    good: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 7, 7))

    refuse(
        recipe_of("linear", None, [good]),
        code=DOES_NOT_FIT,
        error="DiskSpaceError",
        says=("7 B are free",),
    )


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_budget_that_a_refusal_names_is_enough(
    method: str, tmp_path: Path, models: Models
) -> None:
    """In fresh processes, as a person would try it: what one says, the next accepts and keeps to."""
    size = 700_001
    base, source = (models.write({"a": torch.full((size,), float(i))}) for i in range(2))
    parameters = {} if method == "linear" else {"density": 0.3}
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            recipe_of(method, None if method == "linear" else base, [base, source])
            | {"parameters": parameters}
        )
    )

    def merge(memory: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "streammerge", "merge", file, tmp_path / "out"]
        return subprocess.run(
            [*command, "--memory", memory], capture_output=True, text=True, check=False
        )

    refused = merge("1MiB")
    assert refused.returncode == DOES_NOT_FIT
    assert refused.stderr.startswith("MemoryBudgetError: ")
    assert "the budget is 1.0 MiB" in refused.stderr
    named = re.search(r"--memory (\S+) or more", refused.stderr)
    assert named is not None

    done = merge(named[1])

    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    run_record = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["run"]
    assert run_record["projected_memory"] <= run_record["memory_budget"]
    assert run_record["measured_memory"] <= run_record["memory_budget"]


# -- inputs that change under our hands


@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_an_input_that_changed_since_it_was_planned_is_refused(
    change: str, tmp_path: Path, good: Path
) -> None:
    plan = streammerge.plan(recipe_of("linear", None, [good]), memory=MEMORY)
    file = good / "model.safetensors"
    if change == "size":
        status = file.stat()
        file.write_bytes(file.read_bytes()[:-4])
        # The same time, so that only the size gives it away.
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        says = f"{status.st_size} bytes then, {status.st_size - 4} now"
    elif change == "time":
        os.utime(file, ns=(1, 1))
        says = "changed since it was planned"
    else:
        file.unlink()
        says = "No such file"

    with pytest.raises(CheckpointError, match=says):
        streammerge.merge(plan, tmp_path / "out")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["good"]


def test_an_input_that_is_cut_off_while_it_is_merged_is_noticed(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked when opened, shortened then: the first read finds the end too early."""
    model = models.write({"a": torch.ones(100_000)})
    size = (model / "model.safetensors").stat().st_size

    class Shortened(PreadSource):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            os.truncate(self.path, 1000)
            super().read_into(offset, buffer)

    monkeypatch.setattr(run, "choose_byte_source", lambda _: Shortened)

    with pytest.raises(TruncatedShardError, match=f"ends at byte 1000, .*to byte {size}"):
        streammerge.merge(recipe_of("linear", None, [model]), tmp_path / "out", memory=MEMORY)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["model0"]


@pytest.mark.parametrize("kind", ByteSourceKind)
def test_an_input_that_is_rewritten_in_place_is_noticed_though_its_times_are_old(
    kind: ByteSourceKind, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows then which version was read, so nothing is left for a resume either."""
    model = models.write({name: torch.ones(300_000) for name in "abcd"})
    file = model / "model.safetensors"
    status = file.stat()
    opener = choose_file_source(kind)
    reads = []

    def rewrite() -> None:
        # The clock of the file system moves on every few milliseconds.
        while file.stat().st_ctime_ns == status.st_ctime_ns:
            with file.open("r+b") as stream:
                stream.seek(-4, os.SEEK_END)
                stream.write(b"0000")
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    class Rewritten(opener):  # type: ignore[valid-type,misc]
        def read_into(self, offset: int, buffer: memoryview) -> None:
            super().read_into(offset, buffer)
            reads.append(offset)
            if len(reads) == 1:
                rewrite()

    asked = recipe_of("linear", None, [model])
    with monkeypatch.context() as patch:
        patch.setattr(run, "choose_byte_source", lambda _: Rewritten)
        with pytest.raises(CheckpointError, match="changed while it was read: it has its size of"):
            streammerge.merge(asked, tmp_path / "out", memory=MEMORY, byte_source=kind)

    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model0"]
    streammerge.merge(asked, tmp_path / "out", memory=MEMORY, byte_source=kind)


@pytest.mark.parametrize("kind", ByteSourceKind)
def test_links_and_rights_of_an_input_may_change_while_it_is_merged(
    kind: ByteSourceKind, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.write({"a": torch.ones(100_000)})
    file = model / "model.safetensors"

    class Linked(choose_file_source(kind)):  # type: ignore[misc]
        def read_into(self, offset: int, buffer: memoryview) -> None:
            (models.root / "link").unlink(missing_ok=True)
            os.link(file, models.root / "link")
            super().read_into(offset, buffer)

    monkeypatch.setattr(run, "choose_byte_source", lambda _: Linked)
    merged, manifest = models.merge(recipe_of("linear", None, [model]), byte_source=kind)

    assert merged["a"].tolist() == [1.0] * 100_000
    assert manifest.run.byte_source == Linked.kind


TRUNCATED_MAPPING = """
import os, sys
import streammerge.run as run
from streammerge.checkpoint.bytesource import MmapSource
from streammerge.cli.arguments import main

class Shortened(MmapSource):
    def _read_some(self, offset, buffer):
        os.truncate(self.path, 1000)
        return super()._read_some(offset, buffer)

run.choose_byte_source = lambda _: Shortened
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(load_kernels() is None, reason="files are mapped with compiled kernels only")
def test_a_mapped_input_that_is_cut_off_does_not_end_the_process(
    tmp_path: Path, models: Models
) -> None:
    """Behind the new end it has pages that cannot be touched."""
    model = models.write({"a": torch.ones(100_000)})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("linear", None, [model])))
    command = [sys.executable, "-c", TRUNCATED_MAPPING, "merge", recipe, tmp_path / "out"]
    done = subprocess.run(
        [*command, "--byte-source", "mmap"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith(
        f"TruncatedShardError: {model / 'model.safetensors'}: ends at byte 1000, "
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model0", "recipe.yaml"]


def test_what_a_merge_was_read_with_is_recorded(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without compiled kernels nothing is mapped, whatever was asked for."""
    asked = recipe_of("linear", None, [models.write({"a": torch.ones(3)})])
    recorded = []
    for kernels in (load_kernels(), None):
        monkeypatch.setattr(bytesource, "load_kernels", lambda: kernels)  # noqa: B023
        recorded.append(models.merge(asked, byte_source=ByteSourceKind.MMAP)[1].run.byte_source)

    assert recorded == ["mmap" if load_kernels() else "pread", "pread"]


# -- inputs that look odd and are sound


def test_a_tensor_without_elements_does_not_disturb_its_neighbours(models: Models) -> None:
    """It lies between the others in one file and after them in the other."""
    a = torch.arange(3).to(torch.bfloat16)
    b = torch.arange(3, 8).to(torch.bfloat16)
    empty = torch.zeros(0, dtype=torch.bfloat16)
    first = write_shard_in_order(
        models.root / "first.safetensors", {"a": a, "empty": empty, "b": b}
    )
    second = write_shard_in_order(
        models.root / "second.safetensors", {"a": a, "b": b, "empty": empty}
    )

    for sources in ([first, second], [second, first]):
        merged, _ = models.merge(recipe_of("linear", None, sources))
        assert merged["a"].tolist() == a.tolist()
        assert merged["b"].tolist() == b.tolist()
        assert merged["empty"].shape == (0,)


@pytest.mark.timeout(15)
def test_tensors_without_elements_from_different_sources_are_copied(models: Models) -> None:
    names = ["a", "b", "c"]
    sources = [models.write({name: torch.zeros(0) for name in names}) for _ in names]
    rules = [{"tensors": name, "copy": index} for index, name in enumerate(names)]

    merged, _ = models.merge(recipe_of("linear", None, sources, rules=rules))

    assert sorted(merged) == names


def test_a_merge_that_drops_everything_is_refused(refuse: Refuse, good: Path) -> None:
    recipe = recipe_of("linear", None, [good], rules=[{"tensors": "*", "drop": True}])

    refuse(recipe, code=USAGE, error="RecipeError", says=("rules: all 2 tensors are dropped",))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            {"model_type": "llama", "architectures": []},
            "is the configuration of a model, not a recipe",
        ),
        (
            {"method": "linear", "gird": {}, "sources": []},
            'gird: unknown key; did you mean "grid"?',
        ),
        (
            {"method": "linear", "sources": [{"path": "a"}], "output": {"dtype": "promotd"}},
            'did you mean "promoted"?',
        ),
    ],
)
def test_a_slip_is_told_from_what_is_near(
    recipe: dict[str, Any], says: str, refuse: Refuse
) -> None:
    refuse(recipe, code=USAGE, error="RecipeError", says=(says,))


def test_a_configuration_is_no_index(refuse: Refuse, good: Path) -> None:
    (good / "config.json").write_text("{}")
    recipe = recipe_of("linear", None, [good / "config.json", good])

    said = refuse(
        recipe, code=FAILED, error="HeaderError", says=("is no index of shards", "got nothing")
    )

    assert "NoneType" not in said


def test_a_path_that_leads_nowhere_says_where_it_began(
    refuse: Refuse, good: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    good.rename(tmp_path / "models" / "good")
    monkeypatch.chdir(tmp_path)

    refuse(
        recipe_of("linear", None, [Path("models/goood"), Path("models/good")]),
        code=FAILED,
        error="CheckpointError",
        says=(
            f"models/goood: No such file or directory in {tmp_path} (did you mean models/good?)",
        ),
    )
    said = refuse(
        recipe_of("linear", None, [Path("elsewhere/one"), Path("models/good")]),
        code=FAILED,
        error="CheckpointError",
        says=(
            f"elsewhere/one: No such file or directory in {tmp_path}, and the Hugging Face cache",
        ),
    )
    assert "did you mean" not in said
