"""An adapter's contents for people and for scripts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from streammerge.adapters.files.types import Adapter
from streammerge.errors import printable
from streammerge.units import format_size

_SHOWN = 12


def describe_adapter(adapter: Adapter) -> str:
    """Return a summary: what kind of adapter, ranks, scalings, which modules."""
    rows = [
        ("path", str(adapter.path)),
        ("adapter", f"{adapter.kind}, {adapter.naming} names{_variants(adapter)}"),
        ("file", f"{adapter.file.path.name}, {format_size(adapter.file.nbytes)}"),
        ("tensors", f"{len(adapter.entries):,}"),
        ("parameters", f"{sum(entry.numel for entry in adapter.entries):,}"),
    ]
    if adapter.config.base_model:
        rows.append(("base", adapter.config.base_model))
    by_dtype: Counter[str] = Counter()
    for entry in adapter.entries:
        by_dtype[entry.dtype.value] += entry.nbytes
    rows += [(dtype, format_size(nbytes)) for dtype, nbytes in sorted(by_dtype.items())]
    if adapter.modules:
        rows.append(("ranks", _counted(Counter(str(module.rank) for module in adapter.modules))))
        scalings = Counter(f"{module.scaling:g}" for module in adapter.modules)
        rows.append(("scalings", _counted(scalings)))
    if adapter.formed:
        forms = Counter(str(module.form) for module in adapter.formed)
        rows.append(("forms", _counted(forms)))
        scalings = Counter(f"{module.scaling:g}" for module in adapter.formed)
        rows.append(("their scalings", _counted(scalings)))
    ends = Counter(module.name.rpartition(".")[2] for module in adapter.modules)
    ends.update(module.name.rpartition(".")[2] for module in adapter.formed)
    ends.update(vector.stem.rpartition(".")[2] for vector in adapter.vectors)
    rows.append(("modules", _counted(ends)))
    for label, names in (
        ("saved whole", sorted(adapter.saved)),
        ("replaced", sorted(adapter.replaced)),
        ("biases", sorted(adapter.biases)),
        ("tokens", [f"{tokens.stem} ({len(tokens.indices)})" for tokens in adapter.tokens]),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            rows.append((label, ", ".join(names[:_SHOWN]) + more))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {printable(value)}" for name, value in rows)


def describe_adapter_as_json(adapter: Adapter) -> dict[str, Any]:
    """Return everything: the configuration, and every tensor with its place and its use."""
    return {
        "path": str(adapter.path),
        "kind": adapter.kind.value,
        "naming": adapter.naming.value,
        "file": {**asdict(adapter.file), "path": str(adapter.file.path)},
        "config": asdict(adapter.config),
        "modules": {
            module.stem: {
                "layer": module.layer.value,
                "parameter": module.parameter,
                "experts": module.experts,
                "rank": module.rank,
                "alpha": module.alpha,
                "scaling": module.scaling,
                "in_features": module.in_features,
                "out_features": module.out_features,
            }
            for module in adapter.modules
        },
        "formed": [
            {
                "stem": module.stem,
                "form": module.form.value,
                "parameter": module.parameter,
                "rank": module.rank,
                "alpha": module.alpha,
                "scaling": module.scaling,
                "rows": module.outer,
                "columns": module.columns,
                "tensors": {role.value: entry.name for role, entry in module.parts.items()},
            }
            for module in adapter.formed
        ],
        "tensors": {
            entry.name: {
                "dtype": entry.dtype.value,
                "shape": list(entry.shape),
                "offset": entry.offset,
                "nbytes": entry.nbytes,
            }
            for entry in adapter.entries
        },
        "saved": sorted(adapter.saved),
        "replaced": sorted(adapter.replaced),
        "biases": sorted(adapter.biases),
        "tokens": {tokens.stem: list(tokens.indices) for tokens in adapter.tokens},
    }


def _variants(adapter: Adapter) -> str:
    config = adapter.config
    found = {
        "rslora": config.use_rslora,
        "DoRA": config.use_dora or any(module.magnitude for module in adapter.formed),
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": config.fan_in_fan_out,
        "target_parameters": bool(config.target_parameters),
    }
    return "".join(f", {name}" for name, there in found.items() if there)


def _counted(counts: Counter[str]) -> str:
    parts = [f"{name} x {count}" for name, count in counts.most_common(_SHOWN)]
    return ", ".join([*parts, "..."] if len(counts) > _SHOWN else parts)
