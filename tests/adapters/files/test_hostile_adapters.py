"""Configurations and names from nobody knows whom are read or refused by a named error, soon."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.adapters.files.config import (
    _INERT,
    _KIND_INERT,
    _KIND_READ,
    _OTHER_INERT,
    _READ,
    _REFUSED,
    parse_adapter_config,
)
from streammerge.adapters.files.naming import (
    parse_diffusers_name,
    parse_kohya_name,
    parse_lower_name,
    parse_peft_name,
    recognise_naming,
)
from streammerge.adapters.files.patterns import build_lookup, compile_pattern, matches_targets
from streammerge.adapters.files.types import AdapterConfig, AdapterKind
from streammerge.errors import HeaderError, StreamMergeError

OTHERS = frozenset().union(*_KIND_READ.values(), *_KIND_INERT.values()) | _OTHER_INERT
KEYS = sorted((_READ | _INERT | OTHERS | _REFUSED.keys()) - {"peft_type"})
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["LORA", "IA3", "none", "all", "q_proj", "pissa"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
DOCUMENTS = st.fixed_dictionaries(
    {"peft_type": st.sampled_from([*AdapterKind, "FOURIERFT", 3])},
    optional=dict.fromkeys([*KEYS, "surprise"], VALUES),
)
PATTERN_TEXT = st.text(alphabet=r"ab.*+?()[]{}|^$\d0,1-", max_size=30)


@settings(max_examples=400, deadline=None)
@given(DOCUMENTS)
def test_any_configuration_is_read_or_refused_by_name(document):
    try:
        found = parse_adapter_config(document, where="adapter_config.json")
    except StreamMergeError as error:
        found = str(error)
    assert isinstance(found, AdapterConfig) or found.startswith("adapter_config.json: ")


@settings(max_examples=1000, deadline=2000)
@given(PATTERN_TEXT, st.integers(min_value=0, max_value=200))
def test_any_pattern_matches_soon_or_is_refused(text, length):
    try:
        compile_pattern(text, where="rank_pattern")
        look_up = build_lookup(((text, 3.0),), 1.0, where="rank_pattern")
    except HeaderError:
        return
    began = time.process_time()
    look_up("a" * length + "b")
    matches_targets(text, "ab" * (length // 2) + "x", where="target_modules")
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a*)*b",
        "(a|a)*b",
        "(a|aa)+b",
        ".*.*.*b",
        "(.*a){20}",
        r"(a)\1*b",
        "a{1,9999}{1,9999}",
    ],
)
def test_patterns_that_may_take_for_ever_are_refused(pattern):
    with pytest.raises(HeaderError):
        compile_pattern(pattern, where="rank_pattern")


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.0\.self_attn\.q_proj",
        r".*\.(q|k|v)_proj",
        r"model\.layers\.(0|1|2)\.mlp\.(up|down)_proj",
        r".*\.gate_up_proj",
        r"layers\.\d+\.self_attn\.[qk]_proj",
        "^lin",
        "(model.*self_attn.*q_proj)|(.*v_proj)",
    ],
)
def test_patterns_that_people_write_are_taken(pattern):
    compile_pattern(pattern, where="rank_pattern")


@settings(max_examples=500)
@given(st.text(max_size=60) | st.from_regex(r"(base_model\.model\.)?[a-z.]{0,20}lora_[AB][a-z.]*"))
def test_any_name_is_parsed(name):
    for parse in (
        parse_peft_name,
        parse_diffusers_name,
        parse_kohya_name,
        parse_lower_name,
    ):
        assert parse(name).stem or not name
    recognise_naming([name])
