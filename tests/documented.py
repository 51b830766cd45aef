"""Small models under the names that documents and examples use, and the command as they call it.

write_documented_models(tmp_path)              models/base, models/math, ..., adapters/math, ...
subprocess.run(script, env=command_on_path(tmp_path))
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from models import write_adapter, write_model

ROOT = Path(__file__).resolve().parent.parent
CHANGED = tuple(
    f"model.layers.{layer}.{part}.weight"
    for layer in range(4)
    for part in ("self_attn.q_proj", "mlp.up_proj")
)
"""What the adapters change."""
SHAPES = {
    "model.embed_tokens.weight": (48, 32),
    **{name: (40 if "up_proj" in name else 32, 32) for name in CHANGED},
    **{f"model.layers.{layer}.mlp.gate_proj.weight": (40, 32) for layer in range(4)},
    **{f"model.layers.{layer}.mlp.down_proj.weight": (32, 40) for layer in range(4)},
    "lm_head.weight": (48, 32),
}


def write_documented_models(root: Path) -> Path:
    """Write four models and two adapters below ``root``, and return it."""
    for seed, name in enumerate(("base", "math", "code", "chat")):
        path = write_model(root / "models" / name, draw_tensors(seed))
        config = {"model_type": "llama", "tie_word_embeddings": False, "num_hidden_layers": 4}
        (path / "config.json").write_text(json.dumps(config))
    for seed, name in enumerate(("math", "code")):
        adapted = {tensor: SHAPES[tensor] for tensor in CHANGED}
        write_adapter(root / "adapters" / name, adapted, seed=seed)
    return root


def draw_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Return the tensors of one model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        tensor: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for tensor, shape in SHAPES.items()
    }


def command_on_path(root: Path, **variables: str) -> Mapping[str, str]:
    """Return an environment in which ``streammerge`` is this project's, as scripts call it."""
    # What the tests themselves run on, and this project first.
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = root / "bin" / "streammerge"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m streammerge "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": paths, "PATH": path, **variables}
