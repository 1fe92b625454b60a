"""Inference for processes that must not load JAX: JSON lines in, JSON lines out.

``python -m bayeslr.serve`` reads one request a line and answers each with one line:

    {"op": "choose", "runs": [row, ...], "tables": [path, ...], "prior": card, "seed": 1,
     "candidates": [run spec, ...], "flops": [...], "targets": [target, ...], "num_runs": 1,
     "choice_seed": 7}
        -> {"chosen": [index, ...], "reasons": [...], "regret_now": nats, "verdict": "..."}
    {"op": "predict", "runs": [...], "tables": [...], "prior": card, "seed": 1, "targets": [...]}
        -> {"predictions": [row, ...], "verdict": "..."}

``runs`` are rows of the run table, ``tables`` files of them. What went wrong is answered by
{"error": "..."}. The last posterior is kept: two requests about the same runs fit once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

from bayeslr import acquire, predict, sampling
from bayeslr.errors import BayeslrError, SpecError
from bayeslr.posterior import Posterior
from bayeslr.runs import concat, make_table, read_runs
from bayeslr.space import Candidate
from bayeslr.specs import RunSpec, Target, check_keys

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
        if op not in _NEEDED:
            raise SpecError(f"op must be choose or predict, got {op!r}")
        if missing := [name for name in _NEEDED[op] if name not in request]:
            raise SpecError(f"not a request: {missing[0]} is missing")
        targets = [_target(raw) for raw in request["targets"]]
        posterior = self._fit(request)
        verdict = str(posterior.info["verdict"])
        if op == "predict":
            table = predict.predict(posterior, targets)
            return {"predictions": json.loads(table.to_json(orient="records")), "verdict": verdict}
        candidates = [
            Candidate(spec=RunSpec.from_json(json.dumps(raw)), flops=float(flops))
            for raw, flops in zip(request["candidates"], request["flops"], strict=True)
        ]
        plan = acquire.choose(
            posterior, candidates, targets, num_runs=int(request["num_runs"]),
            budget_flops=math.inf, seed=int(request["choice_seed"]), only_paying=False,
        )  # fmt: skip
        place = {id(c.spec): i for i, c in enumerate(candidates)}
        return {
            "chosen": [place[id(p.spec)] for p in plan.proposals],
            "reasons": [p.reason for p in plan.proposals],
            "regret_now": plan.regret_now,
            "verdict": verdict,
        }

    def _fit(self, request: Mapping[str, Any]) -> Posterior:
        parts = [make_table(request["runs"], source="the study")] if request["runs"] else []
        parts += [read_runs(path) for path in request.get("tables", ())]
        if not parts:
            raise SpecError("a request needs runs, or tables of them")
        table = concat(parts) if len(parts) > 1 else parts[0]
        key = (table.data_hash, str(request["prior"]), int(request["seed"]))
        if self._posterior is None or key != self._key:
            self._posterior = sampling.fit(table, key[1], seed=key[2], fast=True)
            self._key = key
        return self._posterior


def _target(raw: Mapping[str, Any]) -> Target:
    check_keys(raw, [f.name for f in dataclasses.fields(Target)], "a target")
    return Target(**raw)


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer every line of ``requests`` until it ends."""
    server = Server()
    for line in requests:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise SpecError("not a request: a JSON object is needed")
            reply = server.answer(request)
        except json.JSONDecodeError as error:
            reply = {"error": f"not a request: {error}"}
        except BayeslrError as error:
            reply = {"error": str(error)}
        except Exception as error:
            # Said to whoever asked, who may go on without inference; the trace is for us.
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            reply = {"error": f"inference failed, and that is a fault of bayeslr's: {what}"}
        replies.write(json.dumps(reply, default=str) + "\n")
        replies.flush()


if __name__ == "__main__":
    # What libraries print must not land between the replies.
    out, sys.stdout = sys.stdout, sys.stderr
    serve(sys.stdin, out)
