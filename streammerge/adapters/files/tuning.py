"""Modules of PEFT's other kinds of adapters put together from their tensors, each checked.

Follows: peft 0.21.2, ``get_delta_weight`` and ``merge`` of the layers of LoHa, LoKr, OFT, BOFT, HRA,
VeRA and VB-LoRA. Differs from PEFT: VeRA's shared matrices are never drawn anew, since another
build of torch may draw others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from streammerge.adapters.files.forming import FormBuilder, Parts
from streammerge.adapters.files.forms import Form, FormedModule
from streammerge.adapters.files.naming import SHARED_STEM
from streammerge.adapters.files.patterns import build_lookup, check_path
from streammerge.adapters.files.roles import Role
from streammerge.adapters.files.types import AdapterConfig, AdapterKind, strip_wrappers
from streammerge.checkpoint.types import TensorEntry
from streammerge.errors import (
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedAdapterError,
)

TUNED_KINDS = frozenset({*AdapterKind} - {AdapterKind.LORA, AdapterKind.IA3})
"""Kinds whose modules are made here."""
MAX_ROTATION = 2**14
"""Rows of a rotation: it has as many columns, and works on that many elements at once."""


def build_tuned(
    config: AdapterConfig, parts: dict[str, Parts], *, where: str, config_where: str
) -> Iterator[FormedModule]:
    """Yield the modules of an adapter that is neither LoRA nor IA3, and take their tensors out.

    Args:
        config: The adapter's configuration.
        parts: Its tensors by module; what all modules share is under SHARED_STEM.
        where: The file with the tensors, for messages.
        config_where: The file with the configuration, for messages.

    Raises:
        HeaderError: Tensors belong to several kinds at once.
        MissingTensorError: A tensor is not there.
        ShapeMismatchError: Shapes contradict each other or the configuration.
        UnsupportedAdapterError: Such a module has no merge.
    """
    builder = _Builder(config, parts.pop(SHARED_STEM, {}), where, config_where)
    for stem, found in sorted(parts.items()):
        yield from builder.build(stem, found)


class _Builder:
    """Makes modules by one configuration."""

    def __init__(self, config: AdapterConfig, shared: Parts, where: str, config_where: str) -> None:
        self._config = config
        self._shared = shared
        self._where = where
        self._config_where = config_where
        self._rank = build_lookup(
            config.rank_pattern, config.rank, where=f"{config_where}: rank_pattern"
        )
        self._alpha = build_lookup(
            config.alpha_pattern, config.alpha, where=f"{config_where}: alpha_pattern"
        )

    def build(self, stem: str, parts: Parts) -> Iterator[FormedModule]:
        check_path(stem, where=self._where)
        match self._config.kind:
            case AdapterKind.LOHA | AdapterKind.LOKR if _is_product(parts):
                yield self._product(stem, parts)
            case AdapterKind.OFT if {Role.ROTATION, Role.EMBEDDING_ROTATION} & parts.keys():
                yield self._rotation(stem, parts)
            case AdapterKind.BOFT if {Role.BUTTERFLY, Role.ROW_SCALE} & parts.keys():
                yield self._butterfly(stem, parts)
            case AdapterKind.HRA if Role.REFLECTIONS in parts:
                yield self._reflections(stem, parts)
            case AdapterKind.VERA if {Role.SCALE_UP, Role.SCALE_DOWN} & parts.keys():
                yield self._scaled(stem, parts)
            case AdapterKind.VBLORA if _VBLORA & parts.keys():
                yield self._mixed(stem, parts)
            case _:
                # What is left here has no home, which the reader says.
                return

    def _product(self, stem: str, parts: Parts) -> FormedModule:
        path = strip_wrappers(stem)
        whole = parts.get(Role.LOKR_2)
        if whole is not None and len(whole.shape) == 3:
            raise UnsupportedAdapterError(
                f"{self._where}: {stem} is a convolution of one dimension with a whole inner factor "
                f"{list(whole.shape)}, of which PEFT multiplies other dimensions than those that belong "
                "together; merge the adapter with PEFT"
            )
        rank, alpha = int(self._rank(path)), self._alpha(path)
        builder = FormBuilder(stem, parts, alpha=alpha, where=self._where)
        (module,) = builder.build()
        if module.rank not in (0, rank):
            raise ShapeMismatchError(
                f"{self._where}: the factors of {stem} have rank {module.rank}, "
                f"{self._config_where} says {rank}; the two files do not belong together, or "
                "rank_pattern is missing or wrong"
            )
        # PEFT scales by the configured rank, even where both factors are whole.
        return FormedModule(
            stem=stem,
            form=module.form,
            parts=module.parts,
            outer=module.outer,
            columns=module.columns,
            rank=rank,
            alpha=alpha,
            scaling=alpha / rank,
        )

    def _rotation(self, stem: str, parts: Parts) -> FormedModule:
        role = Role.ROTATION if Role.ROTATION in parts else Role.EMBEDDING_ROTATION
        entry = self._take(stem, parts, role, dimensions=2)
        blocks, entries = entry.shape
        block = (1 + math.isqrt(1 + 8 * entries)) // 2
        if block * (block - 1) != 2 * entries:
            raise self._wrong(stem, {role: entry}, f"no triangle has {entries} entries")
        self._check_size(entry, block)
        settings = self._config.settings
        shared = bool(settings["block_share"])
        if shared and blocks != 1:
            raise self._wrong(stem, {role: entry}, "block_share is set, which leaves one rotation")
        return self._module(
            stem,
            Form.OFT,
            {role: entry},
            outer=None,
            columns=None if shared else blocks * block,
            settings={**settings, "block": block, "blocks": blocks},
        )

    def _butterfly(self, stem: str, parts: Parts) -> FormedModule:
        rotations = self._take(stem, parts, Role.BUTTERFLY, dimensions=4)
        scale = self._take(stem, parts, Role.ROW_SCALE, dimensions=2)
        own = {Role.BUTTERFLY: rotations, Role.ROW_SCALE: scale}
        factors, blocks, block, other = rotations.shape
        if scale.shape[1] != 1:
            raise UnsupportedAdapterError(
                f"{self._where}: {stem} is a convolution with BOFT, whose outputs PEFT scales in "
                "training and inputs in merging; merge the adapter with the program that trained it"
            )
        crossing = 2 ** (factors - 1)
        if block != other or blocks % crossing or (factors > 1 and block % 2):
            raise self._wrong(stem, own, "its blocks cannot be crossed over so often")
        self._check_size(rotations, block * crossing)
        return self._module(stem, Form.BOFT, own, outer=scale.shape[0], columns=blocks * block)

    def _reflections(self, stem: str, parts: Parts) -> FormedModule:
        entry = self._take(stem, parts, Role.REFLECTIONS, dimensions=2)
        return self._module(
            stem,
            Form.HRA,
            {Role.REFLECTIONS: entry},
            outer=None,
            columns=entry.shape[0],
            rank=entry.shape[1],
            settings=self._config.settings,
        )

    def _scaled(self, stem: str, parts: Parts) -> FormedModule:
        own = {
            Role.SCALE_DOWN: self._take(stem, parts, Role.SCALE_DOWN, dimensions=1),
            Role.SCALE_UP: self._take(stem, parts, Role.SCALE_UP, dimensions=1),
        }
        missing = [role for role in (Role.SHARED_DOWN, Role.SHARED_UP) if role not in self._shared]
        if missing:
            raise UnsupportedAdapterError(
                f"{self._where}: the {' and '.join(missing)} that VeRA's modules take parts of are not "
                "in the file (save_projection: false); PEFT draws them anew, and another build of "
                "torch may draw others: load the adapter where it was trained, and save it with "
                "save_projection=True"
            )
        own |= {role: self._shared[role] for role in (Role.SHARED_DOWN, Role.SHARED_UP)}
        rank, outer = own[Role.SCALE_DOWN].numel, own[Role.SCALE_UP].numel
        down, up = own[Role.SHARED_DOWN].shape, own[Role.SHARED_UP].shape
        if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank or up[0] < outer:
            raise self._wrong(stem, own, "the shared matrices are too small or of another rank")
        return self._module(stem, Form.VERA, own, outer=outer, columns=None, rank=rank)

    def _mixed(self, stem: str, parts: Parts) -> FormedModule:
        if Role.BANK not in self._shared:
            raise MissingTensorError(
                f"{self._where}: holds no {Role.BANK}, of which the factors of {stem} are mixed; the "
                "file is incomplete, save it again"
            )
        bank = self._shared[Role.BANK]
        own: Parts = {}
        if Role.LOGITS_DOWN in parts or Role.LOGITS_UP in parts:
            shapes = self._mixing(stem, parts, own, Role.LOGITS_DOWN, Role.LOGITS_UP)
        else:
            shapes = self._mixing(stem, parts, own, Role.INDICES_DOWN, Role.INDICES_UP)
            weights = self._mixing(stem, parts, own, Role.WEIGHTS_DOWN, Role.WEIGHTS_UP)
            if [shape[:2] for shape in shapes] != [shape[:2] for shape in weights]:
                raise self._wrong(stem, own, "indices and weights differ in number")
        own[Role.BANK] = bank
        (rank, inner), (outer, other) = shapes[0][:2], shapes[1][:2]
        count, topk = shapes[0][2], int(self._config.settings["topk"])
        stored = Role.INDICES_DOWN in own
        sound = count == topk if stored else topk <= count == bank.shape[0]
        if rank != other or len(bank.shape) != 2 or not sound:
            raise self._wrong(stem, own, f"the configuration mixes {topk} vectors of the bank")
        length = bank.shape[1]
        return self._module(
            stem,
            Form.VBLORA,
            own,
            outer=outer * length,
            columns=inner * length,
            rank=rank,
            settings=self._config.settings,
        )

    def _mixing(self, stem: str, parts: Parts, own: Parts, *roles: Role) -> list[tuple[int, ...]]:
        for role in roles:
            floats = role not in (Role.INDICES_DOWN, Role.INDICES_UP)
            own[role] = self._take(stem, parts, role, dimensions=3, floats=floats)
        return [own[role].shape for role in roles]

    def _module(
        self,
        stem: str,
        form: Form,
        parts: Parts,
        *,
        outer: int | None,
        columns: int | None,
        rank: int = 0,
        settings: Mapping[str, float] | None = None,
    ) -> FormedModule:
        return FormedModule(
            stem=stem,
            form=form,
            parts=parts,
            outer=outer,
            columns=columns,
            rank=rank,
            alpha=float(rank),
            scaling=1.0,
            settings=settings or {},
        )

    def _take(
        self, stem: str, parts: Parts, role: Role, *, dimensions: int, floats: bool = True
    ) -> TensorEntry:
        entry = parts.pop(role, None)
        if entry is None:
            raise MissingTensorError(
                f"{self._where}: module {stem} lacks its {role}; the file is incomplete, save it again"
            )
        if entry.numel == 0 or len(entry.shape) != dimensions:
            raise ShapeMismatchError(
                f"{self._where}: {entry.name!r} has shape {list(entry.shape)}, expected {dimensions} "
                "dimensions; save the adapter again with its parameters gathered"
            )
        if entry.dtype.is_float != floats:
            raise UnsupportedAdapterError(
                f"{self._where}: {entry.name!r} is of dtype {entry.dtype}: the adapter is quantised; "
                "dequantise it first"
            )
        return entry

    def _check_size(self, entry: TensorEntry, size: int) -> None:
        if size > MAX_ROTATION:
            raise UnsupportedAdapterError(
                f"{self._where}: {entry.name!r} rotates {size} inputs at once, the limit is "
                f"{MAX_ROTATION}; merge the adapter with PEFT"
            )

    def _wrong(self, stem: str, parts: Parts, reason: str) -> ShapeMismatchError:
        shapes = ", ".join(f"{entry.name!r} {list(entry.shape)}" for entry in parts.values())
        return ShapeMismatchError(
            f"{self._where}: the tensors of {stem} do not fit: {reason}; they are {shapes}; copy or "
            "save the file again"
        )


def _is_product(parts: Parts) -> bool:
    return any("lokr" in entry.name or "hada" in entry.name for entry in parts.values())


_VBLORA = frozenset(
    {
        Role.LOGITS_DOWN,
        Role.LOGITS_UP,
        Role.INDICES_DOWN,
        Role.INDICES_UP,
        Role.WEIGHTS_DOWN,
        Role.WEIGHTS_UP,
    }
)
