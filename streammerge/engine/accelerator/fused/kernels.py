"""Kernels, from source to something that can be launched; each is compiled once per process.

Triton keeps what it has compiled on disk, and compiles again what has changed. Contraction to fused
multiply-adds is off, in its own compiler and in the assembler behind it: each operation rounds once.
"""

from __future__ import annotations

import linecache
import threading
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import triton
import triton.language as tl

from streammerge.engine.accelerator.fused import functions
from streammerge.engine.accelerator.fused.writing import Kind, write_kernel
from streammerge.lazily import torch

_LAUNCHING = threading.Lock()
"""Triton is not made to compile, or to interpret, in several threads at once."""


def launch(kernel: Any, instances: int, *arguments: Any, warps: int = 4) -> None:
    """Enqueue so many instances of a kernel on the current stream."""
    with _LAUNCHING:
        kernel[(instances,)](*arguments, num_warps=warps, enable_fp_fusion=False)


@cache
def kernel_of(kind: Kind) -> Any:
    """Return the kernel of a program, as a function of Triton's."""
    return compile_source(write_kernel(kind))


# Programs that differ in their numbers alone are one kernel.
@cache
def compile_source(source: str) -> Any:
    """Return the function ``merge`` of some source, which may call :mod:`functions`."""
    # Triton looks functions up by their file: the lines of this one are remembered for it.
    name = f"<streammerge kernel {zlib.crc32(source.encode()):08x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    # A name of its own keeps what others wrote from being found as its module's source.
    scope: dict[str, Any] = {"triton": triton, "tl": tl, "functions": functions, "__name__": name}
    exec(compile(source, name, "exec"), scope)  # noqa: S102 - written above, from a plan's program
    merge: Callable[..., None] = scope["merge"]
    return merge


def try_kernel(device: torch.device) -> str | None:
    """Compile and run a kernel with a fused multiply-add to be avoided; return what is wrong with it."""
    # 1 + 2**-12 squared has a term that float32 has no room for, and that only a fused sum would keep.
    values = torch.full((1,), 1 + 2**-12, device=device)
    launch(_multiply_and_subtract, 1, values)
    found = float(values)
    expected = 2**-11
    if found == expected:
        return None
    return f"a kernel of Triton's computes {found!r} where each operation rounds to {expected!r}"


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_and_subtract(values: tl.tensor) -> None:
    own = values + tl.arange(0, 1)
    value = tl.load(own)
    tl.store(own, value * value - 1.0)
