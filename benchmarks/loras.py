"""Adapters for measuring: LoRAs of random factors in float32, as PEFT saves them.

    python -m benchmarks.loras DIR BASE RANK COUNT [dora]

Makes those that are missing, in a process of its own; see :mod:`benchmarks.models` for why.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def make_lora(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    seed: int,
    dora: bool = False,
) -> Path:
    """Write an adapter and return ``path``.

    Args:
        path: Directory to make.
        shapes: Out and in of every module, by its name in the model.
        rank: Rank of every module.
        seed: Adapters of one seed are equal.
        dora: Whether it has a magnitude for each output (DoRA).
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outer, inner) in shapes.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) / 64
        tensors[f"{stem}.lora_B.weight"] = torch.randn(outer, rank, generator=generator) / 64
        if dora:
            magnitude = torch.rand(outer, generator=generator) + 0.5
            tensors[f"{stem}.lora_magnitude_vector"] = magnitude
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    names = sorted({name.rpartition(".")[2] for name in shapes})
    config: dict[str, object] = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": names, "use_dora": dora}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Return out and in of every linear layer inside a model's decoder layers, by its name."""
    shapes = {}
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                shape = tuple(opened.get_slice(name).get_shape())
                if ".layers." in name and len(shape) == 2:
                    shapes[name.removesuffix(".weight")] = shape
    return shapes


def main(directory: Path, base: Path, rank: int, count: int, *, dora: bool = False) -> None:
    """Make adapters of all linear layers of ``base`` where they are missing."""
    for seed in range(count):
        path = directory / f"{'dora' if dora else 'lora'}-{rank}-{seed}"
        if not path.is_dir():
            partial = make_lora(
                path.with_suffix(".partial"), linear_shapes(base), rank=rank, seed=seed, dora=dora
            )
            partial.rename(path)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
        dora=sys.argv[5:] == ["dora"],
    )
