"""Proxy trainer: small mixture-of-experts transformers in PyTorch, one child process a run.

This door is light: nothing here imports PyTorch or NumPy.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec
from bayeslr.units import train_flops
from bayeslr_runners.moe.options import Options
from bayeslr_runners.moe.parametrization import depends_on_horizon
from bayeslr_runners.moe.rules import transfer_rules
from bayeslr_runners.moe.schedule import trained_tokens
from bayeslr_runners.moe.shapes import MoeShape
from bayeslr_runners.moe.stack import stack_key
from bayeslr_runners.moe.trunk import has_trunk

__all__ = ["MoeRunner"]


class MoeRunner:
    """Runs of the proxy trainer, as `bayeslr.runner_protocol.Runner` asks.

    options: the recipe's ``[options]``. Raises: SpecError on an unknown key or a broken rule.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = Options.from_mapping(options)

    def counts(self, shape: Mapping[str, Any]) -> tuple[int, int]:
        """Active and total non-embedding parameters of a shape, by arithmetic."""
        return MoeShape.from_mapping(shape).counts(qk_norm=self.options.model.qk_norm)

    def flops(self, spec: RunSpec) -> float:
        """FLOPs of the trunk, from where the run begins, and of every decay branch."""
        return train_flops(spec.n_active, trained_tokens(spec))

    def command(self, spec: RunSpec, run_dir: Path) -> list[str]:
        """Command line of the child process."""
        _require_convention(spec)
        return [sys.executable, "-m", "bayeslr_runners.moe", str(run_dir)]

    def has_trunk(self, spec: RunSpec, runs_dir: Path) -> bool:
        """Whether the run can go on from the one that it names; see `trunk`."""
        return has_trunk(spec, runs_dir)

    def depends_on_horizon(self, spec: RunSpec) -> bool:
        """Whether horizon rules keep the run from measuring shorter horizons on its way."""
        return depends_on_horizon(spec)

    def stack_key(self, spec: RunSpec) -> str:
        """Equal for runs that `stack_command` had better train together; see `stack`."""
        _require_convention(spec)
        return stack_key(spec)

    def stack_command(self, run_dirs: Sequence[Path]) -> list[str]:
        """Command line of one child that trains all these folders as one program.

        Each folder holds its spec, and gets the records and checkpoints that it would get alone.
        """
        return [sys.executable, "-m", "bayeslr_runners.moe", *map(str, run_dirs)]

    def transfer_rules(
        self, parametrization: str, base: Mapping[str, Any], target: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What every module group gets at ``target``, tuned at ``base``; see `rules`."""
        return transfer_rules(parametrization, self.options.scaling, base, target)

    def check_command(self, arguments: Sequence[str]) -> list[str]:
        """Command line of the child that runs a coordinate check; see `coordinate_check`."""
        return [sys.executable, "-m", "bayeslr_runners.moe.coordinate_check", *arguments]


def _require_convention(spec: RunSpec) -> None:
    if spec.param_convention != "non_embedding":
        raise SpecError(
            f"run {spec.run_id}: the proxy trainer counts non_embedding parameters, got "
            f"param_convention {spec.param_convention!r}"
        )
