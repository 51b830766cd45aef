"""Whether adapters can be combined without a base at all: everything else is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streammerge.adapters.combining.combinations import COMBINATIONS, SVD_CLAMP
from streammerge.adapters.files.types import Adapter, AdapterKind, LayerKind
from streammerge.errors import RecipeError, UnsupportedAdapterError
from streammerge.recipe.resolving import has_gradients
from streammerge.recipe.types import (
    DrawnVocabulary,
    MismatchPolicy,
    NonFinitePolicy,
    ParameterValue,
    Recipe,
    Semantics,
    VocabularyPolicy,
)

_BAKE = 'give the recipe the "base" that they were trained on'


def check_combination(recipe: Recipe, adapters: Sequence[Adapter]) -> None:
    """Return if the adapters can be combined as the recipe says.

    Args:
        recipe: The parsed recipe, without a base.
        adapters: Its sources.

    Raises:
        RecipeError: The recipe asks for what no combination of these adapters can be.
        UnsupportedAdapterError: What an adapter does depends on the base.
    """
    _check_models(recipe)
    combination = COMBINATIONS[recipe.method]
    for what in ("kind", "naming"):
        found = [str(getattr(adapter, what)) for adapter in adapters]
        if len(set(found)) > 1:
            listed = ", ".join(f"sources[{i}] {word}" for i, word in enumerate(found))
            raise RecipeError(f"sources: expected adapters of one {what}, got {listed}")
    if recipe.non_finite is not NonFinitePolicy.ERROR:
        raise RecipeError(
            "non_finite: keep: has no meaning for factors, where one NaN spreads over a whole "
            "weight; remove the key"
        )
    for index, adapter in enumerate(adapters):
        _check_adapter(f"sources[{index}] ({adapter.path})", adapter)
    if adapters[0].kind is AdapterKind.IA3 and combination.name != "linear":
        raise RecipeError(
            f"method: {combination.name} combines factors of LoRA; for IA3 there is linear only"
        )


def _check_models(recipe: Recipe) -> None:
    """Raise if anything is asked that only a merge of models can do."""
    if recipe.layers:
        raise RecipeError(
            "layers: adapters are combined module by module; without a base there are no layers to put "
            "together, leave the key out"
        )
    if has_gradients(recipe):
        raise RecipeError(
            "parameters: a gradient runs over the layers of a model, and adapters are combined module by "
            "module; say it with cases: {cases: [{tensors: '*.layers.0.*', value: 1}, ...]}"
        )
    for index, source in enumerate(recipe.sources):
        if source.adapter is not None:
            raise RecipeError(
                f"sources[{index}].adapter: {source.path} is an adapter itself; give each adapter a source "
                "of its own"
            )
        if source.rename:
            raise RecipeError(
                f"sources[{index}].rename: modules of adapters are matched by their own names; leave the "
                "key out"
            )
    if recipe.output.promotes:
        raise RecipeError(
            "output.dtype: promoted is for models; name a type, or leave the key out for that of the first "
            "adapter"
        )
    for key, asked in _without_effect(recipe):
        if asked:
            raise RecipeError(
                f"{key}: is about models, and without a base the result is an adapter, of factors and their "
                "configuration alone; leave the key out"
            )


def _without_effect(recipe: Recipe) -> Iterator[tuple[str, bool]]:
    """Yield keys that say something about models alone, and whether the recipe has them."""
    drawn = isinstance(recipe.vocabulary, DrawnVocabulary)
    yield "vocabulary", drawn or recipe.vocabulary is VocabularyPolicy.SAME
    yield "mismatch", recipe.mismatch is not MismatchPolicy.ERROR
    yield "semantics", recipe.semantics not in (None, Semantics.PEFT)
    yield "output.chat_template", recipe.output.chat_template is not None
    yield "output.companions", bool(recipe.output.companions)
    yield "output.max_shard_size", recipe.output.max_shard_bytes is not None
    for index, rule in enumerate(recipe.rules):
        yield f"rules[{index}].dtype", rule.dtype is not None
        yield f"rules[{index}].mismatch", rule.mismatch is not None


def check_clamp(value: ParameterValue | None) -> None:
    """Return if ``svd_clamp`` is off or a quantile whose value can be positive."""
    if value is not None and isinstance(value, float) and 0 < value <= 0.5:
        raise RecipeError(
            f"{SVD_CLAMP.name}: expected 0 (off) or a number in (0.5, 1], got {value:g}: half of "
            "the values are negative, so a lower quantile would clamp everything to one value"
        )


def _check_adapter(label: str, adapter: Adapter) -> None:
    config = adapter.config
    if adapter.formed:
        forms = sorted({str(module.form) for module in adapter.formed})
        raise UnsupportedAdapterError(
            f"{label}: holds modules of the form {' and '.join(forms)} as {adapter.naming} has it, such "
            f"as {adapter.formed[0].stem}, which have no combination here that could be written in "
            f"the same form: {_BAKE}"
        )
    if config.use_dora:
        raise UnsupportedAdapterError(
            f"{label}: is a DoRA adapter; its magnitudes scale the base's weights, so without them "
            f"nothing can be added up: {_BAKE}"
        )
    if any(module.layer is LayerKind.EXPERTS for module in adapter.modules):
        raise UnsupportedAdapterError(
            f"{label}: adapts parameters (target_parameters: "
            f"{', '.join(config.target_parameters)}), which PEFT stacks by expert in an order that "
            f"only the base tells: {_BAKE}"
        )
    if config.bias != "none":
        raise UnsupportedAdapterError(
            f"{label}: trained the base's own biases (bias: {config.bias}), which PEFT loads from "
            f"one adapter only: {_BAKE}"
        )
    if config.ensure_weight_tying:
        raise UnsupportedAdapterError(
            f"{label}: ties the adapters of tied embeddings (ensure_weight_tying), which their "
            f"combination would no longer be: {_BAKE}"
        )
