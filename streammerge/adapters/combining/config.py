"""``adapter_config.json`` of a combined adapter, so that PEFT loads it with scaling 1.

The scaling is folded into the factors, therefore every module's alpha equals its rank, rslora and
DoRA are off, and nothing of the sources' configurations is taken over that could apply to modules
it was not meant for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from streammerge.adapters.files.patterns import matches_targets
from streammerge.adapters.files.types import Adapter, AdapterKind, strip_wrappers

_NESTED = ".base_layer."


def render_config(config: Mapping[str, object]) -> bytes:
    """Return the text of the file."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def lora_config(
    adapters: Sequence[Adapter],
    ranks: Mapping[str, int],
    *,
    lora_bias: bool,
    modules_to_save: Sequence[str],
    token_indices: Mapping[str, tuple[int, ...]],
) -> dict[str, object]:
    """Return the configuration of a LoRA.

    Args:
        adapters: The sources.
        ranks: Rank of every module of the result, by stem.
        lora_bias: Whether the factors ``B`` of linear layers have biases.
        modules_to_save: Names of the modules that the result brings along whole.
        token_indices: Tokens per embedding; the name ``""`` is the input embedding.
    """
    rank = max(ranks.values(), default=1)
    # Scaling is alpha / rank of each module; readers that know no patterns, as vLLM, see 1 too.
    pattern = {
        _exactly(strip_wrappers(stem), ranks): other
        for stem, other in sorted(ranks.items())
        if other != rank and _NESTED not in stem
    }
    tokens: object = None
    if token_indices:
        by_name = {name: list(indices) for name, indices in token_indices.items()}
        tokens = by_name.get("", by_name)
    return {
        **_common(adapters, AdapterKind.LORA),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": _targets(adapters, ranks),
        "modules_to_save": list(modules_to_save) or None,
        "trainable_token_indices": tokens,
        "lora_bias": lora_bias,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        # With false, a module that the file has no factors for would get random ones.
        "init_lora_weights": True,
    }


def ia3_config(
    adapters: Sequence[Adapter],
    stems: Iterable[str],
    feedforward: Iterable[str],
    *,
    modules_to_save: Sequence[str],
) -> dict[str, object]:
    """Return the configuration of an IA3 adapter for the modules at ``stems``."""
    return {
        **_common(adapters, AdapterKind.IA3),
        "target_modules": sorted(stems),
        "feedforward_modules": sorted(feedforward),
        "modules_to_save": list(modules_to_save) or None,
        "init_ia3_weights": True,
    }


def _common(adapters: Sequence[Adapter], kind: AdapterKind) -> dict[str, object]:
    configs = [adapter.config for adapter in adapters]
    bases = [config.base_model for config in configs if config.base_model]
    tasks = [config.task_type for config in configs if config.task_type]
    mappings = [config.auto_mapping for config in configs if config.auto_mapping]
    return {
        "peft_type": kind.value,
        "base_model_name_or_path": bases[0] if bases else None,
        "task_type": tasks[0] if tasks else None,
        "auto_mapping": mappings[0] if mappings else None,
        "revision": None,
        "inference_mode": True,
        "fan_in_fan_out": any(config.fan_in_fan_out for config in configs),
    }


def _targets(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> list[str]:
    """Return ``target_modules``: the sources' own lists where they say it all, else full paths.

    Short names survive the renaming of modules between versions of transformers, full paths do not.
    But a list stands for what one source meant by it, so exclusions, layer numbers and modules that
    a rule drops rule it out.
    """
    stems = [strip_wrappers(stem) for stem in ranks if _NESTED not in stem]
    lists = [adapter.config.target_modules for adapter in adapters]
    plain = all(
        isinstance(each.config.target_modules, tuple)
        and not each.config.exclude_modules
        and not each.config.layers_to_transform
        for each in adapters
    )
    every = {strip_wrappers(module.stem) for each in adapters for module in each.modules}
    dropped = every - set(stems)
    named = {name for names in lists if isinstance(names, tuple) for name in names}
    matched = {stem for stem in every if matches_targets(tuple(named), stem, where="targets")}
    if plain and matched >= set(stems) and not matched & dropped:
        used = {
            name
            for name in named
            if any(stem == name or stem.endswith(f".{name}") for stem in stems)
        }
        return sorted(used)
    return sorted(stems)


def _exactly(path: str, paths: Iterable[str]) -> str:
    """Return a pattern key for this path alone: PEFT also matches any path that ends with it."""
    escaped = re.escape(path).replace(r"\-", "-")
    ambiguous = any(other.endswith(f".{path}") for other in paths)
    return f"^{escaped}" if ambiguous else escaped
