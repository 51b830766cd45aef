"""The files beside a model's shards: chosen by name, and copied to the output.

Memory: one piece of :data:`COPY_BYTES` while copying, and one parsed JSON file of at most
:data:`~streammerge.checkpoint.reading.MAX_CONFIG_BYTES`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from streammerge.checkpoint.composite import (
    PIPELINE_INDEX,
    READ_SUFFIXES,
    list_component_folders,
)
from streammerge.checkpoint.configuring import changed_config, with_changes
from streammerge.checkpoint.digests import FileDigest
from streammerge.checkpoint.inputs import (
    check_inside,
    open_input,
    parse_json,
    read_limited,
)
from streammerge.checkpoint.outputfile import write_durably
from streammerge.checkpoint.reading import MAX_CONFIG_BYTES
from streammerge.checkpoint.types import Companion, Insertion
from streammerge.errors import CheckpointError, OutputError
from streammerge.units import MIB, format_size

MAX_SIDECAR_BYTES = 256 * MIB
"""Eight times the largest tokenizer; beyond it a file holds weights or data under a wrong name."""
COPY_BYTES = MIB
"""Bytes copied at once: calls cost nothing at this size, and the memory budget does not notice."""

_CONFIG = "config.json"
_MODULES = "modules.json"
_NAMES = frozenset(
    {_CONFIG, "generation_config.json"}
    # Tokenizers, as transformers and mistral-common name their files.
    | {"tokenizer.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"}
    | {"vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "bpe.codes", "dict.txt"}
    | {"vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json"}
    | {"normalizer.json", "emoji.json", "byte_maps.json", "prophetnet.tokenizer"}
    | {"word_shape.json", "word_pronunciation.json"}
    | {"chat_template.jinja", "chat_template.json"}
    # sentence-transformers.
    | {_MODULES, "config_sentence_transformers.json"}
    # Mistral's own programs, and open_clip.
    | {"params.json", "open_clip_config.json"}
)
_PATTERNS = (
    "*tokenizer_config.json",
    "*processor_config.json",
    "sentence_*_config.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "scheduler_config.json",
    # LeRobot: the steps around a policy, and the statistics that they normalise by, which no merge changes.
    "policy_*processor.json",
    "policy_*processor*.safetensors",
)
# System prompts that the model was trained with; compared in lower case.
_PROMPTS = ("*prompt*.txt", "*prompt*.jinja", "*prompt*.jinja2")
# Terms that a derived model has to carry; compared in lower case, because people spell them freely.
_TERMS = ("license*", "licence*", "copying*", "notice*", "use_policy*")
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"}
)
_TEMPLATES_DIRECTORY = "additional_chat_templates"
_WHOLE_DIRECTORIES = {
    _TEMPLATES_DIRECTORY: ("*.jinja",),
    # What generate() of transformers runs instead of its own.
    "custom_generate": ("*.py", "*.txt", "*.json"),
    "prompts": ("*.txt", "*.md", "*.json", "*.jinja", "*.jinja2", "*.yaml"),
}
"""Directories whose files are copied, and which of them."""
_REPLACED = frozenset({"README.md"})
"""What the output has of its own."""
# "1_Pooling": where sentence-transformers keeps the modules after the transformer.
_MODULE_DIRECTORY = re.compile(r"[0-9]+_\w+")
# Blanks alone: \s would take line ends too, and look at each empty line of a file once for every
# empty line before it.
_RELATIVE_IMPORT = re.compile(rb"^[ \t]*(?:from|import)[ \t]+\.(\w+)", flags=re.MULTILINE)


def plan_sidecars(directory: Path) -> tuple[Path, ...]:
    """Return the files beside the shards that a merged model needs: never weights, never a README.

    Config, tokenizer, chat templates, processors, prompts, sentence-transformers modules, licence
    texts, ``custom_generate``, and the Python modules that an ``auto_map`` names, with what those
    import from beside them. Hidden files are passed over. Symbolic links are followed inside the directory and into the Hugging Face
    cache; a link to elsewhere is refused, because what it leads to would be published with the model.

    Args:
        directory: The directory that holds the shards.

    Returns:
        Paths below ``directory``, sorted by their names relative to it. Every file could be opened.

    Raises:
        CheckpointError: The directory or one of the files cannot be read, a file is larger than
            :data:`MAX_SIDECAR_BYTES`, a name is not printable, a link leads out of the directory,
            or a sentence-transformers module has weights that nobody here can read.
        HeaderError: A config is not JSON.
    """
    files, subdirectories = _list_directory(directory)
    chosen = {name for name in files if _is_sidecar(name)}
    for subdirectory in sorted(_WHOLE_DIRECTORIES.keys() & subdirectories):
        inner, _ = _list_directory(directory / subdirectory)
        patterns = _WHOLE_DIRECTORIES[subdirectory]
        chosen |= {f"{subdirectory}/{name}" for name in inner if _matches(name, patterns)}
    if _MODULES in chosen:
        for subdirectory in sorted(subdirectories):
            if _MODULE_DIRECTORY.fullmatch(subdirectory):
                chosen |= _module_files(directory, subdirectory)
    for name in chosen:
        _check_sidecar(directory, name)
    if PIPELINE_INDEX in files:
        chosen |= _pipeline_files(directory, files)
    code = _custom_code(directory, chosen, files)
    for name in code - chosen:
        _check_sidecar(directory, name)
    return tuple(directory / name for name in sorted(chosen | code))


def read_companions(directory: Path) -> tuple[Companion, ...]:
    """Return the files that :func:`plan_sidecars` chooses, with the digest of what they hold.

    Raises:
        CheckpointError: As for :func:`plan_sidecars`.
        HeaderError: As there.
    """
    companions = []
    for path in plan_sidecars(directory):
        digest, nbytes = hashlib.sha256(), 0
        for piece in _iter_pieces(path):
            digest.update(piece)
            nbytes += len(piece)
        name = path.relative_to(directory).as_posix()
        companions.append(Companion(name, nbytes, digest.hexdigest()))
    return tuple(companions)


def list_left_behind(directory: Path, taken: Collection[str]) -> tuple[str, ...]:
    """Return what lies in the directory of a model and does not go to the output, sorted.

    Hidden files are passed over, and so is what the output has of its own.

    Args:
        directory: The directory that holds the shards.
        taken: Names relative to it that are read or copied.

    Returns:
        Names of files, and of folders with ``/`` at their end, where nothing in them is taken.

    Raises:
        CheckpointError: The directory cannot be listed.
    """
    files, subdirectories = _list_directory(directory)
    left = files - set(taken) - _REPLACED
    entered = {name.partition("/")[0] for name in taken if "/" in name}
    for subdirectory in entered & subdirectories:
        inner, deeper = _list_directory(directory / subdirectory)
        left |= {f"{subdirectory}/{name}" for name in inner} - set(taken)
        left |= {f"{subdirectory}/{name}/" for name in deeper}
    left |= {f"{name}/" for name in subdirectories - entered}
    return tuple(sorted(left))


def write_sidecars(
    directory: Path,
    companions: Sequence[Companion],
    out: Path,
    *,
    dtype: str | None,
    settings: Sequence[tuple[str, object]] = (),
) -> dict[str, FileDigest]:
    """Copy the files beside the shards to ``out``; ``config.json`` there says what has changed.

    Every ``dtype`` (transformers from 4.56) and ``torch_dtype`` (before) is updated, those of
    sub-models such as ``text_config`` too; a config with neither gets ``dtype``, unless
    diffusers wrote it. Files that are already in ``out`` are replaced, so that an interrupted copy
    can simply be repeated.

    Args:
        directory: The directory that holds the shards.
        companions: What :func:`read_companions` found there.
        out: The directory of the output; another one than ``directory``.
        dtype: Element type of the output by its torch name, such as ``"bfloat16"``; None copies
            those entries as they are.
        settings: Other keys of ``config.json`` with the values that they get; None removes one.
            Changes that a companion brings come after them.

    Returns:
        What was written, by names relative to ``out``, with ``/`` between parts, sorted.

    Raises:
        CheckpointError: A file is gone, or holds something else than it did.
        HeaderError: ``config.json`` is not a JSON object.
        DiskSpaceError: The disk is full.
        OutputError: A file cannot be written, or ``out`` is ``directory``.
    """
    make_folder(out)
    if out.samefile(directory):
        raise OutputError(f"{out}: is the directory of the input; name another output")
    written: dict[str, FileDigest] = {}
    for companion in companions:
        origin = directory if companion.directory is None else Path(companion.directory)
        path, target = origin / companion.name, out / companion.name
        if target.parent != out:
            make_folder(target.parent)
        is_config = companion.name == _CONFIG and (dtype is not None or settings)
        if is_config or companion.changes:
            text = b"".join(_iter_unchanged(path, companion))
            if is_config:
                text = changed_config(text, dtype, settings, where=str(path))
            config = with_changes(text, companion.changes, where=str(path))
            write_durably(target, [config])
            digest = FileDigest(len(config), hashlib.sha256(config).hexdigest(), tree=False)
        elif companion.insertion is not None:
            digest = _write_with(companion.insertion, _iter_unchanged(path, companion), target)
        else:
            write_durably(target, _iter_unchanged(path, companion))
            digest = FileDigest(companion.nbytes, companion.digest, tree=False)
        written[companion.name] = digest
    return written


def _write_with(insertion: Insertion, pieces: Iterable[bytes], target: Path) -> FileDigest:
    """Write a file with a text inserted; return its digest."""
    digest, nbytes = hashlib.sha256(), 0

    def inserted() -> Iterator[bytes]:
        place = insertion.offset
        for piece in pieces:
            if 0 <= place < len(piece):
                yield piece[:place]
                yield insertion.text.encode()
                yield piece[place:]
            else:
                yield piece
            place -= len(piece)

    def counted() -> Iterator[bytes]:
        nonlocal nbytes
        for piece in inserted():
            digest.update(piece)
            nbytes += len(piece)
            yield piece

    write_durably(target, counted())
    return FileDigest(nbytes, digest.hexdigest(), tree=False)


def _list_directory(directory: Path) -> tuple[set[str], set[str]]:
    """Return the names of files and of subdirectories, without hidden ones."""
    files: set[str] = set()
    subdirectories: set[str] = set()
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    # A link to a file that is gone counts as a file, so that it is reported.
                    (subdirectories if _is_directory(entry) else files).add(entry.name)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror}") from error
    return files, subdirectories


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # Links in a circle, or into a place that may not be entered: opening it tells which.
        return False


def _is_sidecar(name: str) -> bool:
    if name in _NAMES or _matches(name, _PATTERNS):
        return True
    if Path(name).suffix.lower() in _WEIGHT_SUFFIXES:
        return False
    return _matches(name.lower(), _TERMS) or _matches(name.lower(), _PROMPTS)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _pipeline_files(directory: Path, files: set[str]) -> set[str]:
    """Return the index of a pipeline, the files of its folders, and code that the index names."""
    chosen = {PIPELINE_INDEX}
    _check_sidecar(directory, PIPELINE_INDEX)
    index = _read_json(directory / PIPELINE_INDEX)
    values = index if isinstance(index, dict) else {}
    for folder in list_component_folders(directory):
        inner, _ = _list_directory(directory / folder)
        wanted = {
            path.relative_to(directory).as_posix() for path in plan_sidecars(directory / folder)
        }
        wanted |= {
            f"{folder}/{name}"
            for name in inner
            if name.endswith((".json", ".txt")) and ".index." not in name
        }
        wanted |= {f"{folder}/{name}" for name in _code_of(values.get(folder)) & inner}
        for name in wanted:
            _check_sidecar(directory, name)
        chosen |= wanted
    return chosen | (_code_of(values.get("_class_name")) & files)


def _code_of(value: object) -> set[str]:
    """Return the Python file that a pipeline takes a class from, if it lies beside it."""
    library = value[0] if isinstance(value, list) and value else None
    return {f"{library}.py"} if isinstance(library, str) else set()


def _module_files(directory: Path, subdirectory: str) -> set[str]:
    """Return the configs and the tokenizer of one sentence-transformers module."""
    files, _ = _list_directory(directory / subdirectory)
    weights = sorted(name for name in files if Path(name).suffix.lower() in _WEIGHT_SUFFIXES)
    if weights and not any(name.endswith(READ_SUFFIXES) for name in weights):
        raise CheckpointError(
            f"{directory / subdirectory / weights[0]}: weights of a sentence-transformers module "
            "that cannot be read, which the output would lack; save them as safetensors, or, to merge "
            f"the transformer alone, leave {_MODULES} out of a copy of the directory"
        )
    return {
        f"{subdirectory}/{name}"
        for name in files
        if (name.endswith(".json") and ".index." not in name) or _is_sidecar(name)
    }


def _check_sidecar(directory: Path, name: str) -> None:
    """Return if the file belongs here, is of sound size, and its name can be written anywhere."""
    path = directory / name
    # Control characters, and bytes that are not UTF-8: manifests and messages cannot spell them.
    if not path.name.isprintable():
        raise CheckpointError(
            f"{path.parent}: file name {path.name!r} holds characters that cannot be printed; "
            "rename it"
        )
    with open_input(path) as (_, status):
        check_inside(path, directory, of_what="a link")
        if status.st_size > MAX_SIDECAR_BYTES:
            raise CheckpointError(
                f"{path}: has {format_size(status.st_size)}, a file beside the weights may have "
                f"{format_size(MAX_SIDECAR_BYTES)}; move it out of the directory"
            )


def _custom_code(directory: Path, chosen: set[str], files: set[str]) -> set[str]:
    """Return the Python files that the configs name, and those that these import relatively."""
    references: list[str] = []
    for name in sorted(chosen):
        if "/" not in name and name.endswith("config.json"):
            config = _read_json(directory / name)
            references += _iter_strings(
                config.get("auto_map") if isinstance(config, dict) else None
            )
    if _MODULES in chosen:
        modules = _read_json(directory / _MODULES)
        for module in modules if isinstance(modules, list) else ():
            references += _iter_strings(module.get("type") if isinstance(module, dict) else None)
    # "org/name--modeling_x.XModel" lies in another repository; a module that is not here is one
    # that the input lacks too, as after fine-tuning a model that transformers has built in.
    pending = {reference.partition(".")[0] + ".py" for reference in references} & files
    code: set[str] = set()
    while pending:
        name = pending.pop()
        code.add(name)
        imported = _RELATIVE_IMPORT.findall(read_limited(directory / name, MAX_CONFIG_BYTES))
        pending |= {stem.decode("ascii") + ".py" for stem in imported} & (files - code)
    return code


def _iter_strings(value: object) -> Iterator[str]:
    """Yield the texts in a value: alone, or in lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _iter_strings(part)


def _read_json(path: Path) -> object:
    """Return what a file holds that is only copied; of two equal keys the last one wins."""
    return parse_json(
        read_limited(path, MAX_CONFIG_BYTES),
        where=str(path),
        parse_constant=float,
        object_pairs_hook=dict,
    )


def _iter_pieces(path: Path) -> Iterator[bytes]:
    # A generator, so that a failing read is the input's error and a failing write the output's.
    with open_input(path) as (stream, status):
        while piece := stream.read(min(COPY_BYTES, status.st_size + 1)):
            yield piece


def _iter_unchanged(path: Path, companion: Companion) -> Iterator[bytes]:
    """Yield what a file holds; raise at its end if that is not what it held when it was planned."""
    digest, nbytes = hashlib.sha256(), 0
    for piece in _iter_pieces(path):
        digest.update(piece)
        nbytes += len(piece)
        if nbytes > companion.nbytes:
            raise CheckpointError(
                f"{path}: changed since it was planned: it had {companion.nbytes} bytes, and has "
                "more; plan again"
            )
        yield piece
    if digest.hexdigest() != companion.digest:
        raise CheckpointError(
            f"{path}: changed since it was planned: its SHA-256 was {companion.digest}, is "
            f"{digest.hexdigest()}; plan again"
        )


def make_folder(path: Path) -> None:
    """Make a folder of the output, unless it is there.

    Raises:
        OutputError: The system refuses, or it is a link.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise OutputError(f"{path}: is a symbolic link, not a folder of the output; remove it")
    except OSError as error:
        raise OutputError(f"{path}: cannot be created: {error.strerror}") from error
