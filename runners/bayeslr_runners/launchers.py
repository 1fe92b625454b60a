"""Launchers: workers of a sweep started by SLURM (through submitit), by Ray, or here in the back.

Each takes the command of one worker and starts it ``count`` times, as jobs that outlive the caller.
``settings`` go to the scheduler as they are.
"""

from __future__ import annotations

import importlib
import inspect
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayeslr.errors import SpecError


def slurm(words: Sequence[str], *, count: int, folder: Path, settings: Mapping[str, Any]
          ) -> list[str]:  # fmt: skip
    """Jobs of one SLURM array; their ids. Logs lie in ``folder``.

    settings: those of submitit, such as timeout_min, gpus_per_node, slurm_partition.
    Raises: SpecError without SLURM on this machine, or for a setting that submitit does not know.
    """
    submitit = _package("submitit", "bayeslr[slurm]")
    if submitit.AutoExecutor.which() != "slurm":
        raise SpecError(
            "no SLURM here (srun is not found); submit from a login node, or start workers by hand"
        )
    return _submitted("slurm", words, count, folder, settings)


def local(words: Sequence[str], *, count: int, folder: Path, settings: Mapping[str, Any]
          ) -> list[str]:  # fmt: skip
    """Processes on this machine, in the background; their process ids. Otherwise as `slurm`."""
    return _submitted("local", words, count, folder, settings)


def _submitted(cluster: str, words: Sequence[str], count: int, folder: Path,
               settings: Mapping[str, Any]) -> list[str]:  # fmt: skip
    submitit = _package("submitit", "bayeslr[slurm]")
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    try:
        # A worker goes on until its sweep has stopped: a day, where nothing is said.
        executor.update_parameters(**{"timeout_min": 24 * 60, "name": "bayeslr", **settings})
    except (NameError, TypeError, ValueError) as error:
        raise SpecError(f"{cluster} does not take these settings: {error}") from error
    command = submitit.helpers.CommandFunction(list(words))
    with executor.batch():
        jobs = [executor.submit(command) for _ in range(count)]
    return [str(job.job_id) for job in jobs]


def ray(words: Sequence[str], *, count: int, folder: Path, settings: Mapping[str, Any]
        ) -> list[str]:  # fmt: skip
    """Jobs of a Ray cluster; their ids. `ray job logs ID` shows what one says.

    settings: ``address`` of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, then this
    machine's), and those of Ray's submit_job, such as entrypoint_num_gpus.
    Raises: SpecError where no cluster answers, or for a setting that Ray does not know.
    """
    client_of = _package("ray.job_submission", "ray[default]").JobSubmissionClient
    rest = dict(settings)
    address = rest.pop("address", None)
    known = inspect.signature(client_of.submit_job).parameters
    if unknown := set(rest) - set(known):
        raise SpecError(f"ray does not take these settings: {', '.join(sorted(unknown))}")
    try:
        client = client_of(address)
    except (ConnectionError, RuntimeError) as error:
        where = address or "its default address"
        raise SpecError(f"no Ray cluster answers at {where}: {error}") from error
    return [str(client.submit_job(entrypoint=shlex.join(words), **rest)) for _ in range(count)]


def _package(name: str, requirement: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SpecError(
            f"this launcher needs the package {error.name!r}: pip install '{requirement}'"
        ) from error
