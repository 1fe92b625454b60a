"""Several worker processes on one study: files, and a real PostgreSQL server."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from bayeslr.loop import find_runner, open_status
from bayeslr.space import start_design
from bayeslr.specs import parse_recipe
from bayeslr_runners.study import open_study
from tests.fakes import finished_runs, toy_recipe, write_recipe

BUDGET = 5e12


def process(root: Path, log: Path, *words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'runners'}"}
    command = [sys.executable, str(root / "tests" / "fakes.py"), *words]
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def run_together(
    root: Path, tmp_path: Path, recipe: Path, num_workers: int, storage: str | None
) -> None:
    """One sweep and ``num_workers - 1`` workers that join it, to the end."""
    out = tmp_path / "out"
    first = [str(out)] + ([storage] if storage else [])
    processes = [process(root, tmp_path / "sweep.log", "sweep", str(recipe), *first)]
    while open_when_there(storage, out) is None:
        assert processes[0].poll() is None, (tmp_path / "sweep.log").read_text()
    for i in range(1, num_workers):
        words = ["worker", storage or str(out), "toy", str(out)]
        processes.append(process(root, tmp_path / f"worker{i}.log", *words))
    for i, started in enumerate(processes):
        log = tmp_path / ("sweep.log" if i == 0 else f"worker{i}.log")
        assert started.wait(200) == 0, log.read_text()


def open_when_there(storage: str | None, out: Path) -> dict[str, object] | None:
    with contextlib.suppress(ValueError):
        return open_status(storage or str(out), "toy")
    return None


@pytest.mark.parametrize("num_workers", [1, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_workers_share_the_budget(num_workers: int, tmp_path: Path, root: Path) -> None:
    document = toy_recipe(
        sweep__budget_flops=BUDGET, sweep__batch_runs=num_workers, options__seconds=0.2
    )
    recipe = write_recipe(tmp_path / "toy.toml", document)
    run_together(root, tmp_path, recipe, num_workers, None)
    study = open_study(None, "toy", tmp_path / "out", None)
    trials = study.trials()
    study.close()
    assert 0.9 * BUDGET < sum(t.flops for t in trials) <= BUDGET
    # A worker that starts slowly may find little left to do.
    assert len({t.owner for t in trials}) >= min(2, num_workers)
    finished_runs(tmp_path / "out")  # none twice
    assert open_status(str(tmp_path / "out"))["runs"] == {
        "ok": len(finished_runs(tmp_path / "out"))
    }


def postgres_bin() -> Path | None:
    found = shutil.which("initdb")
    homes = [Path(found).resolve().parent] if found else []
    homes += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return homes[-1] if homes else None


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """URL of a private PostgreSQL server that lives as long as the test."""
    home = postgres_bin()
    if home is None:
        pytest.skip("no PostgreSQL server programs (initdb, pg_ctl) on this machine")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'bayeslr[postgres]'")
    prefix: list[str] = []
    data = tmp_path / "pg"
    data.mkdir()
    if os.geteuid() == 0:  # the server refuses to run as root
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("root cannot run PostgreSQL, and there is no user postgres")
        prefix = ["runuser", "-u", "postgres", "--"]
        shutil.chown(data, "postgres")
        for folder in [tmp_path, *tmp_path.parents]:
            if folder.owner() == "root" and folder not in (Path("/"), Path("/tmp")):
                folder.chmod(folder.stat().st_mode | 0o011)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = str(data / "cluster")
    control = [*prefix, str(home / "pg_ctl"), "-D", cluster, "-w", "-s"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    initdb = [*prefix, str(home / "initdb"), "-D", cluster, "-A", "trust", "-U", "me", "-N"]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd="/")
    log = str(data / "log")
    subprocess.run([*control, "-l", log, "-o", options, "start"], check=True, cwd="/")
    try:
        yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, cwd="/")


def test_workers_share_a_postgresql_study(postgres: str, tmp_path: Path, root: Path) -> None:
    document = toy_recipe(sweep__budget_flops=BUDGET, sweep__batch_runs=3, options__seconds=0.2)
    recipe = write_recipe(tmp_path / "toy.toml", document)
    run_together(root, tmp_path, recipe, 3, postgres)
    status = open_status(postgres, "toy")
    assert 0.9 * BUDGET < float(status["spent_flops"]) <= BUDGET
    assert status["runs"] == {"ok": len(finished_runs(tmp_path / "out", storage=postgres))}
    study = open_study(postgres, "toy", tmp_path, None)
    assert len({t.owner for t in study.trials()}) >= 2
    study.close()


def test_a_postgresql_study_takes_losses_of_long_runs(postgres: str, tmp_path: Path) -> None:
    recipe = parse_recipe(toy_recipe(sweep__budget_flops=1e30))
    study = open_study(postgres, "long", tmp_path, recipe)
    spec = start_design(recipe, find_runner(recipe))[0].spec
    long = dataclasses.replace(spec, tokens=10**11, decay_at=(10**11,))
    trial = study.ask(long, flops=1.0, reason="why not")
    assert trial is not None
    study.report(trial.number, tokens=4 * 10**9, loss=3.0)
    (raw,) = study._raw(study._study_id)
    assert raw.intermediate_values == {4_000_000: 3.0}  # in thousands
    study.close()
