"""Input and output embeddings that are one tensor, and what becomes of it when an adapter changes one.

An adapter on one of them changes that one alone while it is active. A merge that keeps the tie, as
PEFT's does, changes the other one as well and computes another model. So the two part: the result
has both tensors, and its configuration says so. They stay one where the adapter treats both alike:
rows of tokens, a resized vocabulary, ``ensure_weight_tying``.

Follows: peft 0.21.2, layers with an active adapter; with ``shares``, its ``merge_and_unload``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from streammerge.adapters.onto_base.homes import Homes, ModuleHome, TokensHome, VectorHome
from streammerge.checkpoint.ties import declares_tie, has_word_embedding, head_pair, says_apart
from streammerge.checkpoint.types import Checkpoint, TensorEntry

_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
"""How the names of models end that have an output embedding."""
_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared"}
    | {"lm_head", "embed_out", "decoder", "vocab_projector", "proj_out"}
)
_Home = TypeVar("_Home", ModuleHome, VectorHome, TokensHome)


@dataclass(frozen=True, slots=True)
class Tie:
    """Two tensors of a model that are one."""

    inner: str
    """The input embedding, which the files hold."""
    outer: str
    """The output embedding."""
    stored: bool
    """Whether the files hold the output embedding too."""


def find_tie(base: Checkpoint) -> Tie | None:
    """Return which embeddings of a model are one; None where none are, or none that is known.

    Args:
        base: The model. Where its configuration does not say, an output embedding that the files
            lack counts as tied.
    """
    found = [pair for name in base.tensors if (pair := head_pair(name)) is not None]
    if len(found) != 1 or not has_head(base):
        return None
    (pair,) = found
    stored = pair.outer in base.tensors
    declared = declares_tie(base.config, pair)
    tied = declared or (declared is None and not stored)
    return Tie(pair.inner, pair.outer, stored) if tied else None


def unknown_tie(homes: Homes, base: Checkpoint) -> str | None:
    """Return an embedding that changes although what it is tied to is not known; None for none."""
    if base.config is None or find_tie(base) is not None or not has_word_embedding(base.tensors):
        return None
    if says_apart(base.config) or not has_head(base):
        return None
    changed = [home.weight for home in homes.modules] + [*homes.replaced, *homes.added]
    return next((name for name in changed if _is_embedding(name)), None)


def settle_tie(
    homes: Homes, tie: Tie, *, saved: Collection[str], ensured: bool, shares: bool
) -> Homes:
    """Return homes in which each of two tied tensors changes as it must.

    Args:
        homes: As if nothing were tied; a base that does not store the output embedding counts as
            having it.
        tie: The embeddings.
        saved: Tensors that were trained whole, by name in the base.
        ensured: Whether PEFT kept the adapters of both alike (``ensure_weight_tying``).
        shares: Whether the tensor stays one and takes the changes of both, as merge_and_unload has
            it.
    """
    both = {tie.inner, tie.outer}
    trained = both & {*saved}
    own = both & {home.weight for home in homes.modules}
    own |= both & {home.weight for home in homes.vectors}
    # Rows of the input embedding are the output's as well, but not the other way round.
    own |= {tie.outer} & {home.weight for home in homes.tokens}
    if shares:
        homes = _moved(homes, tie)
        own = set()
    whole = {**homes.replaced, **homes.added}
    parts = bool(trained | own) and not (ensured and both <= trained | own | whole.keys())
    if not trained:
        _give_both(whole, tie)
    if parts:
        homes = replace(homes, untied={tie.outer: tie.inner})
    elif not tie.stored:
        homes = _without(homes, tie.outer)
        whole.pop(tie.outer, None)
    if tie.stored or parts:
        homes = _changed_alike(homes, tie, factors=shares and not parts)
    added = {name: entry for name, entry in whole.items() if name in homes.added}
    replaced = {name: entry for name, entry in whole.items() if name not in added}
    return replace(homes, replaced=replaced, added=added)


def _give_both(whole: dict[str, TensorEntry], tie: Tie) -> None:
    """Give what replaces one of the tensors to the other one as well, where nothing does."""
    for one, other in ((tie.inner, tie.outer), (tie.outer, tie.inner)):
        if one in whole:
            whole.setdefault(other, whole[one])


def _without(homes: Homes, name: str) -> Homes:
    """Return homes less those of a tensor whose twin changes in the same way."""
    return replace(
        homes,
        modules=tuple(each for each in homes.modules if each.weight != name),
        vectors=tuple(each for each in homes.vectors if each.weight != name),
        tokens=tuple(each for each in homes.tokens if each.weight != name),
    )


def _moved(homes: Homes, tie: Tie) -> Homes:
    """Return homes in which the input embedding takes the changes of the output too, after its own.

    PEFT merges in the order of modules, in which the output comes last.
    """
    names = {tie.outer: tie.inner}
    return replace(
        homes,
        modules=_later(homes.modules, names),
        vectors=_later(homes.vectors, names),
        tokens=_later(homes.tokens, names),
    )


def _later(homes: Sequence[_Home], names: Mapping[str, str]) -> tuple[_Home, ...]:
    """Return homes with other names for some, which come last."""
    rest: list[_Home] = [each for each in homes if each.weight not in names]
    later: list[_Home] = [
        replace(each, weight=names[each.weight]) for each in homes if each.weight in names
    ]
    return tuple(rest + later)


def _changed_alike(homes: Homes, tie: Tie, *, factors: bool) -> Homes:
    """Let the output take the rows of tokens of the input, and on demand its factors."""
    if tie.outer not in {each.weight for each in homes.tokens}:
        rows = [each for each in homes.tokens if each.weight == tie.inner]
        twins = [replace(each, weight=tie.outer) for each in rows]
        homes = replace(homes, tokens=(*homes.tokens, *twins))
    if not factors:
        return homes
    modules = [each for each in homes.modules if each.weight == tie.inner]
    vectors = [each for each in homes.vectors if each.weight == tie.inner]
    return replace(
        homes,
        modules=(*homes.modules, *(replace(each, weight=tie.outer) for each in modules)),
        vectors=(*homes.vectors, *(replace(each, weight=tie.outer) for each in vectors)),
    )


def has_head(base: Checkpoint) -> bool:
    """Return whether a model has an output embedding, as far as its configuration tells."""
    architectures = (base.config or {}).get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return not names or any(isinstance(name, str) and name.endswith(_HEADS) for name in names)


def _is_embedding(name: str) -> bool:
    """Return whether a tensor may be an embedding of words: layers hold other things of these names."""
    *outer, module, _ = ["", *name.split(".")]
    return module in _EMBEDDINGS and not any(map(str.isdecimal, outer))
