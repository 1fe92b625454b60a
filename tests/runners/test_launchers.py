"""Workers handed to a scheduler: real background jobs, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bayeslr.cli import app
from bayeslr.errors import SpecError
from bayeslr_runners import launchers

submitit = pytest.importorskip("submitit")


def worker(storage: Path, *words: object) -> Result:
    line = ["worker", "--storage", storage, "--study", "nothing-here", *words]
    return CliRunner().invoke(app, [str(word) for word in line])


def test_local_jobs_run_the_command_of_a_worker(tmp_path: Path) -> None:
    """No such study: what a worker says of that is in the log of each job."""
    (tmp_path / "study").mkdir()
    done = worker(
        tmp_path / "study", "--launch", "local", "--count", 2, "--setting", "timeout_min=2"
    )
    assert done.exit_code == 0, done.output
    logs = tmp_path / "study" / "workers"
    ids = done.stdout.removeprefix("2 workers handed to local: ").partition(";")[0].split(", ")
    assert len(set(ids)) == 2
    assert str(logs) in done.stdout
    for job_id in ids:
        assert "nothing-here" in str(submitit.LocalJob(logs, job_id).exception())


def test_a_local_job_outlives_its_caller_and_ends_well(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "print('trained')"]
    (job_id,) = launchers.local(words, count=1, folder=tmp_path, settings={})
    assert str(submitit.LocalJob(tmp_path, job_id).result()).endswith("trained")


def test_what_a_scheduler_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun on it
    with pytest.raises(SpecError, match="no SLURM here"):
        launchers.slurm(["true"], count=1, folder=tmp_path, settings={})
    with pytest.raises(SpecError, match=r"local does not take these settings: .*'gpu'"):
        launchers.local(["true"], count=1, folder=tmp_path, settings={"gpu": 1})
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SpecError, match=r"needs the package 'ray.*pip install 'ray\[default\]'"):
        launchers.ray(["true"], count=1, folder=tmp_path, settings={})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--count", 2), "--count and --setting go with --launch"),
        (("--launch", "pbs"), "no launcher named 'pbs'; installed: local, ray, slurm"),
        (("--launch", "local", "--setting", "gpus"), "expected KEY=VALUE, got 'gpus'"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    tmp_path: Path, words: tuple[object, ...], told: str
) -> None:
    done = worker(tmp_path, *words)
    assert told in str(done.exception)
