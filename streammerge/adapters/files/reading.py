"""An adapter on disk, read by its header and its configuration; no factor is read.

Accepts PEFT's directories, and single files as diffusers and kohya's scripts write them. Every
tensor of the file gets a place in the result, or the file is refused with a list of the others.
Holds one header, at most 100 MB, and one configuration. The only tensor bytes read are the scalar
alphas of raw files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from streammerge.adapters.files.assembling import ModuleBuilder, Sorted
from streammerge.adapters.files.config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    parse_adapter_config,
    read_adapter_config,
)
from streammerge.adapters.files.forming import FORM_ROLES, FormBuilder
from streammerge.adapters.files.forms import FormedModule
from streammerge.adapters.files.lowercase import (
    MLX_NAME,
    TORCHTUNE_NAME,
    build_lower,
    read_lower_config,
)
from streammerge.adapters.files.naming import (
    PEFT_PREFIX,
    SHARED_STEM,
    foreign_variant,
    may_name_adapters,
    parse_diffusers_name,
    parse_kohya_name,
    parse_lower_name,
    parse_peft_name,
    recognise_naming,
)
from streammerge.adapters.files.patterns import is_saved_module
from streammerge.adapters.files.roles import Role
from streammerge.adapters.files.tuning import TUNED_KINDS, build_tuned
from streammerge.adapters.files.types import (
    Adapter,
    AdapterConfig,
    AdapterKind,
    LowRankModule,
    Naming,
    ScalingVector,
    TokenRows,
    strip_wrappers,
)
from streammerge.adapters.files.wrapping import wrapper_depths
from streammerge.checkpoint.header import read_raw_header, read_safetensors_header
from streammerge.checkpoint.inputs import (
    absolute,
    is_directory,
    is_there,
    open_input,
    parse_json_object,
    read_exactly,
    refuse_constant,
)
from streammerge.checkpoint.torchfile import read_torch_header
from streammerge.checkpoint.types import ShardFile, TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedAdapterError,
    UnsupportedDTypeError,
)

WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
"""PEFT's names of the file with the tensors; the first wins, as in PEFT."""
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_SHOWN = 10
# Where transformers keep what PEFT saves whole because its vocabulary was resized.
_EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_out", "shared"}
)


def is_adapter(path: Path) -> bool:
    """Return whether ``path`` looks like an adapter: by file names, or by tensor names.

    A file that cannot be read is none; whoever reads it as a checkpoint says what is wrong with it.
    """
    if is_directory(path):
        names = {*WEIGHTS_NAMES, CONFIG_NAME}
        raw = _only_raw_file(path)
        return any(is_there(path / name) for name in names) or (raw is not None and is_adapter(raw))
    if path.suffix not in {".safetensors", ".bin", ".pt"}:
        return False
    path = absolute(path)
    try:
        # Most models are told from adapters without parsing what will be parsed again.
        if path.suffix == ".safetensors" and not may_name_adapters(read_raw_header(path)):
            return False
        _, entries = _read_header(path)
    except CheckpointError:
        return False
    return recognise_naming(entry.name for entry in entries) is not None


def read_adapter(path: Path) -> Adapter:
    """Return the adapter at ``path``: what every tensor is for, from headers only.

    Args:
        path: A directory of PEFT, mlx-lm or torchtune, its file with tensors, or a raw file of
            diffusers, kohya's scripts or LyCORIS.

    Raises:
        CheckpointError: There is nothing to read at ``path``, or the configuration is missing.
        HeaderError: Header or configuration cannot be trusted, or tensors have no home.
        MissingTensorError: A factor is missing.
        ShapeMismatchError: Shapes or ranks contradict each other, or tensors are empty.
        UnsupportedAdapterError: The adapter cannot be merged faithfully.
    """
    path = absolute(path)
    weights = _choose_weights(path) if is_directory(path) else path
    file, entries = _read_header(weights)
    if not entries:
        raise MissingTensorError(f"{weights}: holds no tensor; save the adapter again")
    _check_foreign(weights, entries)
    config_path = weights.parent / CONFIG_NAME
    naming = recognise_naming(entry.name for entry in entries)
    if naming in (Naming.MLX, Naming.TORCHTUNE):
        return _assemble_lower(path, file, entries, config_path, naming)
    has_config = weights.name in WEIGHTS_NAMES or naming is Naming.PEFT
    if has_config:
        _demand_config(config_path, weights)
        return _assemble_peft(path, file, entries, config_path)
    if naming is None:
        raise HeaderError(
            f"{weights}: holds no adapter: none of its {len(entries)} tensors is named like a "
            f"factor, such as {_listed(entry.name for entry in entries)}"
        )
    return _assemble_raw(path, file, entries, naming)


def _demand_config(config_path: Path, weights: Path) -> None:
    if not is_there(config_path):
        raise CheckpointError(
            f"{config_path}: is missing; it holds the scaling (r and lora_alpha), without which "
            f"the tensors of {weights.name} say nothing; copy it beside them"
        )


def _choose_weights(directory: Path) -> Path:
    for name in (*WEIGHTS_NAMES, MLX_NAME, TORCHTUNE_NAME):
        # A link to a file that is gone must be reported, not passed over.
        if is_there(directory / name) or (directory / name).is_symlink():
            return directory / name
    raw = _only_raw_file(directory)
    if raw is not None and not is_there(directory / CONFIG_NAME):
        return raw
    raise CheckpointError(
        f"{directory}: holds no {' or '.join(WEIGHTS_NAMES)}; copy it beside {CONFIG_NAME}"
    )


def _only_raw_file(directory: Path) -> Path | None:
    """Return the one safetensors file of a directory without an index; None for none or several."""
    try:
        names = [entry.name for entry in directory.iterdir()]
    except OSError:
        return None
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) != 1 or any(name.endswith(".index.json") for name in names):
        return None
    return directory / found[0]


def _read_header(weights: Path) -> tuple[ShardFile, list[TensorEntry]]:
    if weights.suffix == ".safetensors":
        return read_safetensors_header(weights, file_index=0)
    if weights.suffix in {".bin", ".pt", ".pth"}:
        return read_torch_header(weights, file_index=0)
    raise CheckpointError(
        f"{weights}: unknown kind of file {weights.suffix!r}; expected a directory, .safetensors, "
        ".bin or .pt"
    )


def _check_foreign(weights: Path, entries: Iterable[TensorEntry]) -> None:
    for entry in entries:
        kind = foreign_variant(entry.name)
        if kind is not None:
            raise UnsupportedAdapterError(
                f"{weights}: {entry.name!r} shows {kind}; convert it to a LoRA first, or merge it "
                "into its base with the program that trained it"
            )


def _assemble_peft(
    path: Path, file: ShardFile, entries: Iterable[TensorEntry], config_path: Path
) -> Adapter:
    config = read_adapter_config(config_path)
    where = str(file.path)
    found = Sorted()
    adapters: set[str] = set()
    prefixes: set[bool] = set()
    for entry in entries:
        parsed = parse_peft_name(entry.name)
        if parsed.stem != SHARED_STEM:
            prefixes.add(entry.name.startswith(PEFT_PREFIX))
        adapters |= {parsed.adapter} if parsed.adapter is not None else set()
        found.add(parsed, entry, where=where)
    if len(prefixes) > 1:
        raise HeaderError(
            f"{where}: some names begin with {PEFT_PREFIX!r} and some do not; save it again"
        )
    if len(adapters) > 1:
        raise HeaderError(
            f"{where}: holds {len(adapters)} adapters: {_listed(sorted(adapters))}; save each on "
            "its own with save_pretrained(selected_adapters=[...])"
        )
    builder = ModuleBuilder(config, where=where, config_where=str(config_path))
    formed: tuple[FormedModule, ...] = ()
    if config.kind in TUNED_KINDS:
        tuned = build_tuned(config, found.parts, where=where, config_where=str(config_path))
        formed = tuple(tuned)
    return _finish(
        path,
        file,
        naming=Naming.PEFT,
        config=config,
        found=found,
        builders={"": builder},
        formed=formed,
    )


def _assemble_lower(
    path: Path,
    file: ShardFile,
    entries: Iterable[TensorEntry],
    config_path: Path,
    naming: Naming,
) -> Adapter:
    _demand_config(config_path, file.path)
    config, scaling = read_lower_config(config_path, naming)
    where = str(file.path)
    found = Sorted()
    for entry in entries:
        found.add(parse_lower_name(entry.name), entry, where=where)
    formed = tuple(build_lower(found, scaling, naming=naming, where=where))
    return _finish(
        path, file, naming=naming, config=config, found=found, builders={}, formed=formed
    )


def _assemble_raw(
    path: Path, file: ShardFile, entries: Iterable[TensorEntry], naming: Naming
) -> Adapter:
    where = str(file.path)
    parse = parse_kohya_name if naming is Naming.KOHYA else parse_diffusers_name
    found = Sorted()
    for entry in entries:
        found.add(parse(entry.name), entry, where=where)
    alphas = {
        stem: _read_scalar(file.path, parts.pop(Role.ALPHA))
        for stem, parts in found.parts.items()
        if Role.ALPHA in parts
    }
    ranks = [parts[Role.DOWN].shape[0] for parts in found.parts.values() if Role.DOWN in parts]
    document: dict[str, object] = {
        "peft_type": AdapterKind.LORA.value,
        "r": max([1, *ranks]),
        "use_dora": any(
            Role.MAGNITUDE in parts and Role.DOWN in parts for parts in found.parts.values()
        ),
        "lora_bias": any(Role.UP_BIAS in parts for parts in found.parts.values()),
    }
    config = parse_adapter_config(document, where=where)
    builders = {"": ModuleBuilder(config, where=where, config_where=where, alphas=alphas)}
    for component, inner in _read_diffusers_metadata(file.path).items():
        part = parse_adapter_config({"peft_type": "LORA", **inner}, where=where)
        prefix = f"{component}." if component else ""
        builders[prefix] = ModuleBuilder(part, where=where, config_where=where, prefix=prefix)
    formed = tuple(_formed(found, alphas, where))
    return _finish(
        path, file, naming=naming, config=config, found=found, builders=builders, formed=formed
    )


def _formed(found: Sorted, alphas: dict[str, float], where: str) -> Iterator[FormedModule]:
    """Yield the modules of other forms than two factors, and take their tensors out."""
    for stem, parts in sorted(found.parts.items()):
        if parts.keys() & FORM_ROLES:
            yield from FormBuilder(stem, parts, alpha=alphas.get(stem), where=where).build()


def _finish(
    path: Path,
    file: ShardFile,
    *,
    naming: Naming,
    config: AdapterConfig,
    found: Sorted,
    builders: Mapping[str, ModuleBuilder],
    formed: tuple[FormedModule, ...] = (),
) -> Adapter:
    """Return the adapter, once every tensor has a home."""
    saved, replaced, biases, homeless = _place_whole(config, found)
    modules: list[LowRankModule] = []
    vectors: list[ScalingVector] = []
    tokens: list[TokenRows] = []
    depths = wrapper_depths(found.parts)
    for stem, parts in sorted(found.parts.items()):
        rest = dict(parts)
        if Role.VECTOR in rest and config.kind is AdapterKind.IA3:
            vectors.append(ScalingVector(stem, rest.pop(Role.VECTOR)))
        if Role.TOKENS in rest:
            tokens.append(_token_rows(stem, rest.pop(Role.TOKENS), config, file.path))
        if rest.keys() & _FACTORS and config.kind is AdapterKind.LORA:
            prefix = max((each for each in builders if stem.startswith(each)), key=len)
            modules.append(builders[prefix].build(stem, rest, depths[strip_wrappers(stem)]))
        else:
            homeless += [entry.name for entry in rest.values()]
    if homeless:
        raise HeaderError(
            f"{file.path}: {len(homeless)} tensor(s) have no home in the adapter that its "
            f"configuration describes: {_listed(sorted(homeless))}; nothing is left out silently: "
            "correct the configuration, or remove them"
        )
    if not any((modules, formed, vectors, tokens, saved)):
        raise MissingTensorError(f"{file.path}: holds no factors; save the adapter again")
    _check_vectors(file.path, vectors)
    return Adapter(
        path=path,
        file=file,
        naming=naming,
        config=config,
        modules=tuple(modules),
        formed=formed,
        vectors=tuple(vectors),
        saved=saved,
        replaced=replaced,
        biases=biases,
        tokens=tuple(tokens),
    )


def _place_whole(
    config: AdapterConfig, found: Sorted
) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry], dict[str, TensorEntry], list[str]]:
    """Return saved, replaced and bias tensors by name in the base, and names without a home."""
    saved: dict[str, TensorEntry] = {}
    replaced: dict[str, TensorEntry] = {}
    biases: dict[str, TensorEntry] = {}
    homeless: list[str] = []
    for name, (role, entry) in sorted(found.whole.items()):
        module, _, last = name.rpartition(".")
        if role is Role.SAVED or (role is Role.PLAIN and is_saved_module(config, module)):
            saved[name] = entry
        elif last == "bias" and config.bias != "none":
            biases[name] = entry
        elif role is Role.BASE or (
            last == "weight" and module.rpartition(".")[2] in _EMBEDDINGS and role is Role.PLAIN
        ):
            replaced[name] = entry
        else:
            homeless.append(entry.name)
    return saved, replaced, biases, homeless


def _token_rows(stem: str, entry: TensorEntry, config: AdapterConfig, path: Path) -> TokenRows:
    tables = [
        indices
        for name, indices in config.token_indices.items()
        if not name or stem == name or stem.endswith(f".{name}")
    ]
    if len(tables) != 1:
        raise HeaderError(
            f"{path}: {entry.name!r}: trainable_token_indices of the configuration name "
            f"{len(tables)} lists of tokens for {stem}, expected 1"
        )
    if len(entry.shape) != 2 or entry.shape[0] != len(tables[0]):
        raise ShapeMismatchError(
            f"{path}: {entry.name!r} has shape {list(entry.shape)}, the configuration trains "
            f"{len(tables[0])} tokens; the two files do not belong together"
        )
    return TokenRows(stem, entry, tables[0])


def _check_vectors(path: Path, vectors: Iterable[ScalingVector]) -> None:
    for vector in vectors:
        shape = vector.vector.shape
        if vector.vector.numel == 0 or len(shape) < 2:
            raise ShapeMismatchError(
                f"{path}: {vector.vector.name!r} has shape {list(shape)}, expected [out, 1] or "
                "[1, in]; save the adapter again with its parameters gathered"
            )


def _read_scalar(path: Path, entry: TensorEntry) -> float:
    """Return the value of a scalar tensor."""
    formats = {DType.F64: "<d", DType.F32: "<f", DType.F16: "<e", DType.I64: "<q", DType.I32: "<i"}
    if entry.numel != 1:
        raise ShapeMismatchError(
            f"{path}: {entry.name!r} has shape {list(entry.shape)}, alpha is one number"
        )
    if entry.dtype is not DType.BF16 and entry.dtype not in formats:
        raise UnsupportedDTypeError(f"{path}: {entry.name!r} is an alpha of dtype {entry.dtype}")
    with open_input(path) as (stream, _):
        stream.seek(entry.offset)
        raw = read_exactly(stream, entry.nbytes, path=path)
    if entry.dtype is DType.BF16:
        # The upper half of a float32.
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack(formats[entry.dtype], raw)[0])


def _read_diffusers_metadata(path: Path) -> dict[str, dict[str, object]]:
    """Return the configurations that diffusers keeps in a file's metadata, by component."""
    if path.suffix != ".safetensors":
        return {}
    with open_input(path) as (stream, _):
        # The header has been parsed before; only its free-form part is wanted here.
        nbytes = int.from_bytes(read_exactly(stream, 8, path=path), "little")
        raw = read_exactly(stream, nbytes, path=path)
    header = parse_json_object(raw, where=f"{path}: header", parse_constant=refuse_constant)
    metadata = header.get("__metadata__")
    text = metadata.get(_DIFFUSERS_METADATA) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        return {}
    where = f"{path}: metadata {_DIFFUSERS_METADATA}"
    if len(text) > MAX_CONFIG_BYTES:
        raise HeaderError(f"{where}: has {len(text)} characters, the limit is {MAX_CONFIG_BYTES}")
    flat = parse_json_object(text.encode(), where=where, parse_constant=refuse_constant)
    by_component: dict[str, dict[str, object]] = {}
    for key, value in flat.items():
        component, _, name = key.rpartition(".")
        by_component.setdefault(component, {})[name] = value
    return by_component


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    shown = ", ".join(every[:_SHOWN])
    return f"{shown} and {len(every) - _SHOWN} more" if len(every) > _SHOWN else shown


_FACTORS = frozenset({Role.DOWN, Role.UP, Role.EMBEDDING_DOWN, Role.EMBEDDING_UP})
