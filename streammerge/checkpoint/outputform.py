"""What an output consists of: a directory, or one file with its manifest and recipe beside it.

    merged/                    every file, and streammerge_manifest.json
    merged.safetensors         the tensors; merged.manifest.json and merged.recipe.yaml lie beside it

Which it is follows from the name alone, so that a command means the same before and after it ran.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MANIFEST_NAME = "streammerge_manifest.json"
RECIPE_NAME = "streammerge_recipe.yaml"
CARD_NAME = "README.md"
REPORT_NAMES = ("streammerge_report.json", "streammerge_report.html")
_ONE_FILE = ".safetensors"


@dataclass(frozen=True, slots=True)
class OutputForm:
    """Where the entries of one output lie in the end, and what they are called."""

    out: Path
    """What the user named."""
    folder: Path
    """The directory that the entries lie in: ``out`` itself, or the one that holds the file."""
    manifest: str
    """Name of the manifest."""
    recipe: str
    """Name of the recipe."""
    card: str | None
    """Name of the model card; None without one."""
    file: str | None
    """Name of the one file with tensors; None for a directory."""
    reports: tuple[str, str]
    """Names of a report as data and as a page, where one is made."""

    @property
    def manifest_path(self) -> Path:
        """The manifest."""
        return self.folder / self.manifest

    @property
    def last(self) -> str:
        """The entry that is moved last: where it is, all others are."""
        return self.manifest if self.file is None else self.file

    @property
    def entries(self) -> tuple[str, ...] | None:
        """The only names that belong to the output; None for a directory, where all do."""
        return None if self.file is None else (self.file, self.manifest, self.recipe, *self.reports)


def form_of(out: Path) -> OutputForm:
    """Return the form that a merge into ``out`` makes: one file if its name says so."""
    if out.suffix != _ONE_FILE:
        return OutputForm(out, out, MANIFEST_NAME, RECIPE_NAME, CARD_NAME, None, REPORT_NAMES)
    return OutputForm(
        out,
        out.parent,
        f"{out.stem}.manifest.json",
        f"{out.stem}.recipe.yaml",
        None,
        out.name,
        (f"{out.stem}.report.json", f"{out.stem}.report.html"),
    )


def found_form(out: Path) -> OutputForm:
    """Return the form of what lies at ``out``: a directory may have any name."""
    if out.suffix == _ONE_FILE and out.is_dir():
        return OutputForm(out, out, MANIFEST_NAME, RECIPE_NAME, CARD_NAME, None, REPORT_NAMES)
    return form_of(out)
