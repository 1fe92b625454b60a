"""How the runs trained, in the report: lines by tokens, the distance to the divergence edge."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayeslr.features import usable_rows
from bayeslr.pointwise import has_end, run_draws
from bayeslr.posterior import Posterior
from bayeslr.report import figures, render
from bayeslr.report.stability import (
    MAX_LINES,
    MAX_ROWS,
    courses,
    lr_colours,
    slice_edges,
    training,
)
from bayeslr.runs import RunTable, make_table, read_runs
from bayeslr.sampling import fit
from bayeslr.verdicts import with_verdicts
from tests.chromium import Page
from tests.test_report import TARGET, made_up_posterior, made_up_runs, parse

MODULES = ("attention", "router", "expert_up", "expert_down", "head")


def diagnostics(row: dict[str, Any], share: float) -> dict[str, Any]:
    """What a trainer would record at a share of the tokens; a diverged row has its gradient."""
    lr, found = row["lr"], {"grad_norm": 0.3 / (0.1 + share), "tokens_seen": 1, "loss_spikes": 0}
    if row["status"] == "diverged":
        return {**found, "grad_norm": 1e9, "spike_height": 0.7, "spike_steps": 12}
    return {
        **found, "spike_height": 0.0, "spike_steps": 0,
        "max_attention_logit": 5 + 2000 * lr * share, "activation_rms": [1.0, 2.0 + share, 1.5],
        "representation_change": 300 * lr * share, "effective_rank": 20 - 5 * share,
        "router_entropy_min": 1.5, "max_load": 2.0,
        "update_ratio": dict.fromkeys(MODULES, lr * (0.0001 if row["status"] == "ok" else 1.0)),
        "update_alignment": {m: 0.5 + 0.04 * i for i, m in enumerate(MODULES)},
    }  # fmt: skip


def training_of(posterior: Posterior) -> dict[str, Any] | None:
    return training(posterior, slice_edges(posterior))


def recorded_runs(table: RunTable) -> RunTable:
    """The same runs with three checkpoints before the end, and diagnostics in every row."""
    rows: list[dict[str, Any]] = []
    for row in table.frame.to_dict("records"):
        row = {str(key): value for key, value in row.items()}
        whole = row["tokens"]
        for share in (0.25, 0.5, 0.75):
            part = {**row, "tokens": share * whole, "planned_tokens": whole, "status": "partial",
                    "loss": 3.0}  # fmt: skip
            rows.append({**part, "diagnostics": diagnostics(part, share)})
        rows.append({**row, "planned_tokens": whole, "diagnostics": diagnostics(row, 1.0)})
    return make_table(rows, source="recorded.csv")


def recorded(posterior: Posterior) -> Posterior:
    assert posterior.runs is not None
    return replace(posterior, runs=recorded_runs(posterior.runs))


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return with_verdicts(recorded(made_up_posterior()), holdout=False)


@pytest.fixture(scope="module")
def html(posterior: Posterior) -> str:
    return render(posterior, [TARGET])


def test_every_run_has_a_course_before_the_decay_and_at_its_end(posterior: Posterior) -> None:
    assert posterior.runs is not None
    found = courses(posterior.runs.frame)
    assert len(found) == posterior.runs.frame["run_id"].nunique()
    assert [one.lr for one in found] == sorted(one.lr for one in found)
    ended = next(one for one in found if not one.diverged)
    whole = ended.line("effective_rank", 2)
    assert whole is not None
    assert (whole.x / whole.x[-1]).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert whole.y.tolist() == [18.75, 17.5, 16.25, 15.0]
    # At the end of the decay there is no LR left: its size would say nothing.
    ratio = ended.line("update_ratio.router", 0)
    assert ratio is not None
    assert ratio.y.tolist() == [ended.lr] * 3
    layers = ended.line("activation_rms", 0)
    assert layers is not None
    assert layers.y.tolist() == [2.25, 2.5, 2.75, 3.0]
    assert ended.line("unheard_of", 0) is None


def test_branches_that_a_run_left_behind_are_left_out() -> None:
    """Two decay branches on one trunk: the line follows the trunk, and ends in the last branch."""
    row = made_up_runs().frame.iloc[0].to_dict()
    rows = [
        {**row, "tokens": tokens, "status": status, "diagnostics": {"effective_rank": rank}}
        for tokens, status, rank in (
            (1e8, "partial", 1.0), (2e8, "ok", 50.0), (3e8, "partial", 2.0), (4e8, "ok", 60.0)
        )
    ]  # fmt: skip
    (one,) = courses(make_table(rows).frame)
    line = one.line("effective_rank", 0)
    assert line is not None
    assert line.y.tolist() == [1.0, 2.0, 60.0]


def test_diagnostics_outlive_the_disk_and_may_be_anything(tmp_path: Path) -> None:
    table = recorded_runs(made_up_runs())
    for name in ("runs.parquet", "runs.csv", "runs.jsonl"):
        table.write(tmp_path / name)
        assert len(courses(read_runs(tmp_path / name).frame)) == len(courses(table.frame))
    for odd in ("fine so far", 3.0, None, "[1, 2]"):
        assert courses(table.frame.assign(diagnostics=odd)) == []


def test_the_edge_of_a_run_is_that_of_its_likelihood(posterior: Posterior) -> None:
    """Half of the draws put the run beyond the edge where its distance is zero."""
    design, edge = posterior.design, slice_edges(posterior)
    assert design is not None
    assert edge is not None
    draws = posterior.thinned(1000)
    at = run_draws(posterior, np.arange(design.num_runs), draws)
    width = posterior.flat("edge_width")[draws][:, None]
    by_hand = np.median(design.log_lr - at.logit * width, axis=0)
    np.testing.assert_allclose(edge[1, design.slice_of_run], by_hand, rtol=1e-9)


def test_the_table_says_how_far_below_the_edge_each_run_was(posterior: Posterior) -> None:
    found = training_of(posterior)
    assert found is not None
    rows, headers = found["rows"], [name for name, _ in found["headers"]]
    assert posterior.design is not None
    assert len(rows) == posterior.design.num_runs <= MAX_ROWS
    assert found["note"] == ""
    away = [float(row[headers.index("octaves below")].replace("−", "-")) for row in rows]
    assert away == sorted(away)
    status = [row[headers.index("ended")] for row in rows]
    assert {"ok", "diverged"} == set(status)
    assert posterior.runs is not None
    frame, edge = usable_rows(posterior.runs.frame), slice_edges(posterior)
    assert edge is not None
    by_id = dict(zip(frame["run_id"], posterior.design.slice_of_run, strict=True))
    for row, octaves in zip(rows, away, strict=True):
        log_edge = edge[1, by_id[row[0]]]
        assert octaves == pytest.approx(math.log2(math.exp(log_edge) / float(row[1])), abs=0.06)
    ended = has_end(posterior.design) & ~posterior.design.diverged
    nearest = min(a for a, s in zip(away, status, strict=True) if s == "ok")
    assert ended.any()
    assert nearest < 0
    assert f"{-nearest:.1f} octaves above the edge" in found["edge"]


def test_more_runs_than_a_page_can_hold(posterior: Posterior) -> None:
    """Six shapes and 336 runs: at most three frames, so many lines, and so many rows."""
    many = recorded(made_up_posterior(tuple("abcdef")))
    found = training_of(many)
    assert found is not None
    assert "the 200 of 336 runs" in found["note"].lower()
    assert len(found["rows"]) == MAX_ROWS
    for card in (*found["figures"], *found["more"]):
        assert len(card["svg"]) < 250_000
    by_shape = next(c for c in found["figures"] if c["title"] == "Gradient norm")
    assert "3 of 12 shapes" in found["lead"]
    assert f"{MAX_LINES} are drawn" in found["lead"]
    assert "3 frames (a, 20M of 160M" in by_shape["svg"]
    drawn = re.search(r"(\d+) lines", by_shape["svg"])
    assert drawn is not None
    assert int(drawn[1]) <= 3 * MAX_LINES
    few = training_of(posterior)
    assert few is not None
    assert "20M of 160M, 200M of 1.6B" in few["figures"][0]["svg"]


def test_colours_follow_the_lr() -> None:
    colours, entries = lr_colours([1e-3, 1.001e-3, 4e-3])
    assert colours == [0, 0, 5]
    assert [text for _, text in entries] == ["LR 1.00e-3", "LR 4.00e-3"]
    many, legend = lr_colours(np.geomspace(1e-4, 1e-1, 40).tolist())
    assert many == sorted(many)
    assert set(many) == set(range(len(figures.RAMP)))
    assert len(legend) == len(figures.RAMP)
    assert lr_colours([2e-3])[0] == [0]


def test_the_section_is_in_the_report(html: str) -> None:
    tags = parse(html)
    assert len(tags.ids) == len(set(tags.ids))
    section = html[html.index('id="training"') : html.index('id="exponents"')]
    for title in ("Gradient norm", "Update over weight", "Alignment of updates", "expert down",
                  "Change of the representation", "Effective rank", "octaves below"):  # fmt: skip
        assert title in section, title
    assert "#0102" not in html
    assert "octaves below the edge" in html[: html.index("<main")]  # beside the risk


def test_without_diagnostics_the_edge_is_still_told() -> None:
    found = training_of(made_up_posterior())
    assert found is not None
    assert found["figures"] == []
    assert "holds no diagnostics" in found["lead"]
    assert "octaves above the edge" in found["edge"]


def test_least_squares_knows_no_edge() -> None:
    assert training_of(fit(made_up_runs(), method="two-stage")) is None
    found = training_of(fit(recorded_runs(made_up_runs()), method="two-stage"))
    assert found is not None
    assert found["edge"] == ""
    assert "octaves below" not in [name for name, _ in found["headers"]]


def test_a_fit_without_divergence_says_whose_the_edge_is(posterior: Posterior) -> None:
    assert posterior.design is not None
    tame = replace(posterior.design, diverged=np.zeros_like(posterior.design.diverged))
    found = training_of(replace(posterior, design=tame))
    assert found is not None
    assert "No run diverged" in found["edge"]


# In a real browser.


@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser(page: Page, html: str, width: int, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(html)
    page.open(file, width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.complaints() == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # No text of a figure lies on another text of it.
    overlaps = page.evaluate(
        "[...document.querySelectorAll('#training figure > svg')].map(s => {"
        " const b = [...s.querySelectorAll('text')].map(t => t.getBoundingClientRect());"
        " let n = 0; for (let i = 0; i < b.length; i++) for (let j = 0; j < i; j++)"
        " n += b[i].left < b[j].right - 1 && b[j].left < b[i].right - 1"
        " && b[i].top < b[j].bottom - 2 && b[j].top < b[i].bottom - 2; return n; })"
    )
    assert len(overlaps) > 5
    assert set(overlaps) == {0}
