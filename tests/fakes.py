"""Stand-ins for inference: a 'posterior' that is the best run so far, in milliseconds.

``python tests/fakes.py sweep RECIPE OUT [STORAGE]`` and ``... worker STORAGE NAME OUT`` run the
real loop in a process of its own, with only the inference replaced.
"""

from __future__ import annotations

import copy
import importlib.machinery
import json
import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class FakePosterior:
    best_lr: float
    num_rows: int
    trustworthy: bool = True
    max_r_hat: float = 1.0
    seconds: float = 1.0
    checks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> dict[str, Any]:
        diagnostics = {"max_r_hat": self.max_r_hat, "seconds": self.seconds}
        return {"verdict": "so so", "diagnostics": diagnostics, **self.checks}

    def save(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        (path / "fit.json").write_text(json.dumps({"best_lr": self.best_lr}))


@dataclass(frozen=True)
class Proposal:
    spec: Any
    flops: float
    reason: str
    finishing: Any = None


@dataclass(frozen=True)
class Plan:
    proposals: tuple[Proposal, ...]
    stop_reason: str = "nothing pays"


def fit(runs: Any, prior: str = "moe-default", *, seed: int = 1, **_: Any) -> FakePosterior:
    ok = runs.frame[runs.frame["status"] == "ok"]
    excess = ok["loss"] - ok.groupby(["n_active", "tokens"])["loss"].transform("min")
    weight = (-excess / 0.02).map(math.exp)
    return FakePosterior(math.exp((ok["lr"].map(math.log) * weight).sum() / weight.sum()), len(ok))


def refit(runs: Any, prior: str, *, seed: int) -> FakePosterior:
    """By whatever stands in for ``fit``."""
    found: FakePosterior = sys.modules["bayeslr.sampling"].fit(runs, prior, seed=seed, fast=True)
    return found


def predict(posterior: FakePosterior, targets: Sequence[Any]) -> pd.DataFrame:
    lr = posterior.best_lr
    factors = {"lr": 1, "lr_q05": 0.3, "lr_q25": 0.6, "lr_q50": 1, "lr_q75": 1.6, "lr_q95": 3}
    rows = [
        {"target_id": t.target_id, **{k: lr * f for k, f in factors.items()}}
        | {"regret_mean": 0.01, "regret_q95": 0.02, "p_diverge": 0.0, "extrapolation": 1.0}
        | {"sentence": f"Train {t.target_id} with a peak LR of {lr:.3g}."}
        for t in targets
    ]
    return pd.DataFrame(rows)


def covariate_table(posterior: FakePosterior, targets: Sequence[Any]) -> pd.DataFrame:
    return pd.DataFrame({"sentence": []})


def choose(
    posterior: FakePosterior,
    candidates: Sequence[Any],
    targets: Sequence[Any],
    *,
    num_runs: int,
    budget_flops: float,
    seed: int,
    only_paying: bool = True,
    weights: Sequence[float] | None = None,
    price_ends: bool = False,
) -> Plan:
    """Nearest to the best LR first: depends on every loss so far, so a resumed sweep must agree."""

    def rank(c: Any) -> tuple[float, str]:
        return abs(math.log(c.spec.lr / posterior.best_lr)), c.spec.run_id

    chosen: list[Proposal] = []
    lines: set[tuple[Any, ...]] = set()
    for c in sorted(candidates, key=rank):
        line = (c.spec.shape["name"], c.spec.batch_tokens, c.spec.lr)
        if line not in lines and c.flops <= budget_flops and len(chosen) < num_runs:
            lines.add(line)
            budget_flops -= c.flops
            chosen.append(Proposal(c.spec, c.flops, f"nearest of {posterior.num_rows} rows"))
    return Plan(tuple(chosen))


def report(posterior: FakePosterior, path: Path, *, validation: Any = (), **_: Any) -> None:
    path.write_text("\n".join(["<html>", *validation]))


def with_verdicts(
    posterior: FakePosterior, *, holdout: bool, why_not: str, seed: int
) -> FakePosterior:
    checks = {"holdout": {"sentence": "It held."}} if holdout else {"no_holdout": why_not}
    return replace(posterior, checks=checks)


def verdict_lines(info: Mapping[str, Any]) -> list[str]:
    return [info["holdout"]["sentence"]] if "holdout" in info else [info["no_holdout"]]


def modules() -> dict[str, types.ModuleType]:
    """Modules by name, as `sys.modules` would hold them."""
    contents: dict[str, dict[str, Any]] = {
        "bayeslr.sampling": {"fit": fit, "refit": refit},
        "bayeslr.predict": {"predict": predict},
        "bayeslr.acquire": {"choose": choose},
        "bayeslr.covariates": {"covariate_table": covariate_table},
        "bayeslr.posterior": {"Posterior": FakePosterior},
        "bayeslr.report": {"report": report},
        "bayeslr.verdicts": {"with_verdicts": with_verdicts, "verdict_lines": verdict_lines},
    }
    made = {}
    for name, content in contents.items():
        made[name] = types.ModuleType(name)
        made[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        made[name].__dict__.update(content)
    return made


TOY_ARGV = ["{python}", "-m", "bayeslr_runners.toy", "{spec}", "{records}", "{dir}"]


def changed(document: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with ``table__key`` values changed; a value of None takes the key away."""
    document = copy.deepcopy(document)
    for path, value in changes.items():
        *tables, name = path.split("__")
        table = document
        for key in tables:
            table = table[key]
        if value is None:
            del table[name]
        else:
            table[name] = value
    return document


def toy_recipe(**changes: Any) -> dict[str, Any]:
    """Recipe document of a small sweep of the toy trainer; ``sweep__seed=3`` changes one value."""
    document: dict[str, Any] = {
        "sweep": {
            "name": "toy",
            "runner": "command",
            "family": "toy",
            "budget_flops": 6e12,
            "start_runs": 6,
            # When a run is stopped depends on when its losses are read: tests compare whole runs.
            "early_ends": False,
        },
        "space": {
            "tokens": [200_000, 400_000],
            "batch_tokens": [4096],
            "shapes": [
                {"name": "small", "n_active": 100_000, "n_total": 200_000},
                {"name": "medium", "n_active": 300_000, "n_total": 600_000},
            ],
            "lr": {"low": 1e-3, "high": 6.4e-2},
        },
        "targets": [
            {
                "target_id": "big",
                "tokens": "1M",
                "batch_tokens": 4096,
                "shape": {"name": "large", "n_active": 1_000_000, "n_total": 2_000_000},
            }
        ],
        "run": {"seq_len": 64},
        "options": {"argv": TOY_ARGV, "seconds": 0.0},
    }
    return changed(document, changes)


def write_recipe(path: Path, document: dict[str, Any]) -> Path:
    """The document as a recipe file."""
    from bayeslr.loop import to_toml

    path.write_text(to_toml(document), encoding="utf-8")
    return path


def finished_runs(out: Path, name: str = "toy", storage: str | None = None) -> dict[str, Any]:
    """Loss by horizon of every ended run of a sweep, by run_id."""
    from bayeslr_runners.study import open_study

    study = open_study(storage, name, out, None)
    trials = [t for t in study.trials() if t.finished and not t.void]
    study.close()
    ids = [t.spec.run_id for t in trials]
    assert len(set(ids)) == len(ids), "a run was made twice"
    return {
        t.spec.run_id: (t.state, {r["tokens"]: r["loss"] for r in t.records if r["status"] == "ok"})
        for t in trials
    }


def main(verb: str, *words: str) -> None:
    sys.modules.update(modules())
    from bayeslr.errors import BayeslrError
    from bayeslr.loop import sweep, work

    def lines(line: str, *, transient: bool = False) -> None:
        if not transient:
            print(line, file=sys.stderr, flush=True)

    try:
        if verb == "sweep":
            recipe, out, *storage = words
            sweep(recipe, out, storage=storage[0] if storage else None, progress=lines)
        else:
            storage_url, name, out = words
            work(storage_url, name, out, progress=lines)
    except BayeslrError as error:
        sys.exit(f"bayeslr: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
