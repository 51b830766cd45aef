"""A program as the source of one Triton kernel: every step on a tile that stays in registers.

A kernel reads each model once, as it is stored, does all steps of the program in the order of
:mod:`streammerge.tiles.interpreter`, which is its oracle, and writes the result as it is to be stored; or
leaves what a round ranks and totals in rows, for those who count. What depends on the tensor comes in
``constants``, so a kernel is compiled once for a program and the types it reads and writes.

    models     base, then sources: pointers to ``[numel]``, as stored; bfloat16 as int16, here and below
    products   of adapters: pointers to B ``[rows, rank]`` and to A, ``[rank, columns]`` in tiles, with DoRA
               to what rows ``[rows]`` or columns ``[columns]`` are multiplied by; of placed ones to
               ``[matrices, rows, rank]`` and ``[matrices, rank, columns]``
    out        ``[numel]``, as stored; of a round ``[rows, stride]`` in the compute type
    constants  int64: numbers as float64, thresholds, keys and limits; see :class:`Layout`
    lasts      int64 per rank of the tensor: the last tie that is kept, as an index into the piece
    notes      largest magnitudes of what was loaded and made, as patterns of bits
    counts     int64: how many elements are kept
    computed   ``[values, stride]`` in the compute type: ranks within rows; anything where no step reads any
    row_numbers  float64: ``known`` numbers for each ``row`` elements, likewise
"""

from __future__ import annotations

from dataclasses import dataclass, field

from streammerge.adapters.onto_base.products import ProductKind
from streammerge.dtypes import DType
from streammerge.tiles.functions import NOT_FOR_SINGLE
from streammerge.tiles.fusing import PER_PRODUCT, Layout, sink_rows
from streammerge.tiles.program import FUNCTIONS, SINKS, Op, Origin, Program, Step, Vote

_NORMED = (ProductKind.NORMED_ROWS, ProductKind.NORMED_COLUMNS)
_PLACED = (ProductKind.PLACED,)
_COMPUTED = {DType.F32: ("tl.float32", "tl.int32"), DType.F64: ("tl.float64", "tl.int64")}
_CALLS = {
    Op.EXPONENTIAL: "exponential",
    Op.EXPONENTIAL_LESS_ONE: "exponential_less_one",
    Op.LOGARITHM: "logarithm",
    Op.LOGARITHM_OF_ONE_MORE: "logarithm_of_one_more",
}
_BINARY = {Op.ADD: "{a} + {b}", Op.SUBTRACT: "{a} - {b}", Op.MULTIPLY: "{a} * {b}"}
_COMPARED = {Op.GREATER: ">", Op.AT_LEAST: ">=", Op.EQUAL: "=="}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kernel is compiled for."""

    program: Program
    """What is done."""
    base: DType | None
    """The stored type of the base; None where it is not read."""
    sources: tuple[DType | None, ...]
    """Those of the sources; None of one that leaves the base alone."""
    compute: DType
    """float32 or float64."""
    out: DType | None
    """The stored type of the result; None of a round."""
    models: int
    """Columns of notes before that of the result."""
    has_base: bool
    """Whether notes begin with those of a base."""
    counts: bool = False
    """Whether it counts what is kept."""
    notes: bool = True
    """Whether it notes the largest magnitudes."""
    products: tuple[tuple[ProductKind, ...], ...] = ()
    """What is done with each product of factors, per source; empty where nothing is changed."""


@dataclass
class _Writer:
    """Writes one kernel."""

    kind: Kind
    lines: list[str] = field(default_factory=list)

    def write(self) -> str:
        """Return the source."""
        self._begin()
        for index, step in enumerate(self.kind.program.steps):
            self.lines.append(f"# {step.op.name}")
            self._step(step, index)
        models = [f"model{place}" for place in range(len(self.kind.sources) + 1)]
        factors = [
            f"{side}{i}"
            for i, kind in enumerate(self._products)
            for side in ("up", "down", "vector")[: 3 if kind in _NORMED else 2]
        ]
        others = (
            "out, constants, lasts, notes, counts, computed, row_numbers, row, known, "
            "begin, numel, stride, TILE: tl.constexpr"
        )
        # These begin anywhere; a kernel for each way they are aligned would be compiled for nothing.
        anywhere = ["constants", "notes", *factors]
        body = "\n".join(f"    {line}" for line in self.lines)
        return (
            f"@triton.jit(do_not_specialize_on_alignment={anywhere})\n"
            f"def merge({', '.join([*models, *factors, others])}):\n{body}\n"
        )

    @property
    def _products(self) -> list[ProductKind]:
        return [kind for own in self.kind.products for kind in own]

    @property
    def _float(self) -> str:
        return _COMPUTED[self.kind.compute][0]

    @property
    def _layout(self) -> Layout:
        return Layout(self.kind.program, len(self._products))

    def _begin(self) -> None:
        layout = self._layout
        self.lines += [
            "own = tl.program_id(0) * TILE + tl.arange(0, TILE)",
            "here = own < numel",
            f"start = tl.load(constants + {layout.start}) + begin + tl.program_id(0) * TILE",
        ]
        if self.kind.program.has_row_numbers:
            # Numbers of the row that an element lies in; a step begins with a row.
            self.lines.append("numbers = row_numbers + own // row * known")
        for index, number in enumerate(self.kind.program.numbers):
            found = self._constant(index)
            if number.origin is Origin.ROW:
                found = f"tl.load(numbers + {number.index}, mask=here, other=0.0).to({self._float})"
            self.lines.append(f"n{index} = {found}")
        for trim in range(len(self.kind.program.trims)):
            self.lines.append(f"threshold{trim} = {self._constant(layout.thresholds + trim)}")
            rank = self.kind.program.trims[trim]
            self.lines.append(f"last{trim} = tl.load(lasts + {rank})")
        if self._loads_base:
            assert self.kind.base is not None  # noqa: S101 - else no step is about it
            self._load("base", 0)
            self._note("base", 0)

    def _constant(self, index: int) -> str:
        found = f"tl.load(constants + {index}).to(tl.float64, bitcast=True)"
        return f"{found}.to({self._float})"

    @property
    def _loads_base(self) -> bool:
        program, sources = self.kind.program, self.kind.sources
        if program.uses(Op.BASE):
            return True
        return any(
            (step.op is Op.TASK_VECTOR and not self._is_sum(step.a))
            or (step.op is Op.SOURCE and sources[step.a] is None)
            for step in program.steps
        )

    def _is_sum(self, source: int) -> bool:
        """Whether a source's task vector is what adapters add, whatever it is added to."""
        normed = any(kind in _NORMED for _, kind in self._changes(source))
        return self.kind.sources[source] is None and not normed

    def _changes(self, source: int) -> list[tuple[int, ProductKind]]:
        """Return which of all products a source adds, and what is done with each."""
        products = self.kind.products
        if not products:
            return []
        return list(enumerate(products[source], start=sum(map(len, products[:source]))))

    @property
    def _first_source(self) -> int:
        """Column of notes of the first source; that of the base comes before it."""
        return int(self.kind.has_base)

    def _load(self, name: str, model: int) -> None:
        stored = self.kind.base if model == 0 else self.kind.sources[model - 1]
        loaded = f"tl.load(model{model} + own, mask=here, other=0)"
        if stored is DType.BF16:
            loaded = f"functions.widen_bf16({loaded})"
        self.lines.append(f"{name} = {loaded}.to({self._float})")

    def _note(self, name: str, column: int) -> None:
        """Note the largest magnitude: patterns of magnitudes are ordered as they are, NaN on top."""
        if self.kind.notes:
            pattern = _COMPUTED[self.kind.compute][1]
            magnitude = f"tl.where(here, tl.abs({name}), 0.0).to({pattern}, bitcast=True)"
            self.lines.append(f"tl.atomic_max(notes + {column}, tl.max({magnitude}))")

    def _step(self, step: Step, index: int) -> None:
        a, out = f"r{step.a}", f"r{step.out}"
        b = f"r{step.b}" if step.b >= 0 else f"n{step.number}"
        op = step.op
        if op in SINKS:
            self._sink(step, index)
        elif op in _BINARY:
            self.lines.append(f"{out} = {_BINARY[op].format(a=a, b=b)}")
        elif op in _COMPARED:
            self.lines.append(f"{out} = ({a} {_COMPARED[op]} {b}).to({self._float})")
        elif op in FUNCTIONS:
            self._function(step, a, out)
        elif op in (Op.MINIMUM, Op.MAXIMUM):
            name = "minimum" if op is Op.MINIMUM else "maximum"
            nan = "propagate_nan=tl.PropagateNan.ALL"
            self.lines.append(f"{out} = tl.{name}({a}, {self._wide(b)}, {nan}) + 0.0")
        else:
            self._other(step, a, b, out)

    def _wide(self, name: str) -> str:
        """Return a register or a number as a tile."""
        if name.startswith("r"):
            return name
        number = self.kind.program.numbers[int(name[1:])]
        return name if number.origin is Origin.ROW else f"tl.full([TILE], {name}, {self._float})"

    def _other(self, step: Step, a: str, b: str, out: str) -> None:
        match step.op:
            case Op.BASE:
                self.lines.append(f"{out} = base")
            case Op.SOURCE:
                self._source(step.a, out)
            case Op.TASK_VECTOR:
                self._task_vector(step.a, out)
                if step.c >= 0:
                    self._trim(step, out, out)
            case Op.COMPUTED:
                place = f"computed + {step.a} * stride + own"
                self.lines.append(f"{out} = tl.load({place}, mask=here, other=0.0)")
            case Op.FILL:
                self.lines.append(f"{out} = {self._wide(f'n{step.number}')}")
            case Op.DIVIDE:
                self.lines.append(f"{out} = {self._quotient(a, self._wide(b))}")
            case Op.ADD_SCALED:
                self.lines.append(f"{out} = {a} + r{step.b} * n{step.number}")
            case Op.ABSOLUTE:
                self.lines.append(f"{out} = tl.abs({a})")
            case Op.SIGN:
                self.lines.append(f"{out} = {self._sign(a)}")
            case Op.SELECT:
                self.lines.append(f"{out} = tl.where(r{step.c} != 0, {a}, {b})")
            case Op.KEEP_LARGEST | Op.IN_TOP:
                self._trim(step, a, out)
            case Op.KEEP_RANDOM:
                self._drop(step, a, out)
            case Op.MAJORITY_MEAN:
                self._average_majority(step, out)
            case _:
                raise AssertionError(f"no kernel does {step.op}")

    def _quotient(self, a: str, b: str) -> str:
        # Triton's own quotient of float32 is off by up to two units in the last place.
        return f"tl.div_rn({a}, {b})" if self.kind.compute is DType.F32 else f"{a} / {b}"

    @staticmethod
    def _sign(a: str) -> str:
        return f"tl.where({a} > 0, 1.0, tl.where({a} < 0, -1.0, 0.0)).to({a}.dtype)"

    def _function(self, step: Step, a: str, out: str) -> None:
        single = self.kind.compute is DType.F32
        if step.op is Op.SQUARE_ROOT:
            root = f"tl.sqrt_rn({a})" if single else f"tl.sqrt({a})"
            self.lines.append(f"{out} = {root}")
            return
        first = NOT_FOR_SINGLE if single else 0
        call = f"functions.{_CALLS[step.op]}({a}.to(tl.float64), {first})"
        self.lines.append(f"{out} = {call}.to({self._float})")

    def _source(self, source: int, out: str) -> None:
        self._weights(source, out)
        self._note(out, source + self._first_source)

    def _weights(self, source: int, out: str) -> None:
        """Compute a source's values, or those that adapters make of its or of the base's, in turn."""
        if self.kind.sources[source] is None:
            self.lines.append(f"{out} = base")
        else:
            self._load(out, source + 1)
        for product, kind in self._changes(source):
            self._multiply(product, kind)
            # Where nothing is added, zeros have their sign.
            added = "tl.where(inside, {0} + product, {0})" if kind in _PLACED else "{0} + product"
            self.lines.append(f"{out} = {added.format(out)}")
            if kind in _NORMED:
                along_rows = kind is ProductKind.NORMED_ROWS
                vector = (
                    f"functions.spread(vector{product}, start, columns, here, {along_rows}, TILE)"
                )
                self.lines.append(f"{out} = {out} * {vector}")

    def _task_vector(self, source: int, out: str) -> None:
        if self._is_sum(source):
            # Not by way of the base: adding to it and subtracting it again would round.
            self._sum(source, out)
        else:
            self._weights(source, out)
            self.lines.append(f"{out} = {out} - base")
        self._note(out, source + self._first_source)

    def _sum(self, source: int, out: str) -> None:
        changes = self._changes(source)
        if not changes:
            self.lines.append(f"{out} = tl.zeros([TILE], {self._float})")
        for place, (product, kind) in enumerate(changes):
            self._multiply(product, kind)
            self.lines.append(f"{out} = {out} + product" if place else f"{out} = product")

    def _multiply(self, product: int, kind: ProductKind) -> None:
        """Compute elements of a product: sums of terms from the first to the last, each rounded."""
        at = self._layout.factors + PER_PRODUCT * product
        self.lines += [
            f"scaling = {self._constant(at)}",
            f"rank = tl.load(constants + {at + 1})",
            f"columns = tl.load(constants + {at + 2})",
        ]
        if kind in _PLACED:
            self.lines += [
                f"rows = tl.load(constants + {at + 4})",
                f"low = tl.load(constants + {at + 5})",
                f"high = tl.load(constants + {at + 6})",
                "element = start - low + tl.arange(0, TILE)",
                "inside = here & (element >= 0) & (element < high - low)",
                f"product = functions.multiply_placed(up{product}, down{product}, element, rank, columns, rows,",
                "    inside, TILE) * scaling",
                "product = tl.where(inside, product, 0.0)",
            ]
            return
        self.lines += [
            f"wide = tl.load(constants + {at + 3})",
            f"product = functions.multiply(up{product}, down{product}, start, rank, columns, wide,",
            "    here, TILE) * scaling",
        ]

    def _trim(self, step: Step, a: str, out: str) -> None:
        trim = step.c
        limit, last = f"threshold{trim}", f"last{trim}"
        self.lines += [
            f"value = {a}",
            "size = tl.abs(value)",
            f"tied = (size == {limit}) & (begin + own <= {last})",
        ]
        # No number ranks above everything.
        self.lines.append(f"kept = (~(size <= {limit})) | tied")
        in_top = step.op is Op.IN_TOP
        made = f"kept.to({self._float})" if in_top else "tl.where(kept, value, 0.0)"
        self.lines.append(f"{out} = {made}")
        self._count("kept", trim)

    def _drop(self, step: Step, a: str, out: str) -> None:
        stream, layout = step.c, self._layout
        key, limit = layout.streams + 2 * stream, layout.limits + 2 * stream
        self.lines += [
            f"low = tl.load(constants + {key}).to(tl.uint64, bitcast=True)",
            f"high = tl.load(constants + {key + 1}).to(tl.uint64, bitcast=True)",
        ]
        counted = "kept"
        if step.b >= 0:
            probability = f"tl.minimum(tl.maximum(r{step.b}, 0.0), 1.0)"
            drawn = f"functions.keep_random_by(low, high, start // 16 + 1, {probability}, TILE)"
            self.lines += [f"kept = {drawn}", f"nothing = {a} * 0.0 + 0.0"]
        else:
            self._draw(limit, a)
            counted = "kept & (upper >= 0)"
        self.lines.append(f"{out} = tl.where(kept, {a}, nothing)")
        # Where both choose, what trims keep is told.
        if not self.kind.program.trims:
            self._count(counted, stream)

    def _draw(self, limit: int, a: str) -> None:
        """Draw with one probability for all."""
        self.lines += [
            f"upper = tl.load(constants + {limit})",
            f"lower = tl.load(constants + {limit + 1})",
            "kept = functions.keep_random(low, high, start // 16 + 1, upper, lower, TILE)",
            # What is no number is none when it is dropped, unless everything is.
            f"nothing = tl.where(upper < 0, 0.0, {a} * 0.0 + 0.0)",
        ]

    def _count(self, kept: str, column: int) -> None:
        if self.kind.counts:
            total = f"tl.sum((({kept}) & here).to(tl.int32)).to(tl.int64)"
            self.lines.append(f"tl.atomic_add(counts + {column}, {total})")

    def _average_majority(self, step: Step, out: str) -> None:
        how, rows = step.majority, [f"r{row}" for row in step.rows]
        assert how is not None  # noqa: S101 - as every step of this kind
        first, n = step.number, len(rows)
        votes = rows if how.vote is Vote.TOTAL else [self._sign(row) for row in rows]
        self.lines.append(f"votes = {votes[0]}")
        self.lines += [f"votes = votes + {vote}" for vote in votes[1:]]
        self.lines += [
            f"elects = (votes > 0) | ((votes == 0) & ({self._wide(f'n{first + 2 * n}')} >= 0))",
            f"elected = tl.where(elects, 1.0, -1.0).to({self._float})",
            f"total = tl.zeros([TILE], {self._float})",
            f"share = tl.zeros([TILE], {self._float})",
        ]
        for i, row in enumerate(rows):
            self.lines += [
                f"agreeing = {row} * elected",
                "agreeing = tl.where(agreeing < 0, 0.0, agreeing)",
                f"share = share + {self._sign('agreeing')} * n{first + n + i}",
                f"total = total + agreeing * n{first + i}",
            ]
        self.lines.append("total = total * elected")
        if how.divides:
            self.lines.append("share = tl.where(share == 0, 1.0, share)")
            self.lines.append(f"total = {self._quotient('total', 'share')}")
        # Only the sign of a zero would differ, and +0.0 is what a sum gives.
        self.lines.append(f"{out} = total + 0.0")

    def _sink(self, step: Step, index: int) -> None:
        if step.op is not Op.STORE:
            for row, register in _kept_rows(self.kind.program)[index]:
                self.lines.append(f"tl.store(out + {row} * stride + own, r{register}, mask=here)")
            return
        if self.kind.out is None:
            return
        merged = f"r{step.a}" if step.b < 0 else f"r{step.b} + r{step.a}"
        self.lines.append(f"merged = {merged}")
        self._note("merged", self.kind.models)
        if self.kind.compute is DType.F64 and self.kind.out is not DType.F64:
            # Through float32, as the CPU's conversions are.
            self.lines.append("merged = merged.to(tl.float32)")
        if self.kind.out is DType.BF16:
            self.lines.append("merged = functions.round_to_bf16(merged)")
        self.lines.append("tl.store(out + own, merged.to(out.dtype.element_ty), mask=here)")


def write_kernel(kind: Kind) -> str:
    """Return the source of a kernel, a function called ``merge``."""
    return _Writer(kind).write()


def _kept_rows(program: Program) -> dict[int, list[tuple[int, int]]]:
    """Return, for each sink by the index of its step, which rows it fills from which registers."""
    found: dict[int, list[tuple[int, int]]] = {}
    for index, (a, b) in sink_rows(program).items():
        step = program.steps[index]
        wanted = [(a, step.a)] + ([(b, step.b)] if b is not None else [])
        found[index] = wanted
    return found
