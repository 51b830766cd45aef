"""Modules whose rows belong to tensors that a base names or cuts in another way."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from streammerge.adapters.files.forms import FormedModule
from streammerge.adapters.files.types import LowRankModule
from streammerge.adapters.onto_base.fitting import columns_of, norms_inputs, rows_fit, rows_of
from streammerge.adapters.onto_base.homes import Homes, ModuleHome
from streammerge.adapters.onto_base.layouts import Place
from streammerge.adapters.onto_base.locating import Shape
from streammerge.errors import ShapeMismatchError, UnsupportedAdapterError, printable


def placed_homes(
    module: LowRankModule | FormedModule,
    places: Sequence[Place],
    shapes: Mapping[str, Shape],
    *,
    where: str,
) -> list[ModuleHome]:
    """Return the homes of a module's rows.

    Args:
        module: The module.
        places: Where its rows belong.
        shapes: The shapes of the base's tensors there, by name.
        where: The adapter's place in the recipe and its path, for messages.

    Raises:
        ShapeMismatchError: It has other rows than its counterparts.
        UnsupportedAdapterError: It norms the inputs of a layer that is in several tensors.
    """
    total = sum(place.rows for place in places)
    for place in places:
        shape = shapes[place.weight]
        if not rows_fit(module, total, shape):
            raise ShapeMismatchError(
                f"{where}: {printable(module.stem)} changes {rows_of(module)} rows of "
                f"{columns_of(module)}, its counterpart in the base has {total} rows, of "
                f"{printable(place.weight)} {list(shape)}; the adapter was trained on another base: "
                "name the base that it was trained on"
            )
    if len({place.weight for place in places}) > 1 and norms_inputs(module):
        raise UnsupportedAdapterError(
            f"{where}: {printable(module.stem)} norms the inputs (DoRA) of a layer that the base has "
            f"in {len(places)} tensors, of which each would need the others; merge it into a base that "
            "has the layer whole"
        )
    has_bias = not isinstance(module, FormedModule) and module.bias is not None
    return [
        ModuleHome(
            module=module,
            weight=place.weight,
            transposed=False,
            expert=None,
            experts=1,
            first_row=place.first_row,
            bias=f"{place.weight.removesuffix('.weight')}.bias" if has_bias else None,
            rows=(place.at_row, place.at_row + place.rows),
        )
        for place in places
    ]


def overlaps(home: ModuleHome, homes: Iterable[ModuleHome]) -> bool:
    """Return whether another module changes some of the rows that a home says.

    Args:
        home: The home.
        homes: All homes at the same tensor.
    """
    assert home.rows is not None  # noqa: S101 - the caller asks for rows
    return any(
        other is not home
        and (other.rows is None or (other.rows[0] < home.rows[1] and home.rows[0] < other.rows[1]))
        for other in homes
    )


def refuse_shared(homes: Homes, tied: Collection[str], *, where: str) -> None:
    """Raise if a module of mlx-lm changes one of two tied embeddings, which there changes both."""
    for home in homes.modules:
        if home.weight in tied:
            raise UnsupportedAdapterError(
                f"{where}: {printable(home.module.stem)} changes {printable(home.weight)}, which is "
                f"one tensor with another ({' and '.join(map(printable, tied))}) in the base and in "
                "mlx-lm; fuse the adapter with mlx_lm.fuse"
            )
