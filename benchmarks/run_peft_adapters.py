"""Combines adapters with PEFT, as its documentation shows it: base, adapters, combine, save.

    python -m benchmarks.run_peft_adapters RECIPE.json OUT LAYERS

The base is made on the spot, in bfloat16, with as many layers as the adapters cover: loading it from
the disk, which a user has to do, is not counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM


def main(recipe_path: Path, out: Path, layers: int) -> None:
    """Combine what the recipe names and save the result."""
    recipe = json.loads(recipe_path.read_text(encoding="utf-8"))
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    base = base.to_empty(device="cpu")
    torch.set_default_dtype(torch.float32)
    names = [f"a{index}" for index in range(len(recipe["sources"]))]
    paths = [source["path"] for source in recipe["sources"]]
    model = PeftModel.from_pretrained(base, paths[0], adapter_name=names[0])
    for name, path in zip(names[1:], paths[1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    # Its default, full matrices, takes several times longer and the square of the larger side.
    model.add_weighted_adapter(
        names,
        [source["weight"] for source in recipe["sources"]],
        "merged",
        combination_type=recipe["method"],
        svd_full_matrices=False,
        **recipe["parameters"],
    )
    model.save_pretrained(out, selected_adapters=["merged"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
