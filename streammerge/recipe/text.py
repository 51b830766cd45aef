"""Text to plain values and back, in the core types of YAML 1.2, which JSON is a part of.

The text is trusted with nothing: its size, its nesting and what its aliases expand to are bounded,
and no value is guessed from one of another type.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import yaml

from streammerge.errors import RecipeError
from streammerge.recipe.refusing import shown

MAX_TEXT_BYTES = 2**20
"""A recipe has tens of lines; a megabyte is a mistaken file, and slow to parse."""
MAX_NODES = 100_000
"""Values in a document with its aliases written out; nested aliases double it with every level."""
MAX_DEPTH = 64
"""Nesting; a recipe needs 4 levels, and the YAML parser recurses on each."""
MAX_DIGITS = 400
"""Digits of an integer; no key takes more than 20, and Python refuses to convert 4,300."""


def load_document(text: str, *, origin: str) -> object:
    """Return the plain values of a YAML or JSON text, as yet unchecked.

    Args:
        text: One YAML document.
        origin: What to call the text in messages: a file name.

    Raises:
        RecipeError: The text is not YAML.
    """
    try:
        return _load_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from error.__cause__


def load_documents(text: str, *, origin: str) -> list[object]:
    """Return the plain values of every document of a YAML text, but for what a line of dashes at its end makes.

    Args:
        text: YAML documents, with ``---`` between them.
        origin: What to call the text in messages: a file name.

    Raises:
        RecipeError: The text is not YAML.
    """
    try:
        documents = _load_all(text)
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from error.__cause__
    while len(documents) > 1 and documents[-1] is None:
        documents.pop()
    return documents


def dump_document(document: object) -> str:
    """Return plain values as YAML that loads as the same values; equal values, equal text."""
    # A folded line would be legal YAML; one value a line is what people compare.
    return yaml.dump(
        document, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=sys.maxsize
    )


def _load_yaml(text: str) -> object:
    """Return the plain values of one YAML document."""
    documents = _load_all(text, at_most=1)
    return documents[0] if documents else None


def _load_all(text: str, *, at_most: int = MAX_NODES) -> list[object]:
    """Return the plain values of YAML documents."""
    nbytes = len(text.encode("utf-8", "surrogatepass"))
    if nbytes > MAX_TEXT_BYTES:
        raise RecipeError(f"the text has {nbytes} bytes; a recipe may have {MAX_TEXT_BYTES}")
    try:
        loader = _RecipeLoader(text)
        try:
            if at_most == 1:
                return [loader.get_single_data()]
            documents: list[object] = []
            while loader.check_data():  # type: ignore[no-untyped-call]
                documents.append(loader.get_data())
            return documents
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = f"U+{ord(text[error.position]):04X}"
        raise RecipeError(f"line {line}: the character {code} cannot stand in YAML") from error
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(where + " ".join(said.split())) from error
    # PyYAML lets these through: an escape beyond Unicode, and a version number of 4,300 digits.
    except (ValueError, OverflowError) as error:
        line = loader.line + 1
        raise RecipeError(f"line {line}: a number in the text is too large: {error}") from error


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's core types only; duplicate keys, deep nesting and swelling aliases refused."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._n_nodes = 0
        self._node_sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:
        """Return the next value, counting it, or what its alias stands for."""
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.current_event.start_mark
        node: Any
        if is_alias:
            node = super().compose_node(parent, index)
            if node not in self._node_sizes:
                raise _yaml_error("an alias inside the value that it stands for", mark)
            self._n_nodes += self._node_sizes[node]
        else:
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise _yaml_error(f"nested deeper than {MAX_DEPTH} levels", mark)
            n_before = self._n_nodes
            node = super().compose_node(parent, index)
            self._n_nodes += 1
            self._node_sizes[node] = self._n_nodes - n_before
            self._depth -= 1
        if self._n_nodes > MAX_NODES:
            raise _yaml_error(f"more than {MAX_NODES} values once aliases are written out", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping, no key of which appears twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        # Merge keys are resolved later, so an explicit key may override one that they bring.
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _yaml_error("expected text as a key", key.start_mark)
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                said = f"the key {shown(key.value)} appears twice, first on line {first}"
                raise _yaml_error(said, key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """Return a text, with the surrogate pairs of JSON's escapes joined into characters."""
        text = str(self.construct_scalar(node))
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")

    def construct_core(self, node: yaml.ScalarNode) -> int | float | bool | None:
        """Return the number, bool or null that a scalar of YAML's core types spells."""
        text = str(self.construct_scalar(node))
        kind = node.tag.rpartition(":")[2]
        if not _CORE_TYPES[kind].fullmatch(text):
            raise _yaml_error(f"expected {kind}, got {shown(text)}", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            # float() reads inf and nan without YAML's dot.
            return float(re.sub(r"\.(?=[iInN])", "", text))
        if len(text) > MAX_DIGITS:
            raise _yaml_error(f"an integer of {len(text)} digits", node.start_mark)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _RecipeDumper(yaml.SafeDumper):
    """Quotes each text that YAML 1.1 or 1.2 would read as something else; writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        """Return True: an alias would depend on which values happen to be one object."""
        del data
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """Return the text's node, in double quotes where only an escape keeps it as it is.

        PyYAML writes line breaks like U+0085 as they are, and reads them back as spaces.
        """
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _yaml_error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_CORE_TYPES = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}
"""YAML 1.2.2, section 10.3.2: what an unquoted scalar must look like to be no text."""
_TAG = "tag:yaml.org,2002:"
# PyYAML's own are YAML 1.1: no and on are false and true, 1e-3 is text, 1:30 is 90, 012 is 10.
_RecipeLoader.yaml_implicit_resolvers = {}
_RecipeLoader.yaml_constructors = {
    **{_TAG + kind: _RecipeLoader.construct_core for kind in _CORE_TYPES},
    f"{_TAG}str": _RecipeLoader.construct_text,
    f"{_TAG}seq": _RecipeLoader.construct_yaml_seq,
    f"{_TAG}map": _RecipeLoader.construct_yaml_map,
    None: _RecipeLoader.construct_undefined,
}
_RecipeLoader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<\Z"), ["<"])
for _kind, _spelling in _CORE_TYPES.items():
    for _yaml in (_RecipeLoader, _RecipeDumper):
        _whole = re.compile(rf"(?:{_spelling.pattern})\Z")
        _yaml.add_implicit_resolver(_TAG + _kind, _whole, None)
_RecipeDumper.add_representer(str, _RecipeDumper.represent_text)
