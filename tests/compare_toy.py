"""A toy world with two parametrisations, and a comparison in it without inference.

``python tests/compare_toy.py train SPEC RECORDS DIR`` trains a run of the world: under ``mup`` the
best LR is that of the base shape at every size, LR multipliers have an optimum of their own, and
the floor lies ``mup_gap`` nats higher. ``python tests/compare_toy.py compare RECIPE OUT`` compares
with the real driving of runs and inference replaced by `tests.fakes`.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslr_runners import toy

if TYPE_CHECKING:  # a run of the toy world must start in no time
    import pandas as pd

BASE_PARAMS = 100_000
BEST_MULTIPLIERS = {"embedding": 2.0, "head": 0.5}
MULTIPLIER_COST = 0.05


def train(spec_path: str, records_path: str, folder: str) -> None:
    """One run: the toy's, in this world."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    options = spec["options"]
    law, loss_of = toy.best_lr, toy.loss_of
    extra = 0.0
    if spec["parametrization"] == "mup":
        toy.best_lr = lambda n, tokens, batch: law(BASE_PARAMS, tokens, batch)
        given = options.get("lr_multipliers", {})
        extra = options.get("mup_gap", 0.0) + MULTIPLIER_COST * sum(
            math.log(given.get(group, 1.0) / best) ** 2 for group, best in BEST_MULTIPLIERS.items()
        )

    def loss(spec: dict[str, Any], tokens: float) -> float | None:
        found = loss_of(spec, tokens)
        return None if found is None else found + extra

    toy.loss_of = loss
    toy.main(spec_path, records_path, folder)


ARGV = ["{python}", str(Path(__file__)), "train", "{spec}", "{records}", "{dir}"]


def toy_comparison(**changes: Any) -> dict[str, Any]:
    """Recipe document of a comparison that takes seconds; ``compare__num_seeds=3`` changes one."""
    lr = {"low": 4e-3, "high": 3.2e-2, "per_octave": 1}
    document: dict[str, Any] = {
        "compare": {
            "name": "toy", "runner": "command", "proxy_flops": 2.2e12, "workers": 2, "num_seeds": 2,
        },
        "fitting": {
            "start_runs": 6, "batch_runs": 4,
            "space": {
                "tokens": [200_000, 400_000], "batch_tokens": [4096], "lr": lr,
                "shapes": [
                    {"name": "small", "n_active": 100_000, "n_total": 200_000},
                    {"name": "medium", "n_active": 300_000, "n_total": 600_000},
                ],
            },
        },
        "transfer": {
            "parametrization": "mup", "tokens": 400_000, "batch_tokens": 4096, "lr": lr,
            "base_shape": {"name": "base", "n_active": 100_000, "n_total": 200_000},
            "rungs": [{"name": "rung", "n_active": 200_000, "n_total": 400_000}],
            "modules": {"groups": ["embedding", "head"]},
        },
        "targets": [
            {
                "target_id": "big", "tokens": 400_000, "batch_tokens": 4096,
                "shape": {"n_active": 1_000_000, "n_total": 2_000_000},
            }
        ],
        "run": {"seq_len": 64},
        "options": {"argv": ARGV, "noise": 1e-3, "mup_gap": 0.0},
    }  # fmt: skip
    from tests import fakes

    return fakes.changed(document, changes)


@dataclass(frozen=True)
class FakeBlend:
    weights: dict[str, float]
    scores: dict[str, float]
    sentence: str
    posteriors: dict[str, Any]
    alone: dict[str, pd.DataFrame]
    predictions: pd.DataFrame


def blend(runs: Any, targets: Sequence[Any], *, cards: Sequence[str], seed: int) -> FakeBlend:
    from tests import fakes

    posterior = fakes.fit(runs)
    table = fakes.predict(posterior, targets)
    return FakeBlend(
        weights=dict.fromkeys(cards, 0.5), scores=dict.fromkeys(cards, -1.0), sentence="Even.",
        posteriors=dict.fromkeys(cards, posterior), alone=dict.fromkeys(cards, table),
        predictions=table,
    )  # fmt: skip


def stand_ins() -> dict[tuple[str, str], Any]:
    """Replacements by (module, attribute): inference, and the planner's report of a fake fit."""
    from tests import fakes

    return {
        ("bayeslr.sampling", "fit"): fakes.fit,
        ("bayeslr.predict", "predict"): fakes.predict,
        ("bayeslr.covariates", "covariate_table"): fakes.covariate_table,
        ("bayeslr.acquire", "choose"): fakes.choose,
        ("bayeslr.report", "report"): fakes.report,
        ("bayeslr.verdicts", "with_verdicts"): fakes.with_verdicts,
        ("bayeslr.verdicts", "verdict_lines"): fakes.verdict_lines,
        ("bayeslr.blend", "blend"): blend,
    }


def main(verb: str, *words: str) -> None:
    """Train a run, or compare."""
    if verb == "train":
        train(*words)
        return
    for (module, name), stand_in in stand_ins().items():
        setattr(importlib.import_module(module), name, stand_in)
    from bayeslr.compare import compare, load_compare_recipe

    recipe, out = words
    compare(load_compare_recipe(recipe), out, progress=lambda line, transient=False: None)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "runners")]
    main(*sys.argv[1:])
