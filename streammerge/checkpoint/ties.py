"""Tensors that are one in memory: which names may be, and whether a model's configuration says so.

A module that is used in two places has two names, and files hold it under one of them, or under both. The
commonest are the input and the output embedding of a language model; encoder-decoder models share
the table of both sides, masked language models a bias as well.

Source: ``_tied_weights_keys`` of transformers 4.57 and 5, facts only; the class defaults of
``tie_word_embeddings`` there for what a configuration leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

TIE_KEY = "tie_word_embeddings"
"""The key of ``config.json`` that says whether a model's embeddings are one tensor."""

_Config = Mapping[str, object]
_NUMBERED = re.compile(r"\.\d+\.")
_OUTER = r"(?P<outer>(?:.+?\.)??)"
_Family = tuple[re.Pattern[str], tuple[str, ...]]


def _families(*table: tuple[str, str]) -> tuple[_Family, ...]:
    return tuple((re.compile(_OUTER + inner), tuple(others.split())) for inner, others in table)


_DECODER = (
    r"(?:(?:model\.language_model|model\.text_model|model\.decoder|model|transformer|biogpt)\.)?"
)
_HEADS = _families(
    # Encoders, whose head guesses masked words.
    (
        r"bert\.embeddings\.word_embeddings\.weight",
        "cls.predictions.decoder.weight lm_head.decoder.weight",
    ),
    (r"distilbert\.embeddings\.word_embeddings\.weight", "vocab_projector.weight"),
    (r"albert\.embeddings\.word_embeddings\.weight", "predictions.decoder.weight"),
    (
        r"\w+\.embeddings\.word_embeddings\.weight",
        "lm_head.decoder.weight cls.predictions.decoder.weight generator_lm_head.weight lm_head.weight",
    ),
    # Decoders.
    (r"(?:(?:gpt_neox|gpt_neox_japanese)\.)?embed_in\.weight", "embed_out.weight lm_head.weight"),
    (r"backbone\.embeddings\.weight", "lm_head.weight"),
    (r"rwkv\.embeddings\.weight", "head.weight"),
    (r"model\.embeddings\.tok_embeddings\.weight", "decoder.weight"),
    (r"model\.text_model\.embeddings\.tok_embeddings\.weight", "lm_head.weight"),
    (r"transformer\.embeddings\.weight", "pred_layer.proj.weight"),
    (r"transformer\.word_embedding\.weight", "lm_loss.weight"),
    (r"transformer\.w\.weight", "lm_head.weight"),
    (
        _DECODER + r"(?:embed_tokens|wte|word_embeddings|tokens_embed)\.weight",
        "lm_head.weight proj_out.weight output_projection.weight lm_head.out_proj.weight",
    ),
)
"""The input embedding, which files usually hold, and what the output embedding may be called."""
_TABLES = _families(
    (
        r"model\.shared\.weight",
        "lm_head.weight model.encoder.embed_tokens.weight model.decoder.embed_tokens.weight",
    ),
    (
        r"led\.shared\.weight",
        "lm_head.weight led.encoder.embed_tokens.weight led.decoder.embed_tokens.weight",
    ),
    (
        r"shared\.weight",
        (
            "lm_head.weight encoder.embed_tokens.weight decoder.embed_tokens.weight "
            "text_encoder.embed_tokens.weight text_decoder.embed_tokens.weight"
        ),
    ),
    (
        r"prophetnet\.word_embeddings\.weight",
        (
            "lm_head.weight prophetnet.encoder.word_embeddings.weight "
            "prophetnet.decoder.word_embeddings.weight"
        ),
    ),
    (r"model\.decoder\.embed_tokens\.weight", "model.encoder.embed_tokens.weight"),
)
"""Tables that encoder and decoder share, and often the head."""
_BIASES = _families(
    (r"cls\.predictions\.bias", "cls.predictions.decoder.bias"),
    (r"predictions\.bias", "predictions.decoder.bias"),
    (r"lm_head\.bias", "lm_head.decoder.bias"),
)
"""A head's bias, which the layer inside the head has too."""
_EVERY = (*_HEADS, *_TABLES, *_BIASES)
_SHARED = (*_TABLES[:-1], *_BIASES)
"""Those of which all names are in use at once, not one or the other."""

_T5_FAMILY = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano"})
"""Values of ``model_type`` whose encoder and decoder always share their table; the key of the
configuration concerns the head alone, and scales its input as well."""
_TIED_BY_DEFAULT = frozenset(
    [
        "albert",
        "aya_vision",
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "biogpt",
        "blenderbot",
        "blenderbot-small",
        "blip",
        "blip_text_model",
        "bloom",
        "camembert",
        "canary",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cohere2_vision",
        "cohere_compass_text",
        "convbert",
        "cpmant",
        "csm",
        "ctrl",
        "data2vec-text",
        "deberta",
        "deberta-v2",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "diffusion_gemma",
        "diffusion_gemma_text",
        "distilbert",
        "electra",
        "ernie",
        "ernie4_5",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "ernie4_5_vl_moe_text",
        "esm",
        "falcon",
        "falcon_mamba",
        "flaubert",
        "flava",
        "florence2",
        "fnet",
        "fun_asr_nano",
        "funnel",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_assistant",
        "gemma4_unified_text",
        "glmasr",
        "got_ocr2",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox_japanese",
        "granite_docling",
        "granite_docling_text",
        "granite_speech",
        "granite_speech_plus",
        "granite_swa",
        "gte",
        "hunyuan_vl",
        "hunyuan_vl_text",
        "hyperclovax_vision_v2",
        "ibert",
        "internvl",
        "janus",
        "jetmoe",
        "jina_embeddings_v3",
        "kimi_k25",
        "kosmos-2",
        "kosmos-2.5",
        "kosmos_2_5_text_model",
        "kosmos_2_text_model",
        "lara_mini",
        "layoutlm",
        "led",
        "lfm2",
        "lfm2_moe",
        "lfm2_vl",
        "lfm3",
        "lfm3_vl",
        "lighton_ocr",
        "longformer",
        "longt5",
        "luke",
        "lxmert",
        "m2m_100",
        "mamba",
        "marian",
        "mbart",
        "megatron-bert",
        "minicpm3",
        "minicpm_ocr",
        "mistral3",
        "mobilebert",
        "modernbert",
        "modernbert-decoder",
        "moonshine",
        "moss_transcribe_diarize",
        "mpnet",
        "mpt",
        "mra",
        "mt5",
        "mvp",
        "neomme",
        "nllb-moe",
        "nomic_bert",
        "nystromformer",
        "openai-gpt",
        "opt",
        "ovis2",
        "paddleocr_vl",
        "paddleocr_vl_text",
        "paligemma",
        "pegasus",
        "pegasus_x",
        "plbart",
        "pop2piano",
        "pp_chart2table",
        "prophetnet",
        "qwen2_5_omni_text",
        "qwen3_asr",
        "qwen3_vl_moe_text",
        "recurrent_gemma",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "seamless_m4t",
        "seamless_m4t_v2",
        "shieldgemma2",
        "smollm3",
        "speech_to_text",
        "speecht5",
        "squeezebert",
        "starcoder2",
        "switch_transformers",
        "t5",
        "t5gemma",
        "t5gemma2",
        "t5gemma2_decoder",
        "t5gemma2_encoder",
        "t5gemma2_text",
        "tapas",
        "trocr",
        "udop",
        "umt5",
        "vaultgemma",
        "vilt",
        "visual_bert",
        "voxtral_realtime",
        "whisper",
        "xglm",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
        "yoso",
        "youtu",
        "zamba",
        "zamba2",
        "zaya",
    ]
)
"""Values of ``model_type`` that are tied where the configuration does not say."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two names that may be those of one tensor."""

    inner: str
    """The name that files usually hold, such as the input embedding's."""
    outer: str
    """The other one, such as the output embedding's."""
    prefix: str
    """What both begin with, outside the model that has them; ``""`` or ``"thinker."``."""


def iter_pairs(names: Collection[str]) -> Iterator[Pair]:
    """Yield the names among ``names`` that may be those of one tensor, two by two.

    Args:
        names: The tensors of one model, or of several together; the fastest is a set or a dictionary.
    """
    for name in names:
        for prefix, others in _matches(name, _EVERY):
            for other in others:
                if prefix + other in names:
                    yield Pair(name, prefix + other, prefix)


def iter_unstored_pairs(names: Collection[str]) -> Iterator[Pair]:
    """Yield pairs of a name among ``names`` and one that is not, though the model has such a module.

    These are the tables of both sides of an encoder-decoder, and the bias inside a head: other tensors
    of the encoder, or of the layer in the head, show that it is there.

    Args:
        names: As for :func:`iter_pairs`.
    """
    for name in names:
        for prefix, others in _matches(name, _SHARED):
            for outer in (prefix + other for other in others if prefix + other not in names):
                module, _, last = outer.rpartition(".")
                beside = module if last == "bias" else module.rpartition(".")[0]
                inside = last == "bias" or module.endswith(("embed_tokens", "word_embeddings"))
                if inside and any(each.startswith(f"{beside}.") for each in names):
                    yield Pair(name, outer, prefix)


def head_pair(name: str) -> Pair | None:
    """Return the input embedding ``name`` and what the output embedding is called; else None.

    Tables that encoders and decoders share are none: their models have several inputs.
    """
    for prefix, others in _matches(name, _HEADS):
        return Pair(name, prefix + others[0], prefix)
    return None


def table_pair(name: str) -> Pair | None:
    """Return the table ``name`` that encoder and decoder share and the output embedding's name; else None."""
    for prefix, others in _matches(name, _TABLES[:-1]):
        return Pair(name, prefix + others[0], prefix)
    return None


def has_word_embedding(names: Collection[str]) -> bool:
    """Return whether any of the tensors is an embedding of words, which an output may share."""
    families = (*_HEADS, *_TABLES)
    return any(True for name in names for _ in _matches(name, families))


def declares_tie(config: _Config | None, pair: Pair) -> bool | None:
    """Return whether a configuration says that the tensors of a pair are one; None where it does not.

    Args:
        config: The parsed ``config.json``; None without one.
        pair: Which tensors.
    """
    if config is None:
        return None
    scope = _scope(config, pair.prefix)
    kind = scope.get("model_type")
    if kind in _T5_FAMILY and not pair.outer.startswith("lm_head"):
        return True
    said = _said(scope)
    if len(said) == 1:
        return said.pop()
    if said:
        # transformers have asked one or the other, depending on their version and the model.
        return None
    text = _text(scope)
    return True if {kind, text.get("model_type")} & _TIED_BY_DEFAULT else None


def says_nothing(config: _Config, pair: Pair) -> bool:
    """Return whether a configuration has no key about the tensors of a pair, and is of no kind that ties them."""
    return not _said(_scope(config, pair.prefix)) and declares_tie(config, pair) is None


def says_apart(config: _Config) -> bool:
    """Return whether a configuration says that no embeddings are shared."""
    return _said(config) == {False}


def scales_when_tied(config: _Config | None) -> bool:
    """Return whether the key that unties a model's embeddings changes what it computes besides."""
    return config is not None and config.get("model_type") in _T5_FAMILY


def _matches(name: str, families: Sequence[_Family]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the beginning of a name, and what the tensor may also be called after it."""
    # Most tensors of a model are in numbered layers, where there are no such tensors.
    if not name.endswith((".weight", ".bias")) or _NUMBERED.search(name):
        return
    for pattern, others in families:
        if found := pattern.fullmatch(name):
            yield found["outer"], others


def _scope(config: _Config, prefix: str) -> _Config:
    """Return the part of a configuration that is about the model below ``prefix``."""
    for part in prefix.split(".")[:-1]:
        inner = config.get(f"{part}_config")
        if isinstance(inner, dict):
            config = inner
    return config


def _text(config: _Config) -> _Config:
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def _said(config: _Config) -> set[bool]:
    """Return what a configuration and that of its text model say about tied embeddings."""
    values = (config.get(TIE_KEY), _text(config).get(TIE_KEY))
    return {value for value in values if isinstance(value, bool)}
