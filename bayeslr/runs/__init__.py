"""The run table: its columns, its rules, its files, and what it can tell.

One row is one training run, or one checkpoint or decay branch of it. Rows that break a rule are set
aside with the file, line, column, value, rule and advice; they are never dropped or mended.
"""

from bayeslr.runs.cells import QUARANTINE_COLUMNS, Rows, first_reasons, numbers
from bayeslr.runs.columns import (
    ALIASES,
    COLUMN_NAMES,
    COLUMNS,
    REQUIRED_NAMES,
    SHAPE_KEYS,
    STATUSES,
    Column,
    likely_headers,
    nearest,
)
from bayeslr.runs.files import quarantine_path, read_csv, read_rows, write_atomically
from bayeslr.runs.insight import describe, identifiability
from bayeslr.runs.table import (
    RunTable,
    common_horizon,
    concat,
    covariate_values,
    covariates_within,
    horizon,
    last_word,
    lr_group,
    make_table,
    read_runs,
    total_flops,
)

__all__ = [
    "ALIASES",
    "COLUMNS",
    "COLUMN_NAMES",
    "QUARANTINE_COLUMNS",
    "REQUIRED_NAMES",
    "SHAPE_KEYS",
    "STATUSES",
    "Column",
    "Rows",
    "RunTable",
    "common_horizon",
    "concat",
    "covariate_values",
    "covariates_within",
    "describe",
    "first_reasons",
    "horizon",
    "identifiability",
    "last_word",
    "likely_headers",
    "lr_group",
    "make_table",
    "nearest",
    "numbers",
    "quarantine_path",
    "read_csv",
    "read_rows",
    "read_runs",
    "total_flops",
    "write_atomically",
]
