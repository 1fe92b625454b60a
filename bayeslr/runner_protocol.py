"""What a runner is, and what a study is: the two doors between the library and the runners.

A runner trains outside this process. It turns a `RunSpec` into the command line of a child process;
the child reads the spec from ``SPEC.json``, appends records (rows of the run table, one JSON object
a line) to ``records.jsonl`` in the run's folder and keeps its checkpoints beside them. Started
again in the same folder, the child goes on from its last checkpoint. Exit status 0 means that the
records say all there is to say, divergence included; any other means that the run failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from bayeslr.errors import SpecError
from bayeslr.specs import Recipe, RunSpec

SPEC_FILE = "spec.json"
RECORDS_FILE = "records.jsonl"


class Runner(Protocol):
    """Trains runs in child processes. Built once a sweep, as ``Runner(options)``."""

    def counts(self, shape: Mapping[str, Any]) -> tuple[int, int]:
        """Active and total parameters of a shape, in the recipe's convention."""
        ...

    def flops(self, spec: RunSpec) -> float:
        """FLOPs that the whole run will cost, its decay branches included."""
        ...

    def command(self, spec: RunSpec, run_dir: Path) -> list[str]:
        """Command line of the child that trains ``run_dir/SPEC_FILE``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run as the study knows it.

    state: ``waiting``, ``running``, or the run's final status (``ok``, ``diverged``, ``failed``,
    ``lost``, ``pruned``). ``flops`` is what was reserved; after the end, what was spent.
    """

    number: int
    spec: RunSpec
    state: str
    flops: float
    reason: str = ""
    owner: str = ""
    records: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def finished(self) -> bool:
        """Whether the run has ended, in whatever way."""
        return self.state not in ("waiting", "running")


class Study(Protocol):
    """The state of a sweep: who asked for what, and what came of it. Survives any process."""

    def trials(self) -> list[Trial]:
        """Every trial in order of its number."""
        ...

    def ask(self, spec: RunSpec, *, flops: float, reason: str) -> Trial | None:
        """Reserve the FLOPs and claim a new trial; None if the global budget does not allow it."""
        ...

    def adopt(self, number: int) -> bool:
        """Take over a running trial whose owner is dead; False if it is alive or taken."""
        ...

    def beat(self, number: int) -> None:
        """Renew the lease on a trial of ours."""
        ...

    def tell(self, number: int, *, state: str, flops: float,
             records: Sequence[Mapping[str, Any]]) -> None:  # fmt: skip
        """End a trial with its final status, the FLOPs spent and its rows of the run table."""
        ...


def find_entry_point(group: str, name: str) -> Any:
    """Object behind an entry point, such as group ``bayeslr.runners``, name ``moe``.

    Raises: SpecError that lists what is installed, or names the extra that is missing.
    """
    found = {point.name: point for point in entry_points(group=group)}
    if name not in found:
        raise SpecError(
            f"no {group.rpartition('.')[2].rstrip('s')} named {name!r}; installed: "
            f"{', '.join(sorted(found)) or 'none'}"
        )
    try:
        return found[name].load()
    except ModuleNotFoundError as error:
        raise SpecError(
            f"{name!r} needs the package {error.name!r}: pip install 'bayeslr[runners]'"
        ) from error


def find_runner(recipe: Recipe) -> Runner:
    """The runner that a recipe names, built with the recipe's options."""
    runner: Runner = find_entry_point("bayeslr.runners", recipe.runner)(recipe.options)
    return runner
