"""The closed loop: a sweep from its recipe to its prediction, resumable at any point.

The state is the study alone. The folder of a sweep holds

    recipe.toml, resolved.json   what was asked for: every value, versions, git hash
    study.journal                the study, unless a storage URL was given
    runs/RUN_ID/                 one folder a run: spec, records, checkpoints, logs
    runs.parquet, fit/           the run table and the last fit
    runs.parquet.quarantine.csv  rows that break a rule of the run table, if there are any
    predictions.csv, report.html what came of it
    validation.json              the target's own runs, where the recipe asks for them
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.util
import json
import math
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bayeslr.errors import SpecError, StorageError
from bayeslr.loop.ending import SweepResult as SweepResult
from bayeslr.loop.ending import advice, conclude, train_target
from bayeslr.loop.planning import Planner, ask_again, came_to_nothing, first_runs
from bayeslr.loop.status import status_of
from bayeslr.loop.validation import validation_runs
from bayeslr.loop.worker import Progress, Stop, Worker, silent
from bayeslr.runner_protocol import Runner, Study, find_entry_point, find_runner, mask_password
from bayeslr.runs import write_atomically
from bayeslr.space import candidates, cell_of, targets_of, weights_of
from bayeslr.specs import Recipe, RunSpec, Target, as_path, load_recipe, recipe_document
from bayeslr.units import format_flops, gpu_hours

MUTABLE = ("budget_flops", "budget_gpu_hours", "flops_per_second", "max_runs", "batch_runs",
           "workers", "early_ends", "repeats", "validate_target")  # fmt: skip
"""What a recipe may change between two starts of one sweep."""

_VERSIONED = ("bayeslr", "jax", "numpyro", "pymc", "numpy", "pandas", "optuna", "torch")


def sweep(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    storage: str | None = None,
    seed: int | None = None,
    strategy: str | None = None,
    retry: bool = False,
    progress: Progress = silent,
) -> SweepResult:
    """Run a sweep, or go on with the one in ``out``, to its end.

    Parameters
    ----------
    recipe
        A recipe, the path of one, or the name of one that is shipped.
    out
        Folder of the sweep; started again on the same folder it resumes.
    storage
        Any Optuna storage URL; by default a journal file in ``out``. A sweep that was started with
        one needs it again.
    seed, strategy
        Instead of the recipe's.
    retry
        Ask once more for runs that failed or were lost.

    Raises
    ------
    SpecError
        The recipe breaks a rule, or differs from the one that the sweep was started with.
    StorageError
        Another process runs this sweep, its study is kept in another storage, the storage does
        not answer, or the disk is full.
    DataError
        No run came to anything.
    """
    recipe = open_recipe(recipe)
    if seed is not None:
        recipe = dataclasses.replace(recipe, seed=seed)
    if strategy is not None:
        recipe = dataclasses.replace(recipe, strategy=strategy)
    from bayeslr.report import report

    if not isinstance(storage, str | None):
        raise SpecError(f"storage is the URL of an Optuna storage, as a text; got {storage!r:.80}")
    out = as_path(out)
    runner = find_runner(recipe)
    check_recipe(recipe, runner)
    _require_its_storage(out, recipe.name, storage)
    with disk_errors(out), _locked(out, recipe.name):
        study: Study = find_entry_point("bayeslr.studies", "optuna")(
            storage, recipe.name, out, recipe
        )
        try:
            _take_up(study, recipe, runner, retry)
            _write_resolved(recipe, out, storage)
            stop = Worker(
                study,
                runner,
                out / "runs",
                slots=recipe.workers,
                plan=Planner(study, runner, progress),
                progress=progress,
            ).run()
            progress(f"stopped: {stop.reason}")
            result = conclude(study, recipe, runner, out, stop, progress)
        finally:
            study.close()
        if recipe.validate_target:
            validation = train_target(result, runner, storage, progress, retry=retry)
            result = dataclasses.replace(result, validation=validation)
        lines = result.validation.lines() if result.validation else []
        progress("writing the report", transient=True)
        report(
            result.posterior,
            out / "report.html",
            targets=targets_of(recipe, runner),
            validation=lines,
            flops_per_second=recipe.flops_per_second,
        )
        if not result.posterior.trustworthy:
            progress(f"The last fit failed its checks. What helps: {advice(recipe, out)}")
        return result


def work(
    storage: str, name: str, out: str | Path, *, slots: int = 1, progress: Progress = silent
) -> Stop:
    """Join a sweep as one more worker, on any machine that reaches its storage.

    storage: an Optuna storage URL, or the folder of a sweep. name: study name, which is the
    recipe's. out: folder for the runs; the sweep's own where it is shared, so that a run that was
    lost goes on from its checkpoint.
    """
    out = Path(out)
    url, folder = split_storage(storage, out)
    with disk_errors(out):
        study: Study = find_entry_point("bayeslr.studies", "optuna")(url, name, folder, None)
        try:
            runner = find_runner(study.recipe())
            plan = Planner(study, runner, progress)
            worker = Worker(study, runner, out / "runs", slots=slots, plan=plan, progress=progress)
            return worker.run()
        finally:
            study.close()


def open_status(place: str, name: str | None = None) -> dict[str, Any]:
    """How a sweep stands. place: its folder, or a storage URL with the study's name."""
    url, folder = split_storage(place, Path())
    if name is None and url is None and (resolved := _read_resolved(folder)) is not None:
        name = resolved["recipe"]["sweep"]["name"]
    study: Study = find_entry_point("bayeslr.studies", "optuna")(url, name or "", folder, None)
    try:
        return status_of(study)
    finally:
        study.close()


def split_storage(storage: str, out: Path) -> tuple[str | None, Path]:
    """Storage URL (None: a journal file) and folder of a place: a URL, or a sweep's folder."""
    if "://" in storage:
        return storage, out
    folder = Path(storage)
    resolved = _read_resolved(folder)
    if resolved is not None and (url := resolved["storage"]) is not None:
        raise StorageError(_elsewhere(folder, url))
    return None, folder


def _require_its_storage(out: Path, name: str, storage: str | None) -> None:
    """Refuse to begin a study anew beside the one that the sweep in a folder has elsewhere: it
    would ask for all the runs again that the other has paid for.
    """
    before = _read_resolved(out)
    if before is None or before["recipe"]["sweep"]["name"] != name:
        return
    if before["storage"] != mask_password(storage):
        raise StorageError(
            f"{_elsewhere(out, before['storage'])}; if the study has moved since, delete "
            f"{out / 'resolved.json'}"
        )


def _elsewhere(folder: Path, url: str | None) -> str:
    """Where the sweep in a folder keeps its study, and what to give for that. None: a journal."""
    place = url or "that folder's journal"
    give = "give that URL (with its password) as the storage" if url else "give no storage"
    return f"the sweep in {folder} keeps its study in {place}: {give}"


def _read_resolved(folder: Path) -> dict[str, Any] | None:
    """What a sweep was asked for, as its folder has it; None if it does not say."""
    path = folder / "resolved.json"
    if not path.exists():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StorageError(
            f"{path} is not valid JSON ({error}); delete it, and repeat the command of the sweep "
            "(with its --storage, if it had one), which writes it anew"
        ) from error
    return document


def open_recipe(recipe: Recipe | str | Path) -> Recipe:
    """A recipe from its path or its shipped name; option values that begin with ./ or ../ are
    made absolute, beside the recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    path = find_recipe(recipe)
    loaded = load_recipe(path)
    return dataclasses.replace(
        loaded, options=resolve_paths(loaded.options, path.parent.absolute())
    )


def find_recipe(name: str | Path) -> Path:
    """Path of a recipe file, given as such or by the name of a shipped one."""
    path = as_path(name)
    if path.exists():
        return path
    shipped: dict[str, Path] = {}
    package = importlib.util.find_spec("bayeslr_runners")
    if package is not None and package.submodule_search_locations:
        home = Path(next(iter(package.submodule_search_locations)))
        for folder in (home / "_recipes", home.parent / "recipes"):
            shipped = {p.stem: p for p in sorted(folder.glob("*.toml"))} | shipped
    if str(name) not in shipped:
        raise SpecError(
            f"recipe {name} does not exist; give a path, or one of those shipped: "
            f"{', '.join(sorted(shipped)) or 'none (pip install bayeslr[runners])'}"
        )
    return shipped[str(name)]


def check_recipe(recipe: Recipe, runner: Runner) -> list[Target]:
    """Targets of a recipe, once it is certain that the sweep can begin. Raises: SpecError."""
    targets = targets_of(recipe, runner)
    weights_of(recipe)
    if recipe.validate_target:
        validation_runs(recipe, runner, targets[0], recipe.space.lr.low)
    cheapest = min(candidates(recipe, runner), key=lambda p: p.flops)
    if cheapest.flops > recipe.budget_flops:
        raise SpecError(
            f"recipe {recipe.name}: the budget of "
            f"{format_flops(recipe.budget_flops, recipe.flops_per_second)} is below the cheapest "
            f"run ({cheapest.spec.run_id}, "
            f"{format_flops(cheapest.flops, recipe.flops_per_second)})"
        )
    # What the runner refuses to train could not be mended once the study holds the recipe.
    runner.command(cheapest.spec, Path(cheapest.spec.run_id))
    return targets


def describe(recipe: Recipe) -> dict[str, Any]:
    """What a sweep would do: its cells and their cost, its first runs, its targets."""
    runner = find_runner(recipe)
    targets = check_recipe(recipe, runner)
    cells: dict[tuple[str, int, int], dict[str, Any]] = {}
    for priced in candidates(recipe, runner):
        spec = priced.spec
        key = cell_of(spec)
        cells.setdefault(
            key,
            {
                "shape": key[0],
                "n_active": spec.n_active,
                "n_total": spec.n_total,
                "tokens": spec.tokens,
                "batch_tokens": spec.batch_tokens,
                "decay_at": list(spec.decay_at),
                "flops_per_run": priced.flops,
                "num_lrs": 0,
            },
        )["num_lrs"] += 1
    start = first_runs(recipe, runner)
    rate = recipe.flops_per_second
    return {
        "name": recipe.name,
        "runner": recipe.runner,
        "budget_flops": recipe.budget_flops,
        "flops_per_second": rate,
        "budget_gpu_hours": rate and gpu_hours(recipe.budget_flops, rate),
        "lrs": list(recipe.space.lr.values()),
        "cells": list(cells.values()),
        "start": [{"run_id": p.spec.run_id, "lr": p.spec.lr, "flops": p.flops} for p in start],
        "start_flops": math.fsum(p.flops for p in start),
        "targets": [{**dataclasses.asdict(t), "flops": t.flops} for t in targets],
    }


def _take_up(study: Study, recipe: Recipe, runner: Runner, retry: bool) -> None:
    """Reconcile the recipe with the study's, and lift a stop that no longer holds."""
    stored, given = recipe_document(study.recipe()), recipe_document(recipe)
    changed = changes(stored, given)
    fixed = [c for c in changed if c.removeprefix("sweep.") not in MUTABLE]
    trials, mended = study.trials(), dict[str, RunSpec]()
    if came_to_nothing(trials) and any(c.startswith("options") for c in fixed):
        # What the trainer alone could refuse: it had to be tried first.
        fixed = [c for c in fixed if not c.startswith("options")]
        mended = {priced.spec.run_id: priced.spec for priced in candidates(recipe, runner)}
    if fixed:
        raise SpecError(
            f"study {recipe.name!r} was started with another recipe: {', '.join(fixed)} differ; "
            f"only {', '.join(MUTABLE)} may change. Give the sweep another name or folder"
        )
    reserved = math.fsum(t.flops for t in trials)
    if recipe.budget_flops < reserved * (1 - 1e-9) and not all(t.finished for t in trials):
        raise SpecError(
            f"the budget of {format_flops(recipe.budget_flops)} is below the {reserved:.10g} FLOPs "
            "that the runs of this sweep have spent or reserved, and some of them have not ended: "
            "give at least that"
        )
    if changed:
        study.set_recipe(recipe)
        study.set_note("stop", None)
    if (retry or mended) and ask_again(study, mended):
        study.set_note("stop", None)


def changes(before: Any, after: Any, path: str = "") -> list[str]:
    """Dotted names of what differs between two recipe documents."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = sorted({*before, *after})
        parts = [changes(before.get(n), after.get(n), f"{path}.{n}".strip(".")) for n in names]
        return [change for part in parts for change in part]
    return [] if _json(before) == _json(after) else [path]


@contextlib.contextmanager
def _locked(out: Path, name: str) -> Iterator[None]:
    """One sweep a folder; the kernel drops the lock with the process."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise StorageError(
                f"the sweep in {out} is in use by {owner}; wait for it, or join it with "
                f"`bayeslr worker --storage {out} --study {name}`"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a StorageError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise StorageError(
                f"cannot write in {out}: {error.strerror}; finished runs are safe. Mend that and "
                "repeat the same command, it resumes"
            ) from error
        raise


def _write_resolved(recipe: Recipe, out: Path, storage: str | None) -> None:
    versions = {}
    for package in _VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    document = {
        "recipe": recipe_document(recipe),
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_hash(),
        "storage": mask_password(storage),
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    # Read by `status` and workers at any moment, and what a full disk cuts short is not to be read.
    write_atomically(out / "resolved.json", f"{text}\n".encode())
    write_atomically(out / "recipe.toml", to_toml(recipe_document(recipe)).encode())


def to_toml(document: Mapping[str, Any]) -> str:
    """TOML of a recipe document: its tables, with nested values inline."""
    lines: list[str] = []
    for table, content in document.items():
        if isinstance(content, list):
            for item in content:
                lines += [f"[[{table}]]", *(f"{k} = {_toml(v)}" for k, v in item.items()), ""]
        else:
            lines += [f"[{table}]", *(f"{k} = {_toml(v)}" for k, v in content.items()), ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(v) for v in value)}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _git_hash() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed wheel."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def resolve_paths(value: Any, folder: Path) -> Any:
    """Option values with each text that begins with ./ or ../ made absolute beside ``folder``."""
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((folder / value).resolve())
    if isinstance(value, Mapping):
        return {k: resolve_paths(v, folder) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolve_paths(v, folder) for v in value]
    return value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
