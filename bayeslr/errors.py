"""One error tree: every message says the rule, the value, the place and the next step.

BayeslrError
    SpecError          a spec, recipe, card or flag breaks a rule     exit code 2
    StorageError       a study or folder is in use or unreadable      exit code 2
    DataError          the user's runs or targets are rejected        exit code 3
    UntrustworthyFit   the sampler or the fit failed its gate         exit code 4
"""

from __future__ import annotations


class BayeslrError(ValueError):
    """Base of every error that a user can cause and mend.

    ``exit_code`` is what the command line ends with.
    """

    exit_code = 2


class SpecError(BayeslrError):
    """A spec, recipe, prior card or flag breaks a rule."""


class StorageError(BayeslrError):
    """A study, fit folder or disk cannot be used as asked."""


class DataError(BayeslrError):
    """Runs or targets are rejected: nothing usable is left, or units are mixed."""

    exit_code = 3


class UntrustworthyFit(BayeslrError):
    """A fit failed its convergence gate; the message is the verdict in plain words."""

    exit_code = 4
