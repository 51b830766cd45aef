"""Every error that streammerge raises on purpose.

    StreamMergeError                    exit code 1
    ├── RecipeError (also ValueError)   2   the recipe asks for something that cannot be
    ├── DeviceError (also ValueError)   2   the device that is asked for is not to be had
    ├── CheckpointError                 1   an input on disk is not what it should be
    │   ├── HeaderError                     a header, index or config that cannot be trusted
    │   ├── TruncatedShardError             a file that ends before the data it declares
    │   ├── MissingTensorError              a tensor that one input has and another lacks
    │   ├── ShapeMismatchError              the same tensor with two shapes
    │   ├── UnsupportedDTypeError           a dtype that has no merge arithmetic
    │   ├── QuantizedCheckpointError        packed or scaled weights, which averages would destroy
    │   ├── UnsupportedAdapterError         an adapter whose factors alone do not say what it does
    │   └── NonFiniteError                  NaN or infinity where the recipe does not allow it
    ├── PlanError                       3   the job is sound but does not fit
    │   ├── MemoryBudgetError               more memory than the budget allows
    │   ├── OutOfMemoryError                the system has less memory than the budget
    │   ├── SystemLimitError                fewer threads or open files than the work takes
    │   └── DiskSpaceError                  more disk than there is
    ├── OutputError                     1   the output cannot be written
    │   ├── ResumeError                     what lies there belongs to another merge
    │   └── OutputExistsError           4   something is already there
    │       └── BusyError                   another merge is writing there now
    ├── ClusterError                    1   an engine that runs parts elsewhere failed, or lost its workers
    ├── DeviceLostError                 1   an accelerator failed while it was in use
    └── StageError                      1   a part of the engine failed in a way nobody foresaw

A message says what is wrong, where (file, tensor, byte or recipe key), the two numbers that
disagree, and what to do. It can be printed whatever a file put into it: a name of a megabyte is cut,
and a name that would move the cursor is escaped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

MAX_LINE_CHARACTERS = 4_000
"""Characters in a line of a message before it is cut: as many as a path may have."""
_TAIL_CHARACTERS = 1_000  # the end of a message says what to do


_NUMBER = re.compile("[0-9]+")
_renaming: list[Callable[[str], str]] = []


def rename_in_messages(rename: Callable[[str], str]) -> None:
    """Let all errors call something otherwise, as what is a copy by what it is a copy of."""
    _renaming.append(rename)


class StreamMergeError(Exception):
    """The root of the tree; catching it catches every deliberate refusal."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        """Make the error.

        Args:
            message: One line, or several; made printable and of bounded length.
        """
        for rename in _renaming:
            message = rename(message)
        super().__init__("\n".join(_shortened(line) for line in message.split("\n")))


class RecipeError(StreamMergeError, ValueError):
    """The recipe asks for something that cannot be."""

    exit_code = 2


class DeviceError(StreamMergeError, ValueError):
    """The device that is asked for does not exist, or not for this build of torch."""

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


class UnsupportedAdapterError(CheckpointError):
    """An adapter whose stored factors alone do not say what it does to the base."""


class NonFiniteError(CheckpointError):
    """NaN or infinity where the recipe does not allow it."""


class PlanError(StreamMergeError):
    """The job is sound but does not fit this machine or this budget."""

    exit_code = 3


class MemoryBudgetError(PlanError):
    """The job needs more memory than the budget allows."""


class OutOfMemoryError(PlanError):
    """The system refused memory that the budget allows."""


class SystemLimitError(PlanError):
    """The system allows fewer threads or open files than the work takes."""


class DiskSpaceError(PlanError):
    """The output needs more disk than there is."""


class OutputError(StreamMergeError):
    """The output cannot be written."""


class ResumeError(OutputError):
    """The unfinished merge differs from the one that is asked for."""


class ClusterError(StreamMergeError):
    """An engine that runs parts of a merge on other machines failed, or lost its workers."""


class DeviceLostError(StreamMergeError):
    """An accelerator failed while it was in use; what was written stays for a resume."""


class StageError(StreamMergeError):
    """A part of the engine failed in a way that nobody foresaw; the cause is attached."""


class DependencyError(StreamMergeError):
    """A library that the work needs cannot be imported."""


class OutputExistsError(OutputError):
    """Something is already at the place of the output."""

    exit_code = 4


class BusyError(OutputExistsError):
    """Another merge is writing at the place of the output now."""


@contextmanager
def naming_source(label: str) -> Iterator[None]:
    """Add to errors which part of the recipe was being read.

    Args:
        label: The part, as in ``"sources[0]"``.
    """
    try:
        yield
    except CheckpointError as error:
        error.add_note(f"while reading {label} of the recipe")
        raise


def printable(text: str) -> str:
    """Return ``text`` on one line, with escapes for all that is not shown as one character."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "density"?'``, or the known words when none is close.

    Args:
        word: What the user wrote.
        known: The words that would have been accepted.
    """
    candidates = sorted(known)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if close and "." in word and _NUMBER.sub("#", close[0]) == _NUMBER.sub("#", word):
        # A tensor of the same name in another layer is hardly meant.
        return ""
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(candidates)}" if candidates else ""


def _shortened(line: str) -> str:
    if len(line) <= MAX_LINE_CHARACTERS:
        return printable(line)
    head = line[: MAX_LINE_CHARACTERS - _TAIL_CHARACTERS]
    left_out = len(line) - MAX_LINE_CHARACTERS
    return printable(f"{head} ({left_out} characters) {line[-_TAIL_CHARACTERS:]}")
