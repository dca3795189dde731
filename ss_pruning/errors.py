"""Everything that `ss_pruning` raises: one base class, a few meanings.

Each message says what failed, where (the module path) and what to do about it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable


class SSPruningError(Exception):
    """Base of all errors of this package; catch it to catch them all."""


class InputError(SSPruningError, ValueError):
    """An argument is wrong: an unknown name, a value out of range, options that exclude each other."""


class ModelError(SSPruningError):
    """The model cannot be used as it is: it does not run on the inputs, or holds NaN or Inf weights."""


class NothingToPruneError(SSPruningError):
    """The model has no channel that may go; the message names what was excluded, and why."""


class BudgetError(SSPruningError, ValueError):
    """The budget cannot be reached; the message names the smallest that can."""


class PlanError(SSPruningError):
    """A plan does not fit the model it is applied to."""


class VerificationError(SSPruningError):
    """The cut model would differ from the masked one, or not run; the model was not touched.

    Attributes:
        followed: Stored numbers that had been let follow the cut: (module path, attribute, position, and
            whether it followed heads of attention).
        at: Path of the module that did not run, if that is what failed.
    """

    def __init__(
        self,
        message: str,
        followed: Iterable[tuple[str, str, int | None, bool]] = (),
        at: str | None = None,
    ) -> None:
        super().__init__(message)
        self.followed = frozenset(followed)
        self.at = at


class FileFormatError(SSPruningError):
    """A file is truncated, damaged or was not written by this package."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, without what it tells its own developers in further lines."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def require(what: str, extra: str, *packages: str) -> None:
    """Refuse unless the packages are there that `what` needs.

    Raises:
        InputError: Names the extra.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"{what} needs a package that is not installed ({error.name}): pip install 'ss-pruning[{extra}]'"
            ) from error
