"""Files that nobody would write, made from a stream of random choices.

Each function makes one input from a ``random.Random``: hypothesis passes one whose choices it can
shrink, ``scripts/fuzz`` one with a seed, so that a number is enough to make an input again. About
half of what is made is sound but for one or two places, because noise is refused at its first byte.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable
from random import Random

DTYPES = ("F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "?", "")
INTEGERS = (
    0,
    1,
    2,
    3,
    4,
    8,
    12,
    24,
    -1,
    255,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**400,
)
TEXTS = (
    *("", "a", "b.weight", "weight_map", "files", "__metadata__", "dtype", "shape", "data_offsets"),
    *("..", "../a", "/etc/passwd", "model.safetensors", "a\0", "\x1b[2J", "\n", "\u202e", "\ufeff"),
    *(
        "\ud800",
        "\udfff\ud800",
        "é",
        "e\u0301",
        "\U0001f600",
        "\u2028",
        "a" * 300,
        "[" * 70,
        '"',
        "\\",
    ),
)
TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"\\ud800", b'{"', b'":', b"[]"),
    *(b"0", b"-0", b"-1", b"1e999", b"1.5", b"true", b"null", b"NaN", b"-Infinity", b"9" * 4400),
    *(
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xef\xbb\xbf",
        b"\0",
        b"\n",
        b"PK",
    ),
    *(b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 8, b"[" * 100, b'{"a":' * 100, b'["' * 40),
)


def mutated(random: Random, content: bytes) -> bytes:
    """Return the content with up to four places changed, cut, doubled or removed."""
    edited = bytearray(content)
    for _ in range(random.randrange(5)):
        at = random.randrange(len(edited) + 1)
        until = min(at + random.choice((1, 1, 2, 4, 8, 64)), len(edited))
        match random.randrange(6):
            case 0 if at < len(edited):
                edited[at] ^= 1 << random.randrange(8)
            case 1:
                del edited[at:until]
            case 2:
                edited[at:at] = random.choice(TOKENS)
            case 3:
                edited[at:until] = random.choice(TOKENS)
            case 4:
                edited[at:at] = edited[at:until] * random.choice((1, 2, 50))
            case _ if random.randrange(4) == 0:
                del edited[at:]
    return bytes(edited)


def value(random: Random, depth: int = 0) -> object:
    """Return what JSON can hold, sometimes deep."""
    kind = random.randrange(9 if depth < 4 else 6)
    match kind:
        case 0:
            return random.choice(INTEGERS)
        case 1 | 2:
            return random.choice(TEXTS)
        case 3:
            return random.choice((None, True, False))
        case 4:
            return random.choice((0.5, 1e308, float("inf"), float("nan"), -0.0))
        case 5:
            return nested(random.choice((3, 60, 64, 66, 200, 990, 3000)))
        case 6:
            return [value(random, depth + 1) for _ in range(random.randrange(4))]
        case _:
            return {
                random.choice(TEXTS): value(random, depth + 1) for _ in range(random.randrange(4))
            }


def nested(depth: int) -> object:
    """Return lists in lists."""
    inner: object = 1
    for _ in range(depth):
        inner = [inner]
    return inner


def json_bytes(random: Random, content: object) -> bytes:
    """Return the content as JSON in one of its spellings, sometimes with a key twice."""
    try:
        text = json.dumps(content, ensure_ascii=random.random() < 0.7)
    except RecursionError:
        text = "[" * 5000 + "]" * 5000
    if random.randrange(8) == 0:
        text = text.replace('"a"', '"b.weight"')
    if random.randrange(20) == 0:
        text = text.replace("1", "9" * random.choice((20, 4400)))
    return text.encode("utf-8", "surrogatepass")


def _changed(random: Random, document: dict[str, object]) -> dict[str, object]:
    """Return the document with up to two values replaced or added, at any depth."""
    for _ in range(random.randrange(3)):
        place = document
        while random.random() < 0.6:
            inner = [part for part in place.values() if isinstance(part, dict)]
            if not inner:
                break
            place = random.choice(inner)
        keys = [*place, random.choice(TEXTS)]
        place[random.choice(keys)] = value(random)
    return document


# --- safetensors


def shard(random: Random) -> bytes:
    """Return a safetensors file."""
    header: dict[str, object] = {}
    if random.random() < 0.5:
        header["__metadata__"] = {"format": "pt"}
    end = 0
    for index in range(random.randrange(5)):
        dtype = random.choice(DTYPES[:8] if random.random() < 0.9 else DTYPES)
        shape = [random.choice((0, 1, 2, 3)) for _ in range(random.choice((0, 1, 2, 2, 70)))]
        itemsize = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)
        begin = end
        for size in shape:
            itemsize *= size
        end += itemsize % 2**20
        name = random.choice(TEXTS) if random.random() < 0.3 else f"t{index}"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    if random.random() < 0.4:
        header = _changed(random, header)
    raw = json_bytes(random, header)
    if random.random() < 0.4:
        raw = mutated(random, raw)
    nbytes = len(raw) if random.random() < 0.85 else random.choice(INTEGERS[:-1]) % 2**64
    content = struct.pack("<Q", nbytes) + raw + bytes(end % 2**16)
    return mutated(random, content) if random.random() < 0.3 else content


# --- JSON beside the shards


def index(random: Random) -> bytes:
    """Return an index, or something like it, for shards ``1.safetensors`` and ``2.safetensors``."""
    weight_map: dict[str, object] = {"a": "1.safetensors", "b": "2.safetensors"}
    if random.random() < 0.5:
        weight_map[random.choice(TEXTS)] = random.choice(
            ("1.safetensors", "sub/1.safetensors", "out/1.safetensors", "x" * 5000, *TEXTS)
        )
    document = {"metadata": {"total_size": 16}, "weight_map": weight_map}
    return _json_file(random, document)


def config(random: Random) -> bytes:
    """Return a ``config.json``."""
    document: dict[str, object] = {
        "architectures": [random.choice(TEXTS)],
        "dtype": "float32",
        "text_config": {"torch_dtype": "float32", "model_type": "x"},
        "auto_map": {"AutoModel": random.choice(("code.Model", "../code.Model", *TEXTS))},
    }
    if random.random() < 0.1:
        document["quantization_config"] = value(random)
    if random.random() < 0.2:
        document["auto_map"] = value(random)
    return _json_file(random, document)


def manifest(random: Random) -> bytes:
    """Return a manifest."""
    sound = {"nbytes": 3, "digest": "ab", "tree": False}
    files: dict[str, object] = {
        random.choice(TEXTS): sound if random.random() < 0.8 else value(random)
        for _ in range(random.randrange(4))
    }
    return _json_file(random, {"version": 1, "files": files, "tensors": {"a": {"numel": 3}}})


def _json_file(random: Random, document: dict[str, object]) -> bytes:
    if random.random() < 0.6:
        document = _changed(random, document)
    raw = json_bytes(random, document if random.random() < 0.95 else value(random))
    return mutated(random, raw) if random.random() < 0.4 else raw


def plan_from(random: Random, sound: bytes) -> bytes:
    """Return a plan as JSON, changed from a sound one."""
    document = json.loads(sound)
    if random.random() < 0.4:
        shards = document["layout"]["shards"]
        shards[0]["name"] = random.choice(TEXTS)
    return _json_file(random, document)


# --- recipes

_RECIPE = b"""\
method: ties
base: models/base
sources:
  - &first {path: models/math, weight: 0.6}
  - path: models/code
    density: 0.3
parameters: {density: 0.2, majority_sign_method: total, scope: tensor}
rules:
  - {tensors: "*.mlp.[0-9]*", density: 0.1}
  - {tensors: "lm_head.weight", copy: base}
semantics: peft
seed: 0
output: {dtype: bfloat16, max_shard_size: 5GB}
"""
_YAML = (
    *(
        "[",
        "]",
        "{",
        "}",
        ", ",
        ": ",
        "? ",
        "- ",
        "&a ",
        "*a",
        "*first",
        "<<: ",
        "<<: *first",
        "|",
        ">",
    ),
    *(
        "!!int ",
        "!!float ",
        "!!str ",
        "!!binary ",
        "!!python/object:os.system ",
        "!x ",
        "!<%ff> ",
        "! ",
    ),
    *("---\n", "...\n", "%YAML 1.2\n", "%YAML 9.9\n", "%TAG ! x\n", "%YAML " + "1" * 4400 + ".1\n"),
    *(
        '"\\UFFFFFFFF"',
        '"\\U00110000"',
        '"\\uD800"',
        '"\\x',
        "'",
        '"',
        "#",
        "\t",
        "\n",
        "\n  ",
        "\r",
        "@",
    ),
    *(
        "0x" + "f" * 500,
        "1" * 401,
        "1" * 399,
        ".inf",
        "-.nan",
        "1e999",
        "0o7",
        "~",
        "\ufeff",
        "\x85",
    ),
    *(
        "\ud800",
        "\x07",
        "\u2028",
        "method",
        "sources",
        "path",
        "weight",
        "density",
        "rules",
        "tensors",
    ),
    *("[" * 70, "- " * 70, "{a: " * 70, "a" * 2000, "[*a, *a, *a, *a]"),
)


def recipe(random: Random) -> str:
    """Return the text of a recipe."""
    match random.randrange(4):
        case 0:
            return "".join(random.choice(_YAML) for _ in range(random.randrange(30)))
        case 1:
            text = _RECIPE.decode()
            for _ in range(random.randrange(4)):
                at = random.randrange(len(text) + 1)
                until = at + random.choice((0, 1, 3, 20))
                text = text[:at] + random.choice(_YAML) + text[until:]
            return text
        case 2:
            return mutated(random, _RECIPE).decode("utf-8", "replace")
    document: dict[str, object] = {
        "method": random.choice(("ties", "linear", "dare_ties", "x")),
        "base": "b",
        "sources": [{"path": "a", "weight": value(random, 3)}, {"path": "c"}],
        "parameters": {"density": random.choice((0.5, 0, [0.1, 0.2], value(random)))},
        "rules": [
            {"tensors": random.choice(("*", "[", "[!]", "[z-a]", "[[:x", *TEXTS)), "drop": True}
        ],
    }
    return json_bytes(random, _changed(random, document)).decode("utf-8", "surrogatepass")


# --- PyTorch files

_GLOBALS = (
    *(
        "collections OrderedDict",
        "torch FloatStorage",
        "torch._utils _rebuild_tensor_v2",
        "torch Size",
    ),
    *("torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v3", "torch float8_e5m2"),
    *("torch.storage UntypedStorage", "os system", "builtins eval", "torch load"),
)


def _text(random: Random) -> bytes:
    raw = random.choice((*TEXTS, "storage", "0", "1", "cpu")).encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(random: Random) -> bytes:
    number = random.choice(INTEGERS)
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw if random.random() < 0.5 else b"K\x02"


def _tensor(random: Random) -> bytes:
    shape = random.choice(
        (b")", b"K\x02\x85", b"K\x02K\x03\x86", _integer(random) + b"\x85", b"h\x00")
    )
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x06tQ"
    arguments = storage + b"K\0" + shape + b"K\1\x85" + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


_OPERATIONS: tuple[Callable[[Random], bytes], ...] = (
    *(_text, _text, _integer, _tensor, _tensor),
    lambda random: b"c" + random.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n",
    lambda random: b"q" + bytes([random.randrange(3)]),
    lambda random: b"h" + bytes([random.randrange(3)]),
    lambda random: (
        random.choice((b"r", b"j")) + struct.pack("<I", random.choice((0, 1, 2**32 - 1)))
    ),
    lambda random: random.choice((b"]", b"}", b")", b"(", b"N", b"\x88", b"\x94", b"\x93")),
    lambda random: random.choice(
        (b"R", b"b", b"Q", b"t", b"u", b"s", b"a", b"e", b"\x85", b"\x86")
    ),
    lambda random: random.choice(
        (b"0", b"1", b"2", b"i", b"o", b"\x81", b"\x92", b"\x82\1", b"P0\n")
    ),
    lambda random: random.choice(
        (b"G" + b"\x7f\xf0" + bytes(6), b"J\xff\xff\xff\xff", b"I01\n", b"L9L\n")
    ),
    lambda random: (
        random.choice((b"\x8d", b"\x96", b"\x8e")) + struct.pack("<Q", random.choice((1, 2**62)))
    ),
    lambda random: b"\x8b" + struct.pack("<i", random.choice((1, -1, 600))) + bytes([127]) * 600,
    lambda random: random.choice((b"]", b")", b"(", b"}", b"N\x85", b"h\x00h\x00\x86q\x00")) * 300,
)


def pickle(random: Random) -> bytes:
    """Return a pickle: operations in any order, or a sound one with some of them moved."""
    if random.random() < 0.4:
        operations = [random.choice(_OPERATIONS)(random) for _ in range(random.randrange(40))]
        return b"".join([random.choice((b"\x80\2", b"\x80\4", b"", b"}q\0")), *operations, b"."])
    raw = b"\x80\2}q\0(X\1\0\0\0a" + _tensor(random) + b"X\1\0\0\0b" + _tensor(random) + b"u."
    operations = _split(raw)
    for _ in range(random.randrange(4)):
        at = random.randrange(len(operations))
        match random.randrange(4):
            case 0:
                operations.insert(at, random.choice(_OPERATIONS)(random))
            case 1:
                operations[at] = random.choice(_OPERATIONS)(random)
            case 2:
                operations[at:at] = operations[at : at + random.randrange(1, 8)]
            case _:
                operations.insert(at, operations.pop(random.randrange(len(operations))))
    raw = b"".join(operations)
    return mutated(random, raw) if random.random() < 0.2 else raw


def _split(raw: bytes) -> list[bytes]:
    starts = [start for _, _, start in pickletools.genops(raw) if start is not None]
    return [raw[a:b] for a, b in zip(starts, [*starts[1:], len(raw)], strict=True)]


def torch_file(random: Random) -> bytes:
    """Return a zip file as torch.save writes it, with a pickle that may be bad."""
    records = {
        "x/data.pkl": pickle(random),
        "x/byteorder": random.choice((b"little", b"little", b"little", b"big", b"x" * 99)),
        "x/data/0": bytes(24),
        "x/version": b"3\n",
    }
    if random.randrange(10) == 0:
        del records[random.choice(list(records))]
    if random.randrange(10) == 0:
        records[random.choice(("y/data.pkl", "x/constants.pkl", "../x", "data.pkl"))] = b"}."
    return archive(records, random.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,)))


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return the records as a zip file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as written:
        for name, content in records.items():
            written.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return stream.getvalue()


_SOUND_ARCHIVE = archive(
    {"x/data.pkl": b"\x80\2}X\1\0\0\0a" + _tensor(Random(3)) + b"s.", "x/data/0": bytes(24)}  # noqa: S311
)


def torch_archive(random: Random) -> bytes:
    """Return a zip file with damage anywhere, its directory above all."""
    directory = _SOUND_ARCHIVE.index(b"PK\1\2")
    if random.random() < 0.5:
        tail = bytearray(_SOUND_ARCHIVE[directory:])
        for _ in range(random.randrange(1, 4)):
            at = random.randrange(len(tail) - 8)
            width = random.choice((1, 2, 4, 8))
            tail[at : at + width] = (random.choice(INTEGERS[:-1]) % 2 ** (8 * width)).to_bytes(
                width, "little"
            )
        return _SOUND_ARCHIVE[:directory] + bytes(tail)
    return mutated(random, _SOUND_ARCHIVE)
