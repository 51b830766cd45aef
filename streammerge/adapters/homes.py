"""Which tensor of a base every tensor of an adapter belongs to.

Looks at names and shapes only. Every tensor of the adapter has a place in the result, or the
adapter is refused with a list of those that have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from types import MappingProxyType

from streammerge.adapters.locating import BaseNames, Shape, Wanted, locate, locate_flat
from streammerge.adapters.patterns import matches_targets
from streammerge.adapters.types import (
    Adapter,
    AdapterConfig,
    LayerKind,
    LowRankModule,
    Naming,
    ScalingVector,
    TokenRows,
    strip_wrappers,
)
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


@dataclass(frozen=True, slots=True)
class ModuleHome:
    """Where the product of a low-rank module, or a part of it, is added."""

    module: LowRankModule
    """The module."""
    weight: str
    """Name of the base's tensor that the product is added to."""
    transposed: bool
    """Whether the base stores ``[in, out]``: ``fan_in_fan_out``, and embeddings
    (``[vocabulary, dimension]``)."""
    expert: int | None
    """For a stack of experts whose base stores one tensor per expert: which one. None otherwise: a
    plain module, or a base that stores the whole stack ``[experts, ...]``."""
    experts: int
    """Number of experts in the stack; 1 for a plain module."""
    first_row: int
    """Row of ``B @ A``, per expert, that is this tensor's first row: not 0 where gate and up
    projection are fused in the adapter and apart in the base."""
    bias: str | None
    """The base's tensor that ``lora_bias`` is added to; None without ``lora_bias``."""


@dataclass(frozen=True, slots=True)
class VectorHome:
    """What a vector of IA3 multiplies."""

    vector: ScalingVector
    """The vector."""
    weight: str
    """Name of the base's tensor."""
    along_rows: bool
    """Whether row i of the stored matrix is multiplied by element i; else column j by element j."""
    bias: str | None
    """The bias that is multiplied too: of a module that is no feedforward one, where the base has
    one."""


@dataclass(frozen=True, slots=True)
class TokensHome:
    """The embedding that rows belong to."""

    tokens: TokenRows
    """The rows."""
    weight: str
    """Name of the base's tensor."""


@dataclass(frozen=True, slots=True)
class Homes:
    """The place of every tensor of an adapter in a base."""

    modules: tuple[ModuleHome, ...]
    """Homes of low-rank modules; several of one module where the base has its matrix in parts."""
    vectors: tuple[VectorHome, ...]
    """Homes of IA3's vectors."""
    tokens: tuple[TokensHome, ...]
    """Homes of rows of embeddings."""
    replaced: Mapping[str, TensorEntry]
    """The adapter's tensor by the base's that it takes the place of: modules trained whole,
    embeddings, trained biases. Shapes may differ from the base's."""
    added: Mapping[str, TensorEntry]
    """Tensors that the base lacks and the adapter brings, such as a new head."""
    untied: Mapping[str, str]
    """Output that the base's files lack because it is tied, with the base's tensor that it equals:
    ``lm_head.weight`` with ``model.embed_tokens.weight``."""


def find_homes(adapter: Adapter, base: Checkpoint, *, where: str) -> Homes:
    """Return which tensor of ``base`` every tensor of ``adapter`` belongs to.

    Names are taken as they are, else by the renamings of transformers 5, else with another
    beginning, if only one tensor can be meant and all shapes fit.

    Args:
        adapter: The adapter, read.
        base: The checkpoint whose weights it changes.
        where: The adapter's place in the recipe and its path, for messages.

    Raises:
        HeaderError: Two tensors of the adapter belong to the same tensor of the base.
        MissingTensorError: Tensors have no home, or a bias that is added to is not there.
        ShapeMismatchError: A tensor has a home whose shape does not fit.
        UnsupportedAdapterError: Several tensors of the base could be meant.
    """
    return _Finder(adapter, base, where).find()


class _Finder:
    """One search: the adapter, the base, and what was found so far."""

    def __init__(self, adapter: Adapter, base: Checkpoint, where: str) -> None:
        self._adapter = adapter
        self._base = base
        self._where = where
        self._names = BaseNames(base.tensors)
        self._found: dict[str, str] = {}
        self._effective: dict[str, Shape] = {}

    def find(self) -> Homes:
        adapter = self._adapter
        wanted = list(self._wanted())
        missing = self._locate(wanted)
        added: dict[str, TensorEntry] = {}
        for path in list(missing):
            if path in adapter.saved:
                added[path] = adapter.saved[path]
                missing.remove(path)
        if missing:
            raise self._homeless(missing)
        replaced = self._replaced(added)
        self._effective = {name: entry.shape for name, entry in replaced.items()}
        modules = tuple(
            self._plain_home(module)
            for module in adapter.modules
            if module.layer is not LayerKind.EXPERTS
        )
        vectors = tuple(map(self._vector_home, adapter.vectors))
        tokens = tuple(map(self._tokens_home, adapter.tokens))
        homes = Homes(
            modules=modules,
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
            if module.layer is not LayerKind.EXPERTS:
                path = module.name if self._is_flat else module.weight_name
                resized = module.weight_name in adapter.replaced
                yield Wanted(path, _anything if resized else partial(_module_fits, module))
        for vector in adapter.vectors:
            yield Wanted(_weight_of(vector.stem), _anything)
        for tokens in adapter.tokens:
            yield Wanted(_weight_of(tokens.stem), _anything)
        for table in (adapter.replaced, adapter.biases, adapter.saved):
            for name in table:
                yield Wanted(name, _anything)

    @property
    def _is_flat(self) -> bool:
        return self._adapter.naming is Naming.KOHYA

    def _locate(self, wanted: list[Wanted]) -> list[str]:
        """Note what is found, and return the paths that are not."""
        unique = list({each.path: each for each in wanted}.values())
        if self._is_flat:
            located = locate_flat(
                [Wanted(f"{each.path}_weight", each.fits) for each in unique], self._names
            )
        else:
            located = locate(unique, self._names)
        for path, hits in sorted(located.ambiguous.items()):
            raise UnsupportedAdapterError(
                f"{self._where}: {printable(path)} could be {len(hits)} tensors of the base "
                f"{self._base.path}: {_listed(hits)}; name a base that has one of them, or rename "
                "the adapter's tensors after the base's"
            )
        self._found = located.names
        return located.missing

    def _home(self, path: str) -> str:
        return self._found[f"{path}_weight" if self._is_flat else path]

    def _shape(self, name: str) -> Shape:
        """Return the shape of a tensor, as the adapter leaves it before its factors are added."""
        return self._effective.get(name) or self._base.tensors[name].shape

    def _plain_home(self, module: LowRankModule) -> ModuleHome:
        weight = self._home(module.name if self._is_flat else module.weight_name)
        shape = self._shape(weight)
        transposed = _orientation(module, shape, fan_in_fan_out=self._adapter.config.fan_in_fan_out)
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

    def _bias(self, module: LowRankModule, weight: str) -> str:
        name = f"{weight.removesuffix('.weight')}.bias"
        entry = self._base.tensors.get(name)
        if entry is None:
            raise MissingTensorError(
                f"{self._where}: {printable(module.stem)} has a bias to add (lora_bias), the base "
                f"{self._base.path} has no {printable(name)}; {_OTHER_BASE}"
            )
        if entry.numel != module.out_features:
            raise ShapeMismatchError(
                f"{self._where}: {printable(module.stem)}: its bias has {module.out_features} "
                f"elements, the base's {printable(name)} is {list(entry.shape)}; {_OTHER_BASE}"
            )
        return name

    def _vector_home(self, vector: ScalingVector) -> VectorHome:
        """Return the home of a vector.

        Follows: peft.tuners.ia3.layer 0.21.2. A feedforward module's inputs are multiplied, any
        other's outputs and with them its bias.
        """
        weight = self._home(_weight_of(vector.stem))
        shape = self._shape(weight)
        feedforward = _is_feedforward(vector, self._adapter.config, where=self._where)
        along_rows = _along_rows(
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
        bias_there = not feedforward and bias in self._base.tensors
        return VectorHome(vector, weight, along_rows, bias if bias_there else None)

    def _tokens_home(self, tokens: TokenRows) -> TokensHome:
        weight = self._home(_weight_of(tokens.stem))
        shape = self._shape(weight)
        if len(shape) != 2 or shape[1] != tokens.rows.shape[1]:
            raise ShapeMismatchError(
                f"{self._where}: {printable(tokens.rows.name)} is {list(tokens.rows.shape)}, the "
                f"base's {printable(weight)} is {list(shape)}; {_OTHER_BASE}"
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
        for module in homes.modules:
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
        nearest = suggestion(missing[0], self._base.tensors) if len(missing[0]) < 200 else ""
        return MissingTensorError(
            f"{self._where}: {len(missing)} tensor(s) that the adapter changes are not in the base "
            f"{self._base.path}: {_listed(missing)}{nearest}; {_OTHER_BASE}"
        )


def _module_fits(module: LowRankModule, shape: Shape) -> bool:
    return _orientation(module, shape, fan_in_fan_out=False) is not None


def _orientation(module: LowRankModule, shape: Shape, *, fan_in_fan_out: bool) -> bool | None:
    """Return whether the base stores a module's weight ``[in, out]``; None where it does not fit."""
    if len(shape) < 2:
        return None
    inner = module.down.shape[1:]
    plain = shape[0] == module.out_features and _same_kernel(shape[1:], inner)
    swapped = len(shape) == 2 and shape == (module.in_features, module.out_features)
    if module.layer is LayerKind.EMBEDDING:
        return True if swapped else None
    if plain and swapped:
        return fan_in_fan_out and module.layer is LayerKind.LINEAR
    if plain:
        return False
    return True if swapped and module.layer is LayerKind.LINEAR else None


def _is_feedforward(vector: ScalingVector, config: AdapterConfig, *, where: str) -> bool:
    """Return whether a vector multiplies the inputs of its module."""
    shape = vector.vector.shape
    if len(shape) == 2 and 1 in shape and shape != (1, 1):
        return shape[0] == 1
    # Convolutions have [1, features, 1, ...] either way; PEFT goes by the ends of names alone.
    targets = config.feedforward_modules or ()
    path = strip_wrappers(vector.stem)
    if isinstance(targets, str):
        return matches_targets(targets, path, where=f"{where}: feedforward_modules")
    return path.endswith(targets)


def _along_rows(
    vector: ScalingVector, shape: Shape, *, feedforward: bool, fan_in_fan_out: bool
) -> bool | None:
    """Return whether rows of the stored matrix are multiplied; None where the vector fits none."""
    count = vector.vector.numel
    if len(shape) < 2 or (len(vector.vector.shape) > 2) != (len(shape) > 2):
        return None
    # Only layers of two dimensions are ever stored [in, out].
    along_rows = feedforward == (fan_in_fan_out and len(shape) == 2)
    if shape[0 if along_rows else 1] == count:
        return along_rows
    return not along_rows if len(shape) == 2 and shape[1 if along_rows else 0] == count else None


def _same_kernel(stored: Shape, trained: Shape) -> bool:
    """Return whether two ``[in, *kernel]`` agree; kernels of one element may be left out."""
    return stored[0] == trained[0] and (
        stored == trained or (prod(stored[1:]) == 1 and prod(trained[1:]) == 1)
    )


def _weight_of(stem: str) -> str:
    return f"{strip_wrappers(stem)}.weight"


def _anything(_: Shape) -> bool:
    return True


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    shown = ", ".join(map(printable, every[:_SHOWN]))
    return f"{shown} and {len(every) - _SHOWN} more" if len(every) > _SHOWN else shown


__all__ = ["Homes", "ModuleHome", "TokensHome", "VectorHome", "find_homes"]
