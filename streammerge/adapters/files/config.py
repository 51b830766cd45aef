"""``adapter_config.json``, parsed with limits; what cannot be merged faithfully is refused by name.

Follows: peft.LoraConfig and peft.IA3Config 0.21.2. Differs from PEFT, which only warns about keys
that it does not know: a key that nobody here knows may change what the adapter computes, so it is
refused unless it is empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from streammerge.adapters.files.patterns import MAX_PATTERNS
from streammerge.adapters.files.types import AdapterConfig, AdapterKind, Patterns, Targets
from streammerge.checkpoint.inputs import (
    parse_json_object,
    read_small,
    refuse_constant,
)
from streammerge.errors import HeaderError, UnsupportedAdapterError

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 16 * 2**20
"""Room for a rank and an alpha for every module of the largest mixture of experts."""
MAX_CONFIG_DEPTH = 16
"""PEFT's own configurations nest three levels."""
MAX_RANK = 2**24
_MAX_TOKEN = 2**40
_EMPTY: tuple[object, ...] = (None, False, 0, "", [], {})

_CONVERT = (
    "its factors are relative to a base that the initialisation changed; convert it with PEFT's "
    "save_pretrained(path_initial_model_for_weight_conversion=...) and name the result"
)
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
_REFUSED = {
    "kasa_config": (
        "KaSA truncates the base's weights, so nothing can be added to the original base; load it "
        "in PEFT and save the merged model"
    ),
    "alora_invocation_tokens": (
        "activated LoRA acts only after certain tokens, which no fixed weights can do; serve it "
        "with PEFT"
    ),
    "use_qalora": "QA-LoRA changes quantised weights in groups; merge it with PEFT",
    "layer_replication": (
        "replicated layers share the base's weights; merge it with PEFT and save the model"
    ),
    "arrow_config": "Arrow routes between adapters at run time; name those adapters instead",
    "use_bdlora": (
        "block-diagonal factors stand for larger ones; expand them with PEFT and save a plain LoRA"
    ),
    "megatron_config": "Megatron's parallel layers split the factors; gather and save a plain LoRA",
}
# They change training, saving or loading, never what the stored factors come to.
_INERT = frozenset(
    {"auto_mapping", "revision", "inference_mode", "lora_dropout", "megatron_core"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}
    | {"qalora_group_size", "velora_config", "monteclora_config", "layers_pattern"}
    | {"init_ia3_weights", "loftq_bits", "tp_layer"}
)
_READ = frozenset(
    {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
    | {"lora_bias", "fan_in_fan_out", "bias", "target_modules", "exclude_modules"}
    | {"layers_to_transform", "feedforward_modules", "modules_to_save", "target_parameters"}
    | {"trainable_token_indices", "ensure_weight_tying", "base_model_name_or_path", "task_type"}
    | {"init_lora_weights", "peft_version"}
)


# Beside what every kind has.
_KIND_READ: Mapping[AdapterKind, frozenset[str]] = {
    AdapterKind.LOHA: frozenset({"alpha"}),
    AdapterKind.LOKR: frozenset({"alpha"}),
    AdapterKind.OFT: frozenset(
        {"coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}
    ),
    AdapterKind.BOFT: frozenset(),
    AdapterKind.HRA: frozenset({"apply_GS"}),
    AdapterKind.VERA: frozenset({"save_projection"}),
    AdapterKind.VBLORA: frozenset({"topk", "num_vectors", "vector_length"}),
}
# How large blocks are and how many, the shapes of the tensors tell.
_KIND_INERT: Mapping[AdapterKind, frozenset[str]] = {
    AdapterKind.LOHA: frozenset({"use_effective_conv2d"}),
    AdapterKind.LOKR: frozenset(
        {"use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale"}
    ),
    AdapterKind.OFT: frozenset({"oft_block_size"}),
    AdapterKind.BOFT: frozenset(
        {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"}
    ),
    AdapterKind.HRA: frozenset(),
    AdapterKind.VERA: frozenset({"projection_prng_key", "vera_dropout", "d_initial"}),
    AdapterKind.VBLORA: frozenset(
        {"save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound", "init_logits_std"}
    ),
}
_OTHER_INERT = frozenset({"init_weights", "rank_dropout", "module_dropout"})
_WITH_PRODUCT = (AdapterKind.LOHA, AdapterKind.LOKR)
_ROTATION_TERMS = 5
"""PEFT's default of ``num_cayley_neumann_terms``."""
MAX_ROTATION_TERMS = 64
"""Far more than change anything in float64."""
_ROTATION_EPS = 6e-5
"""PEFT's default of ``eps``."""


def read_adapter_config(path: Path) -> AdapterConfig:
    """Return what an ``adapter_config.json`` says.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is not there or cannot be read.
        HeaderError: It is not such a file, or contradicts itself.
        UnsupportedAdapterError: It describes an adapter that cannot be merged faithfully.
    """
    raw = read_small(path, MAX_CONFIG_BYTES)
    document = parse_json_object(raw, where=str(path), parse_constant=refuse_constant)
    return parse_adapter_config(document, where=str(path))


def parse_adapter_config(document: Mapping[str, object], *, where: str) -> AdapterConfig:
    """Return what the keys of a configuration say; errors as :func:`read_adapter_config`."""
    _check_depth(document, where)
    kind = _kind(document, where)
    _check_faithful(document, kind, where)
    fields = _Fields(document, where)
    is_lora = kind is AdapterKind.LORA
    alpha_key = "lora_alpha" if is_lora else "alpha"
    has_alpha = is_lora or kind in _WITH_PRODUCT
    return AdapterConfig(
        kind=kind,
        rank=fields.rank("r", 8) if has_alpha else 0,
        alpha=fields.number(alpha_key, 8.0) if has_alpha else 0.0,
        rank_pattern=fields.patterns("rank_pattern", whole=True),
        alpha_pattern=fields.patterns("alpha_pattern", whole=False),
        use_rslora=fields.flag("use_rslora"),
        use_dora=fields.flag("use_dora"),
        lora_bias=fields.flag("lora_bias"),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
        bias=fields.word("bias", ("none", "all", f"{kind.lower()}_only")),
        target_modules=fields.targets("target_modules"),
        exclude_modules=fields.targets("exclude_modules"),
        # 0 is a layer.
        layers_to_transform=document.get("layers_to_transform") not in (None, []),
        feedforward_modules=fields.targets("feedforward_modules"),
        modules_to_save=fields.names("modules_to_save"),
        target_parameters=fields.names("target_parameters"),
        token_indices=fields.tokens("trainable_token_indices"),
        ensure_weight_tying=fields.flag("ensure_weight_tying"),
        base_model=fields.text("base_model_name_or_path"),
        peft_version=fields.text("peft_version"),
        task_type=fields.text("task_type"),
        auto_mapping=fields.mapping("auto_mapping"),
        settings=_settings(kind, fields),
    )


def _settings(kind: AdapterKind, fields: _Fields) -> dict[str, float]:
    """Return the numbers that only one kind has."""
    match kind:
        case AdapterKind.OFT:
            neumann = fields.flag("use_cayley_neumann")
            terms = fields.rank("num_cayley_neumann_terms", _ROTATION_TERMS)
            if terms > MAX_ROTATION_TERMS:
                raise HeaderError(
                    f"{fields.where}: num_cayley_neumann_terms: expected at most "
                    f"{MAX_ROTATION_TERMS}, got {terms}"
                )
            eps = fields.number("eps", _ROTATION_EPS)
            return {
                "terms": float(terms) if neumann else 0.0,
                "eps": eps if fields.flag("coft") else -1.0,
                "block_share": float(fields.flag("block_share")),
            }
        case AdapterKind.HRA:
            return {"apply_GS": float(fields.flag("apply_GS"))}
        case AdapterKind.VBLORA:
            return {"topk": float(fields.rank("topk", 2))}
        case _:
            return {}


def _check_depth(document: object, where: str) -> None:
    level: list[object] = [document]
    for _ in range(MAX_CONFIG_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        if not inner:
            return
        level = inner
    raise HeaderError(f"{where}: nested deeper than {MAX_CONFIG_DEPTH} levels")


def _kind(document: Mapping[str, object], where: str) -> AdapterKind:
    peft_type = document.get("peft_type")
    if peft_type in tuple(AdapterKind):
        return AdapterKind(str(peft_type))
    if not isinstance(peft_type, str):
        raise HeaderError(
            f"{where}: peft_type: expected {' or '.join(AdapterKind)}, got "
            f"{'nothing' if peft_type is None else type(peft_type).__name__}"
        )
    raise UnsupportedAdapterError(
        f"{where}: peft_type {peft_type[:40]!r} has no merge here, only "
        f"{' and '.join(AdapterKind)} do; convert it with peft.convert_to_lora, or merge it into "
        "its base with PEFT"
    )


def _check_faithful(document: Mapping[str, object], kind: AdapterKind, where: str) -> None:
    """Return if nothing in the configuration changes the meaning of the factors."""
    init = document.get("init_lora_weights", True)
    word = init.lower() if isinstance(init, str) else ""
    if word.startswith(_MUTATING_INITS):
        raise UnsupportedAdapterError(f"{where}: init_lora_weights is {init!r}: {_CONVERT}")
    if not isinstance(init, bool) and init is not None and word not in _HARMLESS_INITS:
        raise UnsupportedAdapterError(
            f"{where}: init_lora_weights is {str(init)[:40]!r}, which may have changed the base; "
            "set it to true if it has not"
        )
    for key, reason in _REFUSED.items():
        if document.get(key) not in _EMPTY:
            raise UnsupportedAdapterError(f"{where}: {key} is set: {reason}")
    if kind is AdapterKind.OFT:
        _check_rotation(document, where)
    known = _READ | _INERT | _REFUSED.keys()
    if kind in _KIND_READ:
        known |= _KIND_READ[kind] | _KIND_INERT[kind] | _OTHER_INERT
    for key, value in document.items():
        if key not in known and value not in _EMPTY:
            raise UnsupportedAdapterError(
                f"{where}: unknown setting {key[:60]!r}, which may change what the adapter "
                "computes; remove the key if it does not"
            )


def _check_rotation(document: Mapping[str, object], where: str) -> None:
    """Return if the version of PEFT that saved an OFT adapter means what today's does."""
    if "oft_block_size" not in document:
        raise UnsupportedAdapterError(
            f"{where}: oft_block_size is missing: PEFT before 0.14 made rotations in another way; merge "
            "the adapter into its base with PEFT 0.13"
        )
    neumann = document.get("use_cayley_neumann")
    if neumann is None:
        raise UnsupportedAdapterError(
            f"{where}: use_cayley_neumann is missing, and PEFT has changed what that means; set it to "
            "false if the adapter was trained with a PEFT that did not have it"
        )
    version = re.match(r"(\d+)\.(\d+)", str(document.get("peft_version") or ""))
    if neumann is True and (version is None or tuple(map(int, version.groups())) < (0, 18)):
        raise UnsupportedAdapterError(
            f"{where}: use_cayley_neumann is true, and peft_version is "
            f"{str(document.get('peft_version'))[:20]!r}: PEFT before 0.18 summed another series; merge "
            "the adapter into its base with that version"
        )


class _Fields:
    """The values of a configuration, each of the type that it must have."""

    def __init__(self, document: Mapping[str, object], where: str) -> None:
        self._document = document
        self.where = where

    def flag(self, key: str) -> bool:
        value = self._document.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._wrong(key, "true or false", value)

    def number(self, key: str, default: float) -> float:
        value = self._document.get(key)
        return default if value is None else self._finite(key, value)

    def rank(self, key: str, default: int) -> int:
        value = self._document.get(key)
        return default if value is None else self._whole(key, value)

    def text(self, key: str) -> str | None:
        value = self._document.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, "text", value)

    def word(self, key: str, known: tuple[str, ...]) -> str:
        value = self._document.get(key)
        if value is None:
            return known[0]
        if isinstance(value, str) and value in known:
            return value
        raise self._wrong(key, " or ".join(known), value)

    def mapping(self, key: str) -> Mapping[str, object] | None:
        value = self._document.get(key)
        if value is None or isinstance(value, dict):
            return value
        raise self._wrong(key, "an object", value)

    def names(self, key: str) -> tuple[str, ...]:
        value = self._document.get(key)
        if value is None:
            return ()
        names = value if isinstance(value, list) else [value]
        if all(isinstance(name, str) and name for name in names):
            return tuple(str(name) for name in names)
        raise self._wrong(key, "a list of names", value)

    def targets(self, key: str) -> Targets:
        value = self._document.get(key)
        if value is None or isinstance(value, str):
            return value
        return self.names(key)

    def patterns(self, key: str, *, whole: bool) -> Patterns:
        value = self._document.get(key)
        if value is None:
            return ()
        if not isinstance(value, dict):
            raise self._wrong(key, "an object of numbers", value)
        if len(value) > MAX_PATTERNS:
            raise self._wrong(key, f"at most {MAX_PATTERNS} patterns", value)
        return tuple(
            (
                pattern,
                self._whole(f"{key}.{pattern[:60]}", number)
                if whole
                else self._finite(f"{key}.{pattern[:60]}", number),
            )
            for pattern, number in value.items()
        )

    def tokens(self, key: str) -> Mapping[str, tuple[int, ...]]:
        value = self._document.get(key)
        if value is None:
            return {}
        table = value if isinstance(value, dict) else {"": value}
        found = {}
        for name, indices in table.items():
            if not isinstance(indices, list) or not all(_is_token(index) for index in indices):
                raise self._wrong(key, "lists of token indices", value)
            found[name] = tuple(indices)
        return found

    def _whole(self, key: str, value: object) -> int:
        if type(value) is int and 0 < value <= MAX_RANK:
            return value
        raise self._wrong(key, f"a whole number from 1 to {MAX_RANK}", value)

    def _finite(self, key: str, value: object) -> float:
        if type(value) in (int, float):
            try:
                number = float(str(value))
            except (ValueError, OverflowError):
                number = math.inf
            if math.isfinite(number):
                return number
        raise self._wrong(key, "a finite number", value)

    def _wrong(self, key: str, expected: str, value: object) -> HeaderError:
        got = repr(value) if isinstance(value, str | bool | float) else type(value).__name__
        if type(value) is int:
            got = str(value) if abs(value) < 10**20 else "a huge number"
        return HeaderError(f"{self.where}: {key}: expected {expected}, got {got[:80]}")


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_TOKEN
