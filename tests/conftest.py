"""What every test shares: no display, no accelerator, no library of the user's own settings."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Set before any test module imports the libraries that read them.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

ROOT = Path(__file__).resolve().parent.parent
HAS_RUNNERS = all(importlib.util.find_spec(name) is not None for name in ("torch", "optuna"))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the runners' tests where the extra ``runners`` is not installed."""
    if collection_path.parent.name == "runners" and not HAS_RUNNERS:
        return True
    return None


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the repository."""
    return ROOT


# Fixtures of the browser and of the statistical half. Their modules are imported here, once the
# environment is set.
from tests.chromium import page  # noqa: E402, F401
from tests.model_fixtures import card, fit_again, posterior, table  # noqa: E402, F401
