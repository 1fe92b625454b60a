"""Training that is cut off between two optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bayeslr_runners.moe.train import train
from bayeslr_runners.moe.trainer import Trainer


class Stop(Exception):
    """Instead of the kill."""


def train_stopped(*run_dirs: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the runs of these folders until ``steps`` optimizer steps are taken, then break off."""
    done = 0
    take_step = Trainer.step

    def step(self: Trainer, number: int, lr_factor: float) -> Any:
        nonlocal done
        if done == steps:
            raise Stop
        done += 1
        return take_step(self, number, lr_factor)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Stop):
            train(*run_dirs)
