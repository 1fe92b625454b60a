"""The stable trunk that a WSD run leaves for longer ones; loads no PyTorch.

It stands where the last decay begins. A longer run of the same settings passes through that very
state, so it may begin there: the two folders lie beside each other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec
from bayeslr_runners.moe.options import Options
from bayeslr_runners.moe.parametrization import depends_on_horizon
from bayeslr_runners.moe.schedule import horizons
from bayeslr_runners.moe.specfile import read_spec

CHECKPOINT_FILE, TRUNK_FILE = "checkpoint.pt", "trunk.pt"

# What a run and the one that goes on from it may differ in.
_FREE = ("run_id", "tokens", "decay_at", "continues", "continues_at")


def trunk_tokens(spec: RunSpec) -> int | None:
    """Tokens at which a run leaves its trunk to longer ones; None if it leaves none.

    Without a decay there is nothing to leave it for, and under rules of the horizon (an LR or betas
    that depend on the tokens to come) another run's trunk is another.
    """
    wanted, last = Options.from_mapping(spec.options).train.keep_trunk, horizons(spec)[-1]
    if not wanted or depends_on_horizon(spec) or not 0 < last.branch_step < last.num_steps:
        return None
    return last.branch_step * spec.batch_tokens


def trunk_key(spec: RunSpec) -> str:
    """Equal for runs that share their trunk as far as both go."""
    values = {k: v for k, v in dataclasses.asdict(spec).items() if k not in _FREE}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def has_trunk(spec: RunSpec, runs_dir: Path) -> bool:
    """Whether a continuing run can start from the trunk beside it, or resume in its own folder."""
    if (runs_dir / spec.run_id / CHECKPOINT_FILE).exists():
        return True
    earlier_dir = runs_dir / str(spec.continues)
    if not (earlier_dir / TRUNK_FILE).exists():
        return False
    try:
        earlier = read_spec(earlier_dir)
    except SpecError:
        return False
    return trunk_key(earlier) == trunk_key(spec) and trunk_tokens(earlier) == spec.continues_at
