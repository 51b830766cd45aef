"""Merges whole models in memory with the functions of ``peft.utils.merge_utils``.

    python run_peft.py JOB.json OUT

Runs in the contenders' environment and imports nothing of this project. It is the plain script that
a user of these functions would write: load everything, merge tensor by tensor in float32, save.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor


def main(job_path: Path, out: Path) -> None:
    """Merge as the job says and write the result, sharded like the first model."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    function = getattr(merge_utils, job["function"])
    options = {} if job["density"] is None else {"density": job["density"]}
    weights = torch.tensor(job["weights"])
    base = None if job["base"] is None else load_model(Path(job["base"]))
    sources = [load_model(Path(path)) for path in job["sources"]]

    merged = {}
    for name in list(sources[0]):
        # Taken out, so that the memory of merged inputs goes to results.
        tensors = [source.pop(name).float() for source in sources]
        if base is None:
            merged[name] = function(tensors, weights, **options).bfloat16()
            continue
        start = base.pop(name).float()
        task_vectors = [tensor - start for tensor in tensors]
        merged[name] = (start + function(task_vectors, weights, **options)).bfloat16()
    save_like(Path(job["base"] or job["sources"][0]), merged, out)


def load_model(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a model."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def save_like(model: Path, tensors: dict[str, Tensor], out: Path) -> None:
    """Write tensors into the same shards as those of ``model``, with its index and configuration."""
    out.mkdir()
    for companion in model.glob("*.json"):
        shutil.copy(companion, out)
    index = json.loads((model / "model.safetensors.index.json").read_text(encoding="utf-8"))
    for shard in sorted(set(index["weight_map"].values())):
        names = [name for name, file in index["weight_map"].items() if file == shard]
        save_file({name: tensors[name].contiguous() for name in names}, out / shard)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
