"""Any program as a runner: a command line with blanks to fill in.

Options of the recipe::

    [options]
    argv = ["python", "train.py", "--spec", "{spec}", "--records", "{records}", "--dir", "{dir}"]

``{spec}`` is the JSON file with the run to train, ``{records}`` the file to append to, ``{dir}``
the run's folder for checkpoints, ``{python}`` this Python. The program writes one JSON object a
line with ``tokens`` (seen so far) and ``loss`` (nats per token), more columns of the run table if
it likes; a loss of null means that the run diverged, a line without one is passed over. Started
again in the same folder it goes on from its checkpoint. A shape of the recipe gives its own
``n_active`` and ``n_total``.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from bayeslr.errors import SpecError
from bayeslr.runner_protocol import RECORDS_FILE, SPEC_FILE
from bayeslr.specs import RunSpec
from bayeslr.units import parse_count, train_flops

BLANKS = ("spec", "records", "dir", "python")


@final
class CommandRunner:
    """`bayeslr.runner_protocol.Runner` for a command-line template."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        argv = options.get("argv")
        if (
            not isinstance(argv, (list, tuple))
            or not argv
            or not all(isinstance(a, str) for a in argv)
        ):
            raise SpecError(
                f"[options] argv must be a list of words such as "
                f'["python", "train.py", "{{spec}}", "{{records}}"], got {argv!r}'
            )
        for word in argv:
            try:
                blanks = [name for _, name, _, _ in string.Formatter().parse(word)]
            except ValueError as error:
                raise SpecError(f"[options] argv, {word!r}: {error}; write {{{{ for {{") from error
            unknown = [name for name in blanks if name is not None and name not in BLANKS]
            if unknown:
                raise SpecError(
                    f"[options] argv, {word!r}: no blank named {unknown[0]!r}; there are "
                    f"{', '.join(f'{{{b}}}' for b in BLANKS)} (write {{{{ for a brace)"
                )
        self._argv = tuple(argv)

    def counts(self, shape: Mapping[str, Any]) -> tuple[int, int]:
        """Active and total parameters, as the shape states them."""
        return stated_counts(shape)

    def flops(self, spec: RunSpec) -> float:
        """FLOPs of the run, its decay branches included: 6 a parameter and trained token."""
        return train_flops(spec.n_active, spec.trained_tokens)

    def command(self, spec: RunSpec, run_dir: Path) -> list[str]:
        """The template with its blanks filled in."""
        run_dir = run_dir.absolute()
        filled = {
            "spec": str(run_dir / SPEC_FILE),
            "records": str(run_dir / RECORDS_FILE),
            "dir": str(run_dir),
            "python": sys.executable,
        }
        return [word.format(**filled) for word in self._argv]


def stated_counts(shape: Mapping[str, Any]) -> tuple[int, int]:
    """``n_active`` and ``n_total`` of a shape. Raises: SpecError if it does not state them."""
    name = shape.get("name", "?")
    if "n_active" not in shape:
        raise SpecError(
            f"shape {name!r} needs n_active (and n_total, if it is a mixture of experts): this "
            "runner cannot count the parameters itself"
        )
    n_active = parse_count(shape["n_active"], name=f"shape {name!r}: n_active")
    n_total = parse_count(shape.get("n_total", n_active), name=f"shape {name!r}: n_total")
    if n_active > n_total:
        raise SpecError(f"shape {name!r}: n_active ({n_active}) exceeds n_total ({n_total})")
    return n_active, n_total
