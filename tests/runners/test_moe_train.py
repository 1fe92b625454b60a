"""Whole runs: records, branches, divergence, resumption, errors of the child process."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bayeslr.errors import SpecError, StorageError
from bayeslr.specs import RunSpec
from bayeslr_runners.moe import MoeRunner, checkpoint
from bayeslr_runners.moe import train as train_module
from bayeslr_runners.moe.divergence import Watch, cause
from bayeslr_runners.moe.records import RecordLog, finite
from bayeslr_runners.moe.specfile import check_spec
from bayeslr_runners.moe.train import train
from bayeslr_runners.moe.trainer import Trainer
from tests.runners.stopping import train_stopped

SHAPE = {"name": "tiny", "d_model": 16, "n_layers": 2, "n_heads": 2, "d_expert": 8,
         "n_experts": 4, "top_k": 2}  # fmt: skip
TOP_1 = SHAPE | {"top_k": 1}
OPTIONS = {"data": "synthetic", "synthetic_vocab": 16, "synthetic_order": 1, "synthetic_seed": 3,
           "synthetic_branching": 3, "synthetic_tokens": 40_000, "val_tokens": 2048, "threads": 1,
           "partial_evals": 2}  # fmt: skip
# Rules under which the LR depends on the horizon.
BY_HORIZON = {"base_tokens": 12_800, "horizon_exponent": -0.3}
# What two runs of one seed may differ in.
CLOCK = ("wall_s", "created_at")


pytestmark = pytest.mark.usefixtures("one_thread")


def spec(*, options: dict[str, Any] | None = None, **changes: Any) -> RunSpec:
    options = OPTIONS | (options or {})
    n_active, n_total = MoeRunner(options).counts(SHAPE)
    values: dict[str, Any] = {
        "run_id": "r", "family": "f", "runner": "moe", "lr": 0.02, "tokens": 12_800,
        "decay_at": (6400,), "batch_tokens": 256, "seq_len": 32, "warmup_tokens": 1280,
        "n_active": n_active, "n_total": n_total, "shape": SHAPE, "options": options,
    }  # fmt: skip
    return RunSpec(**{**values, **changes})


def folder(path: Path, run: RunSpec) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "spec.json").write_text(run.to_json())
    return path


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "records.jsonl").read_text().splitlines()]


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(run_dir)]


def child(run_dir: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        MoeRunner({}).command(spec(), run_dir),
        capture_output=True, text=True, timeout=60, check=False, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained in one go."""
    run_dir = folder(tmp_path_factory.mktemp("runs") / "unbroken", spec())
    train(run_dir)
    return run_dir


def test_records(unbroken: Path) -> None:
    found = rows(unbroken)
    assert [(r["status"], r["tokens"], r["planned_tokens"]) for r in found] == [
        ("partial", 3328, 12_800),
        ("ok", 6400, 6400),
        ("partial", 6912, 12_800),
        ("ok", 12_800, 12_800),
    ]
    assert [r["schedule_state"] for r in found] == ["stable", "decayed", "stable", "decayed"]
    for row in found:
        assert row["arch"] == "moe"
        assert row["source"] == "bayeslr_runners.moe"
        assert row["flops"] == 6 * row["n_active"] * row["tokens"]
        assert len(row["data_fingerprint"]) == 64
        assert row["diagnostics"]["max_load"] >= 1
        assert 1 <= row["diagnostics"]["effective_experts_min"] <= 4
    assert found[-1]["diagnostics"]["tokens_trained"] == 12_800 + 1280
    assert not (unbroken / "checkpoint.pt").exists()


def test_loss_falls_to_between_the_unigram_entropy_and_the_floor(unbroken: Path) -> None:
    corpus = Trainer.build(spec()).corpus
    share = torch.bincount(torch.from_numpy(corpus.val.astype("int64"))).double() / len(corpus.val)
    unigram = -torch.xlogy(share, share).sum().item()
    last = rows(unbroken)[-1]
    assert corpus.floor is not None
    assert corpus.floor - 4 * last["loss_se"] < last["loss"] < unigram - 0.3
    assert last["loss"] < rows(unbroken)[1]["loss"]


def test_no_trained_loss_lies_below_the_entropy(tmp_path: Path) -> None:
    """Enough tokens to learn the chain: the loss lands on its entropy rate."""
    run = spec(tokens=128_000, decay_at=(), options={"synthetic_tokens": 400_000,
               "val_tokens": 20_000, "partial_evals": 0})  # fmt: skip
    train(folder(tmp_path, run))
    row = rows(tmp_path)[-1]
    floor = Trainer.build(run).corpus.floor
    assert floor is not None
    assert floor - 4 * row["loss_se"] < row["loss"] < floor + 0.15


def test_a_branch_equals_a_run_of_its_own(unbroken: Path, tmp_path: Path) -> None:
    """The first horizon of a run of two is the only horizon of a shorter run."""
    train(folder(tmp_path, spec(tokens=6400, decay_at=())))
    (alone,) = (r for r in rows(tmp_path) if r["status"] == "ok")
    (branch,) = (r for r in rows(unbroken) if r["tokens"] == 6400)
    assert branch["loss"] == alone["loss"]


def test_the_trunk_is_not_disturbed_by_its_branches(unbroken: Path, tmp_path: Path) -> None:
    train(folder(tmp_path, spec(decay_at=())))
    for alone in timeless(tmp_path):
        (with_branch,) = (r for r in timeless(unbroken) if r["tokens"] == alone["tokens"])
        for row in (alone, with_branch):
            del row["diagnostics"]["tokens_trained"]
        assert with_branch == alone


def test_same_seed_same_result_and_another_seed_another(unbroken: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train(folder(tmp_path / "same", spec()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert timeless(tmp_path / "same") == timeless(unbroken)
    train(folder(tmp_path / "other", spec(seed=1)))
    assert rows(tmp_path / "other")[-1]["loss"] != rows(unbroken)[-1]["loss"]


def test_decay_lowers_the_loss(tmp_path: Path) -> None:
    for schedule in ("wsd", "constant"):
        train(
            folder(tmp_path / schedule, spec(lr=0.1, tokens=25_600, decay_at=(), schedule=schedule))
        )
    decayed, undecayed = (rows(tmp_path / name)[-1]["loss"] for name in ("wsd", "constant"))
    assert decayed < undecayed - 0.01


# Steps: 20 on the trunk, 5 in its first branch, 20 more on the trunk, 10 in the last branch.
# With a checkpoint at every step it also lies where rows are written: 13, 25, 32.
@pytest.mark.parametrize(
    ("steps", "every"),
    [(1, 4), (19, 4), (20, 4), (23, 4), (25, 4), (30, 4), (45, 4), (52, 4),
     (13, 1), (25, 1), (32, 1), (54, 1)],
)  # fmt: skip
def test_a_resumed_run_equals_an_unbroken_one(
    unbroken: Path, tmp_path: Path, steps: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at any place, whether or not a checkpoint lies there."""

    run_dir = folder(tmp_path, spec(options={"checkpoint_steps": every}))
    train_stopped(run_dir, steps=steps, monkeypatch=monkeypatch)
    train(run_dir)
    assert timeless(run_dir) == timeless(unbroken)


def continuing(**changes: Any) -> RunSpec:
    """Twice as far as the run of `spec`, from its trunk: 40 steps, of which 10 decay."""
    words = {"run_id": "longer", "tokens": 25_600, "decay_at": (), "continues": "r",
             "continues_at": 10_240}  # fmt: skip
    return spec(**{**words, **changes})


def without_path(run_dir: Path, *, after: int = 0) -> list[dict[str, Any]]:
    """Rows beyond a token count, without what says how a run came there."""
    found = [row for row in timeless(run_dir) if row["tokens"] > after]
    for row in found:
        del row["run_id"], row["flops"], row["diagnostics"]["tokens_trained"]
    return found


@pytest.fixture(scope="module")
def whole(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `continuing`, trained whole."""
    run_dir = folder(tmp_path_factory.mktemp("runs"), spec(tokens=25_600, decay_at=()))
    train(run_dir)
    return run_dir


def beside(unbroken: Path, path: Path) -> Path:
    """A folder of runs that holds the one of `spec`."""
    shutil.copytree(unbroken, path / "r")
    return path


def test_a_run_that_goes_on_from_another_ends_as_the_whole_run(
    unbroken: Path, whole: Path, tmp_path: Path
) -> None:
    runs_dir, run = beside(unbroken, tmp_path), continuing()
    assert rows(unbroken)[-1]["trunk_tokens"] == run.continues_at
    assert MoeRunner(OPTIONS).has_trunk(run, runs_dir)
    run_dir = folder(runs_dir / "longer", run)
    train(run_dir)
    assert without_path(run_dir) == without_path(whole, after=10_240) != []
    # What is paid for is new, and nothing else: of 25,600 tokens, those after the trunk.
    last = rows(run_dir)[-1]
    assert last["diagnostics"]["tokens_trained"] == 25_600 - 10_240
    assert last["flops"] == MoeRunner(OPTIONS).flops(run) == 6 * run.n_active * 15_360
    # It leaves its own trunk to still longer ones.
    assert last["trunk_tokens"] == 20_480
    third = continuing(run_id="third", tokens=38_400, continues="longer", continues_at=20_480)
    train(folder(runs_dir / "third", third))
    train(folder(runs_dir / "whole", spec(tokens=38_400, decay_at=())))
    assert without_path(runs_dir / "third") == without_path(runs_dir / "whole", after=20_480)


@pytest.mark.parametrize(("steps", "every"), [(1, 4), (39, 4), (45, 4), (40, 1)])
def test_a_run_that_goes_on_resumes_like_any_other(
    unbroken: Path, whole: Path, tmp_path: Path, steps: int, every: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed before its first checkpoint or after; the folder that it came from may then go."""
    # What a checkpoint's interval is decides nothing of a trunk, but says another spec.
    options = {"checkpoint_steps": every}
    earlier = folder(tmp_path / "r", spec(options=options))
    train(earlier)
    run_dir = folder(tmp_path / "longer", continuing(options=options))
    train_stopped(run_dir, steps=steps, monkeypatch=monkeypatch)
    if steps > every:
        shutil.rmtree(earlier)
        assert MoeRunner(OPTIONS).has_trunk(continuing(options=options), tmp_path)
    train(run_dir)
    assert without_path(run_dir) == without_path(whole, after=10_240)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"continues": "elsewhere"}, "is not there; put the folders of both beside each other"),
     ({"lr": 0.01}, "is not the trunk of this run"),
     ({"seed": 1}, "is not the trunk of this run"),
     ({"continues_at": 10_240 - 256}, "is not the trunk of this run")],
)  # fmt: skip
def test_a_run_goes_on_from_its_own_trunk_alone(
    unbroken: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    runs_dir, run = beside(unbroken, tmp_path), continuing(**changes)
    assert not MoeRunner(OPTIONS).has_trunk(run, runs_dir)
    with pytest.raises(StorageError, match=message):
        train(folder(runs_dir / "longer", run))


def test_a_trunk_is_taken_over_between_two_steps() -> None:
    check_spec(continuing())
    with pytest.raises(
        SpecError, match=r"continues_at \(10300\) must be a multiple of batch_token"
    ):
        check_spec(continuing(continues_at=10_300))


def test_one_run_measures_no_two_horizons_whose_rules_differ() -> None:
    check_spec(spec(options=BY_HORIZON, decay_at=()))
    with pytest.raises(SpecError, match=r"decay_at is \[6400, 12800\].* one run a token count"):
        check_spec(spec(options=BY_HORIZON))


@pytest.mark.parametrize(
    "changes",
    [{"schedule": "cosine", "decay_at": ()}, {"options": {"keep_trunk": False}}, {"lr": 9.0},
     {"options": BY_HORIZON, "decay_at": ()}],
    ids=["no trunk", "not wanted", "diverged", "its LR depends on the horizon"],
)  # fmt: skip
def test_no_trunk_is_left_where_none_can_go_on(tmp_path: Path, changes: dict[str, Any]) -> None:
    train(folder(tmp_path, spec(**changes)))
    assert "trunk_tokens" not in rows(tmp_path)[-1]
    assert not (tmp_path / "trunk.pt").exists()


def test_killed_child_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    run = spec(options={"checkpoint_steps": 5}, tokens=25_600)
    whole, killed = folder(tmp_path / "whole", run), folder(tmp_path / "killed", run)
    assert child(whole).returncode == 0
    process = subprocess.Popen(MoeRunner({}).command(run, killed))
    while not (killed / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not any(r["tokens"] == run.tokens for r in RecordLog(killed / "records.jsonl").rows)
    assert child(killed).returncode == 0
    assert timeless(killed) == timeless(whole)


def test_a_finished_run_is_left_alone(unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (unbroken / "records.jsonl").read_bytes()
    monkeypatch.setattr(train_module, "Trainer", None)
    train(unbroken)
    assert (unbroken / "records.jsonl").read_bytes() == before


def test_a_torn_last_line_is_cut_off_and_written_again(unbroken: Path, tmp_path: Path) -> None:
    content = (unbroken / "records.jsonl").read_bytes()
    run_dir = folder(tmp_path, spec())
    (run_dir / "records.jsonl").write_bytes(content[:-40])
    train(run_dir)
    assert timeless(run_dir) == timeless(unbroken)


def test_a_checkpoint_of_another_spec_is_refused(tmp_path: Path) -> None:
    run_dir = folder(tmp_path, spec(options={"checkpoint_steps": 10, "keep_checkpoint": True}))
    train(run_dir)
    (run_dir / "records.jsonl").unlink()
    folder(tmp_path, spec(lr=0.01))
    with pytest.raises(StorageError, match="belongs to another spec"):
        train(run_dir)


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    run_dir = folder(tmp_path, spec())
    (run_dir / "checkpoint.pt").write_bytes(b"PK nonsense")
    with pytest.raises(StorageError, match=r"checkpoint.pt cannot be read .* delete it"):
        train(run_dir)


def test_a_huge_lr_is_recorded_as_diverged(tmp_path: Path) -> None:
    train(folder(tmp_path, spec(lr=9.0, warmup_tokens=0)))
    last = rows(tmp_path)[-1]
    assert last["status"] == "diverged"
    assert last["loss"] is None
    assert 0 < last["tokens"] <= 12_800
    assert last["planned_tokens"] == 12_800
    assert last["status_reason"]
    assert not (tmp_path / "checkpoint.pt").exists()
    # Nothing is trained again.
    before = (tmp_path / "records.jsonl").read_bytes()
    train(tmp_path)
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_a_non_finite_loss_is_recorded_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = Trainer.step

    def step(self: Trainer, number: int, lr_factor: float) -> Any:
        if number == 11:
            with torch.no_grad():
                self.model.head.fill_(math.inf)
        return take_step(self, number, lr_factor)

    monkeypatch.setattr(Trainer, "step", step)
    train(folder(tmp_path, spec()))
    (last,) = (r for r in rows(tmp_path) if r["status"] == "diverged")
    assert last["status_reason"] == "non-finite loss"
    assert last["tokens"] == 12 * 256
    assert "NaN" not in (tmp_path / "records.jsonl").read_text()


def watch(*losses: float, patience: int = 5) -> list[str | None]:
    seen = Watch(patience=patience)
    return [seen.see(loss, 1.0) for loss in losses]


@pytest.mark.parametrize("killed_while", ["_record_partial", "_record_horizon"])
def test_a_run_killed_between_a_step_and_its_row(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_while: str
) -> None:
    run_dir = folder(tmp_path, spec(options={"checkpoint_steps": 1}))

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Run, killed_while, stop)
        with pytest.raises(KeyboardInterrupt):
            train(run_dir)
    train(run_dir)
    assert timeless(run_dir) == timeless(unbroken)


def test_a_spike_that_recovers_is_no_divergence() -> None:
    assert set(watch(*[3.0] * 30, *[9.0] * 3, *[3.0] * 30, patience=25)) == {None}


def test_a_spike_that_lasts_is_a_divergence() -> None:
    reasons = watch(*[3.0] * 30, *[6.0] * 30, patience=10)
    assert "loss spike without recovery" in reasons
    assert set(reasons[:40]) == {None}


def test_a_gradient_that_is_not_finite_is_a_divergence() -> None:
    assert Watch(patience=5).see(3.0, math.inf) == "non-finite gradient"


@pytest.mark.parametrize("first", [5.4, 5.5, 5.6])
def test_a_final_loss_above_the_initial_one_is_a_divergence(first: float) -> None:
    """Measured on the same windows: the luck of the first batch does not decide."""
    seen = Watch(patience=5)
    seen.see(first, 1.0)
    assert seen.judge(5.49, lambda: 5.5) is None
    assert seen.judge(5.51, lambda: 5.5) == "final loss above the loss at initialisation"
    assert seen.judge(4.8, lambda: pytest.fail("plainly below the start")) is None


def test_an_lr_too_low_to_learn_is_no_divergence(tmp_path: Path) -> None:
    """Of these six seeds two draw a first batch whose loss is below that of all windows."""
    dirs = [
        folder(tmp_path / str(seed), spec(run_id=str(seed), lr=1e-6, seed=seed, decay_at=()))
        for seed in range(6)
    ]
    train(*dirs)
    assert {rows(run_dir)[-1]["status"] for run_dir in dirs} == {"ok"}


def test_expert_collapse_is_told_apart() -> None:
    common = {"top_k": 2, "num_experts": 8}
    assert cause("why", effective_experts=2.0, **common) == "expert collapse (why)"
    assert cause("why", effective_experts=5.0, **common) == "why"
    assert cause("why", effective_experts=None, top_k=1, num_experts=1) == "why"
    assert cause("why", effective_experts=2.0, top_k=2, num_experts=2) == "why"


def test_finite_has_no_nan_at_any_depth() -> None:
    assert finite({"a": math.nan, "b": [1.0, {"c": -math.inf}]}) == {
        "a": None,
        "b": [1.0, {"c": None}],
    }


def test_selection_bias_evens_the_load(tmp_path: Path) -> None:
    """Without a load-balance loss, from a router with strong opinions."""
    loads = {}
    for rate in (0.0, 0.01):
        run = spec(options={"bias_rate": rate, "balance_coef": 0.0, "z_loss_coef": 0.0})
        trainer = Trainer.build(run)
        with torch.no_grad():
            for block in trainer.model.blocks:
                block.moe.router *= 7
        for number in range(60):
            trainer.step(number, 0.01)
        loads[rate] = trainer.measure()[0].diagnostics["max_load"]
    assert loads[0.01] < loads[0.0] - 0.2


def test_full_disk_at_a_checkpoint(tmp_path: Path) -> None:
    # A limit on file sizes gives EFBIG, by the same path as ENOSPC.
    run_dir = folder(tmp_path, spec(options={"checkpoint_steps": 2}))
    done = child(run_dir, preexec_fn=small_files)
    assert done.returncode == StorageError.exit_code
    assert done.stderr.startswith("error: cannot write")
    assert "free some space" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [p.name for p in run_dir.iterdir()] == ["spec.json"]


def small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_full_disk_at_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RecordLog(tmp_path / "records.jsonl")
    log.append({"tokens": 1, "status": "ok"})

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match=r"records.jsonl: No space left on device"):
            log.append({"tokens": 2, "status": "ok"})
    assert [row["tokens"] for row in rows(tmp_path)] == [1]
    log.append({"tokens": 2, "status": "ok"})
    log.append({"tokens": 2, "status": "ok"})
    log.append({"tokens": 2, "status": "diverged"})
    assert [row["tokens"] for row in rows(tmp_path)] == [1, 2, 2]


def test_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"a": 1})

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        checkpoint.save(path, {"a": 2})
    assert checkpoint.load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not a run spec"),
        ("[]", "is not a run spec"),
        ('{"run_id": "r", "speed": 3}', "unknown key 'speed'"),
    ],
)
def test_a_bad_spec_is_one_clear_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "spec.json").write_text(text)
    done = child(tmp_path)
    assert done.returncode == SpecError.exit_code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be 'adamw', got 'lion'"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"n_active": 5}, "n_active and n_total are 5 and"),
        ({"parametrization": "mup"}, "needs options.base_shape"),
        ({"parametrization": "magic"}, "parametrization must be one of sp, mup"),
        ({"seq_len": 6400, "batch_tokens": 6400, "decay_at": ()}, "hold 4096 tokens, but seq_len"),
        ({"options": {"device": "cuda"}}, "sees no CUDA device"),
        (
            {"parametrization": "complete_mue", "shape": TOP_1, "options": {"base_shape": TOP_1}},
            "gates 'sigmoid_topk' are normalised over the chosen experts",
        ),
        ({"shape": TOP_1, "options": {"gates": "softmax_topk"}}, "gates 'softmax_topk' are"),
    ],
)
def test_specs_that_the_trainer_cannot_train(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if changes.get("options") == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(SpecError, match=message):
        train(folder(tmp_path, spec(**changes)))
    assert not (tmp_path / "records.jsonl").exists()


def test_the_child_is_silent_without_a_terminal_and_loads_no_sampler(tmp_path: Path) -> None:
    folder(tmp_path, spec(tokens=2560, decay_at=(), warmup_tokens=0))
    code = (
        "import sys; from bayeslr_runners.moe.__main__ import main\n"
        f"status = main([{str(tmp_path)!r}])\n"
        "print(status, *(m for m in ('jax', 'pymc', 'pandas', 'optuna') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]
    assert done.stderr == ""


def test_the_door_is_light() -> None:
    code = (
        "import sys; from bayeslr_runners.moe import MoeRunner\n"
        "print([m for m in ('torch', 'numpy', 'jax', 'pymc', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_trains_on_cuda_in_bfloat16(tmp_path: Path, compiled: bool) -> None:
    run = spec(options={"device": "cuda", "compile": compiled})
    train(folder(tmp_path, run))
    last = rows(tmp_path)[-1]
    assert last["status"] == "ok"
    assert last["device"] != "cpu"
    assert last["loss"] < 2.6
