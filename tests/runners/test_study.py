"""The Optuna-backed study: budget, ownership, crash safety, on every kind of storage."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from bayeslr.errors import StorageError
from bayeslr.runner_protocol import mask_password, spec_row
from bayeslr.specs import JOURNAL_FILE, Recipe, RunSpec, parse_recipe
from bayeslr_runners import study as study_module
from bayeslr_runners.processes import machine_name
from bayeslr_runners.study import KernelLock, Owner, Sweep, open_study
from tests.fakes import toy_recipe


def recipe(budget_flops: float = 100.0) -> Recipe:
    return parse_recipe(toy_recipe(sweep__budget_flops=budget_flops))


def spec(number: int, lr: float = 1e-2) -> RunSpec:
    return RunSpec(
        run_id=f"run{number}",
        family="toy",
        runner="command",
        lr=lr,
        tokens=1000,
        batch_tokens=10,
        n_active=100,
        n_total=200,
        seq_len=10,
        shape={"name": "small"},
    )


def ok_rows(run: RunSpec, loss: float = 3.0) -> list[dict[str, Any]]:
    return [{**spec_row(run), "tokens": run.tokens, "loss": loss, "status": "ok"}]


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else None


@pytest.fixture
def opened(storage: str | None, tmp_path: Path) -> Sweep:
    return open_study(storage, "toy", tmp_path, recipe())


def test_a_run_is_asked_reported_and_told(opened: Sweep) -> None:
    trial = opened.ask(spec(0), flops=10.0, reason="why not")
    assert trial is not None
    assert (trial.state, trial.flops, trial.reason, trial.alive) == (
        "running", 10.0, "why not", True,
    )  # fmt: skip
    opened.report(trial.number, tokens=500, loss=4.0)
    opened.report(trial.number, tokens=500, loss=3.9)
    opened.report(trial.number, tokens=400, loss=3.8)
    opened.tell(trial.number, state="ok", flops=9.0, records=ok_rows(trial.spec))
    (ended,) = opened.trials()
    assert (ended.state, ended.flops, ended.spec) == ("ok", 9.0, spec(0))
    raw = opened._raw(opened._study_id)[0]
    assert raw.state is optuna.trial.TrialState.COMPLETE
    assert raw.value == 3.0
    assert raw.intermediate_values == {500: 4.0}
    assert raw.params["lr"] == 1e-2


@pytest.mark.parametrize(
    ("state", "optuna_state"),
    [("diverged", "PRUNED"), ("pruned", "PRUNED"), ("failed", "FAIL"), ("lost", "FAIL")],
)
def test_every_status_survives_and_nan_is_no_trouble(
    opened: Sweep, state: str, optuna_state: str
) -> None:
    trial = opened.ask(spec(0), flops=10.0, reason="")
    assert trial is not None
    row = {**spec_row(trial.spec), "tokens": 10.0, "loss": float("nan"), "status": state}
    opened.tell(
        trial.number, state=state, flops=1.0, records=[{**row, "status_reason": "it said so"}]
    )
    (ended,) = opened.trials()
    assert (ended.state, ended.status_reason, ended.records[0]["loss"]) == (
        state, "it said so", None,
    )  # fmt: skip
    raw = opened._raw(opened._study_id)[0]
    assert raw.state.name == optuna_state
    assert raw.user_attrs["status"] == state


def test_the_budget_is_reserved_when_a_run_is_asked_for(opened: Sweep) -> None:
    first = opened.ask(spec(0), flops=60.0, reason="")
    assert first is not None
    assert opened.ask(spec(1), flops=60.0, reason="") is None
    opened.tell(first.number, state="diverged", flops=20.0, records=())
    assert opened.ask(spec(1), flops=80.0, reason="") is not None
    assert opened.ask(spec(2), flops=1e-3, reason="") is None


def test_what_was_spent_never_exceeds_what_was_reserved(opened: Sweep) -> None:
    first = opened.ask(spec(0), flops=60.0, reason="")
    assert first is not None
    opened.tell(first.number, state="ok", flops=1e9, records=ok_rows(first.spec))
    assert opened.trials()[0].flops == 60.0


def test_nothing_is_asked_for_twice(opened: Sweep) -> None:
    assert opened.ask(spec(0), flops=10.0, reason="") is not None
    assert opened.ask(spec(0), flops=10.0, reason="") is None


@pytest.mark.parametrize("state", ["failed", "lost"])
def test_a_run_that_came_to_nothing_may_be_asked_for_again(opened: Sweep, state: str) -> None:
    first = opened.ask(spec(0), flops=10.0, reason="")
    assert first is not None
    opened.tell(first.number, state=state, flops=5.0, records=())
    assert opened.ask(spec(0), flops=10.0, reason="again") is not None


def test_a_trial_created_behind_our_back_makes_the_later_one_void(
    opened: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers pass the first check together; the storage's order decides."""
    allowed = Sweep._allowed
    answers = iter([True])
    monkeypatch.setattr(Sweep, "_allowed", lambda *words: next(answers, None) or allowed(*words))
    assert opened.ask(spec(0), flops=60.0, reason="") is not None
    answers = iter([True])
    assert opened.ask(spec(1), flops=60.0, reason="") is None
    refused = opened.trials()[1]
    assert (refused.state, refused.flops, refused.void) == ("pruned", 0.0, True)


def test_a_live_owner_is_left_alone(opened: Sweep, storage: str | None, tmp_path: Path) -> None:
    trial = opened.ask(spec(0), flops=10.0, reason="")
    assert trial is not None
    other = open_study(storage, "toy", tmp_path, None)
    assert not other.adopt(trial.number)
    assert not other.beat(trial.number)


def test_a_closed_owners_run_is_taken_over_once(
    opened: Sweep, storage: str | None, tmp_path: Path
) -> None:
    trial = opened.ask(spec(0), flops=10.0, reason="")
    assert trial is not None
    opened.close()
    heirs = [open_study(storage, "toy", tmp_path, None) for _ in range(3)]
    assert [heir.adopt(trial.number) for heir in heirs] == [True, False, False]
    assert heirs[0].beat(trial.number)
    assert not opened.beat(trial.number)


def test_a_late_result_is_accepted_and_the_second_one_ignored(
    opened: Sweep, storage: str | None, tmp_path: Path
) -> None:
    trial = opened.ask(spec(0), flops=10.0, reason="")
    assert trial is not None
    opened.close()
    heir = open_study(storage, "toy", tmp_path, None)
    assert heir.adopt(trial.number)
    opened.tell(trial.number, state="ok", flops=10.0, records=ok_rows(trial.spec, 3.0))
    assert not heir.beat(trial.number)
    heir.tell(trial.number, state="ok", flops=10.0, records=ok_rows(trial.spec, 9.0))
    (ended,) = heir.trials()
    assert ended.records[0]["loss"] == 3.0


def test_a_killed_processs_run_is_taken_over_at_once(
    storage: str | None, tmp_path: Path, opened: Sweep, root: Path
) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tests.runners.test_study import *;"
        f"s = open_study({storage!r}, 'toy', Path({str(tmp_path)!r}), None);"
        "s.ask(spec(0), flops=10.0, reason=''); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'runners'}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    (trial,) = opened.trials()
    assert (trial.state, trial.alive) == ("running", False)
    assert opened.adopt(0)


@pytest.mark.parametrize(("age", "alive"), [(10.0, True), (200.0, True), (400.0, False)])
def test_an_owner_elsewhere_lives_as_long_as_its_lease(age: float, alive: bool) -> None:
    owner = Owner(machine="elsewhere", pid=1, started="1", instance="x")
    assert owner.alive(time.time() - age, study_module.LEASE_SECONDS) is alive


def test_a_reused_process_id_is_not_the_owner() -> None:
    owner = Owner(machine=machine_name(), pid=os.getppid(), started="1", instance="x")
    assert not owner.alive(time.time(), study_module.LEASE_SECONDS)


def test_a_task_has_one_live_owner(opened: Sweep, storage: str | None, tmp_path: Path) -> None:
    other = open_study(storage, "toy", tmp_path, None)
    assert opened.claim("batch:0")
    assert opened.claim("batch:0")
    assert not other.claim("batch:0")
    opened.close()
    assert other.claim("batch:0")


@pytest.mark.parametrize(("what", "moment"), [("task", 1), ("trial", 1), ("trial", 2)])
def test_what_is_claimed_between_another_ones_look_and_claim_stays_so(
    what: str,
    moment: int,
    opened: Sweep,
    storage: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone, first = (open_study(storage, "toy", tmp_path, None) for _ in range(2))
    trial = gone.ask(spec(0), flops=10.0, reason="")
    assert trial is not None
    gone.close()
    look, looks, won = opened._winning_claims, itertools.count(1), []

    def take(sweep: Sweep) -> bool:
        return sweep.claim("batch:0") if what == "task" else sweep.adopt(trial.number)

    def overtaken(prefix: str) -> Any:
        found = look(prefix)
        if next(looks) == moment:
            won.append(take(first))
        return found

    monkeypatch.setattr(opened, "_winning_claims", overtaken)
    assert not take(opened)
    assert won == [True]
    assert what == "task" or first.beat(trial.number)


def test_notes_and_recipe_are_read_back(opened: Sweep, storage: str | None, tmp_path: Path) -> None:
    opened.set_note("stop", {"kind": "budget", "loss": float("nan")})
    other = open_study(storage, "toy", tmp_path, None)
    assert other.note("stop") == {"kind": "budget", "loss": None}
    assert other.note("nothing") is None
    assert other.recipe() == recipe()


def test_joining_a_study_that_is_not_there_lists_those_that_are(
    opened: Sweep, storage: str | None, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=r"no study named 'typo'.*studies there: toy"):
        open_study(storage, "typo", tmp_path, None)


def test_joining_a_folder_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist; is that the folder of a sweep"):
        open_study(None, "toy", tmp_path, None)


def test_a_study_of_another_tool_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(storage=url, study_name="toy")
    with pytest.raises(StorageError, match=r"schema None.*was not made by `bayeslr sweep`"):
        open_study(url, "toy", tmp_path, None)
    assert optuna.get_all_study_names(url) == ["toy"]


def test_trials_of_another_tool_in_our_study_are_left_alone(
    opened: Sweep,
) -> None:
    opened._storage.create_new_trial(opened._study_id)
    assert opened.trials() == []
    assert opened.ask(spec(0), flops=1.0, reason="") is not None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////no/such/folder/x.db", "cannot open storage sqlite:////no/such"),
        ("nonsense://x", "cannot open storage nonsense"),
        ("postgresql+psycopg://me:secret@127.0.0.1:9/x", r"me:\*\*\*@127.0.0.1:9/x"),
    ],
)
def test_a_storage_that_cannot_be_opened(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_study(url, "toy", tmp_path, recipe())
    assert "secret" not in str(caught.value)


def test_a_database_that_may_only_be_read_is_read_and_refuses_at_once(tmp_path: Path) -> None:
    database = tmp_path / "study.db"
    open_study(f"sqlite:///{database}", "toy", tmp_path, recipe()).close()
    reader = open_study(f"sqlite:///file:{database}?mode=ro&uri=true", "toy", tmp_path, None)
    assert reader.recipe() == recipe()
    begun = time.monotonic()
    with pytest.raises(StorageError, match="readonly database"):
        reader.set_note("stop", None)
    assert time.monotonic() - begun < study_module.BUSY_SECONDS / 4
    reader.close()


def test_passwords_are_masked() -> None:
    assert mask_password("postgresql://a:b@c/d") == "postgresql://a:***@c/d"
    assert mask_password("sqlite:///x.db") == "sqlite:///x.db"
    assert mask_password(None) is None


def test_a_journal_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text("not a journal\nat all\n")
    with pytest.raises(StorageError, match="not a readable Optuna journal"):
        open_study(None, "toy", tmp_path, recipe())


def test_a_torn_line_of_a_killed_writer_is_mended(tmp_path: Path) -> None:
    study = open_study(None, "toy", tmp_path, recipe())
    study.set_note("a", 1)
    with (tmp_path / JOURNAL_FILE).open("ab") as file:
        file.write(b'{"op_code": 2, "worker_id": "x", "stu')
    heir = open_study(None, "toy", tmp_path, None)
    heir.set_note("b", 2)
    assert (study.note("a"), study.note("b")) == (1, 2)
    for line in (tmp_path / JOURNAL_FILE).read_text().splitlines():
        json.loads(line)


def test_a_killed_lock_holder_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.touch()
    code = (
        "import os; from pathlib import Path; from bayeslr_runners.study import KernelLock;"
        f"KernelLock(Path({str(path)!r})).acquire(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    lock = KernelLock(path)
    started = time.monotonic()
    lock.acquire()
    lock.release()
    assert time.monotonic() - started < 1.0


def _ask_all(storage: str | None, folder: str, first: int, start: float) -> None:
    study = open_study(storage, "toy", Path(folder), None)
    time.sleep(max(0.0, start - time.time()))
    for number in range(10):
        # Half of the runs are everybody's, half are each worker's own.
        name = number if number % 2 else 100 * first + number
        trial = study.ask(spec(name), flops=7.0, reason=str(first))
        if trial is not None:
            study.tell(trial.number, state="ok", flops=7.0, records=ok_rows(trial.spec))
    study.close()


@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [
        ("journal", 1),
        ("journal", 4),
        ("journal", 8),
        ("sqlite", 2),
        pytest.param("sqlite", 8, marks=pytest.mark.slow),
    ],
)
def test_the_budget_holds_whoever_asks(kind: str, num_workers: int, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else None
    opened = open_study(storage, "toy", tmp_path, recipe())
    context = multiprocessing.get_context("spawn")
    start = time.time() + 1.0 + 0.4 * num_workers
    workers = [
        context.Process(target=_ask_all, args=(storage, str(tmp_path), i, start))
        for i in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    trials = opened.trials()
    made = [t for t in trials if not t.void]
    assert sum(t.flops for t in trials) <= 100.0
    assert len({t.spec.run_id for t in made}) == len(made)
    # 14 runs fit; a worker alone asks for ten. Workers that ask at the same instant may each be
    # refused for the other's sake, and here they do not ask again.
    assert 10 <= len(made) <= 14


def test_joining_creates_no_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"zz\.db does not exist; is that the database"):
        open_study(f"sqlite:///{tmp_path}/zz.db", "toy", tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_a_study_must_be_named(storage: str | None, opened: Sweep, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"name a study of .* \(--study\); studies there: toy"):
        open_study(storage, "", tmp_path, None)


def test_the_slots_of_living_workers_are_counted(
    opened: Sweep, storage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened.slots() == 0
    opened.join(2)
    other = open_study(storage, "toy", tmp_path, None)
    other.join(3)
    assert opened.slots() == other.slots() == 5
    other.join(1)
    assert opened.slots() == 3
    other.close()  # as if its process had ended
    assert opened.slots() == 2
    # Of processes elsewhere only their last sign of life is known.
    monkeypatch.setattr(study_module, "machine_name", lambda: "elsewhere")
    assert opened.slots() == 3
    monkeypatch.setattr(study_module, "LEASE_SECONDS", 0.0)
    assert opened.slots() == 0
