"""Everything that `ss_pruning` raises: one base class, a few meanings.

Each message says what failed, where (the module path) and what to do about it.
"""

from __future__ import annotations


class SSPruningError(Exception):
    """Base of all errors of this package; catch it to catch them all."""


class InputError(SSPruningError, ValueError):
    """An argument is wrong: an unknown name, a value out of range, options that exclude each other."""


class ModelError(SSPruningError):
    """The model cannot be used as it is: it does not run on the inputs, or holds NaN or Inf weights."""


class NothingToPruneError(SSPruningError):
    """The model has no channel that may go; the message names what was left whole, and why."""


class BudgetError(SSPruningError, ValueError):
    """The budget cannot be reached; the message names the smallest that can."""


class PlanError(SSPruningError):
    """A plan does not fit the model it is applied to."""


class VerificationError(SSPruningError):
    """The cut model would differ from the masked one; the model was not touched."""


class FileFormatError(SSPruningError):
    """A file is truncated, damaged or was not written by this package."""
