"""Names of models as mergekit writes them: ``path[@revision][+adapter[@revision]]``, or a mapping."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.recipe.refusing import shown


@dataclass(frozen=True, slots=True)
class Reference:
    """A model."""

    path: str
    """Path, or name on the hub."""
    revision: str | None = None
    """Branch, tag or commit."""

    @property
    def native(self) -> str:
        """How a recipe of this tool names it."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


def parse_reference(value: object) -> Reference:
    """Return the model that a text or a mapping names.

    Raises:
        ValueError: It names none, or one with an adapter; the message says what was expected.
    """
    if isinstance(value, dict):
        return _parse_mapping(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a path or a name on the hub, got {shown(value)}")
    model, plus, adapter = value.partition("+")
    if plus:
        raise ValueError(_refuse_adapter(model, adapter))
    return _split(model)


def _parse_mapping(value: dict[object, object]) -> Reference:
    known = {"model", "lora", "override_architecture"}
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ValueError(
            f"{shown(unknown[0])} is no key of a model; known: {', '.join(sorted(known))}"
        )
    model, adapter = value.get("model"), value.get("lora")
    if adapter is not None:
        raise ValueError(_refuse_adapter(_path_of(model).native, _path_of(adapter).native))
    return _path_of(model)


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


def _refuse_adapter(model: str, adapter: str) -> str:
    return (
        f"the adapter {shown(adapter)} has to be merged into {shown(model)} first, by a recipe of its own "
        "with `method: task_arithmetic`, the model as `base` and the adapter as its one source; then name "
        "what comes of it"
    )
