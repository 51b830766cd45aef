"""Codes with scales seen as the numbers that they stand for.

Nothing is read: a coded tensor becomes an entry that says where codes and scales lie, and the scales
themselves, which no model has once its weights are numbers, disappear.

    codes                  scales                                    who writes them
    [r, c]                 one, [1], or one per row                  compressed-tensors, fbgemm, Mistral, ComfyUI
    [r, c]                 [ceil(r / 128), ceil(c / 128)]            DeepSeek, transformers' fine-grained fp8
    [r, c]                 [r, c / 32] in F8_E8M0 or U8              MXFP8
    [experts, r, c]        the same per expert                       stacks of experts
    X_blocks [.., g, 16]   X_scales [.., g]: powers of two           MXFP4 of gpt-oss: two codes in a byte, 32 to a
                                                                     scale, each matrix of X transposed

Source: the published layouts; every value is ``code * scale``, whatever the scale is called:
``weight_scale_inv`` too is what codes are multiplied by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from streammerge.checkpoint.dequantising import dequantising_advice
from streammerge.checkpoint.quantised import ScaledWeight, find_scales
from streammerge.checkpoint.types import Checkpoint, CodedAs, Coding, StoredPart, TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import QuantizedCheckpointError, printable

_CODES = frozenset({DType.F8_E4M3, DType.F8_E5M2})
_MULTIPLIES = re.compile(r"(\w+_)?(weight_scale|scale_weight|qscale_weight|scale|scale_inv)")
"""Names of scales that codes are multiplied by. A ``_amax`` is divided by the largest code first, and
of other spellings nobody knows."""
_OF_CACHE = re.compile(r"(.+\.)?(k|v|q|kv)_scale")
"""Scales of what attention caches, which belong to the quantisation too."""
_OF_COMFYUI = re.compile(r"(.+\.)?(scaled_fp8|comfy_quant)")
"""Marks of ComfyUI, which say of tensors that they are codes: of numbers they would be wrong."""
_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES_PER_SCALE = 16
"""Bytes of MXFP4 codes that share a scale."""
_QDATA = "_qdata"
_METHODS = frozenset(
    {"fp8", "fbgemm_fp8", "compressed-tensors", "compressed_tensors", "torchao", "mxfp4"}
)
"""Values of ``quant_method`` under which weights are codes of these kinds."""
QUANTIZATION_KEY = "quantization_config"


def read_codes(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with float8 weights read as numbers, if all scales are understood.

    Raises:
        QuantizedCheckpointError: A weight has scales of another kind, or of another shape.
    """
    scaled = {
        name: found
        for name, found in find_scales(checkpoint.tensors).items()
        if found.weight.dtype in _CODES
    }
    packed = dict(_packed_stacks(checkpoint.tensors))
    if not scaled and not packed:
        return checkpoint
    tensors = dict(checkpoint.tensors)
    gone: set[str] = set()
    for name, entry in packed.items():
        tensors[name] = entry
        gone |= {name + _BLOCKS, name + _SCALES}
    for name, found in scaled.items():
        entry = _read_as_numbers(found, checkpoint)
        del tensors[name]
        tensors[entry.name] = entry
        gone |= {each.name for each in found.others} | {found.scale.name if found.scale else ""}
    gone |= {name for name in tensors if _OF_CACHE.fullmatch(name) or _OF_COMFYUI.fullmatch(name)}
    kept = {name: entry for name, entry in tensors.items() if name not in gone}
    _check_method(checkpoint)
    config = {
        key: value for key, value in (checkpoint.config or {}).items() if key != QUANTIZATION_KEY
    }
    bits = ", ".join(
        sorted(
            {str(found.weight.dtype) for found in scaled.values()}
            | ({"MXFP4"} if packed else set())
        )
    )
    note = (
        f"{len(scaled) + len(packed)} weight(s) are {bits} codes with scales, read as the numbers they stand for; "
        f"{len(checkpoint.tensors) - len(kept)} tensor(s) of scales are used up or left out"
    )
    return replace(
        checkpoint,
        tensors=kept,
        config=config if checkpoint.config is not None else None,
        dequantised=True,
        quantisation={name: entry for name, entry in checkpoint.tensors.items() if name in gone},
        notes=(*checkpoint.notes, note),
    )


def _packed_stacks(tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry]]:
    """Yield stacks of MXFP4 matrices as the stacks that transformers have of them, by name.

    Source: ``convert_moe_packed_tensors`` of transformers: of a byte, the low half is the first code; a
    matrix ``[rows, columns]`` of codes is the transpose of the weight.
    """
    for blocks in [entry for name, entry in tensors.items() if name.endswith(_BLOCKS)]:
        name = blocks.name.removesuffix(_BLOCKS)
        scales = tensors.get(name + _SCALES)
        if scales is None or len(blocks.shape) < 3:
            continue
        bytes_each = {DType.U8} == {blocks.dtype, scales.dtype}
        if (
            not bytes_each
            or blocks.shape[-1] != _BYTES_PER_SCALE
            or scales.shape != blocks.shape[:-1]
        ):
            continue
        *stacked, rows, count, _ = blocks.shape
        columns = 2 * _BYTES_PER_SCALE * count
        parts = tuple(
            StoredPart(
                blocks.file,
                blocks.offset + index * rows * columns // 2,
                rows * columns,
                Coding(
                    dtype=DType.F4,
                    columns=columns,
                    first=0,
                    scale_file=scales.file,
                    scale_offset=scales.offset + index * rows * count,
                    scale_dtype=scales.dtype,
                    scale_columns=count,
                    block=(1, 2 * _BYTES_PER_SCALE),
                    transposed_rows=rows,
                ),
            )
            for index in range(prod(stacked))
        )
        shape = (*stacked, columns, rows)
        yield name, TensorEntry(name, DType.F32, shape, blocks.file, blocks.offset, parts)


def _check_method(checkpoint: Checkpoint) -> None:
    quantization = (checkpoint.config or {}).get(QUANTIZATION_KEY)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(method, str) and method not in _METHODS:
        raise QuantizedCheckpointError(
            f"{checkpoint.directory / 'config.json'}: {QUANTIZATION_KEY} says that the weights are "
            f"quantised ({printable(method)}); {dequantising_advice(method, checkpoint.directory)}"
        )


def _read_as_numbers(found: ScaledWeight, checkpoint: Checkpoint) -> TensorEntry:
    weight, scale = found.weight, found.scale
    if scale is None or not _MULTIPLIES.fullmatch(scale.name.rpartition(".")[2]):
        other = scale or found.others[0]
        raise _refused(checkpoint, weight, other, "which is no scale that codes are multiplied by")
    second = [each.name for each in found.others if "weight_scale" in each.name.rpartition(".")[2]]
    if second:
        raise _refused(checkpoint, weight, scale, f"and by {printable(second[0])} as well")
    block = _weight_block(checkpoint.config)
    parts = _parts(weight, scale, block)
    if parts is None:
        raise _refused(
            checkpoint,
            weight,
            scale,
            f"whose shape {list(scale.shape)} does not say which codes of {list(weight.shape)} share one",
        )
    module, dot, last = weight.name.rpartition(".")
    # torchao: the codes of X.weight are in X._weight_qdata.
    plain = last.removesuffix(_QDATA).lstrip("_") if last.endswith(_QDATA) else last
    return TensorEntry(
        f"{module}{dot}{plain}",
        DType.F32,
        weight.shape,
        weight.file,
        weight.offset,
        parts,
        CodedAs(weight, scale),
    )


def _refused(
    checkpoint: Checkpoint, weight: TensorEntry, scale: TensorEntry, why: str
) -> QuantizedCheckpointError:
    return QuantizedCheckpointError(
        f"{checkpoint.files[weight.file].path}: tensor {weight.name!r} is {weight.dtype} scaled by "
        f"{scale.name!r}, {why}; {dequantising_advice('', checkpoint.directory)}"
    )


def _weight_block(config: Mapping[str, object] | None) -> tuple[int, int] | None:
    """Return the block of codes that share a scale, if the configuration tells."""
    quantization = (config or {}).get(QUANTIZATION_KEY)
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None


def _parts(
    weight: TensorEntry, scale: TensorEntry, block: tuple[int, int] | None
) -> tuple[StoredPart, ...] | None:
    """Return the codes with their scales, matrix by matrix; None where the shapes do not fit."""
    if not weight.shape:
        return None
    *stacked, rows, columns = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
    matrices = prod(stacked)
    shape = _scale_shape(scale.shape, matrices, rows, columns, stacked=bool(stacked))
    if shape is None:
        return None
    count, scale_rows, scale_columns = shape
    shared = (
        _block(rows, scale_rows, block and block[0]),
        _block(columns, scale_columns, block and block[1]),
    )
    if shared[0] is None or shared[1] is None:
        return None
    parts = []
    for index in range(matrices):
        place = index * scale_rows * scale_columns if count > 1 else 0
        coding = Coding(
            dtype=weight.dtype,
            columns=columns,
            first=0,
            scale_file=scale.file,
            scale_offset=scale.offset + place * scale.dtype.itemsize,
            scale_dtype=scale.dtype,
            scale_columns=scale_columns,
            block=(shared[0], shared[1]),
        )
        offset = weight.offset + index * rows * columns * weight.dtype.itemsize
        parts.append(StoredPart(weight.file, offset, rows * columns, coding))
    return tuple(parts)


def _scale_shape(
    shape: Sequence[int], matrices: int, rows: int, columns: int, *, stacked: bool
) -> tuple[int, int, int] | None:
    """Return how many matrices of scales there are, and their rows and columns."""
    if prod(shape) == 1:
        return 1, 1, 1
    if stacked and prod(shape) == matrices * rows and shape[-1] == rows and len(shape) > 1:
        return matrices, rows, 1
    if stacked and len(shape) >= 1 and prod(shape) == matrices and shape[0] == matrices:
        return matrices, 1, 1
    if stacked:
        return (matrices, shape[-2], shape[-1]) if prod(shape[:-2]) == matrices else None
    if len(shape) == 1:
        # One per row, or of a vector of codes one per so many.
        return (1, shape[0], 1) if shape[0] == rows else None
    if len(shape) != 2 or (shape[0] != rows and shape[0] > rows) or shape[1] > columns:
        return None
    return 1, shape[0], shape[1]


def _block(size: int, scales: int, told: int | None) -> int | None:
    """Return how many codes in a row, or rows, share a scale; None where nothing tells."""
    if scales == 1:
        return size
    if scales == size:
        return 1
    for block in (told, 128):
        if block is not None and -(-size // block) == scales:
            return block
    return size // scales if size % scales == 0 else None
