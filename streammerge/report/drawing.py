"""The script that draws a page's charts: Vega, Vega-Lite and what puts them into a page, as one text.

The library that has it puts it together anew each time, with an engine for JavaScript, which takes three
seconds and more memory than some merges. So that is done once for each version, by a process of its
own, and kept in the user's cache.

Memory: the script, 0.9 MB.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from streammerge.errors import DependencyError, OutputError

_DISTRIBUTION = "vl-convert-python"
_MAKING = (
    "import sys, vl_convert; "
    "sys.stdout.buffer.write(vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;').encode())"
)
_SECONDS = 300.0
"""Until the other process is given up; it takes three on one core."""


def check_drawing() -> None:
    """Return if pages can be drawn here; what that takes is then there.

    Raises:
        DependencyError: The library is not installed.
        OutputError: It is, and does not work.
    """
    load_script()


def load_script() -> str:
    """Return the script.

    Raises:
        DependencyError: The library is not installed.
        OutputError: It is, and does not work.
    """
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise DependencyError(
            "report: pages are drawn with Vega, which is not installed: pip install 'streammerge[report]'; "
            "`streammerge analyze --json` tells the numbers without it"
        ) from None
    kept = _cache() / f"vega-{version}.js"
    # A cache that cannot be read is none.
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    script = _make_script()
    with contextlib.suppress(OSError):
        _keep(kept, script)
    return script.decode()


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The standard has relative paths ignored.
    root = Path(given) if Path(given).is_absolute() else Path("~/.cache").expanduser()
    return root / "streammerge"


def _make_script() -> bytes:
    try:
        made = subprocess.run(  # noqa: S603 - this interpreter, and words that stand above
            [sys.executable, "-c", _MAKING],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OutputError(f"report: {_DISTRIBUTION} could not be run: {error}") from error
    if made.returncode or not made.stdout:
        words = made.stderr.decode(errors="replace").strip().splitlines()
        raise OutputError(
            f"report: {_DISTRIBUTION} could not put its script together (exit code {made.returncode}): "
            f"{words[-1] if words else 'it said nothing'}; install it anew, or leave the report out"
        )
    return made.stdout


def _keep(path: Path, script: bytes) -> None:
    """Write a file of the cache, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(script)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
