"""bayeslr in any Optuna study: a sampler that chooses by the scaling law, a pruner by the valley.

    sampler = ScalingLawSampler(targets=[{"n_active": 1.3e9, "n_total": 12e9, "tokens": 5e11,
                                          "batch_tokens": 4e6}],
                                describe=lambda params: {"n_active": ..., "n_total": ...,
                                                         "tokens": ..., "batch_tokens": ...})
    study = optuna.create_study(sampler=sampler, pruner=ValleyPruner(), storage=...)
    study.optimize(objective, n_trials=20)      # objective suggests "lr" and returns the loss
    sampler.predict(study)

What a run is (`ATTRIBUTES`) comes, the first that has it, from the trial's user attributes (set by
the objective, ``trial.set_user_attr("n_active", ...)``), from ``describe(params)``, from parameters
of the same name. Runs that are proposed have no user attributes yet: for them the last two count,
then the attributes that all trials so far agree on.

The state is the study alone, and random numbers are keyed by (seed, trial number): a study that is
resumed, by any process, goes on as if it had never stopped. Inference runs in a child process, so
that neither JAX nor PyMC is loaded where the trials are trained.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec
from bayeslr.units import train_flops

ATTRIBUTES = ("n_active", "n_total", "tokens", "batch_tokens")
"""What must be known of every run: parameters and tokens."""

OPTIONAL = ("family", "seq_len", "param_convention", "optimizer", "schedule", "parametrization",
            "d_model", "n_layers", "n_experts", "top_k", "loss_se", "status")  # fmt: skip

_ASSUMED = {"family": "study", "param_convention": "non_embedding"}
_MAX_CANDIDATES = 5000
_LEVELS = 5  # of a numeric parameter other than the LR
_STATES = (TrialState.COMPLETE, TrialState.PRUNED)

Describe = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class _Child:
    """The child process that fits and chooses; started on first use, ended with this one."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Reply of the child. Raises: SpecError with its message."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    stderr=subprocess.DEVNULL,
                )  # fmt: skip
            stdin, stdout = self._process.stdin, self._process.stdout
            assert stdin is not None
            assert stdout is not None
            try:
                stdin.write(json.dumps(request) + "\n")
                stdin.flush()
                line = stdout.readline()
            except BrokenPipeError:
                line = ""
        if not line:
            raise SpecError(
                f"the inference process ended ({' '.join(self._command)}); run that command to "
                "see why"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise SpecError(str(reply["error"]))
        return reply

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            self._process.wait(timeout=30)
            self._process = None


@final
class ScalingLawSampler(BaseSampler):  # type: ignore[misc]
    """Proposes the LR and scale whose loss tells most about the targets' best LR, per FLOP.

    targets: mappings with the `ATTRIBUTES`. describe: attributes of a run from its parameters.
    num_startup_trials: random ones before the first fit. lr_per_octave: LRs tried a factor of two.
    tables: run tables of earlier work (``bayeslr import optuna old.db -o old.parquet``) to start
    from. lr: name of the parameter that is the peak LR. Where inference is impossible (no
    finished run, a broken table) a trial is random and the log says why.
    """

    def __init__(
        self,
        *,
        targets: Sequence[Mapping[str, Any]],
        describe: Describe | None = None,
        prior: str = "moe-default",
        seed: int = 1,
        lr: str = "lr",
        num_startup_trials: int = 5,
        lr_per_octave: int = 2,
        tables: Sequence[str | Path] = (),
        command: Sequence[str] = (sys.executable, "-m", "bayeslr.serve"),
    ) -> None:
        if not targets:
            raise SpecError("targets must name at least one run to plan, got none")
        for name in ATTRIBUTES:
            for i, target in enumerate(targets):
                if name not in target:
                    raise SpecError(f"targets[{i}] lacks {name}; needed: {', '.join(ATTRIBUTES)}")
        self._targets = [{"target_id": f"target{i + 1}", **t} for i, t in enumerate(targets)]
        self._describe = describe
        self._prior, self._seed, self._lr = prior, seed, lr
        self._num_startup = num_startup_trials
        self._per_octave = lr_per_octave
        self._tables = [str(path) for path in tables]
        self._child = _Child(command)
        self._space = IntersectionSearchSpace()

    def __reduce__(self) -> Any:
        raise TypeError("a ScalingLawSampler holds a process; make one in each worker instead")

    def close(self) -> None:
        """End the inference process."""
        self._child.close()

    def reseed_rng(self) -> None:
        """Nothing to do: random numbers are keyed by (seed, trial number)."""

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Parameters that all trials so far share, without fixed ones."""
        space = self._space.calculate(study)
        return {name: d for name, d in sorted(space.items()) if not d.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Parameters of the run that tells most; empty (random) before there is anything to fit."""
        if self._lr not in search_space:
            return {}
        trials = study.get_trials(deepcopy=False)
        finished = [t for t in trials if t.state in _STATES]
        if len(finished) < self._num_startup and not self._tables:
            return {}
        try:
            return self._choose(study, trial, search_space, trials)
        except SpecError as error:
            optuna.logging.get_logger(__name__).warning(f"trial {trial.number} is random: {error}")
            return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:  # fmt: skip
        """A random value, the same for the same (seed, trial number, parameter)."""
        rng = self._rng(trial.number, param_name)
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[int(rng.integers(len(param_distribution.choices)))]
        levels = _levels(param_distribution, 257)
        return levels[int(rng.integers(len(levels)))]

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState,
        values: Sequence[float] | None,
    ) -> None:  # fmt: skip
        """Write what a run was taken for into its user attributes, for whoever reads the study
        without ``describe`` (``bayeslr import optuna``).
        """
        if self._lr not in trial.params:
            return
        for name, value in (_ASSUMED | self._known(trial.params)).items():
            if name not in trial.user_attrs and name not in trial.params:
                study._storage.set_trial_user_attr(trial._trial_id, name, value)

    def predict(self, study: optuna.Study) -> list[dict[str, Any]]:
        """Predictions table of the targets from the study's runs. Raises: SpecError."""
        trials = study.get_trials(deepcopy=False)
        reply = self._child.ask({"op": "predict", **self._request(trials)})
        found: list[dict[str, Any]] = reply["predictions"]
        return found

    # --------------------------------------------------------------------------- inside

    def _rng(self, number: int, name: str = "") -> np.random.Generator:
        counter = [0, 0, zlib.crc32(name.encode()), number]
        return np.random.Generator(np.random.Philox(key=self._seed, counter=counter))

    def _choose(self, study: optuna.Study, trial: FrozenTrial,
                space: Mapping[str, BaseDistribution],
                trials: Sequence[FrozenTrial]) -> dict[str, Any]:  # fmt: skip
        made = {self._key(t.params, space) for t in trials if t.state != TrialState.FAIL}
        options = [p for p in self._grid(space, trial.number) if self._key(p, space) not in made]
        if not options:
            raise SpecError("every run of the space has been made; widen it")
        agreed = _agreed(trials)
        specs = [self._spec(params, {**agreed, **self._known(params)}) for params in options]
        # Runs that others are making now: what they will tell is expected, not told twice.
        waiting = sum(t.state == TrialState.RUNNING and t.number < trial.number for t in trials)
        reply = self._child.ask(
            {
                "op": "choose", **self._request(trials),
                "candidates": specs,
                "flops": [train_flops(s["n_active"], s["tokens"]) for s in specs],
                "num_runs": waiting + 1,
                "choice_seed": int(self._rng(trial.number).integers(2**31)),
            }
        )  # fmt: skip
        if not reply["chosen"]:
            raise SpecError("no run of the space would tell anything about the targets")
        reason = str(reply["reasons"][-1])
        study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
        return dict(options[reply["chosen"][-1]])

    def _request(self, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        agreed = _agreed(trials)
        rows = [self._row(t, agreed) for t in trials if t.state in _STATES]
        family = next((r["family"] for r in rows if r is not None), "study")
        return {
            "runs": [row for row in rows if row is not None],
            "tables": self._tables,
            "prior": self._prior,
            "seed": self._seed,
            "targets": [{"family": family, **target} for target in self._targets],
        }

    def _known(self, params: Mapping[str, Any]) -> dict[str, Any]:
        known = {k: params[k] for k in (*ATTRIBUTES, *OPTIONAL) if k in params}
        return known | dict(self._describe(params) if self._describe is not None else {})

    def _row(self, trial: FrozenTrial, agreed: Mapping[str, Any]) -> dict[str, Any] | None:
        """Row of the run table; None for a pruned trial that did not diverge."""
        own = {k: v for k, v in trial.user_attrs.items() if k in (*ATTRIBUTES, *OPTIONAL)}
        known = {**agreed, **self._known(trial.params), **own}
        self._require(known, f"trial {trial.number}")
        step = trial.last_step
        last = None if step is None else trial.intermediate_values[step]
        status = known.pop("status", None)
        if trial.state == TrialState.PRUNED:
            if status != "diverged" and (last is None or math.isfinite(last)):
                return None
            status = "diverged"
        return {
            **_ASSUMED,
            **known,
            "run_id": f"trial-{trial.number}",
            "planned_tokens": known["tokens"],
            "lr": trial.params[self._lr],
            "loss": trial.value if trial.state == TrialState.COMPLETE else None,
            "status": status or "ok",
            "source": "optuna",
        }  # fmt: skip

    def _spec(self, params: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        self._require(known, "a run to propose")
        known = _ASSUMED | dict(known)
        spec = RunSpec(
            run_id="candidate", family=str(known["family"]), runner="optuna",
            lr=float(params[self._lr]), seq_len=int(known.get("seq_len", 1)),
            param_convention=str(known["param_convention"]),
            schedule="cosine", **{name: round(known[name]) for name in ATTRIBUTES},
        )  # fmt: skip
        document: dict[str, Any] = json.loads(spec.to_json())
        return document

    def _require(self, known: Mapping[str, Any], where: str) -> None:
        for name in ATTRIBUTES:
            if not isinstance(known.get(name), int | float):
                raise SpecError(
                    f"{where} lacks {name} (a number); set it as a user attribute of the trial, "
                    "return it from describe, or make it a parameter"
                )

    def _key(self, params: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> str:
        shown = {
            k: float(f"{params[k]:.4g}") if isinstance(params[k], float) else params[k]
            for k in space if k in params
        }  # fmt: skip
        return json.dumps(shown, sort_keys=True, default=str)

    def _grid(self, space: Mapping[str, BaseDistribution], number: int) -> list[dict[str, Any]]:
        axes: list[list[Any]] = []
        for name, distribution in space.items():
            if name == self._lr:
                assert isinstance(distribution, FloatDistribution)
                octaves = math.log2(distribution.high / distribution.low)
                size = max(2, round(octaves * self._per_octave) + 1)
                lrs = np.geomspace(distribution.low, distribution.high, size)
                axes.append(np.clip(lrs, distribution.low, distribution.high).tolist())
            else:
                axes.append(_levels(distribution, _LEVELS))
        total = math.prod(len(axis) for axis in axes)
        points = [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
        if total > _MAX_CANDIDATES:
            kept = self._rng(number, "grid").choice(total, _MAX_CANDIDATES, replace=False)
            points = [points[i] for i in sorted(kept)]
        return points


def _agreed(trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    """User attributes that have one value in all trials that have them."""
    values: dict[str, set[Any]] = {}
    for trial in trials:
        for name in (*ATTRIBUTES, *OPTIONAL):
            if name != "status" and name in trial.user_attrs:
                values.setdefault(name, set()).add(trial.user_attrs[name])
    return {name: next(iter(found)) for name, found in values.items() if len(found) == 1}


def _levels(distribution: BaseDistribution, size: int) -> list[Any]:
    """Values of a parameter, evenly spaced (in the log where the parameter is)."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    values = np.geomspace(low, high, size) if distribution.log else np.linspace(low, high, size)
    if distribution.step is not None:
        values = low + np.round((values - low) / distribution.step) * distribution.step
    whole = isinstance(distribution, IntDistribution)
    inside = np.clip(values, low, high).tolist()
    return list(dict.fromkeys(round(v) if whole else v for v in inside))


@final
class ValleyPruner(BasePruner):  # type: ignore[misc]
    """Stops runs that the valley has no use for: far up its side, with nearer runs on theirs.

    A run is stopped at a step if, in its slice (same `ATTRIBUTES`) and at the same step, its loss
    is more than ``excess`` nats above the best, and at least ``min_lrs`` other LRs have been seen
    there, one of them on its own side of the best and nearer to it. So the best run and its
    neighbours in LR always finish. A loss that is not finite ends the run at once. The default
    excess is where the model stops to give weight to a run; steps before ``num_warmup_steps``
    are never judged.
    """

    def __init__(self, *, excess: float = 0.1, min_lrs: int = 3, num_warmup_steps: int = 0,
                 lr: str = "lr", describe: Describe | None = None) -> None:  # fmt: skip
        if not excess > 0:
            raise SpecError(f"excess must be > 0 nats, got {excess}")
        self._excess, self._min_lrs, self._warmup = excess, min_lrs, num_warmup_steps
        self._lr, self._describe = lr, describe

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial should stop at its last reported step."""
        step = trial.last_step
        if step is None or self._lr not in trial.params:
            return False
        value = trial.intermediate_values[step]
        if not math.isfinite(value):
            return True
        if step < self._warmup:
            return False
        mine = self._slice(trial)
        seen: dict[float, float] = {}
        for other in study.get_trials(deepcopy=False):
            if other.number == trial.number or self._lr not in other.params:
                continue
            loss = other.intermediate_values.get(step)
            if loss is not None and math.isfinite(loss) and self._slice(other) == mine:
                lr = float(other.params[self._lr])
                seen[lr] = min(loss, seen.get(lr, math.inf))
        if len(seen) < self._min_lrs:
            return False
        best = min(seen, key=lambda lr: seen[lr])
        if value - seen[best] <= self._excess:
            return False
        lr = float(trial.params[self._lr])
        return any(best < other < lr or lr < other < best for other in seen)

    def _slice(self, trial: FrozenTrial) -> tuple[Any, ...]:
        known = dict(trial.params)
        if self._describe is not None:
            known |= self._describe(trial.params)
        known |= trial.user_attrs
        return tuple(known.get(name) for name in ATTRIBUTES)
