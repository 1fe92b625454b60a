"""Foreign formats: one module each, the only place that knows that format.

Every format's module has a function ``read(path, *, family=None, ...)`` that returns a checked
`bayeslr.runs.RunTable`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bayeslr.errors import SpecError
from bayeslr.runs import RunTable

FORMATS: dict[str, str] = {
    "steplaw": "Raw table of the Step Law project, dense or MoE.",
    "csv": "Any table with one run a row; columns are mapped by flags.",
    "wandb": "Runs table of Weights & Biases, downloaded as CSV.",
    "mlflow": "Runs of MLflow: CSV of its page, or of search_runs().",
    "optuna": "Trials of Optuna: CSV of trials_dataframe(), a storage's file, or a sweep's folder.",
    "tensorboard": "One scalar of one run, downloaded as CSV from TensorBoard.",
}


def read(format_name: str, path: str, **options: Any) -> RunTable:
    """Read a file of a foreign format. options: keyword arguments of that module's ``read``."""
    if format_name not in FORMATS:
        raise SpecError(f"no importer named {format_name!r}; there are {', '.join(FORMATS)}")
    table: RunTable = import_module(f"bayeslr.importers.{format_name}").read(path, **options)
    return table
