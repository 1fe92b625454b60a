"""Verbs on transfer: show and check its rules, predict with a transferred LR and a law."""

from __future__ import annotations

import json as json_module
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslr.cli.model import (
    ActiveOption,
    BatchOption,
    FamilyOption,
    PredictionsOption,
    TargetsOption,
    TokensOption,
    TotalOption,
    echoed,
    wanted_targets,
    write_table,
)
from bayeslr.cli.words import key_values
from bayeslr.errors import SpecError
from bayeslr.runner_protocol import TransferRunner, find_entry_point
from bayeslr.units import format_lr, parse_count

if TYPE_CHECKING:
    from bayeslr.blend import Blend

transfer_app = typer.Typer(
    help="Transfer rules: what a shape gets at an LR tuned on another, and whether they hold.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
BASE = "d_model=64,n_layers=2,n_heads=4,d_expert=64,n_experts=4,top_k=2"
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Runner = Annotated[str, typer.Option(help="Runner that has the rules.")]
Parametrization = Annotated[
    str,
    typer.Option(help="sp, mup, completep, moe_fixed_sparsity or complete_mue."),
]
Base = Annotated[str, typer.Option(help="Shape at which the LR was tuned, as KEY=VALUE,...")]
OptionWords = Annotated[
    list[str] | None,
    typer.Option("--option", help="An option of the trainer, such as horizon_exponent=-0.3."),
]


@transfer_app.command()
def show(
    base: Base = BASE,
    target: Annotated[
        str,
        typer.Option(
            help="Shape to carry the LR to. What is left out is as in the base; n_heads and "
            "d_expert follow d_model. tokens and batch_tokens may stand in both."
        ),
    ] = "d_model=512,n_layers=16",
    parametrization: Parametrization = "completep",
    lr: Annotated[float | None, typer.Option(help="Base LR: print LRs instead of ratios.")] = None,
    option: OptionWords = None,
    runner: Runner = "moe",
    json: JsonOption = False,
) -> None:
    """Init, LR, weight decay, epsilon and output of every module group at a target shape."""
    at_base, at_target = point(base, "--base"), point(target, "--target")
    options = key_values(option or [], "--option")
    if "tokens" in at_base:
        options.setdefault("base_tokens", at_base["tokens"])
    rules = _transfer_runner(runner, options).transfer_rules(parametrization, at_base, at_target)
    if lr is not None and not lr > 0:
        raise SpecError(f"--lr must be > 0, got {lr:g}")
    typer.echo(json_module.dumps(rules) if json else "\n".join(_rule_lines(rules, lr)))


@transfer_app.command()
def check(
    out: Annotated[Path, typer.Option("--out", help="Folder for the plot and the numbers.")],
    axis: Annotated[
        str, typer.Option(help="width, depth, experts, sparsity or expert-width.")
    ] = "width",
    parametrization: Parametrization = "completep",
    base: Base = BASE,
    factor: Annotated[int, typer.Option(help="Largest size over the base's, power of 2.")] = 8,
    seeds: Annotated[int, typer.Option(help="Seeds to average over.")] = 3,
    bound: Annotated[float, typer.Option(help="Largest slope that passes.")] = 0.1,
    option: OptionWords = None,
    runner: Runner = "moe",
    json: JsonOption = False,
) -> None:
    """Train a few steps at several sizes: do activations move as much at each? Exit status 4: no.

    Prints the log-log slope of every module group's change; --out gets coordinates.svg and .json.
    """
    options = key_values(option or [], "--option")
    found = _transfer_runner(runner, options)
    words = [
        f"--axis={axis}", f"--parametrization={parametrization}", f"--factor={factor}",
        f"--seeds={seeds}", f"--bound={bound}", f"--out={out}",
        "--base", json_module.dumps(point(base, "--base")),
        "--options", json_module.dumps(options),
    ]  # fmt: skip
    # PyTorch and JAX never share a process: the rules' own one checks them.
    status = subprocess.run(
        found.check_command([*words, *(["--json"] if json else [])]), check=False
    ).returncode
    if status:
        raise typer.Exit(status if status > 0 else 1)
    if not json and sys.stdout.isatty():
        typer.echo(f"plot: {out / 'coordinates.svg'}")


@transfer_app.command()
def predict(
    runs: Annotated[list[Path], typer.Argument(help="Run tables.", show_default=False)],
    targets: TargetsOption = None,
    n_active: ActiveOption = None,
    n_total: TotalOption = None,
    tokens: TokensOption = None,
    batch_tokens: BatchOption = None,
    family: FamilyOption = None,
    card: Annotated[
        list[str] | None,
        typer.Option(help="Prior cards to weigh [default: transfer, moe-default]."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 1,
    out: PredictionsOption = None,
    json: JsonOption = False,
) -> None:
    """The LR at targets from a transferred LR and from a law, and both by what they foretold.

    The runs are fitted under each card, and once more without their largest shapes: cards count by
    the density that they gave to those optima. --out gets the blended predictions.
    """
    from bayeslr.blend import CARDS, blend
    from bayeslr.posterior import convention_of
    from bayeslr.runs import read_runs
    from bayeslr.runs.files import json_text

    table = read_runs(*runs)
    wanted = wanted_targets(
        targets, n_active=n_active, n_total=n_total, tokens=tokens, batch_tokens=batch_tokens,
        family=family, convention=convention_of(table),
    )  # fmt: skip
    cards = tuple(dict.fromkeys(card or CARDS))
    if len(cards) < 2:
        raise SpecError(f"--card: at least two cards are weighed, got {', '.join(cards)}")
    found = blend(table, wanted, cards=cards, seed=seed)
    if out is not None:
        write_table(found.predictions, out)
    if json:
        document = {
            "weights": found.weights, "scores": found.scores, "held_out": found.num_held_out,
            "doubted": found.doubted, "sentence": found.sentence,
            "verdicts": {name: str(p.info["verdict"]) for name, p in found.posteriors.items()},
            "alone": {name: one.to_dict("records") for name, one in found.alone.items()},
            "predictions": found.predictions.to_dict("records"),
        }  # fmt: skip
        typer.echo(json_text(document))
    else:
        if targets is None:
            typer.echo(echoed(wanted[0]))
        typer.echo("\n".join([*_blend_lines(found), found.sentence]))
        if out is not None:
            typer.echo(f"Predictions written to {out}")
    for name, posterior in found.posteriors.items():
        if not posterior.trustworthy:
            typer.echo(f"Warning: card {name}: {posterior.info['verdict']}", err=True)


def _blend_lines(found: Blend) -> list[str]:
    """Each card's prediction and the blended one, a line each, target by target."""
    tables = {**found.alone, "blended": found.predictions}
    names = found.predictions["target_id"].astype(str)
    first, second = (max(map(len, (*words, "target"))) for words in (names, tables))
    lines = [
        f"{'target':{first}s}  {'card':{second}s}  {'lr':>9s} {'5 %':>9s} {'50 %':>9s} "
        f"{'95 %':>9s} {'regret':>8s}"
    ]
    for i, name in enumerate(names):
        for card, table in tables.items():
            row = table.iloc[i]
            rates = " ".join(
                f"{format_lr(row[key]):>9s}" for key in ("lr", "lr_q05", "lr_q50", "lr_q95")
            )
            lines.append(f"{name:{first}s}  {card:{second}s}  {rates} {row['regret_mean']:8.4f}")
    return lines


def point(text: str, flag: str) -> dict[str, int]:
    """Counts from ``d_model=64,n_layers=2,tokens=1M``. Raises: SpecError that names the flag."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise SpecError(f"{flag}: expected KEY=VALUE,KEY=VALUE, got {part!r}, as in {BASE}")
        if key in found:
            raise SpecError(f"{flag}: key {key!r} stands twice")
        found[key] = 0 if value == "0" else parse_count(value, name=f"{flag}: {key}")
    return found


def _transfer_runner(name: str, options: Mapping[str, Any]) -> TransferRunner:
    runner = find_entry_point("bayeslr.runners", name)(options)
    if not isinstance(runner, TransferRunner):
        raise SpecError(f"runner {name!r} has no transfer rules; 'moe' has")
    return runner


def _rule_lines(rules: Mapping[str, Any], lr: float | None) -> list[str]:
    keys = [key for key in rules["target"] if key not in ("name", "n_active", "n_total")]
    changed = [
        f"{key} {rules['base'][key]} to {rules['target'][key]}"
        if rules["base"].get(key, rules["target"][key]) != rules["target"][key]
        else f"{key} {rules['target'][key]}"
        for key in keys
    ]
    lines = [
        f"{rules['parametrization']} ({rules['source']})",
        ", ".join(changed)
        + f"; {rules['target']['n_active']:,} active of {rules['target']['n_total']:,} parameters",
        "",
        f"{'group':12s} {'init std':>9s} {'at base':>9s} {'LR' if lr else 'LR x':>9s} "
        f"{'decay x':>9s} {'eps x':>9s} {'output x':>9s}",
    ]
    for group, rule in rules["groups"].items():
        rate = format_lr(lr * rule["lr"]) if lr else f"{rule['lr']:.4g}"
        stds = (rule["init_std"], rule["base_init_std"])
        first, at_base = ("gain 1", "gain 1") if "norm" in group else (f"{s:.4g}" for s in stds)
        lines.append(
            f"{group:12s} {first:>9s} {at_base:>9s} {rate:>9s} "
            f"{rule['weight_decay']:9.4g} {rule['eps']:9.4g} {rule['output']:9.4g}"
        )
    return [
        *lines,
        "",
        f"residual branches x {rules['residual']:.4g}; attention logits x "
        f"{rules['attention_scale']:.4g} (base {rules['base_attention_scale']:.4g}); gates "
        f"{rules['gates']}, routed sum x {rules['route_scale']:.4g}; 1 - beta x "
        f"{rules['one_minus_beta']:.4g}",
        "Weight decay is the coefficient of decay coupled to the LR, as in PyTorch's AdamW.",
    ]
