"""Write Llama-shaped models of any size, filled with plausible noise, in a few MiB of memory.

A model is a Hugging Face directory: config.json, one or more safetensors shards, and an index when
there are several. Fine-tunes of a model are the same weights plus a small change, so that task
vectors in bfloat16 have what real ones have: many exact zeros and many equal magnitudes.

    python scripts/make_checkpoint.py OUT --size 1.1B --shards 4 --finetunes 2
    python scripts/make_checkpoint.py OUT --hidden 512 --layers 32 --intermediate 1024 \
        --vocab 32000 --heads 8 --kv-heads 2 --experts 520 --expert-intermediate 32

Values come from one pool of Gaussian samples. Every block of 2^20 elements of a tensor takes its
samples from its own place in the pool, with its own sign and scale, all drawn from a hash of (seed,
model, tensor name, block number). So a value depends on its position alone, never on the chunk in
which it was made, and a block does not repeat itself. So tensors are made on as many threads as there
are cores. Holds the pool, the headers, and three chunks per thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

BLOCK_NUMEL = 2**20
"""Elements with one place in the pool. Smaller: more hashing. Larger: fewer distinct places."""
POOL_NUMEL = 2**23
"""Samples in the pool, 16 MiB in bfloat16: eight blocks, so that places seldom coincide."""
CHUNK_NBYTES = 2**22
"""Bytes made and written at a time, at most; never more than a block."""
DTYPES = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
"""The dtypes a model can have: in torch, and as safetensors spells them."""
SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a model."""

    hidden: int
    """Width of the residual stream, in elements."""
    layers: int
    """Number of decoder layers."""
    intermediate: int
    """Width of a dense feed-forward layer; unused in a mixture of experts."""
    vocab: int
    """Rows of the embedding and of the output head."""
    heads: int
    """Query heads; each is hidden / heads wide."""
    kv_heads: int
    """Key and value heads; divides heads."""
    experts: int = 0
    """Experts in each layer; 0 is a dense model."""
    expert_intermediate: int = 0
    """Width of an expert's feed-forward layer; 0 in a dense model."""

    def __post_init__(self) -> None:
        """Refuse shapes that no model has."""
        for field in ("hidden", "layers", "intermediate", "vocab", "heads", "kv_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected 1 or more, got {getattr(self, field)}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.experts < 0 or self.expert_intermediate < 0:
            raise ValueError("experts and expert_intermediate: expected 0 or more")
        if bool(self.experts) != bool(self.expert_intermediate):
            raise ValueError("experts and expert_intermediate: give both, or neither")


PRESETS = {
    "10M": ModelSpec(hidden=512, layers=2, intermediate=1536, vocab=4096, heads=8, kv_heads=2),
    "150M": ModelSpec(hidden=768, layers=12, intermediate=3072, vocab=32000, heads=12, kv_heads=4),
    "1.1B": ModelSpec(hidden=2048, layers=22, intermediate=5632, vocab=32000, heads=32, kv_heads=4),
    "8B": ModelSpec(hidden=4096, layers=32, intermediate=14336, vocab=128256, heads=32, kv_heads=8),
    "0.9B-MoE": ModelSpec(
        hidden=512,
        layers=32,
        intermediate=32,
        vocab=32000,
        heads=8,
        kv_heads=2,
        experts=520,
        expert_intermediate=32,
    ),
}
"""Models of ordinary shapes; 1.1B is TinyLlama's, 8B is Llama 3's. The mixture of experts has 50,000 tensors
of 16,384 elements."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model."""

    name: str
    """Its name in the checkpoint."""
    shape: tuple[int, ...]
    """Elements along each dimension."""
    mean: float
    """Mean of its values; 1 for the scales of a norm, else 0."""
    std: float
    """Standard deviation of its values."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def write_model(
    directory: Path,
    spec: ModelSpec,
    *,
    dtype: str = "bfloat16",
    shards: int = 1,
    max_shard_nbytes: int | None = None,
    seed: int = 0,
    finetune: int | None = None,
    noise: float = 0.01,
    chunk_nbytes: int = CHUNK_NBYTES,
) -> int:
    """Write a model into a new directory and return the number of bytes of its tensors.

    Args:
        directory: Where the model goes; it must be empty or not exist.
        spec: The shape of the model.
        dtype: Dtype of every tensor, a key of ``DTYPES``.
        shards: Number of shard files, of about equal size; unused with ``max_shard_nbytes``.
        max_shard_nbytes: The most bytes of tensors in a file with more than one tensor.
        seed: Models of one seed, spec and dtype are equal, however they are sharded.
        finetune: None writes the base; k writes the base changed by the k-th fine-tuning.
        noise: Size of a fine-tune's change, relative to the spread of a tensor's values.
        chunk_nbytes: Bytes made at a time; changes nothing in the result.

    Raises:
        FileExistsError: The directory has files in it already.
        ValueError: The tensors cannot be split into that many shards.
    """
    torch_dtype, format_dtype = DTYPES[dtype]
    itemsize = torch_dtype.itemsize
    tensors = list(iter_tensors(spec))
    if max_shard_nbytes is None:
        groups = _split_evenly(tensors, shards)
    else:
        groups = _split_by_size(tensors, max_shard_nbytes // itemsize)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} has files in it already; remove it or choose another")
    directory.mkdir(parents=True, exist_ok=True)
    source = _Values(
        dtype=torch_dtype,
        seed=seed,
        finetune=finetune,
        noise=noise,
        chunk_numel=max(1, chunk_nbytes // itemsize),
    )
    weight_map: dict[str, str] = {}
    places: list[tuple[int, Path, TensorSpec]] = []
    for number, group in enumerate(groups, start=1):
        file_name = "model.safetensors"
        if len(groups) > 1:
            file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # The order in which the safetensors library writes tensors of one dtype.
        group.sort(key=lambda tensor: tensor.name)
        with (directory / file_name).open("xb") as shard:
            _write_header(shard, group, format_dtype, itemsize)
            offset = shard.tell()
        for tensor in group:
            places.append((offset, directory / file_name, tensor))
            offset += tensor.numel * itemsize
        weight_map.update((tensor.name, file_name) for tensor in group)
    _write_tensors(source, places)

    nbytes = sum(tensor.numel for tensor in tensors) * itemsize
    if len(groups) > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", _config(spec, dtype))
    return nbytes


def _write_tensors(source: _Values, places: Sequence[tuple[int, Path, TensorSpec]]) -> None:
    """Write every tensor at its offset in its file, on as many threads as there are cores."""

    def write(place: tuple[int, Path, TensorSpec]) -> None:
        offset, path, tensor = place
        with path.open("r+b", buffering=0) as shard:
            shard.seek(offset)
            for chunk in source.iter_chunks(tensor):
                rest = chunk
                while rest:
                    rest = rest[shard.write(rest) :]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(_count_cores()) as pool:
            # By offset, and so from file to file: the kernel lets one thread at a time write to one.
            for _ in pool.map(write, sorted(places, key=lambda place: place[0])):
                pass
    finally:
        torch.set_num_threads(before)


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def iter_tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    """Yield the tensors of a model in the order in which it runs."""
    hidden = spec.hidden
    kv_width = hidden // spec.heads * spec.kv_heads
    # As models are initialised: what is added to the residual stream shrinks with the depth.
    std, residual_std = 0.02, 0.02 / math.sqrt(2 * spec.layers)
    yield TensorSpec("model.embed_tokens.weight", (spec.vocab, hidden), 0.0, std)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}"
        yield TensorSpec(f"{prefix}.input_layernorm.weight", (hidden,), 1.0, 0.1)
        yield TensorSpec(f"{prefix}.self_attn.q_proj.weight", (hidden, hidden), 0.0, std)
        yield TensorSpec(f"{prefix}.self_attn.k_proj.weight", (kv_width, hidden), 0.0, std)
        yield TensorSpec(f"{prefix}.self_attn.v_proj.weight", (kv_width, hidden), 0.0, std)
        yield TensorSpec(f"{prefix}.self_attn.o_proj.weight", (hidden, hidden), 0.0, residual_std)
        yield TensorSpec(f"{prefix}.post_attention_layernorm.weight", (hidden,), 1.0, 0.1)
        if spec.experts:
            moe = f"{prefix}.block_sparse_moe"
            yield TensorSpec(f"{moe}.gate.weight", (spec.experts, hidden), 0.0, std)
            blocks = [f"{moe}.experts.{expert}" for expert in range(spec.experts)]
            gate, down, up, width = "w1", "w2", "w3", spec.expert_intermediate
        else:
            blocks = [f"{prefix}.mlp"]
            gate, down, up, width = "gate_proj", "down_proj", "up_proj", spec.intermediate
        for block in blocks:
            yield TensorSpec(f"{block}.{gate}.weight", (width, hidden), 0.0, std)
            yield TensorSpec(f"{block}.{up}.weight", (width, hidden), 0.0, std)
            yield TensorSpec(f"{block}.{down}.weight", (hidden, width), 0.0, residual_std)
    yield TensorSpec("model.norm.weight", (hidden,), 1.0, 0.1)
    yield TensorSpec("lm_head.weight", (spec.vocab, hidden), 0.0, std)


class _Values:
    """Makes the values of a model, chunk by chunk.

    Every scale has at most 8 significant bits, as bfloat16 does, and no product is added in the
    same step: so each step rounds once, in vector code and in the scalar code at a chunk's end
    alike.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        seed: int,
        finetune: int | None,
        noise: float,
        chunk_numel: int,
    ) -> None:
        samples = np.random.default_rng(seed).standard_normal(POOL_NUMEL, dtype=np.float32)
        self._pool = torch.from_numpy(samples).to(dtype)
        self._seed = seed
        self._finetune = finetune
        self._noise = noise
        self._chunk_numel = min(chunk_numel, BLOCK_NUMEL)

    def iter_chunks(self, tensor: TensorSpec) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in order; each chunk is valid until the next is asked for."""
        whole = torch.empty(self._chunk_numel, dtype=self._pool.dtype)
        whole_change = torch.empty_like(whole)
        # Fine-tuning moves some tensors more than others.
        change_std = self._noise * tensor.std * (0.5 + self._draw("reach", tensor.name, 0)[1])
        for block_start in range(0, tensor.numel, BLOCK_NUMEL):
            block = block_start // BLOCK_NUMEL
            place, scale = self._place("base", tensor.name, block, tensor.std)
            change_place, change_scale = self._place("change", tensor.name, block, change_std)
            block_numel = min(BLOCK_NUMEL, tensor.numel - block_start)
            for start in range(0, block_numel, self._chunk_numel):
                numel = min(self._chunk_numel, block_numel - start)
                values, change = whole[:numel], whole_change[:numel]
                torch.mul(self._samples(place + start, numel), scale, out=values)
                if tensor.mean:
                    values.add_(tensor.mean)
                if self._finetune is not None:
                    samples = self._samples(change_place + start, numel)
                    torch.mul(samples, change_scale, out=change)
                    values.add_(change)
                yield values.view(torch.uint8).numpy().data

    def _samples(self, start: int, numel: int) -> Tensor:
        return self._pool[start : start + numel]

    def _place(self, stream: str, name: str, block: int, std: float) -> tuple[int, float]:
        """Return where in the pool a block's samples start, and what they are multiplied by."""
        place, fraction = self._draw(stream, name, block)
        sign = -1 if place % 2 else 1
        return place // 2 % (POOL_NUMEL - BLOCK_NUMEL + 1), sign * _round(
            std * (0.875 + fraction / 4)
        )

    def _draw(self, stream: str, name: str, block: int) -> tuple[int, float]:
        """Return a random 64-bit integer and a random fraction in [0, 1)."""
        model = "" if stream == "base" else self._finetune
        key = f"{self._seed}/{stream}/{model}/{name}/{block}".encode()
        digest = hashlib.blake2b(key, digest_size=12).digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") / 2**32


def _round(number: float) -> float:
    """Return the nearest number with 8 significant bits."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(mantissa * 2**8), exponent - 8)


def _split_evenly(tensors: Sequence[TensorSpec], shards: int) -> list[list[TensorSpec]]:
    """Return that many groups of about equal size, none empty."""
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"shards: {len(tensors)} tensors cannot be split into {shards} files")
    total = sum(tensor.numel for tensor in tensors)
    groups: list[list[TensorSpec]] = [[]]
    done = 0
    for position, tensor in enumerate(tensors):
        full = done * shards >= total * len(groups)
        needed = shards - len(groups) >= len(tensors) - position
        if groups[-1] and len(groups) < shards and (full or needed):
            groups.append([])
        groups[-1].append(tensor)
        done += tensor.numel
    return groups


def _split_by_size(tensors: Sequence[TensorSpec], max_numel: int) -> list[list[TensorSpec]]:
    """Return groups of at most that many elements; a larger tensor has a group of its own."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.numel > max_numel:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.numel
    return groups


def _write_header(
    shard: IO[bytes], tensors: Sequence[TensorSpec], format_dtype: str, itemsize: int
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.numel * itemsize
        header[tensor.name] = {
            "dtype": format_dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces to a multiple of 8, so that the tensors start aligned.
    text += b" " * (-len(text) % 8)
    shard.write(len(text).to_bytes(8, "little") + text)


def _config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "vocab_size": spec.vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    if spec.experts:
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": spec.expert_intermediate,
            "num_local_experts": spec.experts,
            "num_experts_per_tok": min(2, spec.experts),
        }
    return config


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, ModelSpec]:
    """Return the command line's settings and the shape of the model it asks for."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--size", choices=PRESETS, help="start from this model's shape")
    shape = parser.add_argument_group("shape", "replaces what --size says, or says it all")
    for field in ("hidden", "layers", "intermediate", "vocab", "heads", "kv-heads"):
        shape.add_argument(f"--{field}", type=int)
    shape.add_argument("--experts", type=int, help="experts in each layer")
    shape.add_argument("--expert-intermediate", type=int, help="width of an expert")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--shards", type=int, default=1, help="number of files in a model")
    split.add_argument("--max-shard-size", type=_parse_size, help="largest file, as 500MB or 2GiB")
    parser.add_argument(
        "--finetunes", type=int, metavar="K", help="write OUT/base and OUT/tuned-0 to tuned-(K-1)"
    )
    parser.add_argument(
        "--noise", type=float, default=0.01, help="size of a fine-tune's change (default 0.01)"
    )
    settings = parser.parse_args(arguments)
    given = {
        field: value
        for field in ModelSpec.__dataclass_fields__
        if (value := getattr(settings, field)) is not None
    }
    try:
        if settings.size:
            return settings, replace(PRESETS[settings.size], **given)
        # A mixture of experts has no dense feed-forward layer.
        if "expert_intermediate" in given:
            given.setdefault("intermediate", given["expert_intermediate"])
        return settings, ModelSpec(**given)
    except ValueError as error:
        parser.error(str(error))
    except TypeError:
        parser.error("give --size, or all of --hidden --layers --intermediate --vocab --heads ...")


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GiB, got {text!r}")
    return int(float(match[1]) * SIZE_UNITS[match[2] or ""])


def main(arguments: Sequence[str]) -> int:
    """Write the models that the command line asks for and return the exit code."""
    settings, spec = parse_arguments(arguments)
    models: list[tuple[Path, int | None]] = [(settings.out, None)]
    if settings.finetunes is not None:
        tuned = [(settings.out / f"tuned-{k}", k) for k in range(settings.finetunes)]
        models = [(settings.out / "base", None), *tuned]
    for directory, finetune in models:
        started = time.perf_counter()
        try:
            nbytes = write_model(
                directory,
                spec,
                dtype=settings.dtype,
                shards=settings.shards,
                max_shard_nbytes=settings.max_shard_size,
                seed=settings.seed,
                finetune=finetune,
                noise=settings.noise,
            )
        except (OSError, ValueError) as error:
            print(f"make_checkpoint: {error}", file=sys.stderr)
            return 1
        seconds = time.perf_counter() - started
        print(f"{directory}: {nbytes / 1e9:.3f} GB in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
