"""Layers of models that their authors' files or trainers name and cut in other ways than a base does.

Every line of the tables names a module as the authors' code has it and the modules of diffusers that
hold its rows. ``#`` stands for a layer's number. Names that are alike in both have lines too: in files
that hold more than one model something else stands before them.

Source: the converters of diffusers (``loaders/single_file_utils``, ``scripts/convert_*``), of torchtune
(``models/convert_weights``) and of Megatron-Bridge (``param_mapping``), facts only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from streammerge.adapters.onto_base.locating import BaseNames

_WRAPPERS = re.compile(r"^(?:module\.|model\.)+(?=decoder\.|embedding\.|output_layer)")
"""What Megatron's checkpoints have before the names."""
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
"""What stands before the names in files that hold more than one model, or say which it is."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of an original module, and the same rows in a module of diffusers."""

    module: str
    """The module of diffusers."""
    share: int
    """Rows, in parts of all that the rule has."""
    original: int
    """What comes before them in the original module, in such parts."""
    before: int
    """What comes before them in the module of diffusers."""


@dataclass(frozen=True, slots=True)
class Rule:
    """An original module and the modules of diffusers that hold its rows."""

    original: str
    """The original module."""
    pieces: tuple[Piece, ...]
    """All of its rows, in their order there."""

    @property
    def shares(self) -> int:
        """Parts that the rows of the original module are counted in."""
        return sum(piece.share for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of an adapter's module, and where they belong in a base."""

    weight: str
    """The base's tensor."""
    first_row: int
    """The first of the adapter's rows."""
    rows: int
    """How many they are."""
    at_row: int
    """The row of the base's tensor that the first one belongs to."""


def _renamed(pairs: Mapping[str, str]) -> list[Rule]:
    return [Rule(one, (Piece(other, 1, 0, 0),)) for one, other in pairs.items()]


def _cut(original: str, *parts: tuple[str, int]) -> Rule:
    pieces, before = [], 0
    for module, share in parts:
        pieces.append(Piece(module, share, before, 0))
        before += share
    return Rule(original, tuple(pieces))


def _swapped(original: str, module: str) -> Rule:
    """Shift and scale of a norm, which diffusers has the other way round."""
    return Rule(original, (Piece(module, 1, 0, 1), Piece(module, 1, 1, 0)))


def _qkv(original: str, attention: str) -> Rule:
    return _cut(original, *((f"{attention}.to_{letter}", 1) for letter in "qkv"))


def _added_qkv(original: str, attention: str) -> Rule:
    return _cut(original, *((f"{attention}.add_{letter}_proj", 1) for letter in "qkv"))


def _single(linear: str) -> Rule:
    """The layer of a block with one stream: attention beside a feedforward four times as wide."""
    attention = "single_transformer_blocks.#.attn"
    parts = [(f"{attention}.to_{letter}", 1) for letter in "qkv"]
    return _cut(linear, *parts, ("single_transformer_blocks.#.proj_mlp", 4))


_FLUX = (
    *_renamed(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
            "double_blocks.#.img_mod.lin": "transformer_blocks.#.norm1.linear",
            "double_blocks.#.txt_mod.lin": "transformer_blocks.#.norm1_context.linear",
            "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
            "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
            "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.net.0.proj",
            "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.net.2",
            "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.net.0.proj",
            "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.net.2",
            "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
            "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
            "final_layer.linear": "proj_out",
        }
    ),
    _qkv("double_blocks.#.img_attn.qkv", "transformer_blocks.#.attn"),
    _added_qkv("double_blocks.#.txt_attn.qkv", "transformer_blocks.#.attn"),
    _single("single_blocks.#.linear1"),
    _swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
_SD3 = (
    *_renamed(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "joint_blocks.#.x_block.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
            "joint_blocks.#.x_block.attn.proj": "transformer_blocks.#.attn.to_out.0",
            "joint_blocks.#.x_block.attn2.proj": "transformer_blocks.#.attn2.to_out.0",
            "joint_blocks.#.context_block.attn.proj": "transformer_blocks.#.attn.to_add_out",
            "joint_blocks.#.x_block.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
            "joint_blocks.#.x_block.mlp.fc2": "transformer_blocks.#.ff.net.2",
            "joint_blocks.#.context_block.mlp.fc1": "transformer_blocks.#.ff_context.net.0.proj",
            "joint_blocks.#.context_block.mlp.fc2": "transformer_blocks.#.ff_context.net.2",
        }
    ),
    _qkv("joint_blocks.#.x_block.attn.qkv", "transformer_blocks.#.attn"),
    _qkv("joint_blocks.#.x_block.attn2.qkv", "transformer_blocks.#.attn2"),
    _added_qkv("joint_blocks.#.context_block.attn.qkv", "transformer_blocks.#.attn"),
)
_HUNYUAN = (
    *_renamed(
        {
            "img_in.proj": "x_embedder.proj",
            "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
            "double_blocks.#.img_mod.linear": "transformer_blocks.#.norm1.linear",
            "double_blocks.#.txt_mod.linear": "transformer_blocks.#.norm1_context.linear",
            "double_blocks.#.img_attn_proj": "transformer_blocks.#.attn.to_out.0",
            "double_blocks.#.txt_attn_proj": "transformer_blocks.#.attn.to_add_out",
            "double_blocks.#.img_mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
            "double_blocks.#.img_mlp.fc2": "transformer_blocks.#.ff.net.2",
            "double_blocks.#.txt_mlp.fc1": "transformer_blocks.#.ff_context.net.0.proj",
            "double_blocks.#.txt_mlp.fc2": "transformer_blocks.#.ff_context.net.2",
            "single_blocks.#.modulation.linear": "single_transformer_blocks.#.norm.linear",
            "txt_in.input_embedder": "context_embedder.proj_in",
            "txt_in.t_embedder.mlp.0": (
                "context_embedder.time_text_embed.timestep_embedder.linear_1"
            ),
            "txt_in.t_embedder.mlp.2": (
                "context_embedder.time_text_embed.timestep_embedder.linear_2"
            ),
            "txt_in.c_embedder.linear_1": (
                "context_embedder.time_text_embed.text_embedder.linear_1"
            ),
            "txt_in.c_embedder.linear_2": (
                "context_embedder.time_text_embed.text_embedder.linear_2"
            ),
            "txt_in.individual_token_refiner.blocks.#.self_attn_proj": (
                "context_embedder.token_refiner.refiner_blocks.#.attn.to_out.0"
            ),
            "txt_in.individual_token_refiner.blocks.#.mlp.fc1": (
                "context_embedder.token_refiner.refiner_blocks.#.ff.net.0.proj"
            ),
            "txt_in.individual_token_refiner.blocks.#.mlp.fc2": (
                "context_embedder.token_refiner.refiner_blocks.#.ff.net.2"
            ),
            "txt_in.individual_token_refiner.blocks.#.adaLN_modulation.1": (
                "context_embedder.token_refiner.refiner_blocks.#.norm_out.linear"
            ),
        }
    ),
    _qkv("double_blocks.#.img_attn_qkv", "transformer_blocks.#.attn"),
    _added_qkv("double_blocks.#.txt_attn_qkv", "transformer_blocks.#.attn"),
    _qkv(
        "txt_in.individual_token_refiner.blocks.#.self_attn_qkv",
        "context_embedder.token_refiner.refiner_blocks.#.attn",
    ),
)
_WAN = tuple(
    _renamed(
        {
            **{
                f"blocks.#.{original}.{one}": f"blocks.#.{attention}.{other}"
                for original, attention in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for one, other in {
                    "q": "to_q",
                    "k": "to_k",
                    "v": "to_v",
                    "o": "to_out.0",
                    "k_img": "add_k_proj",
                    "v_img": "add_v_proj",
                    "norm_q": "norm_q",
                    "norm_k": "norm_k",
                    "norm_k_img": "norm_added_k",
                }.items()
            },
            "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
            "blocks.#.ffn.2": "blocks.#.ffn.net.2",
            # The norm before cross attention is the third there and the second here.
            "blocks.#.norm3": "blocks.#.norm2",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
            "head.head": "proj_out",
        }
    )
)
_QWEN = tuple(
    _renamed(
        {
            name: name
            for name in (
                "img_in",
                "txt_in",
                "txt_norm",
                "time_text_embed.timestep_embedder.linear_1",
                "time_text_embed.timestep_embedder.linear_2",
                "norm_out.linear",
                "proj_out",
                *(
                    f"transformer_blocks.#.{inner}"
                    for inner in (
                        *(f"attn.to_{letter}" for letter in "qkv"),
                        *(f"attn.add_{letter}_proj" for letter in "qkv"),
                        "attn.to_out.0",
                        "attn.to_add_out",
                        *(f"{side}_mod.1" for side in ("img", "txt")),
                        *(f"{side}_mlp.net.0.proj" for side in ("img", "txt")),
                        *(f"{side}_mlp.net.2" for side in ("img", "txt")),
                    )
                ),
            )
        }
    )
)
RULES: Mapping[str, Sequence[Rule]] = {
    "Flux": _FLUX,
    "SD3": _SD3,
    "HunyuanVideo": _HUNYUAN,
    "Wan": _WAN,
    "Qwen-Image": _QWEN,
}
"""The tables, by model."""


LANGUAGE_RULES: Sequence[Rule] = (
    *_renamed(
        {
            "embedding.word_embeddings": "model.embed_tokens",
            "output_layer": "lm_head",
            "decoder.layers.#.self_attention.linear_proj": "model.layers.#.self_attn.o_proj",
            "decoder.layers.#.mlp.linear_fc2": "model.layers.#.mlp.down_proj",
        }
    ),
    _cut(
        "decoder.layers.#.mlp.linear_fc1",
        ("model.layers.#.mlp.gate_proj", 1),
        ("model.layers.#.mlp.up_proj", 1),
    ),
    *_renamed(
        {
            "tok_embeddings": "model.embed_tokens",
            "output": "lm_head",
            **{
                f"layers.#.{one}": f"model.layers.#.{other}"
                for one, other in {
                    **{f"attn.{letter}_proj": f"self_attn.{letter}_proj" for letter in "qkv"},
                    "attn.output_proj": "self_attn.o_proj",
                    "mlp.w1": "mlp.gate_proj",
                    "mlp.w2": "mlp.down_proj",
                    "mlp.w3": "mlp.up_proj",
                }.items()
            },
        }
    ),
)
"""Modules of Megatron-Core and of torchtune, and those of transformers that hold their rows."""
GROUPED = "decoder.layers.#.self_attention.linear_qkv"
"""Megatron's module in which every group of heads has its queries, then a key, then a value."""
_GROUPED_PARTS = tuple(f"model.layers.#.self_attn.{letter}_proj" for letter in "qkv")


def find_places(path: str, names: BaseNames, *, groups: int | None) -> tuple[Place, ...]:
    """Return where the rows of a module belong in a base that names or cuts it in another way.

    Args:
        path: The tensor that the adapter changes, ``.weight`` or ``.bias`` at its end, with dots or
            underscores between the modules before.
        names: The base's names.
        groups: Heads of keys and values in the base; None where it does not say.

    Returns:
        Nothing where the tables do not have the module, or the base does not have its counterpart.
    """
    module, _, parameter = path.rpartition(".")
    module = _WRAPPERS.sub("", module)
    if found := re.fullmatch(GROUPED.replace("#", r"(\d+)"), module):
        return _from_grouped(found[1], parameter, names, groups)
    for rule, number, piece in _matches(module):
        for prefix in (*_shared(names), *_PREFIXES):
            if piece is None:
                places = _from_original(rule, number, f"{prefix}%s.{parameter}", names)
            else:
                places = _to_original(rule, number, piece.module, f"{prefix}%s.{parameter}", names)
            if places:
                return places
    return _bare(module, parameter, names)


def _bare(module: str, parameter: str, names: BaseNames) -> tuple[Place, ...]:
    """Return the place of a parameter that is in a module by itself: ``blocks.0.modulation``."""
    if parameter != "weight":
        return ()
    for prefix in (*_shared(names), *_PREFIXES):
        name = names.get(f"{prefix}{module}")
        if name is not None and names.shape(name):
            return (Place(name, 0, names.shape(name)[0], 0),)
    return ()


def _from_grouped(
    number: str, parameter: str, names: BaseNames, groups: int | None
) -> tuple[Place, ...]:
    """Return the places of Megatron's queries, keys and values in a base that has them apart."""
    found = [names.get(f"{module.replace('#', number)}.{parameter}") for module in _GROUPED_PARTS]
    if groups is None or None in found:
        return ()
    places, first_row = [], 0
    for group in range(groups):
        for name in found:
            assert name is not None  # noqa: S101 - it was looked for just now
            rows = names.shape(name)[0] // groups
            places.append(Place(name, first_row, rows, group * rows))
            first_row += rows
    return tuple(places)


def _from_original(rule: Rule, number: str, spelling: str, names: BaseNames) -> tuple[Place, ...]:
    """Return the places in a base of diffusers for a module of the authors'."""
    found = [names.get(spelling % piece.module.replace("#", number)) for piece in rule.pieces]
    if None in found:
        return ()
    places, first_row = [], 0
    for name, piece in zip(found, rule.pieces, strict=True):
        assert name is not None  # noqa: S101 - it was looked for just now
        rows = names.shape(name)[0]
        held = sum(each.share for each in rule.pieces if each.module == piece.module)
        share = rows // held * piece.share
        places.append(Place(name, first_row, share, rows // held * piece.before))
        first_row += share
    return tuple(places)


def _to_original(
    rule: Rule, number: str, module: str, spelling: str, names: BaseNames
) -> tuple[Place, ...]:
    """Return the places in a base of the authors' for a module of diffusers."""
    name = names.get(spelling % rule.original.replace("#", number))
    if name is None:
        return ()
    unit = names.shape(name)[0] // rule.shares
    return tuple(
        Place(name, unit * piece.before, unit * piece.share, unit * piece.original)
        for piece in rule.pieces
        if piece.module == module
    )


def _matches(module: str) -> Iterator[tuple[Rule, str, Piece | None]]:
    """Yield the rules that a module's path fits, its layer's number, and its piece of diffusers'."""
    number = re.search(r"(?<=[._])\d+(?=[._])", module)
    key = _flat(module)
    if number is not None:
        key = f"{key[: number.start()]}#{key[number.end() :]}"
    for found in (key, _flat(module)):
        for rule, piece in _index().get(found, ()):
            yield rule, "" if number is None else number[0], piece


@cache
def _index() -> dict[str, list[tuple[Rule, Piece | None]]]:
    index: dict[str, list[tuple[Rule, Piece | None]]] = {}
    for rules in (*RULES.values(), LANGUAGE_RULES):
        for rule in rules:
            index.setdefault(_flat(rule.original), []).append((rule, None))
            for module in dict.fromkeys(piece.module for piece in rule.pieces):
                piece = next(each for each in rule.pieces if each.module == module)
                index.setdefault(_flat(module), []).append((rule, piece))
    return index


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _shared(names: BaseNames) -> list[str]:
    return [f"{prefix}." for prefix in names.shared_prefixes if prefix]
