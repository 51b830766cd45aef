"""The tensors of one PyTorch zip file (.bin, .pt, .pth, .ckpt), found without running its pickle.

torch.save stores each storage uncompressed in a zip archive, so a contiguous tensor is a byte range
of the file like any other. Reads the archive's directory, one pickle record and 30 bytes per
storage; no tensor byte.
"""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, TypeGuard

from streammerge.checkpoint.inputs import (
    MAX_NUMEL,
    check_name,
    count_elements,
    open_input,
    read_exactly,
    refuse_foreign,
)
from streammerge.checkpoint.torchpickle import (
    UNTYPED_STORAGE,
    Storage,
    StoredTensor,
    parse_torch_pickle,
)
from streammerge.checkpoint.types import ShardFile, TensorEntry
from streammerge.dtypes import DTYPES_BY_TORCH_NAME, DType
from streammerge.errors import HeaderError, TruncatedShardError, UnsupportedDTypeError

MAX_PICKLE_BYTES = 32 * 2**20
"""A tensor takes about 130 bytes of pickle, so this allows a quarter of a million tensors; a hostile
pickle can make its parsed form a hundred times as large, which is why the limit is not higher."""
MAX_ZIP_DIRECTORY_BYTES = 32 * 2**20
"""An entry takes about 100 bytes, so this too allows a quarter of a million tensors; what zipfile makes
of it is up to fifteen times as large."""
MAX_DIMENSIONS = 64
"""No library computes with more; one long shape in the memo could serve a million tensors."""

_HEAD_BYTES = 64
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED_FLAG = 0x1
_UTF8_FLAG = 0x800
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_RESAVE = "load it where you trust it and save its state dict as safetensors"
_STORAGE_DTYPES = {
    "DoubleStorage": DType.F64,
    "FloatStorage": DType.F32,
    "HalfStorage": DType.F16,
    "BFloat16Storage": DType.BF16,
    "LongStorage": DType.I64,
    "IntStorage": DType.I32,
    "ShortStorage": DType.I16,
    "CharStorage": DType.I8,
    "ByteStorage": DType.U8,
    "BoolStorage": DType.BOOL,
    "ComplexFloatStorage": DType.C64,
}
# What programs wrap a state dict in, with optimizers, counters and arguments beside it.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
_MAX_KEYS_SHOWN = 10


class _Record(NamedTuple):
    """One stored entry of the archive."""

    offset: int
    """First byte of its content, from the start of the file."""
    nbytes: int
    """Bytes of its content."""


def read_torch_header(path: Path, *, file_index: int) -> tuple[ShardFile, list[TensorEntry]]:
    """Return a PyTorch file's identity and its tensors, in the order of their bytes.

    Tensors that share a storage get byte ranges that overlap or are the same.

    Args:
        path: The file, absolute.
        file_index: What :attr:`TensorEntry.file` will hold.

    Returns:
        The file as it is now, with what was left out of it, and one entry per tensor, sorted by
        offset, then name.

    Raises:
        CheckpointError: The file cannot be opened.
        HeaderError: It is not what torch.save writes for a dict of tensors, or asks for more than
            tensors, or holds a tensor that is not contiguous.
        TruncatedShardError: The file, or a storage in it, ends before the data declared.
        UnsupportedDTypeError: A tensor has a dtype that safetensors cannot hold.
    """
    with open_input(path) as (stream, status):
        archive = _open_archive(path, stream)
        pickle_nbytes = archive.member("data.pkl").file_size
        if pickle_nbytes > MAX_PICKLE_BYTES:
            raise HeaderError(
                f"{path}: data.pkl has {pickle_nbytes} bytes, the limit is {MAX_PICKLE_BYTES}; "
                "save the tensors as safetensors"
            )
        raw = archive.read("data.pkl")
        archive.check_byte_order()
        tensors, left_out = _state_dict(path, parse_torch_pickle(raw, path=path))
        entries = [
            _locate(archive, name, tensor, file_index=file_index)
            for name, tensor in tensors.items()
        ]
    entries.sort(key=lambda entry: (entry.offset, entry.name))
    digest = blake2b(raw, digest_size=16).hexdigest()
    return ShardFile(path, status.st_size, status.st_mtime_ns, digest, left_out), entries


@dataclass(frozen=True, slots=True)
class _Archive:
    """An open archive whose entries are looked up below its one root folder."""

    path: Path
    """The file, for messages."""
    stream: BinaryIO
    """The open file."""
    root: str
    """The folder in the archive that holds every entry."""
    members: dict[str, zipfile.ZipInfo]
    """The archive's entries by full name."""
    records: dict[str, _Record]
    """Those already located, by name below the root."""

    def member(self, name: str) -> zipfile.ZipInfo:
        """Return the entry ``name`` below the root, which must exist."""
        member = self.members.get(f"{self.root}/{name}")
        if member is None:
            raise HeaderError(f"{self.path}: its pickle needs the record {name!r}, which is absent")
        return member

    def locate(self, name: str) -> _Record:
        """Return where the content of an entry lies: uncompressed and inside the file."""
        if name not in self.records:
            self.records[name] = self._locate(name)
        return self.records[name]

    def read(self, name: str) -> bytes:
        """Return the content of an entry."""
        record = self.locate(name)
        self.stream.seek(record.offset)
        return read_exactly(self.stream, record.nbytes, path=self.path)

    def check_byte_order(self) -> None:
        """Return if the numbers are little-endian, as in every file without the record."""
        if f"{self.root}/byteorder" not in self.members:
            return
        if self.member("byteorder").file_size > 16 or self.read("byteorder") != b"little":
            raise HeaderError(
                f"{self.path}: byteorder record: expected 'little'; save the file again on a "
                "little-endian machine"
            )

    def _locate(self, name: str) -> _Record:
        member = self.member(name)
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED_FLAG:
            raise HeaderError(
                f"{self.path}: record {name!r} is compressed or encrypted; torch.save stores plain "
                f"bytes: {_RESAVE}"
            )
        # The archive's directory says where the entry's own header is, and only that header says
        # how long it is: torch pads it so that storages are aligned.
        file_nbytes = os.fstat(self.stream.fileno()).st_size
        if not 0 <= member.header_offset < file_nbytes or member.compress_size != member.file_size:
            raise HeaderError(
                f"{self.path}: record {name!r} is placed at byte {member.header_offset} with "
                f"{member.compress_size} of {member.file_size} bytes, file has {file_nbytes} "
                "bytes; copy it again"
            )
        self.stream.seek(member.header_offset)
        local = read_exactly(self.stream, _LOCAL_HEADER_BYTES, path=self.path)
        name_nbytes = int.from_bytes(local[26:28], "little")
        extra_nbytes = int.from_bytes(local[28:30], "little")
        stored_name = read_exactly(self.stream, name_nbytes, path=self.path)
        encoding = "utf-8" if member.flag_bits & _UTF8_FLAG else "cp437"
        expected_name = member.orig_filename.encode(encoding)
        if not local.startswith(b"PK\x03\x04") or stored_name != expected_name:
            raise HeaderError(
                f"{self.path}: record {name!r}: no entry of that name at byte "
                f"{member.header_offset}; copy the file again"
            )
        offset = member.header_offset + _LOCAL_HEADER_BYTES + name_nbytes + extra_nbytes
        if offset + member.file_size > file_nbytes:
            raise TruncatedShardError(
                f"{self.path}: record {name!r} reaches through byte {offset + member.file_size}, "
                f"file has {file_nbytes} bytes; copy it again"
            )
        return _Record(offset, member.file_size)


def _open_archive(path: Path, stream: BinaryIO) -> _Archive:
    head = stream.read(_HEAD_BYTES)
    if not head.startswith(b"PK"):
        _refuse_not_zip(path, head)
    try:
        with zipfile.ZipFile(_BoundedReads(stream)) as archive:
            members = archive.infolist()
    except _TooLong as error:
        raise HeaderError(
            f"{path}: its zip directory has {error.nbytes} bytes, the limit is "
            f"{MAX_ZIP_DIRECTORY_BYTES}; save the tensors as safetensors"
        ) from error
    # zipfile names no closed set of errors for a damaged directory; whichever it is, the file is
    # damaged. Most often the end is missing, where the directory is.
    except Exception as error:
        raise TruncatedShardError(
            f"{path}: no readable zip directory at the end of its "
            f"{os.fstat(stream.fileno()).st_size} bytes ({error}); copy it again"
        ) from error
    by_name = {member.filename: member for member in members}
    if len(by_name) != len(members):
        raise HeaderError(
            f"{path}: {len(members)} entries have {len(by_name)} names; copy it again"
        )
    roots = [name.removesuffix("/data.pkl") for name in by_name if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise HeaderError(
            f"{path}: a zip archive with {len(roots)} data.pkl records, torch.save writes 1; name "
            "a file written by torch.save"
        )
    root = roots[0]
    marks_of_a_program = (f"{root}/constants.pkl", f"{root}/code/")
    if any(name.startswith(marks_of_a_program) for name in by_name):
        raise HeaderError(
            f"{path}: is a TorchScript program, not a state dict; save its state_dict() as "
            "safetensors"
        )
    return _Archive(path, stream, root, by_name, {})


class _TooLong(Exception):  # noqa: N818
    """zipfile asks for more than a directory may have."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.nbytes = nbytes


class _BoundedReads(io.RawIOBase):
    """A view of an open file that gives zipfile no more at once than its directory may have."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move in the file."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """Return where the next byte is read."""
        return self._stream.tell()

    def read(self, nbytes: int = -1) -> bytes:
        """Return the next ``nbytes`` bytes, or all that are left.

        Raises:
            _TooLong: They are more than :data:`MAX_ZIP_DIRECTORY_BYTES`.
        """
        if nbytes > MAX_ZIP_DIRECTORY_BYTES:
            raise _TooLong(nbytes)
        return self._stream.read(nbytes)


def _refuse_not_zip(path: Path, head: bytes) -> NoReturn:
    if head.startswith(_LEGACY_MAGIC):
        raise HeaderError(
            f"{path}: is in the format of torch before 1.6; load it with torch.load and save it "
            "again with torch.save, or as safetensors"
        )
    if head[8:9] == b"{" and head[4:8] == bytes(4):
        raise HeaderError(f"{path}: is a safetensors file; name it .safetensors")
    refuse_foreign(path, head)
    raise HeaderError(
        f"{path}: not a file of torch.save: expected a zip archive, got {head[:16]!r}; copy it "
        "again"
    )


def _state_dict(path: Path, value: object) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return the tensors by name, and what else the file holds.

    A state dict may stand in a wrapper beside anything else, since its name tells it apart. Beside
    tensors themselves there may be counters: anything that is not a number or a text could be a part
    of the model.
    """
    left_out: list[str] = []
    if isinstance(value, dict) and not _has_tensors(value):
        wrapped = [key for key in _WRAPPERS if key in value and _has_tensors(value[key])]
        if len(wrapped) > 1:
            raise HeaderError(
                f"{path}: holds {len(wrapped)} state dicts, {_shown(wrapped)}; save the one that is "
                "meant alone"
            )
        if wrapped:
            left_out += [
                f"{key!r:.100} ({_kind_of(beside)})"
                for key, beside in value.items()
                if key != wrapped[0]
            ]
            value = value[wrapped[0]]
    if not isinstance(value, dict):
        raise HeaderError(
            f"{path}: expected a dict of tensors, got {_kind_of(value)}; save a state dict"
        )
    is_state_dict = _has_tensors(value)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in value.items():
        if not isinstance(name, str):
            raise HeaderError(
                f"{path}: expected names as keys, got {type(name).__name__}; save a state dict"
            )
        check_name(name, path=path)
        if isinstance(tensor, StoredTensor):
            tensors[name] = tensor
        elif is_state_dict and isinstance(tensor, int | float | str):
            left_out.append(f"{name!r:.100} ({_kind_of(tensor)})")
        else:
            raise HeaderError(
                f"{path}: {name!r} has type {_kind_of(tensor)}, expected a tensor (keys: "
                f"{_shown(list(value))}); save the state dict alone"
            )
    more = len(left_out) - _MAX_KEYS_SHOWN
    return tensors, (*left_out[:_MAX_KEYS_SHOWN], *([f"{more} more"] if more > 0 else []))


def _has_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(
        isinstance(each, StoredTensor) for each in value.values()
    )


def _shown(keys: list[object] | list[str]) -> str:
    texts = [repr(key) for key in keys[:_MAX_KEYS_SHOWN] if isinstance(key, str)]
    return ", ".join(texts) + (", ..." if len(keys) > _MAX_KEYS_SHOWN else "")


def _kind_of(value: object) -> str:
    if isinstance(value, dict):
        return "dict"
    return "tensor" if isinstance(value, StoredTensor) else type(value).__name__


def _locate(archive: _Archive, name: str, tensor: StoredTensor, *, file_index: int) -> TensorEntry:
    """Return where a tensor's bytes lie, once they are known to be one run inside its storage."""
    where = f"{archive.path}: tensor {name!r}"
    dtype = _dtype(where, tensor)
    shape, stride, start = tensor.shape, tensor.stride, tensor.storage_offset
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise HeaderError(f"{where}: its shape and stride do not match; copy the file again")
    if not _is_count(start) or not all(_is_count(step) for step in stride):
        raise HeaderError(f"{where}: its storage offset or stride is not a whole number from 0")
    if len(shape) > MAX_DIMENSIONS:
        raise HeaderError(
            f"{where}: its shape has {len(shape)} dimensions, the limit is {MAX_DIMENSIONS}; save a "
            "flat view of it"
        )
    try:
        numel = count_elements(shape)
    except ValueError as error:
        raise HeaderError(f"{where}: its shape {error}") from error
    if tensor.is_view or (numel and not _is_row_major(shape, stride)):
        raise HeaderError(
            f"{where}: shape {list(shape)} with stride {list(stride)} is not one run of bytes; "
            "save tensor.contiguous() in its place"
        )
    storage = _locate_storage(archive, where, tensor.storage)
    if not numel:
        return TensorEntry(name, dtype, shape, file_index, storage.offset)
    end = (start + numel) * dtype.itemsize
    if end > storage.nbytes:
        raise TruncatedShardError(
            f"{where}: needs its storage through byte {end}, storage {tensor.storage.key!r} has "
            f"{storage.nbytes} bytes; copy the file again"
        )
    offset = storage.offset + start * dtype.itemsize
    return TensorEntry(name, dtype, shape, file_index, offset)


def _dtype(where: str, tensor: StoredTensor) -> DType:
    kind = tensor.storage.kind.rpartition(".")[2]
    dtype = (
        _STORAGE_DTYPES.get(kind)
        if tensor.dtype is None
        else DTYPES_BY_TORCH_NAME.get(tensor.dtype.removeprefix("torch."))
    )
    if dtype is None:
        raise UnsupportedDTypeError(
            f"{where}: safetensors files have no place for {tensor.dtype or tensor.storage.kind}; "
            f"save it in one of {', '.join(DTYPES_BY_TORCH_NAME)}"
        )
    return dtype


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_NUMEL


def _is_row_major(shape: tuple[int, ...], stride: tuple[object, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _locate_storage(archive: _Archive, where: str, storage: Storage) -> _Record:
    """Return the record of a storage, which is as long as the pickle says."""
    dtype = _STORAGE_DTYPES.get(storage.kind.rpartition(".")[2])
    if dtype is None and storage.kind != UNTYPED_STORAGE:
        raise UnsupportedDTypeError(f"{where}: safetensors files have no place for {storage.kind}")
    record = archive.locate(f"data/{storage.key}")
    declared = storage.numel * (dtype.itemsize if dtype else 1)
    if declared > record.nbytes:
        # Not the number of elements itself: it may have more digits than Python prints.
        raise TruncatedShardError(
            f"{where}: storage {storage.key!r} is declared with {min(declared, MAX_NUMEL)} bytes, "
            f"its record has {record.nbytes} bytes; copy the file again"
        )
    return record
