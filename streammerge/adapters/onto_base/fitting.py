"""How shapes of a base and of an adapter fit: the way round, kernels, rows or columns."""

from __future__ import annotations

from math import prod

from streammerge.adapters.files.forms import Form, FormedModule
from streammerge.adapters.files.patterns import matches_targets
from streammerge.adapters.files.roles import Role
from streammerge.adapters.files.types import (
    AdapterConfig,
    LayerKind,
    LowRankModule,
    ScalingVector,
    strip_wrappers,
)
from streammerge.adapters.onto_base.locating import Shape

_TURNED = (Form.VERA, Form.VBLORA, Form.LORA)
"""Forms whose programs know weights that are stored ``[in, out]``, embeddings among them."""


def module_fits(module: LowRankModule, shape: Shape) -> bool:
    """Return whether a tensor of this shape could be the one that a module changes."""
    return layer_orientation(module, shape, fan_in_fan_out=False) is not None


def layer_orientation(module: LowRankModule, shape: Shape, *, fan_in_fan_out: bool) -> bool | None:
    """Return whether the base stores a module's weight ``[in, out]``; None where it does not fit."""
    if len(shape) < 2:
        return None
    inner = module.down.shape[1:]
    plain = shape[0] == module.out_features and _same_kernel(shape[1:], inner)
    swapped = len(shape) == 2 and shape == (module.in_features, module.out_features)
    if module.layer is LayerKind.EMBEDDING:
        return True if swapped else None
    if plain and swapped:
        return fan_in_fan_out and module.layer is LayerKind.LINEAR
    if plain:
        return False
    return True if swapped and module.layer is LayerKind.LINEAR else None


def form_fits(module: FormedModule, shape: Shape) -> bool:
    """Return whether a tensor of this shape could be the one that a module changes."""
    return form_orientation(module, shape, fan_in_fan_out=False) is not None


def form_orientation(module: FormedModule, shape: Shape, *, fan_in_fan_out: bool) -> bool | None:
    """Return whether the base stores a module's weight ``[in, out]``; None where it does not fit."""
    if module.form is Form.DIFFERENCE:
        return False if shape == module.parts[Role.DIFFERENCE].shape else None
    if len(shape) < 2:
        return None
    plain = _takes(module, shape[0], prod(shape[1:]))
    if module.form is Form.GLORA:
        # What is multiplied from the right knows channels alone.
        plain = plain and shape[1] == module.parts[Role.GLORA_A2].shape[1]
    swapped = module.form in _TURNED and len(shape) == 2 and _takes(module, *shape[::-1])
    if plain and swapped:
        return fan_in_fan_out
    return False if plain else True if swapped else None


def rows_of(module: LowRankModule | FormedModule) -> int | None:
    """Return the rows that a module changes; None where its files do not tell."""
    return module.outer if isinstance(module, FormedModule) else module.out_features


def columns_of(module: LowRankModule | FormedModule) -> int | None:
    """Return the columns of what a module changes; None where its files do not tell."""
    return module.columns if isinstance(module, FormedModule) else module.in_features


def rows_fit(module: LowRankModule | FormedModule, rows: int, shape: Shape) -> bool:
    """Return whether a module changes so many rows like those of a tensor of a shape."""
    whole = (rows, *shape[1:])
    if isinstance(module, FormedModule):
        return form_orientation(module, whole, fan_in_fan_out=False) is False
    return layer_orientation(module, whole, fan_in_fan_out=False) is False


def norms_inputs(module: LowRankModule | FormedModule) -> bool:
    """Return whether DoRA's norms are those of inputs, for which all rows are needed."""
    if isinstance(module, FormedModule):
        return module.magnitude is not None and module.magnitude.shape[0] != module.outer
    return module.magnitude_of_inputs


def is_feedforward(vector: ScalingVector, config: AdapterConfig, *, where: str) -> bool:
    """Return whether a vector multiplies the inputs of its module."""
    shape = vector.vector.shape
    if len(shape) == 2 and 1 in shape and shape != (1, 1):
        return shape[0] == 1
    # Convolutions have [1, features, 1, ...] either way; PEFT goes by the ends of names alone.
    targets = config.feedforward_modules or ()
    path = strip_wrappers(vector.stem)
    if isinstance(targets, str):
        return matches_targets(targets, path, where=f"{where}: feedforward_modules")
    return path.endswith(targets)


def scales_rows(
    vector: ScalingVector, shape: Shape, *, feedforward: bool, fan_in_fan_out: bool
) -> bool | None:
    """Return whether rows of the stored matrix are multiplied; None where the vector fits none."""
    count = vector.vector.numel
    if len(shape) < 2 or (len(vector.vector.shape) > 2) != (len(shape) > 2):
        return None
    # Only layers of two dimensions are ever stored [in, out].
    along_rows = feedforward == (fan_in_fan_out and len(shape) == 2)
    if shape[0 if along_rows else 1] == count:
        return along_rows
    return not along_rows if len(shape) == 2 and shape[1 if along_rows else 0] == count else None


def _same_kernel(stored: Shape, trained: Shape) -> bool:
    """Return whether two ``[in, *kernel]`` agree; kernels of one element may be left out."""
    return stored[0] == trained[0] and (
        stored == trained or (prod(stored[1:]) == 1 and prod(trained[1:]) == 1)
    )


def _takes(module: FormedModule, rows: int, columns: int) -> bool:
    if module.outer not in (None, rows):
        return False
    match module.form:
        case Form.OFT:
            block = int(module.settings["block"])
            blocks = int(module.settings["blocks"])
            # One rotation may be shared by all blocks.
            return columns % block == 0 and blocks in (columns // block, 1)
        case Form.VERA:
            return columns <= module.parts[Role.SHARED_DOWN].shape[1]
        case _:
            return columns == module.columns
