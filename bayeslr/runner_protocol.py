"""What a runner is, and what a study is: the two doors between the library and the runners.

A runner trains outside this process. It turns a `RunSpec` into the command line of a child process;
the child reads the spec from ``SPEC.json``, appends records (rows of the run table, one JSON object
a line) to ``records.jsonl`` in the run's folder and keeps its checkpoints beside them. Started
again in the same folder, the child goes on from its last checkpoint. Exit status 0 means that the
records say all there is to say, divergence included; any other means that the run failed.

A trainer that keeps the stable trunk of a WSD run for longer ones says so in the record of the
longest horizon: ``trunk_tokens``, where the trunk stands. See `ContinuingRunner`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bayeslr.errors import SpecError
from bayeslr.specs import Recipe, RunSpec

SPEC_FILE = "spec.json"
RECORDS_FILE = "records.jsonl"
STOP_FILE = "stop"


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


@runtime_checkable
class RecordedRunner(Runner, Protocol):
    """A runner that knows the records already; no child process is started.

    Its rows say themselves which run they are of: a recorded one of the cell, at its own LR.
    """

    def records(self, spec: RunSpec) -> list[dict[str, Any]]:
        """Rows of the run, as the child would append them."""
        ...


@runtime_checkable
class TransferRunner(Runner, Protocol):
    """A runner that knows how hyperparameters carry over from one shape to another."""

    def transfer_rules(
        self, parametrization: str, base: Mapping[str, Any], target: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Initialisation and multipliers of every module group, as ``bayeslr transfer show``."""
        ...

    def check_command(self, arguments: Sequence[str]) -> list[str]:
        """Command line of the child that runs a coordinate check."""
        ...


@runtime_checkable
class StackRunner(Runner, Protocol):
    """A runner whose child can train several runs as one program.

    Once `STOP_FILE` lies in the folder of a run, the child goes on without that run, and then
    deletes the file.
    """

    def stack_key(self, spec: RunSpec) -> str:
        """Equal for runs that are better trained together than one after another."""
        ...

    def stack_command(self, run_dirs: Sequence[Path]) -> list[str]:
        """Command line of the child that trains the runs of these folders."""
        ...


@runtime_checkable
class ContinuingRunner(Runner, Protocol):
    """A runner whose runs can go on from the trunk that another run left (``spec.continues``).

    The result is that of the whole run; the records and the FLOPs are those of the new part.
    """

    def has_trunk(self, spec: RunSpec, runs_dir: Path) -> bool:
        """Whether the folders of the runs hold what a continuing run needs to start or resume."""
        ...


@runtime_checkable
class HorizonRunner(Runner, Protocol):
    """A runner that may set a run's LR or betas by its horizon, so that each needs its own trunk.

    Of a runner without this method a WSD run is taken to measure shorter horizons on its way.
    """

    def depends_on_horizon(self, spec: RunSpec) -> bool:
        """Whether a run to another horizon has another LR or other betas from its start on."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run as the study knows it.

    state: ``waiting``, ``running``, or the run's final status (``ok``, ``diverged``, ``failed``,
    ``lost``, ``pruned``). ``flops`` is what was reserved; after the end, what was spent. ``void``
    trials were refused (budget, or another worker had asked for the same run): nothing was trained.
    ``lease_s`` is the age of the owner's last sign of life, in seconds.
    """

    number: int
    spec: RunSpec
    state: str
    flops: float
    reason: str = ""
    owner: str = ""
    alive: bool = False
    lease_s: float | None = None
    void: bool = False
    records: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def finished(self) -> bool:
        """Whether the run has ended, in whatever way."""
        return self.state not in ("waiting", "running")

    @property
    def status_reason(self) -> str:
        """Why the run ended as it did, in the words of its last record."""
        return str((self.records[-1].get("status_reason") or "") if self.records else "")

    @property
    def trunk_tokens(self) -> int | None:
        """Tokens at which the trunk stands that the run left for longer ones; None without one."""
        found = [row.get("trunk_tokens") for row in self.records]
        kept = [int(at) for at in found if isinstance(at, int | float) and math.isfinite(at)]
        return max(kept, default=None)

    @property
    def final_loss(self) -> float | None:
        """Loss at the end of the run, in nats per token; None if it did not end well."""
        final = [r for r in self.records if r.get("status") == "ok" and r.get("loss") is not None]
        if self.state != "ok" or not final:
            return None
        return float(max(final, key=lambda r: r["tokens"])["loss"])


class Study(Protocol):
    """The state of a sweep: who asked for what, and what came of it. Survives any process."""

    def recipe(self) -> Recipe:
        """The recipe that every worker of the sweep follows."""
        ...

    def set_recipe(self, recipe: Recipe) -> None:
        """Replace the recipe (a larger budget, more runs)."""
        ...

    def trials(self) -> list[Trial]:
        """Every trial in order of its number."""
        ...

    def ask(self, spec: RunSpec, *, flops: float, reason: str) -> Trial | None:
        """Reserve the FLOPs and claim a new trial; None if the budget or a twin forbids it."""
        ...

    def adopt(self, number: int) -> bool:
        """Take over a running trial whose owner is dead; False if it is alive or taken."""
        ...

    def beat(self, number: int) -> bool:
        """Renew the lease on a trial of ours; False if somebody else has ended it meanwhile."""
        ...

    def release(self, number: int) -> None:
        """Give up a trial of ours unfinished, so that it can be adopted at once."""
        ...

    def report(self, number: int, *, tokens: int, loss: float) -> None:
        """Intermediate loss of a running trial; tokens increase strictly."""
        ...

    def tell(
        self, number: int, *, state: str, flops: float, records: Sequence[Mapping[str, Any]]
    ) -> None:
        """End a trial with its final status, the FLOPs spent and its rows of the run table.

        A second end of the same trial (an owner given up for dead that was alive) is ignored.
        """
        ...

    def join(self, slots: int) -> None:
        """Give a sign of life as a worker that trains so many programs at a time; 0 to leave."""
        ...

    def slots(self) -> int:
        """Programs that all living workers can train at a time."""
        ...

    def claim(self, task: str) -> bool:
        """Whether a one-off task, such as planning a batch, is ours: one live owner at a time."""
        ...

    def note(self, key: str) -> Any:
        """A JSON value kept with the study; None if there is none."""
        ...

    def set_note(self, key: str, value: Any) -> None:
        """Keep a JSON value with the study."""
        ...

    def close(self) -> None:
        """Release what is held; trials of ours that still run become adoptable."""
        ...


def spec_row(spec: RunSpec) -> dict[str, Any]:
    """Columns of the run table that a spec determines; a record need not repeat them."""
    row = dataclasses.asdict(spec)
    shape = row.pop("shape")
    for name in ("runner", "options", "decay_at", "continues", "continues_at"):
        del row[name]
    row |= {k: shape[k] for k in ("d_model", "n_layers", "n_experts", "top_k") if k in shape}
    return {**row, **spec.covariates, "planned_tokens": spec.tokens}


def mask_password(url: str | None) -> str | None:
    """A storage URL fit for printing."""
    if url is None or "@" not in url or "://" not in url:
        return url
    scheme, _, rest = url.partition("://")
    account, _, place = rest.rpartition("@")
    user, colon, _ = account.partition(":")
    return f"{scheme}://{user}{':***' if colon else ''}@{place}"


_SINGULAR = {
    "bayeslr.launchers": "launcher",
    "bayeslr.runners": "runner",
    "bayeslr.strategies": "strategy",
    "bayeslr.studies": "study",
}


def find_entry_point(group: str, name: str) -> Any:
    """Object behind an entry point, such as group ``bayeslr.runners``, name ``moe``.

    Raises: SpecError that lists what is installed, or names the extra that is missing.
    """
    found = {point.name: point for point in entry_points(group=group)}
    if name not in found:
        raise SpecError(
            f"no {_SINGULAR.get(group, group)} named {name!r}; installed: "
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
