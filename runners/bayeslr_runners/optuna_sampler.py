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
of the same name. So does what else is known of it (`OPTIONAL`), of which weight decay and the LR
multipliers of module groups are covariates of the law: as parameters they are chosen like the LR,
and `predict` tells their best values. Runs that are proposed have no user attributes yet: for them
the last two count, then the attributes that all trials so far agree on.

The state is the study alone, and random numbers are keyed by (seed, trial number): a study that is
resumed, by any process, goes on as if it had never stopped: a run that its process left unfinished
is proposed again. Inference runs in a child process, so
that neither JAX nor PyMC is loaded where the trials are trained.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bayeslr.errors import SpecError
from bayeslr.specs import COVARIATES, RunSpec, covariate_arguments
from bayeslr.units import train_flops
from bayeslr_runners.processes import machine_name, process_start

ATTRIBUTES = ("n_active", "n_total", "tokens", "batch_tokens")
"""What must be known of every run: parameters and tokens."""

OPTIONAL = ("family", "seq_len", "param_convention", "optimizer", "schedule", "parametrization",
            "d_model", "n_layers", "n_experts", "top_k", "loss_se", "status",
            *COVARIATES)  # fmt: skip

_SLICE = (*ATTRIBUTES, *(name for name in OPTIONAL if name not in ("loss_se", "status")))
_ASSUMED = {"family": "study", "param_convention": "non_embedding"}
_PROCESS = "bayeslr:process"  # system attribute of a trial: who proposed it
_MAX_CANDIDATES = 5000
_LEVELS = 5  # of a numeric parameter other than the LR
_TRIES = 2  # of a run that failed: the machine may be at fault once
_STATUS = {TrialState.COMPLETE: "ok", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}

Describe = Callable[[Mapping[str, Any]], Mapping[str, Any]]

# Under Optuna's own root, so that optuna.logging.set_verbosity counts.
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class _Child:
    """The child process that fits and chooses; started on first use, ended with this one."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Reply of the child. Raises: SpecError with its message."""
        try:
            text = json.dumps(request)
        except TypeError as error:
            raise SpecError(f"runs and targets must be numbers and texts: {error}") from error
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
                stdin.write(text + "\n")
                stdin.flush()
                line = stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # Ctrl-C: the reply would be read as that to the next request
                self._process.kill()
                raise
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
    from. lr: name of the parameter that is the peak LR, any of Optuna's distributions above 0.
    Parameters on which nothing that is known of a run depends are drawn at random. A loss that is
    not finite, returned or reported last, is a diverged run; one that raised says nothing, and is
    not proposed again once it has failed twice. Where inference is impossible (no finished run, a
    broken table, a fit that fails its gate) a trial is random; the log and its user attribute
    ``reason`` say why.

    Raises, from ``study.optimize``: SpecError if the study does not minimise one value, or the LR's
    range holds what is no LR.
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
        self._targets = [
            {"target_id": f"target{i + 1}", **_native(t)} for i, t in enumerate(targets)
        ]
        self.describe = describe
        self._prior, self._seed, self._lr = prior, seed, lr
        self._num_startup = num_startup_trials
        self._per_octave = lr_per_octave
        self._tables = [str(path) for path in tables]
        self._child = _Child(command)
        self._set_aside = ""  # said already

    def __reduce__(self) -> Any:
        raise TypeError("a ScalingLawSampler holds a process; make one in each worker instead")

    def close(self) -> None:
        """End the inference process."""
        self._child.close()

    def reseed_rng(self) -> None:
        """Nothing to do: random numbers are keyed by (seed, trial number)."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Write down whose trial it is, for whoever finds it running when this process is dead."""
        mine = [machine_name(), os.getpid(), process_start(os.getpid())]
        study._storage.set_trial_system_attr(trial._trial_id, _PROCESS, mine)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Parameters that all completed trials share, fixed ones included: `describe` reads them.

        Raises: SpecError if the study does not minimise one value.
        """
        _require_loss(study)
        space: dict[str, BaseDistribution] = intersection_search_space(
            study.get_trials(deepcopy=False)
        )
        return space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Parameters of the run that tells most; empty (random) before there is anything to fit.

        Raises: SpecError if the LR's range holds what is no LR.
        """
        if not search_space:
            return {}
        if self._lr in search_space:
            _require_lrs(self._lr, search_space[self._lr])
        trials = study.get_trials(deepcopy=False)
        told = [t for t in trials if t.state.is_finished() and _status(t) != "failed"]
        if len(told) < self._num_startup and not self._tables:
            return {}
        try:
            params, reason = self._choose(study, trial, search_space, trials)
        except SpecError as error:
            _logger.warning(f"trial {trial.number} is random: {error}")
            params, reason = {}, f"drawn at random: {error}"
        study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
        return params

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:  # fmt: skip
        """A random value, the same for the same (seed, trial number, parameter).

        Raises: SpecError if the LR's range holds what is no LR.
        """
        if param_name == self._lr:
            _require_lrs(param_name, param_distribution)
        rng = self._rng(trial.number, param_name)
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[int(rng.integers(len(param_distribution.choices)))]
        levels = _levels(param_distribution, 257)
        return levels[int(rng.integers(len(levels)))]

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState,
        values: Sequence[float] | None,
    ) -> None:  # fmt: skip
        """Write what a run was taken for into its user attributes, and that it diverged, for
        whoever reads the study without ``describe`` (``bayeslr import optuna``).
        """
        if self._lr not in trial.params:
            return
        noted: dict[str, Any] = dict(_ASSUMED)
        # A run that broke early may lack what describe asks for; its own error is told, not this.
        with contextlib.suppress(SpecError):
            noted |= self._known(trial.params)
        if _ending(trial, state, values[0] if values else _returned()) == "diverged":
            noted["status"] = "diverged"
        for name, value in noted.items():
            if name not in trial.user_attrs and name not in trial.params:
                study._storage.set_trial_user_attr(trial._trial_id, name, value)

    def predict(self, study: optuna.Study) -> list[dict[str, Any]]:
        """Predictions table of the targets from the study's runs.

        Each row says by ``trustworthy`` and ``verdict`` whether the fit passed its gate; where it
        did not, the log warns. ``covariates`` of a row lists what the study varied beside the LR,
        as `bayeslr.Posterior.covariates` does. Raises: SpecError.
        """
        _require_loss(study)
        reply = self._ask({"op": "predict", **self._request(study.get_trials(deepcopy=False))})
        told = {name: reply[name] for name in ("trustworthy", "verdict")}
        if not told["trustworthy"]:
            _logger.warning(f"this prediction is not to be relied on. {told['verdict']}")
        beside: dict[str, list[dict[str, Any]]] = {}
        for row in reply["covariates"]:
            beside.setdefault(row["target_id"], []).append(row)
        return [
            {**row, "covariates": beside.get(row["target_id"], []), **told}
            for row in reply["predictions"]
        ]

    # --------------------------------------------------------------------------- inside

    def _rng(self, number: int, name: str = "") -> np.random.Generator:
        counter = [0, 0, zlib.crc32(name.encode()), number]
        return np.random.Generator(np.random.Philox(key=self._seed, counter=counter))

    def _choose(self, study: optuna.Study, trial: FrozenTrial,
                space: Mapping[str, BaseDistribution],
                trials: Sequence[FrozenTrial]) -> tuple[dict[str, Any], str]:  # fmt: skip
        """Parameters of the run that tells most, and why it does. Raises: SpecError."""
        if self._lr not in space:
            raise SpecError(
                f"the trials so far share no parameter {self._lr!r} of one range, but "
                f"{', '.join(space)}; ScalingLawSampler(lr=...) says which is the peak LR"
            )
        trials = _without_orphans(trials)
        made = self._made(trials, space)
        options = [p for p in self._grid(space, trial.number) if self._key(p, space) not in made]
        if not options:
            raise SpecError("every run of the space has been made; widen it")
        agreed = _agreed(trials)
        # Options that are one run to the law differ in parameters that it does not know: one of
        # them is drawn.
        runs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for i in self._rng(trial.number, "order").permutation(len(options)):
            spec = self._spec(options[i], {**agreed, **self._known(options[i])})
            runs.setdefault(json.dumps(spec), (options[i], spec))
        pairs = [runs[text] for text in sorted(runs)]
        # Runs that others are making now: what they will tell is expected, not told twice. Who is
        # still asking for one will get the best that is left.
        others = [t for t in trials if t.state == TrialState.RUNNING and t.number != trial.number]
        under_way = {t.number: self._begun(t, agreed) for t in others}
        asking = sum(spec is None and n < trial.number for n, spec in under_way.items())
        reply = self._ask(
            {
                "op": "choose", **self._request(trials),
                "candidates": [spec for _, spec in pairs],
                "flops": [train_flops(spec["n_active"], spec["tokens"]) for _, spec in pairs],
                "under_way": [spec for spec in under_way.values() if spec is not None],
                "num_runs": asking + 1,
                "choice_seed": int(self._rng(trial.number).integers(2**31)),
            }
        )  # fmt: skip
        # What others have begun since then, knowing other runs, may be among the chosen.
        made = self._made(_without_orphans(study.get_trials(deepcopy=False)), space)
        for place, reason in zip(
            reversed(reply["chosen"]), reversed(reply["reasons"]), strict=True
        ):
            params = pairs[place][0]
            if self._key(params, space) not in made:
                return params, str(reason)
        raise SpecError("no run of the space would tell anything about the targets")

    def _made(
        self, trials: Sequence[FrozenTrial], space: Mapping[str, BaseDistribution]
    ) -> set[str]:
        """Keys of the runs that need no proposal: made, under way, or failed often enough."""
        tries: Counter[str] = Counter()
        for trial in trials:
            tries[self._key(trial.params, space)] += 1 if _status(trial) == "failed" else _TRIES
        return {key for key, number in tries.items() if number >= _TRIES}

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Reply of the child; the log warns, once, of runs that broke a rule of the run table."""
        reply = self._child.ask(request)
        if reply["set_aside"] not in ("", self._set_aside):
            self._set_aside = reply["set_aside"]
            _logger.warning(f"set aside, and not fitted:\n{self._set_aside}")
        return reply

    def _request(self, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        agreed = _agreed(trials)
        rows = [row for t in trials if (row := self._row(t, agreed)) is not None]
        family = rows[0]["family"] if rows else _ASSUMED["family"]
        return {
            "runs": rows,
            "tables": self._tables,
            "prior": self._prior,
            "seed": self._seed,
            "targets": [{"family": family, **target} for target in self._targets],
        }

    def _known(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What parameters say of a run. Raises: SpecError if ``describe`` does."""
        known = {k: params[k] for k in (*ATTRIBUTES, *OPTIONAL) if k in params}
        return _native(known | _described(self.describe, params))

    def _told(self, trial: FrozenTrial) -> dict[str, Any]:
        """What a trial's parameters and attributes say of its run. Raises: SpecError."""
        own = {k: v for k, v in trial.user_attrs.items() if k in (*ATTRIBUTES, *OPTIONAL)}
        return {**self._known(trial.params), **_native(own)}

    def _begun(self, trial: FrozenTrial, agreed: Mapping[str, Any]) -> dict[str, Any] | None:
        """Spec of a run under way; None where not enough is known of it yet."""
        with contextlib.suppress(SpecError):
            if self._lr in trial.params:
                return self._spec(trial.params, {**agreed, **self._told(trial)})
        return None

    def _row(self, trial: FrozenTrial, agreed: Mapping[str, Any]) -> dict[str, Any] | None:
        """Row of the run table; None for a trial that says nothing of its LR."""
        status = _status(trial)
        if trial.state != TrialState.COMPLETE and status != "diverged":
            return None
        where = f"trial {trial.number}"
        lr = trial.params.get(self._lr)
        if not _positive(lr):
            raise SpecError(
                f"{where} has {lr!r} for the peak LR {self._lr!r}, which must be a number > 0; "
                "ScalingLawSampler(lr=...) says which parameter it is"
            )
        known = {**agreed, **self._told(trial)}
        self._require(known, where)
        return {
            **_ASSUMED,
            **known,
            "run_id": f"trial-{trial.number}",
            "planned_tokens": known["tokens"],
            "lr": lr,
            "loss": None if status == "diverged" else trial.value,
            "status": status,
            "source": "optuna",
        }  # fmt: skip

    def _spec(self, params: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        known = {"seq_len": 1, **_ASSUMED, **known}
        self._require(known, "a run to propose")
        spec = RunSpec(
            run_id="candidate", family=str(known["family"]), runner="optuna",
            lr=float(params[self._lr]), param_convention=str(known["param_convention"]),
            schedule="cosine", **{name: round(known[name]) for name in (*ATTRIBUTES, "seq_len")},
            **covariate_arguments({n: known[n] for n in COVARIATES if known.get(n) is not None}),
        )  # fmt: skip
        document: dict[str, Any] = json.loads(spec.to_json())
        return document

    def _require(self, known: Mapping[str, Any], where: str) -> None:
        for name in (*ATTRIBUTES, "seq_len"):
            value = known.get(name)
            if not _positive(value) and (name in known or name in ATTRIBUTES):
                found = "lacks" if value is None else f"has {value!r} for"
                raise SpecError(
                    f"{where} {found} {name} (a number > 0); set it as a user attribute of the "
                    "trial, return it from describe, or make it a parameter"
                )
        for name in COVARIATES:
            value = known.get(name)
            if not (value is None or _positive(value) or (name == "weight_decay" and value == 0)):
                least = ">= 0" if name == "weight_decay" else "> 0"
                raise SpecError(f"{where} has {value!r} for {name} (a number {least})")

    def _key(self, params: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> str:
        shown = {
            k: float(f"{params[k]:.4g}") if isinstance(params[k], float) else params[k]
            for k in space if k in params
        }  # fmt: skip
        return json.dumps(shown, sort_keys=True, default=str)

    def _grid(self, space: Mapping[str, BaseDistribution], number: int) -> list[dict[str, Any]]:
        """Runs to choose from: all of a grid, or as many drawn from it as are looked at."""
        axes: dict[str, list[Any]] = {}
        for name, distribution in space.items():
            if name == self._lr and not isinstance(distribution, CategoricalDistribution):
                octaves = math.log2(distribution.high / distribution.low)
                size = max(2, round(octaves * self._per_octave) + 1)
                lrs = np.geomspace(distribution.low, distribution.high, size)
                axes[name] = _allowed(lrs, distribution)
            else:
                axes[name] = _levels(distribution, _LEVELS)
        if math.prod(len(axis) for axis in axes.values()) <= _MAX_CANDIDATES:
            return [
                dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
            ]
        rng = self._rng(number, "grid")
        drawn = {n: rng.integers(len(axis), size=_MAX_CANDIDATES) for n, axis in axes.items()}
        return [{n: axis[drawn[n][i]] for n, axis in axes.items()} for i in range(_MAX_CANDIDATES)]


def _without_orphans(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials but for those that stay RUNNING for ever: their process, on this machine, is dead.

    Of another machine's nothing can be known here; with a heartbeat Optuna itself makes them FAIL.
    """

    def is_orphan(trial: FrozenTrial) -> bool:
        if trial.state != TrialState.RUNNING:
            return False
        machine, pid, started = trial.system_attrs.get(_PROCESS, ("", 0, ""))
        return bool(machine == machine_name() and process_start(pid) != started)

    return [trial for trial in trials if not is_orphan(trial)]


def _status(trial: FrozenTrial) -> str | None:
    """How a trial ended, in its own words if it has any; None if it has not."""
    if not trial.state.is_finished():
        return None
    value = trial.value if trial.state == TrialState.COMPLETE else None
    return str(trial.user_attrs.get("status") or _ending(trial, trial.state, value))


def _ending(trial: FrozenTrial, state: TrialState, value: float | None) -> str:
    """``ok``, ``diverged``, ``pruned`` or ``failed``. value: what was returned, if anything.

    A loss that is not finite is divergence, whatever Optuna makes of it: COMPLETE of infinity, FAIL
    of NaN, PRUNED where a pruner sees it first.
    """
    if value is None and trial.last_step is not None:
        value = trial.intermediate_values[trial.last_step]
    return "diverged" if value is not None and not math.isfinite(value) else _STATUS[state]


def _returned() -> float | None:
    """What the objective of the trial that ends now returned; None if it raised, or that is hidden.

    Optuna keeps a returned NaN from its samplers, storages and callbacks alike (the trial is FAIL,
    as if it had raised), so it is read off the function that calls the sampler.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_tell_with_warning":
        frame = frame.f_back
    try:
        return float(frame.f_locals["value_or_values"]) if frame is not None else None
    except (KeyError, TypeError, ValueError):
        return None


def _require_loss(study: optuna.Study) -> None:
    if study.directions != [StudyDirection.MINIMIZE]:
        told = ", ".join(direction.name.lower() for direction in study.directions)
        raise SpecError(
            f"the study must minimise one value, the loss in nats per token, but its direction is "
            f"{told}; optuna.create_study(direction='minimize')"
        )


def _require_lrs(name: str, distribution: BaseDistribution) -> None:
    """Raises: SpecError if a value of the distribution is no LR."""
    if isinstance(distribution, CategoricalDistribution):
        values, what = distribution.choices, "choices"
    else:
        values, what = (distribution.low, distribution.high), "range"
    for value in values:
        if not (_positive(value) and value < 10):
            raise SpecError(
                f"{name} must be a number above 0 and below 10, the peak LR itself and not its "
                f"logarithm, but its {what} has {value!r}; "
                f"trial.suggest_float({name!r}, 1e-5, 1e-1, log=True)"
            )


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _native(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with NumPy's numbers as Python's, which JSON takes."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}


def _described(describe: Describe | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the user's function says of a run. Raises: SpecError if it raises."""
    if describe is None:
        return {}
    try:
        return dict(describe(params))
    except Exception as error:
        raise SpecError(
            f"describe({dict(params)}) came to {type(error).__name__}: {error}; it is given the "
            "parameters that all trials share, and must return a mapping of what is known"
        ) from error


def _agreed(trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    """User attributes that have one value in all trials that have them."""
    values: dict[str, list[Any]] = {}
    for trial in trials:
        for name in (*ATTRIBUTES, *OPTIONAL):
            if name != "status" and name in trial.user_attrs:
                found = values.setdefault(name, [])
                if trial.user_attrs[name] not in found:
                    found.append(trial.user_attrs[name])
    return _native({name: found[0] for name, found in values.items() if len(found) == 1})


def _levels(distribution: BaseDistribution, size: int) -> list[Any]:
    """Values of a parameter, evenly spaced (in the log where the parameter is)."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    spread = np.geomspace if distribution.log else np.linspace
    return _allowed(spread(distribution.low, distribution.high, size), distribution)


def _allowed(
    values: NDArray[np.float64], distribution: FloatDistribution | IntDistribution
) -> list[Any]:
    """Nearest values of the distribution, each once."""
    low, step = distribution.low, distribution.step
    if step is not None:
        values = low + np.round((values - low) / step) * step
    inside = np.clip(values, low, distribution.high).tolist()
    whole = isinstance(distribution, IntDistribution)
    return list(dict.fromkeys(round(v) if whole else v for v in inside))


@final
class ValleyPruner(BasePruner):  # type: ignore[misc]
    """Stops runs that the valley has no use for: far up its side, with nearer runs on theirs.

    A run is stopped at a step if, in its slice (same `ATTRIBUTES`, family, shape and what else the
    run table knows beside the LR) and at the same step, its loss is more than ``excess`` nats above
    the best, and at least ``min_lrs`` other LRs have been seen there, one of them on its own side
    of the best and nearer to it. So the best run and its neighbours in LR always finish. A loss
    that is not finite ends the run at once. The default excess is where the model stops to give
    weight to a run; steps before ``num_warmup_steps`` are never judged. describe: by default that
    of the study's `ScalingLawSampler`, if it has one.
    """

    def __init__(self, *, excess: float = 0.1, min_lrs: int = 3, num_warmup_steps: int = 0,
                 lr: str = "lr", describe: Describe | None = None) -> None:  # fmt: skip
        if not excess > 0:
            raise SpecError(f"excess must be > 0 nats, got {excess}")
        self._excess, self._min_lrs, self._warmup = excess, min_lrs, num_warmup_steps
        self._lr, self._describe = lr, describe

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial should stop at its last reported step.

        Raises: SpecError if the study does not minimise one value.
        """
        _require_loss(study)
        step = trial.last_step
        if step is None or self._lr not in trial.params:
            return False
        value = trial.intermediate_values[step]
        if not math.isfinite(value):
            return True
        if step < self._warmup:
            return False
        describe = self._describe
        if describe is None and isinstance(study.sampler, ScalingLawSampler):
            describe = study.sampler.describe
        mine = _slice(trial, describe)
        seen: dict[float, float] = {}
        for other in study.get_trials(deepcopy=False):
            if other.number == trial.number or self._lr not in other.params:
                continue
            loss = other.intermediate_values.get(step)
            if loss is not None and math.isfinite(loss) and _slice(other, describe) == mine:
                lr = float(other.params[self._lr])
                seen[lr] = min(loss, seen.get(lr, math.inf))
        if len(seen) < self._min_lrs:
            return False
        best = min(seen, key=lambda lr: seen[lr])
        if value - seen[best] <= self._excess:
            return False
        lr = float(trial.params[self._lr])
        return any(best < other < lr or lr < other < best for other in seen)


def _slice(trial: FrozenTrial, describe: Describe | None) -> tuple[Any, ...]:
    """What the runs of a trial's slice share."""
    known = {**_ASSUMED, **trial.params, **_described(describe, trial.params), **trial.user_attrs}
    return tuple(known.get(name) for name in _SLICE)
