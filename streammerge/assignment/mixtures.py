"""Mixtures of experts: models side by side in the feed-forward layers of one of them.

    base      model.layers.0.self_attn.q_proj.weight   the same
              model.layers.0.mlp.up_proj.weight        left out
    source 1  model.layers.0.mlp.up_proj.weight        model.layers.0.block_sparse_moe.experts.1.w3.weight

The names are those in which such models lie on the hub, which all versions of their loaders read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streammerge.adapters.onto_base.adapted import AdaptedModel, TunedModel
from streammerge.assignment.gates import Gated, MatrixOfGates, add_gates
from streammerge.assignment.layers import (
    Arranged,
    Stack,
    all_names,
    by_new_names,
    depths,
    find_stacks,
    renamed,
)
from streammerge.assignment.types import Model
from streammerge.checkpoint.types import Checkpoint, Note, TensorEntry
from streammerge.errors import CheckpointError, MissingTensorError, RecipeError, printable
from streammerge.recipe.types import Mixture, MixtureForm, Recipe

_FEED_FORWARD = "mlp."
_WEIGHTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
"""What a feed-forward layer has that can be an expert."""
_HIDDEN_OF = "up_proj.weight"
"""The one whose columns are the hidden size."""


@dataclass(frozen=True, slots=True)
class _Names:
    """What a form calls the tensors of a layer."""

    of: tuple[str, ...]
    """``model_type`` of models that it can be made of."""
    expert: str
    """A weight of an expert."""
    router: str
    """The gate vectors."""
    weights: Mapping[str, str]
    """Its names for the weights of a feed-forward layer."""
    shared: str | None = None
    """A weight of the expert of every token."""
    shared_gate: str | None = None
    """The gate vector of that one."""
    needs_shared: bool = False
    """Whether there is no such model without one."""
    beside: tuple[str, ...] = ()
    """What a layer may have beside the weights that all have."""


_BESIDE = (
    *("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.rotary_emb.inv_freq"),
    *(f"self_attn.{each}_proj.weight" for each in "qkvo"),
)
"""What a layer has beside its feed-forward weights."""
_SAME = {name: name for name in _WEIGHTS}
_NAMES = {
    MixtureForm.MIXTRAL: _Names(
        of=("llama", "mistral"),
        expert="block_sparse_moe.experts.{expert}.{weight}",
        router="block_sparse_moe.gate.weight",
        weights=dict(zip(_WEIGHTS, ("w1.weight", "w3.weight", "w2.weight"), strict=True)),
    ),
    MixtureForm.QWEN2_MOE: _Names(
        of=("qwen2", "llama", "mistral"),
        expert="mlp.experts.{expert}.{weight}",
        router="mlp.gate.weight",
        weights=_SAME,
        shared="mlp.shared_expert.{weight}",
        shared_gate="mlp.shared_expert_gate.weight",
        needs_shared=True,
        beside=tuple(f"self_attn.{each}_proj.bias" for each in "qkv"),
    ),
    MixtureForm.QWEN3_MOE: _Names(
        of=("qwen3",),
        expert="mlp.experts.{expert}.{weight}",
        router="mlp.gate.weight",
        weights=_SAME,
        beside=("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ),
    MixtureForm.DEEPSEEK: _Names(
        of=("llama", "mistral"),
        expert="mlp.experts.{expert}.{weight}",
        router="mlp.gate.weight",
        weights=_SAME,
        shared="mlp.shared_experts.{weight}",
    ),
}


def settle_mixture(recipe: Recipe, base: Checkpoint | None) -> Recipe:
    """Return a recipe whose mixture has a form, and whose result has one element type.

    Args:
        recipe: What is asked for.
        base: The base's headers; None without one.

    Raises:
        RecipeError: No form can be made of the base, or not the one that is asked for.
    """
    mixture = recipe.mixture
    if mixture is None or base is None:
        return recipe
    output = recipe.output
    if output.dtype is None and not output.promotes:
        # Loaders give all experts one type.
        largest = max(base.tensors.values(), key=lambda entry: entry.numel)
        output = replace(output, dtype=largest.natural_dtype)
    form = mixture.form or _choose_form(mixture, base)
    _check_form(form, mixture, base)
    return replace(recipe, mixture=replace(mixture, form=form), output=output)


def _model_type(base: Checkpoint) -> str:
    found = (base.config or {}).get("model_type")
    if isinstance(found, str):
        return found
    raise RecipeError(
        f"mixture: {base.path} has no config.json with a model_type, from which the result's is made; "
        "name a model that has one as the base"
    )


def _choose_form(mixture: Mixture, base: Checkpoint) -> MixtureForm:
    kind = _model_type(base)
    for form, names in _NAMES.items():
        if kind in names.of and names.needs_shared == (mixture.shared is not None):
            return form
    possible = [form for form, names in _NAMES.items() if kind in names.of]
    if not possible:
        raise RecipeError(
            f'mixture: no mixture can be made of a "{printable(kind)}" model; the base has to be one of '
            f"{', '.join(dict.fromkeys(each for names in _NAMES.values() for each in names.of))}"
        )
    _check_form(possible[0], mixture, base)
    return possible[0]


def _check_form(form: MixtureForm, mixture: Mixture, base: Checkpoint) -> None:
    names, kind = _NAMES[form], _model_type(base)
    if kind not in names.of:
        raise RecipeError(
            f"mixture.form: {form} is made of models of the type {' or '.join(names.of)}, and the base is "
            f'"{printable(kind)}"'
        )
    if mixture.shared is not None and names.shared is None:
        raise RecipeError(
            f"mixture.shared: {form} has no expert of every token; leave the key out, or choose the form "
            f"{' or '.join(each for each, other in _NAMES.items() if kind in other.of and other.shared) or 'of another base'}"
        )
    if names.needs_shared and mixture.shared is None:
        raise RecipeError(
            f"mixture.shared: {form} needs an expert of every token; name one of the sources by its index"
        )


def arrange_mixture(models: Sequence[Model], labels: Sequence[str], recipe: Recipe) -> Arranged:
    """Return the models with the names that their tensors have in the mixture.

    Args:
        models: The base and the sources, each with the names of the base.
        labels: How messages name them.
        recipe: Says what becomes of them; settled.

    Raises:
        RecipeError: The base is not such that its feed-forward layers can be others' experts.
        CheckpointError: A source has other feed-forward layers than the base.
        MissingTensorError: A source lacks some.
    """
    return _Mixing(models, labels, recipe).arrange()


class _Mixing:
    def __init__(self, models: Sequence[Model], labels: Sequence[str], recipe: Recipe) -> None:
        base, mixture = models[0], recipe.mixture
        assert isinstance(base, Checkpoint)  # noqa: S101 - the recipe was checked
        assert mixture is not None  # noqa: S101 - else nobody calls this
        assert mixture.form is not None  # noqa: S101 - it is settled
        self._models, self._labels, self._recipe = models, labels, recipe
        self._base, self._mixture, self._form = base, mixture, mixture.form
        self._names = _NAMES[mixture.form]
        stacks = find_stacks(base.tensors)
        if len(stacks) != 1:
            raise RecipeError(
                f"mixture: the base has {len(stacks)} stacks of numbered layers; experts are those of a "
                "model with one"
            )
        self._stack: Stack = stacks[0]
        self._check_layers()
        self._model_of: dict[str, int] = {}

    def _check_layers(self) -> None:
        """Raise unless every layer of the base has what one of the form has, and nothing beside."""
        for layer in range(self._stack.count):
            prefix = self._stack.joined(layer, _FEED_FORWARD)
            have = {name for name in self._base.tensors if name.startswith(prefix)}
            wanted = {f"{prefix}{weight}" for weight in _WEIGHTS}
            for name in sorted(have ^ wanted):
                what = "has no" if name in wanted else "has"
                raise RecipeError(
                    f"mixture: {self._labels[0]} {what} {printable(name)}, and an expert of {self._form} "
                    f"has {', '.join(_WEIGHTS)}, and nothing else"
                )
        known = {*_BESIDE, *self._names.beside}
        for name in self._base.tensors:
            found = self._stack.split(name)
            if found is None or found[1].startswith(_FEED_FORWARD) or found[1] in known:
                continue
            raise RecipeError(
                f"mixture: {self._labels[0]} has {printable(name)}, of which no layer of {self._form} has the "
                "like: a loader would leave it out; choose another form or base"
            )

    def arrange(self) -> Arranged:
        """Return everything by the names of the result."""
        gated = add_gates(self._base, self._recipe, list(self._matrices()))
        experts = (self._arranged_source(index) for index in range(1, len(self._models)))
        arranged: list[Model] = [self._arranged_base(gated), *experts]
        stacks = find_stacks(arranged[0].tensors)
        return Arranged(
            arranged,
            depths([each for each in stacks if each.prefix == self._stack.prefix]),
            lambda name: (self._model_of.get(name, 0),),
            lambda _: 0,
            (*self._notes(), *gated.notes),
        )

    def _matrices(self) -> Iterator[MatrixOfGates]:
        """Yield what gates there are, layer by layer."""
        n_sources = len(self._models) - 1
        shared = self._mixture.shared
        routed = tuple(index for index in range(n_sources) if index != shared)
        for layer in range(self._stack.count):
            weight = self._base.tensors[self._stack.joined(layer, _FEED_FORWARD + _HIDDEN_OF)]
            hidden, dtype = weight.shape[1], weight.natural_dtype
            router = self._stack.joined(layer, self._names.router)
            yield MatrixOfGates(router, routed, hidden, dtype)
            if shared is not None and self._names.shared_gate is not None:
                name = self._stack.joined(layer, self._names.shared_gate)
                yield MatrixOfGates(name, (shared,), hidden, dtype)

    def _arranged_base(self, gated: Gated) -> Checkpoint:
        tensors: dict[str, TensorEntry] = {}
        for name, entry in self._base.tensors.items():
            found = self._stack.split(name)
            if found is None or not found[1].startswith(_FEED_FORWARD):
                tensors[name] = entry
        return replace(
            self._base,
            tensors={**tensors, **gated.tensors},
            files=(*self._base.files, *gated.files),
        )

    def _arranged_source(self, index: int) -> Model:
        model, label = self._models[index], self._labels[index]
        if isinstance(model, AdaptedModel):
            raise RecipeError(
                f"{label}: is an adapter, and an expert is a model; name the model that it belongs to as the "
                "path, and the adapter with the key `adapter`"
            )
        self._check_same(model, label)
        names: dict[str, list[str]] = {name: [] for name in all_names(model)}
        for layer in range(self._stack.count):
            for weight in _WEIGHTS:
                old = self._stack.joined(layer, _FEED_FORWARD + weight)
                new = self._stack.joined(layer, self._expert_name(index - 1, weight))
                self._model_of[new] = index
                if old not in names:
                    raise MissingTensorError(
                        f"{label}: has no {printable(old)}, which the base has; an expert is a model like "
                        "the base"
                    )
                names[old] = [new]
        tensors = renamed(model.tensors, names)
        if isinstance(model, TunedModel):
            return replace(model, tensors=tensors, changes=by_new_names(model.changes, names))
        return replace(model, tensors=tensors)

    def _check_same(self, model: Model, label: str) -> None:
        """Raise unless the experts have the shapes of the base, of which the configuration tells."""
        for layer in range(self._stack.count):
            for weight in _WEIGHTS:
                name = self._stack.joined(layer, _FEED_FORWARD + weight)
                mine, its = self._base.tensors[name], model.tensors.get(name)
                if its is not None and its.shape != mine.shape:
                    raise CheckpointError(
                        f"{label}: {printable(name)} has the shape {list(its.shape)}, and "
                        f"{list(mine.shape)} in the base; all experts of {self._form} have one shape"
                    )

    def _expert_name(self, source: int, weight: str) -> str:
        names, shared = self._names, self._mixture.shared
        if source == shared:
            assert names.shared is not None  # noqa: S101 - the form was checked
            return names.shared.format(weight=weight)
        place = source - (shared is not None and source > shared)
        return names.expert.format(expert=place, weight=names.weights[weight])

    def _notes(self) -> Iterator[Note]:
        shared = self._mixture.shared
        routed = [index for index in range(len(self._models) - 1) if index != shared]
        text = (
            f"a {self._form} model of {len(routed)} experts, the feed-forward layers of "
            f"{', '.join(self._labels[index + 1].split()[0] for index in routed)}"
        )
        if shared is not None:
            text += f", and of {self._labels[shared + 1].split()[0]} for every token"
        yield Note("mixture", f"{text}; all else is the base's, and nothing else of theirs is read")
        if len({(source.path, source.adapter) for source in self._recipe.sources}) == 1:
            text = (
                "all experts are the same model: the result says what that model says, and takes longer, "
                "until it is trained"
            )
            yield Note("mixture", text)
