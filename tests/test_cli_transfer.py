"""The verbs on transfer: show, check, predict."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from bayeslr.blend import Blend
from bayeslr.cli.transfer import transfer_app
from bayeslr.errors import SpecError
from bayeslr.posterior import Posterior
from bayeslr.predict import predict
from tests.model_fixtures import made_up_runs, target

BASE = "d_model=32,n_layers=2,n_heads=2,d_expert=32,n_experts=4,top_k=2"
GROUPS = ("embedding", "attention", "router", "expert_up", "expert_down", "norm", "head")


def transfer(*words: object) -> str:
    """Standard output of ``bayeslr transfer ...``, which must succeed."""
    out = io.StringIO()
    with redirect_stdout(out):
        transfer_app([str(word) for word in words], standalone_mode=False)
    return out.getvalue()


def shown(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(transfer("show", "--json", *words))
    return found


def test_show_follows_the_table_of_the_trainer() -> None:
    found = shown("--base", BASE, "--target", "d_model=128,n_layers=8")
    assert found["target"]["n_heads"] == 8
    assert found["target"]["d_expert"] == 128
    assert found["residual"] == 1 / 4
    attention = found["groups"]["attention"]
    assert attention["base_init_std"] / attention["init_std"] == pytest.approx(2)
    assert (attention["lr"], attention["weight_decay"], attention["eps"]) == (1 / 4, 4, 1 / 16)
    assert found["groups"]["head"]["output"] == 1 / 4


def test_show_prints_every_group_and_its_source() -> None:
    text = transfer("show", "--base", BASE, "--target", "d_model=128", "--lr", 0.01)
    for group in GROUPS:
        assert f"\n{group} " in text
    assert "arXiv 2505.01618" in text
    assert "d_model 32 to 128" in text
    assert "2.50e-3" in text


def test_show_takes_horizon_and_batch() -> None:
    found = shown("--base", BASE + ",tokens=1M", "--target", "tokens=4M", "--option",
                  "horizon_exponent=-0.5", "--parametrization", "mup")  # fmt: skip
    assert found["groups"]["embedding"]["lr"] == pytest.approx(1 / 2)
    assert found["target"]["tokens"] == 4_000_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "d_model"], "--base: expected KEY=VALUE"),
        (["--base", BASE + ",d_model=4"], "'d_model' stands twice"),
        (["--base", "d_model=64"], "key 'n_layers' is missing"),
        (["--target", "width=64"], "unknown key 'width'"),
        (["--target", "d_model=wide"], "--target: d_model must be a number"),
        (["--parametrization", "magic"], "parametrization must be one of sp, mup"),
        (["--option", "speed=3"], "unknown key 'speed'"),
        (["--lr", "0"], "--lr must be > 0"),
        (["--target", "tokens=4M"], "target has tokens .4000000. but the base has none"),
        (
            ["--base", BASE + ",tokens=1M", "--target", "tokens=4M,batch_tokens=64K"],
            "target has batch_tokens",
        ),
    ],
)
def test_what_show_cannot_use_is_said(words: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        transfer("show", *words)


def test_show_loads_no_trainer() -> None:
    code = (
        "import sys; from bayeslr.cli.transfer import transfer_app\n"
        "transfer_app(['show', '--json'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'jax', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="a coordinate check trains networks"
)


def check(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = "from bayeslr.cli import main; main()"
    command = [sys.executable, "-c", code, "transfer", "check", "--base", BASE,
               "--factor", "4", "--seeds", "1", "--out", str(out), *words]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@needs_torch
def test_check_fails_the_standard_parametrisation_and_draws_it(tmp_path: Path) -> None:
    done = check(tmp_path / "new", "--parametrization", "sp")
    assert done.returncode == 4, done.stderr
    assert done.stderr == ""
    assert "OUTSIDE" in done.stdout
    kept = json.loads((tmp_path / "new" / "coordinates.json").read_text())
    assert set(kept["groups"]) == {*GROUPS, "stream"}
    assert kept["groups"]["expert_down"]["slope"] > 0.2
    assert not kept["inside"]
    assert "</svg>" in (tmp_path / "new" / "coordinates.svg").read_text()


@needs_torch
def test_check_passes_mup_within_a_wide_bound(tmp_path: Path) -> None:
    """One seed at small widths: 0.3 is three times the bound that eight-fold widths are held to."""
    done = check(tmp_path, "--parametrization", "mup", "--bound", "0.3", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["inside"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--factor", "3"], "power of two from 2 on, got 3"),
        (["--seeds", "0"], "--seeds must be >= 1"),
        (["--axis", "sparsity", "--parametrization", "moe_fixed_sparsity"], "use 'complete_mue'"),
        (["--axis", "colour"], "invalid choice: 'colour'"),
        (["--option", "beta2=1"], r"beta2 must be in [0, 1), got 1"),
    ],
)
def test_what_check_cannot_use_is_said(tmp_path: Path, words: list[str], message: str) -> None:
    done = check(tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def blending(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `blend` was asked for; it answers from the fit that the tests share."""
    asked: list[Any] = []

    def stand_in(runs: Any, targets: Any, *, cards: Any, seed: int) -> Blend:
        asked.append((len(runs), targets, cards, seed))
        table = predict(posterior, targets)
        return Blend(
            weights={"transfer": 0.25, "weak": 0.75}, scores={"transfer": -1.0, "weak": 0.1},
            num_held_out=2, posteriors=dict.fromkeys(cards, posterior),
            alone=dict.fromkeys(cards, table),
            predictions=table.drop(columns=["sentence", "extrapolation", "level"]),
        )  # fmt: skip

    monkeypatch.setattr("bayeslr.blend.blend", stand_in)
    return asked


def test_predict_tells_each_card_and_both(blending: list[Any], tmp_path: Path) -> None:
    runs = tmp_path / "runs.csv"
    made_up_runs().frame.to_csv(runs, index=False)
    words = ("predict", runs, "--n-active", "600M", "--n-total", "4.8B", "--tokens", "48B",
             "--batch-tokens", "1M", "--family", "made-up", "--card", "transfer", "--card", "weak",
             "--seed", 7)  # fmt: skip
    text = transfer(*words, "--out", tmp_path / "both.csv")
    ((num_runs, (wanted,), cards, seed),) = blending
    assert (num_runs, cards, seed) == (40, ("transfer", "weak"), 7)
    assert wanted.n_total == pytest.approx(target().n_total)
    lines = text.splitlines()
    assert lines[0].startswith("Target: 600,000,000 active of 4,800,000,000")
    assert [line.split()[1] for line in lines[2:5]] == ["transfer", "weak", "blended"]
    assert "2 optima of the largest shape, held out: 25 % transfer, 75 % weak." in lines[5]
    assert (tmp_path / "both.csv").is_file()
    found = json.loads(transfer(*words, "--json"))
    assert found["weights"] == {"transfer": 0.25, "weak": 0.75}
    assert set(found["alone"]) == {"transfer", "weak"}
    assert found["predictions"][0]["lr"] == pytest.approx(found["alone"]["weak"][0]["lr"])


def test_one_card_is_nothing_to_weigh(tmp_path: Path) -> None:
    runs = tmp_path / "runs.csv"
    made_up_runs().frame.to_csv(runs, index=False)
    with pytest.raises(SpecError, match="at least two cards are weighed, got weak"):
        transfer("predict", runs, "--n-active", "1B", "--tokens", "9B", "--batch-tokens", "1M",
                 "--card", "weak")  # fmt: skip
