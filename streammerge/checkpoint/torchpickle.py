"""The pickle of a PyTorch file, read as data: no object of it is built, no function of it called.

``pickletools.genops`` cuts the bytes into operations; the few that ``torch.save`` writes for plain
tensors are carried out here on inert records, everything else is refused where it is seen. A stock
``pickle.Unpickler`` with a restricted ``find_class`` would not do: it sets attributes on whatever
the pickle names, lets six bytes grow its memo to 64 GiB, and hashes whatever serves as a key.

Memory and time grow with the number of operations, memory up to about 100 bytes for each byte of a
hostile pickle: no operation copies what another one made, whatever the memo lets it refer to.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from streammerge.errors import HeaderError

UNTYPED_STORAGE = "torch.storage.UntypedStorage"
"""The storage class whose size is in bytes, and whose tensors bring their own dtype."""


class Global(NamedTuple):
    """A name that the pickle refers to; only ever compared, never imported."""

    name: str
    """Module and name: ``"torch.FloatStorage"``."""


class Storage(NamedTuple):
    """A record of bytes that tensors look into."""

    kind: str
    """The class as the pickle names it: ``"torch.FloatStorage"``."""
    key: str
    """The name of the record below ``data/``."""
    numel: int
    """Elements; bytes where the kind is :data:`UNTYPED_STORAGE`."""


class StoredTensor(NamedTuple):
    """One tensor as the pickle describes it. Nothing in it is checked against anything yet."""

    storage: Storage
    """Where its elements lie."""
    storage_offset: object
    """First element, from the start of the storage, in elements."""
    shape: object
    """Elements per dimension."""
    stride: object
    """Elements from one index to the next, per dimension."""
    dtype: str | None
    """``"torch.float8_e4m3fn"``; None where the storage's kind says it."""
    is_view: bool
    """Whether the elements are to be negated or conjugated when read."""


def parse_torch_pickle(raw: bytes, *, path: Path) -> object:
    """Return what the pickle describes: dicts, lists, numbers, strings and :class:`StoredTensor`.

    Args:
        raw: The ``data.pkl`` record.
        path: The file it is from, for messages.

    Raises:
        HeaderError: The pickle is damaged, or asks for anything that plain tensors do not need.
    """
    try:
        return _walk(raw)
    except _Refused as refusal:
        raise HeaderError(
            f"{path}: pickle {refusal}; refused: only plain tensors are read. Where you trust the "
            "file, load it with torch and save its state dict as safetensors"
        ) from None
    # The bytes are hostile and the decoder's own errors many: whatever stops it, the file is bad.
    except Exception as error:
        raise HeaderError(
            f"{path}: damaged pickle ({type(error).__name__} among {len(raw)} bytes); copy it again"
        ) from error


def _walk(raw: bytes) -> object:
    """Return the object that the operations leave behind."""
    walker = _Walker()
    stream = io.BytesIO(raw)
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name != "STOP":
            walker.step(opcode.name, argument)
    if stream.tell() != len(raw):
        raise _Refused(f"ends at byte {stream.tell()} of {len(raw)}")
    return walker.result()


class _Refused(Exception):  # noqa: N818
    """The pickle asks for something; the text completes "pickle"."""


class _StateDict(dict[object, object]):
    """A dict that the pickle made as an OrderedDict, which may bear attributes."""


_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_IGNORED = frozenset({"PROTO", "FRAME"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# A tuple in the memo costs two bytes to be passed again, so passing it must cost nothing either.
_MAX_ARGUMENTS = 10
_MAX_INTEGER_KEY = 2**31


class _Walker:
    """The pickle machine's stack, marks and memo, for the operations that tensors need."""

    def __init__(self) -> None:
        self._stack: list[object] = []
        self._marks: list[int] = []
        # A dict, so that a huge index costs no more than a small one.
        self._memo: dict[int, object] = {}
        self._steps: dict[str, Callable[[], None]] = {
            "MARK": lambda: self._marks.append(len(self._stack)),
            "EMPTY_TUPLE": lambda: self._stack.append(()),
            "EMPTY_LIST": lambda: self._stack.append([]),
            "EMPTY_DICT": lambda: self._stack.append({}),
            "TUPLE": lambda: self._stack.append(tuple(self._pop_to_mark())),
            "APPEND": lambda: self._extend([self._stack.pop()]),
            "APPENDS": lambda: self._extend(self._pop_to_mark()),
            "SETITEM": lambda: self._set_items(self._pop(2)),
            "SETITEMS": lambda: self._set_items(self._pop_to_mark()),
            "MEMOIZE": lambda: self._memo.update({len(self._memo): self._stack[-1]}),
            "STACK_GLOBAL": self._push_global,
            "BINPERSID": lambda: self._stack.append(_storage(self._stack.pop())),
            "REDUCE": self._reduce,
            "BUILD": self._build,
        }

    def step(self, opcode: str, argument: object) -> None:
        """Carry out one operation, or refuse it."""
        if opcode in {"BINPUT", "LONG_BINPUT"} and isinstance(argument, int):
            self._memo[argument] = self._stack[-1]
        elif opcode in {"BINGET", "LONG_BINGET"} and isinstance(argument, int):
            self._stack.append(self._memo[argument])
        elif opcode in _LITERALS:
            self._stack.append(argument)
        elif opcode in self._steps:
            self._steps[opcode]()
        elif opcode in _TUPLES:
            self._stack.append(tuple(self._pop(_TUPLES[opcode])))
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode == "GLOBAL" and isinstance(argument, str):
            self._stack.append(_known_global(argument.replace(" ", ".", 1)))
        elif opcode not in _IGNORED:
            raise _Refused(f"uses the operation {opcode}")

    def result(self) -> object:
        """Return the one object left at the end."""
        (value,) = self._stack
        return value

    def _pop(self, count: int) -> list[object]:
        if count > len(self._stack):
            raise IndexError
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[object]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _extend(self, values: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(values)

    def _set_items(self, values: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            _set_item(target, key, value)

    def _push_global(self) -> None:
        module, name = self._pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        self._stack.append(_known_global(f"{module}.{name}"))

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError
        call = _CALLS.get(function.name)
        if call is None:
            raise _Refused(f"calls {function.name}"[:300])
        if len(arguments) > _MAX_ARGUMENTS:
            raise _Refused(f"calls {function.name} with {len(arguments)} arguments")
        self._stack.append(call(*arguments))

    def _build(self) -> None:
        # torch sets `_metadata`, the module versions, on a state dict; no tensor depends on it.
        self._stack.pop()
        if not isinstance(self._stack[-1], _StateDict):
            raise _Refused(f"sets attributes of a {type(self._stack[-1]).__name__}")


def _set_item(target: dict[object, object], key: object, value: object) -> None:
    # Other keys could be slow on purpose: a tuple of tuples shared a thousandfold has no end of
    # parts to hash, and large integers or floats can be chosen so that all have one hash.
    if isinstance(key, int):
        if abs(key) > _MAX_INTEGER_KEY:
            raise _Refused("has a key that is neither a name nor a small number")
    elif not isinstance(key, str):
        raise _Refused(f"has a {type(key).__name__} as a key")
    if key in target:
        raise _Refused(f"has the key {key!r:.300} twice")
    target[key] = value


def _known_global(name: str) -> Global:
    module, _, last = name.rpartition(".")
    if (
        name in _CALLS
        or name == UNTYPED_STORAGE
        or (module in {"torch", "torch.storage", "torch.cuda"} and last.endswith("Storage"))
        or (module == "torch" and last.startswith(_DTYPE_PREFIXES))
    ):
        return Global(name)
    raise _Refused(f"asks for {name!r}"[:300])


_DTYPE_PREFIXES = ("float", "bfloat", "int", "uint", "bool", "complex", "qint", "quint", "bits")


def _storage(identity: object) -> Storage:
    """Return the storage that a persistent id names."""
    match identity:
        case ("storage", Global(kind), str(key), str(), int(numel)) if numel >= 0:
            return Storage(kind, key, numel)
    raise _Refused("names a storage in a way that torch.save does not")


def _ordered_dict() -> _StateDict:
    # Python 2 passed the items as an argument, but wrote no zip files; a list of items from the
    # memo would be copied at each of a million calls.
    return _StateDict()


def _tensor_v2(*arguments: object) -> StoredTensor:
    match arguments:
        case (Storage() as storage, start, shape, stride, _, _, *metadata):
            return StoredTensor(storage, start, shape, stride, None, is_view=any(metadata))
    raise TypeError


def _tensor_v3(*arguments: object) -> StoredTensor:
    match arguments:
        case (Storage() as storage, start, shape, stride, _, _, Global(dtype), *metadata):
            return StoredTensor(storage, start, shape, stride, dtype, is_view=any(metadata))
    raise TypeError


def _parameter(tensor: object, _requires_grad: object, *_hooks_and_attributes: object) -> object:
    return tensor


def _size(sizes: object = ()) -> object:
    return sizes


_CALLS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
