"""The recipe of a comparison: two paradigms, the same targets, one budget for either's proxies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayeslr.errors import SpecError
from bayeslr.loop import find_recipe, resolve_paths
from bayeslr.specs import (
    MODULE_GROUPS,
    LrGrid,
    Recipe,
    Space,
    check_keys,
    make_spec,
    parse_recipe,
    read_recipe_file,
)
from bayeslr.units import parse_count, parse_quantity

TABLES = ("compare", "fitting", "transfer", "targets", "run", "options")
_COMPARE_KEYS = (
    "name", "runner", "proxy_flops", "seed", "workers", "num_seeds", "multiples",
)  # fmt: skip
_FITTING_KEYS = ("parametrization", "prior", "space", "start_runs", "batch_runs", "options")
_TRANSFER_KEYS = (
    "parametrization", "prior", "law_prior", "base_shape", "tokens", "batch_tokens", "lr", "rungs",
    "modules", "options",
)  # fmt: skip
_MODULE_KEYS = ("groups", "factors", "rounds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Modules:
    """Search for the LR multipliers of module groups, one group after the other.

    Each of ``factors`` is tried on each of ``groups`` in turn, on top of what was best so far;
    ``rounds`` times over, as far as the budget reaches.
    """

    groups: tuple[str, ...]
    factors: tuple[float, ...] = (0.5, 2.0)
    rounds: int = 1

    def __post_init__(self) -> None:
        if not self.groups or len(set(self.groups)) < len(self.groups):
            raise SpecError(
                f"[transfer.modules] groups must be different module groups, got {self.groups}"
            )
        for group in self.groups:
            if group not in MODULE_GROUPS:
                raise SpecError(
                    f"[transfer.modules] groups must be a list of {', '.join(MODULE_GROUPS)}, got "
                    f"{group!r}"
                )
        if not self.factors or any(not f > 0 or f == 1 for f in self.factors):
            raise SpecError(
                "[transfer.modules] factors must be > 0 and not 1 (what was best so far is in the "
                f"race anyway), got {self.factors}"
            )
        if self.rounds < 1:
            raise SpecError(f"[transfer.modules] rounds must be >= 1, got {self.rounds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareRecipe:
    """What to compare. ``fitting`` and ``transfer`` are the recipes of the proxies of either.

    ``transfer.space.shapes`` holds the base shape first, then the rungs: larger shapes under the
    same rules, which tell whether the LR stays put. ``law_prior`` is the card of the law that the
    transferred LR is weighed against. Held-out runs are trained at ``multiples`` of the chosen LR,
    each with ``num_seeds`` seeds.
    """

    name: str
    proxy_flops: float
    fitting: Recipe
    transfer: Recipe
    law_prior: str = "moe-default"
    modules: Modules | None = None
    num_seeds: int = 3
    multiples: tuple[float, ...] = (0.5, 1.0, 2.0)
    document: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise SpecError(f"[compare] num_seeds must be >= 1, got {self.num_seeds}")
        if any(not m > 0 for m in self.multiples) or 1.0 not in self.multiples:
            raise SpecError(
                "[compare] multiples must be > 0 and hold 1, the chosen LR itself, "
                f"got {self.multiples}"
            )
        names = [str(target["target_id"]) for target in self.fitting.targets]
        if len(set(names)) < len(names):
            raise SpecError(f"each of [[targets]] needs a target_id of its own, got {names}")
        if self.modules is not None and "lr_multipliers" in self.transfer.options:
            raise SpecError(
                "lr_multipliers cannot be given beside [transfer.modules], which searches them"
            )
        if any("shape" not in target for target in self.fitting.targets):
            raise SpecError("each of [[targets]] needs a shape, so that it can be trained")
        self._check_one_valley()

    def _check_one_valley(self) -> None:
        """Under one parametrisation both paradigms choose an LR of one valley: of one base."""
        both = (self.fitting, self.transfer)
        kinds = {recipe.run["parametrization"] for recipe in both}
        if len(kinds) > 1 or kinds == {"sp"}:
            return
        for name in ("base_shape", "base_tokens", "base_batch_tokens"):
            fitting, transfer = (_nameless(recipe.options.get(name)) for recipe in both)
            if fitting != transfer:
                raise SpecError(
                    f"[fitting] and [transfer] are both under {kinds.pop()!r}, but {name} is "
                    f"{fitting} and {transfer}, so an LR of one is another LR of the other; set "
                    f"{name} in [fitting.options] to that of [transfer]"
                )

    @property
    def seed(self) -> int:
        """Seed of fits and designs. Proxies of transfer count theirs up from it, held-out runs from
        far above it.
        """
        return self.fitting.seed

    @property
    def workers(self) -> int:
        """Runs at a time."""
        return self.fitting.workers

    @property
    def rungs(self) -> tuple[Mapping[str, Any], ...]:
        """Larger shapes under the rules of the transfer."""
        return self.transfer.space.shapes[1:]


def load_compare_recipe(path: str | Path) -> CompareRecipe:
    """Read a recipe from a TOML file or by the name of a shipped one. Raises: SpecError."""
    found = find_recipe(path)
    raw = read_recipe_file(found)
    if "sweep" in raw and "compare" not in raw:
        raise SpecError(
            f"recipe {found} is that of a sweep, not of a comparison: bayeslr sweep {path}"
        )
    if "options" in raw:
        raw["options"] = resolve_paths(raw["options"], found.parent.absolute())
    return parse_compare_recipe(raw, where=f"recipe {found}")


def parse_compare_recipe(raw: Mapping[str, Any], where: str = "recipe") -> CompareRecipe:
    """Recipe from the parsed document.

    Tables: ``[compare]``, ``[fitting]`` with ``[fitting.space]``, ``[transfer]`` with
    ``[transfer.lr]`` and optionally ``[transfer.modules]``, ``[[targets]]``, ``[run]`` and
    ``[options]``, which hold for every run. Raises: SpecError on an unknown key, a missing one, or
    a value that breaks a rule.
    """
    check_keys(raw, TABLES, where)
    for table in ("compare", "fitting", "transfer", "targets"):
        if table not in raw:
            raise SpecError(f"{where}: [{table}] is missing")
    raw = {**raw, "targets": [_named(t, i) for i, t in enumerate(raw["targets"], 1)]}
    head, fitting, transfer = (dict(raw[name]) for name in ("compare", "fitting", "transfer"))
    check_keys(head, _COMPARE_KEYS, f"{where}, [compare]")
    check_keys(fitting, _FITTING_KEYS, f"{where}, [fitting]")
    check_keys(transfer, _TRANSFER_KEYS, f"{where}, [transfer]")
    try:
        proxy_flops = parse_quantity(head["proxy_flops"], name="proxy_flops")
        common = {
            "runner": head["runner"],
            "budget_flops": proxy_flops,
            "seed": head.get("seed", 1),
            "workers": head.get("workers", 1),
            "stop_rule": False,
        }
        modules = transfer.get("modules")
        return CompareRecipe(
            name=head["name"],
            proxy_flops=proxy_flops,
            num_seeds=head.get("num_seeds", 3),
            multiples=tuple(float(m) for m in head.get("multiples", (0.5, 1.0, 2.0))),
            fitting=_fitting_recipe(head["name"], fitting, raw, common, where),
            transfer=_transfer_recipe(head["name"], transfer, raw, common, where),
            law_prior=str(transfer.get("law_prior") or fitting.get("prior", "moe-default")),
            modules=None if modules is None else _modules(modules, where),
            document=raw,
        )
    except KeyError as error:
        raise SpecError(f"{where}: key {error.args[0]!r} is missing") from error
    except TypeError as error:
        raise SpecError(f"{where}: {error}") from error


def _fitting_recipe(
    name: str, table: Mapping[str, Any], raw: Mapping[str, Any], common: Mapping[str, Any],
    where: str,
) -> Recipe:  # fmt: skip
    parametrization = table.get("parametrization", "sp")
    sweep = {
        **common,
        "name": f"{name}.fitting",
        "family": f"{name} {parametrization}",
        **{key: table[key] for key in ("prior", "start_runs", "batch_runs") if key in table},
    }
    document = {
        "sweep": sweep,
        "space": table["space"],
        "targets": raw["targets"],
        "run": {**raw.get("run", {}), "parametrization": parametrization},
        "options": {**raw.get("options", {}), **table.get("options", {})},
    }
    return parse_recipe(document, where=f"{where}, [fitting]")


def _transfer_recipe(
    name: str, table: Mapping[str, Any], raw: Mapping[str, Any], common: Mapping[str, Any],
    where: str,
) -> Recipe:  # fmt: skip
    parametrization, base = table["parametrization"], dict(table["base_shape"])
    base.setdefault("name", "base")
    tokens = parse_count(table["tokens"], name="[transfer] tokens")
    batch_tokens = parse_count(table["batch_tokens"], name="[transfer] batch_tokens")
    options = {
        **raw.get("options", {}),
        "base_shape": base,
        "base_tokens": tokens,
        "base_batch_tokens": batch_tokens,
        **table.get("options", {}),
    }
    return Recipe(
        **common,
        name=f"{name}.transfer",
        family=f"{name} {parametrization}",
        prior=table.get("prior", "transfer"),
        space=Space(
            lr=make_spec(LrGrid, table["lr"], f"{where}, [transfer.lr]"),
            tokens=(tokens,),
            batch_tokens=(batch_tokens,),
            shapes=(base, *(dict(shape) for shape in table.get("rungs", ()))),
        ),
        targets=tuple(dict(target) for target in raw["targets"]),
        run={**raw.get("run", {}), "parametrization": parametrization},
        options=options,
    )


def _named(target: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {"target_id": f"target{number}", **target}


def _nameless(value: Any) -> Any:
    """A shape without its name; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    return {key: one for key, one in value.items() if key != "name"}


def _modules(table: Mapping[str, Any], where: str) -> Modules:
    check_keys(table, _MODULE_KEYS, f"{where}, [transfer.modules]")
    given = dict(table)
    given["groups"] = tuple(given["groups"])
    if "factors" in given:
        given["factors"] = tuple(float(f) for f in given["factors"])
    return Modules(**given)


def with_seed(recipe: CompareRecipe, seed: int) -> CompareRecipe:
    """The same recipe with another seed."""
    document = {**recipe.document, "compare": {**recipe.document["compare"], "seed": seed}}
    return dataclasses.replace(
        recipe,
        fitting=dataclasses.replace(recipe.fitting, seed=seed),
        transfer=dataclasses.replace(recipe.transfer, seed=seed),
        document=document,
    )
