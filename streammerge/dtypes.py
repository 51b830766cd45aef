"""Element types by their safetensors names, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class DType(StrEnum):
    """An element type, named as in a safetensors header."""

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    I64 = "I64"
    I32 = "I32"
    I16 = "I16"
    I8 = "I8"
    U64 = "U64"
    U32 = "U32"
    U16 = "U16"
    U8 = "U8"
    BOOL = "BOOL"
    F8_E8M0 = "F8_E8M0"
    F8_E4M3FNUZ = "F8_E4M3FNUZ"
    F8_E5M2FNUZ = "F8_E5M2FNUZ"
    F4 = "F4"
    C64 = "C64"

    # Set once for each below: they are asked for a dozen times for each of 50,000 tensors.
    itemsize: int
    """Bytes per item; an item is an element, but two of F4."""
    elements_per_item: int
    """Elements that share an item; 1 for all but F4."""
    is_float: bool
    """Whether merge arithmetic applies; integers and bool are only ever copied."""
    is_opaque: bool
    """Whether elements are bytes to copy and nothing more: no arithmetic, no conversion."""

    def nbytes(self, numel: int) -> int:
        """Return the bytes that elements take side by side.

        Args:
            numel: How many elements.

        Raises:
            ValueError: They end inside a byte; the text completes "its shape".
        """
        if self.elements_per_item == 1:
            return numel * self.itemsize
        if numel % 2:
            raise ValueError(f"has {numel} elements of {self}, which end inside a byte")
        return numel // 2

    @property
    def torch_name(self) -> str:
        """The name of the same type in torch and in Hugging Face configs: ``"bfloat16"``.

        F4 has none: torch's type of that kind counts pairs, so its shapes are other ones.
        """
        return _TORCH_NAMES[self]


_ITEMSIZE = {
    DType.F64: 8,
    DType.F32: 4,
    DType.F16: 2,
    DType.BF16: 2,
    DType.F8_E4M3: 1,
    DType.F8_E5M2: 1,
    DType.I64: 8,
    DType.I32: 4,
    DType.I16: 2,
    DType.I8: 1,
    DType.U64: 8,
    DType.U32: 4,
    DType.U16: 2,
    DType.U8: 1,
    DType.BOOL: 1,
    DType.F8_E8M0: 1,
    DType.F8_E4M3FNUZ: 1,
    DType.F8_E5M2FNUZ: 1,
    DType.F4: 1,
    DType.C64: 8,
}
_OPAQUE = frozenset({DType.F8_E8M0, DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ, DType.F4, DType.C64})
_FLOATS = frozenset({DType.F64, DType.F32, DType.F16, DType.BF16, DType.F8_E4M3, DType.F8_E5M2})
for _dtype in DType:
    _dtype.itemsize = _ITEMSIZE[_dtype]
    _dtype.elements_per_item = 2 if _dtype is DType.F4 else 1
    _dtype.is_float = _dtype in _FLOATS
    _dtype.is_opaque = _dtype in _OPAQUE
_TORCH_NAMES = {
    DType.F64: "float64",
    DType.F32: "float32",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E5M2: "float8_e5m2",
    DType.I64: "int64",
    DType.I32: "int32",
    DType.I16: "int16",
    DType.I8: "int8",
    DType.U64: "uint64",
    DType.U32: "uint32",
    DType.U16: "uint16",
    DType.U8: "uint8",
    DType.BOOL: "bool",
    DType.F8_E8M0: "float8_e8m0fnu",
    DType.F8_E4M3FNUZ: "float8_e4m3fnuz",
    DType.F8_E5M2FNUZ: "float8_e5m2fnuz",
    DType.C64: "complex64",
}

DTYPES_BY_TORCH_NAME = {name: dtype for dtype, name in _TORCH_NAMES.items()}

UNSUPPORTED_CODES = frozenset({"F6_E2M3", "F6_E3M2"})
"""Codes that the safetensors format knows and that no library loads: four elements in three bytes."""


def promoted(dtypes: Iterable[DType]) -> DType:
    """Return the narrowest type that holds the values of all of some float types."""
    given = set(dtypes)
    most = max(dtype.itemsize for dtype in given)
    widest = [dtype for dtype in given if dtype.itemsize == most]
    return widest[0] if len(widest) == 1 else _WIDER[most]


_WIDER = {1: DType.BF16, 2: DType.F32}
"""What holds the values of two types of so many bytes."""
