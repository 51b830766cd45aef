"""Which devices a merge runs on: from what the user wrote to devices that are open.

``auto`` is the CPU: exactness comes first, and no device has yet shown that it has the CPU's bits.
``cpu``; ``cuda`` or ``cuda:N``; several, ``cuda:0,cuda:1``, share the work.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from streammerge.engine.accelerator.backend import Backend, lost
from streammerge.engine.accelerator.cuda import CudaBackend
from streammerge.errors import DeviceError
from streammerge.lazily import torch

_CUDA = re.compile(r"cuda(?::([0-9]{1,4}))?\Z")


def choose_devices(wanted: object) -> tuple[str, ...]:
    """Return the names of the accelerators that ``wanted`` means; none for the CPU.

    Raises:
        DeviceError: It means nothing, or a device that is not there.
    """
    if not isinstance(wanted, str):
        raise DeviceError(f"device: expected a name such as cpu or cuda:0, got {wanted!r}")
    if wanted in ("auto", "cpu"):
        return ()
    indices = [_parse(word, wanted) for word in wanted.split(",")]
    if len(set(indices)) < len(indices):
        raise DeviceError(f"device: {wanted!r} names a device twice; name each once")
    count = count_devices()
    if count == 0:
        raise DeviceError(f"device: {wanted!r}, but {_why_none()}; use --device cpu")
    missing = [index for index in indices if index >= count]
    if missing:
        raise DeviceError(
            f"device: there is no cuda:{missing[0]}, only cuda:0 to cuda:{count - 1}"
            if count > 1
            else f"device: there is no cuda:{missing[0]}, only cuda:0"
        )
    return tuple(f"cuda:{index}" for index in indices)


def count_devices() -> int:
    """Return the number of CUDA devices that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def open_devices(names: Sequence[str]) -> list[Backend]:
    """Open devices that :func:`choose_devices` returned, or that a plan names.

    Raises:
        DeviceError: One is not there; a plan may come from another machine.
        DeviceLostError: One does not answer.
    """
    opened: list[Backend] = []
    for name in names:
        choose_devices(name)
        try:
            opened.append(CudaBackend(int(name.partition(":")[2])))
        except RuntimeError as error:
            raise lost(name, error) from error
    return opened


def _parse(word: str, wanted: str) -> int:
    match = _CUDA.match(word)
    if match is None:
        raise DeviceError(
            f'device: expected "auto", "cpu", "cuda:0" or several such as "cuda:0,cuda:1", got '
            f"{wanted!r}"
        )
    return int(match[1] or 0)


def _why_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this build of torch ({torch.__version__}) has no CUDA"
    return "torch finds no CUDA device here"
