"""A safetensors header is read exactly as the library would, or refused with a reason."""

from __future__ import annotations

import json
import os
import struct
import time
from hashlib import blake2b
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streammerge.checkpoint.header import MAX_HEADER_BYTES, ParsedHeaders, read_safetensors_header
from streammerge.dtypes import DTYPES_BY_TORCH_NAME, DType
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    StreamMergeError,
    TruncatedShardError,
    UnsupportedDTypeError,
)

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def shard_bytes(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def write(path: Path, header: object, data: bytes = b"") -> Path:
    path.write_bytes(shard_bytes(header, data))
    return path


def refusal(path: Path, error_type: type[StreamMergeError] = HeaderError) -> str:
    with pytest.raises(error_type) as caught:
        read_safetensors_header(path, file_index=0)
    assert type(caught.value) is error_type
    assert str(path) in str(caught.value)
    return str(caught.value)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("torch_name", sorted(DTYPES_BY_TORCH_NAME))
def test_offsets_lead_to_the_bytes_of_every_dtype(torch_name: str, shard: Path) -> None:
    dtype = getattr(torch, torch_name)
    tensors = {
        "b.weight": torch.randint(0, 2, (3, 5)).to(dtype),
        "a.weight": torch.randint(0, 2, (7,)).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.empty((0, 3), dtype=dtype),
    }
    save_file(tensors, shard, metadata={"format": "pt"})

    _, entries = read_safetensors_header(shard, file_index=3)

    content = shard.read_bytes()
    assert {entry.name for entry in entries} == tensors.keys()
    assert [entry.offset for entry in entries] == sorted(entry.offset for entry in entries)
    for entry in entries:
        tensor = tensors[entry.name]
        assert (entry.dtype, entry.shape) == (DTYPES_BY_TORCH_NAME[torch_name], tuple(tensor.shape))
        assert entry.file == 3
        assert content[entry.offset : entry.offset + entry.nbytes] == bytes_of(tensor)


def test_file_identity_is_size_time_and_digest_of_the_header(shard: Path) -> None:
    raw = json.dumps({"a": TENSOR}).encode()
    write(shard, raw, bytes(8))
    os.utime(shard, ns=(5, 7))

    file, _ = read_safetensors_header(shard, file_index=0)

    assert (file.path, file.nbytes, file.mtime_ns) == (shard, 8 + len(raw) + 8, 7)
    assert file.header_digest == blake2b(raw, digest_size=16).hexdigest()


def test_file_without_tensors_is_read(shard: Path) -> None:
    save_file({}, shard)

    assert read_safetensors_header(shard, file_index=0)[1] == []


def test_padding_after_the_object_is_allowed(shard: Path) -> None:
    write(shard, json.dumps({"a": TENSOR}).encode() + b"   ", bytes(8))

    assert len(read_safetensors_header(shard, file_index=0)[1]) == 1


def test_tensors_come_in_the_order_of_their_bytes(shard: Path) -> None:
    later = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    write(shard, {"a": later, "b": TENSOR}, bytes(16))

    assert [e.name for e in read_safetensors_header(shard, file_index=0)[1]] == ["b", "a"]


def test_a_header_that_another_file_has_too_is_parsed_once(shard: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", {"a": TENSOR}, bytes(8))
    write(shard, {"a": TENSOR}, bytes(8))
    parsed: ParsedHeaders = {}

    first, entries = read_safetensors_header(shard, file_index=0, parsed=parsed)
    second, again = read_safetensors_header(other, file_index=0, parsed=parsed)

    assert again is entries
    assert (first.path, second.path) == (shard, other)
    assert first.header_digest == second.header_digest
    # As the first file of one model and the second of another, tensors are not the same.
    _, numbered = read_safetensors_header(other, file_index=1, parsed=parsed)
    assert [entry.file for entry in numbered] == [1]


def test_a_known_header_is_still_held_against_the_size_of_its_file(
    shard: Path, tmp_path: Path
) -> None:
    parsed: ParsedHeaders = {}
    read_safetensors_header(write(shard, {"a": TENSOR}, bytes(8)), file_index=0, parsed=parsed)
    short = write(tmp_path / "short.safetensors", {"a": TENSOR}, bytes(7))

    with pytest.raises(TruncatedShardError, match=r"short\.safetensors: header declares data"):
        read_safetensors_header(short, file_index=0, parsed=parsed)


def test_50000_tensors_are_parsed_within_two_seconds(shard: Path) -> None:
    """It takes 0.4 seconds alone; quadratic work would take minutes."""
    header = {
        f"model.layers.{index}.mlp.weight": TENSOR | {"data_offsets": [8 * index, 8 * index + 8]}
        for index in range(50_000)
    }
    write(shard, header, bytes(8 * 50_000))

    # Of the processor: what else the machine does is of no matter.
    start = time.process_time()
    _, entries = read_safetensors_header(shard, file_index=0)

    assert len(entries) == 50_000
    assert time.process_time() - start < 2


# --- what is not a safetensors file at all


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Access denied</body></html>", "web page"),
        (b"\n  <html></html>", "web page"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(60), "zip archive"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.", "pickle"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
        (b"\x1f\x8b\x08\x00" + bytes(60), "gzip"),
        (b"Invalid username or password.", "Invalid username"),
    ],
)
def test_other_kinds_of_file_are_named(content: bytes, advice: str, shard: Path) -> None:
    shard.write_bytes(content)

    assert advice in refusal(shard)


def test_empty_file_is_truncated(shard: Path) -> None:
    shard.write_bytes(b"")

    assert "0 bytes" in refusal(shard, TruncatedShardError)


def test_file_shorter_than_its_first_number_is_truncated(shard: Path) -> None:
    shard.write_bytes(b"\x10\x00\x00")

    assert "file has 3 bytes" in refusal(shard, TruncatedShardError)


def test_file_that_ends_inside_the_header_is_truncated(shard: Path) -> None:
    shard.write_bytes(shard_bytes({"a": TENSOR}, bytes(8))[:30])
    message = refusal(shard, TruncatedShardError)

    assert "file has 30 bytes" in message
    assert f"byte {8 + len(json.dumps({'a': TENSOR}))}" in message


def test_header_beyond_the_limit_of_the_format_is_refused(shard: Path) -> None:
    shard.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b'{"a"' + bytes(60))
    message = refusal(shard)

    assert "100000001 bytes" in message
    assert "100000000" in message


def test_absent_file_directory_and_dead_link_are_refused(tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "gone")

    assert "not there" in refusal(tmp_path / "none.safetensors", CheckpointError)
    assert "regular file" in refusal(tmp_path, CheckpointError)
    assert "link to a file that is gone" in refusal(link, CheckpointError)


def test_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)

    assert "regular file" in refusal(pipe, CheckpointError)


# --- what is not strict JSON


@pytest.mark.parametrize(
    ("raw", "essential"),
    [
        (b'{"a":1,"a":2}', "'a' occurs twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32"}}', "'dtype' occurs twice"),
        (b'{"a\xff":1}', "0xff at 3"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "-Infinity"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"a":1', "not valid JSON"),
        (b"{}{}", "not valid JSON"),
        (b"{}\x00", "not valid JSON"),
        (b"[1, 2, 3]", "JSON object"),
    ],
)
def test_header_that_is_not_a_strict_json_object_is_refused(
    raw: bytes, essential: str, shard: Path
) -> None:
    write(shard, raw)

    assert essential in refusal(shard)


@pytest.mark.parametrize(
    ("metadata", "essential"),
    [([], "list"), ({"format": 1}, "'format': expected a string, got int")],
)
def test_metadata_must_be_strings(metadata: object, essential: str, shard: Path) -> None:
    write(shard, {"__metadata__": metadata, "a": TENSOR}, bytes(8))

    assert essential in refusal(shard)


# --- what the library reads


@pytest.mark.parametrize(
    "raw",
    [
        b'{"__metadata__":null,"a":%s}',
        b' {"a":%s}',
        b'\n\t\r {"a":%s}',
        b" " * 200 + b'{"a":%s}',
        b'{"a":%s}   \n',
        b'{"a":{"note":{"by":[1,null]},%s}',
    ],
    ids=["metadata", "blank", "blanks", "many", "behind", "field"],
)
def test_what_the_library_reads_is_read(raw: bytes, shard: Path) -> None:
    tensor = json.dumps(TENSOR).encode()
    raw = raw % (tensor[1:] if b"note" in raw else tensor)
    data = struct.pack("<2f", 3.0, -5.0)
    write(shard, raw, data)
    _, (entry,) = read_safetensors_header(shard, file_index=0)

    ((name, known),) = safetensors.deserialize(shard.read_bytes())
    assert (entry.name, list(entry.shape)) == (name, known["shape"])
    assert shard.read_bytes()[entry.offset : entry.offset + entry.nbytes] == known["data"] == data


@pytest.mark.parametrize(
    "raw", [b'\x0c{"a":%s}', b'\xef\xbb\xbf{"a":%s}', b'{"a":%s}\0'], ids=["feed", "bom", "nul"]
)
def test_what_the_library_refuses_around_the_braces_is_refused(raw: bytes, shard: Path) -> None:
    write(shard, raw % json.dumps(TENSOR).encode(), bytes(8))

    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(shard.read_bytes())
    refusal(shard)


def test_half_a_byte_belongs_to_no_tensor(shard: Path) -> None:
    write(shard, {"a.weight": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2))

    assert "'a.weight': its shape has 3 elements of F4, which end inside a byte" in refusal(shard)


# --- what contradicts itself


@pytest.mark.parametrize(
    ("tensor", "essential"),
    [
        (3, "expected an object, got int"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"),
        (TENSOR | {"dtype": 4}, "dtype: expected a string, got int"),
        (TENSOR | {"dtype": ["F32"]}, "dtype: expected a string, got list"),
        (TENSOR | {"shape": 2}, "shape: expected a list, got int"),
        (TENSOR | {"shape": [-2]}, "not a whole number"),
        (TENSOR | {"shape": [True, 2]}, "not a whole number"),
        (TENSOR | {"shape": [2.0]}, "not a whole number"),
        (TENSOR | {"shape": ["2"]}, "not a whole number"),
        (TENSOR | {"shape": [2**32, 2**32]}, f"more than {2**63 - 1}"),
        (TENSOR | {"shape": [0, 10**4000]}, f"more than {2**63 - 1}"),
        # No program that reads the result could hold it.
        (TENSOR | {"shape": [2**63, 0]}, f"more than {2**63 - 1}"),
        (TENSOR | {"shape": [2] * 100_000}, f"more than {2**63 - 1}"),
        (TENSOR | {"data_offsets": [0]}, "data_offsets"),
        (TENSOR | {"data_offsets": [0, 8, 8]}, "data_offsets"),
        (TENSOR | {"data_offsets": [False, 8]}, "data_offsets"),
        (TENSOR | {"data_offsets": [0, 8.0]}, "data_offsets"),
        (TENSOR | {"data_offsets": {"0": 8}}, "data_offsets"),
        (TENSOR | {"data_offsets": [8, 0]}, "data_offsets"),
        (TENSOR | {"data_offsets": [-8, 0]}, "data_offsets"),
        (TENSOR | {"data_offsets": [0, 4]}, "takes 8 bytes, data_offsets span 4 bytes"),
    ],
)
def test_tensor_that_contradicts_itself_is_refused(
    tensor: object, essential: str, shard: Path
) -> None:
    write(shard, {"a.weight": tensor}, bytes(8))
    message = refusal(shard)

    assert "'a.weight'" in message
    assert essential in message


@pytest.mark.parametrize(
    ("code", "essential"),
    [("F6_E2M3", "four elements into three bytes"), ("BF17", 'did you mean "BF16"?')],
)
def test_unknown_dtype_is_refused_by_name(code: str, essential: str, shard: Path) -> None:
    write(shard, {"a.weight": TENSOR | {"dtype": code}}, bytes(8))
    message = refusal(shard, UnsupportedDTypeError)

    assert "'a.weight'" in message
    assert essential in message


def test_half_a_surrogate_pair_is_no_name(shard: Path) -> None:
    write(shard, b'{"a\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))

    assert "not valid Unicode" in refusal(shard)


# --- what contradicts the file


def test_overlap_names_both_tensors_and_both_bytes(shard: Path) -> None:
    write(shard, {"a": TENSOR, "b": TENSOR | {"data_offsets": [4, 12]}}, bytes(12))
    message = refusal(shard)

    assert "'b' overlaps tensor 'a'" in message
    assert "begins at data byte 4" in message
    assert "ends at 8" in message


def test_hole_names_both_tensors_and_both_bytes(shard: Path) -> None:
    write(shard, {"a": TENSOR, "b": TENSOR | {"data_offsets": [12, 20]}}, bytes(20))
    message = refusal(shard)

    assert "'b' leaves a hole after tensor 'a'" in message
    assert "begins at data byte 12" in message
    assert "ends at 8" in message


def test_hole_before_the_first_tensor_is_refused(shard: Path) -> None:
    write(shard, {"a": TENSOR | {"data_offsets": [4, 12]}}, bytes(12))

    assert "'a' leaves a hole after the header" in refusal(shard)


def test_shorter_file_is_truncated_and_names_both_sizes(shard: Path) -> None:
    write(shard, {"a": TENSOR}, bytes(7))
    message = refusal(shard, TruncatedShardError)

    nbytes = shard.stat().st_size
    assert f"through byte {nbytes + 1}, file has {nbytes} bytes" in message


def test_longer_file_is_refused_and_names_both_sizes(shard: Path) -> None:
    write(shard, {"a": TENSOR}, bytes(10))
    message = refusal(shard)

    nbytes = shard.stat().st_size
    assert f"through byte {nbytes - 2}, file has {nbytes} bytes" in message


# --- anything at all

VALID = shard_bytes(
    {
        "__metadata__": {"format": "pt"},
        "b.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]},
        "a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "empty": {"dtype": "U8", "shape": [0], "data_offsets": [20, 20]},
    },
    bytes(range(20)),
)
PIECES = (b"{", b"}", b"[", b'"', b",", b"0", b"-1", b"1e9", b"null", b"NaN", b"\\ud800", b"\xff")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(VALID)),
            st.integers(0, 6),
            st.one_of(st.sampled_from(PIECES), st.binary(max_size=6)),
        ),
        min_size=1,
        max_size=4,
    ),
    is_length_kept=st.booleans(),
)
def test_mutated_file_is_refused_or_read_as_the_library_reads_it(
    edits: list[tuple[int, int, bytes]],
    is_length_kept: bool,  # noqa: FBT001
    scratch: Path,
) -> None:
    content = VALID
    for start, removed, inserted in edits:
        content = content[:start] + inserted + content[start + removed :]
    if not is_length_kept:  # else most edits would end at the length
        content = struct.pack("<Q", max(len(content) - 28, 0)) + content[8:]
    scratch.write_bytes(content)
    try:
        _, entries = read_safetensors_header(scratch, file_index=0)
    except StreamMergeError:
        return

    expected = dict(safetensors.deserialize(content))
    assert {entry.name for entry in entries} == expected.keys()
    for entry in entries:
        assert list(entry.shape) == expected[entry.name]["shape"]
        assert content[entry.offset : entry.offset + entry.nbytes] == expected[entry.name]["data"]


@settings(max_examples=200, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*map(str, DType), "F6_E2M3", "?"]),
                "shape": st.lists(st.integers(0, 3), max_size=3),
                "data_offsets": st.lists(st.integers(0, 8), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    data=st.binary(max_size=12),
)
def test_well_formed_header_is_accepted_exactly_when_the_library_accepts_it(
    tensors: dict[str, object], data: bytes, scratch: Path
) -> None:
    content = shard_bytes(tensors, data)
    scratch.write_bytes(content)
    try:
        safetensors.deserialize(content)
        is_sound = True
    except safetensors.SafetensorError:
        is_sound = False
    try:
        read_safetensors_header(scratch, file_index=0)
        is_accepted = True
    except UnsupportedDTypeError:
        is_accepted = is_sound
    except StreamMergeError:
        is_accepted = False

    assert is_sound == is_accepted
