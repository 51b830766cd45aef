"""What mergekit's keys ``tokenizer`` and ``tokenizer_source`` say, as the key ``vocabulary`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streammerge.recipe.dialects.parameters import Findings
from streammerge.recipe.dialects.references import Reference
from streammerge.recipe.refusing import key_path, shown, unknown_key

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "force")
_KINDS = {"model_token": ("kind", "model", "token", "token_id"), "zero": ("kind",)}


class Vocabulary:
    """Translates them."""

    def __init__(
        self,
        found: Findings,
        parse: Callable[[str, object], Reference | None],
        sources: Sequence[Reference],
        base: Reference | None,
    ) -> None:
        """Prepare to translate.

        Args:
            found: Gets what is wrong.
            parse: Reads the name of a model at a path of the recipe.
            sources: The models that are sources.
            base: The base, if it is none of them.
        """
        self._found = found
        self._parse = parse
        self._sources = sources
        self._base = base

    def translate(self, source: object, table: Mapping[str, Any], *, base: object) -> object:
        """Return the value of ``vocabulary``.

        Args:
            source: That of ``tokenizer_source``, if it is there.
            table: That of ``tokenizer``.
            base: That of ``base_model``.
        """
        for key in table:
            if key not in _KEYS:
                self._found.say(f"tokenizer.{key}", unknown_key(key, _KEYS))
        path = "tokenizer.source" if table else "tokenizer_source"
        wanted = table.get("source", "union") if table else source
        made: dict[str, Any] = {"source": "union" if wanted == "union" else 0}
        if wanted == "base" and base is not None:
            made["source"] = self._place(path, base)
        elif wanted not in ("base", "union"):
            # Without a base it is the first model's, as everything beside the tensors is.
            made["source"] = self._place(path, wanted)
        fill = None if base is None else self._place("base_model", base)
        if type(fill) is int:
            made["fill"] = fill
        tokens = table.get("tokens")
        if isinstance(tokens, dict):
            made["tokens"] = {
                str(token): self._token(key_path("tokenizer", "tokens", str(token)), each)
                for token, each in tokens.items()
            }
        elif tokens is not None:
            self._found.say(
                "tokenizer.tokens", f"expected a mapping of tokens, got {shown(tokens)}"
            )
        if table.get("pad_to_multiple_of") is not None:
            made["pad_to_multiple_of"] = table["pad_to_multiple_of"]
        plain = len(made) == 1 and (
            type(made["source"]) is int or made["source"] in ("union", "base")
        )
        return made["source"] if plain else made

    def _place(self, path: str, value: object) -> object:
        """Return a model as a recipe of this tool names it: a source by its index."""
        reference = self._parse(path, value)
        if reference is None:
            return 0
        if self._base == reference:
            return "base"
        return self._sources.index(reference) if reference in self._sources else reference.native

    def _token(self, path: str, value: object) -> dict[str, Any]:
        table = value if isinstance(value, dict) else {"source": value}
        for key in table:
            if key not in _TOKEN_KEYS:
                self._found.say(f"{path}.{key}", unknown_key(key, _TOKEN_KEYS))
        made = self._origin(f"{path}.source", table.get("source"))
        if table.get("force"):
            made["force"] = table["force"]
        return made

    def _origin(self, path: str, source: object) -> dict[str, Any]:
        if not isinstance(source, dict) or "kind" not in source:
            return {"source": self._model(path, source)}
        kind = source["kind"]
        if kind not in _KINDS:
            self._found.say(f"{path}.kind", f"expected model_token or zero, got {shown(kind)}")
            return {"source": "zero"}
        for key in source:
            if key not in _KINDS[kind]:
                self._found.say(f"{path}.{key}", unknown_key(key, _KINDS[kind]))
        if kind == "zero":
            return {"source": "zero"}
        token = source.get("token", source.get("token_id"))
        if token is None or ("token" in source and "token_id" in source):
            self._found.say(path, "give one of token and token_id")
        return {"source": self._model(f"{path}.model", source.get("model")), "token": token}

    def _model(self, path: str, value: object) -> object:
        place = self._place(path, value)
        if isinstance(place, str) and place != "base":
            self._found.say(path, f"{shown(place)} is none of the models; name one that is merged")
            return 0
        return place
