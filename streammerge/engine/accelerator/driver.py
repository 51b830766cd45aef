"""Whether there is a CUDA driver with a device, without torch, whose import takes a second and 185 MiB."""

from __future__ import annotations

import ctypes
import os
import sys

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""What the driver comes with, whatever else of CUDA is installed."""
_PLACES = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/nvhost-ctrl")
"""Of which Linux has one where the driver's part of the kernel is loaded: the driver's own, also in a container, of
Windows' subsystem, and of Tegra. The library alone may be there without."""


def count_driver_devices() -> int:
    """Return how many devices the CUDA driver has for this process; 0 without a driver."""
    if sys.platform == "linux" and not any(map(os.path.exists, _PLACES)):
        return 0
    if sys.platform == "darwin":
        return 0
    try:
        driver = ctypes.CDLL(_LIBRARY)
        count = ctypes.c_int(0)
        # Each returns 0 for success, and makes no context, which would take memory.
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else max(count.value, 0)
