"""A PyTorch file is read without running its pickle: plain tensors are found, the rest refused."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streammerge.checkpoint import torchfile
from streammerge.checkpoint.torchfile import read_torch_header
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DTYPES_BY_TORCH_NAME
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    StreamMergeError,
    TruncatedShardError,
    UnsupportedDTypeError,
)


def read(path: Path) -> dict[str, TensorEntry]:
    return {entry.name: entry for entry in read_torch_header(path, file_index=0)[1]}


def refusal(path: Path, error_type: type[StreamMergeError] = HeaderError) -> str:
    with pytest.raises(error_type) as caught:
        read_torch_header(path, file_index=0)
    assert type(caught.value) is error_type
    assert str(path) in str(caught.value)
    return str(caught.value)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def check_same(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    content = path.read_bytes()
    entries = read(path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert entry.shape == tuple(tensor.shape)
        assert entry.dtype.torch_name == str(tensor.dtype).removeprefix("torch.")
        assert content[entry.offset : entry.offset + entry.nbytes] == bytes_of(tensor)


def rezip(
    path: Path,
    *,
    change: dict[str, bytes | None] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Write the archive again with some records replaced, added or (None) removed."""
    with zipfile.ZipFile(path) as archive:
        records: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    records.update(change or {})
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            if content is not None:
                archive.writestr(name, content)


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file with one tensor ``a`` of 6 float32."""
    path = tmp_path / "model.bin"
    torch.save({"a": torch.arange(6.0)}, path)
    return path


def with_pickle(path: Path, raw: bytes) -> Path:
    torch.save({"a": torch.arange(6.0)}, path)
    rezip(path, change={f"{path.stem}/data.pkl": raw})
    return path


# --- round trips


@pytest.mark.parametrize("torch_name", sorted(DTYPES_BY_TORCH_NAME))
def test_offsets_lead_to_the_bytes_of_every_dtype(torch_name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, torch_name)
    tensors = {
        "b.weight": torch.randint(0, 2, (3, 5)).to(dtype),
        "a.weight": torch.randint(0, 2, (7,)).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.empty((0, 3), dtype=dtype),
    }
    torch.save(tensors, tmp_path / "model.pt")

    check_same(tmp_path / "model.pt", tensors)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    tensors = torch.nn.Linear(3, 2).state_dict()
    torch.save(tensors, tmp_path / "model.bin", pickle_protocol=protocol)

    check_same(tmp_path / "model.bin", tensors)


def test_state_dict_of_a_module_is_read_with_its_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    tensors = module.state_dict()
    assert hasattr(tensors, "_metadata")
    torch.save(tensors, tmp_path / "model.bin")

    check_same(tmp_path / "model.bin", tensors)


def test_parameters_are_read_as_their_tensors(tmp_path: Path) -> None:
    marked = torch.nn.Parameter(torch.ones(3))
    marked.note = "an attribute makes torch pickle it another way"  # type: ignore[attr-defined]
    tensors = {"plain": torch.nn.Parameter(torch.ones(2)), "marked": marked}
    torch.save(tensors, tmp_path / "model.bin")

    check_same(tmp_path / "model.bin", tensors)


def test_views_start_at_their_storage_offset(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    tensors = {"whole": whole, "rows": whole[2:5], "one": whole[3, 1], "column": whole[:1, 2:3]}
    torch.save(tensors, tmp_path / "model.bin")

    check_same(tmp_path / "model.bin", tensors)
    entries = read(tmp_path / "model.bin")
    assert entries["rows"].offset == entries["whole"].offset + 2 * 4 * 4


def test_tied_tensors_share_their_bytes(tmp_path: Path) -> None:
    tied = torch.arange(6.0)
    torch.save({"head": tied, "embedding": tied}, tmp_path / "model.bin")

    entries = read_torch_header(tmp_path / "model.bin", file_index=0)[1]
    assert [entry.name for entry in entries] == ["embedding", "head"]
    assert entries[0].offset == entries[1].offset


def test_empty_view_at_the_end_of_a_storage_is_read(tmp_path: Path) -> None:
    torch.save({"empty": torch.arange(6.0)[6:]}, tmp_path / "model.bin")

    assert read(tmp_path / "model.bin")["empty"].shape == (0,)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module", "params"])
def test_a_wrapper_is_taken_off_and_what_stands_beside_is_told(
    wrapper: str, tmp_path: Path
) -> None:
    """As Lightning and training scripts save."""
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    beside = {
        "epoch": 3,
        "global_step": 7_000,
        "pytorch-lightning_version": "2.1",
        "loss": 0.5,
        "optimizer_states": [adam.state_dict()],
        "optimizer": {"exp_avg": torch.ones(2)},
        "nothing": None,
    }
    tensors = {"a": torch.arange(2.0), "b.weight": torch.ones(2, 3)}
    torch.save({"epoch": 3} | {wrapper: tensors} | beside, tmp_path / "model.ckpt")

    check_same(tmp_path / "model.ckpt", tensors)
    file, _ = read_torch_header(tmp_path / "model.ckpt", file_index=0)
    assert file.left_out == (
        "'epoch' (int)",
        "'global_step' (int)",
        "'pytorch-lightning_version' (str)",
        "'loss' (float)",
        "'optimizer_states' (list)",
        "'optimizer' (dict)",
        "'nothing' (NoneType)",
    )


def test_a_wrapper_that_holds_nothing_else_leaves_nothing_out(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "model.pth")

    check_same(tmp_path / "model.pth", {"a": torch.ones(2)})
    assert read_torch_header(tmp_path / "model.pth", file_index=0)[0].left_out == ()


def test_counters_beside_tensors_are_told(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "step": 7, "lr": 1e-5, "name": "x"}, tmp_path / "model.pt")

    check_same(tmp_path / "model.pt", {"a": torch.ones(2)})
    file, _ = read_torch_header(tmp_path / "model.pt", file_index=0)
    assert file.left_out == ("'step' (int)", "'lr' (float)", "'name' (str)")


def test_what_is_told_of_a_thousand_counters_is_short(tmp_path: Path) -> None:
    counters: dict[str, object] = {"n" * 1000 + str(index): index for index in range(1000)}
    torch.save(counters | {"a": torch.ones(2)}, tmp_path / "model.pt")

    file, _ = read_torch_header(tmp_path / "model.pt", file_index=0)
    assert len(file.left_out) == 11
    assert file.left_out[-1] == "990 more"
    assert all(len(each) < 120 for each in file.left_out)


def test_two_state_dicts_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"params": {"a": torch.ones(2)}, "model": {"a": torch.ones(2)}}, tmp_path / "x.pth")

    assert "2 state dicts, 'model', 'params'" in refusal(tmp_path / "x.pth")


def test_tensor_named_as_a_wrapper_is_a_tensor(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(2)}, tmp_path / "model.pth")

    check_same(tmp_path / "model.pth", {"model": torch.ones(2)})


def test_file_identity_is_size_time_and_digest_of_the_pickle(saved: Path) -> None:
    os.utime(saved, ns=(5, 7))

    file, _ = read_torch_header(saved, file_index=0)

    assert (file.path, file.nbytes, file.mtime_ns) == (saved, saved.stat().st_size, 7)
    assert file.header_digest == blake2b(pickle_of(saved), digest_size=16).hexdigest()


def test_archive_without_byte_order_is_little_endian(saved: Path) -> None:
    rezip(saved, change={"model/byteorder": None})

    check_same(saved, {"a": torch.arange(6.0)})


# --- hostile pickles


class Run:
    """Runs a function when unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["value", "key", "metadata", "behind a tensor's back"])
def test_planted_command_is_refused_by_name_and_never_run(
    place: str, protocol: int, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    command = Run(os.system, f"touch {victim}")
    state_dict: collections.OrderedDict[object, object] = collections.OrderedDict()
    if place == "value":
        state_dict["a"] = command
    elif place == "key":
        state_dict[command] = torch.ones(2)
    elif place == "metadata":
        state_dict._metadata = command  # type: ignore[attr-defined]
    else:
        state_dict["a"] = torch.ones(2)
        state_dict["b"] = [command]
    torch.save(state_dict, tmp_path / "model.bin", pickle_protocol=protocol)

    assert "asks for 'posix.system'; refused" in refusal(tmp_path / "model.bin")
    assert not victim.exists()


def test_the_planted_command_would_run_under_a_plain_unpickler(tmp_path: Path) -> None:
    """The test above would pass for a command that could do no harm."""
    victim = tmp_path / "victim"
    pickle.loads(pickle.dumps(Run(os.system, f"touch {victim}")))  # noqa: S301

    assert victim.exists()


@pytest.mark.parametrize(
    ("raw", "essential"),
    [
        (b"cos\nsystem\n.", "'os.system'"),
        (b"cbuiltins\neval\n.", "'builtins.eval'"),
        (b"\x80\x04\x8c\x0btorch.serialization\x8c\x04load\x93.", "refused"),
        (b"ctorch._utils\n_rebuild_qtensor\n.", "'torch._utils._rebuild_qtensor'"),
        (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"(ios\nsystem\n.", "the operation INST"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the operation NEWOBJ"),
        (b"\x82\x01.", "the operation EXT1"),
        (b"P0\n.", "the operation PERSID"),
        # attributes of anything but a state dict, a stand-in included
        (b"ccollections\nOrderedDict\n}b.", "sets attributes of a Global"),
        (b"]}b.", "sets attributes of a list"),
        (b"}).", "damaged pickle"),
        (b"}N.", "damaged pickle"),
        (b"0.", "the operation POP"),
        (b"R.", "damaged pickle"),
        (b"}", "damaged pickle"),
        (b"", "damaged pickle"),
        (b"}..", "ends at byte 2 of 3"),
        (b"}K\x01K\x01s.", "expected names as keys, got int"),
        (b"}\x8a\xff" + b"\x7f" * 255 + b"K\x01s.", "neither a name nor a small number"),
        (b"})K\x01s.", "has a tuple as a key"),
        (b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "the key 'a' twice"),
        (b"ccollections\nOrderedDict\n(]X\x01\x00\x00\x00aatR.", "damaged pickle"),
        # a memo index of 4 billion, which costs a stock unpickler 64 GiB
        (b"}r\xff\xff\xff\xff0.", "the operation POP"),
        # a string of 4 GiB in a file of a few bytes
        (b"\x8d\x00\x00\x00\x00\x01\x00\x00\x00a.", "damaged pickle"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged pickle"),
        (b"(X\x01\x00\x00\x00xctorch\nFloatStorage\nX\x01\x00\x00\x000hcpuK\x01tQ.", "damaged"),
        (b"K\x01Q.", "names a storage"),
        (b"]" * 200_000 + b"a" * 199_999 + b".", "expected a dict of tensors, got list"),
        (b"K\x01.", "expected a dict of tensors, got int"),
    ],
)
def test_hostile_or_damaged_pickle_is_refused(raw: bytes, essential: str, tmp_path: Path) -> None:
    assert essential in refusal(with_pickle(tmp_path / "model.bin", raw))


def test_keys_that_are_slow_to_hash_are_not_hashed(tmp_path: Path) -> None:
    """A tuple of two equal tuples, 60 deep, takes 2^60 steps to hash."""
    doubled = b")" + b"".join(b"q\x00h\x00\x86" for _ in range(60))
    with_pickle(tmp_path / "model.bin", b"}" + doubled + b"Ns.")

    assert "has a tuple as a key" in refusal(tmp_path / "model.bin")


def test_pickle_beyond_the_limit_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = len(pickle_of(saved))
    monkeypatch.setattr(torchfile, "MAX_PICKLE_BYTES", nbytes - 1)

    assert f"data.pkl has {nbytes} bytes, the limit is {nbytes - 1}" in refusal(saved)


# --- values that are not plain tensors


@pytest.mark.parametrize(
    ("content", "essential"),
    [
        ({"a": torch.ones(2), "optimizer": {"a": torch.ones(2)}}, "keys: 'a', 'optimizer'"),
        ({"a": torch.ones(2), "b": [1]}, "'b' has type list"),
        ({"a": torch.ones(2), "b": None}, "'b' has type NoneType"),
        ({"epoch": 3}, "'epoch' has type int"),
        ({"optimizer": {"a": torch.ones(2)}}, "'optimizer' has type dict"),
        ({"state_dict": {"a": {"b": torch.ones(2)}}}, "'state_dict' has type dict"),
        ({"a": [torch.ones(2)]}, "'a' has type list"),
        ({"a": torch.Size([2])}, "'a' has type tuple"),
        ({"a": None}, "'a' has type NoneType"),
        ({1: torch.ones(2)}, "got int"),
        ([torch.ones(2)], "got list"),
        (torch.ones(2), "got tensor"),
        ({"a": torch.nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear"),
        ({"a": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
    ],
)
def test_anything_but_names_and_tensors_is_refused(
    content: object, essential: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "model.bin")

    assert essential in refusal(tmp_path / "model.bin")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3).t(),
        torch.ones(4)[::2],
        torch.ones(1).expand(3),
        torch.ones(2, 2, 4, 4).to(memory_format=torch.channels_last),
        torch.ones(2, 3)[:, :2],
    ],
    ids=["transposed", "strided", "expanded", "channels last", "columns"],
)
def test_tensor_that_is_not_contiguous_is_refused_by_name(
    tensor: torch.Tensor, tmp_path: Path
) -> None:
    torch.save({"a": torch.ones(2), "layer.weight": tensor}, tmp_path / "model.bin")
    message = refusal(tmp_path / "model.bin")

    assert "'layer.weight'" in message
    assert f"stride {list(tensor.stride())}" in message
    assert "contiguous()" in message


def test_view_that_negates_its_bytes_is_refused(tmp_path: Path) -> None:
    negated = torch.ones(1, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    torch.save({"a": negated}, tmp_path / "model.bin")

    assert "'a'" in refusal(tmp_path / "model.bin")


def test_dtype_without_a_place_in_safetensors_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": torch.empty(2, dtype=torch.complex128)}, tmp_path / "model.bin")

    assert "tensor 'a': safetensors files have no place for" in refusal(
        tmp_path / "model.bin", UnsupportedDTypeError
    )


# --- pickles that contradict the archive


def edited(saved: Path, before: bytes, after: bytes) -> Path:
    raw = pickle_of(saved)
    assert raw.count(before) == 1
    rezip(saved, change={"model/data.pkl": raw.replace(before, after)})
    return saved


# in the fixture's pickle: K\x06 tq.Q = numel of the storage, then K\x00 the offset, K\x06\x85 the
# shape and K\x01\x85 the stride
OFFSET, SHAPE, STRIDE = b"QK\x00", b"K\x06\x85", b"K\x01\x85"


@pytest.mark.parametrize(
    ("before", "after", "error_type", "essential"),
    [
        (OFFSET, b"QK\x01", TruncatedShardError, "through byte 28, storage '0' has 24 bytes"),
        (SHAPE, b"K\x07\x85", TruncatedShardError, "through byte 28, storage '0' has 24 bytes"),
        (OFFSET, b"QJ\xff\xff\xff\xff", HeaderError, "storage offset or stride"),
        (OFFSET, b"QN", HeaderError, "storage offset or stride"),
        (OFFSET, b"Q\x88", HeaderError, "storage offset or stride"),
        (SHAPE, b"J\xff\xff\xff\xff\x85", HeaderError, "not a whole number"),
        (SHAPE, b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85", HeaderError, f"more than {2**63 - 1}"),
        (SHAPE, b"K\x06", HeaderError, "shape and stride do not match"),
        (SHAPE, b"K\x02K\x03\x86", HeaderError, "shape and stride do not match"),
        (STRIDE, b"K\x00\x85", HeaderError, "stride [0]"),
        (STRIDE, b"N\x85", HeaderError, "storage offset or stride"),
        (STRIDE, b"\x8a\xff" + b"\x7f" * 255 + b"\x85", HeaderError, "storage offset or stride"),
        (b"FloatStorage", b"DoubleStorage", TruncatedShardError, "48 bytes, its record has 24"),
        (b"FloatStorage", b"ThingStorage", UnsupportedDTypeError, "torch.ThingStorage"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009", HeaderError, "'data/9', which is absent"),
    ],
)
def test_tensor_that_contradicts_its_storage_is_refused(
    before: bytes,
    after: bytes,
    error_type: type[StreamMergeError],
    essential: str,
    saved: Path,
) -> None:
    message = refusal(edited(saved, before, after), error_type)

    assert essential in message


# --- archives


def test_big_endian_file_is_refused(saved: Path) -> None:
    rezip(saved, change={"model/byteorder": b"big"})

    assert "byteorder" in refusal(saved)


def test_compressed_archive_is_refused(saved: Path) -> None:
    rezip(saved, compression=zipfile.ZIP_DEFLATED)

    assert "'data.pkl' is compressed" in refusal(saved)


def test_torchscript_program_is_refused(tmp_path: Path) -> None:
    class Double(torch.nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return value * 2

    torch.jit.save(torch.jit.script(Double()), tmp_path / "model.pt")

    assert "TorchScript" in refusal(tmp_path / "model.pt")


def test_legacy_file_is_refused_with_the_way_to_save_it_again(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    message = refusal(path)

    assert "before 1.6" in message
    assert "torch.save" in message


@pytest.mark.parametrize(
    ("content", "essential"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<html>", "web page"),
        (b"\x80\x02}.", "pickle"),
        (b"nothing known", "nothing known"),
    ],
)
def test_other_kinds_of_file_are_named(content: bytes, essential: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)

    assert essential in refusal(tmp_path / "model.bin")


def test_safetensors_file_of_the_wrong_name_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.bin")

    assert "is a safetensors file" in refusal(tmp_path / "model.bin")


def test_empty_file_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")

    assert "0 bytes" in refusal(tmp_path / "model.bin", TruncatedShardError)


def test_absent_file_is_refused(tmp_path: Path) -> None:
    assert "not there" in refusal(tmp_path / "model.bin", CheckpointError)


def test_file_that_lost_its_end_is_truncated_and_names_its_size(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-200])

    assert f"{saved.stat().st_size} bytes" in refusal(saved, TruncatedShardError)


def test_zip_without_a_pickle_is_refused(saved: Path) -> None:
    rezip(saved, change={"model/data.pkl": None})

    assert "0 data.pkl records" in refusal(saved)


def test_zip_with_two_pickles_is_refused(saved: Path) -> None:
    rezip(saved, change={"other/data.pkl": b"}."})

    assert "2 data.pkl records" in refusal(saved)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_one_name_twice_is_refused(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as archive:
        count = len(archive.namelist())
        archive.writestr("model/data/0", bytes(24))

    assert f"{count + 1} entries have {count} names" in refusal(saved)


def test_directory_that_points_at_another_entry_is_refused(saved: Path) -> None:
    """The local header, not only the directory, must name the record."""
    content = bytearray(saved.read_bytes())
    first = content.index(b"model/data/0")
    content[first : first + 12] = b"model/data/1"
    saved.write_bytes(content)

    assert "'data/0': no entry of that name" in refusal(saved)


# --- anything at all


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "sound.bin"
    tensors: collections.OrderedDict[str, torch.Tensor] = collections.OrderedDict(
        a=torch.arange(6.0), b=torch.ones(2, 2).to(torch.float8_e5m2), c=torch.ones(())
    )
    tensors._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save(tensors, path)
    return path


EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=4
)


def mutate(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for place, removed, inserted in edits:
        start = int(place * len(content))
        content = content[:start] + inserted + content[start + removed :]
    return content


def check_read_or_refused(path: Path) -> None:
    try:
        file, entries = read_torch_header(path, file_index=0)
    except StreamMergeError:
        return
    for entry in entries:
        assert 0 < entry.offset <= entry.offset + entry.nbytes <= file.nbytes


@settings(max_examples=400, deadline=None)
@given(edits=EDITS)
def test_mutated_pickle_is_read_or_refused(
    edits: list[tuple[float, int, bytes]], sound: Path
) -> None:
    path = sound.with_name("pickle.bin")
    path.write_bytes(sound.read_bytes())
    rezip(path, change={"sound/data.pkl": mutate(pickle_of(sound), edits)})

    check_read_or_refused(path)


@settings(max_examples=400, deadline=None)
@given(edits=EDITS)
def test_mutated_archive_is_read_or_refused(
    edits: list[tuple[float, int, bytes]], sound: Path
) -> None:
    path = sound.with_name("archive.bin")
    path.write_bytes(mutate(sound.read_bytes(), edits))

    check_read_or_refused(path)
