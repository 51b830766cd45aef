"""What a recipe asks of its method, and whether the method can do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from streammerge.adapters.onto_base.adapted import AdaptedModel
from streammerge.assignment.types import Assignment, Model
from streammerge.errors import RecipeError, printable, suggestion
from streammerge.methods import discover_methods
from streammerge.methods.base import MergeMethod, Operand, Scope
from streammerge.methods.describing import describe_count
from streammerge.methods.refusing import find_dividing
from streammerge.recipe.resolving import Position, build_resolver
from streammerge.recipe.types import BASE, ComputeDType, Recipe, Semantics


def find_method(name: str) -> MergeMethod:
    """Return the method of that name.

    Raises:
        RecipeError: There is none.
    """
    methods = discover_methods()
    if name not in methods:
        raise RecipeError(f'there is no method "{name}"{suggestion(name, methods)}')
    return methods[name]


def takes_in_turn(recipe: Recipe, method: MergeMethod) -> bool:
    """Return whether the recipe asks to merge the sources one after the other, as PEFT does."""
    # The same for every tensor, whatever its name and place.
    somewhere = Position(part=0 if recipe.layers else None)
    resolved = build_resolver(recipe, method.parameters, lambda _: somewhere)("")
    return method.in_turn(method.bind(resolved.values))


def semantics_of(recipe: Recipe, method: MergeMethod) -> Semantics:
    """Return whose definition of the method the recipe means.

    Raises:
        RecipeError: There is no such definition.
    """
    if recipe.semantics is None:
        return method.semantics[0]
    if recipe.semantics not in method.semantics:
        known = ", ".join(each.value for each in method.semantics)
        raise RecipeError(
            f"semantics: {method.name} is defined by {known}, not by {recipe.semantics.value}; "
            f"give one of these, or leave `semantics` out for {method.semantics[0].value}"
        )
    return recipe.semantics


def check_sources(recipe: Recipe, method: MergeMethod) -> None:
    """Raise unless there are as many sources as the method merges: in all, or in every slice."""
    if recipe.mixture is not None:
        # Every tensor is of one of them.
        return
    least, most = method.sources
    counts = {
        f"layers[{index}].sources": len(part.sources) for index, part in enumerate(recipe.layers)
    }
    for path, count in (counts or {"sources": len(recipe.sources)}).items():
        if least <= count and (most is None or count <= most):
            continue
        beside = " beside the base" if method.operand is Operand.TASK_VECTORS else ""
        has = "the slice has" if counts else "the recipe has"
        raise RecipeError(
            f"{path}: {method.name} merges {describe_count(method)}{beside}, and {has} {count}; "
            "change the sources or the method"
        )


def with_base_layers(recipe: Recipe, method: MergeMethod) -> Recipe:
    """Return the recipe with the base in every slice of layers, where the method takes one.

    A slice that does not list it means the layers that its first source gives.
    """
    if recipe.base is None or method.operand is Operand.WEIGHTS:
        return recipe
    layers = tuple(
        part
        if part.base is not None or part.ranges[0].source == BASE
        else replace(
            part, ranges=(replace(part.ranges[0], source=BASE, parameters={}), *part.ranges)
        )
        for part in recipe.layers
    )
    return replace(recipe, layers=layers)


def check_layers(recipe: Recipe, method: MergeMethod) -> None:
    """Raise if the recipe puts layers together and asks for what goes by the base's tensors."""
    if not recipe.layers:
        return
    for index, part in enumerate(recipe.layers):
        if part.base is not None and method.operand is Operand.WEIGHTS:
            raise RecipeError(
                f"layers[{index}].base: {method.name} takes no task vectors, so a slice has no base; remove "
                "the key, or list the model under the slice's sources to merge it"
            )
    used = {each.source for part in recipe.layers for each in part.taken}
    idle = [index for index in range(len(recipe.sources)) if index not in used]
    if idle:
        raise RecipeError(
            f"layers: no slice has layers of sources[{idle[0]}] ({recipe.sources[idle[0]].path}); remove "
            "it from the sources, or give it a slice"
        )
    if recipe.output.quantization is not None:
        raise RecipeError(
            "output.quantization: weights are stored as the base's of the same name are, and `layers` "
            "gives them other names; leave one of the two out"
        )
    if recipe.parameters.get("rounding") == "peft":
        raise RecipeError(
            "parameters.rounding: peft merges adapters into the base as it stands, and `layers` puts "
            "another one together; leave one of the two out"
        )


def check_settings(method: MergeMethod, assignment: Assignment) -> bool:
    """Check what concerns several parameters at once; return whether statistics span the model."""
    if assignment.dropped and not assignment.tensors:
        raise RecipeError(
            f"rules: all {len(assignment.dropped)} tensors are dropped, and nothing is left to merge; drop fewer"
        )
    scopes = set()
    for setting in assignment.settings:
        params = method.bind(setting.values)
        if (reason := method.refuse(params)) is not None:
            raise RecipeError(reason)
        work = method.work(params)
        if work.rounds:
            scopes.add(work.scope)
    if scopes != {Scope.MODEL}:
        return False
    if names := find_dividing(method, [setting.values for setting in assignment.settings]):
        raise RecipeError(
            f"rules: not all tensors have the same {' and '.join(names)} under `scope: model`, where "
            "a statistic that depends on it covers the whole model; give all the same, or set "
            "`scope: tensor`"
        )
    if len({setting.models for setting in assignment.settings}) > 1:
        raise RecipeError(
            "layers: not all tensors are made of the same models under `scope: model`, where a statistic "
            "of each covers the whole model; set `scope: tensor`"
        )
    return True


def check_numbers(recipe: Recipe, assignment: Assignment) -> None:
    """Raise if a parameter is no number of the type that is computed in, but 0 or infinity."""
    if recipe.compute_dtype is not ComputeDType.FLOAT32:
        return
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    for setting in assignment.settings:
        for name, value in setting.values:
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and number != 0 and not least <= abs(number) <= most:
                    raise RecipeError(
                        f"{name}: {number:g} is no number of float32, whose magnitudes go from {least:.3g} to "
                        f"{most:.3g}; give another one, or set `compute_dtype: float64`"
                    )


def check_in_turn(recipe: Recipe, assignment: Assignment, sources: Sequence[Model]) -> None:
    """Raise unless PEFT could do the same: adapters alone, of weight 1, in the base's type."""
    for index, source in enumerate(sources):
        if not isinstance(source, AdaptedModel):
            raise RecipeError(
                f"parameters.rounding: peft merges adapters one after the other, but sources[{index}] "
                f"({recipe.sources[index].path}) is a model; leave `rounding` out"
            )
    for setting in assignment.settings:
        weights = dict(setting.values).get("weight")
        if isinstance(weights, tuple) and set(weights) != {1.0}:
            raise RecipeError(
                f"weight: {list(weights)} with `rounding: peft`, where PEFT's merge_and_unload knows "
                "only 1; leave the weights or `rounding` out"
            )
    for tensor in assignment.tensors:
        for change in tensor.changes:
            if change.reads_base and change.model != tensor.changes[0].model:
                raise RecipeError(
                    f"parameters.rounding: peft cannot follow PEFT where sources[{change.model - 1}] is "
                    f"relative to the base's weights, as DoRA is, and another one has changed "
                    f"{printable(tensor.name)} before: PEFT then "
                    "takes the earlier one out and puts it back, each time with an error of rounding; "
                    "leave `rounding` out, or merge them one by one"
                )
    if recipe.compute_dtype is not ComputeDType.FLOAT32 or recipe.output.dtype is not None:
        raise RecipeError(
            "parameters.rounding: peft computes in float32 and keeps the base's types; leave "
            "`compute_dtype` and `output.dtype` out"
        )
