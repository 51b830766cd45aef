"""Tensors of an adapter's file put together to modules, each checked against the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streammerge.adapters.files.naming import Parsed
from streammerge.adapters.files.patterns import Lookup, build_lookup, check_path, matches_targets
from streammerge.adapters.files.roles import Role
from streammerge.adapters.files.types import AdapterConfig, LayerKind, LowRankModule, strip_wrappers
from streammerge.adapters.files.wrapping import wrapped_parameters
from streammerge.checkpoint.types import TensorEntry
from streammerge.errors import (
    HeaderError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedAdapterError,
)

_UNGATHERED = (
    "which is what a save under DeepSpeed ZeRO-3 or FSDP leaves when the shards were not gathered; "
    "save the adapter again with its parameters gathered"
)
Parts = dict[Role, TensorEntry]


@dataclass(slots=True)
class Sorted:
    """The tensors of a file by module and role, while it is read."""

    parts: dict[str, Parts] = field(default_factory=dict)
    """Factors and vectors by stem."""
    whole: dict[str, tuple[Role, TensorEntry]] = field(default_factory=dict)
    """Tensors of the base by their name there: saved modules, replaced tensors, plain names."""

    def add(self, parsed: Parsed, entry: TensorEntry, *, where: str) -> None:
        """Put a tensor where it belongs.

        Raises:
            HeaderError: Another tensor is there already.
        """
        if parsed.role in (Role.BASE, Role.SAVED, Role.PLAIN):
            taken = self.whole.setdefault(parsed.stem, (parsed.role, entry))[1]
        else:
            taken = self.parts.setdefault(parsed.stem, {}).setdefault(parsed.role, entry)
        if taken is not entry:
            raise HeaderError(
                f"{where}: {taken.name!r} and {entry.name!r} are both the {parsed.role} of "
                f"{parsed.stem}; keep one of them"
            )


class ModuleBuilder:
    """Makes modules from their tensors, by the ranks and alphas of one configuration."""

    def __init__(
        self,
        config: AdapterConfig,
        *,
        where: str,
        config_where: str,
        prefix: str = "",
        alphas: Mapping[str, float] | None = None,
    ) -> None:
        """Prepare the lookups.

        Args:
            config: The adapter's configuration.
            where: The file with the tensors, for messages.
            config_where: The file with the configuration, for messages.
            prefix: What stands before every module's path in the file, and in no configuration.
            alphas: For files without a configuration, alpha by stem; where there is none, the
                scaling is 1, and ranks are what they are. None goes by the configuration.
        """
        self._config = config
        self._where = where
        self._config_where = config_where
        self._prefix = prefix
        self._alphas = alphas
        self._rank: Lookup = build_lookup(
            config.rank_pattern, config.rank, where=f"{config_where}: rank_pattern"
        )
        self._alpha: Lookup = build_lookup(
            config.alpha_pattern, config.alpha, where=f"{config_where}: alpha_pattern"
        )

    def build(self, stem: str, parts: Parts, depths: Sequence[int]) -> LowRankModule:
        """Return the module whose tensors these are.

        Args:
            stem: Its path in the file.
            parts: Its tensors.
            depths: How deep the wrappers of the same module lie, this one among them.

        Raises:
            MissingTensorError: A factor is not there.
            ShapeMismatchError: Shapes contradict each other or the configured rank.
            UnsupportedAdapterError: Its layer is of a kind without a merge.
        """
        check_path(stem, where=self._where)
        down, up, is_embedding = self._factors(stem, parts)
        for entry in (down, up):
            _check_gathered(entry, self._where)
        layer = self._layer(stem, down, is_embedding=is_embedding)
        parameters = ["weight"]
        if layer is LayerKind.EXPERTS:
            parameters = wrapped_parameters(stem, depths, self._config.target_parameters)
            if not parameters:
                raise HeaderError(
                    f"{self._where}: {down.name!r}: neither target_modules nor target_parameters of "
                    f"{self._config_where} name {stem}; the two files do not belong together"
                )
        _check_factors(stem, down, up, self._where)
        rank = down.shape[0]
        configured, alpha = self._configured(
            stem, parameters, rank, stacked=layer is LayerKind.EXPERTS
        )
        if layer is not LayerKind.EXPERTS and configured != rank:
            raise ShapeMismatchError(
                f"{self._where}: {down.name!r} has rank {rank}, {self._config_where} says "
                f"{configured}; the two files do not belong together, or rank_pattern is missing "
                "or wrong"
            )
        if layer is LayerKind.EXPERTS and rank % configured:
            raise ShapeMismatchError(
                f"{self._where}: {down.name!r} has {rank} rows, which is no multiple of the rank "
                f"{configured} that {self._config_where} says"
            )
        self._check_extras(stem, down, up, parts, layer)
        divisor = math.sqrt(configured) if self._config.use_rslora else configured
        return LowRankModule(
            stem=stem,
            layer=layer,
            down=down,
            up=up,
            bias=parts.get(Role.UP_BIAS),
            magnitude=parts.get(Role.MAGNITUDE),
            magnitude_of_inputs=_is_per_input(parts.get(Role.MAGNITUDE), down, up),
            rank=rank,
            alpha=alpha,
            scaling=alpha / divisor,
            parameter=parameters[0] if len(parameters) == 1 else "",
            experts=rank // configured if layer is LayerKind.EXPERTS else 1,
        )

    def _factors(self, stem: str, parts: Parts) -> tuple[TensorEntry, TensorEntry, bool]:
        pairs = [
            (parts.get(down), parts.get(up), down, up)
            for down, up in (
                (Role.DOWN, Role.UP),
                (Role.EMBEDDING_DOWN, Role.EMBEDDING_UP),
            )
        ]
        given = [pair for pair in pairs if pair[0] is not None or pair[1] is not None]
        if len(given) == 1:
            down, up, *_ = given[0]
            if down is not None and up is not None:
                return down, up, given[0] is pairs[1]
        present = ", ".join(sorted(repr(entry.name) for entry in parts.values()))
        raise MissingTensorError(
            f"{self._where}: module {stem} needs one pair of factors A and B, it has {present}; "
            "the file is incomplete, save it again"
        )

    def _layer(self, stem: str, down: TensorEntry, *, is_embedding: bool) -> LayerKind:
        if is_embedding:
            return LayerKind.EMBEDDING
        config = self._config
        if config.target_parameters and not matches_targets(
            config.target_modules,
            strip_wrappers(stem),
            where=f"{self._config_where}: target_modules",
        ):
            return LayerKind.EXPERTS
        return LayerKind.CONVOLUTION if len(down.shape) > 2 else LayerKind.LINEAR

    def _configured(
        self, stem: str, parameters: list[str], rank: int, *, stacked: bool
    ) -> tuple[int, float]:
        """Return the configured rank, per expert for a stack of them, and alpha."""
        if self._alphas is not None:
            return rank, self._alphas.get(stem, float(rank))
        path = strip_wrappers(stem).removeprefix(self._prefix)
        # PEFT looks up the path of the module, or of the parameter.
        paths = [f"{path}.{name}" for name in parameters] if stacked else [path]
        found = {(int(self._rank(each)), self._alpha(each)) for each in paths}
        if len(found) != 1:
            raise UnsupportedAdapterError(
                f"{self._config_where}: rank_pattern and alpha_pattern differ among the "
                f"target_parameters of {path}, and the file does not say which is which; save the "
                "adapter with one rank and alpha for them"
            )
        return found.pop()

    def _check_extras(
        self, stem: str, down: TensorEntry, up: TensorEntry, parts: Parts, layer: LayerKind
    ) -> None:
        """Return if bias and magnitude are there exactly when the configuration says so."""
        expected = {
            Role.UP_BIAS: ("lora_bias", self._config.lora_bias),
            Role.MAGNITUDE: ("use_dora", self._config.use_dora),
        }
        for role, (key, configured) in expected.items():
            entry = parts.get(role)
            # A raw file says it of each module by itself.
            if (entry is not None) == configured or self._alphas is not None:
                if entry is not None:
                    _check_gathered(entry, self._where, dimensions=1)
                    per_input = role is Role.MAGNITUDE and _is_per_input(entry, down, up)
                    if layer is not LayerKind.EXPERTS and not (
                        entry.numel == up.shape[0] or per_input
                    ):
                        raise ShapeMismatchError(
                            f"{self._where}: {entry.name!r} has {entry.numel} elements, the "
                            f"module has {up.shape[0]} outputs"
                        )
                continue
            if layer is LayerKind.EMBEDDING and role is Role.UP_BIAS:
                continue
            there = f"holds {entry.name!r}" if entry is not None else f"holds no {role} of {stem}"
            raise MissingTensorError(
                f"{self._where}: {there}, but {self._config_where} says {key}: "
                f"{str(configured).lower()}; the two files do not belong together"
            )


def _is_per_input(magnitude: TensorEntry | None, down: TensorEntry, up: TensorEntry) -> bool:
    """Return whether DoRA's magnitudes are those of inputs, as LyCORIS had it: ``[1, in, 1, ...]``.

    PEFT's are those of outputs, and for convolutions of the shape ``[1, out, 1, ...]``.
    """
    if magnitude is None or not magnitude.name.endswith(".dora_scale"):
        return False
    shape = magnitude.shape
    return len(shape) > 1 and shape[0] == 1 != up.shape[0] and magnitude.numel == down.shape[1]


def _check_gathered(entry: TensorEntry, where: str, *, dimensions: int = 2) -> None:
    if entry.numel == 0 or len(entry.shape) < dimensions:
        raise ShapeMismatchError(
            f"{where}: {entry.name!r} has shape {list(entry.shape)}, {_UNGATHERED}"
        )
    if not entry.dtype.is_float:
        raise UnsupportedAdapterError(
            f"{where}: {entry.name!r} is of dtype {entry.dtype}: the adapter is quantised; "
            "dequantise it first"
        )


def _check_factors(stem: str, down: TensorEntry, up: TensorEntry, where: str) -> None:
    rank, inner = down.shape[0], up.shape[1]
    if len(down.shape) == len(up.shape) and rank == inner and set(up.shape[2:]) <= {1}:
        return
    if len(down.shape) == len(up.shape) > 2 and inner < rank and rank % inner == 0:
        raise UnsupportedAdapterError(
            f"{where}: {stem} is a grouped convolution ({rank // inner} groups), which has no low "
            "rank over all its channels; merge the adapter with PEFT or leave the layer out"
        )
    raise ShapeMismatchError(
        f"{where}: the factors of {stem} do not fit: A is {list(down.shape)}, B is "
        f"{list(up.shape)}; copy or save the file again"
    )
