"""Directories that hold no checkpoint by themselves: what they are, and what to name or run instead.

People name the root of a pipeline, of a training run, of a cache. Looks at the names in the
directory and one level below; reads no file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from pathlib import Path

from streammerge.checkpoint.dequantising import gguf_advice
from streammerge.checkpoint.inputs import is_directory, listed

_WEIGHTS = re.compile(
    r".*\.safetensors(\.index(\.\w+)?\.json)?|(diffusion_)?pytorch_model.*\.bin(\.index\.json)?"
)
_TORCH_FILE = re.compile(r".*\.(bin|pt|pth|ckpt)")
# What trainers leave beside a model, in the same format.
_NO_MODEL = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|.*optim_states)\..*")
_TORCH_SHARD = re.compile(r".*-\d+-of-\d+\.bin")
_CONSOLIDATED = re.compile(r"consolidated\.\d+\.pth")
_RANK = re.compile(r"(model|optim)_world_size_\d+_rank_\d+\.pt")
_DEEPSPEED = re.compile(r".*(model_states|optim_states)\.pt")
_FSDP = re.compile(r"(pytorch_model|optimizer)_fsdp.*|distributed_checkpoint.*")


def explain_absence(directory: Path, names: Collection[str]) -> str:
    """Return why a directory is not read as a checkpoint, and the next step.

    Args:
        directory: The directory, absolute.
        names: What lies in it.
    """
    found = _of_a_pipeline(directory, names) or _of_a_training(directory, names)
    return f"{directory}: {found or _of_files(directory, names) or _of_nothing(directory, names)}"


def _of_a_pipeline(directory: Path, names: Collection[str]) -> str | None:
    """Return what to say of a directory whose parts are models."""
    if "model_index.json" in names:
        return (
            "is a diffusers pipeline (model_index.json), whose parts are models; name one: "
            f"{listed(_parts(directory, names)) or 'none is there'}"
        )
    if "modules.json" in names:
        return (
            "is a sentence-transformers model (modules.json) whose weights lie in its parts; name "
            f"one: {listed(_parts(directory, names)) or 'none is there'}"
        )
    return None


def _of_a_training(directory: Path, names: Collection[str]) -> str | None:
    """Return what to say of what a training on many devices leaves."""
    place, out = shlex.quote(str(directory)), shlex.quote(f"{directory}-whole")
    if any(_RANK.fullmatch(name) for name in names):
        return (
            "holds one file per device (FSDP, as verl saves it); put them together: python -m "
            f"verl.model_merger merge --backend fsdp --local_dir {place} --target_dir {out}"
        )
    if "actor" in names and any(_RANK.fullmatch(name) for name in _names_in(directory / "actor")):
        return _of_a_training(directory / "actor", _names_in(directory / "actor"))
    if "zero_to_fp32.py" in names:
        return (
            "is a DeepSpeed checkpoint with one file per device; put them together: cd "
            f"{place} && python zero_to_fp32.py . {out} --safe_serialization"
        )
    if any(_DEEPSPEED.fullmatch(name) for name in names):
        return (
            "holds the files of a DeepSpeed checkpoint, one per device; in the directory above run "
            "python zero_to_fp32.py . OUT --safe_serialization"
        )
    fsdp = next((name for name in sorted(names) if _FSDP.fullmatch(name)), None)
    if ".metadata" in names or any(name.endswith(".distcp") for name in names) or fsdp:
        source = shlex.quote(str(directory / fsdp)) if fsdp else place
        whole = shlex.quote(f"{directory}-whole.pt")
        return (
            "is a distributed checkpoint (FSDP) with one file per device; put them together: python "
            f"-m torch.distributed.checkpoint.format_utils dcp_to_torch {source} {whole}"
        )
    return None


def _of_files(directory: Path, names: Collection[str]) -> str | None:
    """Return what to say of files that hold weights under other names."""
    consolidated = sorted(name for name in names if _CONSOLIDATED.fullmatch(name))
    if len(consolidated) == 1:
        return f"holds Meta's own format; name the file: {directory / consolidated[0]}"
    if consolidated:
        return (
            f"holds {len(consolidated)} files {consolidated[0]} and so on, Meta's own format, in "
            "which each has a slice of every tensor; take the same model as transformers has it, or "
            "convert it with transformers 4: python -m "
            "transformers.models.llama.convert_llama_weights_to_hf --input_dir "
            f"{shlex.quote(str(directory))} --output_dir {shlex.quote(f'{directory}-hf')}"
        )
    shards = sorted(name for name in names if _TORCH_SHARD.fullmatch(name))
    if shards:
        return (
            f"holds {len(shards)} shard(s) and no index pytorch_model.bin.index.json: "
            f"{listed(shards)}; copy the index and all shards"
        )
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return f"{gguf[0]} {gguf_advice(directory / gguf[0])}"
    torch_files = sorted(
        name for name in names if _TORCH_FILE.fullmatch(name) and not _NO_MODEL.fullmatch(name)
    )
    if torch_files:
        return (
            "no checkpoint under a usual name; name the file that holds the model: "
            f"{listed([str(directory / name) for name in torch_files])}"
        )
    return None


def _of_nothing(directory: Path, names: Collection[str]) -> str:
    parts = _parts(directory, names)
    if parts:
        return f"no checkpoint in the directory itself; name a folder in it: {listed(parts)}"
    return (
        f"no checkpoint among {len(names)} files; looked for model.safetensors, "
        "model.safetensors.index.json, the same with diffusion_pytorch_model, one file "
        "*.safetensors, pytorch_model.bin, pytorch_model.bin.index.json"
    )


def _parts(directory: Path, names: Collection[str]) -> list[str]:
    """Return the folders in the directory that hold weights."""
    return [
        str(directory / name)
        for name in sorted(names)
        if is_directory(directory / name)
        and any(_WEIGHTS.fullmatch(each) for each in _names_in(directory / name))
    ]


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(each.name for each in directory.iterdir())
    except OSError:
        return []
