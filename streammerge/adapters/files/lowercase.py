"""Adapters whose factors are called ``lora_a`` and ``lora_b``: those of mlx-lm and of torchtune.

Follows: mlx-lm (``tuner/lora.py``, ``tuner/dora.py``), whose factors are stored transposed and whose
scale is written down; torchtune (``modules/peft/lora.py``, ``models/convert_weights.py``), whose
configuration is PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from streammerge.adapters.files.assembling import Sorted
from streammerge.adapters.files.config import MAX_CONFIG_BYTES, parse_adapter_config
from streammerge.adapters.files.forms import Form, FormedModule
from streammerge.adapters.files.patterns import check_path
from streammerge.adapters.files.roles import Role
from streammerge.adapters.files.types import AdapterConfig, Naming
from streammerge.checkpoint.inputs import (
    parse_json_object,
    read_small,
    refuse_constant,
)
from streammerge.errors import (
    HeaderError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedAdapterError,
)

MLX_NAME = "adapters.safetensors"
"""mlx-lm's name of the file with the tensors."""
TORCHTUNE_NAME = "adapter_model.pt"
"""torchtune's; those of its other epochs are named by their path."""


def read_lower_config(path: Path, naming: Naming) -> tuple[AdapterConfig, float]:
    """Return the configuration beside the tensors, and the factor of all products.

    Args:
        path: The file.
        naming: Whose it is.

    Raises:
        HeaderError: It is no such file.
        UnsupportedAdapterError: It describes an adapter that cannot be merged faithfully.
    """
    raw = read_small(path, MAX_CONFIG_BYTES)
    document = parse_json_object(raw, where=str(path), parse_constant=refuse_constant)
    if naming is Naming.MLX:
        return _mlx_config(document, str(path))
    # torchtune knows neither patterns nor another root.
    config = parse_adapter_config({"peft_type": "LORA", **document}, where=str(path))
    return config, config.alpha / config.rank


def _mlx_config(document: Mapping[str, object], where: str) -> tuple[AdapterConfig, float]:
    kind = document.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapterError(
            f"{where}: fine_tune_type is {str(kind)[:40]!r}: the file holds layers, not factors; fuse "
            "it with mlx_lm.fuse, and name the result as a model"
        )
    parameters = document.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise HeaderError(
            f"{where}: lora_parameters.scale: expected a finite number, got {str(scale)[:40]}; "
            "without it the tensors say nothing"
        )
    model = document.get("model")
    config = parse_adapter_config(
        {
            "peft_type": "LORA",
            "use_dora": kind == "dora",
            "base_model_name_or_path": model if isinstance(model, str) else None,
        },
        where=where,
    )
    return config, float(scale)


def build_lower(
    found: Sorted, scaling: float, *, naming: Naming, where: str
) -> Iterator[FormedModule]:
    """Yield the modules of such an adapter, and take their tensors out.

    Args:
        found: Its tensors by module.
        scaling: The factor of all products.
        naming: Whose they are.
        where: The file, for messages.

    Raises:
        MissingTensorError: A factor is not there.
        ShapeMismatchError: Shapes contradict each other.
        UnsupportedAdapterError: Such a module has no merge.
    """
    turned = naming is Naming.MLX
    for stem, parts in sorted(found.parts.items()):
        check_path(stem, where=where)
        down, up = parts.pop(Role.DOWN, None), parts.pop(Role.UP, None)
        if down is None or up is None:
            raise MissingTensorError(
                f"{where}: module {stem} needs lora_a and lora_b, it has one of them; the file is "
                "incomplete, save it again"
            )
        if len(down.shape) > 2:
            raise UnsupportedAdapterError(
                f"{where}: {down.name!r} is {list(down.shape)}: a stack of experts, which mlx-lm and "
                "checkpoints name and store in different ways; fuse the adapter with mlx_lm.fuse"
            )
        if not all(len(each.shape) == 2 and each.numel for each in (down, up)):
            raise ShapeMismatchError(
                f"{where}: {down.name!r} is {list(down.shape)}, {up.name!r} is {list(up.shape)}, "
                "expected matrices; save the adapter again with its parameters gathered"
            )
        a, b = (down.shape[::-1], up.shape[::-1]) if turned else (down.shape, up.shape)
        if a[0] != b[1]:
            raise ShapeMismatchError(
                f"{where}: the factors of {stem} do not fit: lora_a is {list(down.shape)}, lora_b is "
                f"{list(up.shape)}; copy or save the file again"
            )
        magnitude = parts.pop(Role.MAGNITUDE, None)
        if magnitude is not None and magnitude.shape not in {(b[0],), (a[1],)}:
            raise ShapeMismatchError(
                f"{where}: {magnitude.name!r} is {list(magnitude.shape)}, the module has {b[0]} "
                "outputs; copy or save the file again"
            )
        yield FormedModule(
            stem=stem,
            form=Form.LORA,
            parts={Role.DOWN: down, Role.UP: up},
            outer=b[0],
            columns=a[1],
            rank=a[0],
            alpha=scaling * a[0],
            scaling=scaling,
            magnitude=magnitude,
            settings={"turned": float(turned)},
        )
