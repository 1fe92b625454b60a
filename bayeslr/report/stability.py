"""How the runs trained: what the trainer recorded by tokens, and how near the edge each run was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr import pointwise
from bayeslr.features import usable_rows
from bayeslr.predict import EDGE_QUANTILES
from bayeslr.report import figures
from bayeslr.report.text import edge_text, octaves_interval, octaves_text
from bayeslr.runs import SHAPE_KEYS, horizon, lr_group
from bayeslr.runs.diagnostics import DIAGNOSTICS, OF_THE_TRUNK, read_diagnostics
from bayeslr.units import counted, format_lr, format_quantity

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from bayeslr.features import Design
    from bayeslr.posterior import Posterior

    FloatArray = NDArray[np.float64]

# What can be told apart: shapes beside each other, lines in one frame, rows of a table.
MAX_SHAPES, MAX_LINES, MAX_ROWS = 3, 24, 200
_NUM_DRAWS = 1000

# Title, what it means, whether the axis is logarithmic; of layers the largest is drawn.
_BY_SHAPE = {
    "grad_norm": ("Gradient norm", "before clipping, before the decay", True),
    "max_attention_logit": ("Largest attention logit", "over layers", True),
    "activation_rms": ("RMS of activations", "of the layer where it is largest", True),
    "representation_change": (
        "Change of the representation",
        "since initialisation, relative; of order one at every width where features are learnt",
        True,
    ),
    "effective_rank": ("Effective rank", "of what the head reads", False),
    "router_entropy_min": ("Router entropy, nats", "of the layer where it is least", False),
    "max_load": ("Largest load of an expert", "1 is even", True),
    "spike_height": ("Highest loss spike so far, nats", "above the level before it", False),
}
_BY_MODULE = {
    "update_ratio": ("Update over weight", "RMS of a step, before the decay", True),
    "update_alignment": (
        "Alignment of updates",
        "log alignment ratio of a step with what the matrices read; dashed: full (1), random (1/2)",
        False,
    ),
}
_FIRST = ("grad_norm", "max_attention_logit", "activation_rms", "representation_change")
_REFERENCES = {"update_alignment": (0.5, 1.0)}


@dataclass(frozen=True, kw_only=True)
class Course:
    """What was recorded of one run, by tokens (record,).

    values: numbers of each record by flat name. before_decay: where the LR had not decayed.
    """

    run_id: str
    shape: tuple[Any, ...]
    lr: float
    diverged: bool
    tokens: FloatArray
    values: tuple[dict[str, float], ...]
    before_decay: NDArray[np.bool_]

    def line(self, name: str, colour: int) -> figures.Course | None:
        """One quantity against tokens; None if it was never recorded.

        The decay branches that the run left behind are left out. Of a quantity by layer, the
        largest.
        """
        at = [i for i, one in enumerate(self.values) if _value(one, name) is not None]
        own = [i for i in at if self.before_decay[i]]
        if not (own and name.startswith(OF_THE_TRUNK)):
            own = [i for i in at if self.before_decay[i] or i == len(self.values) - 1]
        if not own:
            return None
        found = np.array([_value(self.values[i], name) for i in own], dtype=np.float64)
        return figures.Course(self.tokens[own], found, colour, self.diverged)


def _value(values: dict[str, float], name: str) -> float | None:
    parts = [values[key] for key in values if key == name or key.startswith(f"{name}.layer ")]
    return max(parts, default=None)


def courses(frame: pd.DataFrame) -> list[Course]:
    """Every run of a run table whose rows hold diagnostics, by LR."""
    if DIAGNOSTICS not in frame:
        return []
    read = frame[DIAGNOSTICS].map(read_diagnostics)
    kept = frame.loc[read.map(bool)].sort_values("tokens", kind="stable")
    found = []
    for run_id, rows in kept.groupby("run_id", sort=False):
        first = rows.iloc[0]
        found.append(
            Course(
                run_id=str(run_id),
                shape=tuple(_sortable(first[key]) for key in SHAPE_KEYS),
                lr=float(first["lr"]),
                diverged=bool((rows["status"] == "diverged").any()),
                tokens=rows["tokens"].to_numpy(dtype=np.float64),
                values=tuple(read[rows.index]),
                before_decay=(rows["status"] != "ok").to_numpy(),
            )
        )
    return sorted(found, key=lambda one: one.lr)


def _sortable(value: Any) -> Any:
    return 0.0 if isinstance(value, float) and math.isnan(value) else value


def training(posterior: Posterior, log_edge: FloatArray | None) -> dict[str, Any] | None:
    """The section's figures, sentences and table; None where nothing is known of the runs.

    log_edge: as `slice_edges` gives it.
    """
    design = posterior.design
    if posterior.runs is None or design is None:
        return None
    frame = posterior.runs.frame
    recorded = courses(frame)
    away = None  # octaves of each run below the edge, (quantile, run)
    if log_edge is not None:
        away = octaves_below(posterior, log_edge)
    if not recorded and away is None:
        return None
    first, more = _figures(recorded)
    legend = lr_colours([one.lr for one in recorded])[1] if recorded else []
    rows, headers, note = _rows(posterior, recorded, away)
    return {
        "lead": _lead(recorded, frame),
        "edge": _edge_sentence(design, away) if away is not None else "",
        "legend": [
            *legend,
            *([("diverged", "diverged there")] if any(c.diverged for c in recorded) else []),
        ],
        "figures": first,
        "more": more,
        "rows": rows,
        "headers": headers,
        "note": note,
    }


def slice_edges(posterior: Posterior) -> FloatArray | None:
    """Quantiles (quantile, slice) of ln LR of the divergence edge; None if the fit has none."""
    design = posterior.design
    if design is None or "log_edge_offset" not in posterior.draws:
        return None
    draws = posterior.thinned(_NUM_DRAWS)
    log_edge = pointwise.log_edge(posterior, np.arange(design.num_slices), draws)
    return np.asarray(np.quantile(log_edge, EDGE_QUANTILES, axis=0))


def octaves_below(posterior: Posterior, log_edge: FloatArray) -> FloatArray:
    """Quantiles (quantile, run) of the octaves from each run's LR up to its slice's edge."""
    design = posterior.design
    assert design is not None
    below = log_edge[:, design.slice_of_run] - design.log_lr
    off = np.flatnonzero(~design.at_reference)
    if len(off):  # part of what stands for their LR is in the covariates
        draws = posterior.thinned(_NUM_DRAWS)
        logit = pointwise.run_draws(posterior, off, draws).logit
        own = -logit * posterior.flat("edge_width")[draws][:, None]
        below[:, off] = np.quantile(own, EDGE_QUANTILES, axis=0)
    return np.asarray(below / math.log(2.0))


def lr_colours(lr: Sequence[float]) -> tuple[list[int], list[tuple[Any, str]]]:
    """Colour of each LR, low to high, and the legend: an entry an LR, or a range if many."""
    values = np.asarray(lr, dtype=np.float64)
    group = lr_group(values)
    count = int(group.max()) + 1
    if count > len(figures.RAMP):
        low, high = np.log(values.min()), np.log(values.max())
        share = (np.log(values) - low) / (high - low)
        group = np.minimum((share * len(figures.RAMP)).astype(int), len(figures.RAMP) - 1)
        count = len(figures.RAMP)
    step = (len(figures.RAMP) - 1) / max(count - 1, 1)
    colours = [round(step * int(g)) for g in group]
    entries: list[tuple[Any, str]] = []
    for g in range(count):
        mine = values[group == g]
        if len(mine):
            ends = dict.fromkeys((format_lr(mine.min()), format_lr(mine.max())))
            style = {"name": f"ramp{round(step * g) + 1}", "dash": ""}
            entries.append((style, f"LR {' – '.join(ends)}"))
    return colours, entries


def _figures(recorded: Sequence[Course]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Figures to see at once, and those for who wants more."""
    if not recorded:
        return [], []
    colour = dict(
        zip((one.run_id for one in recorded), lr_colours([c.lr for c in recorded])[0], strict=True)
    )
    shapes = sorted({one.shape for one in recorded})
    chosen = [shapes[i] for i in _evenly(len(shapes), MAX_SHAPES)]
    by_shape = {shape: [one for one in recorded if one.shape == shape] for shape in chosen}
    several = len({shape[0] for shape in shapes}) > 1
    first: list[dict[str, str]] = []
    more: list[dict[str, str]] = []
    for name in _BY_SHAPE:
        facets = [
            (_shape_title(shape, several), _lines(of_shape, name, colour))
            for shape, of_shape in by_shape.items()
        ]
        if any(lines for _, lines in facets) and not _all_zero(facets):
            card = _card(name, *_BY_SHAPE[name], facets)
            (first if name in _FIRST else more).append(card)
    largest = max(chosen, key=lambda shape: (len(by_shape[shape]), shape))
    for name, words in _BY_MODULE.items():
        groups = dict.fromkeys(
            key.partition(".")[2] for one in by_shape[largest] for values in one.values
            for key in values if key.startswith(f"{name}.")
        )  # fmt: skip
        facets = [
            (group.replace("_", " "), _lines(by_shape[largest], f"{name}.{group}", colour))
            for group in groups
        ]
        if facets:
            title, meaning, log = words
            of = f"of the shape {_shape_title(largest, several)}"
            first.append(_card(name, title, f"{meaning}; {of}", log, facets))
    return first, more


def _evenly(count: int, at_most: int) -> list[int]:
    """Indices of ``at_most`` things out of so many, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, at_most))})


def _lines(of_shape: Sequence[Course], name: str, colour: dict[str, int]) -> list[figures.Course]:
    some = [of_shape[i] for i in _evenly(len(of_shape), MAX_LINES)]
    lines = (one.line(name, colour[one.run_id]) for one in some)
    return [line for line in lines if line is not None]


def _all_zero(facets: Sequence[tuple[str, Sequence[figures.Course]]]) -> bool:
    return not any(line.y.any() for _, lines in facets for line in lines)


def _shape_title(shape: tuple[Any, ...], several_families: bool) -> str:
    values = dict(zip(SHAPE_KEYS, shape, strict=True))
    title = format_quantity(values["n_active"])
    if values["n_total"] > values["n_active"]:
        title += f" of {format_quantity(values['n_total'])}"
    return f"{values['family']}, {title}" if several_families else title


def _card(
    name: str,
    title: str,
    meaning: str,
    log: bool,
    facets: Sequence[tuple[str, Sequence[figures.Course]]],
) -> dict[str, str]:
    lines = [line for _, of_facet in facets for line in of_facet]
    low, high = (f(line.y[np.isfinite(line.y)].tolist() for line in lines) for f in (min, max))
    return {
        "title": title,
        "caption": f"{meaning[:1].upper()}{meaning[1:]}.",
        "svg": figures.courses(
            f"course-{name}",
            facets=facets,
            log=log,
            references=_REFERENCES.get(name, ()),
            description=f"{title} against tokens, {counted(len(lines), 'line')} in "
            f"{counted(len(facets), 'frame')} ({', '.join(facet for facet, _ in facets)}): "
            f"{figures.short_number(min(low))} to {figures.short_number(max(high))}.",
        ),
    }


def _lead(recorded: Sequence[Course], frame: pd.DataFrame) -> str:
    if not recorded:
        return (
            "The run table holds no diagnostics, so nothing can be shown by tokens; what the runs "
            "and the fit say about divergence is in the table."
        )
    number = frame["run_id"].nunique()
    which = "every run" if number == len(recorded) else f"{len(recorded)} of {number} runs"
    text = (
        f"What the trainer recorded of {which}, by tokens. A line is a run, its colour the peak LR."
    )
    sizes = Counter(one.shape for one in recorded)
    if len(sizes) > MAX_SHAPES:
        text += (
            f" Frames show {MAX_SHAPES} of {len(sizes)} shapes, the smallest and the largest too."
        )
    if max(sizes.values()) > MAX_LINES:
        text += f" Of a shape's runs {MAX_LINES} are drawn, evenly over the LR."
    return text


def _edge_sentence(design: Design, away: FloatArray) -> str:
    ended = np.flatnonzero(pointwise.has_end(design) & ~design.diverged)
    if not len(ended):
        return ""
    near = ended[int(np.argmin(away[1, ended]))]
    text = (
        "At the divergence edge half of the runs diverge. Of those that ended, the nearest to it "
        f"had LR {format_lr(math.exp(design.log_lr[near]))}, {edge_text(*away[:, near].tolist())}."
    )
    if not design.diverged.any():
        text += " No run diverged: the runs only push the edge up, the rest is the prior card's."
    return text


def _rows(
    posterior: Posterior, recorded: Sequence[Course], away: FloatArray | None
) -> tuple[list[list[str]], list[tuple[str, str]], str]:
    """Table of the runs, the nearest to the edge first: cells, headers, what was left out."""
    design, runs = posterior.design, posterior.runs
    assert design is not None
    assert runs is not None
    frame = usable_rows(runs.frame)  # in the order of the design
    tokens = horizon(frame).tolist()
    last = {one.run_id: one.values[-1] for one in recorded}
    shown = {
        name: header for name, header in _COLUMNS.items()
        if any(_value(values, name) is not None for values in last.values())
    }  # fmt: skip
    near = np.arange(design.num_runs) if away is None else np.argsort(away[1], kind="stable")
    order = near[:MAX_ROWS]
    rows = []
    for i in order.tolist():
        row = frame.iloc[i]
        values = last.get(str(row["run_id"]), {})
        cells = [str(row["run_id"]), format_lr(row["lr"]), format_quantity(tokens[i])]
        cells.append(str(row["status"]))
        if away is not None:
            cells += [octaves_text(away[1, i]), octaves_interval(away[0, i], away[2, i])]
        for name in shown:
            value = _value(values, name)
            cells.append("-" if value is None else figures.short_number(value))
        rows.append(cells)
    headers = [("run", ""), ("LR", ""), ("tokens", ""), ("ended", "")]
    if away is not None:
        headers += [("octaves below", "the edge"), ("90 %", "interval")]
    note = f"The {MAX_ROWS} of {design.num_runs} runs" if len(rows) < design.num_runs else ""
    if note:
        note += " nearest to the edge." if away is not None else " that come first in the table."
    return rows, [*headers, *shown.values()], note


_COLUMNS = {
    "loss_spikes": ("loss spikes", ""),
    "spike_height": ("highest", "nats"),
    "spike_steps": ("longest", "steps"),
    "max_attention_logit": ("attention", "logit"),
    "representation_change": ("change of", "representation"),
    "effective_rank": ("effective", "rank"),
}
