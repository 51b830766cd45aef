"""Plan and merge: the only place that wires recipe, planner, engine and output together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.adapters.combining.planning import plan_combination
from streammerge.adapters.combining.plans import CombinationPlan
from streammerge.adapters.combining.recipes import is_combination, methods_for, read_adapters
from streammerge.assignment.mixtures import settle_mixture
from streammerge.assignment.tokens import match_tokens
from streammerge.checkpoint.bytesource import (
    ByteSourceKind,
    choose_byte_source,
)
from streammerge.checkpoint.finished import find_finished
from streammerge.checkpoint.inputs import parse_path
from streammerge.checkpoint.manifest import Manifest, digest_identity
from streammerge.checkpoint.outputform import form_of
from streammerge.checkpoint.storedoutputs import list_output
from streammerge.checkpoint.types import Checkpoint
from streammerge.collecting import without_collecting
from streammerge.companions.choosing import accompany
from streammerge.comparing import Comparison, Sample, check_sample
from streammerge.engine.accelerator import opening
from streammerge.engine.accelerator.combining import free_for, share_devices
from streammerge.engine.accelerator.opening import AUTO, choose_devices, named_devices
from streammerge.engine.progress import OnProgress
from streammerge.engine.shelter import run_sheltered
from streammerge.errors import CheckpointError, RecipeError
from streammerge.finishing import recipe_of
from streammerge.identity import identify
from streammerge.limits import naming_limits
from streammerge.machine import (
    check_planning_room,
    choose_budget,
    choose_device_budget,
    describe_machine,
    measure_baseline,
)
from streammerge.merging import MergeJob, SampleJob
from streammerge.methods import discover_methods
from streammerge.plan.asking import find_method, takes_in_turn, with_base_layers
from streammerge.plan.checking import check_runnable
from streammerge.plan.fusing import Earlier
from streammerge.plan.layout import in_one_file
from streammerge.plan.participants import labels_of
from streammerge.plan.partners import settle_parts
from streammerge.plan.planning import plan_merge
from streammerge.plan.types import MergePlan
from streammerge.probing.deciding import decide
from streammerge.recipe.dumping import dump_recipe
from streammerge.recipe.grid import GRID_KEY
from streammerge.recipe.parsing import native_document, recipe_from_mapping
from streammerge.recipe.resolving import build_resolver
from streammerge.recipe.text import MAX_TEXT_BYTES, load_documents
from streammerge.recipe.types import Recipe
from streammerge.sources import download_sources, locate_models, read_models
from streammerge.storage.targets import load_target
from streammerge.storage.urls import url_of
from streammerge.storing.whole import find_stored, store_job

_CONFIGURATION = frozenset({"architectures", "model_type"})
"""Keys of a model's ``config.json``, and of no recipe."""
RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""A recipe file, its parsed document, or a parsed recipe."""


@naming_limits()
def plan(
    recipe: RecipeLike,
    *,
    memory: int | str | None = None,
    workers: int | None = None,
    device: str = "auto",
    device_memory: int | str | None = None,
    download: bool = False,
    at_once: int = 1,
    earlier: Sequence[Earlier] = (),
    report: bool = False,
) -> MergePlan | CombinationPlan:
    """Return what a merge would do, having read headers only; a little more where a device may be taken.

    Sources that are all adapters, without a base, make an adapter; the plan is then another kind.

    Args:
        recipe: A recipe file, its document, or a parsed recipe.
        memory: Most private memory the process may use, in bytes or as ``"2GiB"``; None takes a
            quarter of what is available.
        workers: Compute threads; None takes one per core, or three per accelerator.
        device: Where tensors are merged: ``"cpu"``, ``"cuda:0"``, several as ``"cuda:0,cuda:1"``,
            or ``"auto"``: the CPU, unless a CUDA device is there and an estimate says that the
            merge takes a fifth less time on it, with the same bits.
        device_memory: Most memory of each accelerator; None takes what is useful and free.
        download: Whether models that the recipe names as ``org/model[@revision]`` are fetched from
            the Hugging Face hub, where its cache on this machine has them not.
        at_once: Merges that share memory and workers, as in :mod:`streammerge.together`.
        earlier: Recipes whose results are sources, and are computed where they are read, as in
            :mod:`streammerge.chaining`.
        report: Whether the merge finds what a report tells, which it then writes.

    Raises:
        RecipeError: The recipe asks for something that cannot be.
        DeviceError: The device is not there.
        CheckpointError: An input is not what it should be, or the inputs do not belong together.
        MemoryBudgetError: The job does not fit the budget.
    """
    names = choose_devices(device)
    candidate = opening.find_candidate() if device == AUTO else None
    device_budget = choose_device_budget(
        names if candidate is None else (candidate,), device_memory
    )
    asked = load_recipe(recipe, download=download)
    if asked.base_adapter is not None:
        said = (
            f"base.adapter: the base is made first, of {asked.base} and {asked.base_adapter}; `streammerge "
            "merge RECIPE OUT` does both, by a file of this recipe alone; here, name a base that is made"
        )
        raise RecipeError(asked.in_its_words(said))
    try:
        with without_collecting():
            return _plan(
                asked,
                names,
                candidate,
                device_budget,
                memory=memory,
                workers=workers,
                download=download,
                at_once=at_once,
                earlier=earlier,
                report=report,
            )
    except (RecipeError, CheckpointError) as error:
        # Messages are about this tool's keys; those of another tool's recipe are called otherwise.
        error.args = ("\n".join(map(asked.in_its_words, str(error).split("\n"))),)
        raise


def _plan(
    asked: Recipe,
    names: Sequence[str],
    candidate: str | None,
    device_budget: int | None,
    *,
    memory: int | str | None,
    workers: int | None,
    download: bool,
    at_once: int,
    earlier: Sequence[Earlier],
    report: bool,
) -> MergePlan | CombinationPlan:
    parsed = locate_models(asked, download=download)
    _check_planning_room(parsed, memory)
    if is_combination(parsed):
        if report:
            raise RecipeError(
                "report: tells of tensors that are merged element by element, and this recipe combines "
                "adapters without a base; add `base: PATH`, or leave the report out"
            )
        free = free_for(parsed.method, names)
        combination = plan_combination(
            parsed,
            read_adapters(parsed),
            budget=choose_budget(memory),
            baseline=measure_baseline(torch=True),
        )
        combination = share_devices(combination, names, budget=device_budget, free=free)
        return replace(combination, recipe=dump_recipe(asked))
    # Before the files are opened: a method that does not exist is a matter of the recipe.
    shares_ties = takes_in_turn(parsed, find_method(parsed.method))
    read = read_models(parsed, shares_ties=shares_ties)
    if read.first.parts:
        full = [source for source in read.sources if isinstance(source, Checkpoint)]
        specs = find_method(parsed.method).parameters
        parsed = settle_parts(parsed, read.first, full, build_resolver(parsed, specs))
    parsed = with_base_layers(parsed, find_method(parsed.method))
    parsed = settle_mixture(parsed, read.base)
    tokens = match_tokens(parsed, read.models, labels_of(parsed))

    def plan_for(devices: Sequence[str], *, beside: int = 0) -> MergePlan:
        machine = describe_machine(
            memory=memory,
            workers=workers,
            devices=devices,
            device_budget=device_budget,
            at_once=at_once,
            from_store=any(
                each.remote is not None for model in read.models for each in model.files
            ),
            beside=beside,
        )
        return plan_merge(
            parsed, read.base, read.sources, machine, tokens, earlier=earlier, survey=report
        )

    planned = plan_for(names)
    if candidate is not None:
        planned = decide(planned, candidate, plan_for, at_once=at_once)
    return replace(
        accompany(planned, parsed, read.models, tokens),
        # As it was given: another machine has its cache elsewhere.
        recipe=dump_recipe(replace(asked, rules=parsed.rules, mixture=parsed.mixture)),
        metadata_left_out=read.metadata_left_out,
    )


@naming_limits()
def merge(
    recipe: RecipeLike | MergePlan | CombinationPlan,
    out: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    workers: int | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
    download: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    report: bool = False,
    byte_source: ByteSourceKind | str = ByteSourceKind.PREAD,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Merge into the directory ``out``, which exists when this returns and not before.

    Until then the work lies in ``out.partial``. It stays there when the merge is interrupted or
    fails, and ``resume`` continues it. If ``out`` is called ``.safetensors`` it becomes one file, with
    its manifest and recipe beside it, and with the same guarantees.

    Args:
        recipe: What :func:`plan` takes, or its result; a plan brings its own memory, workers and
            device.
        out: The directory to make, or the file; or a folder in a store, ``s3://bucket/folder``, where the
            result counts as complete when its manifest is there.
        memory: As for :func:`plan`.
        workers: As for :func:`plan`.
        device: As for :func:`plan`; None is ``"auto"``.
        device_memory: As for :func:`plan`.
        download: As for :func:`plan`.
        overwrite: Whether an earlier merge in ``out``, or an unfinished one beside it, may be
            replaced.
        resume: Whether to continue an unfinished merge, if there is one; if this very merge is
            complete already, nothing is left to do.
        report: Whether ``streammerge_report.json`` and ``.html`` are written, too; a plan says so itself.
        byte_source: How input files are read: ``"pread"``, or ``"mmap"``, which maps them only where
            compiled kernels guard it.
        on_progress: Told several times per second how far the work is.

    Returns:
        What is also written to ``out/streammerge_manifest.json``, or ``out.manifest.json``.

    Raises:
        StreamMergeError: One of the errors that :mod:`streammerge.errors` lists; ``out`` is then
            as it was before.
    """
    out = parse_path(out, "out")
    url = load_target(out)
    kind = _parse_byte_source(byte_source)
    if isinstance(recipe, MergePlan | CombinationPlan):
        if report and not (isinstance(recipe, MergePlan) and recipe.survey):
            raise ValueError("the plan was made without a report; give plan() report=True")
        if any(each is not None for each in (memory, workers, device, device_memory)):
            raise ValueError("a plan already says what memory, workers and device it takes")
        planned = recipe
    else:
        planned = plan(
            recipe,
            memory=memory,
            workers=workers,
            device=device or "auto",
            device_memory=device_memory,
            download=download,
            report=report,
        )
    if isinstance(planned, MergePlan):
        check_runnable(planned)
    if overwrite and resume:
        raise ValueError("resume continues an unfinished merge, overwrite discards it; choose one")
    if url is None:
        planned = as_output(planned, out)
    finished = find_complete(planned, out) if resume else None
    if finished is not None:
        return finished
    job = MergeJob(
        planned,
        out,
        overwrite=overwrite,
        resume=resume,
        opener=choose_byte_source(kind),
        open_files=kind.open_files,
    )
    work = job.run if url is None else store_job(job, url)
    return run_sheltered(work, on_progress or (lambda _: None))


def as_output(planned: MergePlan | CombinationPlan, out: Path) -> MergePlan | CombinationPlan:
    """Return the plan with the files that ``out`` asks for: its own, or one file of that name.

    Raises:
        RecipeError: The recipe asks for more than one file holds.
    """
    name = form_of(out).file
    if name is None:
        return planned
    if isinstance(planned, MergePlan):
        spec = recipe_of(planned).output
        if spec.companions:
            raise RecipeError(
                f"output.companions: {out} is one file, with nothing but its manifest and recipe beside "
                "it; leave the key out, or name a directory as the output"
            )
        return in_one_file(planned, name, spec.max_shard_bytes)
    if planned.config is not None:
        raise RecipeError(
            f"{out}: is one file, and a PEFT adapter is a directory with adapter_config.json; name a "
            "directory as the output"
        )
    return replace(planned, file_name=name)


def _parse_byte_source(byte_source: ByteSourceKind | str) -> ByteSourceKind:
    if byte_source not in list(ByteSourceKind):
        raise ValueError(f"byte_source: expected pread or mmap, got {byte_source!r}")
    return ByteSourceKind(byte_source)


def find_complete(
    planned: MergePlan | CombinationPlan, out: str | os.PathLike[str]
) -> Manifest | None:
    """Return the manifest in ``out`` if that is the complete result of this very merge; else None.

    That is what a merge leaves that was killed after its last rename, for ``resume`` to find.
    """
    url = url_of(Path(out))
    if url is not None:
        return find_stored(planned, url) if isinstance(planned, MergePlan) else None
    # Who asks from the beginning, as scripts do, need not wait for what identifies 50,000 tensors.
    # Unlike pathlib, this has an answer for any name.
    form = form_of(Path(out))
    if not os.path.isfile(form.manifest_path):  # noqa: PTH113 - odd names are no files
        return None
    planned = as_output(planned, form.out)
    if isinstance(planned, CombinationPlan):
        shards = {planned.file_name: planned.bytes_to_write}
    else:
        shards = {shard.name: shard.nbytes for shard in planned.layout.shards}
    return find_finished(
        Path(out),
        identity=digest_identity(identify(planned)),
        shards=shards,
        inputs=planned.files,
    )


@naming_limits()
def verify_against(
    recipe: RecipeLike,
    out: str | os.PathLike[str],
    *,
    fraction: float = 0.05,
    seed: int | None = None,
    memory: int | str | None = None,
    device: str = "auto",
    download: bool = False,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Merge a random sample of a model again and compare it, bit by bit, with what is in ``out``.

    Statistics that the sampled tensors need are found anew, over all of their elements.

    Args:
        recipe: What ``out`` should be the result of; as for :func:`plan`.
        out: The merged model; a directory, a file, or an address in a store.
        fraction: How many of the blocks are merged again, in (0, 1].
        seed: Chooses the sample; None takes another one each time.
        memory: As for :func:`plan`.
        device: As for :func:`plan`, but ``"auto"`` is the CPU.
        download: As for :func:`plan`.
        on_progress: Told several times per second how far the work is.

    Raises:
        StreamMergeError: As for :func:`plan`; and OutputError where the files in ``out`` are not
            laid out as the recipe says.
    """
    directory = parse_path(out, "out")
    check_sample(fraction=fraction, seed=seed)
    planned = plan(recipe, memory=memory, device=named_devices(device), download=download)
    url = url_of(directory)
    if url is None:
        planned = as_output(planned, directory)
    if isinstance(planned, CombinationPlan):
        raise RecipeError(
            "the recipe combines adapters, which takes seconds; combine them again into another "
            "directory and compare the files"
        )
    job = SampleJob(
        planned,
        form_of(directory).folder,
        objects={} if url is None else {each.name: each.object for each in list_output(url)},
        sample=Sample(planned, fraction=fraction, seed=seed),
        opener=choose_byte_source(ByteSourceKind.PREAD),
    )
    return run_sheltered(job.run, on_progress or (lambda _: None))


def load_recipe(recipe: RecipeLike, *, download: bool = False) -> Recipe:
    """Return a parsed and checked recipe.

    Args:
        recipe: A recipe file, its document, or a parsed recipe.
        download: As for :func:`plan`. What a recipe may say depends on whether its sources are
            adapters, so they have to be there before it is parsed.

    Raises:
        RecipeError: The file cannot be read, or the recipe asks for something that cannot be.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_document(recipe, "recipe", download=download)
    path = parse_path(recipe, "recipe")
    documents = load_documents(read_recipe_text(path), origin=str(path))
    if len(documents) > 1:
        raise RecipeError(
            f"{path}: has {len(documents)} recipes, of which later ones merge what earlier ones make; `streammerge "
            "merge FILE OUT` does that, and what it has made is compared by merging into another directory and "
            "`streammerge diff`; name the file of one recipe here"
        )
    return parse_document(documents[0] if documents else None, str(path), download=download)


def read_recipe_text(path: Path) -> str:
    """Return the text of a recipe's file.

    Raises:
        RecipeError: It cannot be read, or is too long for one.
    """
    try:
        with path.open("rb") as stream:
            # No more, and whatever it is: `<(command)` and /dev/stdin are fine, /dev/zero ends.
            raw = stream.read(MAX_TEXT_BYTES + 1)
        text = raw.decode("utf-8") if len(raw) <= MAX_TEXT_BYTES else None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text at byte {error.start}") from error
    if text is None:
        raise RecipeError(
            f"{path}: has more than {MAX_TEXT_BYTES} bytes; a recipe has tens of lines, name one"
        )
    return text


def parse_document(
    document: object, origin: str, *, download: bool, results: Sequence[str] = ()
) -> Recipe:
    """Return the recipe in a document of unchecked values, this tool's or mergekit's.

    Args:
        document: The values.
        origin: What to call it in messages.
        download: As for :func:`plan`.
        results: Names that stand for models which are still to be made.

    Raises:
        RecipeError: It is no recipe, or asks for something that cannot be.
    """
    if isinstance(document, Mapping) and GRID_KEY in document:
        raise RecipeError(
            f"{origin}: {GRID_KEY}: makes several outputs; `streammerge merge RECIPE OUT` makes all of "
            "them, each in a directory of its own inside OUT; here a recipe of one output is needed, as "
            "lies in each of them"
        )
    if isinstance(document, Mapping) and document.keys() >= _CONFIGURATION:
        raise RecipeError(f"{origin}: is the configuration of a model, not a recipe; name a recipe")
    models = {name: method.parameters for name, method in discover_methods().items()}
    native = native_document(document, origin=origin, methods=models)
    if download:
        download_sources(native, made_here=results)
    # Adapters alone are combined by recipes of this tool's alone.
    methods = methods_for(document, origin=origin, models=models) if native is document else models
    return recipe_from_mapping(document, origin=origin, methods=methods)


def _check_planning_room(recipe: Recipe, memory: int | str | None) -> None:
    models = [(f"sources[{index}]", each.path) for index, each in enumerate(recipe.sources)]
    if recipe.base is not None:
        models.insert(0, ("base", recipe.base))
    check_planning_room(models, choose_budget(memory))
