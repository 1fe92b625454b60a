"""Stacks: runs that differ in LR, weight decay or seed, trained as one program."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bayeslr.errors import SpecError, StorageError
from bayeslr.runner_protocol import STOP_FILE
from bayeslr.specs import RunSpec
from bayeslr_runners.moe import MoeRunner
from bayeslr_runners.moe.parts import MAX_MEMBERS, split
from bayeslr_runners.moe.stack import stack_key
from bayeslr_runners.moe.train import train
from bayeslr_runners.moe.trainer import Trainer
from tests.runners.stopping import train_stopped

SHAPE = {"name": "tiny", "d_model": 16, "n_layers": 2, "n_heads": 2, "d_expert": 8,
         "n_experts": 4, "top_k": 2, "n_shared_experts": 1}  # fmt: skip
OPTIONS = {"data": "synthetic", "synthetic_vocab": 16, "synthetic_order": 1, "synthetic_seed": 3,
           "synthetic_branching": 3, "synthetic_tokens": 40_000, "val_tokens": 2048, "threads": 1,
           "partial_evals": 1, "bias_rate": 0.001}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread", "deterministic")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As in the trainer's own process."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def spec(run_id: str, *, options: dict[str, Any] | None = None, **changes: Any) -> RunSpec:
    options = OPTIONS | (options or {})
    n_active, n_total = MoeRunner(options).counts(SHAPE)
    values: dict[str, Any] = {
        "run_id": run_id, "family": "f", "runner": "moe", "lr": 0.01, "tokens": 7680,
        "decay_at": (5120,), "batch_tokens": 256, "seq_len": 32, "warmup_tokens": 1280,
        "n_active": n_active, "n_total": n_total, "shape": SHAPE, "options": options,
    }  # fmt: skip
    return RunSpec(**{**values, **changes})


def members() -> list[RunSpec]:
    return [
        spec("low", lr=0.002),
        spec("high", lr=0.02),
        spec("decayed", weight_decay=1.0),
        spec("seed", seed=7),
        spec("module", options={"lr_multipliers": {"router": 4.0, "head": 0.5}}),
    ]


def folder(path: Path, run: RunSpec) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "spec.json").write_text(run.to_json())
    return path


def folders(path: Path, runs: list[RunSpec]) -> list[Path]:
    return [folder(path / run.run_id, run) for run in runs]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "records.jsonl").read_text().splitlines()]


def told(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(r["run_id"], r["status"], r["tokens"], r["schedule_state"], r["lr"], r["seed"])
            for r in rows(run_dir)]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": False, "gates": "sigmoid", "bias_rate": 0.0}],
    ids=["softmax", "sigmoid"],
)
def test_a_member_takes_the_steps_that_it_takes_alone(changes: dict[str, Any]) -> None:
    runs = [replace(run, options=run.options | changes) for run in members()]
    stack, alone = Trainer.build(*runs), [Trainer.build(run) for run in runs]
    for number in range(8):
        together = stack.step(number, 1.0)
        for run, one, trainer in zip(runs, together, alone, strict=True):
            (step,) = trainer.step(number, 1.0)
            assert one.loss == pytest.approx(step.loss, rel=1e-4), run.run_id
            assert one.grad_norm == pytest.approx(step.grad_norm, rel=1e-3), run.run_id
            assert one.effective_experts == pytest.approx(step.effective_experts, rel=0.02)
    for measured, trainer in zip(stack.measure(), alone, strict=True):
        (wanted,) = trainer.measure()
        assert measured.loss == pytest.approx(wanted.loss, rel=1e-4)
        assert measured.loss_se == pytest.approx(wanted.loss_se, rel=1e-3)
        assert set(measured.diagnostics) == set(wanted.diagnostics)
        for name, value in wanted.diagnostics.items():
            assert measured.diagnostics[name] == pytest.approx(value, rel=0.02), name
    losses = {round(step.loss, 4) for step in together}
    assert len(losses) == len(runs)  # the members do differ


def test_what_a_run_is_stacked_with_changes_no_bit_of_it() -> None:
    runs = [spec(str(lr), lr=lr) for lr in (0.002, 0.004, 0.008, 0.016)]
    stack, alone = Trainer.build(*runs), Trainer.build(runs[1], stacked=True)
    left = [0, 1, 2, 3]
    for number in range(30):
        if number in (10, 20):  # members leave, at last all others
            left = left[:2] if number == 10 else [1]
            stack = stack.keeping([0, 1] if number == 10 else [1])
        together, (step,) = stack.step(number, 1.0), alone.step(number, 1.0)
        assert together[left.index(1)] == step
    assert stack.measure()[0].loss == alone.measure()[0].loss


@pytest.mark.parametrize("arch", ["dense", "top-1"])
def test_stacks_of_other_architectures(arch: str) -> None:
    shape = SHAPE | {"n_experts": 1 if arch == "dense" else 4, "top_k": 1}
    n_active, n_total = MoeRunner(OPTIONS).counts(shape)
    runs = [
        spec(str(lr), lr=lr, shape=shape, n_active=n_active, n_total=n_total,
             options={"bias_rate": 0})
        for lr in (0.005, 0.01)
    ]  # fmt: skip
    stack, alone = Trainer.build(*runs), [Trainer.build(run) for run in runs]
    for number in range(5):
        together = stack.step(number, 1.0)
        wanted = [trainer.step(number, 1.0)[0] for trainer in alone]
    for one, step in zip(together, wanted, strict=True):
        assert one.loss == pytest.approx(step.loss, rel=1e-4)


def test_records_of_a_stack_are_those_of_separate_runs(tmp_path: Path) -> None:
    together, apart = folders(tmp_path / "stack", members()), folders(tmp_path / "one", members())
    train(*together)
    for stacked, alone in zip(together, apart, strict=True):
        train(alone)
        assert told(stacked) == told(alone)
        for one, wanted in zip(rows(stacked), rows(alone), strict=True):
            assert set(one) == set(wanted)
            assert one["loss"] == wanted["loss"]  # to the bit
        assert not (stacked / "checkpoint.pt").exists()


def test_a_diverging_member_leaves_the_others_untouched(tmp_path: Path) -> None:
    good = [spec("a", lr=0.005), spec("b", lr=0.01)]
    # Weight decay that multiplies the weights by -89 a step: not finite after a few dozen.
    bad = [spec("wild", lr=9.0), spec("wilder", lr=9.0, weight_decay=10.0)]
    together = folders(tmp_path / "mixed", [good[0], *bad, good[1]])
    train(*together)
    apart = folders(tmp_path / "good", good)
    train(*apart)
    for mixed, alone in zip((together[0], together[3]), apart, strict=True):
        assert told(mixed) == told(alone)
        for one, wanted in zip(rows(mixed), rows(alone), strict=True):
            assert one["loss"] == wanted["loss"]
    for run_dir in together[1:3]:
        last = rows(run_dir)[-1]
        assert last["status"] == "diverged"
        assert last["status_reason"]
        assert last["loss"] is None


def test_a_member_that_is_to_stop_leaves_the_others_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [spec(name, lr=lr) for name, lr in (("a", 0.005), ("b", 0.01), ("c", 0.02))]
    whole, stopped = folders(tmp_path / "whole", runs), folders(tmp_path / "stopped", runs)
    train(*whole)
    take_step, stacked = Trainer.step, list[int]()

    def step(self: Trainer, number: int, lr_factor: float) -> Any:
        stacked.append(len(self.specs))
        if len(stacked) == 15:
            (stopped[1] / STOP_FILE).touch()
        return take_step(self, number, lr_factor)

    monkeypatch.setattr(Trainer, "step", step)
    train(*stopped)
    # 24 steps on the trunk, which is measured after 12, with a branch of 4 and one of 6.
    assert stacked == [3] * 15 + [2] * 19
    assert not (stopped[1] / STOP_FILE).exists()
    assert [row["status"] for row in rows(stopped[1])] == ["partial"]
    for i in (0, 2):
        assert [row["loss"] for row in rows(stopped[i])] == [row["loss"] for row in rows(whole[i])]
        assert rows(stopped[i])[-1]["status"] == "ok"


def test_a_stack_of_diverging_runs_ends(tmp_path: Path) -> None:
    runs = folders(tmp_path, [spec("wild", lr=9.0), spec("wilder", lr=9.9)])
    train(*runs)
    assert [rows(run_dir)[-1]["status"] for run_dir in runs] == ["diverged", "diverged"]


# 24 steps on the trunk with a branch of 4 and one of 6: stopped on the trunk and in both branches.
@pytest.mark.parametrize("steps", [3, 18, 30])
def test_a_stopped_stack_goes_on_and_ends_the_same(
    tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [spec(name, lr=lr, options={"checkpoint_steps": 2}) for name, lr in
            (("a", 0.005), ("b", 0.01), ("c", 0.02))]  # fmt: skip
    whole, broken = folders(tmp_path / "whole", runs), folders(tmp_path / "broken", runs)
    train(*whole)
    train_stopped(*broken, steps=steps, monkeypatch=monkeypatch)
    # One member's checkpoint is lost: it starts afresh while the others go on.
    (broken[2] / "checkpoint.pt").unlink()
    train(*broken)
    for one, wanted in zip(broken, whole, strict=True):
        assert told(one) == told(wanted)
        for row, expected in zip(rows(one), rows(wanted), strict=True):
            assert row["loss"] == expected["loss"]
    before = [(run_dir / "records.jsonl").read_bytes() for run_dir in broken]
    train(*broken)
    assert [(run_dir / "records.jsonl").read_bytes() for run_dir in broken] == before


def test_a_single_run_goes_on_from_a_stacks_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [spec(name, lr=lr, options={"checkpoint_steps": 5}) for name, lr in
            (("a", 0.005), ("b", 0.01))]  # fmt: skip
    stacked = folders(tmp_path, runs)
    with monkeypatch.context() as patch:
        patch.setattr("bayeslr_runners.moe.train._Run._record_horizon", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(*stacked)
    assert (stacked[1] / "checkpoint.pt").exists()
    train(stacked[1])
    alone = folder(tmp_path / "alone", runs[1])
    train(alone)
    assert told(stacked[1]) == told(alone)
    assert rows(stacked[1])[-1]["loss"] == rows(alone)[-1]["loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_tokens": 512}, "batch_tokens is 256 and 512"),
        ({"options": {"z_loss_coef": 0.5}}, "options is"),
        ({"run_id": "a"}, "same run_id"),
    ],
)
def test_runs_that_differ_in_more_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    runs = [spec("a"), spec(**{"run_id": "b", **change})]
    paths = [folder(tmp_path / str(number), run) for number, run in enumerate(runs)]
    with pytest.raises(SpecError, match=message):
        train(*paths)


def test_the_key_says_which_runs_can_be_stacked() -> None:
    assert len({stack_key(run) for run in members()}) == 1
    assert stack_key(spec("a")) != stack_key(spec("a", tokens=12_800))
    # Runs that go on from others share a stack where they begin at the same place.
    later = {"tokens": 12_800, "decay_at": (12_800,), "continues_at": 5120}
    assert stack_key(spec("a", continues="x", **later)) == stack_key(
        spec("b", continues="y", **later)
    )
    assert stack_key(spec("a", continues="x", **later)) != stack_key(
        spec("b", continues="y", **{**later, "continues_at": 4096})
    )


@pytest.mark.parametrize(("device", "num_keys"), [("cpu", 2), ("cuda", 1)])
def test_wide_runs_are_not_stacked_on_a_cpu(device: str, num_keys: int) -> None:
    shape = {**SHAPE, "d_model": 128}
    wide = [spec(name, shape=shape, options={"device": device}) for name in "ab"]
    assert len({stack_key(run) for run in wide}) == num_keys


def test_one_child_trains_all_folders(tmp_path: Path) -> None:
    runs = [spec("a", lr=0.005), spec("b", lr=0.01)]
    paths = folders(tmp_path, runs)
    command = MoeRunner(OPTIONS).stack_command(paths)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [rows(path)[-1]["status"] for path in paths] == ["ok", "ok"]
    paths.append(folder(tmp_path / "other", spec("other", seq_len=64)))
    done = subprocess.run(
        MoeRunner(OPTIONS).stack_command(paths), capture_output=True, text=True, check=False
    )
    assert done.returncode == SpecError.exit_code
    assert "cannot be trained as one program: seq_len is 32 and 64" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_stack_is_split_over_the_cores_evenly_and_within_bounds() -> None:
    folders = [Path(str(i)) for i in range(37)]
    for count in range(2, 38):
        for num_cores in (1, 2, 3, 16):
            parts = split(folders[:count], num_cores)
            assert sorted(folder for part in parts for folder in part) == sorted(folders[:count])
            sizes = [len(part) for part in parts]
            assert 1 <= min(sizes) >= max(sizes) - 1
            assert max(sizes) <= MAX_MEMBERS
            assert len(parts) == count or len(parts) % num_cores == 0  # no core is left idle


def test_the_parts_of_a_stack_do_what_separate_runs_do(tmp_path: Path) -> None:
    runs = [replace(run, options=run.options | {"threads": 2}) for run in members()]
    together, apart = folders(tmp_path / "parts", runs), folders(tmp_path / "one", runs)
    done = subprocess.run(MoeRunner({}).stack_command(together), capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for parted, alone in zip(together, apart, strict=True):
        train(alone)
        assert told(parted) == told(alone)
        assert rows(parted)[-1]["loss"] == rows(alone)[-1]["loss"]
        assert rows(parted)[-1]["diagnostics"]["threads"] == 1


def test_a_part_that_breaks_leaves_the_others_to_end(tmp_path: Path) -> None:
    runs = [spec(name, options={"threads": 2}) for name in "abcd"]
    paths = folders(tmp_path, runs)  # parts: a and c, b and d
    (paths[1] / "checkpoint.pt").write_bytes(b"not a checkpoint")
    done = subprocess.run(MoeRunner({}).stack_command(paths), capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == StorageError.exit_code
    assert "cannot be read" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [rows(paths[i])[-1]["status"] for i in (0, 2)] == ["ok", "ok"]
    assert not (paths[3] / "records.jsonl").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children on Linux alone")
def test_parts_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    runs = [spec(name, tokens=100_000_000, decay_at=(),
                 options={"threads": 2, "checkpoint_steps": 2}) for name in "ab"]  # fmt: skip
    paths = folders(tmp_path, runs)
    ends, writing = os.pipe()  # read to its end once no part holds it any more
    os.set_inheritable(writing, True)
    process = subprocess.Popen(MoeRunner({}).stack_command(paths), close_fds=False)
    os.close(writing)
    deadline = time.monotonic() + 60
    while not all((path / "checkpoint.pt").exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    readable, _, _ = select.select([ends], [], [], 30)
    assert readable
    assert os.read(ends, 1) == b""
    os.close(ends)
