"""``output.quantization: as base``: which tensors of the output become codes with scales again, and how.

the base stores         the recipe merges it      the output stores
codes and scales        with others               codes of its values, with scales found anew
                        not, or copies it         what the file of the model has, bit for bit
other scales            (no model reads them)     those of the base, as they are
numbers                                           numbers
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from streammerge.assignment.types import Action, AssignedTensor, Assignment, Model
from streammerge.checkpoint.types import Checkpoint, CodedAs, Encoding, Note, TensorEntry
from streammerge.errors import RecipeError, printable
from streammerge.recipe.resolving import Resolved
from streammerge.recipe.types import BASE, CompanionKind, NonFinitePolicy, Recipe

_KEY = "output.quantization"
_SHOWN = 3


def encode_as_base(
    assignment: Assignment,
    models: Sequence[Model],
    recipe: Recipe,
    resolve: Callable[[str], Resolved],
) -> Assignment:
    """Return the assignment with codes and scales wherever the base has them.

    Args:
        assignment: What is to be done with the weights as numbers.
        models: The inputs; the base first.
        recipe: What is asked for.
        resolve: What the recipe says about a tensor name.

    Raises:
        RecipeError: The base has no codes of the kinds that can be made, or the recipe asks for something
            that codes cannot hold.
    """
    base = models[0]
    assert isinstance(base, Checkpoint)  # noqa: S101 - a base that is an adapter is refused before
    coded = _coded_weights(base, recipe)
    _check_recipe(recipe)
    tensors: list[AssignedTensor] = []
    used = {each.scale.name for each in coded.values()}
    anew = copied = 0
    for tensor in assignment.tensors:
        as_stored = coded.get(tensor.name)
        if as_stored is None:
            tensors.append(tensor)
            continue
        _check_tensor(tensor, as_stored, base.tensors[tensor.name])
        pair = _copied(tensor, as_stored, base.tensors[tensor.name])
        if pair is None:
            anew += 1
            pair = _encoded(tensor, as_stored, base.tensors[tensor.name])
        else:
            copied += 1
        tensors += pair
    others = list(_others(base, used, tensors, resolve, len(models)))
    notes = _notes(recipe, coded, anew, copied, [each.name for each in others])
    return replace(assignment, tensors=(*tensors, *others), notes=(*assignment.notes, *notes))


def _coded_weights(base: Checkpoint, recipe: Recipe) -> dict[str, CodedAs]:
    """Return what the base stores of each weight that it has as float8 codes."""
    where = f"base ({recipe.base})"
    if base.parts:
        raise RecipeError(
            f"{_KEY}: {where} is a model in several folders, whose codes are only read; leave the key "
            "out, or merge the part by itself"
        )
    packed = [name for name, each in base.tensors.items() if each.is_coded and not each.coded_as]
    if packed:
        raise RecipeError(
            f"{_KEY}: {where} stores {_listed(packed)} as MXFP4, and codes are only made in F8_E4M3 and "
            "F8_E5M2; leave the key out, the output is then bfloat16"
        )
    coded = {name: each.coded_as for name, each in base.tensors.items() if each.coded_as}
    if not coded:
        raise RecipeError(
            f"{_KEY}: {where} stores no weight as float8 codes with scales, so there is nothing to "
            "follow; leave the key out"
        )
    renamed = [name for name, each in coded.items() if each.weight.name != name]
    if renamed:
        raise RecipeError(
            f"{_KEY}: {where} stores {_listed(renamed)} as {printable(coded[renamed[0]].weight.name)}, a "
            "form of its own program (torchao) which is only read; leave the key out"
        )
    return coded


def _check_recipe(recipe: Recipe) -> None:
    """Raise if the recipe asks for something that does not go with codes."""
    if recipe.non_finite is NonFinitePolicy.KEEP:
        raise RecipeError(
            f"{_KEY}: a block with NaN or infinity has no scale; leave out `non_finite: keep`, or this key"
        )
    if dict(recipe.parameters).get("rounding") == "peft":
        raise RecipeError(
            f"{_KEY}: PEFT merges into weights that are numbers; leave out `rounding: peft`, or this key"
        )
    origin = recipe.output.companions.get(CompanionKind.CONFIG, BASE)
    if origin != BASE:
        raise RecipeError(
            f"output.companions.config: {origin if isinstance(origin, int) else str(origin)!r}, but the "
            f"quantization_config that tells how to read codes is in the base's config; leave the config "
            f"to the base, or leave out {_KEY}"
        )


def _check_tensor(tensor: AssignedTensor, as_stored: CodedAs, stored: TensorEntry) -> None:
    """Raise if what becomes of a weight has other blocks than the base's."""
    name = printable(tensor.name)
    if tensor.region is not None:
        raise RecipeError(
            f"{_KEY}: {name} is merged in part and taken in part (mismatch: common), and blocks of both "
            f"would share scales; leave the key out, or add a rule {{tensors: {tensor.name!r}, copy: base}}"
        )
    if tensor.shape != stored.shape:
        raise RecipeError(
            f"{_KEY}: {name} is {list(stored.shape)} in the base and comes to {list(tensor.shape)}, for "
            f"which the base's scales {list(as_stored.scale.shape)} say no blocks; leave the key out, or "
            f"add a rule {{tensors: {tensor.name!r}, copy: base}}"
        )
    floats = all(entry.dtype.is_float for entry in tensor.entries if entry is not None)
    if stored.numel == 0 or not floats:
        raise RecipeError(
            f"{_KEY}: {name} has no values that codes could be made of; leave the key out"
        )


def _copied(
    tensor: AssignedTensor, as_stored: CodedAs, in_base: TensorEntry
) -> tuple[AssignedTensor, AssignedTensor] | None:
    """Return codes and scales to be copied, where one model's are taken as they are; None otherwise."""
    present = [(index, each) for index, each in enumerate(tensor.entries) if each is not None]
    if tensor.action is not Action.CONVERT or tensor.changes or len(present) != 1:
        return None
    model, entry = present[0]
    own = entry.coded_as
    if own is None or own.weight.dtype is not as_stored.weight.dtype:
        return None
    if (own.scale.dtype, own.scale.shape) != (as_stored.scale.dtype, as_stored.scale.shape):
        return None
    if _encoding(entry, own) != replace(_encoding(in_base, as_stored), scales=own.scale.name):
        return None

    def copy(stored: TensorEntry, name: str) -> AssignedTensor:
        entries = tuple(stored if i == model else None for i in range(len(tensor.entries)))
        return replace(
            tensor,
            name=name,
            shape=stored.shape,
            dtype=stored.dtype,
            action=Action.COPY,
            entries=entries,
        )

    return copy(own.weight, tensor.name), copy(own.scale, as_stored.scale.name)


def _encoded(
    tensor: AssignedTensor, as_stored: CodedAs, in_base: TensorEntry
) -> tuple[AssignedTensor, AssignedTensor]:
    """Return a tensor that becomes codes, and its scales."""
    scale = as_stored.scale
    scales = AssignedTensor(
        scale.name, scale.shape, scale.dtype, Action.SCALES, (None,) * len(tensor.entries), -1
    )
    # What would be copied as the numbers that a model stores becomes codes too.
    action = Action.MERGE if tensor.action is Action.MERGE else Action.CONVERT
    encoding = _encoding(in_base, as_stored)
    dtype = as_stored.weight.dtype
    return replace(tensor, dtype=dtype, action=action, encoding=encoding), scales


def _encoding(entry: TensorEntry, as_stored: CodedAs) -> Encoding:
    """Return how an entry is coded."""
    first = entry.parts[0].coding
    assert first is not None  # noqa: S101 - all parts of a coded entry are
    offsets = [part.coding.scale_offset for part in entry.parts if part.coding is not None]
    step = next((after - before for before, after in pairwise(offsets)), 0)
    scale = as_stored.scale
    return Encoding(
        scales=scale.name,
        scale_dtype=scale.dtype,
        scale_numel=scale.numel,
        rows=entry.parts[0].numel // first.columns,
        columns=first.columns,
        block=first.block,
        matrix_scales=scale.numel if len(offsets) == 1 else step // scale.dtype.itemsize,
    )


def _others(
    base: Checkpoint,
    used: set[str],
    tensors: Sequence[AssignedTensor],
    resolve: Callable[[str], Resolved],
    models: int,
) -> Iterator[AssignedTensor]:
    """Yield what the base has for its quantisation besides: scales of activations and of caches."""
    kept: set[str] = set()
    for tensor in tensors:
        name = tensor.name
        while name and name not in kept:
            kept.add(name)
            name = name.rpartition(".")[0]
    for name, entry in base.quantisation.items():
        # Those of a module that a rule drops go with it.
        if name in used or resolve(name).drop or not _has_place(name, kept):
            continue
        entries = (entry, *(None for _ in range(models - 1)))
        yield AssignedTensor(name, entry.shape, entry.dtype, Action.COPY, entries, -1)


def _has_place(name: str, kept: Collection[str]) -> bool:
    """Return whether the output has the module that a scale is of, or the one around its quantizer."""
    module = name.rpartition(".")[0]
    outer = module.rpartition(".")[0]
    return not module or module in kept or ("quantizer" in module and outer in kept)


def _notes(
    recipe: Recipe, coded: Mapping[str, CodedAs], anew: int, copied: int, others: Sequence[str]
) -> Iterator[Note]:
    kinds = sorted(
        {f"{each.weight.dtype} with {each.scale.dtype} scales" for each in coded.values()}
    )
    yield Note(
        "quantised",
        f"as the base: {anew} weight(s) become {' and '.join(kinds)}, found anew of the merged values; "
        f"{copied} copied with their scales, bit for bit",
    )
    if recipe.output.dtype is not None:
        yield Note("quantised", f"output.dtype {recipe.output.dtype} holds for the other tensors")
    if others:
        yield Note(
            "quantised",
            f"{len(others)} scale(s) of activations or caches are the base's, measured with its weights "
            f"and not with the merged ones: {_listed(others)}",
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(printable, names[:_SHOWN])) + more
