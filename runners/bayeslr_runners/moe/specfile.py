"""The spec in a run's folder, read and checked before PyTorch is imported."""

from __future__ import annotations

from pathlib import Path

from bayeslr.errors import SpecError
from bayeslr.runner_protocol import SPEC_FILE
from bayeslr.specs import RunSpec
from bayeslr_runners.moe.options import Options
from bayeslr_runners.moe.parametrization import depends_on_horizon, rules_of
from bayeslr_runners.moe.schedule import horizons
from bayeslr_runners.moe.shapes import MoeShape


def read_spec(run_dir: Path) -> RunSpec:
    """The spec of a run's folder, checked against the trainer's own rules.

    Raises: SpecError if it is missing or breaks a rule.
    """
    path = run_dir / SPEC_FILE
    try:
        spec = RunSpec.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"{path} does not exist; a run's folder holds its spec") from error
    except (SpecError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not a run spec: {error}") from error
    check_spec(spec)
    return spec


def check_spec(spec: RunSpec) -> None:
    """Raise SpecError for whatever can be known to be wrong before any data are read."""
    shape = MoeShape.from_mapping(spec.shape)
    options = Options.from_mapping(spec.options)
    horizons(spec)
    if len(spec.decay_at) > 1 and depends_on_horizon(spec):
        raise SpecError(
            f"run {spec.run_id}: under {spec.parametrization!r} with these options the LR or the "
            f"betas depend on the horizon, but decay_at is {list(spec.decay_at)}: the shorter ones "
            "would be measured at another LR than the record says; use one run a token count"
        )
    gates = options.model.gates or rules_of(spec).gates
    if shape.has_router and shape.top_k == 1 and gates.endswith("_topk"):
        raise SpecError(
            f"run {spec.run_id}: gates {gates!r} are normalised over the chosen experts, so with "
            "top_k = 1 each gate is 1 whatever the router says, and the tokens' loss never reaches "
            "it; use options.gates = 'sigmoid' or 'softmax', or top_k >= 2"
        )
    if spec.continues_at % spec.batch_tokens:
        raise SpecError(
            f"run {spec.run_id}: continues_at ({spec.continues_at}) must be a multiple of "
            f"batch_tokens ({spec.batch_tokens})"
        )
    if spec.optimizer != "adamw":
        raise SpecError(f"run {spec.run_id}: optimizer must be 'adamw', got {spec.optimizer!r}")
    if spec.seed < 0:
        raise SpecError(f"run {spec.run_id}: seed must be >= 0, got {spec.seed}")
    if spec.param_convention == "non_embedding":
        counts = shape.counts(qk_norm=options.model.qk_norm)
        if counts != (spec.n_active, spec.n_total):
            raise SpecError(
                f"run {spec.run_id}: n_active and n_total are {spec.n_active} and {spec.n_total}, "
                f"but the shape has {counts[0]} and {counts[1]} non-embedding parameters"
            )
