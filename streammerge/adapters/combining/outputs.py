"""Names and places of the tensors of a combined adapter's file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from streammerge.adapters.combining.plans import ModuleTask, OutputTensor, Task
from streammerge.adapters.files.naming import PEFT_PREFIX
from streammerge.adapters.files.types import LayerKind, Naming

FILE_NAMES = {
    Naming.PEFT: "adapter_model.safetensors",
    Naming.MLX: "adapters.safetensors",
    Naming.TORCHTUNE: "adapter_model.safetensors",
    Naming.DIFFUSERS: "pytorch_lora_weights.safetensors",
    Naming.KOHYA: "lora.safetensors",
}
"""What each dialect calls the file with the tensors."""
_HEADER_ALIGNMENT = 8
"""The data section starts at a multiple of this many bytes, as the format recommends."""


def lay_out(tasks: Sequence[Task]) -> tuple[tuple[Task, ...], bytes]:
    """Return the tasks with offsets, and the header of the file.

    Wider element types come first, as the safetensors library stores them.
    """
    placed, header = place_tensors([tensor for task in tasks for tensor in task.outputs])
    return tuple(_placed(task, placed) for task in tasks), header


def place_tensors(outputs: Iterable[OutputTensor]) -> tuple[dict[str, OutputTensor], bytes]:
    """Return tensors with offsets by their names, and the header of the file that they fill."""
    ordered = sorted(outputs, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header = _render_header(ordered)
    placed: dict[str, OutputTensor] = {}
    offset = len(header)
    for tensor in ordered:
        placed[tensor.name] = dataclasses.replace(tensor, offset=offset)
        offset += tensor.nbytes
    return placed, header


def factor_names(naming: Naming, stem: str, layer: LayerKind) -> dict[str, str]:
    """Return the names of a module's tensors as the file spells them."""
    if naming is Naming.KOHYA:
        return {
            "down": f"{stem}.lora_down.weight",
            "up": f"{stem}.lora_up.weight",
            "bias": f"{stem}.lora_up.bias",
            "alpha": f"{stem}.alpha",
        }
    path = f"{PEFT_PREFIX if naming is Naming.PEFT else ''}{stem}"
    if layer is LayerKind.EMBEDDING:
        return {"down": f"{path}.lora_embedding_A", "up": f"{path}.lora_embedding_B"}
    return {
        "down": f"{path}.lora_A.weight",
        "up": f"{path}.lora_B.weight",
        "bias": f"{path}.lora_B.bias",
    }


def _placed(task: Task, placed: Mapping[str, OutputTensor]) -> Task:
    if not isinstance(task, ModuleTask):
        return dataclasses.replace(task, output=placed[task.output.name])
    return dataclasses.replace(
        task,
        down=placed[task.down.name],
        up=placed[task.up.name],
        bias=None if task.bias is None else placed[task.bias.name],
        alpha=None if task.alpha is None else placed[task.alpha.name],
    )


def _render_header(tensors: Sequence[OutputTensor]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        fields[tensor.name] = {
            "dtype": tensor.dtype.value,
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
