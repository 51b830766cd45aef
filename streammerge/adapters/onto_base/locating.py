"""Names that an adapter expects in a base, found among the names that the base has.

A name is taken as it stands, else by a known renaming, else after the beginning of the names of its
whole group was exchanged: ``model.layers.0.q_proj`` is found as ``layers.0.q_proj``, if nothing else
in the base could be meant. What is not found is handed back; nothing is guessed tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

from streammerge.adapters.onto_base.renames import renamings
from streammerge.checkpoint.types import TensorEntry

Shape = tuple[int, ...]
_MAX_GROUPS = 64
"""Parts of a model with names of their own: towers, decoders, heads. More are no such thing, and
each costs a search."""
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of the base that an adapter expects."""

    path: str
    """Its name as the adapter would spell it."""
    fits: Callable[[Shape], bool]
    """Whether a tensor of this shape could be the one."""


@dataclass(slots=True)
class Located:
    """What was found of the wanted tensors."""

    names: dict[str, str] = field(default_factory=dict)
    """The base's name by the adapter's."""
    missing: list[str] = field(default_factory=list)
    """Paths that nothing in the base answers to."""
    ambiguous: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Paths that several tensors of the base answer to equally well, with those."""
    prefixes: dict[str, str] = field(default_factory=dict)
    """Beginnings that were exchanged: the base's by the adapter's."""


class BaseNames:
    """The names of a base, arranged for searching."""

    def __init__(self, tensors: Mapping[str, TensorEntry]) -> None:
        """Index the names.

        Args:
            tensors: The base's tensors by name.
        """
        self._tensors = tensors
        # Layers that compilers and shard managers wrap around modules change no module's identity.
        self._actual: dict[str, str] = {}
        for name in tensors:
            plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
            self._actual.setdefault(plain, name)
        self._by_end: dict[str, list[str]] = {}
        self._by_flat: dict[str, list[str]] = {}
        for plain in self._actual:
            self._by_end.setdefault(_end(plain), []).append(plain)
            self._by_flat.setdefault(flatten(plain), []).append(plain)

    @cached_property
    def shared_prefixes(self) -> tuple[str, ...]:
        """Nothing, and then what all names begin with, shortest first."""
        segments = list(
            takewhile(
                lambda parts: len(set(parts)) == 1,
                zip(*(name.split(".")[:-2] for name in self._actual), strict=False),
            )
        )
        modules = [parts[0] for parts in segments]
        return tuple(".".join(modules[:count]) for count in range(len(modules) + 1))

    def get(self, path: str) -> str | None:
        """Return the base's name for a path spelled as it is there; None where there is none."""
        return path if path in self._tensors else self._actual.get(path)

    def shape(self, path: str) -> Shape:
        """Return the shape of the tensor that :meth:`get` finds."""
        return self._tensors[self._actual.get(path, path)].shape

    def begins(self, prefix: str) -> bool:
        """Return whether a name begins with ``prefix``."""
        return any(name.startswith(prefix) for name in self._actual)

    def endings(self, path: str) -> list[str]:
        """Return what stands before ``path`` in the names that end with it, in the base's order."""
        return [
            name.removesuffix(path).rstrip(".")
            for name in self._by_end.get(_end(path), ())
            if name == path or name.endswith(f".{path}")
        ]

    def flat_endings(self, flat: str) -> list[str]:
        """Return the same for a path with underscores for dots."""
        found = []
        for each, names in self._by_flat.items():
            if each == flat or each.endswith(f"_{flat}"):
                before = len(each) - len(flat)
                # What was exchanged must be whole modules: a dot stood where it ends.
                found += [
                    name[: max(before - 1, 0)]
                    for name in names
                    if not before or name[before - 1] == "."
                ]
        return found

    def unflatten(self, prefix: str, flat: str) -> list[str]:
        """Return the names under ``prefix`` that are ``flat`` with underscores for dots."""
        names = self._by_flat.get(flatten(_joined(prefix, flat)), ())
        return [name for name in names if not prefix or name.startswith(f"{prefix}.")]


def flatten(path: str) -> str:
    """Return a path with underscores for dots, as kohya's scripts spell it."""
    return path.replace(".", "_")


def locate(wanted: Iterable[Wanted], names: BaseNames) -> Located:
    """Return where wanted tensors are in a base.

    Args:
        wanted: What the adapter expects, dots between modules.
        names: The base's names.
    """
    located = Located()
    rest: list[Wanted] = []
    for each in wanted:
        spellings = (each.path, *renamings(each.path))
        known = next(
            (
                found
                for prefix in names.shared_prefixes
                for spelling in spellings
                if (found := names.get(_joined(prefix, spelling))) is not None
            ),
            None,
        )
        if known is None:
            rest.append(each)
        else:
            located.names[each.path] = known
    _locate_groups(rest, names, located)
    return located


def locate_flat(wanted: Iterable[Wanted], names: BaseNames) -> Located:
    """Return the same for paths with underscores for dots, all of one component."""
    located = Located()
    group = list(wanted)
    if not group:
        return located
    # The longest path has the fewest ends that are others' too.
    longest = max(group, key=lambda each: len(each.path))
    prefixes = dict.fromkeys(names.flat_endings(longest.path))
    options = []
    for prefix in prefixes:
        found = {each.path: names.unflatten(prefix, each.path) for each in group}
        options.append((sum(map(bool, found.values())), prefix, found))
    best = max((count for count, *_ in options), default=0)
    chosen = [option for option in options if option[0] == best]
    exact = [option for option in chosen if not option[1]]
    chosen = exact or _fitting(chosen, group, names)
    for each in group:
        hits = [name for _, _, found in chosen for name in found[each.path]]
        if len(hits) > 1:
            fitting = [name for name in hits if each.fits(names.shape(name))]
            hits = fitting if len(fitting) == 1 else hits
        _note(each.path, hits, names, located)
    return located


Option = tuple[int, str, dict[str, list[str]]]


def _fitting(options: list[Option], group: Sequence[Wanted], names: BaseNames) -> list[Option]:
    """Return the options in which every shape fits; all of them where that leaves none."""
    fitting = [
        option
        for option in options
        if all(
            any(each.fits(names.shape(name)) for name in option[2][each.path])
            for each in group
            if option[2][each.path]
        )
    ]
    return fitting or options


def _note(path: str, hits: Sequence[str], names: BaseNames, located: Located) -> None:
    if len(hits) == 1:
        located.names[path] = names.get(hits[0]) or hits[0]
    elif hits:
        located.ambiguous[path] = tuple(hits)
    else:
        located.missing.append(path)


def _locate_groups(wanted: list[Wanted], names: BaseNames, located: Located) -> None:
    """Locate by exchanged beginnings: all together, else by their first module, then the second."""
    pending = [(wanted, 0)]
    searches = 0
    while pending:
        group, depth = pending.pop(0)
        if not group:
            continue
        searches += 1
        if searches <= _MAX_GROUPS and _locate_group(group, names, located):
            continue
        parts: dict[str, list[Wanted]] = {}
        for each in group:
            segments = each.path.split(".")
            # Layers of a stack belong together; a number is no part of a model.
            whole = any(map(str.isdecimal, segments[: depth + 1])) or depth >= len(segments) - 2
            parts.setdefault("" if whole else segments[depth], []).append(each)
        if (len(parts) == 1 and "" in parts) or searches > _MAX_GROUPS:
            located.missing += [each.path for each in group if each.path not in located.ambiguous]
            continue
        pending += [(part, depth + 1) for part in parts.values()]


def _locate_group(group: Sequence[Wanted], names: BaseNames, located: Located) -> bool:
    """Return whether one exchange of beginnings finds every tensor of the group; note it."""
    shared = _shared_segments([each.path for each in group])
    for count in range(len(shared) + 1):
        inner = ".".join(shared[:count])
        rests = [each.path.removeprefix(f"{inner}.") if inner else each.path for each in group]
        longest = max(rests, key=len)
        numbered = any(part.isdecimal() for rest in rests for part in rest.split("."))
        outer = [
            prefix
            for prefix in dict.fromkeys(names.endings(longest))
            # Two different beginnings need more in common than a module's name.
            if (not inner or not prefix or numbered)
            and all(names.get(_joined(prefix, rest)) is not None for rest in rests)
        ]
        if not outer:
            continue
        fitting = [
            prefix
            for prefix in outer
            if all(
                each.fits(names.shape(_joined(prefix, rest)))
                for each, rest in zip(group, rests, strict=True)
            )
        ]
        chosen = fitting if len(fitting) == 1 else outer
        if len(chosen) > 1:
            for each, rest in zip(group, rests, strict=True):
                located.ambiguous[each.path] = tuple(_joined(prefix, rest) for prefix in chosen)
            return True
        for each, rest in zip(group, rests, strict=True):
            path = _joined(chosen[0], rest)
            located.names[each.path] = names.get(path) or path
        located.prefixes[inner] = chosen[0]
        return True
    return False


def _shared_segments(paths: Sequence[str]) -> list[str]:
    """Return the modules that all paths begin with, up to a layer's number, less the last two."""
    shared: list[str] = []
    split = [path.split(".") for path in paths]
    for segments in zip(*(each[:-2] for each in split), strict=False):
        if len(set(segments)) > 1 or segments[0].isdecimal():
            break
        shared.append(segments[0])
    return shared


def _end(path: str) -> str:
    return ".".join(path.rsplit(".", 2)[-2:])


def _joined(prefix: str, rest: str) -> str:
    return f"{prefix}.{rest}" if prefix else rest
