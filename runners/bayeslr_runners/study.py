"""A sweep's state in an Optuna study: trials are runs, their user attributes say the rest.

How a run's status maps to Optuna's trial states (the user attribute ``status`` tells all apart):

    ok        COMPLETE, value = loss at the longest horizon
    diverged  PRUNED: it ended early and it says something about LR; Optuna takes no NaN for a value
    pruned    PRUNED: stopped by us, or refused (budget; the same run asked for twice)
    failed    FAIL: the trainer broke
    lost      FAIL: the machine or its process vanished; says nothing

User attributes of a trial: ``run_id``, ``spec`` (JSON of `RunSpec`), ``flops`` (reserved),
``reason``, ``owner``, ``lease``, ``result`` (status, flops spent, records of the run table).
Intermediate values are losses by tokens.

No lock is held anywhere. A trial is created in one atomic write, reservation included, and the
storage numbers trials in one order for everybody; a trial is valid if the FLOPs of all trials up to
its own number fit into the budget. A trial's FLOPs never grow, so what was valid stays so.
Ownership works the same way: claims are trials of a second study, NAME.claims, and the earliest
claim wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from bayeslr.errors import StorageError
from bayeslr.runner_protocol import Trial, mask_password
from bayeslr.specs import JOURNAL_FILE, Recipe, RunSpec, parse_recipe, recipe_document
from bayeslr_runners.processes import machine_name, process_start

SCHEMA = 1

LEASE_SECONDS = 300.0
"""An owner on another machine is dead once it gave no sign of life for this long.

Signs of life come every 20 s (`bayeslr.loop`): fifteen may be missed before a run is taken over.
"""

TASK_SECONDS = 900.0
"""A task claimed on another machine (planning a batch) is free again after this long."""

BUSY_SECONDS = 120.0
"""How long a busy or unreachable database is tried again before giving up."""

_MOST_STEPS = 2**31 - 1
"""Optuna keeps the step of an intermediate value in a column of 32 bits."""

_OPTUNA_STATE = {
    "ok": TrialState.COMPLETE,
    "diverged": TrialState.PRUNED,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "lost": TrialState.FAIL,
}

_PARAMETERS: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-9, 10.0, log=True),
    "tokens": IntDistribution(1, 10**15, log=True),
    "batch_tokens": IntDistribution(1, 10**12, log=True),
    "n_active": IntDistribution(1, 10**15, log=True),
    "n_total": IntDistribution(1, 10**15, log=True),
}
"""What Optuna's own plots and samplers see; wide, for a sweep may leave its space later."""

_UNCLAIMED = (None, 0.0, -1)
"""Owner, time and attempt of what nobody has claimed."""

_open_instances: set[str] = set()

T = TypeVar("T")


def open_study(storage_url: str | None, name: str, out_dir: Path, recipe: Recipe | None) -> Sweep:
    """Open the study of a sweep; create it if a recipe is given and there is none.

    Parameters
    ----------
    storage_url
        Any Optuna storage URL, ``journal:///path/to/file``, or None for a journal file in
        ``out_dir``.
    name
        Study name, shared by all workers. An empty one is refused, with the names there are.
    out_dir
        Folder of the sweep.
    recipe
        None joins an existing study.

    Raises
    ------
    StorageError
        The storage cannot be reached, or the study does not exist. Joining creates nothing.
    """
    storage = _open_storage(storage_url, out_dir, create=recipe is not None)
    studies = {study.study_name: study._study_id for study in storage.get_all_studies()}
    if recipe is None and name not in studies:
        known = sorted(n for n in studies if not n.endswith(".claims"))
        place = mask_password(storage_url) or out_dir / JOURNAL_FILE
        wrong = (
            f"no study named {name!r} in {place}" if name else f"name a study of {place} (--study)"
        )
        raise StorageError(f"{wrong}; studies there: {', '.join(known) or 'none'}")
    study_id = _study_id(storage, name)
    if recipe is None:
        _require_schema(storage, study_id, name)
    claims_id = _study_id(storage, f"{name}.claims")
    sweep = Sweep(storage, study_id, claims_id)
    if recipe is not None:
        if sweep.note("schema") is None:
            sweep.set_recipe(recipe)
            sweep.set_note("schema", SCHEMA)
        _require_schema(storage, study_id, name)
    return sweep


def _require_schema(storage: BaseStorage, study_id: int, name: str) -> None:
    schema = _patiently(lambda: storage.get_study_user_attrs(study_id)).get("schema")
    if schema != SCHEMA:
        raise StorageError(
            f"study {name!r} has schema {schema!r}, this version of bayeslr reads {SCHEMA}; "
            "it was not made by `bayeslr sweep`, or by another version of it"
        )


def _open_storage(url: str | None, out_dir: Path, *, create: bool) -> BaseStorage:
    if url is None or url.startswith("journal://"):
        path = out_dir / JOURNAL_FILE if url is None else Path(url.removeprefix("journal://"))
        if not create and not path.exists():
            raise StorageError(f"{path} does not exist; is that the folder of a sweep?")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return JournalStorage(JournalFileBackend(str(path), lock_obj=KernelLock(path)))
        except (json.JSONDecodeError, KeyError, ValueError) as error:
            raise StorageError(
                f"{path} is not a readable Optuna journal ({error}); move it away to start afresh"
            ) from error
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        database = _sqlite_path(url)
        if not create and database is not None and not database.exists():
            raise StorageError(f"{database} does not exist; is that the database of a sweep?")
        options = {"connect_args": {"timeout": BUSY_SECONDS}}
    try:
        with _quiet():
            return _open_database(url, options)
    except ImportError as error:
        raise StorageError(
            f"storage {mask_password(url)}: {error}; for PostgreSQL: "
            "pip install 'bayeslr[postgres]' and use postgresql+psycopg://user@host/database"
        ) from error
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise StorageError(f"cannot open storage {mask_password(url)}: {reason}") from error


def _sqlite_path(url: str) -> Path | None:
    """File of an SQLite URL; None if it names none."""
    from sqlalchemy.engine import make_url  # slow to load, and a journal does without
    from sqlalchemy.exc import ArgumentError

    try:
        database = make_url(url).database
    except ArgumentError:
        return None
    return None if not database or database.startswith((":", "file:")) else Path(database)


def _open_database(url: str, options: dict[str, Any]) -> BaseStorage:
    for _ in range(10):
        try:
            return get_storage(RDBStorage(url, engine_kwargs=options))
        except Exception as error:
            # Two workers that create the tables at once trip over each other.
            if not any(word in str(error) for word in ("already exists", "duplicate", "locked")):
                raise
            time.sleep(0.5)
    return get_storage(RDBStorage(url, engine_kwargs=options))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from announcing what it creates."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _study_id(storage: BaseStorage, name: str) -> int:
    def find_or_create() -> int:
        for study in storage.get_all_studies():
            if study.study_name == name:
                return int(study._study_id)
        with _quiet():
            directions = [optuna.study.StudyDirection.MINIMIZE]
            return int(storage.create_new_study(directions, study_name=name))

    try:
        return _patiently(find_or_create)
    except DuplicatedStudyError:  # another worker created it between the two steps
        return _patiently(find_or_create)


def _patiently(operation: Callable[[], T]) -> T:
    """Repeat while the database is busy or restarts, not where it refuses what it is told."""
    give_up = time.monotonic() + BUSY_SECONDS
    pause = 0.05
    while True:
        try:
            return operation()
        except StorageInternalError as error:
            cause = str(error.__cause__ or error)
            refused = type(error.__cause__).__name__ in ("DataError", "ProgrammingError")
            refused |= any(word in cause for word in ("full", "readonly", "read-only"))
            if refused or time.monotonic() > give_up:
                raise StorageError(f"the study's storage does not answer: {cause}") from error
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


@final
class KernelLock:
    """Lock of a journal file that the kernel drops when its holder dies, however it dies.

    Optuna's own lock files outlive a killed process and stall everybody for 30 s. The holder also
    mends what a killed or disk-starved writer left behind: a last line without its end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock; always True."""
        self._fd = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._drop_torn_line()
        return True

    def release(self) -> None:
        """Let the next one in."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _drop_torn_line(self) -> None:
        with self._path.open("rb+") as file:
            size = end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                end = start + newline + 1
                if newline >= 0:
                    break
                end = start
            if end < size:
                file.truncate(end)


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A process that claims: unique over machines, containers, reboots and reused ids."""

    machine: str
    pid: int
    started: str
    instance: str

    def alive(self, last_seen: float, lease_s: float) -> bool:
        """Whether the process still runs; elsewhere, whether it was seen within the lease."""
        if last_seen == 0:
            return False
        if self.machine != machine_name():
            return time.time() - last_seen < lease_s
        if self.pid == os.getpid() and self.started == process_start(self.pid):
            return self.instance in _open_instances
        return self.started == process_start(self.pid)

    @property
    def label(self) -> str:
        """``host:pid``."""
        return f"{self.machine.partition('/')[0]}:{self.pid}"


@final
class Sweep:
    """`bayeslr.runner_protocol.Study` on an Optuna storage; made by `open_study`."""

    def __init__(self, storage: BaseStorage, study_id: int, claims_id: int) -> None:
        self._storage = storage
        self._study_id = study_id
        self._claims_id = claims_id
        self._me = Owner(
            machine=machine_name(),
            pid=os.getpid(),
            started=process_start(os.getpid()),
            instance=uuid.uuid4().hex,
        )
        self._reported: dict[int, int] = {}
        _open_instances.add(self._me.instance)

    def recipe(self) -> Recipe:
        """The recipe that every worker of the sweep follows."""
        return parse_recipe(self.note("recipe"), where="the study's recipe")

    def set_recipe(self, recipe: Recipe) -> None:
        """Replace the recipe (a larger budget, more runs)."""
        self.set_note("recipe", recipe_document(recipe))

    def note(self, key: str) -> Any:
        """A JSON value kept with the study; None if there is none."""
        return _patiently(lambda: self._storage.get_study_user_attrs(self._study_id)).get(key)

    def set_note(self, key: str, value: Any) -> None:
        """Keep a JSON value with the study."""
        _patiently(lambda: self._storage.set_study_user_attr(self._study_id, key, _plain(value)))

    def trials(self) -> list[Trial]:
        """Every trial in order of its number."""
        takeovers = self._winning_claims("trial:")
        # Trials without a spec are not ours: somebody added them with another tool.
        return [
            self._trial(raw, takeovers)
            for raw in self._raw(self._study_id)
            if "spec" in raw.user_attrs
        ]

    def ask(self, spec: RunSpec, *, flops: float, reason: str) -> Trial | None:
        """Reserve the FLOPs and claim a new trial; None if the budget or a twin forbids it."""
        before = self.trials()
        if not self._allowed(before, spec.run_id, flops):
            return None
        attributes = {
            "run_id": spec.run_id,
            "spec": spec.to_json(),
            "flops": flops,
            "reason": reason,
            "shape": spec.shape.get("name"),
            "owner": dataclasses.asdict(self._me),
            "lease": {"instance": self._me.instance, "time": time.time()},
        }
        template = create_trial(
            state=TrialState.RUNNING,
            params={name: getattr(spec, name) for name in _PARAMETERS},
            distributions=_PARAMETERS,
            user_attrs=attributes,
        )
        _patiently(lambda: self._storage.create_new_trial(self._study_id, template))
        # A write that the database repeated after a lost answer shows here as two trials of ours.
        mine = [
            t
            for t in self._raw(self._study_id)
            if t.user_attrs.get("run_id") == spec.run_id
            and t.user_attrs["owner"]["instance"] == self._me.instance
            and "result" not in t.user_attrs
        ]
        valid = [t.number for t in mine if self._judge(t.number)]
        return self._find(valid[0]) if valid else None

    def adopt(self, number: int) -> bool:
        """Take over a running trial whose owner is dead; False if it is alive or taken."""
        what = f"trial:{number}"
        *_, attempt = self._winning_claims(what).get(what, _UNCLAIMED)
        trial = self._find(number)
        if trial.finished or trial.alive:
            return False
        if not self._win(what, attempt + 1) or not self._judge(number):
            return False
        raw = self._one(number)
        # Kept for people who read the study; ownership itself is decided by the claims.
        self._set(raw, "owner", dataclasses.asdict(self._me))
        return self.beat(number)

    def beat(self, number: int) -> bool:
        """Renew the lease on a trial of ours; False if somebody else has ended it meanwhile."""
        raw = self._one(number)
        if raw.state.is_finished() or "result" in raw.user_attrs:
            return False
        owner, _ = self._owner(raw, self._winning_claims("trial:"))
        if owner is None or owner.instance != self._me.instance:
            return False
        return self._set(raw, "lease", {"instance": self._me.instance, "time": time.time()})

    def release(self, number: int) -> None:
        """Give up a trial of ours unfinished, so that it can be adopted at once."""
        raw = self._one(number)
        self._set(raw, "lease", {"instance": self._me.instance, "time": 0})

    def report(self, number: int, *, tokens: int, loss: float) -> None:
        """Intermediate loss of a running trial; tokens increase strictly.

        Its step is the tokens, in thousands or millions where the whole run has more than a step
        can be.
        """
        raw = self._one(number)
        unit = 1
        while raw.params["tokens"] // unit > _MOST_STEPS:
            unit *= 1000
        step = min(tokens // unit, _MOST_STEPS)
        last = max([self._reported.get(number, 0), *raw.intermediate_values])
        if step <= last or not math.isfinite(loss):
            return
        self._reported[number] = step
        with contextlib.suppress(UpdateFinishedTrialError):
            _patiently(
                lambda: self._storage.set_trial_intermediate_value(raw._trial_id, step, loss)
            )

    def tell(
        self, number: int, *, state: str, flops: float, records: Sequence[Mapping[str, Any]]
    ) -> None:
        """End a trial with its final status, the FLOPs spent and its rows of the run table.

        A second end of the same trial (an owner given up for dead that was alive) is ignored.
        """
        raw = self._one(number)
        result = {
            "status": state,
            "flops": min(flops, float(raw.user_attrs["flops"])),
            "records": [_plain(dict(row)) for row in records],
        }
        # The result is one write, and it decides; a process killed right after it leaves a trial
        # that `trials` already counts as ended and `_close` ends for Optuna.
        if self._set(raw, "result", result):
            self._close(self._one(number))

    def join(self, slots: int) -> None:
        """Give a sign of life as a worker that trains so many programs at a time; 0 to leave."""
        entry = {"owner": dataclasses.asdict(self._me), "slots": slots, "time": time.time()}
        key = f"worker:{self._me.instance}"
        _patiently(lambda: self._storage.set_study_user_attr(self._claims_id, key, entry))

    def slots(self) -> int:
        """Programs that all living workers can train at a time."""
        notes = _patiently(lambda: self._storage.get_study_user_attrs(self._claims_id))
        workers = [note for key, note in notes.items() if key.startswith("worker:")]
        alive = [w for w in workers if Owner(**w["owner"]).alive(w["time"], LEASE_SECONDS)]
        return sum(worker["slots"] for worker in alive)

    def claim(self, task: str) -> bool:
        """Whether a one-off task, such as planning a batch, is ours: one live owner at a time."""
        what = f"task:{task}"
        owner, since, attempt = self._winning_claims(what).get(what, _UNCLAIMED)
        if owner is not None:
            if owner.instance == self._me.instance:
                return True
            if owner.alive(since, TASK_SECONDS):
                return False
        return self._win(what, attempt + 1)

    def close(self) -> None:
        """Release what is held; trials of ours that still run become adoptable."""
        takeovers = self._winning_claims("trial:")
        for raw in self._raw(self._study_id):
            owner, _ = self._owner(raw, takeovers)
            if not raw.state.is_finished() and owner == self._me:
                self.release(raw.number)
        _open_instances.discard(self._me.instance)

    def _raw(self, study_id: int) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = _patiently(
            lambda: self._storage.get_all_trials(study_id, deepcopy=False)
        )
        return sorted(trials, key=lambda t: t.number)

    def _one(self, number: int) -> FrozenTrial:
        return next(t for t in self._raw(self._study_id) if t.number == number)

    def _find(self, number: int) -> Trial:
        return next(t for t in self.trials() if t.number == number)

    def _set(self, raw: FrozenTrial, key: str, value: Any) -> bool:
        try:
            _patiently(lambda: self._storage.set_trial_user_attr(raw._trial_id, key, value))
        except UpdateFinishedTrialError:
            return False
        return True

    def _trial(self, raw: FrozenTrial, takeovers: Mapping[str, tuple[Owner, float, int]]) -> Trial:
        attributes = raw.user_attrs
        result = attributes.get("result")
        owner, seen = self._owner(raw, takeovers)
        spec = RunSpec.from_json(attributes["spec"])
        if result is None:
            return Trial(
                number=raw.number,
                spec=spec,
                state="running",
                flops=float(attributes["flops"]),
                reason=attributes["reason"],
                owner=owner.label if owner else "",
                alive=owner is not None and owner.alive(seen, LEASE_SECONDS),
                lease_s=max(0.0, time.time() - seen) if seen else None,
            )
        return Trial(
            number=raw.number,
            spec=spec,
            state=result["status"],
            flops=float(result["flops"]),
            reason=attributes["reason"],
            owner=owner.label if owner else "",
            void=bool(result.get("void")),
            records=tuple(result["records"]),
        )

    def _owner(
        self, raw: FrozenTrial, takeovers: Mapping[str, tuple[Owner, float, int]]
    ) -> tuple[Owner | None, float]:
        """Owner of a trial and when it was last seen (0: it gave the trial up)."""
        takeover = takeovers.get(f"trial:{raw.number}")
        if takeover is not None:
            owner, since, _ = takeover
        elif "owner" in raw.user_attrs:
            owner, since = Owner(**raw.user_attrs["owner"]), 0.0
        else:
            return None, 0.0
        lease = raw.user_attrs.get("lease", {})
        if lease.get("instance") == owner.instance:
            since = float(lease["time"])
        return owner, since

    def _allowed(self, earlier: Sequence[Trial], run_id: str, flops: float) -> bool:
        if any(twin(trial, run_id) for trial in earlier):
            return False
        budget = self.recipe().budget_flops
        # One part in 1e9 forgives the rounding of sums, not a run.
        return math.fsum([*(t.flops for t in earlier), flops]) <= budget * (1 + 1e-9)

    def _judge(self, number: int) -> bool:
        """Whether a new trial stands; if not, it is ended as pruned with nothing spent."""
        trials = self.trials()
        trial = next(t for t in trials if t.number == number)
        earlier = [t for t in trials if t.number < number]
        if self._allowed(earlier, trial.spec.run_id, trial.flops):
            return True
        raw = self._one(number)
        result = {"status": "pruned", "flops": 0.0, "records": [], "void": True}
        if self._set(raw, "result", result):
            self._close(self._one(number))
        return False

    def _close(self, raw: FrozenTrial) -> None:
        result = raw.user_attrs["result"]
        self._set(raw, "status", result["status"])
        state = _OPTUNA_STATE[result["status"]]
        value = None
        if state is TrialState.COMPLETE:
            losses = [
                (row["tokens"], row["loss"])
                for row in result["records"]
                if row.get("status") == "ok" and row.get("loss") is not None
            ]
            value = max(losses)[1]
        with contextlib.suppress(UpdateFinishedTrialError):
            _patiently(
                lambda: self._storage.set_trial_state_values(
                    raw._trial_id, state, None if value is None else [value]
                )
            )

    def _winning_claims(self, prefix: str) -> dict[str, tuple[Owner, float, int]]:
        """Owner, time and attempt of the claim in force, by what is claimed."""
        winners: dict[str, tuple[Owner, float, int]] = {}
        for raw in self._raw(self._claims_id):
            what, attempt = raw.user_attrs["what"], raw.user_attrs["attempt"]
            if what.startswith(prefix) and attempt > winners.get(what, _UNCLAIMED)[2]:
                winners[what] = (Owner(**raw.user_attrs["owner"]), raw.user_attrs["time"], attempt)
        return winners

    def _win(self, what: str, attempt: int) -> bool:
        """Claim what nobody alive owns; of several claims of one attempt the earliest wins.

        attempt: one more than that of the claim that was seen to be dead, so that one made since
        then is not overruled.
        """
        claim = create_trial(
            state=TrialState.PRUNED,
            user_attrs={
                "what": what,
                "attempt": attempt,
                "owner": dataclasses.asdict(self._me),
                "time": time.time(),
            },
        )
        _patiently(lambda: self._storage.create_new_trial(self._claims_id, claim))
        owner, *_ = self._winning_claims(what)[what]
        return owner.instance == self._me.instance


def twin(trial: Trial, run_id: str) -> bool:
    """Whether a trial makes another one of that run needless: lost and failed ones do not."""
    return trial.spec.run_id == run_id and not trial.void and trial.state not in ("lost", "failed")


def _plain(value: Any) -> Any:
    """JSON-safe copy: NaN and infinities become null, for no JSON reader agrees on them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
