"""How the twins are asked for what a recipe asks for: one row per method.

Parameters are spelled as in recipes. What a recipe leaves out stays out, so that a twin's defaults
and presets check streammerge's. One value per source is a tuple, and longer ones are cut to the
sources there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from twins import competition, families, localising, matrices, sce, selecting, spherical, sums
from twins.shapes import Array, Model, over_model, spread, subtract_base
from twins.sparsifying import della_probabilities

Parameters = Mapping[str, Any]
Draw = Callable[[int, Array], Array]
"""Given a source and the probability of each of its entries: 1 for those that are kept."""
Merge = Callable[..., Array]
"""Takes base and sources; as keywords ``semantics``, ``draw`` and what the recipe gives."""
Grid = Literal["fine", "small", "coarse"]


@dataclass(frozen=True)
class Twin:
    """The twin of one method."""

    merge: Merge
    """Merges."""
    tries: tuple[Parameters, ...] = ()
    """Parameters to try beside the method's own examples."""
    counts: tuple[int, ...] = (1, 2, 3, 5)
    """How many sources to try."""
    mergekit: Mapping[str, str] | None = None
    """What mergekit calls its parameters, if it has the method and draws no random numbers."""
    words: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    """What it says for their values, by parameter."""
    coarsely: bool = False
    """Whether mergekit computes factors in float32 whatever the tensors are."""
    grid: Grid = "fine"
    """``coarse`` where what is ranked must be exact in float32 after a mean and a square, ``small``
    where it must not come to the limits of functions."""
    loosely: float = 1.0
    """How many times farther off values may be, where errors grow with what is particular."""
    chooses: bool = False
    """Whether it leaves entries as they are in the base, all but for chosen ones."""
    small_only: bool = False
    """Whether time grows faster than the number of entries, so that large tensors take too long."""
    over_model: tuple[str, ...] = ()
    """Semantics under which ``scope: model`` is meant."""


def merge_models(
    twin: Twin,
    base: Model | None,
    sources: Sequence[Model],
    parameters: Parameters,
    *,
    semantics: str,
    draw: Callable[[str], Draw],
) -> dict[str, Array]:
    """Return whole models merged, tensor by tensor or as one, as the recipe says.

    Args:
        twin: The method's twin.
        base: The base, or None.
        sources: The sources.
        parameters: What the recipe gives.
        semantics: Whose definition.
        draw: Given a tensor's name: what keeps entries at random.
    """
    asked = {name: _cut(value, len(sources)) for name, value in parameters.items()}
    scope = asked.pop("scope", "model" if semantics in twin.over_model else "tensor")
    if scope == "model":
        assert base is not None
        return over_model(twin.merge, base, sources, semantics=semantics, draw=None, **asked)
    return {
        name: twin.merge(
            None if base is None else base[name],
            [source[name] for source in sources],
            semantics=semantics,
            draw=draw(name),
            **asked,
        )
        for name in sources[0]
    }


def ask_mergekit(twin: Twin, parameters: Parameters, count: int) -> dict[str, Any] | None:
    """Return parameters as mergekit spells them, or None where it cannot be asked for that."""
    names = twin.mergekit
    if names is None or not parameters.keys() <= names.keys():
        return None
    given = {name: _cut(value, count) for name, value in parameters.items()}
    if any(name in given and given[name] not in words for name, words in twin.words.items()):
        return None
    asked = {"weight": 1.0} if "weight" in names else {}
    for name, value in say(given, names, twin.words).items():
        asked[name] = list(value) if isinstance(value, tuple) else value
    return asked


def _cut(value: Any, count: int) -> Any:
    return value[:count] if isinstance(value, tuple) else value


def _plain(
    twin: Callable[..., Array],
    *,
    names: Mapping[str, str] | None = None,
    words: Mapping[str, Mapping[Any, Any]] | None = None,
    presets: Mapping[str, Parameters] | None = None,
    **always: Any,
) -> Merge:
    """Return a twin that has a recipe's parameters, perhaps under other names, as one function.

    Args:
        twin: The function.
        names: Its names for parameters.
        words: Its values for values, by parameter.
        presets: What it is told under some semantics, unless the recipe says otherwise.
        always: What it is told besides.
    """

    def merge(
        base: Array | None, sources: Sequence[Array], *, semantics: str, draw: Draw, **given: Any
    ) -> Array:
        preset = (presets or {}).get(semantics, {})
        return twin(base, sources, **always, **(preset | say(given, names or {}, words or {})))

    return merge


def say(
    given: Parameters, names: Mapping[str, str], words: Mapping[str, Mapping[Any, Any]]
) -> dict[str, Any]:
    """Return parameters under other names and with other values."""
    names = {"lambda": "lambda_"} | dict(names)
    said = {}
    for name, value in given.items():
        said[names.get(name, name)] = words[name][value] if name in words else value
    return said


def _of_parts(name: str) -> Merge:
    """Return a family's twin: the parts of its semantics, with those that a recipe gives."""

    def merge(
        base: Array | None, sources: Sequence[Array], *, semantics: str, draw: Draw, **given: Any
    ) -> Array:
        parts = families.PRESETS[name][semantics]
        numbers = {}
        for key, value in given.items():
            if key in _PARTS:
                spelled = value.replace(" ", "_")
                parts = replace(parts, **{_PARTS[key]: spelled})
            elif key == "rescale_by":
                numbers[key] = [
                    by or density
                    for by, density in zip(
                        spread(value, len(sources)),
                        spread(given["density"], len(sources)),
                        strict=True,
                    )
                ]
            else:
                numbers["lambda_" if key == "lambda" else key] = value
        if parts.sparsify == "masks":
            numbers["masks"] = _masks(name, base, sources, draw, numbers)
        return families.combine(base, sources, parts=parts, **numbers)

    return merge


_PARTS = {
    "ballot": "vote",
    "cancelled": "cancelled",
    "divisor": "divisor",
    "kept_count": "k_rule",
    "majority_sign_method": "count",
    "rescale": "rescale",
    "tie_policy": "tie_policy",
}
"""The twin's part for each parameter that is one."""


def _masks(
    name: str, base: Array | None, sources: Sequence[Array], draw: Draw, numbers: Parameters
) -> list[Array]:
    _, tasks = subtract_base(base, sources)
    densities = spread(numbers["density"], len(tasks))
    if not name.startswith("della"):
        chances = [np.full(task.shape, one) for task, one in zip(tasks, densities, strict=True)]
    else:
        epsilons = spread(numbers.get("epsilon", 0.15), len(tasks))
        chances = [
            della_probabilities(task, density=density, epsilon=epsilon)
            for task, density, epsilon in zip(tasks, densities, epsilons, strict=True)
        ]
    return [draw(source, chance) for source, chance in enumerate(chances)]


# Halves and quarters: votes that cancel do so in float32 too.
WEIGHTS = (0.5, 0.75, -0.25, 1.0, 0.25)
POSITIVE = (1.0, 3.0, 2.0, 0.5, 0.25)
DENSITIES = (0.25, 0.75, 0.5, 1.0, 0.0)
GAMMAS = (0.0, 0.125, 0.5, 0.01, 1.0)
SWITCHES = {"rescale": {"none": False, "l1": True}, "divisor": {"none": False, "weights": True}}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_SUM = {"weight": "weight", "lambda": "lambda", "divisor": "normalize"}
_SPARSE = _SUM | {"density": "density", "rescale": "rescale"}

TWINS: Mapping[str, Twin] = {
    "arcee_fusion": Twin(_plain(selecting.arcee_fusion), counts=(1,), mergekit={}, chooses=True),
    "average": Twin(
        _plain(sums.average, presets={"paper": {"decay": 0.9}}),
        ({"schedule": "exponential"}, {"schedule": "exponential", "decay": 1.0}),
    ),
    "breadcrumbs": Twin(
        _of_parts("breadcrumbs"),
        (
            {"density": DENSITIES, "gamma": GAMMAS, "weight": WEIGHTS},
            {"density": 1e-4, "gamma": 1e-3, "rescale": "l1"},
            {"density": 0.25, "gamma": 0.875},
            {"density": 0.5, "gamma": 0.25, "divisor": "weights", "weight": POSITIVE},
        ),
        mergekit=_SPARSE | {"gamma": "gamma"},
        words=SWITCHES,
        chooses=True,
    ),
    "breadcrumbs_ties": Twin(
        _of_parts("breadcrumbs_ties"),
        (
            {"density": DENSITIES, "gamma": GAMMAS, "weight": WEIGHTS},
            {"density": 0.25, "gamma": 0.875, "ballot": "unweighted", "divisor": "count"},
            {"density": 1.0, "weight": WEIGHTS, "rescale": "l1", "divisor": "weights"},
        ),
        mergekit=_SPARSE | {"gamma": "gamma"},
        words=SWITCHES,
        chooses=True,
    ),
    "consensus": Twin(
        _plain(localising.consensus),
        ({"mask_lambda": (0.5, 0.25, 1.0, 2.0, 0.0)}, {"k": 2}),
        chooses=True,
    ),
    "dare_linear": Twin(
        _of_parts("dare_linear"),
        (
            {"density": DENSITIES, "weight": WEIGHTS},
            {"density": 1e-3},
            {"density": 0.5, "rescale": "none", "divisor": "weights", "weight": POSITIVE},
            {"density": DENSITIES, "rescale": "l1", "weight": WEIGHTS, "lambda": 0.5},
            {"density": DENSITIES, "rescale": "density", "rescale_by": (0.5, 0.0, 0.25, 1.0, 0.5)},
        ),
        chooses=True,
    ),
    "dare_ties": Twin(
        _of_parts("dare_ties"),
        (
            {"density": DENSITIES, "weight": WEIGHTS},
            {"density": 1e-3, "majority_sign_method": "frequency"},
            {"density": 0.5, "ballot": "weighted", "weight": WEIGHTS, "divisor": "weights"},
            {"density": 0.5, "ballot": "unweighted", "weight": WEIGHTS, "divisor": "weights"},
        ),
        chooses=True,
    ),
    "della": Twin(
        _of_parts("della"),
        (
            {"density": (0.5, 0.625, 0.25, 1.0, 0.0), "epsilon": 0.125, "weight": WEIGHTS},
            {"density": 0.5, "rescale": "none", "divisor": "none"},
            {"density": 0.5, "epsilon": (0.25, 0.0, 0.4, 0.1, 0.1)},
        ),
        chooses=True,
    ),
    "della_linear": Twin(
        _of_parts("della_linear"),
        (
            {"density": (0.5, 0.625, 0.25, 1.0, 0.0), "epsilon": 0.125, "weight": WEIGHTS},
            {"density": 0.5, "divisor": "weights", "weight": POSITIVE, "lambda": 0.5},
        ),
        chooses=True,
    ),
    "emr_unify": Twin(_plain(localising.emr_unify), ({"lambda": -1.5},), chooses=True),
    "iso_c": Twin(_plain(matrices.iso_c), ({"lambda": 0.5},), small_only=True),
    "iso_cts": Twin(
        _plain(matrices.iso_cts),
        ({"common_space_fraction": 0.0}, {"common_space_fraction": 1.0, "lambda": 0.5}),
        small_only=True,
    ),
    "karcher": Twin(
        _plain(spherical.karcher),
        ({"max_iter": 0}, {"max_iter": 3, "tol": 0.125}),
        mergekit=_same("max_iter", "tol"),
    ),
    "linear": Twin(
        _plain(sums.linear),
        ({"weight": WEIGHTS}, {"weight": WEIGHTS, "normalize": False}, {"weight": 0.3}),
        mergekit=_same("weight", "normalize"),
    ),
    "magmax": Twin(_plain(localising.magmax), ({"lambda": -1.5},), chooses=True),
    "magnitude_prune": Twin(
        _of_parts("magnitude_prune"),
        (
            {"density": DENSITIES, "weight": WEIGHTS},
            {"density": 1e-4},
            {"density": 0.25, "tie_policy": "strict"},
            {"density": DENSITIES, "tie_policy": "inclusive", "scope": "model"},
        ),
        chooses=True,
    ),
    "model_stock": Twin(
        _plain(spherical.model_stock),
        ({"filter_wise": True},),
        counts=(2, 3, 5),
        mergekit=_same("filter_wise"),
    ),
    "multislerp": Twin(
        _plain(
            spherical.multislerp,
            names={"normalize": "normalize_weights"},
            cancelled="sum",
            rounding=1e-7,
        ),
        ({"weight": WEIGHTS}, {"weight": (1.0, 4.0, 2.0, 0.5, 0.25), "eps": 1e-3}, {"weight": 0.3}),
        mergekit=_same("weight", "eps") | {"normalize": "normalize_weights"},
    ),
    "nearswap": Twin(
        _plain(selecting.nearswap), ({"t": 1e-7}, {"t": 0.7}), counts=(1,), mergekit=_same("t")
    ),
    "nuslerp": Twin(
        _plain(spherical.nuslerp),
        (
            {"weight": (1.0, -1.0)},
            {"weight": (1.0, 3.0), "axis": "rows"},
            {"weight": (1.5, -0.5), "axis": "columns"},
        ),
        counts=(2,),
        mergekit=_same("weight"),
        # Columns of two entries are nearly opposite now and then.
        loosely=1e3,
    ),
    "passthrough": Twin(
        _plain(sums.passthrough), ({"scale": 0.0},), counts=(1,), mergekit=_same("scale")
    ),
    "pcb": Twin(
        _plain(competition.pcb),
        ({"ratio": 0.25, "lambda": 0.5}, {"ratio": 0.0}, {"ratio": 1.0}),
        grid="small",
        chooses=True,
    ),
    "ram": Twin(
        _plain(selecting.ram), ({"epsilon": 0.7},), mergekit=_same("epsilon"), chooses=True
    ),
    "ramplus_tl": Twin(
        _plain(selecting.ramplus_tl),
        ({"epsilon": 0.7, "r": 0.5, "alpha": 1.0}, {"epsilon": 4.0, "r": -0.5, "scope": "model"}),
        mergekit=_same("epsilon", "r", "alpha"),
        coarsely=True,
        chooses=True,
    ),
    "sce": Twin(
        _plain(
            sce.sce,
            names={"select_all_alike": "select_without_variance"},
            presets={"mergekit": {"select_without_variance": False, "uniform_below": 1e-6}},
        ),
        (
            {"select_topk": 1e-3},
            {"select_topk": 0.99},
            {"select_topk": 0.5, "select_all_alike": False},
            {"select_topk": 0.25, "uniform_below": 100.0},
            {"scope": "model", "lambda": 0.5},
        ),
        mergekit=_same("select_topk"),
        grid="coarse",
        chooses=True,
    ),
    "slerp": Twin(
        _plain(spherical.slerp), ({"t": 0.5}, {"t": 1.5}), counts=(1,), mergekit=_same("t")
    ),
    "task_arithmetic": Twin(
        _plain(sums.task_arithmetic, names={"divisor": "normalize"}, words=SWITCHES),
        ({"weight": WEIGHTS}, {"weight": POSITIVE, "divisor": "weights"}),
        mergekit=_SUM,
        words=SWITCHES,
    ),
    "ties": Twin(
        _of_parts("ties"),
        (
            {"density": DENSITIES, "weight": WEIGHTS},
            {"density": 1e-4},
            {"density": 0.25, "ballot": "weighted", "weight": WEIGHTS},
            {"density": 0.5, "ballot": "weighted", "weight": WEIGHTS, "divisor": "weights"},
            {"density": 0.5, "weight": WEIGHTS, "divisor": "weights"},
            {"density": 0.5, "weight": WEIGHTS, "divisor": "none", "lambda": 0.5},
            {"density": 0.25, "kept_count": "one more", "tie_policy": "inclusive"},
            {"density": 1e-4, "kept_count": "at least one", "rescale": "l1"},
            {"density": DENSITIES, "tie_policy": "strict", "scope": "model"},
            {"density": 0.25, "cancelled": "majority", "majority_sign_method": "frequency"},
            {"density": 0.5, "cancelled": "majority", "ballot": "weighted", "weight": WEIGHTS},
        ),
        mergekit=_SPARSE,
        words=SWITCHES,
        chooses=True,
        over_model=("paper",),
    ),
    "tsv_m": Twin(_plain(matrices.tsv_m), ({"lambda": 0.5},), small_only=True),
}
