"""Models that tests put into stores, and a recipe of them."""

from __future__ import annotations

import torch
from models import Tensors


def draw(seed: int) -> Tensors:
    """Return a model with tensors of less than a block and one of several."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.w": torch.randn((40, 30), generator=generator) for i in range(6)}
    return {name: tensor.bfloat16() for name, tensor in tensors.items()} | {
        "large": torch.randn((600, 1000), generator=generator)
    }


def recipe_at(place: str) -> dict[str, object]:
    """Return a recipe of the three models."""
    return {
        "method": "ties",
        "base": f"{place}/base",
        "sources": [{"path": f"{place}/a"}, {"path": f"{place}/b", "weight": 0.5}],
        "parameters": {"density": 0.3},
    }
