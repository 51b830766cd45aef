"""torch, imported when something is first taken from it.

Importing torch takes a second and 200 MiB, and most merges never need it: compiled kernels do all
that there is to do in the usual types. So modules take torch from here, and name its types only
where they are checked::

    from streammerge.lazily import torch

    if TYPE_CHECKING:
        from torch import Tensor
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any

from streammerge.errors import DependencyError
from streammerge.limits import name_limit

if TYPE_CHECKING:
    import torch as torch  # noqa: PLC0414 - so a type checker lets others take it from here
else:

    class _Lazily:
        """Stands for torch; what is taken from it is taken from torch, and kept."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(_import_torch(), name)
            setattr(self, name, value)
            return value

    torch = _Lazily()


def load_torch() -> None:
    """Import torch now, so that what it takes of memory can be seen.

    Raises:
        DependencyError: It cannot be imported.
    """
    _import_torch()


def _import_torch() -> ModuleType:
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError, MemoryError) as error:
        what = (
            "is not installed: pip install torch"
            if isinstance(error, ModuleNotFoundError) and error.name == "torch"
            else f"cannot be imported: {error}; install it again"
        )
        raise name_limit(error) or DependencyError(f"that needs torch, which {what}") from error


@functools.cache
def torch_version() -> str:
    """Return the version of the torch that is installed, which need not be loaded; ``none`` without."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("torch") is None:
            return "none"
        # On the path, but installed by something that leaves no record.
        return str(torch.__version__)
