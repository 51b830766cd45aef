"""Names of models as mergekit writes them: ``path[@revision][+adapter[@revision]]``, or a mapping."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streammerge.recipe.refusing import shown


@dataclass(frozen=True, slots=True)
class Reference:
    """A model."""

    path: str
    """Path, or name on the hub."""
    revision: str | None = None
    """Branch, tag or commit."""
    adapter: str | None = None
    """An adapter of it, as a recipe of this tool names it."""

    @property
    def native(self) -> str:
        """How a recipe of this tool names it, without the adapter."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @property
    def source(self) -> dict[str, str]:
        """The keys of a source of a recipe of this tool."""
        adapter = {} if self.adapter is None else {"adapter": self.adapter}
        return {"path": self.native} | adapter


def parse_reference(value: object) -> Reference:
    """Return the model that a text or a mapping names.

    Raises:
        ValueError: It names none; the message says what was expected.
    """
    if isinstance(value, dict):
        return _parse_mapping(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a path or a name on the hub, got {shown(value)}")
    model, plus, adapter = value.partition("+")
    if plus and not adapter:
        raise ValueError(f"expected the name of an adapter behind the +, got {shown(value)}")
    found = _split(model)
    return replace(found, adapter=_split(adapter).native) if plus else found


def _parse_mapping(value: dict[object, object]) -> Reference:
    known = {"model", "lora", "override_architecture"}
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ValueError(
            f"{shown(unknown[0])} is no key of a model; known: {', '.join(sorted(known))}"
        )
    model, adapter = value.get("model"), value.get("lora")
    found = _path_of(model)
    return found if adapter is None else replace(found, adapter=_path_of(adapter).native)


def _path_of(value: object) -> Reference:
    if isinstance(value, str) and value:
        return _split(value)
    if isinstance(value, dict) and set(value) <= {"path", "revision"}:
        path, revision = value.get("path"), value.get("revision")
        if isinstance(path, str) and path and (revision is None or isinstance(revision, str)):
            return Reference(path, revision)
    raise ValueError(f"expected a path or a name on the hub, got {shown(value)}")


def _split(text: str) -> Reference:
    path, _, revision = text.partition("@")
    return Reference(path, revision or None)
