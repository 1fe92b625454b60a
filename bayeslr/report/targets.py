"""The planner's part of the report: targets, the choice of LR, and what another LR would cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr import predict
from bayeslr.covariates import covariate_table
from bayeslr.report import figures
from bayeslr.report.text import (
    edge_text,
    extrapolation_text,
    factor_text,
    interval_text,
    nats_text,
    octaves_interval,
    octaves_text,
    risk_text,
    scale_text,
    share_text,
)
from bayeslr.specs import Target
from bayeslr.units import format_lr

if TYPE_CHECKING:
    from bayeslr.posterior import Posterior

MULTIPLES = (0.25, 0.5, 2**-0.5, 1.0, 2**0.5, 2.0, 4.0)

# Beyond one spread of the data the law, not the runs, carries the prediction.
FAR = 1.0


def example_target(posterior: Posterior) -> Target:
    """A target for a report that was given none.

    Ten times the compute of the fit's largest run (parameters and tokens each by the root of ten),
    or the reference scale of the prior card where there are no runs.
    """
    design, prior = posterior.design, posterior.prior
    if design is None:
        return Target(
            target_id="reference of the card",
            n_active=prior.reference["n_active"],
            n_total=prior.reference["n_total"],
            tokens=prior.reference["tokens"],
            batch_tokens=_rounded(math.exp(prior["best_batch_intercept"].location)),
        )
    x = design.slice_features()
    largest = int(np.argmax(x["log_n_active"] + x["log_tokens"]))
    n_active = math.exp(x["log_n_active"][largest]) * math.sqrt(10)
    return Target(
        target_id="ten times the largest run",
        family=design.families[int(design.family_of_slice[largest])],
        n_active=_rounded(n_active),
        n_total=_rounded(n_active * math.exp(-x["log_sparsity"][largest])),
        tokens=_rounded(math.exp(x["log_tokens"][largest]) * math.sqrt(10)),
        batch_tokens=math.exp(x["log_batch"][largest]),
        param_convention=posterior.info["param_convention"] or "non_embedding",
    )


def _rounded(number: float) -> float:
    return float(f"{number:.2g}")


def target_rows(
    posterior: Posterior, targets: Sequence[Target], predictions: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], tuple[str, str]]:
    """Rows of the table of targets, and the LRs at both ends of its strips."""
    low = min(row["lr_q05"] for row in predictions) / 1.15
    high = max(row["lr_q95"] for row in predictions) * 1.15

    def place(lr: float) -> float:
        return round(2 + 172 * math.log(lr / low) / math.log(high / low), 1)

    rows = []
    for target, row in zip(targets, predictions, strict=True):
        strip = {q: place(row[f"lr_{q}"]) for q in ("q05", "q25", "q75", "q95")}
        rows.append(
            {
                "name": target.target_id,
                "scale": scale_text(target),
                "family_note": _family_note(target, row),
                "lr": format_lr(row["lr"]),
                "interval_50": interval_text(row["lr_q25"], row["lr_q75"]),
                "interval_90": interval_text(row["lr_q05"], row["lr_q95"]),
                "regret": nats_text(row["regret_mean"]),
                "regret_q95": nats_text(row["regret_q95"]),
                "extra_tokens": share_text(row["extra_tokens"]),
                "p_diverge": _risk(posterior, row["p_diverge"]),
                "edge": _edge(row),
                "extrapolation": extrapolation_text(row["extrapolation"]),
                "far": row["extrapolation"] > FAR,
                "strip": {**strip, "lr": min(max(place(row["lr"]), 0.0), 176.0)},
            }
        )
    return rows, (format_lr(low), format_lr(high))


def covariate_rows(posterior: Posterior, targets: Sequence[Target]) -> list[dict[str, str]]:
    """Rows of the table of what else was varied: its best value, and what that saves."""
    rows = []
    for row in covariate_table(posterior, targets).to_dict("records"):
        low, high = (f"{row[name]:.3g}" for name in ("best_q05", "best_q95"))
        rows.append(
            {
                "name": row["covariate"],
                "target": row["target_id"],
                "tried": f"{row['tried_low']:.3g} to {row['tried_high']:.3g}",
                "reference": f"{row['reference']:.3g}",
                "best": f"{low} to {high}",
                "value": f"{row['value']:.3g}",
                "gain": nats_text(max(row["gain_mean"], 0.0)),
                "extra_tokens": share_text(row["extra_tokens"]),
                "lr_factor": f"{row['lr_factor']:.2f}",
                "sentence": row["sentence"],
            }
        )
    return rows


def _family_note(target: Target, row: dict[str, Any]) -> str:
    if row["level"] == "family" or not math.isfinite(row["extrapolation"]):
        return ""
    why = "no family was named" if target.family is None else "a recipe without runs"
    return f"{why}: population level"


def _risk(posterior: Posterior, probability: float) -> str:
    # The two-stage estimator drops diverged runs and knows no edge.
    return "not modelled" if posterior.info["method"] == "two-stage" else risk_text(probability)


def _edge(row: dict[str, Any]) -> str:
    """Octaves from the recommended LR up to the divergence edge; empty where it is not known."""
    low, middle, high = (row[name] for name in predict.EDGE_COLUMNS)
    known = math.isfinite(middle)
    return f"{octaves_text(middle)} ({octaves_interval(low, high)})" if known else ""


def tiles(posterior: Posterior, row: dict[str, Any]) -> list[dict[str, str]]:
    """The numbers of one target, large."""
    far = row["extrapolation"]
    return [
        {
            "label": "Recommended peak LR",
            "value": format_lr(row["lr"]),
            "note": f"median of the optimum {format_lr(row['lr_q50'])}",
        },
        {
            "label": "50 % interval",
            "value": interval_text(row["lr_q25"], row["lr_q75"]),
            "note": factor_text(row["lr_q25"], row["lr_q75"]),
        },
        {
            "label": "90 % interval",
            "value": interval_text(row["lr_q05"], row["lr_q95"]),
            "note": factor_text(row["lr_q05"], row["lr_q95"]),
        },
        {
            "label": "Expected regret",
            "value": f"{nats_text(row['regret_mean'])} nats",
            "note": f"worth {share_text(row['extra_tokens'])} of the tokens; "
            f"95 % quantile {nats_text(row['regret_q95'])}",
        },
        {
            "label": "Risk of divergence",
            "value": _risk(posterior, row["p_diverge"]),
            "note": "at the recommended LR"
            + (
                f", {edge_text(*(row[name] for name in predict.EDGE_COLUMNS))}"
                if _edge(row)
                else ""
            ),
        },
        {
            "label": "Extrapolation",
            "value": extrapolation_text(far),
            "note": "from published laws alone"
            if not math.isfinite(far)
            else "the range of the runs"
            if far < predict.INSIDE
            else "times the runs' range beyond them",
        },
    ]


def choice(posterior: Posterior, target: Target, lr: float) -> dict[str, Any]:
    """What other LRs than the recommended one would cost at one target."""
    at = predict.target_draws(posterior, [target])
    rows = []
    for multiple in MULTIPLES:
        log_lr = np.log([multiple * lr])
        nats = predict.regret_draws(at, log_lr)[:, 0]
        extra = predict.extra_tokens_share(at, np.array([nats.mean()]))[0]
        risk = float(predict.p_diverge(at, log_lr).mean())
        rows.append(
            {
                "times": f"× {multiple:.2g}",
                "lr": format_lr(multiple * lr),
                "regret": nats_text(float(nats.mean())),
                "regret_q95": nats_text(float(np.quantile(nats, 0.95))),
                "extra_tokens": share_text(float(extra)),
                "p_diverge": _risk(posterior, risk),
                "chosen": multiple == 1.0,
            }
        )
    grid = lr * np.geomspace(1 / 5, 5, 81)
    curve = np.stack([predict.regret_draws(at, np.log([value]))[:, 0] for value in grid])
    risks = np.array([predict.p_diverge(at, np.log([value]))[:, 0].mean() for value in grid])
    half, double = rows[1]["regret"], rows[5]["regret"]
    knows_edge = bool(np.isfinite(at.log_edge).any())
    below = (
        " Below: probability that the run diverges; one that does has to be trained again, and is "
        "charged the nats that twice its tokens would have bought as well."
    )
    return {
        "target": f"{target.target_id} ({scale_text(target)})",
        "rows": rows,
        "svg": figures.regret(
            "choice",
            lr=grid,
            mean=curve.mean(axis=1),
            q05=np.quantile(curve, 0.05, axis=1),
            q95=np.quantile(curve, 0.95, axis=1),
            p_diverge=risks if knows_edge else None,
            choice=lr,
            description=f"Expected regret of each LR. It is least at {format_lr(lr)}; at half of "
            f"it {half} nats, at twice it {double} nats.",
        ),
        "caption": "Line: expected regret. Band: 90 % of the draws. Diamond: the recommended "
        "LR." + (below if knows_edge else ""),
    }
