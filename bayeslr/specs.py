"""Frozen specs: a run to train, a target to predict, a sweep recipe; each checks itself."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self, TypeVar

from bayeslr.errors import SpecError
from bayeslr.units import flops_in, gpu_hours, parse_count, parse_quantity, train_flops

PARAM_CONVENTIONS = ("non_embedding", "total")
SCHEDULES = ("wsd", "cosine", "linear", "constant")
WEIGHT_DECAY_KINDS = ("coupled", "independent")
MODULE_GROUPS = ("embedding", "attention", "router", "expert_up", "expert_down", "norm", "head")
LR_MULTIPLIER = "lr_multiplier_"
"""Of the columns that hold the LR of a module group over the run's own."""

LR_MULTIPLIERS = tuple(f"{LR_MULTIPLIER}{group}" for group in MODULE_GROUPS)

COVARIATES = ("weight_decay", *LR_MULTIPLIERS)
"""Columns of the hyperparameters beside the LR that runs of one slice may differ in."""

MAX_COUNT = 1e16
"""Of parameters or tokens: hundreds of times the largest published, 2e12 and 4e13 (Llama 4)."""

WEIGHT_DECAY = 0.1
"""AdamW's, where a recipe states none."""

JOURNAL_FILE = "study.journal"
"""In the folder of a sweep, its study, unless that lies in another storage."""

STRATEGIES = ("bayes", "random", "classical", "ladder", "d-optimal")

Spec = TypeVar("Spec")
Value = TypeVar("Value")


def covariate_columns(weight_decay: Value, multipliers: Mapping[str, Value]) -> dict[str, Value]:
    """Weight decay, and LR multipliers by module group, by column of the run table."""
    by_group = {f"{LR_MULTIPLIER}{group}": value for group, value in multipliers.items()}
    return {"weight_decay": weight_decay, **by_group}


def covariate_arguments(columns: Mapping[str, float]) -> dict[str, Any]:
    """Arguments of `RunSpec` for what is stated of `COVARIATES`: the inverse of the above."""
    given: dict[str, Any] = {}
    if "weight_decay" in columns:
        given["weight_decay"] = columns["weight_decay"]
    by_group = {
        name.removeprefix(LR_MULTIPLIER): columns[name]
        for name in LR_MULTIPLIERS
        if name in columns
    }
    if by_group:
        given["options"] = {"lr_multipliers": by_group}
    return given


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


def _numbers(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise SpecError(f"{name} must be a number, as in 1.3e9, got {value!r}")


def _positive(owner: object, *names: str) -> None:
    _numbers(owner, *names)
    for name in names:
        value = getattr(owner, name)
        if not (value > 0 and is_finite(value)):
            raise SpecError(f"{name} must be finite and > 0, got {value!r:.80}")


def _positive_if_given(owner: object, *names: str) -> None:
    _positive(owner, *(name for name in names if getattr(owner, name) is not None))


def _whole_if_given(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise SpecError(f"{name} must be a whole number, as in 4, got {value!r}")


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold: JSON's whole numbers know no bound."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and -sys.float_info.max <= value <= sys.float_info.max


def require_whole(value: object, name: str, least: int = 0) -> int:
    """A whole number that is large enough. Raises: SpecError that says so."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SpecError(f"{name} must be a whole number, at least {least}, got {value!r:.80}")
    return int(value)


def as_path(value: object) -> Path:
    """A path that is given as text or as a Path. Raises: SpecError for anything else."""
    if not isinstance(value, str | Path):
        raise SpecError(f"a path is a text or a pathlib.Path, got {type(value).__name__}")
    return Path(value)


def check_keys(given: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    """Refuse keys that a table does not take. Raises: SpecError with those it takes."""
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise SpecError(
            f"{where}: unknown key {unknown[0]!r}; allowed keys are {', '.join(sorted(allowed))}"
        )


def make_spec(cls: type[Spec], raw: object, where: str) -> Spec:
    """Spec from its JSON object. Raises: SpecError that names the key and what it must be."""
    if not isinstance(raw, Mapping):
        raise SpecError(f"{where} must be a JSON object, got {raw!r:.80}")
    check_keys(raw, _field_names(cls), where)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = f.default is f.default_factory is dataclasses.MISSING
        if required and f.name not in raw:
            raise SpecError(f"{where}: key {f.name!r} is missing")
    try:
        return cls(**raw)
    except (SpecError, TypeError) as error:
        raise SpecError(f"{where}: {error}") from error


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The run to plan.

    Counts are parameters and tokens, never billions. ``family`` is the family whose LR is wanted;
    one that the fit has not seen is predicted at population level.
    """

    target_id: str
    n_active: float
    n_total: float
    tokens: float
    batch_tokens: float
    family: str | None = None
    param_convention: str = "non_embedding"
    seq_len: int | None = None
    n_experts: int | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        _require(
            isinstance(self.target_id, str) and self.target_id != "",
            f"target_id must be a text that is not empty, got {self.target_id!r}",
        )
        _require(
            self.family is None or isinstance(self.family, str),
            f"target {self.target_id}: family must be a text, got {self.family!r}",
        )
        _positive(self, "n_active", "n_total", "tokens", "batch_tokens")
        _positive_if_given(self, "seq_len", "n_experts", "top_k")
        for name in ("n_experts", "top_k"):
            value = getattr(self, name)
            _require(
                value is None or value % 1 == 0,
                f"target {self.target_id}: {name} must be a whole number, got {value!r}",
            )
        _require(
            self.top_k is None or self.n_experts is None or self.top_k <= self.n_experts,
            f"target {self.target_id}: top_k ({self.top_k}) must not exceed n_experts "
            f"({self.n_experts})",
        )
        _require(
            self.n_active <= self.n_total,
            f"target {self.target_id}: n_active ({self.n_active:.6g}) must not exceed "
            f"n_total ({self.n_total:.6g}); a dense model has both equal",
        )
        _require(
            self.batch_tokens <= self.tokens,
            f"target {self.target_id}: batch_tokens ({self.batch_tokens:.6g}) must not exceed "
            f"tokens ({self.tokens:.6g}); both count tokens",
        )
        _require(
            self.param_convention in PARAM_CONVENTIONS,
            f"target {self.target_id}: param_convention must be one of "
            f"{', '.join(PARAM_CONVENTIONS)}, got {self.param_convention!r}",
        )

    @property
    def flops(self) -> float:
        """Training FLOPs of the target, 6 N_active D."""
        return train_flops(self.n_active, self.tokens)


def too_few(n_active: Any, tokens: Any, batch_tokens: Any) -> dict[str, Any]:
    """Whether a count is too small beside the others to be one of units, by name; arrays as well.

    Real proxies can have 10,000 parameters and 100,000 tokens, so no count is small by itself.
    """
    large, many_steps = n_active >= 1e7, tokens > 1e7 * batch_tokens
    return {
        "n_active": (n_active < 1e3) | (tokens > 1e6 * n_active),
        "tokens": (tokens < 1e-3 * n_active) | (large & (tokens < 1e6)),
        "batch_tokens": large & ((batch_tokens < 512) | (many_steps & (batch_tokens < 16384))),
    }


def require_plausible_counts(target: Target) -> None:
    """Refuse counts of a target that a run table would doubt: in billions, or in sequences.

    Raises: SpecError that asks for the unit.
    """
    for name in ("n_active", "n_total", "tokens", "batch_tokens"):
        _require(
            getattr(target, name) <= MAX_COUNT,
            f"target {target.target_id}: {name} must not exceed {MAX_COUNT:g}, got "
            f"{getattr(target, name):.6g}; was a factor of 1e9 applied twice?",
        )
    n_active, tokens, batch = target.n_active, target.tokens, target.batch_tokens
    where, few = f"target {target.target_id}:", too_few(n_active, tokens, batch)
    _require(
        not few["n_active"],
        f"{where} n_active counts parameters, and {n_active:.6g} are too few for {tokens:.6g} "
        "tokens; did you mean millions or billions? Give 1.3B, not 1.3",
    )
    _require(
        not few["tokens"],
        f"{where} tokens counts tokens, and {tokens:.6g} are too few for {n_active:.6g} "
        "parameters; did you mean billions? Give 500B, not 500",
    )
    _require(
        not few["batch_tokens"],
        f"{where} batch_tokens counts tokens a step, and {batch:.6g} are too few for "
        f"{n_active:.6g} parameters; did you mean sequences? Multiply them by seq_len",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """One training run, as a runner receives it (JSON over the process boundary).

    ``tokens`` is the longest horizon. Under WSD, ``decay_at`` lists the token counts at which the
    decayed loss is measured: a stable trunk is trained once and each branch decays off it over the
    last ``decay_fraction`` of its own count; it always holds ``tokens``. A run that ``continues``
    another (a run_id: of the same settings, but for its horizons) takes over the trunk that the
    other left at ``continues_at`` tokens, and trains what comes after. ``shape`` and ``options``
    belong to the runner (widths, experts; data, evaluation).
    """

    run_id: str
    family: str
    runner: str
    lr: float
    tokens: int
    batch_tokens: int
    n_active: int
    n_total: int
    seq_len: int
    seed: int = 0
    param_convention: str = "non_embedding"
    arch: str = "moe"
    parametrization: str = "sp"
    optimizer: str = "adamw"
    weight_decay: float = WEIGHT_DECAY
    weight_decay_kind: str = "coupled"
    schedule: str = "wsd"
    warmup_tokens: int = 0
    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.0
    decay_at: tuple[int, ...] = ()
    continues: str | None = None
    continues_at: int = 0
    shape: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _positive(self, "lr", "tokens", "batch_tokens", "n_active", "n_total", "seq_len")
        _numbers(
            self, "seed", "weight_decay", "warmup_tokens", "decay_fraction", "final_lr_fraction"
        )
        _require(self.lr < 10, f"run {self.run_id}: lr is the peak LR itself, got {self.lr}")
        _require(
            self.batch_tokens <= self.tokens,
            f"run {self.run_id}: batch_tokens ({self.batch_tokens}) exceeds tokens ({self.tokens})",
        )
        _require(
            self.schedule in SCHEDULES,
            f"run {self.run_id}: schedule must be one of {', '.join(SCHEDULES)}, "
            f"got {self.schedule!r}",
        )
        _require(
            self.weight_decay_kind in WEIGHT_DECAY_KINDS,
            f"run {self.run_id}: weight_decay_kind must be one of "
            f"{', '.join(WEIGHT_DECAY_KINDS)}, got {self.weight_decay_kind!r}",
        )
        _require(
            0 < self.decay_fraction <= 1,
            f"run {self.run_id}: decay_fraction must be in (0, 1], got {self.decay_fraction}",
        )
        _require(
            0 <= self.warmup_tokens < self.tokens,
            f"run {self.run_id}: warmup_tokens must be in [0, tokens), got {self.warmup_tokens}",
        )
        _require(
            isinstance(self.decay_at, list | tuple) and all(is_finite(t) for t in self.decay_at),
            f"run {self.run_id}: decay_at must be a list of token counts, got {self.decay_at!r}",
        )
        for name in ("shape", "options"):
            value = getattr(self, name)
            _require(
                isinstance(value, Mapping),
                f"run {self.run_id}: {name} must be a mapping, got {value!r}",
            )
        branches = tuple(sorted({int(t) for t in self.decay_at} | {self.tokens}))
        _require(
            branches[0] > 0 and branches[-1] == self.tokens,
            f"run {self.run_id}: decay_at must lie in (0, tokens], got {self.decay_at}",
        )
        object.__setattr__(self, "decay_at", branches)
        self._check_continuation()

    def _check_continuation(self) -> None:
        _numbers(self, "continues_at")
        if self.continues is None:
            _require(
                self.continues_at == 0,
                f"run {self.run_id}: continues_at ({self.continues_at}) goes with continues, the "
                "run_id of the run whose trunk is taken over",
            )
            return
        _require(
            isinstance(self.continues, str) and self.continues not in ("", self.run_id),
            f"run {self.run_id}: continues must be the run_id of another run, got "
            f"{self.continues!r}",
        )
        _require(
            self.schedule == "wsd",
            f"run {self.run_id}: only a 'wsd' run has a trunk to go on from, and this one's "
            f"schedule is {self.schedule!r}",
        )
        first_decay = (1 - self.decay_fraction) * self.decay_at[0]
        _require(
            0 < self.continues_at <= first_decay,
            f"run {self.run_id}: continues_at must lie in (0, {first_decay:.0f}], before its first "
            f"decay begins, got {self.continues_at}",
        )

    @property
    def trained_tokens(self) -> float:
        """Tokens that are paid for: the stable trunk and, under WSD, every decay branch."""
        if self.schedule != "wsd":
            return float(self.tokens)
        trunk = (1 - self.decay_fraction) * self.tokens - self.continues_at
        return trunk + self.decay_fraction * sum(self.decay_at)

    @property
    def covariates(self) -> dict[str, float]:
        """What may differ within a slice beside LR and seed, by column of the run table: weight
        decay, and the LR multipliers of module groups that ``options`` names.
        """
        multipliers = self.options.get("lr_multipliers", {})
        by_group = {group: float(value) for group, value in multipliers.items()}
        return covariate_columns(self.weight_decay, by_group)

    def share_at(self, tokens: float) -> float:
        """Share of its own way, 0 to 1, that the run has behind it at a token count."""
        share = (tokens - self.continues_at) / (self.tokens - self.continues_at)
        return min(1.0, max(0.0, share))

    def to_json(self) -> str:
        """One line of JSON; what continues no other run does not speak of it."""
        document = dataclasses.asdict(self)
        if self.continues is None:
            del document["continues"], document["continues_at"]
        return json.dumps(document, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`. Raises: SpecError on an unknown key or a broken rule."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecError(f"run spec is not valid JSON: {error}") from error
        return make_spec(cls, raw, "run spec")


@dataclass(frozen=True, kw_only=True, slots=True)
class LrGrid:
    """Peak LRs that a sweep may try: ``per_octave`` points a factor of two, ``low`` to ``high``."""

    low: float
    high: float
    per_octave: int = 2

    def __post_init__(self) -> None:
        _positive(self, "low", "high", "per_octave")
        _require(self.low < self.high, f"lr.low ({self.low}) must be below lr.high ({self.high})")

    def values(self) -> tuple[float, ...]:
        """Ascending grid of LRs; both ends are within half a step of ``low`` and ``high``."""
        num_steps = round(math.log2(self.high / self.low) * self.per_octave)
        return tuple(self.low * 2 ** (i / self.per_octave) for i in range(num_steps + 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Runs that a sweep may ask for: every shape at every token count, batch and LR.

    ``shapes`` are mappings that belong to the runner, each with a unique ``name``. ``weight_decay``
    and ``lr_multipliers`` (by module group) are further values to try, one of them at a time.
    """

    lr: LrGrid
    tokens: tuple[int, ...]
    batch_tokens: tuple[int, ...]
    shapes: tuple[Mapping[str, Any], ...]
    weight_decay: tuple[float, ...] = ()
    lr_multipliers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "shapes"):
            _require(len(getattr(self, name)) > 0, f"space.{name} must not be empty")
        names = [shape.get("name") for shape in self.shapes]
        _require(
            None not in names and len(set(names)) == len(names),
            f"each of space.shapes needs a unique name, got {names}",
        )
        _require(
            isinstance(self.lr_multipliers, Mapping),
            "space.lr_multipliers must be a table of lists, one a module group, got "
            f"{self.lr_multipliers!r}",
        )
        check_keys(self.lr_multipliers, MODULE_GROUPS, "[space.lr_multipliers]")
        for name, values in self.covariates.items():
            _require(
                isinstance(values, list | tuple)
                and all(isinstance(v, int | float) and 0 < v < math.inf for v in values),
                f"space: values of {name} must be a list of numbers > 0, got {values!r}",
            )

    @property
    def covariates(self) -> dict[str, Sequence[float]]:
        """Further values to try, by column of the run table."""
        return covariate_columns(self.weight_decay, self.lr_multipliers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A sweep: the runs it may ask for, the targets it serves, its global budget in FLOPs.

    ``flops_per_second`` is what one device sustains, where the budget was given in GPU-hours.
    ``run`` holds the fields that every `RunSpec` of the sweep shares (seq_len, schedule,
    weight_decay, ...), ``options`` what the runner alone understands. ``targets`` whose ``shape``
    key names widths get their counts from the runner. ``stop_rule`` ends the sweep where a
    run costs more FLOPs than it is expected to save at the targets; without it the budget is spent.
    ``early_ends`` stops runs that are far up their valley's side. ``repeats`` lets the posterior
    ask for a finished run again, with another seed. ``validate_target`` trains the first target
    at the recommended LR and at its half and double once the sweep has ended. ``strategy`` is
    ``bayes`` (the posterior chooses the runs) or one to compare it with, which refits at the end
    alone: ``random``, or a design (`bayeslr.designs`), of which ``classical`` ends in the two-stage
    estimator.
    """

    name: str
    runner: str
    family: str
    space: Space
    targets: tuple[Mapping[str, Any], ...]
    budget_flops: float
    flops_per_second: float | None = None
    prior: str = "moe-default"
    seed: int = 1
    workers: int = 1
    batch_runs: int = 2
    max_runs: int | None = None
    start_runs: int = 6
    stop_rule: bool = True
    early_ends: bool = True
    repeats: bool = False
    validate_target: bool = False
    strategy: str = "bayes"
    run: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _positive(self, "budget_flops", "workers", "batch_runs", "start_runs")
        _positive_if_given(self, "max_runs", "flops_per_second")
        _whole_if_given(self, "workers", "batch_runs", "start_runs", "max_runs", "seed")
        _require(self.seed >= 0, f"recipe {self.name}: seed must be >= 0, got {self.seed}")
        for name in ("stop_rule", "early_ends", "repeats", "validate_target"):
            value = getattr(self, name)
            _require(
                isinstance(value, bool),
                f"recipe {self.name}: {name} must be true or false, without quotes, got {value!r}",
            )
        _require(len(self.targets) > 0, f"recipe {self.name}: at least one [[targets]] is needed")
        _require(
            self.strategy in STRATEGIES,
            f"recipe {self.name}: strategy must be one of {', '.join(STRATEGIES)}, "
            f"got {self.strategy!r}",
        )
        _require(
            not self.repeats or self.runner != "table",
            f"recipe {self.name}: a table of recorded runs holds no other seeds; leave repeats out",
        )
        check_keys(
            self.run,
            [n for n in _field_names(RunSpec) if n not in _SET_BY_SWEEP],
            f"recipe {self.name}, [run]",
        )
        run_seed = self.run.get("seed", 0)
        _require(
            isinstance(run_seed, Integral) and not isinstance(run_seed, bool),
            f"recipe {self.name}, [run]: seed must be a whole number, got {run_seed!r}",
        )
        multipliers = self.options.get("lr_multipliers", {})
        _require(
            isinstance(multipliers, Mapping)
            and all(isinstance(m, int | float) and 0 < m < math.inf for m in multipliers.values()),
            f"recipe {self.name}, [options]: lr_multipliers must be a table of numbers > 0 by "
            f"module group, as the run table takes no others, got {multipliers!r}",
        )


_SET_BY_SWEEP = (
    "run_id", "family", "runner", "lr", "tokens", "batch_tokens", "n_active", "n_total",
    "decay_at", "continues", "continues_at", "shape", "options",
)  # fmt: skip


def parse_recipe(raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Recipe from the parsed TOML (or JSON) document.

    Tables: ``[sweep]`` (name, runner, family, budget_flops, ...), ``[space]`` with ``[space.lr]``
    and ``[[space.shapes]]``, ``[[targets]]``, ``[run]``, ``[options]``. In place of budget_flops
    ``[sweep]`` takes budget_gpu_hours with flops_per_second.
    Raises: SpecError on an unknown key, a missing one, or a value that breaks a rule.
    """
    check_keys(raw, ["sweep", "space", "targets", "run", "options"], where)
    for table in ("sweep", "space", "targets"):
        _require(table in raw, f"{where}: [{table}] is missing")
    sweep, space = dict(raw["sweep"]), dict(raw["space"])
    outside = ("space", "targets", "run", "options")
    allowed = [n for n in _field_names(Recipe) if n not in outside]
    check_keys(sweep, [*allowed, "budget_gpu_hours"], f"{where}, [sweep]")
    check_keys(space, _field_names(Space), f"{where}, [space]")
    check_keys(space.get("lr", {}), _field_names(LrGrid), f"{where}, [space.lr]")
    try:
        return Recipe(
            **_with_budget(sweep, f"{where}, [sweep]"),
            space=Space(
                lr=LrGrid(**space["lr"]),
                tokens=tuple(parse_count(t, name="space.tokens") for t in space["tokens"]),
                batch_tokens=tuple(
                    parse_count(b, name="space.batch_tokens") for b in space["batch_tokens"]
                ),
                shapes=tuple(dict(s) for s in space.get("shapes", ())),
                weight_decay=_frozen(space.get("weight_decay", ())),
                lr_multipliers=_frozen(space.get("lr_multipliers", {})),
            ),
            targets=tuple(dict(t) for t in raw["targets"]),
            run=dict(raw.get("run", {})),
            options=dict(raw.get("options", {})),
        )
    except KeyError as error:
        raise SpecError(f"{where}: key {error.args[0]!r} is missing") from error
    except TypeError as error:
        raise SpecError(f"{where}: {error}") from error


def _with_budget(sweep: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table with its budget in FLOPs, however it was given. Raises: SpecError."""
    sweep = dict(sweep)
    given = [n for n in ("budget_flops", "budget_gpu_hours", "flops_per_second") if n in sweep]
    if given not in (["budget_flops"], ["budget_gpu_hours", "flops_per_second"]):
        raise SpecError(
            f"{where}: the budget is either budget_flops, or budget_gpu_hours together with "
            "flops_per_second, what one device sustains (its peak times the utilisation, as in "
            f"4e14); got {' and '.join(given) or 'none of them'}"
        )
    for name in given:
        sweep[name] = parse_quantity(sweep[name], name=f"{where}: {name}")
    if hours := sweep.pop("budget_gpu_hours", None):
        sweep["budget_flops"] = flops_in(hours, sweep["flops_per_second"])
    return sweep


def _frozen(value: Any) -> Any:
    """Lists as tuples, in a table too; what is neither is for `Space` to judge."""
    if isinstance(value, Mapping):
        return {key: _frozen(entry) for key, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """Parsed TOML of a recipe. Raises: SpecError if it cannot be read as such."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"recipe {path} does not exist") from error
    except IsADirectoryError as error:
        raise SpecError(f"recipe {path} is a folder; name the .toml file in it") from error
    except OSError as error:
        raise SpecError(f"recipe {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"recipe {path} is not valid TOML: {error}") from error


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a TOML file. Raises: SpecError if it is missing or broken."""
    raw = read_recipe_file(path)
    if "compare" in raw:
        raise SpecError(f"recipe {path} is that of a comparison: bayeslr compare {path}")
    return parse_recipe(raw, where=f"recipe {path}")


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """The document that `parse_recipe` reads back to an equal recipe (JSON-safe)."""
    raw = dataclasses.asdict(recipe)
    if recipe.flops_per_second is not None:
        hours = gpu_hours(raw.pop("budget_flops"), recipe.flops_per_second)
        # To twelve figures, so that hours are read back as they were written.
        raw["budget_gpu_hours"] = float(f"{hours:.12g}")
    return {
        "space": raw.pop("space"),
        "targets": list(raw.pop("targets")),
        "run": raw.pop("run"),
        "options": raw.pop("options"),
        "sweep": {k: v for k, v in raw.items() if v is not None},
    }
