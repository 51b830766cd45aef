"""Which files of a model on the hub a merge needs: not the same weights in four formats."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

_SAFETENSORS = ".safetensors"
_TORCH = (".bin", ".pt", ".pth", ".ckpt", ".bin.index.json")
# Weights of other programs, and what pages show.
_OTHERS = (
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel"),
    *(".pb", ".pdparams", ".nemo", ".llamafile", ".tar", ".tar.gz", ".tgz", ".zip", ".7z", ".npz"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".webm", ".mp3", ".wav", ".pdf"),
    *(".distcp", ".parquet", ".arrow"),
)
_FOLDERS = re.compile(
    r"onnx|openvino|coreml|tflite|gguf|original|runs|checkpoint-\d+|global_step_?\d+|\..*"
)
_TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*|.*(optim|model)_states)"
    r"\.(bin|pt|pth|safetensors)"
)
_OPENVINO = re.compile(r"openvino_.*\.(bin|xml)")
_CONSOLIDATED = re.compile(r"consolidated.*")
_VARIANT = re.compile(r"(.*)\.(fp16|bf16|fp32|non_ema)(-\d+-of-\d+)?(\.safetensors|\.bin)")


def choose_files(names: Iterable[str]) -> list[str]:
    """Return the files to download, sorted.

    Of each folder: safetensors and no PyTorch files, if there are any; no variants (``fp16``) where
    the weights themselves are there; no ``consolidated`` weights beside those of transformers. Not at
    all: the formats of other programs, pictures, and what a training leaves.

    Args:
        names: All files of the model, relative, with ``/`` between parts.
    """
    folders: defaultdict[PurePosixPath, list[str]] = defaultdict(list)
    for name in names:
        path = PurePosixPath(name)
        if any(_FOLDERS.fullmatch(part) for part in path.parts[:-1]):
            continue
        if name.lower().endswith(_OTHERS) or name == ".gitattributes":
            continue
        if _TRAINING.fullmatch(path.name) or _OPENVINO.fullmatch(path.name):
            continue
        folders[path.parent].append(name)
    return sorted(name for files in folders.values() for name in _of_folder(files))


def _of_folder(names: list[str]) -> list[str]:
    safetensors = [name for name in names if name.endswith(_SAFETENSORS)]
    if safetensors:
        names = [name for name in names if not name.endswith(_TORCH)]
    plain = [name for name in names if _is_weights(name) and not _VARIANT.fullmatch(name)]
    if plain:
        names = [name for name in names if not _VARIANT.fullmatch(name)]
    usual = [name for name in plain if not _is_consolidated(name)]
    if usual:
        names = [name for name in names if not _is_consolidated(name)]
    return names


def _is_weights(name: str) -> bool:
    return name.endswith((_SAFETENSORS, *_TORCH)) and not name.endswith(".json")


def _is_consolidated(name: str) -> bool:
    return _CONSOLIDATED.fullmatch(PurePosixPath(name).name) is not None
