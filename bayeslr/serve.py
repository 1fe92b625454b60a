"""Inference for processes that must not load JAX: JSON lines in, JSON lines out.

``python -m bayeslr.serve`` reads one request a line and answers each with one line:

    {"op": "choose", "runs": [row, ...], "tables": [path, ...], "prior": card, "seed": 1,
     "candidates": [run spec, ...], "flops": [...], "under_way": [run spec, ...],
     "targets": [target, ...], "num_runs": 1, "choice_seed": 7}
        -> {"chosen": [index, ...], "reasons": [...], "stop_reason": "...", "regret_now": nats,
            "verdict": "...", "set_aside": "..."}
    {"op": "predict", "runs": [...], "tables": [...], "prior": card, "seed": 1, "targets": [...]}
        -> {"predictions": [row, ...], "covariates": [row, ...], "verdict": "...",
            "trustworthy": true, "set_aside": "..."}

``runs`` are rows of the run table, ``tables`` files of them; ``set_aside`` says which of them broke
its rules and do not count, and is empty as a rule. ``under_way``, which may be left out, are runs
that others are making now. What went wrong is answered by {"error": "..."}; what is no finite
number is null. The last posterior is kept: two requests about the same runs fit once. A fit of few
draws that fails its gate is made again with all of them, as in a sweep; if that fails too, nothing
is chosen by it (the error is its verdict), and predictions say that they are not trustworthy.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

from bayeslr import acquire, predict, sampling
from bayeslr.covariates import covariate_table
from bayeslr.errors import BayeslrError, SpecError, UntrustworthyFit
from bayeslr.posterior import Posterior
from bayeslr.runs import RunTable, concat, first_reasons, make_table, read_runs
from bayeslr.runs.files import json_text
from bayeslr.space import Candidate
from bayeslr.specs import RunSpec, Spec, Target, is_finite, make_spec, require_whole

_ALWAYS = ("runs", "prior", "seed", "targets")
_NEEDED = {
    "predict": _ALWAYS,
    "choose": (*_ALWAYS, "candidates", "flops", "num_runs", "choice_seed"),
}


class Server:
    """Answers requests; keeps the last posterior."""

    def __init__(self) -> None:
        self._key: tuple[str, str, int] | None = None
        self._posterior: Posterior | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Reply to one request. Raises: BayeslrError."""
        op = request.get("op")
        if not isinstance(op, str) or op not in _NEEDED:
            raise SpecError(f"op must be choose or predict, got {op!r}")
        if missing := [name for name in _NEEDED[op] if name not in request]:
            raise SpecError(f"not a request: {missing[0]} is missing")
        targets = _specs(Target, request, "targets")
        if not targets:
            raise SpecError("targets must hold at least one target, got none")
        candidates, under_way, num_runs, choice_seed = [], [], 0, 0
        if op == "choose":
            candidates = _candidates(request)
            under_way = _specs(RunSpec, request, "under_way") if "under_way" in request else []
            num_runs = require_whole(request["num_runs"], "num_runs", 1)
            choice_seed = require_whole(request["choice_seed"], "choice_seed")
        table = _table(request)
        set_aside = first_reasons(table.quarantine)
        posterior = self._fit(table, request)
        verdict = str(posterior.info["verdict"])
        if op == "predict":
            return {
                "predictions": predict.predict(posterior, targets),
                "covariates": covariate_table(posterior, targets),
                "verdict": verdict,
                "trustworthy": posterior.trustworthy,
                "set_aside": set_aside,
            }
        if not posterior.trustworthy:
            raise UntrustworthyFit(verdict)
        plan = acquire.choose(
            posterior, candidates, targets, num_runs=num_runs,
            budget_flops=math.inf, seed=choice_seed, only_paying=False, under_way=under_way,
        )  # fmt: skip
        place = {id(c.spec): i for i, c in enumerate(candidates)}
        return {
            "chosen": [place[id(p.spec)] for p in plan.proposals],
            "reasons": [p.reason for p in plan.proposals],
            "stop_reason": plan.stop_reason,
            "regret_now": plan.regret_now,
            "verdict": verdict,
            "set_aside": set_aside,
        }

    def _fit(self, table: RunTable, request: Mapping[str, Any]) -> Posterior:
        prior, seed = request["prior"], require_whole(request["seed"], "seed")
        if not isinstance(prior, str):
            raise SpecError(f"prior must be the name of a card or the path of one, got {prior!r}")
        key = (table.data_hash, prior, seed)
        if self._posterior is None or key != self._key:
            self._posterior = sampling.refit(table, prior, seed=seed)
            self._key = key
        return self._posterior


def _table(request: Mapping[str, Any]) -> RunTable:
    rows, paths = _list(request, "runs", dict, "JSON objects"), []
    if "tables" in request:
        paths = _list(request, "tables", str, "paths")
    parts = [make_table(rows, source="the study")] if rows else []
    parts += [read_runs(path) for path in paths]
    if not parts:
        raise SpecError("a request needs runs, or tables of them")
    return concat(parts) if len(parts) > 1 else parts[0]


def _list(request: Mapping[str, Any], name: str, kind: type, what: str) -> list[Any]:
    found = request[name]
    if not isinstance(found, list):
        raise SpecError(f"{name} must be a list of {what}, got {found!r:.80}")
    for i, entry in enumerate(found):
        if not isinstance(entry, kind):
            raise SpecError(f"{name} must be a list of {what}, got {entry!r:.80} as {name}[{i}]")
    return found


def _specs(cls: type[Spec], request: Mapping[str, Any], name: str) -> list[Spec]:
    raw = _list(request, name, dict, "JSON objects")
    return [make_spec(cls, entry, f"{name}[{i}]") for i, entry in enumerate(raw)]


def _candidates(request: Mapping[str, Any]) -> list[Candidate]:
    specs, flops = _specs(RunSpec, request, "candidates"), request["flops"]
    if not isinstance(flops, list) or len(flops) != len(specs):
        count = f"{len(flops)} of them" if isinstance(flops, list) else repr(flops)
        raise SpecError(f"flops must be {len(specs)} numbers, one a candidate, got {count}")
    for i, value in enumerate(flops):
        if not (is_finite(value) and value > 0):
            raise SpecError(f"flops[{i}] must be a number > 0, got {value!r:.80}")
    return [Candidate(spec=s, flops=float(f)) for s, f in zip(specs, flops, strict=True)]


def _request(line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, too long a number, too deep a nest
        raise SpecError(f"not a request: {error}") from error
    if not isinstance(request, dict):
        raise SpecError("not a request: a JSON object is needed")
    return request


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer every line of ``requests`` until it ends."""
    server = Server()
    for line in requests:
        try:
            reply = server.answer(_request(line))
        except BayeslrError as error:
            reply = {"error": str(error)}
        except Exception as error:
            # Said to whoever asked, who may go on without inference; the trace is for us.
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            reply = {"error": f"inference failed, and that is a fault of bayeslr's: {what}"}
        replies.write(json_text(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    # What libraries print must not land between the replies.
    out, sys.stdout = sys.stdout, sys.stderr
    serve(sys.stdin, out)
