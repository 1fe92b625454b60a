"""The report: complete, self-contained, readable on wide and narrow windows."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayeslr
from bayeslr.errors import DataError, SpecError, StorageError
from bayeslr.features import build_design
from bayeslr.posterior import Posterior, make_posterior
from bayeslr.predict import predict, prior_posterior
from bayeslr.priors import OUTPUTS, PER_FAMILY, SLOPES, load_prior
from bayeslr.report import checks, figures, render, report
from bayeslr.report.published import PUBLISHED_LAWS
from bayeslr.report.scaling import law_draws
from bayeslr.report.slices import MAX_VALLEYS, read_slices
from bayeslr.report.targets import example_target
from bayeslr.report.text import interval_text, share_text
from bayeslr.runs import RunTable, make_table
from bayeslr.sampling import fit
from bayeslr.sensitivity import QUANTITIES
from bayeslr.specs import Target
from bayeslr.units import format_lr
from bayeslr.verdicts import with_verdicts
from tests.chromium import Page

CENTRE_LR = 2e-3


def true_log_lr(n_active: float, tokens: float, batch_tokens: float) -> float:
    """The law behind the made-up runs."""
    return (
        math.log(CENTRE_LR)
        - 0.45 * math.log(n_active / 6e7)
        - 0.2 * math.log(tokens / 4e9)
        + 0.4 * math.log(batch_tokens / 2.6e5)
    )


def made_up_runs(families: tuple[str, ...] = ("one",)) -> RunTable:
    """Two sizes, two horizons, two batches, six LRs; the highest LRs diverge."""
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for family in families:
        for n_active in (2e7, 2e8):
            for tokens in (1e9, 1e10):
                for batch_tokens in (1.3e5, 5.2e5):
                    for log_lr in math.log(CENTRE_LR) + math.log(2) * np.arange(-3, 4):
                        u = log_lr - true_log_lr(n_active, tokens, batch_tokens)
                        diverged = u > 1.8
                        loss = 2.5 + 0.03 * u**2 + rng.normal(0, 1e-3)
                        rows.append(
                            {
                                "run_id": f"{family}-{len(rows)}",
                                "family": family,
                                "lr": math.exp(log_lr),
                                "n_active": n_active,
                                "n_total": 8 * n_active,
                                "param_convention": "non_embedding",
                                "tokens": tokens,
                                "batch_tokens": batch_tokens,
                                "loss": None if diverged else loss,
                                "status": "diverged" if diverged else "ok",
                            }
                        )
    rows.append({**rows[0], "run_id": "bad-unit", "lr": -1.0})
    return make_table(rows, source="made-up.csv")


def made_up_posterior(families: tuple[str, ...] = ("one",), *, r_hat: bool = True) -> Posterior:
    """A posterior of the right form without a sampler: draws scattered about the truth.

    ``r_hat``: whether the two chains agree.
    """
    runs = made_up_runs(families)
    design, card = build_design(runs), load_prior("moe-default")
    rng = np.random.default_rng(5)
    chains = (2, 500)
    draws = {name: entry.draw(rng, 1000).reshape(chains) for name, entry in card.parameters.items()}
    sizes = {
        "family": len(families), "slope": len(SLOPES), "shape": design.num_shapes,
        "cell": design.num_cells, "slice": design.num_slices,
    }  # fmt: skip
    slopes = dict(zip(SLOPES, (-0.45, 0.2, -0.2, 0.4, 0.4), strict=True))
    x = design.slice_features()
    scales = np.exp(np.stack([x[key] for key in ("log_n_active", "log_tokens", "log_batch")]))
    lr_opt = np.array([true_log_lr(*scale) for scale in scales.T])
    means: dict[str, Any] = {
        "lr_level": lr_opt.mean(), "best_batch_level": math.log(2.6e5),
        "log_curvature_level": math.log(0.03), "log_skew": math.log(0.3),
        "log_edge_offset": math.log(1.8), "loss_level": 2.5, "family_slope": [*slopes.values()],
        "lr_shape": 0.0, "lr_tokens_shape": 0.0, "loss_shape": 0.0, "best_batch": math.log(2.6e5),
        "lr_cell": lr_opt.mean(), "loss_cell": 2.5, "lr_opt": lr_opt,
        "log_curvature": math.log(0.03), "floor": 2.5,
    }  # fmt: skip
    for name, levels in OUTPUTS.items():
        if {"shared", "covariate"} & set(levels):  # these runs share no noise, and differ in LR
            continue
        shape = (*chains, *(sizes[level] for level in levels))
        if name in PER_FAMILY:
            draws[name] = card[name].draw(rng, math.prod(shape)).reshape(shape)
        else:
            draws[name] = means[name] + 0.02 * rng.normal(size=shape)
    if not r_hat:
        draws["lr_intercept"] = draws["lr_intercept"] + np.array([[0.0], [5.0]])
    return make_posterior(
        draws, design, runs, card, method="bayes", seed=1,
        statistics={"divergences": 0.0, "mean_steps": 15.0, "mean_acceptance": 0.9, "seconds": 1.0},
    )  # fmt: skip


TARGET = Target(
    target_id="big <moe>", family="one", n_active=1e9, n_total=8e9, tokens=1e11, batch_tokens=1e6
)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return with_verdicts(made_up_posterior(), holdout=False)


@pytest.fixture(scope="module")
def html(posterior: Posterior) -> str:
    return render(posterior, [TARGET])


class _Tags(HTMLParser):
    """Open tags must be closed in order; ids must be unique."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in {"meta", "link", "br", "hr", "img", "input"}:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag, f"</{tag}> is out of order"


def parse(text: str) -> _Tags:
    tags = _Tags()
    tags.feed(text)
    assert tags.stack == []
    return tags


def test_it_is_well_formed_and_ids_are_unique(html: str) -> None:
    tags = parse(html)
    assert len(tags.ids) == len(set(tags.ids))
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert referred <= set(tags.ids)


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    for tag, attributes in parse(html).tags:
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key) or ""
            assert value.startswith(("#", "data:")) or not value, f"<{tag} {key}={value!r}>"
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_the_first_screen_says_the_answer(html: str, posterior: Posterior) -> None:
    row = predict(posterior, [TARGET]).iloc[0]
    before_choice = html[: html.index('id="choice"')]
    assert f'<span class="number">{format_lr(row["lr"])}</span>' in before_choice
    assert interval_text(row["lr_q05"], row["lr_q95"]) in before_choice
    assert interval_text(row["lr_q25"], row["lr_q75"]) in before_choice
    assert share_text(row["extra_tokens"]) in before_choice
    assert str(row["sentence"])[:40] in before_choice


def test_every_section_is_there(html: str) -> None:
    sections = [
        "targets",
        "choice",
        "scale",
        "valleys",
        "training",
        "exponents",
        "misfit",
        "sampler",
        "sources",
    ]
    assert re.findall(r'<section id="([a-z]+)"', html) == sections
    for needed in ("moe-default", "SHA-256", "numpyro", "Seed", "arXiv 2503.04715", "R-hat"):
        assert needed in html


def test_names_of_the_user_are_escaped(html: str) -> None:
    assert "big <moe>" not in html
    assert "big &lt;moe&gt;" in html


def test_the_numbers_are_there_for_machines(html: str, posterior: Posterior) -> None:
    text = re.search(r'id="numbers">(.*?)</script>', html, re.DOTALL)
    assert text is not None
    numbers = json.loads(text[1])
    assert numbers[0]["target_id"] == "big <moe>"
    assert numbers[0]["lr"] == pytest.approx(predict(posterior, [TARGET]).iloc[0]["lr"])


def test_figures_can_be_read_aloud(html: str) -> None:
    drawings = [a for tag, a in parse(html).tags if tag == "svg" and a.get("viewbox")]
    figures_ = [a for a in drawings if a.get("aria-hidden") != "true"]
    assert len(figures_) > 10
    for attributes in figures_:
        assert attributes.get("role") == "img"
        assert attributes.get("aria-label")


def test_figures_wear_the_colours_of_the_page(html: str) -> None:
    assert "#0102" not in html
    style = (Path(figures.__file__).parent / "style.css").read_text()
    for variable in set(re.findall(r"var\((--[a-z0-9]+)\)", html)):
        # Once in the light scheme, once in the dark one.
        wanted = 1 if variable in ("--sans", "--mono") else 2
        assert style.count(f"{variable}:") >= wanted, variable


def test_what_was_quarantined_is_said(html: str) -> None:
    assert "Rows set aside" in html
    assert re.search(r"lr must be", html)


def test_a_fit_that_failed_its_gate_says_so() -> None:
    failed = made_up_posterior(r_hat=False)
    assert not failed.trustworthy
    text = render(failed, [TARGET])
    # Before the LR, not after it.
    assert "Do not trust this fit" in text[: text.index('id="sentence"')]


def test_several_targets_share_one_scale(posterior: Posterior) -> None:
    twelve = [
        Target(target_id=f"t{i}", n_active=1e8 * (i + 1), n_total=8e8 * (i + 1), tokens=1e11,
               batch_tokens=1e6)
        for i in range(12)
    ]  # fmt: skip
    text = render(posterior, twelve)
    assert "Peak LR for 12 targets" in text
    assert text.count('class="strip"') == 12
    places = [float(x) for x in re.findall(r'class="wide" x="([\d.]+)"', text)]
    assert min(places) >= 0
    assert len(set(places)) > 6


def test_a_report_without_targets_shows_an_example(posterior: Posterior) -> None:
    example = example_target(posterior)
    assert example.flops == pytest.approx(10 * 6 * 2e8 * 1e10, rel=0.1)
    text = render(posterior)
    assert "no target was given: an example" in text
    assert "ten times the largest run" in text


def test_the_card_alone_and_two_stage_have_reports_too() -> None:
    alone = render(prior_posterior("moe-default", num_draws=500))
    assert "Published evidence only" in alone
    assert 'id="valleys"' not in alone
    assert 'id="sampler"' not in alone
    two_stage = render(fit(made_up_runs(), method="two-stage"), [TARGET])
    assert "Two-stage estimate" in two_stage
    assert "not modelled" in two_stage
    assert "probability that the run diverges" in alone
    assert "probability that the run diverges" not in two_stage
    parse(alone)
    parse(two_stage)


def test_two_families_and_a_stranger() -> None:
    two = made_up_posterior(("one", "two"))
    stranger = Target(
        target_id="new", family="three", n_active=1e9, n_total=8e9, tokens=1e11, batch_tokens=1e6
    )
    text = render(two, [stranger])
    assert "2 families" in text
    assert "a recipe without runs: population level" in text
    assert "No run shares the recipe of new" in text
    unnamed = render(two, [dataclasses.replace(stranger, family=None)])
    assert "no family was named: population level" in unnamed
    assert "Named as one of one, two, it would be predicted by its own runs" in unnamed
    assert "No run shares" not in unnamed
    assert text.count("<figure><h3>") >= MAX_VALLEYS


def test_the_runs_that_a_target_is_compared_with_are_those_of_its_family() -> None:
    """A family of a hundredth of the tokens must not count the other's horizons as its own."""
    frame = made_up_runs(("one", "two")).frame
    frame.loc[frame["family"] == "two", ["tokens", "batch_tokens"]] /= 100.0
    two_stage = fit(make_table(frame, source="made-up"), "moe-default", method="two-stage")
    near = dataclasses.replace(TARGET, n_active=2e8, n_total=1.6e9, tokens=1e10, batch_tokens=1.3e5)
    far = dataclasses.replace(near, target_id="far", family="two", tokens=2e9, batch_tokens=1.3e3)
    text = render(two_stage, [far, near])
    assert "far has 20 times the tokens of the longest: there the law" in text
    assert "beyond the runs (10M to 100M)" in text


def test_a_target_a_hair_outside_is_inside_everywhere(posterior: Posterior) -> None:
    hair = dataclasses.replace(
        TARGET, n_active=2.02e8, n_total=1.616e9, tokens=1e10, batch_tokens=1.3e5
    )
    assert 0 < predict(posterior, [hair])["extrapolation"].iloc[0] < 0.05
    text = render(posterior, [hair])
    assert "inside the range of the runs" in text
    assert "<dd>inside<small>the range of the runs</small></dd>" in text


def test_the_measured_check_of_a_prediction_is_shown(posterior: Posterior) -> None:
    lines = ["Trained:", "  lr 1e-3: loss 2.5", "  lr 2e-3: loss 2.6", "It lies where it should."]
    text = render(posterior, [TARGET], lines)
    parse(text)
    check = text[text.index('id="check"') : text.index('id="choice"')]
    assert check.count("<li>") == 2
    assert "It lies where it should." in check


HOLDOUT = {
    "slices": 8, "runs_left_out": 40, "reach": 4.0, "error_octaves": 0.3, "cover_50": 0.5,
    "cover_90": 0.875, "verdict": "held", "sentence": "Without its largest cells: 7 of 8 held.",
}  # fmt: skip


def test_the_checks_stand_beside_the_verdict(html: str, posterior: Posterior) -> None:
    top = html[: html.index("<main")]
    for row in checks.marks(posterior.info):
        assert row["mark"] in top
    assert "losses lie in the model" in top

    def mark(verdict: str) -> tuple[str, bool | None]:
        first = checks.marks({**posterior.info, "holdout": {**HOLDOUT, "verdict": verdict}})[0]
        assert first["text"] == HOLDOUT["sentence"]
        return first["mark"], first["good"]

    assert mark("held") == ("Held its largest cells", True)
    assert mark("partly") == ("Hardly held its largest cells", None)
    assert mark("missed") == ("Missed its largest cells", False)
    unknown = checks.marks({**posterior.info, "holdout": None})[0]
    assert (unknown["mark"], unknown["good"]) == ("Not held out", None)
    assert "has not been tested" in unknown["text"]
    rest = {key: value for key, value in posterior.info.items() if key != "holdout"}
    assert checks.marks({**rest, "no_holdout": "No time."})[0]["text"] == "No time."


def test_a_misfit_and_a_contradicted_card_are_marked(posterior: Posterior) -> None:
    misfit = {**posterior.info["misfit"], "verdict": "large", "sentence": "It does not fit."}
    against = [{**one, "verdict": "conflict"} for one in posterior.info["influence"][:2]]
    rows = checks.marks({**posterior.info, "misfit": misfit, "influence": against})
    assert [(row["mark"], row["good"]) for row in rows[1:]] == [
        ("Misfit", False), ("Runs against the card", False)
    ]  # fmt: skip
    assert rows[1]["text"] == "It does not fit."
    assert "level of LR*; LR* in active parameters" in rows[2]["text"]


def test_every_quantity_and_group_is_in_a_table(html: str, posterior: Posterior) -> None:
    for one in posterior.info["influence"]:
        assert f'<th scope="row">{QUANTITIES[one["name"]]}' in html
    for group in posterior.info["misfit"]["groups"]:
        assert group["name"] in html


def test_edges_and_diverged_runs(posterior: Posterior) -> None:
    slices = read_slices(posterior)
    assert sum(len(one.diverged_lr) for one in slices) == posterior.info["num_diverged"] > 0
    assert all(one.edge in (None, "low", "high") for one in slices)
    # Optima run from 3.6e-4 to 6.4e-3; LRs from 2.5e-4 to 1.6e-2 were tried.
    assert sum(one.bracketed for one in slices) >= len(slices) - 2
    first = slices[0]
    low_only = type(first)(
        number=0, lr=np.array([1e-3, 2e-3, 4e-3]), loss=np.array([2.0, 2.1, 2.3]),
        diverged_lr=np.array([]), star={},
    )  # fmt: skip
    assert low_only.edge == "low"
    high = type(first)(
        number=0, lr=np.array([1e-3, 2e-3]), loss=np.array([2.2, 2.1]),
        diverged_lr=np.array([]), star={},
    )  # fmt: skip
    assert high.edge == "high"
    closed = type(first)(
        number=0, lr=np.array([1e-3, 2e-3]), loss=np.array([2.2, 2.1]),
        diverged_lr=np.array([4e-3]), star={},
    )  # fmt: skip
    assert closed.edge is None


def test_the_drawn_law_is_the_predicted_one(posterior: Posterior) -> None:
    """The law that carries the dots agrees with `predict` at a new place, misfit apart."""
    x = {
        "log_n_active": np.log([TARGET.n_active]),
        "log_sparsity": np.log([TARGET.n_active / TARGET.n_total]),
        "log_tokens": np.log([TARGET.tokens]),
        "log_batch": np.log([TARGET.batch_tokens]),
    }
    law = np.median(law_draws(posterior, 0, x))
    predicted = math.log(predict(posterior, [TARGET]).iloc[0]["lr_q50"])
    # The misfit's sd is about 0.2; 4 standard errors of a median of 400 draws are 0.05.
    assert law == pytest.approx(predicted, abs=0.06)


def test_published_laws_are_as_tabulated() -> None:
    """The values at 1.3B active of 12B, 500B tokens, as worked out from the papers by hand."""
    table = {
        "DeepSeek": 6.24e-4, "Ling MoE": 5.78e-4, "Moonlight": 7.47e-4, "Step Law": 4.55e-4,
        "Ling sparsity (Muon)": 6.30e-4, "OpenEuroLLM": 5.96e-4,
    }  # fmt: skip
    for law in PUBLISHED_LAWS:
        assert float(law(1.3e9, 12e9, 5e11)) == pytest.approx(table[law.label], rel=0.01)


def test_the_same_fit_gives_the_same_page(posterior: Posterior, html: str) -> None:
    assert render(posterior, [TARGET]) == html


def test_the_path_of_a_fit_is_no_posterior(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"a posterior is needed, got str; .*Posterior\.load"):
        report("fit", tmp_path / "report.html")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_writing_is_all_or_nothing(posterior: Posterior, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert report(posterior, path, targets=[TARGET]) == path
    assert path.read_text().startswith("<!doctype html>")
    with pytest.raises(StorageError, match=r"cannot write .*nowhere"):
        report(posterior, tmp_path / "nowhere" / "report.html", targets=[TARGET])
    total = Target(
        target_id="t", n_active=1e9, n_total=8e9, tokens=1e11, batch_tokens=1e6,
        param_convention="total",
    )  # fmt: skip
    before = path.read_text()
    with pytest.raises(DataError, match="counts total parameters"):
        report(posterior, path, targets=[total])
    assert path.read_text() == before


def test_the_public_name_survives_an_import_of_the_package() -> None:
    """``bayeslr.report`` is a function for users even after ``import bayeslr.report``."""
    code = (
        "import bayeslr.report, bayeslr\n"
        "from bayeslr.errors import SpecError\n"
        "from bayeslr.report import report\n"
        "assert callable(bayeslr.report) and callable(report)\n"
        "try: bayeslr.report(None, '/nowhere/at/all')\n"
        "except SpecError: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(bayeslr.report)


@pytest.mark.parametrize(
    ("low", "high", "at_most"), [(1e-4, 1e-2, 6), (2e-4, 9e-4, 6), (1e5, 1e13, 7), (3e-3, 4e-3, 5)]
)
def test_ticks_are_few_and_inside(low: float, high: float, at_most: int) -> None:
    ticks = figures.log_ticks(low, high, at_most)
    assert 1 <= len(ticks) <= at_most
    assert all(low <= tick <= high for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.2e-4, "3.2e-4"), (1e-3, "1e-3"), (0.012, "0.012"), (0.5, "0.5"), (1.0, "1"), (12.0, "12")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert figures.short_number(value) == text


# In a real browser.


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html)
    return path


@pytest.mark.parametrize("width", [390, 768, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(page: Page, file: Path, width: int, dark: bool) -> None:
    page.open(file, width=width, dark=dark)
    assert page.complaints() == []
    assert [url for url in page.requests() if not url.startswith("data:")] == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    first_screen = page.evaluate(
        "(() => { const box = document.getElementById('sentence').getBoundingClientRect();"
        " return box.top >= 0 && box.height > 20 && box.bottom < innerHeight; })()"
    )
    assert first_screen, "the sentence is not on the first screen"
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        "[...document.querySelectorAll('.tiles dd')].every(d => d.scrollWidth <= d.clientWidth)"
    ), "a number is cut off"
    # Nothing that is drawn sticks out of its figure sideways.
    assert page.evaluate(
        "[...document.querySelectorAll('figure > svg')].every(s => {"
        " const a = s.getBoundingClientRect(), b = s.closest('figure').getBoundingClientRect();"
        " return a.left >= b.left - 1 && a.right <= b.right + 1 && a.height > 40; })"
    )
    assert page.evaluate(OVERLAPS) == [], "one label of a figure lies on another"


# Pairs of texts of one figure whose boxes share more than 2 px each way; less is the boxes' rim.
OVERLAPS = """
[...document.querySelectorAll('figure > svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')]
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  return texts.flatMap(([one, a], i) => texts.slice(i + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2).map(([other]) => [one, other]));
})
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(page: Page, file: Path, dark: bool) -> None:
    """Contrast of at least 4.5, the WCAG AA bound for text, in both schemes."""
    page.open(file, width=1000, dark=dark)
    names = ["--ink", "--muted", "--posterior", "--warn", "--good"]
    wanted = json.dumps([*names, "--paper", "--raised"])
    colours = page.evaluate(
        f"(() => {{ const s = getComputedStyle(document.documentElement);"
        f" return {wanted}.map(name => s.getPropertyValue(name)); }})()"
    )

    def luminance(colour: str) -> float:
        parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ground in colours[-2:]:
        for name, colour in zip(names, colours, strict=False):
            high, low = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} on {ground}"
