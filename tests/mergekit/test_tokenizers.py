"""Rows drawn by token are those that mergekit draws, and tokenizers encode alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from models import Tensors, load_model
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import streammerge

NEAR = 2e-5
"""Relative distance of a row, for both compute in float32."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = "x y w <im> q z base <s> none x"

TOKENS = """
tokenizer:
  source: union
  tokens:
    <im>: {source: C}
    q: {source: {kind: model_token, model: A, token: "y"}, force: true}
    x: {source: {kind: zero}}
    w: {source: B, force: true}
"""
LINEAR = """
merge_method: linear
models:
- {model: A, parameters: {weight: 0.5}}
- {model: B, parameters: {weight: 0.3}}
- {model: C, parameters: {weight: 0.2}}
dtype: float32
"""
TIES = """
merge_method: ties
base_model: A
models:
- {model: B, parameters: {weight: 0.6, density: 0.5}}
- {model: C, parameters: {weight: 0.4, density: 0.7}}
dtype: float32
"""
TASK = (
    TIES.replace("ties", "task_arithmetic")
    .replace(", density: 0.5", "")
    .replace(", density: 0.7", "")
)
SLERP = """
merge_method: slerp
base_model: A
models: [{model: A}, {model: B}]
parameters: {t: 0.3}
dtype: float32
"""
CASES = {
    "a union": LINEAR + "tokenizer_source: union",
    "a union over a base": LINEAR + "base_model: A\ntokenizer_source: union",
    "the base's": LINEAR + "base_model: A\ntokenizer_source: base",
    "a model's": LINEAR + "tokenizer_source: C",
    "a model's, as a mapping": LINEAR + "tokenizer: {source: B}",
    "tokens of their own": LINEAR + TOKENS,
    "ties over a union": TIES + "tokenizer_source: union",
    "ties over the base's": TIES + "tokenizer_source: base",
    "task vectors over a union": TASK + "tokenizer_source: union",
    "task vectors over a model's": TASK + "tokenizer_source: B",
    "spheres over a union": SLERP + "tokenizer_source: union",
    "padded": LINEAR + "tokenizer: {source: union, pad_to_multiple_of: 8}",
}


def write_model(path: Path, tokenizer: PreTrainedTokenizerBase, *, seed: int, tied: bool) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


UNKNOWN, END = "<unk>", "<|end|>"


def of_words(words: list[str], added: list[str]) -> PreTrainedTokenizerBase:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=UNKNOWN)
    made.add_tokens([AddedToken(each, special=True) for each in added])
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["heads apart", "tied"])
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Three models of other words, in another order, with other added tokens."""
    root = tmp_path_factory.mktemp("vocabularies")
    words = {
        "A": (["<unk>", "x", "y", "z", "base"], ["<s>"]),
        "B": (["<unk>", "y", "x", "w"], ["<im>"]),
        "C": (["<unk>", "w", "q", "x"], ["<im>", "<s>"]),
    }
    return {
        name: write_model(root / name, of_words(*each), seed=seed, tied=request.param)
        for seed, (name, each) in enumerate(words.items())
    }


def placed(text: str, paths: dict[str, Path]) -> str:
    """Return a configuration with the models' paths in the place of their letters."""

    def place(value: object) -> object:
        if isinstance(value, dict):
            return {key: place(each) for key, each in value.items()}
        if isinstance(value, list):
            return list(map(place, value))
        return str(paths[value]) if isinstance(value, str) and value in paths else value

    return yaml.safe_dump(place(yaml.safe_load(text)), sort_keys=False)


def run_mergekit(text: str, out: Path) -> Path:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(
        copy_tokenizer=True, write_model_card=False, quiet=True, clone_tensors=True
    )
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options)
    return out


def merge(text: str, directory: Path) -> Path:
    (directory / "config.yml").write_text(text)
    # mergekit's imports are in this process too.
    streammerge.merge(directory / "config.yml", directory / "ours", memory="4GiB")
    return directory / "ours"


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    return found


def numbers_of(
    mine: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Return the two numbers of every token."""
    assert mine.get_vocab().keys() == other.get_vocab().keys()
    return [(number, other.get_vocab()[token]) for token, number in mine.get_vocab().items()]


def check_rows(ours: Tensors, theirs: Tensors, numbers: list[tuple[int, int]]) -> None:
    """Check that rows of the same token are alike, and all that has no rows of tokens."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        mine, other = ours[name].double(), theirs[name].double()
        if name in (EMBEDDING, HEAD):
            mine = mine[[one for one, _ in numbers]]
            other = other[[number for _, number in numbers]]
        assert mine.shape == other.shape, name
        distance = float(torch.dist(mine, other))
        assert distance <= NEAR * float(other.norm()) + 1e-9, (name, distance)


@pytest.mark.parametrize("case", CASES)
def test_rows_are_mergekits_and_tokenizers_encode_alike(
    case: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    text = placed(CASES[case], paths)
    theirs = run_mergekit(text, tmp_path / "theirs")
    ours = merge(text, tmp_path)
    mine, other = AutoTokenizer.from_pretrained(ours), AutoTokenizer.from_pretrained(theirs)

    if "union" not in CASES[case]:
        assert mine.get_vocab() == other.get_vocab()
    # In a union the order of what is added is that of a set, and so is the first model without a base.
    assert tokens_of(mine, TEXT) == tokens_of(other, TEXT)
    tensors = load_model(ours), load_model(theirs)
    # Rows behind the vocabulary stand for no token.
    check_rows(*tensors, numbers_of(mine, other))
    assert tensors[0][EMBEDDING].shape == tensors[1][EMBEDDING].shape
    configs = [json.loads((each / "config.json").read_text()) for each in (ours, theirs)]
    assert configs[0]["vocab_size"] == configs[1]["vocab_size"] == len(tensors[0][EMBEDDING])


# -- byte-pair encodings: what users have

FIRST = ["the quick brown fox jumps over the lazy dog", "how vexingly quick daft zebras jump"] * 20
SECOND = ["le cœur a ses raisons que la raison ne connaît point", "où sont les neiges d'antan"] * 20


def of_pairs(texts: list[str], chat: list[str]) -> PreTrainedTokenizerBase:
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    made.add_tokens([AddedToken(each, special=True) for each in chat])
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pairs")
    made = {"A": of_pairs(FIRST, ["<|im|>"]), "B": of_pairs(SECOND, ["<|user|>"])}
    return {
        name: write_model(root / name, each, seed=seed, tied=False)
        for seed, (name, each) in enumerate(made.items())
    }


@pytest.mark.parametrize("case", ["task vectors over a union", "spheres over a union"])
def test_a_union_of_byte_pairs_is_mergekits_and_round_trips(
    case: str, pairs: dict[str, Path], tmp_path: Path
) -> None:
    text = CASES[case].replace("- {model: C, parameters: {weight: 0.4}}\n", "")
    text = placed(text, pairs)
    theirs = run_mergekit(text, tmp_path / "theirs")
    ours = merge(text, tmp_path)
    mine, other = AutoTokenizer.from_pretrained(ours), AutoTokenizer.from_pretrained(theirs)
    said = [*FIRST[:2], *SECOND[:2], "a <|im|>b<|user|> c<|end|>"]

    check_rows(load_model(ours), load_model(theirs), numbers_of(mine, other))
    for each in said:
        assert tokens_of(mine, each) == tokens_of(other, each)
        assert mine.decode(mine(each)["input_ids"]) == each
    model = AutoModelForCausalLM.from_pretrained(ours)
    assert model(**mine(said[0], return_tensors="pt")).logits.shape[-1] == len(mine)
