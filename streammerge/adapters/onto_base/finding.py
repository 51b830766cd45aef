"""Which tensor of a base every tensor of an adapter belongs to.

Looks at names and shapes only. Every tensor of the adapter has a place in the result, or the
adapter is refused with a list of those that have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from streammerge.adapters.files.components import split_component
from streammerge.adapters.files.forms import FormedModule
from streammerge.adapters.files.types import (
    Adapter,
    LayerKind,
    LowRankModule,
    Naming,
    ScalingVector,
    TokenRows,
    strip_wrappers,
)
from streammerge.adapters.onto_base.fitting import (
    form_fits,
    form_orientation,
    is_feedforward,
    layer_orientation,
    module_fits,
    scales_rows,
)
from streammerge.adapters.onto_base.heads import in_order_of, key_value_heads
from streammerge.adapters.onto_base.homes import Homes, ModuleHome, TokensHome, VectorHome
from streammerge.adapters.onto_base.layouts import Place, find_places
from streammerge.adapters.onto_base.locating import (
    BaseNames,
    Located,
    Shape,
    Wanted,
    flatten,
    locate,
    locate_flat,
)
from streammerge.adapters.onto_base.placing import overlaps, placed_homes, refuse_shared
from streammerge.adapters.onto_base.stacks import (
    Orientation,
    StackPart,
    square_is_transposed,
    stack_orientation,
    stack_parts,
)
from streammerge.adapters.onto_base.tying import find_tie, settle_tie, unknown_tie
from streammerge.checkpoint.ties import TIE_KEY
from streammerge.checkpoint.types import Checkpoint, TensorEntry
from streammerge.errors import (
    HeaderError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedAdapterError,
    printable,
    suggestion,
)

_SHOWN = 10
_OTHER_BASE = "the adapter was trained on another base: name the base that it was trained on"


def find_homes(adapter: Adapter, base: Checkpoint, *, where: str, shares_ties: bool) -> Homes:
    """Return which tensor of ``base`` every tensor of ``adapter`` belongs to.

    Names are taken as they are, else by the renamings of transformers 5, else with another
    beginning, if only one tensor can be meant and all shapes fit.

    Args:
        adapter: The adapter, read.
        base: The checkpoint whose weights it changes.
        where: The adapter's place in the recipe and its path, for messages.
        shares_ties: Whether tied embeddings stay one tensor whatever the adapter does to them; see
            :mod:`~streammerge.adapters.onto_base.tying`.

    Raises:
        HeaderError: Two tensors of the adapter belong to the same tensor of the base.
        MissingTensorError: Tensors have no home, or a bias that is added to is not there.
        ShapeMismatchError: A tensor has a home whose shape does not fit.
        UnsupportedAdapterError: Several tensors of the base could be meant, or what a tensor of the
            adapter changes cannot be known.
    """
    tie = find_tie(base)
    tensors = dict(base.tensors)
    if tie is not None and not tie.stored:
        tensors[tie.outer] = replace(tensors[tie.inner], name=tie.outer)
    finder = _Finder(adapter, base, tensors, where)
    homes = finder.find()
    if tie is not None and adapter.naming is Naming.MLX:
        refuse_shared(homes, (tie.inner, tie.outer), where=where)
    if tie is None:
        unknown = None if shares_ties else unknown_tie(homes, base)
        if unknown is not None:
            raise UnsupportedAdapterError(
                f"{where}: changes {printable(unknown)}, which may be one tensor with another "
                f"embedding: {base.directory / 'config.json'} does not say {TIE_KEY}: false, and "
                "which one that is in this kind of model is not known here; say so there, or set "
                "`rounding: peft` to change the tensor for both"
            )
        return homes
    if base.config is None and tie.outer not in {each.weight for each in homes.modules}:
        # Nothing tells that the model has an output.
        return homes
    saved = {name for name in (tie.inner, tie.outer) if finder.is_saved(name)}
    ensured = adapter.config.ensure_weight_tying
    return settle_tie(homes, tie, saved=saved, ensured=ensured, shares=shares_ties)


class _Finder:
    """One search: the adapter, the base, and what was found so far."""

    def __init__(
        self, adapter: Adapter, base: Checkpoint, tensors: Mapping[str, TensorEntry], where: str
    ) -> None:
        self._adapter = adapter
        self._base = base
        self._tensors = tensors
        self._where = where
        self._names = BaseNames(tensors)
        self._found: dict[str, str] = {}
        self._effective: dict[str, Shape] = {}
        self._saved: set[str] = set()
        self._places: dict[str, tuple[Place, ...]] = {}

    def is_saved(self, name: str) -> bool:
        """Return whether a tensor of the base was trained whole (``modules_to_save``)."""
        return name in self._saved

    def find(self) -> Homes:
        adapter = self._adapter
        self._places = dict(self._iter_places())
        wanted = [each for each in self._wanted() if each.path not in self._places]
        missing = self._locate(wanted)
        added: dict[str, TensorEntry] = {}
        for path in list(missing):
            if path in adapter.saved:
                added[path] = adapter.saved[path]
                missing.remove(path)
        if missing:
            raise self._homeless(missing)
        replaced = self._replaced(added)
        self._saved = {*added, *(self._home(path) for path in adapter.saved if path not in added)}
        self._effective = {name: entry.shape for name, entry in replaced.items()}
        modules = [home for module in adapter.modules for home in self._module_homes(module)]
        for formed in adapter.formed:
            placed = formed.weight_name in self._places
            modules += self._placed_homes(formed) if placed else [self._formed_home(formed)]
        vectors = tuple(map(self._vector_home, adapter.vectors))
        tokens = tuple(map(self._tokens_home, adapter.tokens))
        homes = Homes(
            modules=tuple(modules),
            vectors=vectors,
            tokens=tokens,
            replaced=MappingProxyType(replaced),
            added=MappingProxyType(added),
            untied=MappingProxyType({}),
        )
        self._check_distinct(homes)
        return homes

    def _wanted(self) -> Iterable[Wanted]:
        adapter = self._adapter
        for module in adapter.modules:
            if module.layer is LayerKind.EXPERTS:
                for part in self._parts(module):
                    yield Wanted(part.path, partial(_part_fits, module, part))
                continue
            resized = module.weight_name in adapter.replaced
            fits = _anything if resized else partial(module_fits, module)
            yield Wanted(module.weight_name, fits)
        for formed in adapter.formed:
            yield Wanted(formed.weight_name, partial(form_fits, formed))
        for vector in adapter.vectors:
            yield Wanted(_weight_of(vector.stem), _anything)
        for tokens in adapter.tokens:
            yield Wanted(_weight_of(tokens.stem), _anything)
        for table in (adapter.replaced, adapter.biases, adapter.saved):
            for name in table:
                yield Wanted(name, _anything)

    def _iter_places(self) -> Iterator[tuple[str, tuple[Place, ...]]]:
        """Yield the modules that the base names or cuts in another way, and where their rows belong."""
        naming = self._adapter.naming
        groups = key_value_heads(self._base.config)
        names = [module.weight_name for module in self._adapter.modules]
        names += [module.weight_name for module in self._adapter.formed]
        for name in names:
            path = split_component(name, naming)[1]
            if self._names.get(path) is None and (
                places := find_places(path, self._names, groups=groups)
            ):
                yield name, places

    @property
    def _is_flat(self) -> bool:
        return self._adapter.naming is Naming.KOHYA

    def _locate(self, wanted: list[Wanted]) -> list[str]:
        """Note what is found, and return the paths that are not."""
        unique = list({each.path: each for each in wanted}.values())
        located = self._locate_flat(unique) if self._is_flat else locate(unique, self._names)
        for path, hits in sorted(located.ambiguous.items()):
            raise UnsupportedAdapterError(
                f"{self._where}: {printable(path)} could be {len(hits)} tensors of the base "
                f"{self._base.path}: {_listed(hits)}; name a base that has one of them, or rename "
                "the adapter's tensors after the base's"
            )
        self._found = located.names
        return located.missing

    def _locate_flat(self, wanted: Iterable[Wanted]) -> Located:
        """Locate names with underscores for dots, those of each part of a pipeline by themselves."""
        parts: dict[str, dict[str, Wanted]] = {}
        for each in wanted:
            part, path = split_component(each.path, Naming.KOHYA)
            flat = flatten(path)
            parts.setdefault(part, {})[flat] = Wanted(each.path, each.fits)
        every = Located()
        for by_path in parts.values():
            flats = [Wanted(flat, each.fits) for flat, each in by_path.items()]
            located = locate_flat(flats, self._names)
            names = {flat: each.path for flat, each in by_path.items()}
            every.names |= {names[flat]: home for flat, home in located.names.items()}
            every.ambiguous |= {names[flat]: hits for flat, hits in located.ambiguous.items()}
            every.missing += [names[flat] for flat in located.missing]
        return every

    def _home(self, path: str) -> str:
        return self._found[path]

    def _shape(self, name: str) -> Shape:
        """Return the shape of a tensor, as the adapter leaves it before its factors are added."""
        return self._effective.get(name) or self._tensors[name].shape

    def _module_homes(self, module: LowRankModule) -> Iterable[ModuleHome]:
        if module.weight_name in self._places:
            return self._placed_homes(module)
        if module.layer is not LayerKind.EXPERTS:
            return (self._plain_home(module),)
        return [self._stack_home(module, part) for part in self._parts(module)]

    def _parts(self, module: LowRankModule) -> Sequence[StackPart]:
        if not module.parameter:
            config = self._adapter.config
            raise UnsupportedAdapterError(
                f"{self._where}: the file does not say which of target_parameters "
                f"({_listed(config.target_parameters)}) {printable(module.stem)} belongs to; save "
                "an adapter for each of them"
            )
        return stack_parts(module, self._names)

    def _stack_home(self, module: LowRankModule, part: StackPart) -> ModuleHome:
        weight = self._home(part.path)
        shape = self._shape(weight)
        beyond = weight.replace(f".{part.expert}.", f".{module.experts}.")
        if part.expert == module.experts - 1 and beyond in self._tensors:
            raise ShapeMismatchError(
                f"{self._where}: {printable(module.stem)} adapts {module.experts} experts, the base "
                f"has {printable(beyond)} too; {_OTHER_BASE}"
            )
        orientation = stack_orientation(module, part, shape)
        if orientation is None:
            raise ShapeMismatchError(
                f"{self._where}: {printable(module.stem)} adapts {module.experts} matrices of "
                f"{[module.out_features, module.in_features]}, the base's {printable(weight)} is "
                f"{list(shape)}; {_OTHER_BASE}"
            )
        transposed: bool | None = orientation is Orientation.TRANSPOSED
        if orientation is Orientation.EITHER:
            config = self._base.config or {}
            version = self._adapter.config.peft_version
            transposed = square_is_transposed(config.get("model_type"), version)
        if transposed is None:
            raise UnsupportedAdapterError(
                f"{self._where}: {printable(module.stem)} adapts square matrices, and without "
                "peft_version in the adapter's configuration nothing tells which way round; add it"
            )
        return ModuleHome(
            module=module,
            weight=weight,
            transposed=transposed,
            expert=part.expert,
            experts=module.experts,
            first_row=part.place * shape[-2],
            bias=None,
        )

    def _plain_home(self, module: LowRankModule) -> ModuleHome:
        weight = self._home(module.weight_name)
        shape = self._shape(weight)
        transposed = layer_orientation(
            module, shape, fan_in_fan_out=self._adapter.config.fan_in_fan_out
        )
        if transposed is None:
            product = [module.out_features, *module.down.shape[1:]]
            raise ShapeMismatchError(
                f"{self._where}: {printable(module.stem)}: B @ A is {product}, the base's "
                f"{printable(weight)} is {list(shape)}; {_OTHER_BASE}"
            )
        return ModuleHome(
            module=module,
            weight=weight,
            transposed=transposed,
            expert=None,
            experts=1,
            first_row=0,
            bias=None if module.bias is None else self._bias(module, weight),
        )

    def _placed_homes(self, module: LowRankModule | FormedModule) -> list[ModuleHome]:
        if self._adapter.naming is Naming.TORCHTUNE and isinstance(module, FormedModule):
            module = in_order_of(module, self._base.config, where=self._where)
        places = self._places[module.weight_name]
        shapes = {place.weight: self._shape(place.weight) for place in places}
        homes = placed_homes(module, places, shapes, where=self._where)
        for home in homes:
            if home.bias is not None and home.bias not in self._tensors:
                raise self._no_bias(module, home.bias)
        return homes

    def _formed_home(self, module: FormedModule) -> ModuleHome:
        weight = self._home(module.weight_name)
        shape = self._shape(weight)
        fan_in_fan_out = self._adapter.config.fan_in_fan_out
        transposed = form_orientation(module, shape, fan_in_fan_out=fan_in_fan_out)
        if transposed is None:
            raise ShapeMismatchError(
                f"{self._where}: {printable(module.stem)}: the change ({module.form}) is "
                f"{[module.outer or 'any', module.columns or 'any']}, the base's {printable(weight)} is "
                f"{list(shape)}; {_OTHER_BASE}"
            )
        return ModuleHome(
            module=module,
            weight=weight,
            transposed=transposed,
            expert=None,
            experts=1,
            first_row=0,
            bias=None,
        )

    def _bias(self, module: LowRankModule, weight: str) -> str:
        name = f"{weight.removesuffix('.weight')}.bias"
        entry = self._tensors.get(name)
        if entry is None:
            raise self._no_bias(module, name)
        if entry.numel != module.out_features:
            raise ShapeMismatchError(
                f"{self._where}: {printable(module.stem)}: its bias has {module.out_features} "
                f"elements, the base's {printable(name)} is {list(entry.shape)}; {_OTHER_BASE}"
            )
        return name

    def _no_bias(self, module: LowRankModule | FormedModule, name: str) -> MissingTensorError:
        return MissingTensorError(
            f"{self._where}: {printable(module.stem)} has a bias to add (lora_bias), the base "
            f"{self._base.path} has no {printable(name)}; {_OTHER_BASE}"
        )

    def _vector_home(self, vector: ScalingVector) -> VectorHome:
        """Return the home of a vector.

        Follows: peft.tuners.ia3.layer 0.21.2. A feedforward module's inputs are multiplied, any
        other's outputs and with them its bias.
        """
        weight = self._home(_weight_of(vector.stem))
        shape = self._shape(weight)
        feedforward = is_feedforward(vector, self._adapter.config, where=self._where)
        along_rows = scales_rows(
            vector,
            shape,
            feedforward=feedforward,
            fan_in_fan_out=self._adapter.config.fan_in_fan_out,
        )
        if along_rows is None:
            raise ShapeMismatchError(
                f"{self._where}: {printable(vector.vector.name)} is {list(vector.vector.shape)}, "
                f"the base's {printable(weight)} is {list(shape)}; {_OTHER_BASE}"
            )
        bias = f"{weight.removesuffix('.weight')}.bias"
        bias_there = not feedforward and bias in self._tensors
        return VectorHome(vector, weight, along_rows, bias if bias_there else None)

    def _tokens_home(self, tokens: TokenRows) -> TokensHome:
        weight = self._home(_weight_of(tokens.stem))
        shape = self._shape(weight)
        if len(shape) != 2 or shape[1] != tokens.rows.shape[1]:
            raise ShapeMismatchError(
                f"{self._where}: {printable(tokens.rows.name)} is {list(tokens.rows.shape)}, the "
                f"base's {printable(weight)} is {list(shape)}; {_OTHER_BASE}"
            )
        if max(tokens.indices, default=0) >= shape[0]:
            raise ShapeMismatchError(
                f"{self._where}: {printable(tokens.rows.name)} has a row for token "
                f"{max(tokens.indices)}, the base's {printable(weight)} has {shape[0]} rows; "
                f"{_OTHER_BASE}"
            )
        return TokensHome(tokens, weight)

    def _replaced(self, added: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        adapter = self._adapter
        replaced: dict[str, TensorEntry] = {}
        for table in (adapter.replaced, adapter.biases, adapter.saved):
            for path, entry in table.items():
                if path in added:
                    continue
                taken = replaced.setdefault(self._home(path), entry)
                if taken is not entry:
                    raise self._shared(self._home(path), [taken.name, entry.name])
        return replaced

    def _check_distinct(self, homes: Homes) -> None:
        """Raise if two tensors of the adapter change the same tensor of the base."""
        takers: dict[str, list[str]] = {}
        by_weight: dict[str, list[ModuleHome]] = {}
        for module in homes.modules:
            by_weight.setdefault(module.weight, []).append(module)
        for module in homes.modules:
            if module.rows is None or overlaps(module, by_weight[module.weight]):
                takers.setdefault(module.weight, []).append(module.module.stem)
        for vector in homes.vectors:
            takers.setdefault(vector.weight, []).append(vector.vector.stem)
        for tokens in homes.tokens:
            takers.setdefault(tokens.weight, []).append(tokens.tokens.stem)
        for name, stems in takers.items():
            if len(stems) > 1:
                raise self._shared(name, stems)

    def _shared(self, name: str, takers: Iterable[str]) -> HeaderError:
        return HeaderError(
            f"{self._where}: {_listed(takers)} both belong to {printable(name)} of the base "
            f"{self._base.path}; keep one of them"
        )

    def _homeless(self, missing: list[str]) -> MissingTensorError:
        nearest = suggestion(missing[0], self._tensors) if len(missing[0]) < 200 else ""
        naming = self._adapter.naming
        stray = {split_component(path, naming)[0] for path in missing}
        parts = {split_component(stem, naming)[0] for stem in self._adapter.stems}
        found = sorted(parts - stray)
        advice = f"take one part of it with `component: {found[0]}`" if found else _OTHER_BASE
        return MissingTensorError(
            f"{self._where}: {len(missing)} tensor(s) that the adapter changes are not in the base "
            f"{self._base.path}: {_listed(missing)}{nearest}; {advice}"
        )


def _part_fits(module: LowRankModule, part: StackPart, shape: Shape) -> bool:
    return stack_orientation(module, part, shape) is not None


def _weight_of(stem: str) -> str:
    return f"{strip_wrappers(stem)}.weight"


def _anything(_: Shape) -> bool:
    return True


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    shown = ", ".join(map(printable, every[:_SHOWN]))
    return f"{shown} and {len(every) - _SHOWN} more" if len(every) > _SHOWN else shown
