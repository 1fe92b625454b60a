"""Figures of the report: plain arrays in, inline SVG out.

One drawing serves light, dark and printed pages: its colours are stand-ins that `to_svg` replaces
by the page's CSS variables. Text stays text, so that it can be read aloud, searched and selected.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from bayeslr.units import format_quantity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    Bands = Mapping[str, FloatArray]

INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
POSTERIOR, DATA, PRIOR, WARN = "#010207", "#010208", "#010209", "#01020a"
LAWS = ("#01020b", "#01020c", "#01020d", "#01020e", "#01020f", "#010210")
RAMP = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")  # low LR to high
LAW_DASHES = ((7, 2), (2, 2), (7, 2, 2, 2), (1, 1.5), (4, 1), (9, 4))
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", POSTERIOR: "--posterior",
    DATA: "--data", PRIOR: "--prior", WARN: "--warn",
    **{colour: f"--law{number}" for number, colour in enumerate(LAWS, 1)},
    **{colour: f"--ramp{number}" for number, colour in enumerate(RAMP, 1)},
}  # fmt: skip

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bayeslr",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.7,
}

# Points between ticks and label of a large figure's y axis: narrow screens have larger type.
_ROOM = 10


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many points; everything drawn inside has the report's style."""
    with mpl.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72)
        yield Figure(figsize=(width / 72, height / 72), layout=layout)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element whose ids start with ``name``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    # Coordinates to a hundredth of a point: half the size, and no eye can tell.
    svg = re.sub(r' (?:d|x|y|transform|points)="[^"]*"', _short_coordinates, svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    svg = svg.replace("'DejaVu Sans', sans-serif", "var(--sans)")
    svg = svg.replace("'DejaVu Sans'", "var(--sans)")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    label = html.escape(description, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _short_coordinates(attribute: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])


def short_number(value: float) -> str:
    """Two figures at most, as people write LRs: ``3e-4``, ``0.012``, ``1.5e-3``."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def log_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Round numbers between low and high, evenly spread in the logarithm, ``at_most`` of them."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    best: list[float] = []
    for steps in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    ):
        ticks = [step * 10.0**d for d in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(best) < len(ticks) <= at_most:
            best = ticks
    for every in (2, 3, 5):  # More decades than labels.
        if not best:
            best = [10.0**d for d in decades if d % every == 0 and low <= 10.0**d <= high]
            best = best if len(best) <= at_most else []
    return best


def log_axis(
    axis: Any, low: float, high: float, at_most: int, text: Callable[[float], str] = short_number
) -> None:
    """Ticks of a log axis at round numbers, ``at_most`` of them."""
    axis.set_major_locator(FixedLocator(log_ticks(low, high, at_most)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _draw_bands(axes: Any, x: FloatArray, bands: Bands) -> None:
    axes.fill_between(x, bands["q05"], bands["q95"], color=POSTERIOR, alpha=0.16, linewidth=0)
    axes.fill_between(x, bands["q25"], bands["q75"], color=POSTERIOR, alpha=0.30, linewidth=0)
    axes.plot(x, bands["q50"], color=POSTERIOR, linewidth=1.8)


def valley(
    name: str,
    *,
    lr: FloatArray,
    bands: Bands,
    run_lr: FloatArray,
    run_loss: FloatArray,
    diverged_lr: FloatArray,
    star: Mapping[str, float],
    description: str,
) -> str:
    """Loss against LR in one slice.

    ``bands`` are quantiles of the mean loss (lr,), in nats; ``star`` quantiles of LR*; either may
    be empty.
    """
    with drawing(285, 195) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        curves: list[FloatArray] = [run_loss, bands["q50"]] if bands else [run_loss]
        floor = min((float(np.min(curve)) for curve in curves if len(curve)), default=0.0)
        # The bottom is what decides: what lies far above it is drawn as an arrow at the top.
        span = (
            max(1.3 * (float(np.quantile(run_loss, 0.75)) - floor), 0.02) if len(run_loss) else 0.1
        )
        top = floor + span
        if star:
            axes.axvspan(star["q05"], star["q95"], color=POSTERIOR, alpha=0.10, linewidth=0)
            axes.axvline(star["q50"], color=POSTERIOR, linewidth=1, linestyle=(0, (4, 3)))
        if bands:
            _draw_bands(axes, lr, bands)
        dot: Any = {
            "color": DATA,
            "markersize": 4.8,
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.7,
        }
        inside = run_loss <= top
        axes.plot(run_lr[inside], run_loss[inside], "o", **dot)
        axes.plot(run_lr[~inside], np.full(int((~inside).sum()), top), "^", **dot)
        axes.plot(
            diverged_lr, np.full(len(diverged_lr), floor + 1.13 * span), "x",
            color=WARN, markersize=5.5, markeredgewidth=1.6, clip_on=False,
        )  # fmt: skip
        axes.set_ylim(floor - 0.14 * span, floor + 1.2 * span)
        axes.set_xlim(lr[0], lr[-1])
        log_axis(axes.xaxis, lr[0], lr[-1], 6)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y")
        axes.set_xlabel("peak LR")
        axes.set_ylabel("loss, nats")
        return to_svg(figure, name, description)


def scale(
    name: str,
    *,
    x: FloatArray,
    bands: Bands,
    points: Bands,
    data_range: tuple[float, float],
    laws: Sequence[tuple[str, FloatArray]],
    target: Mapping[str, float],
    xlabel: str,
    text: Callable[[float], str],
    description: str,
) -> str:
    """LR* against one regressor, the others as at the target.

    ``bands`` are prediction quantiles (x,); ``points`` hold ``x``, ``q05``, ``q50``, ``q95`` of the
    slices' optima; ``target`` holds ``x``, ``lr`` and the five quantiles. Outside ``data_range``
    the ground is hatched.
    """
    with drawing(430, 315) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        for start, end in ((x[0], data_range[0]), (data_range[1], x[-1])):
            if end > start * 1.001:
                axes.axvspan(start, end, facecolor="none", edgecolor=GRID, hatch="///", linewidth=0)
        _draw_bands(axes, x, bands)
        for (label, law), colour, dash in zip(laws, LAWS, LAW_DASHES, strict=False):
            axes.plot(x, law, color=colour, linewidth=1.2, linestyle=(0, dash), label=label)
        axes.vlines(points["x"], points["q05"], points["q95"], color=DATA, linewidth=0.8, alpha=0.5)
        axes.plot(
            points["x"], points["q50"], "o",
            color=DATA, markersize=4.4, markeredgecolor=PAPER, markeredgewidth=0.6,
        )  # fmt: skip
        axes.vlines(target["x"], target["q05"], target["q95"], color=INK, linewidth=1.6)
        axes.vlines(target["x"], target["q25"], target["q75"], color=INK, linewidth=4)
        _mark_choice(axes, target["x"], target["lr"])
        low = min(float(np.min(bands["q05"])), float(np.min(points["q50"], initial=np.inf)))
        high = max(float(np.max(bands["q95"])), float(np.max(points["q50"], initial=0.0)))
        axes.set_ylim(low / 1.15, high * 1.15)
        axes.set_xlim(x[0], x[-1])
        log_axis(axes.xaxis, x[0], x[-1], 7, text)
        log_axis(axes.yaxis, *axes.get_ylim(), 7)
        axes.grid(axis="y")
        axes.set_xlabel(xlabel)
        axes.set_ylabel("peak LR", labelpad=_ROOM)
        return to_svg(figure, name, description)


def _mark_choice(axes: Any, x: float, y: float) -> None:
    axes.plot(
        [x], [y], "D",
        color=PAPER, markeredgecolor=INK, markersize=6.5, markeredgewidth=1.6, clip_on=False,
    )  # fmt: skip


def regret(
    name: str,
    *,
    lr: FloatArray,
    mean: FloatArray,
    q05: FloatArray,
    q95: FloatArray,
    p_diverge: FloatArray | None,
    choice: float,
    description: str,
) -> str:
    """What each LR would cost at the target, in nats, and how likely it diverges; each (lr,).

    p_diverge: None where the method knows nothing of divergence.
    """
    with drawing(430, 290 if p_diverge is not None else 230) as figure:
        if p_diverge is None:
            upper = lower = figure.subplots()
        else:
            upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.set_xscale("log")
        upper.fill_between(lr, q05, q95, color=POSTERIOR, alpha=0.16, linewidth=0)
        upper.plot(lr, mean, color=POSTERIOR, linewidth=1.8)
        at_choice = float(np.interp(np.log(choice), np.log(lr), mean))
        within_octave = np.abs(np.log2(lr / choice)) <= 1.2
        top = float(np.max(mean[within_octave], initial=2 * at_choice))
        upper.set_ylim(0, 1.25 * top)
        upper.set_ylabel("expected regret, nats", labelpad=_ROOM)
        if p_diverge is not None:
            lower.fill_between(lr, 0, 100 * p_diverge, color=WARN, alpha=0.25, linewidth=0)
            lower.plot(lr, 100 * p_diverge, color=WARN, linewidth=1.4)
            lower.set_ylim(0, 100)
            lower.set_yticks([0, 50, 100])
            lower.set_ylabel("diverges, %", labelpad=_ROOM)
        lower.set_xlabel("peak LR of the target")
        lower.set_xlim(lr[0], lr[-1])
        log_axis(lower.xaxis, lr[0], lr[-1], 8)
        for axes in {upper, lower}:
            axes.axvline(choice, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.grid(axis="y")
        _mark_choice(upper, choice, at_choice)
        return to_svg(figure, name, description)


def _density(values: FloatArray, grid: FloatArray) -> FloatArray:
    """Kernel density that integrates to one over the grid; Silverman's bandwidth."""
    low, high = np.quantile(values, [0.25, 0.75])
    spread = min(float(np.std(values)), float(high - low) / 1.34) or float(np.std(values))
    width = max(0.9 * spread * len(values) ** -0.2, float(grid[1] - grid[0]))
    counts, edges = np.histogram(values, bins=400, range=(grid[0], grid[-1]))
    centres = (edges[1:] + edges[:-1]) / 2
    kernel = np.exp(-0.5 * ((grid[:, None] - centres) / width) ** 2)
    heights = kernel @ counts
    density: FloatArray = heights / max(float(heights.sum() * (grid[1] - grid[0])), 1e-300)
    return density


def exponent(
    name: str,
    *,
    prior: FloatArray | None,
    posterior: FloatArray | None,
    references: Sequence[float],
    xlabel: str,
    description: str,
) -> str:
    """Draws of one coefficient before and after the data, either if there is one.

    Published values stand as ticks below.
    """
    with drawing(285, 165) as figure:
        axes = figure.subplots()
        known = [values for values in (prior, posterior) if values is not None]
        ends = [np.quantile(values, [0.005, 0.995]) for values in known]
        low, high = (float(f([*np.ravel(ends), *references])) for f in (np.min, np.max))
        margin = 0.03 * (high - low)
        grid = np.linspace(low - margin, high + margin, 400)
        top = max(float(_density(values, grid).max()) for values in known)
        axes.axvline(0, color=GRID, linewidth=1)
        if posterior is not None:
            after = _density(posterior, grid) / top
            axes.fill_between(grid, after, color=POSTERIOR, alpha=0.28, linewidth=0)
            axes.plot(grid, after, color=POSTERIOR, linewidth=1.8)
            q05, q25, q75, q95 = np.quantile(posterior, [0.05, 0.25, 0.75, 0.95])
            axes.hlines(-0.07, q05, q95, color=POSTERIOR, linewidth=1.6)
            axes.hlines(-0.07, q25, q75, color=POSTERIOR, linewidth=4.5)
        if prior is not None:
            before = _density(prior, grid) / top
            axes.plot(grid, before, color=PRIOR, linewidth=1.5, linestyle=(0, (5, 3)))
        axes.plot(
            references, np.full(len(references), -0.18), "|",
            color=DATA, markersize=8, markeredgewidth=1.5,
        )  # fmt: skip
        axes.set_ylim(-0.25, 1.06)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(grid[0], grid[-1])
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(xlabel)
        return to_svg(figure, name, description)


def transforms(name: str, *, pit: FloatArray, description: str) -> str:
    """Distribution functions of probability integral transforms (draw, run) less the uniform one.

    The band holds the whole line of a right model with 95 % probability (Kolmogorov).
    """
    from scipy.stats import kstwo

    count = pit.shape[1]
    half = float(kstwo.ppf(0.95, count))
    points = np.linspace(0.0, 1.0, 101)
    with drawing(430, 235) as figure:
        axes = figure.subplots()
        # No distribution function leaves the unit square: the band is cut off there.
        axes.fill_between(
            points, np.maximum(-half, -points), np.minimum(half, 1 - points),
            color=MUTED, alpha=0.18, linewidth=0,
        )  # fmt: skip
        axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for row in pit:
            below = np.searchsorted(np.sort(row), points, side="right") / count
            axes.plot(points, below - points, color=POSTERIOR, linewidth=0.9, alpha=0.55)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y")
        axes.set_xlabel("probability of a lower loss")
        axes.set_ylabel("share below, less its own", labelpad=_ROOM)
        return to_svg(figure, name, description)


class Course(NamedTuple):
    """One run's line: ``y`` against tokens ``x``, both (record,); colour: its place in `RAMP`."""

    x: FloatArray
    y: FloatArray
    colour: int
    diverged: bool


def courses(
    name: str,
    *,
    facets: Sequence[tuple[str, Sequence[Course]]],
    log: bool,
    references: Sequence[float],
    description: str,
) -> str:
    """Lines against tokens in frames with a title each, all on the same axes.

    ``references`` are dashed. A cross ends the line of a run that diverged; what it did on the way
    there may leave the frame.
    """
    columns = len(facets) if len(facets) <= 3 else -(-len(facets) // 2)
    num_rows = -(-len(facets) // columns)
    lines = [line for _, of_facet in facets for line in of_facet]
    tokens = np.concatenate([line.x for line in lines])
    low, high = float(tokens.min()) / 1.15, float(tokens.max()) * 1.15
    with drawing(430, 42 + 118 * num_rows + (40 if num_rows == 1 else 0)) as figure:
        grid = figure.subplots(num_rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(facets) :]:
            axes.set_axis_off()
        first = grid[0, 0]  # all others share its axes
        first.set_xscale("log")
        if log:
            first.set_yscale("log", nonpositive="mask")
        for number, (axes, (title, of_facet)) in enumerate(zip(grid.flat, facets, strict=False)):
            for colour in sorted({line.colour for line in of_facet}):
                own = [line for line in of_facet if line.colour == colour]
                x, y = _joined([line.x for line in own]), _joined([line.y for line in own])
                axes.plot(x, y, color=RAMP[colour], linewidth=1.1, alpha=0.85)
                alone = [line for line in own if len(line.x) == 1]
                axes.plot(*_ends(alone), "o", color=RAMP[colour], markersize=2.5)
            axes.plot(
                *_ends([line for line in of_facet if line.diverged]), "x",
                color=WARN, markersize=5, markeredgewidth=1.5,
            )  # fmt: skip
            for reference in references:
                axes.axhline(reference, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set_title(title, fontsize=9, color=INK, loc="left")
            axes.grid(axis="y")
            if number + columns >= len(facets):
                axes.set_xlabel("tokens")
                axes.tick_params(labelbottom=True)
        bottom, top = _course_limits(lines, references, log)
        first.set_ylim(bottom, top)
        first.set_xlim(low, high)
        log_axis(first.xaxis, low, high, {1: 6, 2: 4, 3: 3}.get(columns, 2), format_quantity)
        if log:
            log_axis(first.yaxis, bottom, top, 5)
        else:
            first.yaxis.set_major_locator(MaxNLocator(5))
        return to_svg(figure, name, description)


def _joined(parts: Sequence[FloatArray]) -> FloatArray:
    """Lines end to end with a gap after each, to be drawn as one."""
    return np.concatenate([np.append(part, np.nan) for part in parts])


def _ends(lines: Sequence[Course]) -> tuple[list[float], list[float]]:
    return [float(line.x[-1]) for line in lines], [float(line.y[-1]) for line in lines]


def _course_limits(
    lines: Sequence[Course], references: Sequence[float], log: bool
) -> tuple[float, float]:
    """Range of the runs that ended, with room; of all where none did."""
    chosen = [line for line in lines if not line.diverged and line.y.any()] or lines
    y = np.concatenate([*(line.y for line in chosen), np.asarray(references)])
    y = y[np.isfinite(y) & (y > 0)] if log else y[np.isfinite(y)]
    if log:
        low, high = (float(y.min()), float(y.max())) if len(y) else (0.1, 1.0)
        room = max((high / low) ** 0.08, 1.15)
        return low / room, high * room
    low, high = float(y.min()), float(y.max())
    room = max(0.08 * (high - low), 0.02 * abs(high), 1e-6)
    # What cannot be negative has no room for it.
    return (low - room if low < 0 or low > room else -0.25 * room), high + room


def trace(name: str, *, chains: FloatArray, description: str) -> str:
    """Draws of one quantity (chain, draw): left in their order, right their ranks by chain."""
    num_chains, num_draws = chains.shape
    num_bins = 20
    with drawing(285, 135) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        colours = [POSTERIOR, *LAWS]
        every = max(1, num_draws // 250)
        ranks = np.argsort(np.argsort(chains, axis=None)).reshape(chains.shape)
        edges = np.linspace(0, chains.size, num_bins + 1)
        for number in range(min(num_chains, len(colours))):
            colour = colours[number]
            left.plot(
                np.arange(num_draws)[::every], chains[number, ::every],
                color=colour, linewidth=0.6, alpha=0.8,
            )  # fmt: skip
            right.stairs(np.histogram(ranks[number], edges)[0], edges, color=colour, linewidth=1.1)
        right.axhline(num_draws / num_bins, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        right.set_ylim(0, None)
        right.set_xticks([])
        right.set_yticks([])
        left.yaxis.set_major_locator(MaxNLocator(3))
        left.xaxis.set_major_locator(MaxNLocator(3))
        left.set_xlabel("draw")
        right.set_xlabel("rank")
        return to_svg(figure, name, description)
