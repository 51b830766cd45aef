"""Several recipes in one file, of which later ones merge the results of earlier ones.

All of them are planned before the first one runs: a result that is still to come is there as files of the
right headers and sizes, with nothing in them. The results in between lie in ``OUT.stages`` beside the
output, each complete or resumable by itself, until the last one is done.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.checkpoint.finished import find_finished
from streammerge.checkpoint.manifest import Manifest, read_manifest
from streammerge.checkpoint.outputdir import check_place
from streammerge.checkpoint.types import Note, ShardFile
from streammerge.engine.progress import OnProgress
from streammerge.errors import (
    CheckpointError,
    OutputError,
    OutputExistsError,
    RecipeError,
    printable,
)
from streammerge.finishing import copy_companions
from streammerge.plan.layout import render_header, render_indexes
from streammerge.plan.types import MergePlan
from streammerge.recipe.grid import expand_grid
from streammerge.recipe.refusing import shown
from streammerge.recipe.text import load_documents
from streammerge.recipe.types import Recipe
from streammerge.run import merge, parse_document, plan, read_recipe_text
from streammerge.together import Grid, check_room

_NAME = re.compile(r"[\w-]{1,100}")
"""What a stage may be called: it becomes a directory, and must not look like a file."""
_MARK = "streammerge_chain.yaml"
"""The file in the directory of results in between that says what they are of."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One recipe of several."""

    name: str
    """What later ones call its result; the last one may have none, and is called ``result``."""
    recipe: Recipe
    """The recipe, in which earlier results stand by their names."""
    uses: tuple[str, ...]
    """The earlier stages whose results it merges."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The recipes of one file, in order; the last one's result is the output."""

    origin: Path
    """The file."""
    text: str
    """What it holds."""
    stages: tuple[Stage, ...]
    """At least two."""


def read_recipes(path: Path, *, download: bool) -> Recipe | Chain | Grid:
    """Return the recipe of a file, or all of them if there are several, or it has a grid.

    The file is read once: it may be a pipe.

    Args:
        path: The file.
        download: As for :func:`streammerge.run.plan`.

    Raises:
        RecipeError: The file cannot be read, or its recipes are not what they should be.
    """
    text = read_recipe_text(path)
    documents = load_documents(text, origin=str(path))
    while len(documents) > 1 and documents[-1] is None:
        # What a line of dashes at the end makes.
        documents.pop()
    if len(documents) < 2:
        document = documents[0] if documents else None
        expanded = expand_grid(document, origin=str(path))
        if expanded is not None:
            return Grid(
                tuple(
                    (name, parse_document(each, f"{path}: {name}", download=download))
                    for name, each in expanded
                )
            )
        return parse_document(document, str(path), download=download)
    return Chain(path, text, tuple(_stages(path, documents, download=download)))


def _stages(path: Path, documents: Sequence[object], *, download: bool) -> list[Stage]:
    stages: list[Stage] = []
    for index, document in enumerate(documents):
        where = f"{path}: document {index + 1} of {len(documents)}"
        if not isinstance(document, dict):
            raise RecipeError(
                f"{where}: expected a mapping of keys to values, got {shown(document)}"
            )
        is_last = index + 1 == len(documents)
        name = _name_of(document.get("name", "result" if is_last else None), where)
        known = [stage.name for stage in stages]
        if name in known:
            raise RecipeError(f"{where}: name: {shown(name)} is the name of an earlier recipe")
        text = {key: value for key, value in document.items() if key != "name"}
        recipe = parse_document(text, where, download=download, results=known)
        named = {str(each) for each in _models_of(recipe)}
        stages.append(Stage(name, recipe, tuple(each for each in known if each in named)))
    used = {each for stage in stages for each in stage.uses}
    unused = [stage.name for stage in stages[:-1] if stage.name not in used]
    if unused:
        raise RecipeError(
            f"{path}: no later recipe merges {', '.join(map(shown, unused))}; the results in between "
            "are removed in the end, so give a recipe of its own to what is to be kept"
        )
    return stages


def _name_of(name: object, where: str) -> str:
    """Return the name of a stage, which becomes that of a directory."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecipeError(
            f"{where}: name: expected a name by which a later recipe calls the result, of at most 100 "
            f"letters, digits and -_, got {shown(name)}"
        )
    if os.path.lexists(name):
        raise RecipeError(
            f"{where}: name: there is something here called {shown(name)}, which a recipe might mean as "
            "well; choose another name"
        )
    return name


def _models_of(recipe: Recipe) -> Iterator[Path]:
    if recipe.base is not None:
        yield recipe.base
    for source in recipe.sources:
        yield source.path
        if source.adapter is not None:
            yield source.adapter
    yield from (each for each in recipe.output.companions.values() if isinstance(each, Path))


def _with_results(recipe: Recipe, folders: Mapping[str, Path]) -> Recipe:
    """Return a recipe with the folders of earlier results in the place of their names."""

    def placed(path: Path) -> Path:
        return folders.get(str(path), path)

    sources = (
        replace(
            source,
            path=placed(source.path),
            adapter=None if source.adapter is None else placed(source.adapter),
        )
        for source in recipe.sources
    )
    base = None if recipe.base is None else placed(recipe.base)
    companions = {
        kind: placed(origin) if isinstance(origin, Path) else origin
        for kind, origin in recipe.output.companions.items()
    }
    output = replace(recipe.output, companions=companions)
    return replace(recipe, base=base, sources=tuple(sources), output=output)


def plan_chain(chain: Chain, **options: Any) -> list[MergePlan]:
    """Return the plans of all stages, the results in between as they will be.

    Args:
        chain: The recipes.
        options: What :func:`streammerge.run.plan` takes.

    Raises:
        StreamMergeError: As for :func:`streammerge.run.plan`; the message says which stage it is about.
    """
    plans = []
    with TemporaryDirectory(prefix="streammerge-") as directory:
        folders: dict[str, Path] = {}
        for stage in chain.stages:
            with _naming(stage):
                planned = plan(_with_results(stage.recipe, folders), **options)
                if not isinstance(planned, MergePlan):
                    raise RecipeError(
                        "makes an adapter of adapters, which takes seconds; give it a recipe of its own "
                        "and name what comes of it"
                    )
            names = {str(folder): name for name, folder in folders.items()}
            folders[stage.name] = Path(directory) / stage.name
            _foresee(planned, folders[stage.name])
            # What is foreseen is gone when this returns.
            models = tuple(
                replace(model, path=names.get(model.path, model.path)) for model in planned.models
            )
            plans.append(replace(planned, models=models))
    return plans


class _naming:  # noqa: N801 - a context manager, used like a function
    """Says which stage an error is about."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            error.add_note(f"in the recipe named {printable(self._stage.name)}")


def _foresee(planned: MergePlan, directory: Path) -> None:
    """Make what a merge will leave, but for the values of its tensors."""
    directory.mkdir()
    copy_companions(planned, directory)
    for index, shard in enumerate(planned.layout.shards):
        path = directory / shard.name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as stream:
            stream.write(render_header(planned, index))
            stream.truncate(shard.nbytes)
    for name, content in render_indexes(planned).items():
        (directory / name).write_bytes(content)


def merge_chain(
    chain: Chain,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    byte_source: ByteSourceKind | str = ByteSourceKind.PREAD,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Manifest:
    """Merge all stages one after the other; the last one's result is ``out``.

    Args:
        chain: The recipes.
        out: As for :func:`streammerge.run.merge`.
        resume: Whether to go on where an earlier run stopped.
        overwrite: Whether what an earlier run left may be replaced.
        byte_source: As for :func:`streammerge.run.merge`.
        on_progress: Told how far each stage is.
        options: What :func:`streammerge.run.plan` takes.

    Raises:
        StreamMergeError: As for :func:`streammerge.run.merge`; what is done stays for a resume.
    """
    # Neither links nor dots: the results in between lie beside it.
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at OUT
    between = out.with_name(f"{out.name}.stages") if out.name else out
    plans = plan_chain(chain, **options)
    inputs = [file for planned in plans for file in planned.files if file.path.exists()]
    identity = _identify(chain, inputs)
    done = _find_done(out, identity) if resume else None
    if done is not None:
        _clear(between)
        return done
    check_place(out, _places(plans, inputs), overwrite=overwrite)
    check_place(between, _places(plans, inputs), overwrite=True, look=False)
    _open_stages(chain, between, resume=resume, overwrite=overwrite)
    folders = {stage.name: between / stage.name for stage in chain.stages[:-1]}
    results = [*folders.values(), out]
    # A result in between that is there is complete.
    missing = [index for index, each in enumerate(results) if each is out or not each.is_dir()]
    check_room([plans[index] for index in missing], [results[index] for index in missing])
    for stage in chain.stages:
        last = stage is chain.stages[-1]
        with _naming(stage):
            planned = plan(_with_results(stage.recipe, folders), **options)
            assert isinstance(planned, MergePlan)  # noqa: S101 - planned before
            if last:
                planned = replace(planned, notes=(*planned.notes, *_notes(chain, identity)))
            manifest = merge(
                planned,
                out if last else folders[stage.name],
                # Stages that are done are found to be.
                resume=resume or not last,
                overwrite=overwrite and last,
                byte_source=byte_source,
                on_progress=on_progress,
            )
    _clear(between)
    return manifest


def _places(plans: Sequence[MergePlan], inputs: Sequence[ShardFile]) -> list[Path]:
    """Return what is read and no result: models that are there, and their files."""
    models = (Path(model.path) for planned in plans for model in planned.models)
    return [*(path for path in models if path.exists()), *(file.path for file in inputs)]


def _identify(chain: Chain, inputs: Sequence[ShardFile]) -> str:
    """Return a digest of the recipes and of all files that are no results of them."""
    digest = hashlib.sha256(chain.text.encode())
    for file in inputs:
        what = f"{file.path} {file.nbytes} {file.mtime_ns} {file.header_digest}\n"
        digest.update(what.encode(errors="backslashreplace"))
    return digest.hexdigest()


def _notes(chain: Chain, identity: str) -> Iterator[Note]:
    """Yield what the last result's manifest says of those before, which are gone."""
    for stage in chain.stages[:-1]:
        text = f"{stage.name} is {stage.recipe.method} of an earlier recipe, removed"
        yield Note("chain", text)
    yield Note("chain", f"recipes and inputs: SHA-256 {identity}")


def _find_done(out: Path, identity: str) -> Manifest | None:
    """Return the manifest of a result of these very recipes and inputs; None if there is none."""
    try:
        document = read_manifest(out)
    except (CheckpointError, OSError):
        return None
    notes, run = document.get("notes"), document.get("run")
    said = isinstance(notes, list) and any(
        isinstance(note, dict) and str(note.get("text", "")).endswith(identity) for note in notes
    )
    if not said or not isinstance(run, dict):
        return None
    # Its inputs are gone, and were made of those that the note is about.
    return find_finished(out, identity=str(run.get("identity")), shards={}, inputs=())


def _open_stages(chain: Chain, between: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the directory of results in between, or go on with that of an earlier run."""
    if os.path.lexists(between) and not _is_ours(between):
        raise OutputExistsError(
            f"{between}: is there and holds no results of recipes; remove it, or name another output"
        )
    mark = between / _MARK
    if mark.is_file():
        if overwrite:
            _clear(between)
        elif not resume:
            raise OutputExistsError(
                f"{between}: holds results of an earlier run; --resume goes on with it, --overwrite "
                "begins anew"
            )
        elif mark.read_bytes() != chain.text.encode():
            raise OutputExistsError(
                f"{between}: holds results of other recipes than {chain.origin} has now; --overwrite "
                "begins anew"
            )
        else:
            return
    try:
        between.mkdir(exist_ok=True)
        mark.write_bytes(chain.text.encode())
    except OSError as error:
        raise OutputError(f"{between}: cannot be made: {error.strerror}") from error


def _is_ours(between: Path) -> bool:
    """Return whether a directory has our mark, or is empty: the mark is made first and goes last."""
    if between.is_symlink() or not between.is_dir():
        return False
    return (between / _MARK).is_file() or not any(between.iterdir())


def _clear(between: Path) -> None:
    """Remove results in between, the mark last, so that what is left is known for what it is."""
    if not between.is_dir() or not _is_ours(between):
        return
    for entry in between.iterdir():
        if entry.name == _MARK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (between / _MARK).unlink(missing_ok=True)
    between.rmdir()
