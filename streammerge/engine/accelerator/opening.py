"""Which devices a merge runs on: from what the user wrote to devices that are open.

``cpu``; ``cuda`` or ``cuda:N``; several, ``cuda:0,cuda:1``, share the work. ``auto`` is the CPU, too, unless a
plan finds that :func:`find_candidate` does the same work in less time (:mod:`streammerge.probing.deciding`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from streammerge.engine.accelerator import driver
from streammerge.engine.accelerator.backend import Backend, lost
from streammerge.engine.accelerator.cuda import CudaBackend
from streammerge.errors import DeviceError
from streammerge.lazily import torch, torch_version

AUTO = "auto"
"""Leaves the device to the plan's own estimate."""
_CUDA = re.compile(r"cuda(?::([0-9]{1,4}))?\Z")


def choose_devices(wanted: object) -> tuple[str, ...]:
    """Return the names of the accelerators that ``wanted`` means; none for the CPU, and for ``auto``.

    Raises:
        DeviceError: It means nothing, or a device that is not there.
    """
    if not isinstance(wanted, str):
        raise DeviceError(f"device: expected a name such as cpu or cuda:0, got {wanted!r}")
    if wanted in (AUTO, "cpu"):
        return ()
    indices = [_parse(word, wanted) for word in wanted.split(",")]
    if len(set(indices)) < len(indices):
        raise DeviceError(f"device: {wanted!r} names a device twice; name each once")
    count = count_devices()
    if count == 0:
        raise DeviceError(f"device: {wanted!r}, but {why_none()}; use --device cpu")
    missing = [index for index in indices if index >= count]
    if missing:
        raise DeviceError(
            f"device: there is no cuda:{missing[0]}, only cuda:0 to cuda:{count - 1}"
            if count > 1
            else f"device: there is no cuda:{missing[0]}, only cuda:0"
        )
    return tuple(f"cuda:{index}" for index in indices)


def named_devices(wanted: str | None) -> str:
    """Return what is wanted, with the CPU for ``auto`` and None: for work that makes no estimate."""
    return "cpu" if wanted is None or wanted == AUTO else wanted


def find_candidate() -> str | None:
    """Return the device that a plan may take of its own accord; None where there is none.

    Asks the driver, and does not import torch. The first device alone: a merge that one does not bring to the
    speed of the disk is rare.
    """
    if not driver.count_driver_devices() or why_no_cuda() is not None:
        return None
    return "cuda:0"


def why_no_cuda() -> str | None:
    """Return why the torch that is installed can use no CUDA device, as far as its version tells."""
    version = torch_version()
    if version == "none":
        return "torch is not installed"
    return f"this build of torch ({version}) has no CUDA" if version.endswith("+cpu") else None


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


def why_none() -> str:
    """Return why torch, which is imported, has no CUDA device."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this build of torch ({torch.__version__}) has no CUDA"
    return "torch finds no CUDA device here"
