"""Columns of the run table, and the names that other tools give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from bayeslr.specs import (
    LR_MULTIPLIERS,
    PARAM_CONVENTIONS,
    SCHEDULES,
    WEIGHT_DECAY_KINDS,
)

STATUSES = ("ok", "partial", "diverged", "failed", "lost", "pruned")
ARCHITECTURES = ("dense", "moe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of the run table.

    kind: ``number`` (float64, NaN when missing) or ``text`` (object, None when missing).
    ``above`` and ``at_least`` are lower bounds, ``at_most`` an upper one. ``choices`` is a
    vocabulary; a value outside it is quarantined, or only warned of where ``open_choices``.
    """

    name: str
    kind: str = "number"
    required: bool = False
    unit: str = ""
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    open_choices: bool = False

    @property
    def bounds(self) -> str:
        """The rule for a number, in words: ``finite and > 0``."""
        limits = ((">", self.above), (">=", self.at_least), ("<=", self.at_most))
        return " and ".join(["finite", *(f"{s} {v:g}" for s, v in limits if v is not None)])


COLUMNS: tuple[Column, ...] = (
    Column(name="run_id", kind="text", required=True),
    Column(name="family", kind="text", required=True),
    Column(name="arch", kind="text", choices=ARCHITECTURES),
    Column(name="parametrization", kind="text"),
    Column(name="optimizer", kind="text"),
    Column(name="schedule", kind="text", choices=SCHEDULES, open_choices=True),
    Column(name="warmup_tokens", unit="tokens", at_least=0),
    Column(name="decay_fraction", unit="the share of the tokens", at_least=0, at_most=1),
    Column(name="final_lr_fraction", unit="the share of the peak LR", at_least=0, at_most=1),
    Column(name="lr", required=True, unit="the peak LR", above=0),
    Column(name="weight_decay", at_least=0),
    Column(name="weight_decay_kind", kind="text", choices=WEIGHT_DECAY_KINDS, open_choices=True),
    *(Column(name=name, unit="times the LR", above=0) for name in LR_MULTIPLIERS),
    Column(name="n_active", required=True, unit="parameters", above=0),
    Column(name="n_total", required=True, unit="parameters", above=0),
    Column(name="param_convention", kind="text", required=True, choices=PARAM_CONVENTIONS),
    Column(name="d_model", above=0),
    Column(name="n_layers", above=0),
    Column(name="n_experts", at_least=0),
    Column(name="top_k", at_least=0),
    Column(name="tokens", required=True, unit="tokens", above=0),
    Column(name="planned_tokens", unit="tokens", above=0),
    Column(name="batch_tokens", required=True, unit="tokens a step", above=0),
    Column(name="seq_len", unit="tokens", above=0),
    Column(name="loss", required=True, unit="nats a token", above=0),
    Column(name="loss_kind", kind="text"),
    Column(name="loss_se", unit="nats a token", at_least=0),
    Column(name="status", kind="text", required=True, choices=STATUSES),
    Column(name="status_reason", kind="text"),
    Column(name="seed"),
    Column(name="flops", unit="FLOPs", at_least=0),
    Column(name="wall_s", unit="seconds", at_least=0),
    Column(name="device", kind="text"),
    Column(name="source", kind="text"),
    Column(name="created_at", kind="text"),
)
COLUMN_NAMES = tuple(column.name for column in COLUMNS)
NUMBER_NAMES = tuple(column.name for column in COLUMNS if column.kind == "number")
REQUIRED_NAMES = tuple(column.name for column in COLUMNS if column.required)

# What rows of one run_id must share: they are checkpoints or decay branches of one training run.
RUN_KEYS = ("family", "lr", "n_active", "n_total", "batch_tokens")
# What makes one model shape within a family.
SHAPE_KEYS = ("family", "n_active", "n_total", "d_model", "n_layers", "n_experts", "top_k")

# Names that W&B, MLflow, Optuna, Hugging Face and Megatron users give our columns; best first.
ALIASES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "run_id": "run name run_name exp_name experiment_name id trial number",
        "family": "group series experiment sweep",
        "arch": "architecture model_type",
        "parametrization": "parameterization",
        "optimizer": "optim optimizer_name optimizer.name optimizer.type",
        "schedule": "lr_schedule scheduler lr_scheduler lr_scheduler_type lr_decay_style",
        "lr": "learning_rate peak_lr lr_peak learning_rate_peak max_lr base_lr optimizer.lr "
        "optimizer.learning_rate eta",
        "weight_decay": "wd",
        "n_active": "active_params active_parameters num_active_params n_params num_params "
        "params parameters parameter_count model_size n",
        "n_total": "total_params total_parameters num_total_params n_params num_params params "
        "parameters parameter_count model_size n",
        "d_model": "hidden_size hidden_dim width n_embd",
        "n_layers": "num_layers depth n_layer num_hidden_layers layers",
        "n_experts": "num_experts num_local_experts experts",
        "top_k": "topk num_experts_per_tok moe_top_k router_topk moe_router_topk",
        "tokens": "total_tokens train_tokens tokens_seen num_tokens n_tokens tokens_trained d",
        "planned_tokens": "max_tokens target_tokens",
        "batch_tokens": "batch_size_in_tokens tokens_per_batch global_batch_tokens "
        "batch_size_tokens tokens_per_step",
        "seq_len": "sequence_length seq_length context_length max_seq_len block_size",
        "loss": "final_loss val_loss eval_loss validation_loss eval.loss val.loss "
        "cross_entropy train_loss train.loss",
        "loss_se": "loss_sd loss_std",
        "status": "state",
        "seed": "random_seed",
        "flops": "total_flops train_flops compute c",
        "wall_s": "runtime duration wall_time",
        "device": "gpu gpu_type hardware",
        "created_at": "created start_time timestamp datetime_start",
    }.items()
}


def nearest(name: str, headers: Sequence[str]) -> str | None:
    """The header most likely to hold our column ``name``: an alias, or a near miss."""
    folded = {_fold(header): header for header in reversed(headers)}
    names = [_fold(alias) for alias in (name, *ALIASES.get(name, ()))]
    for alias in names:
        if alias in folded:
            return folded[alias]
    for alias in names:  # config.optimizer.lr, params_lr, summary/val/loss
        for header in headers:
            if len(alias) > 1 and _fold(header).endswith(("." + alias, "_" + alias)):
                return header
    close = get_close_matches(_fold(name), list(folded), n=1, cutoff=0.8)
    return folded[close[0]] if close else None


def likely_headers(names: Iterable[str], headers: Sequence[str]) -> dict[str, str]:
    """Of our columns ``names`` those that a header looks like, with that header."""
    found = {name: header for name in names if (header := nearest(name, headers)) is not None}
    experts = any(nearest(name, headers) for name in ("n_experts", "top_k"))
    if experts and found.get("n_active") == nearest("n_total", headers):
        found.pop("n_active", None)  # one count of an MoE model is its total
    return found


def _fold(name: str) -> str:
    return name.strip().lower().replace("/", ".").replace("-", "_").replace(" ", "_")
