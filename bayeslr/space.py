"""The runs that a recipe allows: their specs, their cost, and which to start with."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from bayeslr.designs import START_LRS, spread
from bayeslr.errors import SpecError
from bayeslr.runner_protocol import ContinuingRunner, HorizonRunner, Runner, Trial
from bayeslr.runs import RunTable
from bayeslr.specs import (
    LR_MULTIPLIER,
    WEIGHT_DECAY,
    Recipe,
    RunSpec,
    Target,
    covariate_columns,
)
from bayeslr.units import parse_quantity

_NOT_LONGER = ("diverged", "failed", "pruned")

_SAME = 0.005
"""A table's counts and LRs are the recipe's within this share: people write three figures."""

_WIDTHS = ("d_model", "n_layers", "n_experts", "top_k")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A run that could be paid for, and its FLOPs. ``repeat``: made before, with another seed.

    ``trunk`` is the same for candidates that would train one trunk: one of them at most is bought.
    """

    spec: RunSpec
    flops: float
    repeat: bool = False
    trunk: Hashable = None


def targets_of(recipe: Recipe, runner: Runner) -> list[Target]:
    """The recipe's targets; a ``shape`` gets its parameter counts from the runner."""
    targets = []
    for i, raw in enumerate(recipe.targets):
        document = dict(raw)
        shape = document.pop("shape", None)
        document.pop("weight", None)
        if shape is not None:
            document["n_active"], document["n_total"] = runner.counts(shape)
            document |= {k: shape[k] for k in ("n_experts", "top_k") if k in shape}
        for name in ("n_active", "n_total", "tokens", "batch_tokens"):
            if name in document:
                document[name] = parse_quantity(document[name], name=f"[[targets]] {name}")
        document.setdefault("target_id", f"target{i + 1}")
        document.setdefault("family", recipe.family)
        document.setdefault("seq_len", recipe.run.get("seq_len"))
        document.setdefault("param_convention", recipe.run.get("param_convention", "non_embedding"))
        try:
            targets.append(Target(**document))
        except TypeError as error:
            raise SpecError(f"recipe {recipe.name}, [[targets]] {i + 1}: {error}") from error
    return targets


def weights_of(recipe: Recipe) -> list[float]:
    """What each target's regret counts, ``weight`` in its table, 1 by default.

    Raises: SpecError for a weight that is no number above zero.
    """
    weights = [target.get("weight", 1.0) for target in recipe.targets]
    for i, weight in enumerate(weights, start=1):
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise SpecError(
                f"recipe {recipe.name}, [[targets]] {i}: weight must be a number > 0, got "
                f"{weight!r}"
            )
    return [float(weight) for weight in weights]


def run_spec(
    recipe: Recipe,
    runner: Runner,
    shape: Mapping[str, Any],
    *,
    lr: float,
    batch_tokens: int,
    decay_at: Sequence[int],
    prefix: str = "",
    covariates: Mapping[str, float] | None = None,
) -> RunSpec:
    """Spec of one run of the sweep; its id says what it is, and is the same on every machine.

    covariates: values other than the recipe's own, by column of the run table.
    """
    n_active, n_total = runner.counts(shape)
    seed = int(recipe.run.get("seed", 0))
    label = f"{prefix or recipe.name}-{shape['name']}-t{max(decay_at)}-b{batch_tokens}"
    run, options = dict(recipe.run), dict(recipe.options)
    for name, value in (covariates or {}).items():
        group = name.removeprefix(LR_MULTIPLIER)
        label += f"-{group}{value:.4g}"
        if name == "weight_decay":
            run[name] = value
        else:
            options["lr_multipliers"] = {**options.get("lr_multipliers", {}), group: value}
    try:
        return RunSpec(
            **run,
            run_id=re.sub(r"[^\w.+-]", "_", f"{label}-lr{lr:.5g}-s{seed}"),
            family=recipe.family,
            runner=recipe.runner,
            lr=lr,
            tokens=max(decay_at),
            batch_tokens=batch_tokens,
            n_active=n_active,
            n_total=n_total,
            decay_at=tuple(decay_at),
            shape=shape,
            options=options,
        )
    except TypeError as error:
        raise SpecError(f"recipe {recipe.name}, [run]: {error}") from error


def covariates_tried(recipe: Recipe) -> list[dict[str, float]]:
    """What a run of the space may change beside its LR: nothing, or one covariate, by column."""
    own = own_covariates(recipe)
    return [{}] + [
        {name: float(value)}
        for name, values in recipe.space.covariates.items()
        for value in dict.fromkeys(values)
        if float(value) != own[name]
    ]


def own_covariates(recipe: Recipe) -> dict[str, float]:
    """The recipe's own value of each covariate that its space tries, by column."""
    own = covariate_columns(
        recipe.run.get("weight_decay", WEIGHT_DECAY), recipe.options.get("lr_multipliers", {})
    )
    return {name: float(own.get(name, 1.0)) for name in recipe.space.covariates}


def candidates(recipe: Recipe, runner: Runner, trials: Iterable[Trial] = ()) -> list[Candidate]:
    """Every run of the space that the trials have not measured yet, in a fixed order.

    Under WSD a run to one horizon measures the shorter horizons on its way, so a candidate decays
    at every token count up to its own that its (shape, batch, LR) still lacks; not so where the
    runner's LR or betas depend on the horizon. Where the runner can go on from the trunk that an
    earlier run of that line and seed left, the candidate does.
    """
    measured: dict[Hashable, set[int]] = {}
    trunks: dict[Hashable, Trial] = {}
    for trial in trials:
        if trial.void:
            continue
        spec = trial.spec
        key = line_of(spec)
        measured.setdefault(key, set()).update(_closed(trial, recipe, runner))
        same_seed = spec.seed == recipe.run.get("seed", 0)
        if trial.state == "ok" and same_seed and isinstance(runner, ContinuingRunner):
            trunks[key] = max(trunks.get(key, trial), trial, key=lambda t: t.trunk_tokens or 0)
    priced = []
    horizons = sorted(recipe.space.tokens)
    for shape, batch_tokens, changed, lr in product(
        recipe.space.shapes,
        recipe.space.batch_tokens,
        covariates_tried(recipe),
        recipe.space.lr.values(),
    ):
        one: dict[str, Any] = {"lr": lr, "batch_tokens": batch_tokens, "covariates": changed}
        longest = run_spec(recipe, runner, shape, decay_at=horizons[-1:], **one)
        line, branches = line_of(longest), shares_trunk(runner, longest)
        known = measured.get(line, set())
        for end in horizons:
            if end in known:
                continue
            decay_at = [t for t in horizons if t <= end and t not in known] if branches else [end]
            spec = run_spec(recipe, runner, shape, decay_at=decay_at, **one)
            if line in trunks:
                spec = _continued(spec, trunks[line])
            priced.append(_priced(runner, spec, branches=branches))
    return priced


def _closed(trial: Trial, recipe: Recipe, runner: Runner) -> Sequence[int]:
    """Horizons at which a trial's line needs no other run.

    A run that broke or blew up would do so again further on: same seed, same steps, unless each
    horizon has its own LR. One that was stopped early told enough. Without a trunk in common a
    shorter run decays sooner, and may end well where a longer one blew up or was stopped.
    """
    spec, horizons = trial.spec, recipe.space.tokens
    if trial.state not in _NOT_LONGER or _depends_on_horizon(runner, spec):
        return spec.decay_at
    if trial.state == "failed" or shares_trunk(runner, spec):
        return horizons
    return [tokens for tokens in horizons if tokens >= spec.tokens]


def _continued(spec: RunSpec, earlier: Trial) -> RunSpec:
    """The rest of a run, from where an earlier one left its trunk; all of it where none helps."""
    kept = earlier.trunk_tokens
    if kept is None or spec.schedule != "wsd":
        return spec
    later = tuple(t for t in spec.decay_at if kept <= (1 - spec.decay_fraction) * t)
    if spec.tokens not in later:
        return spec
    return replace(spec, decay_at=later, continues=earlier.spec.run_id, continues_at=kept)


def repeats(recipe: Recipe, runner: Runner, trials: Iterable[Trial]) -> list[Candidate]:
    """Every (shape, batch, LR) that was measured, once more with the next seed, in a fixed order.

    A repeat goes as far as the longest run that ended well, and decays where that one did.
    """
    asked = [trial for trial in trials if not trial.void]
    good = sorted((t.spec for t in asked if t.state == "ok"), key=lambda spec: spec.tokens)
    done = {line_of(spec): spec for spec in good}
    last = {line: max(t.spec.seed for t in asked if line_of(t.spec) == line) for line in done}
    shapes = {shape["name"]: shape for shape in recipe.space.shapes}
    priced = []
    for line, seed in sorted(last.items()):
        shape = shapes[str(done[line].shape["name"])]
        spec = run_spec(
            replace(recipe, run={**recipe.run, "seed": seed + 1}), runner, shape,
            lr=done[line].lr, batch_tokens=done[line].batch_tokens, decay_at=done[line].decay_at,
            covariates=_changed(recipe, done[line]),
        )  # fmt: skip
        branches = shares_trunk(runner, spec)
        priced.append(_priced(runner, spec, branches=branches, repeat=True))
    return priced


def trials_in(table: RunTable, recipe: Recipe, runner: Runner) -> list[Trial]:
    """The ended runs of a table that lie in the recipe's space, as the trials of a sweep.

    A run that told nothing (lost, or not at a horizon yet) is none. Sizes, batch, LR and covariates
    are compared within what people round away, token counts within a batch; a seed or a covariate
    that is not stated is the recipe's.
    """
    frame = table.frame
    frame = frame[(frame["family"] == recipe.family) & frame["status"].isin(["ok", *_NOT_LONGER])]
    by_run: dict[str, list[dict[str, Any]]] = {}
    for raw in frame.to_dict("records"):
        by_run.setdefault(str(raw["run_id"]), []).append({str(k): v for k, v in raw.items()})
    space, lrs = recipe.space, np.array(recipe.space.lr.values())
    sizes = [(shape, runner.counts(shape)) for shape in space.shapes]
    trials: list[Trial] = []
    for run_id, rows in by_run.items():
        first = rows[0]
        shape = next((s for s, counts in sizes if _is_of_shape(first, s, counts)), None)
        batch_tokens = next((b for b in space.batch_tokens if _same(first["batch_tokens"], b)), 0)
        lr = float(lrs[np.argmin(np.abs(np.log(lrs / first["lr"])))])
        changed = _changed_in(first, recipe)
        if shape is None or not batch_tokens or not _same(first["lr"], lr) or changed is None:
            continue
        measured = [row["tokens"] for row in rows if row["status"] == "ok"]
        found = {_horizon_of(tokens, space.tokens, batch_tokens) for tokens in measured}
        decay_at = [tokens for tokens in space.tokens if tokens in found]
        # One that failed may have been made again: what it measured in the end outweighs that.
        reached = max(measured, default=0.0)
        ends = [r["status"] for r in rows
                if r["status"] != "ok" and not reached >= r["planned_tokens"]]  # fmt: skip
        if not decay_at and not ends:
            continue
        if not decay_at:
            planned = _horizon_of(first["planned_tokens"], space.tokens, batch_tokens)
            decay_at = [planned or max(space.tokens)]
        seed = recipe.run.get("seed", 0) if math.isnan(first["seed"]) else int(first["seed"])
        spec = run_spec(
            replace(recipe, run={**recipe.run, "seed": seed}), runner, shape,
            lr=lr, batch_tokens=batch_tokens, decay_at=decay_at, covariates=changed,
        )  # fmt: skip
        trials.append(Trial(
            number=len(trials), spec=replace(spec, run_id=run_id),
            state=ends[-1] if ends else "ok", flops=max(row["flops"] for row in rows), records=rows,
        ))  # fmt: skip
    return trials


def _changed_in(row: Mapping[str, Any], recipe: Recipe) -> dict[str, float] | None:
    """What of `covariates_tried` a row of a run table changes; None if it is none of the space's.

    Only covariates that the space tries are looked at.
    """
    own = own_covariates(recipe)
    has = {name: own[name] if math.isnan(row[name]) else row[name] for name in own}
    return next(
        (
            changed
            for changed in covariates_tried(recipe)
            if all(_same(has[name], changed.get(name, own[name])) for name in own)
        ),
        None,
    )


def _is_of_shape(row: Mapping[str, Any], shape: Mapping[str, Any], counts: tuple[int, int]) -> bool:
    stated = [("n_active", counts[0]), ("n_total", counts[1])]
    stated += [(k, shape[k]) for k in _WIDTHS if k in shape and not math.isnan(row[k])]
    return all(_same(row[name], value) for name, value in stated)


def _horizon_of(tokens: float, horizons: Sequence[int], batch_tokens: int) -> int | None:
    """The horizon that a run to so many tokens measured; None if it is none of these."""
    near = min(horizons, key=lambda horizon: abs(horizon - tokens))
    return near if abs(near - tokens) <= max(batch_tokens, _SAME * near) else None


def _same(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=_SAME)


def _priced(runner: Runner, spec: RunSpec, *, branches: bool, repeat: bool = False) -> Candidate:
    trunk = (*line_of(spec), spec.seed) if branches else None
    return Candidate(spec=spec, flops=runner.flops(spec), repeat=repeat, trunk=trunk)


def shares_trunk(runner: Runner, spec: RunSpec) -> bool:
    """Whether a run to a longer horizon passes this one's on its way."""
    if spec.schedule != "wsd":
        return False
    return not _depends_on_horizon(runner, spec)


def _depends_on_horizon(runner: Runner, spec: RunSpec) -> bool:
    return isinstance(runner, HorizonRunner) and runner.depends_on_horizon(spec)


def start_design(recipe: Recipe, runner: Runner) -> list[Candidate]:
    """The first runs: the cheapest cells, a few LRs spread over the whole range in each.

    A function of the recipe alone, so that every worker and every restart finds the same runs.
    Where horizons share a trunk, the cells of one shape and batch are one run to the longest.
    """
    cells: dict[tuple[str, int, int], list[Candidate]] = {}
    for priced in grid(recipe, runner):
        cells.setdefault(cell_of(priced.spec), []).append(priced)
    cheapest = sorted(cells.values(), key=lambda cell: (cell[0].flops, cell[0].spec.run_id))
    num_cells = min(len(cheapest), max(1, recipe.start_runs // START_LRS))
    shares = [recipe.start_runs // num_cells] * num_cells
    for i in range(recipe.start_runs % num_cells):
        shares[i] += 1
    design: list[Candidate] = []
    for number, (cell, share) in enumerate(zip(cheapest, shares, strict=False)):
        by_lr = sorted(cell, key=lambda p: p.spec.lr)
        design.extend(by_lr[i] for i in spread(len(by_lr), share, _rng(recipe.seed, number)))
    return design


def random_design(
    recipe: Recipe, pool: Sequence[Candidate], *, num_runs: int, budget_flops: float, first: int
) -> list[Candidate]:
    """Runs drawn at random from those that fit the budget. first: number of the first draw."""
    left = list(pool)
    drawn: list[Candidate] = []
    for number in range(first, first + num_runs):
        left = [p for p in left if p.flops <= budget_flops]
        if not left:
            break
        choice = left[int(_rng(recipe.seed, number).integers(len(left)))]
        drawn.append(choice)
        budget_flops -= choice.flops
        left = [p for p in left if line_of(p.spec) != line_of(choice.spec)]
    return drawn


def grid(recipe: Recipe, runner: Runner) -> list[Candidate]:
    """Runs of the space at the recipe's own covariates that no other one measures on its way:
    where horizons share a trunk, the longest.
    """
    space = replace(recipe.space, weight_decay=(), lr_multipliers={})
    pool = candidates(replace(recipe, space=space), runner)
    return [
        priced for priced in pool if priced.trunk is None or priced.spec.tokens == max(space.tokens)
    ]


def cell_of(spec: RunSpec) -> tuple[str, int, int]:
    """Runs that differ in LR alone: shape, tokens, batch."""
    return (str(spec.shape["name"]), spec.tokens, spec.batch_tokens)


def line_of(spec: RunSpec) -> tuple[Any, ...]:
    """Runs that share a trunk: one batch never holds two of them."""
    covariates = tuple(sorted(spec.covariates.items()))
    return (str(spec.shape["name"]), spec.batch_tokens, float(f"{spec.lr:.5g}"), covariates)


def _changed(recipe: Recipe, spec: RunSpec) -> dict[str, float]:
    """What of `covariates_tried` a run of the space changes."""
    own = spec.covariates
    for changed in covariates_tried(recipe)[1:]:
        if changed.items() <= own.items():
            return changed
    return {}


def _rng(seed: int, number: int) -> np.random.Generator:
    """Random numbers keyed by (seed, number): no state that a restart could lose or repeat."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, number]))
