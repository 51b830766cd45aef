"""Compiles the kernels, where there is a compiler; all else about the package is in pyproject.toml.

They use nothing of Python, so one library serves every version of it: it has no version in its name,
and a wheel that holds it is for any Python 3 on its platform.
"""

from __future__ import annotations

import os
import shutil

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """Compiles a library that is loaded with ctypes, and is no module."""

    def finalize_options(self) -> None:
        """Take GCC on Windows, too: what the sources say to it, Microsoft's compiler does not know."""
        super().finalize_options()
        if os.name == "nt" and self.compiler is None and shutil.which("gcc"):
            self.compiler = "mingw32"

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path, without the version of Python."""
        return os.path.join(*fullname.split(".")) + (".pyd" if os.name == "nt" else ".so")  # noqa: PTH118

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return no function that starts a module."""
        return list(ext.export_symbols)

    def get_libraries(self, ext: Extension) -> list[str]:
        """Return no library of Python's."""
        return list(ext.libraries)


class BuildWheel(bdist_wheel):
    """Makes a wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the versions of Python and of its interface, and the platform."""
        *_, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_ext": BuildKernels, "bdist_wheel": BuildWheel})
