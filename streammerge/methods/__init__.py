"""The mathematics of pass 2: one file per method, found by name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streammerge.methods.base import MergeMethod


@cache
def discover_methods() -> Mapping[str, MergeMethod]:
    """Return every method that a module of this package declares in ``METHODS``, by name.

    Raises:
        ValueError: Two modules declare the same name.
    """
    found: dict[str, MergeMethod] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for method in getattr(module, "METHODS", ()):
            if method.name in found:
                raise ValueError(f"two methods are called {method.name}")
            found[method.name] = method
    return MappingProxyType(dict(sorted(found.items())))
