"""How quantised weights become numbers again: the command of the library that can do it.

The calls are those that the libraries document: ``dequantize`` of models and of quantisation configs
in transformers, ``gguf_file`` there, and ``dequantize_model`` of GPTQModel, which reads GPTQ and AWQ.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

_WHY = "an average of quantised numbers is meaningless; dequantise the model first"
_BY_GPTQMODEL = (
    "gptqmodel",
    "from gptqmodel.utils.model_dequant import dequantize_model; dequantize_model({path}, {out})",
)
_BY_TRANSFORMERS = (
    "from transformers import {names}; p, o = {path}, {out}; "
    'AutoModelForCausalLM.from_pretrained(p, dtype="bfloat16"{options}){then}.save_pretrained(o); '
    "AutoTokenizer.from_pretrained(p{file}).save_pretrained(o)"
)
_NAMES = "AutoModelForCausalLM, AutoTokenizer"


def dequantising_advice(method: str, directory: Path) -> str:
    """Return why codes are not averaged and how to get numbers, ending without a full stop.

    Args:
        method: What quantised them, as ``quant_method`` in a config says it; any text.
        directory: Where the model lies.
    """
    found = _command(method.lower(), directory)
    if found is None:
        return (
            f"{_WHY} with the library that quantised it and save it in bfloat16, or take the model "
            "that it was made from"
        )
    package, command = found
    return f"{_WHY} and save it in bfloat16 (pip install {package}): {command}"


def gguf_advice(path: Path) -> str:
    """Return what a GGUF file is and the command that makes a model of it.

    Args:
        path: The file.
    """
    name = json.dumps(path.name, ensure_ascii=False)
    code = _BY_TRANSFORMERS.format(
        names=_NAMES,
        path=_text(path.parent),
        out=_text(path.with_suffix("")),
        options=f", gguf_file={name}",
        then="",
        file=f", gguf_file={name}",
    )
    return (
        "is a GGUF file, whose weights are quantised or rearranged; use the safetensors original, or "
        f"dequantise it (pip install transformers accelerate gguf): {_python(code)}"
    )


def _command(method: str, directory: Path) -> tuple[str, str] | None:
    """Return packages and a command line; None where no library is known to do it."""
    out = _text(directory.with_name(f"{directory.name}-bf16"))
    path = _text(directory)
    if "gptq" in method or "awq" in method:
        package, code = _BY_GPTQMODEL
        return package, _python(code.format(path=path, out=out))
    if method.startswith("bitsandbytes"):
        code = _BY_TRANSFORMERS.format(
            names=_NAMES, path=path, out=out, options="", then=".dequantize()", file=""
        )
        return "transformers accelerate bitsandbytes", _python(code)
    configured = {
        "compressed-tensors": ("CompressedTensorsConfig", " compressed-tensors"),
        "fp8": ("FineGrainedFP8Config", ""),
        "mxfp4": ("Mxfp4Config", " accelerate"),
    }.get(method)
    if configured is None:
        return None
    config, package = configured
    code = _BY_TRANSFORMERS.format(
        names=f"{_NAMES}, {config}",
        path=path,
        out=out,
        options=f", quantization_config={config}(dequantize=True)",
        then="",
        file="",
    )
    return f"'transformers>=5'{package}", _python(code)


def _text(path: Path) -> str:
    # A JSON string is a Python string, and has no single quotes for the shell to stumble over.
    return json.dumps(str(path), ensure_ascii=False)


def _python(code: str) -> str:
    return f"python -c {shlex.quote(code)}"
