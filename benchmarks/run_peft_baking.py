"""Merges adapters into a base with PEFT, as its documentation shows it.

python -m benchmarks.run_peft_baking OUT BASE ADAPTER...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(out: Path, base: Path, adapters: list[Path]) -> None:
    """Load the base and the adapters, merge, and save."""
    names = [f"a{index}" for index in range(len(adapters))]
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(loaded, adapters[0], adapter_name=names[0])
    for name, path in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    model.merge_and_unload(adapter_names=names).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(each) for each in sys.argv[3:]])
