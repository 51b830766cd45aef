"""Modules that are spelled one way in memory and another way in files.

transformers 5 renames modules while it loads a checkpoint and back while it saves one. Adapters
carry the names in memory at the time of training, so either spelling may meet either.

Source: the renamings of transformers 5 (``conversion_mapping``), facts only. Prefixes that are
exchanged as a whole need no entry here: :mod:`streammerge.adapters.onto_base.locating` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Each pair is tried in both directions, at the beginning of a name. The longer spelling comes
# first, so that a name is not taken for the shorter one inside it.
_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.language_model.", "language_model."),
    ("model.text_model.", "text_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("lm_head.", "text_model.lm_head."),
    ("lm_head.", "embed_out."),
)
# Towers of models that see or hear, wherever they are.
_TOWERS = (
    "vision_tower",
    "vision_model",
    "visual",
    "audio_tower",
    "multi_modal_projector",
)
_OUTER = ("thinker.", "module.")
# Parts inside a layer.
_INNER = (
    (".mlp.gate.", ".block_sparse_moe.gate."),
    (".mlp.router.", ".block_sparse_moe.gate."),
    (".mlp.router.", ".mlp.gate."),
    (".mlp.experts.", ".block_sparse_moe.experts."),
)
_EXPERT = re.compile(r"(.+\.experts\.\d+\.)(gate_proj|up_proj|down_proj|w1|w2|w3)(\..+)")
_EXPERT_PARTS = {
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}


def renamings(path: str) -> Iterator[str]:
    """Yield what else a tensor may be called, the likeliest first; ``path`` itself is not among it.

    Args:
        path: The name that the adapter has for it.
    """
    seen = {path}
    for inner in _inner_spellings(path):
        for spelled in _outer_spellings(inner):
            if spelled not in seen:
                seen.add(spelled)
                yield spelled


def _inner_spellings(path: str) -> Iterator[str]:
    spellings = [path]
    for one, other in _INNER:
        spellings += [path.replace(a, b) for a, b in ((one, other), (other, one)) if a in path]
    for spelling in spellings:
        yield spelling
        if found := _EXPERT.fullmatch(spelling):
            yield f"{found[1]}{_EXPERT_PARTS[found[2]]}{found[3]}"


def _outer_spellings(path: str) -> Iterator[str]:
    yield path
    for outer in _OUTER:
        if path.startswith(outer):
            yield from _outer_spellings(path.removeprefix(outer))
    for one, other in _PREFIXES:
        for known, spelled in ((one, other), (other, one)):
            if path.startswith(known):
                yield spelled + path.removeprefix(known)
    for tower in _TOWERS:
        if path.startswith(f"model.{tower}."):
            yield path.removeprefix("model.")
        elif path.startswith(f"{tower}."):
            yield f"model.{path}"
