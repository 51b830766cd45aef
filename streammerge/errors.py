"""Every error that streammerge raises on purpose.

    StreamMergeError                    exit code 1
    ├── RecipeError (also ValueError)   2   the recipe asks for something that cannot be
    ├── CheckpointError                 1   an input on disk is not what it should be
    │   ├── HeaderError                     a header, index or config that cannot be trusted
    │   ├── TruncatedShardError             a file that ends before the data it declares
    │   ├── MissingTensorError              a tensor that one input has and another lacks
    │   ├── ShapeMismatchError              the same tensor with two shapes
    │   ├── UnsupportedDTypeError           a dtype that has no merge arithmetic
    │   ├── QuantizedCheckpointError        packed or scaled weights, which averages would destroy
    │   └── NonFiniteError                  NaN or infinity where the recipe does not allow it
    ├── PlanError                       3   the job is sound but does not fit
    │   ├── MemoryBudgetError               more memory than the budget allows
    │   ├── OutOfMemoryError                the system has less memory than the budget
    │   └── DiskSpaceError                  more disk than there is
    ├── OutputError                     1   the output cannot be written
    │   ├── ResumeError                     what lies there belongs to another merge
    │   └── OutputExistsError           4   something is already there
    └── StageError                      1   a part of the engine failed in a way nobody foresaw

A message says what is wrong, where (file, tensor, byte or recipe key), the two numbers that
disagree, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StreamMergeError(Exception):
    """The root of the tree; catching it catches every deliberate refusal."""

    exit_code = 1


class RecipeError(StreamMergeError, ValueError):
    """The recipe asks for something that cannot be."""

    exit_code = 2


class CheckpointError(StreamMergeError):
    """An input on disk is not what it should be."""


class HeaderError(CheckpointError):
    """A header, an index or a configuration file that cannot be trusted."""


class TruncatedShardError(CheckpointError):
    """A file that ends before the data it declares."""


class MissingTensorError(CheckpointError):
    """A tensor that one input has and another lacks."""


class ShapeMismatchError(CheckpointError):
    """The same tensor with two different shapes."""


class UnsupportedDTypeError(CheckpointError):
    """A dtype that has no merge arithmetic."""


class QuantizedCheckpointError(CheckpointError):
    """Packed or scaled weights, which an average of the stored numbers would destroy."""


class NonFiniteError(CheckpointError):
    """NaN or infinity where the recipe does not allow it."""


class PlanError(StreamMergeError):
    """The job is sound but does not fit this machine or this budget."""

    exit_code = 3


class MemoryBudgetError(PlanError):
    """The job needs more memory than the budget allows."""


class OutOfMemoryError(PlanError):
    """The system refused memory that the budget allows."""


class DiskSpaceError(PlanError):
    """The output needs more disk than there is."""


class OutputError(StreamMergeError):
    """The output cannot be written."""


class ResumeError(OutputError):
    """The unfinished merge differs from the one that is asked for."""


class StageError(StreamMergeError):
    """A part of the engine failed in a way that nobody foresaw; the cause is attached."""


class OutputExistsError(OutputError):
    """Something is already at the place of the output."""

    exit_code = 4


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "density"?'``, or the known words when none is close.

    Args:
        word: What the user wrote.
        known: The words that would have been accepted.
    """
    candidates = sorted(known)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(candidates)}" if candidates else ""
