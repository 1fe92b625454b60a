"""Prior cards: distributions with units and sources, from TOML; code has no prior of its own."""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bayeslr.errors import SpecError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

REFERENCE_KEYS = ("n_active", "n_total", "tokens")
_SHAPE_KEYS = {"normal": ("mean", "sd"), "lognormal": ("median", "log_sd")}
_TEXT_KEYS = ("unit", "source", "why")


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """One parameter's prior.

    kind ``normal``: ``location`` is the mean, ``scale`` the sd. kind ``lognormal``: ``location`` is
    the median, ``scale`` the sd of the natural log, support (0, inf).
    """

    name: str
    kind: str
    location: float
    scale: float
    unit: str
    source: str
    why: str = ""

    @property
    def support(self) -> str:
        """Where the density is positive."""
        return "real" if self.kind == "normal" else "positive"

    def draw(self, rng: np.random.Generator, num_draws: int) -> NDArray[np.float64]:
        """Independent draws, shape (num_draws,)."""
        raw = rng.normal(size=num_draws)
        if self.kind == "normal":
            return self.location + self.scale * raw
        import numpy as np

        return np.asarray(self.location * np.exp(self.scale * raw), dtype=np.float64)

    def interval(self, prob: float = 0.9) -> tuple[float, float]:
        """Central interval of mass ``prob``."""
        from statistics import NormalDist

        half = NormalDist().inv_cdf(0.5 + prob / 2) * self.scale
        if self.kind == "normal":
            return self.location - half, self.location + half
        return self.location * math.exp(-half), self.location * math.exp(half)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """A prior card.

    ``reference`` holds the scale (n_active, n_total, tokens) at which the intercepts are stated.
    ``sha256`` is the hash of the card's own text and of the card it extends.
    """

    name: str
    title: str
    date: str
    holds_for: Mapping[str, str]
    reference: Mapping[str, float]
    parameters: Mapping[str, Distribution]
    sha256: str
    extends: str | None = None
    path: Path | None = field(default=None, compare=False)

    def contradictions(self, frame: pd.DataFrame) -> list[str]:
        """Where the runs of a table are not those that the card holds for: a sentence, if they are
        not.
        """
        held, found = [], []
        for key, column in _HELD.items():
            words = set(re.findall(r"\w+", self.holds_for.get(key, "").lower().replace("-", "_")))
            values = sorted(set(frame[column].dropna().astype(str).str.lower()))
            others = [value for value in values if value.replace("-", "_") not in words]
            if words and others:
                held.append(f"{key} {self.holds_for[key]}")
                found += others
        if not found:
            return []
        return [
            f"card {self.name} is for {', '.join(held)}, and runs here have {', '.join(found)}: "
            "the exponents that it expects may not be theirs (bayeslr priors list shows the cards)"
        ]

    def __getitem__(self, name: str) -> Distribution:
        """Distribution of one parameter. Raises: SpecError if the card does not hold it."""
        if name not in self.parameters:
            raise SpecError(f"prior card {self.name!r} has no parameter {name!r}")
        return self.parameters[name]

    @classmethod
    def load(cls, name: str) -> Self:
        """Read a card by its name, or from a path that ends in .toml."""
        card = load_prior(name)
        assert isinstance(card, cls)
        return card

    @property
    def log_reference(self) -> dict[str, float]:
        """Natural logs of the reference: log_n_active, log_sparsity, log_tokens."""
        log_n_active = math.log(self.reference["n_active"])
        return {
            "log_n_active": log_n_active,
            "log_sparsity": log_n_active - math.log(self.reference["n_total"]),
            "log_tokens": math.log(self.reference["tokens"]),
        }

    def log_loss_part(self, by: str, log_value: Any) -> Any:
        """Log of the median of what more ``n_active`` or ``tokens`` would remove of the loss, at
        natural logs of either: the card's value at its reference, carried by its median exponent.
        """
        part, exponent = self[f"loss_{by}"].location, self[f"loss_exponent_{by}"].location
        return math.log(part) - exponent * (log_value - math.log(self.reference[by]))


# Column of the run table that says whether runs are those that a card holds for, by the card's key.
_HELD = {
    "parametrization": "parametrization", "optimizer": "optimizer", "schedule": "schedule",
    "parameters": "param_convention",
}  # fmt: skip

# Every parameter that the valley model needs, in the order of a card.
PARAMETERS: dict[str, str] = {
    "lr_intercept": "ln LR* at the reference scale and its best batch",
    "lr_n_active": "exponent of LR* in active parameters, at fixed sparsity and at the best batch",
    "lr_sparsity": "exponent of LR* in n_active / n_total at fixed n_active",
    "lr_tokens": "exponent of LR* in tokens, at the best batch",
    "lr_batch_below": "exponent of LR* in batch, far below the best batch",
    "lr_batch_above": "exponent of LR* in batch, far above the best batch",
    "lr_unannealed": "shift of ln LR* when the loss is read off before the LR has decayed",
    "lr_family_sd": "recipe-to-recipe sd of ln LR*",
    "lr_slope_family_sd": "recipe-to-recipe sd of the exponents of LR*",
    "lr_tokens_shape_sd": "sd of the exponent of LR* in tokens between shapes of a family",
    "lr_shape_sd": "sd of ln LR* peculiar to a shape",
    "lr_cell_sd": "sd of ln LR* peculiar to a cell",
    "lr_slice_sd": "sd of ln LR* peculiar to a slice",
    "best_batch_intercept": "ln best batch (tokens) at the reference scale",
    "best_batch_n_active": "exponent of the best batch in active parameters",
    "best_batch_tokens": "exponent of the best batch in tokens",
    "best_batch_family_sd": "recipe-to-recipe sd of ln best batch",
    "best_batch_cell_sd": "sd of ln best batch peculiar to a cell",
    "curvature_intercept": "valley curvature at the reference scale",
    "curvature_n_active": "exponent of the curvature in active parameters",
    "curvature_tokens": "exponent of the curvature in tokens",
    "curvature_batch": "exponent of the curvature in batch (over the best one for a card alone)",
    "curvature_family_sd": "recipe-to-recipe sd of the log curvature",
    "curvature_slice_sd": "sd of the log curvature peculiar to a slice",
    "skew": "third derivative of the valley over its curvature: the high-LR side is steeper",
    "skew_family_sd": "recipe-to-recipe sd of the log skew",
    "edge_offset": "distance of the divergence edge above LR*, at the best batch",
    "edge_family_sd": "recipe-to-recipe sd of the log distance of the edge",
    "edge_batch": "share of the batch effect on LR* that moves the edge too",
    "edge_width": "width of the divergence edge",
    "diverged_loss": "most that a run is charged for its LR, and for training it again if diverged",
    "loss_irreducible": "loss that neither parameters nor tokens remove",
    "loss_n_active": "loss that more parameters would remove, at the reference (fit: the centre)",
    "loss_tokens": "loss that more tokens would remove, at the reference (fit: the centre)",
    "loss_exponent_n_active": "exponent of the loss in active parameters",
    "loss_exponent_tokens": "exponent of the loss in tokens",
    "loss_unannealed": "loss above the floor before the LR has decayed",
    "loss_shape_sd": "sd of the floor peculiar to a shape",
    "loss_cell_sd": "sd of the floor peculiar to a cell",
    "loss_slice_sd": "sd of the floor peculiar to a slice",
    "penalty_scale": "curvature of the floor in ln(batch / best batch)",
    "penalty_skew": "skew of the floor in ln(batch / best batch): large batches cost more",
    "penalty_tokens": "exponent of the batch penalty in tokens",
    "noise_sd": "seed noise of a final loss",
    "noise_share": "misfit of the valley as a share of the excess",
    "noise_batch": "exponent of the noise in batch",
    "noise_tokens": "exponent of the noise in tokens",
    "noise_side": "log of the noise far above LR* over that near it",
    "noise_run": "noise that decay branches of one run share, over that of each",
    "noise_order": "noise that runs of a slice on one data order share, over that of each",
    "noise_dof": "degrees of freedom of the noise, above one",
    "covariate_shift": "fall of ln LR* with the log of a covariate (weight decay, LR multiplier)",
    "covariate_optimum": "log of a covariate's best value over the reference, mean of the data",
    "covariate_n_active": "exponent of a covariate's best value in active parameters",
    "covariate_curvature": "curvature of the floor in the log of a covariate",
}

# Priors that are normal: of intercepts in logs, exponents and shares, which may have either sign.
# All others are lognormal: the model samples their logs, and takes them for sds and sizes.
NORMAL = (
    "lr_intercept", "lr_n_active", "lr_sparsity", "lr_tokens", "lr_batch_below", "lr_batch_above",
    "lr_unannealed", "best_batch_intercept", "best_batch_n_active", "best_batch_tokens",
    "curvature_n_active", "curvature_tokens", "curvature_batch", "edge_batch", "penalty_tokens",
    "noise_batch", "noise_tokens", "noise_side",
    "covariate_shift", "covariate_optimum", "covariate_n_active",
)  # fmt: skip

# Exponents that differ between families by ``lr_slope_family_sd``.
SLOPES = ("lr_n_active", "lr_sparsity", "lr_tokens", "lr_batch_below", "lr_batch_above")

# Drawn once a family, from the card, independently: losses of two families are not comparable.
PER_FAMILY = (
    "loss_n_active", "loss_tokens", "loss_exponent_n_active", "loss_exponent_tokens",
    "penalty_scale", "noise_sd", "noise_batch", "noise_tokens", "noise_side",
)  # fmt: skip

# Drawn once a family and covariate, from the card, independently; only where one varies.
PER_COVARIATE = (
    "covariate_shift", "covariate_optimum", "covariate_n_active", "covariate_curvature",
)  # fmt: skip

# What the posterior keeps beyond the parameters of the card, and the index of each.
OUTPUTS = {
    "lr_level": ("family",),
    "best_batch_level": ("family",),
    "log_curvature_level": ("family",),
    "log_skew": ("family",),
    "log_edge_offset": ("family",),
    "loss_level": ("family",),
    "family_slope": ("family", "slope"),
    "lr_shape": ("shape",),
    "lr_tokens_shape": ("shape",),
    "loss_shape": ("shape",),
    "best_batch": ("cell",),
    "lr_cell": ("cell",),
    "loss_cell": ("cell",),
    "lr_opt": ("slice",),
    "log_curvature": ("slice",),
    "floor": ("slice",),
    "shared_noise": ("shared",),
    **dict.fromkeys(PER_FAMILY, ("family",)),
    **dict.fromkeys(PER_COVARIATE, ("family", "covariate")),
}


def _folder() -> Path:
    """Folder of the shipped cards: in the wheel, else in the checkout beside pyproject.toml."""
    installed = Path(str(files("bayeslr"))) / "_priors"
    if installed.is_dir():
        return installed
    checkout = Path(str(files("bayeslr"))).parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "priors").is_dir():
        return checkout / "priors"
    raise SpecError("the prior cards are missing from this installation; reinstall bayeslr")


def list_priors() -> list[str]:
    """Names of the shipped cards, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def as_prior(prior: str | Path | Prior) -> Prior:
    """A card as it is, or by its name or path. Raises: SpecError for anything else."""
    return prior if isinstance(prior, Prior) else load_prior(prior)


def load_prior(name: str | Path) -> Prior:
    """Read a shipped card by name, or any card by a path that ends in .toml.

    Raises: SpecError if it does not exist or breaks a rule.
    """
    if not isinstance(name, str | Path):
        raise SpecError(
            f"a prior card is given by its name or its path, got {type(name).__name__}; the "
            f"shipped cards are {', '.join(list_priors())}"
        )
    path = Path(name) if str(name).endswith(".toml") else _folder() / f"{name}.toml"
    return _parse(path, seen=())


def _parse(path: Path, seen: tuple[Path, ...]) -> Prior:
    where = f"prior card {path.stem!r}"
    try:
        text = path.read_bytes()
        raw = tomllib.loads(text.decode("utf-8"))
    except FileNotFoundError as error:
        shipped = f"the shipped cards are {', '.join(list_priors())}"
        if path.parent != _folder():
            raise SpecError(f"prior card {path} does not exist; {shipped}") from error
        raise SpecError(f"no {where}; {shipped}") from error
    except IsADirectoryError as error:
        raise SpecError(f"prior card {path} is a folder; name the .toml file in it") from error
    except OSError as error:
        raise SpecError(f"prior card {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{where} is not valid TOML: {error}") from error
    allowed = {"name", "title", "date", "extends", "holds_for", "reference", "parameters"}
    if unknown := sorted(set(raw) - allowed):
        raise SpecError(
            f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}"
        )
    digest = hashlib.sha256(text)
    base: Prior | None = None
    if "extends" in raw:
        if path in seen:
            raise SpecError(f"{where} extends itself through {[p.stem for p in seen]}")
        sibling = path.with_name(f"{raw['extends']}.toml")
        parent = sibling if sibling.is_file() else _folder() / f"{raw['extends']}.toml"
        base = _parse(parent, (*seen, path))
        digest.update(base.sha256.encode())
    parameters = dict(base.parameters) if base else {}
    for table in ("parameters", "reference", "holds_for"):
        if not isinstance(raw.get(table, {}), Mapping):
            raise SpecError(f"{where}: {table} must be a table, got {raw[table]!r}")
    for name, entry in raw.get("parameters", {}).items():
        parameters[name] = _distribution(name, entry, where)
    if missing := [name for name in PARAMETERS if name not in parameters]:
        raise SpecError(f"{where}: parameter {missing[0]!r} is missing ({PARAMETERS[missing[0]]})")
    reference = {**(base.reference if base else {}), **raw.get("reference", {})}
    for key in REFERENCE_KEYS:
        if not 0 < _number(reference.get(key, 0.0), f"{where}, [reference]: {key}") < math.inf:
            raise SpecError(
                f"{where}, [reference]: {key} must be finite and > 0, got {reference.get(key)!r}"
            )
    if reference["n_active"] > reference["n_total"]:
        raise SpecError(
            f"{where}, [reference]: n_active ({reference['n_active']:g}) must not exceed n_total "
            f"({reference['n_total']:g}); a card for dense models has both equal"
        )
    return Prior(
        name=raw.get("name", path.stem),
        title=raw.get("title", ""),
        date=str(raw.get("date", "")),
        holds_for={**(base.holds_for if base else {}), **raw.get("holds_for", {})},
        reference={key: float(reference[key]) for key in REFERENCE_KEYS},
        parameters={name: parameters[name] for name in PARAMETERS},
        sha256=digest.hexdigest(),
        extends=raw.get("extends"),
        path=path,
    )


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"{where} must be a number, got {value!r}")
    return float(value)


def _distribution(name: str, entry: Any, where: str) -> Distribution:
    where = f"{where}, parameter {name!r}"
    if name not in PARAMETERS:
        raise SpecError(f"{where}: the model has no such parameter")
    if not isinstance(entry, Mapping):
        raise SpecError(f"{where} must be a table with a distribution, got {entry!r}")
    kind = "normal" if name in NORMAL else "lognormal"
    keys = _SHAPE_KEYS[kind]
    if entry.get("distribution") != kind:
        sign = "may have either sign" if kind == "normal" else "is positive and used in logs"
        raise SpecError(
            f"{where}: distribution must be {kind}, got {entry.get('distribution')!r}; "
            f"it {sign}: give {keys[0]} and {keys[1]}"
        )
    if unknown := sorted(set(entry) - {"distribution", *keys, *_TEXT_KEYS}):
        raise SpecError(f"{where}: unknown key {unknown[0]!r}; a {kind} takes {keys[0]}, {keys[1]}")
    for key in (*keys, "unit", "source"):
        if key not in entry:
            raise SpecError(f"{where}: {key} is missing; each value names its unit and its source")
    location, scale = (_number(entry[key], f"{where}: {key}") for key in keys)
    if not (math.isfinite(location) and math.isfinite(scale) and scale > 0):
        raise SpecError(f"{where}: {keys[1]} must be > 0 and both finite, got {location}, {scale}")
    if kind == "lognormal" and location <= 0:
        raise SpecError(f"{where}: the median of a lognormal must be > 0, got {location}")
    return Distribution(
        name=name, kind=kind, location=location, scale=scale,
        unit=entry["unit"], source=entry["source"], why=entry.get("why", ""),
    )  # fmt: skip
