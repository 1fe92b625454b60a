"""Child process of a coordinate check: ``python -m bayeslr_runners.moe.coordinate_check``.

Trains a few steps at several sizes, writes table, verdict and plot to a folder. The data are a
Markov chain over 16 tokens: with more tokens than columns, the tokens' updates interfere at the
small widths and every slope is a little negative.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslr.errors import BayeslrError, SpecError
from bayeslr.specs import RunSpec
from bayeslr_runners.moe.options import GROUPS, Options
from bayeslr_runners.moe.parametrization import PARAMETRIZATIONS, SOURCES, parametrization
from bayeslr_runners.moe.rules import completed
from bayeslr_runners.moe.shapes import MoeShape

if TYPE_CHECKING:
    from bayeslr_runners.moe.coordinates import Change

# Keys of a shape that grow along each axis, the first one the axis of the slope.
AXES = {
    "width": ("d_model",),
    "depth": ("n_layers",),
    "experts": ("n_experts", "top_k"),
    "sparsity": ("n_experts",),
    "expert-width": ("d_expert",),
}
DATA: dict[str, Any] = {
    "data": "synthetic", "synthetic_tokens": 40_000, "val_tokens": 4096, "synthetic_vocab": 16,
    "synthetic_order": 1, "synthetic_branching": 3,
}  # fmt: skip
BATCH_TOKENS, SEQ_LEN = 512, 32
# A bound was crossed: the exit status of a fit that is not to be trusted, too.
OUTSIDE = 4


def main(words: Sequence[str]) -> int:
    """Run the check; 0, 4 if a group is outside the bound, 2 if something asked for is wrong."""
    arguments = _parser().parse_args(words)
    try:
        document = run_check(arguments)
    except BayeslrError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    text = json.dumps(document) if arguments.json else "\n".join(lines(document))
    print(text)  # noqa: T201
    return 0 if document["inside"] else OUTSIDE


def run_check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, judge, and write ``coordinates.json`` and ``coordinates.svg``.

    Raises: SpecError if a shape, a number or the folder will not do.
    """
    shapes = sizes(json.loads(arguments.base), arguments.axis, arguments.factor)
    name, out = arguments.parametrization, Path(arguments.out)
    options = {**DATA, **json.loads(arguments.options), "base_shape": shapes[0], "threads": 1}
    for option, least in (("seeds", 1), ("steps", 1)):
        if getattr(arguments, option) < least:
            raise SpecError(f"--{option} must be >= {least}, got {getattr(arguments, option)}")
    for option in ("lr", "bound"):
        if not (math.isfinite(getattr(arguments, option)) and getattr(arguments, option) > 0):
            raise SpecError(f"--{option} must be > 0, got {getattr(arguments, option)}")
    for shape in shapes:  # what a rule excludes is told before anything is trained
        parametrization(name, MoeShape.from_mapping(shape), Options.from_mapping(options).scaling)
    spec = RunSpec(
        run_id="check", family="check", runner="moe", lr=arguments.lr, parametrization=name,
        tokens=BATCH_TOKENS * arguments.steps, batch_tokens=BATCH_TOKENS, seq_len=SEQ_LEN,
        n_active=1, n_total=1, weight_decay=0.0, options=options,
    )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out {out}: {error.strerror}; name a folder") from error
    changes = _measure(spec, shapes, arguments.steps, arguments.seeds)
    document = judged(changes, arguments.axis, arguments.bound)
    document |= {
        "parametrization": name,
        "source": SOURCES[name],
        "shapes": shapes,
        "seeds": arguments.seeds,
        "steps": arguments.steps,
        "lr": arguments.lr,
    }
    (out / "coordinates.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(document, out / "coordinates.svg")
    return document


def sizes(base: Mapping[str, Any], axis: str, factor: int) -> list[dict[str, Any]]:
    """The base shape, then twice the size along the axis, up to ``factor`` times.

    Raises: SpecError if the factor is no power of two from 2 on, or the base is no shape.
    """
    if factor < 2 or factor & (factor - 1):
        raise SpecError(f"--factor must be a power of two from 2 on, got {factor}")
    first = dataclasses.asdict(MoeShape.from_mapping(base))
    return [
        completed(first, {key: first[key] * 2**doubling for key in AXES[axis]})
        for doubling in range(factor.bit_length())
    ]


def judged(changes: Sequence[Change], axis: str, bound: float) -> dict[str, Any]:
    """Slope of each group's change with its standard error over seeds, and the verdict.

    The residual stream may change less at a greater size (its layers' changes average out), but
    not more. A slope's standard error is NaN, written null, with a single seed.
    """
    from bayeslr_runners.moe.coordinates import slopes

    key = AXES[axis][0]
    seeds = sorted({change.seed for change in changes})
    per_seed = [slopes([c for c in changes if c.seed == seed], key) for seed in seeds]
    groups = {}
    for group in (*GROUPS, "stream"):
        found = [one[group] for one in per_seed if group in one]
        if not found:
            continue
        slope = math.fsum(found) / len(found)
        squares = math.fsum((value - slope) ** 2 for value in found)
        error = math.sqrt(squares / (len(found) - 1) / len(found)) if len(found) > 1 else None
        inside = slope <= bound if group == "stream" else abs(slope) <= bound
        groups[group] = {"slope": slope, "slope_se": error, "inside": inside,
                         "changes": _by_size(changes, group, key)}  # fmt: skip
    return {
        "axis": axis,
        "bound": bound,
        "inside": all(row["inside"] for row in groups.values()),
        "groups": groups,
    }


def lines(document: Mapping[str, Any]) -> list[str]:
    """The verdict as a table for people."""
    sizes_seen = [size for size, _ in next(iter(document["groups"].values()))["changes"]]
    key = AXES[document["axis"]][0]
    found = [
        f"{document['parametrization']} over {document['axis']}: {key} "
        f"{', '.join(map(str, sizes_seen))}; {document['steps']} steps at LR {document['lr']:g}, "
        f"{document['seeds']} seed(s)",
        f"source: {document['source']}",
        f"{'group':12s} {'slope':>7s} {'se':>6s}  RMS change of activations, size by size",
    ]
    for group, row in document["groups"].items():
        error = "" if row["slope_se"] is None else f"{row['slope_se']:.3f}"
        mark = "" if row["inside"] else "   OUTSIDE"
        values = " ".join(f"{rms:9.3g}" for _, rms in row["changes"])
        found.append(f"{group:12s} {row['slope']:+7.3f} {error:>6s}  {values}{mark}")
    outside = [group for group, row in document["groups"].items() if not row["inside"]]
    if outside:
        found.append(
            f"outside +-{document['bound']:g}: {', '.join(outside)}. An LR tuned at the first size "
            "is not expected to carry over along this axis."
        )
    else:
        found.append(f"every group is within +-{document['bound']:g}")
    return found


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Change against size, one line a group, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for group, row in document["groups"].items():
        seen, changes = zip(*row["changes"], strict=True)
        style = "--" if group == "stream" else "-"
        axes.loglog(seen, changes, style, marker="o", label=f"{group} {row['slope']:+.2f}")
    axes.set_xticks(seen, [str(size) for size in seen])
    axes.minorticks_off()
    axes.set_xlabel(AXES[document["axis"]][0])
    axes.set_ylabel(f"RMS change of activations after {document['steps']} steps")
    axes.set_title(f"{document['parametrization']}: slopes over {document['axis']}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def _by_size(changes: Sequence[Change], group: str, key: str) -> list[tuple[int, float]]:
    found: dict[int, list[float]] = {}
    for change in changes:
        if change.group == group:
            found.setdefault(getattr(change.shape, key), []).append(math.log(change.rms))
    return [(size, math.exp(math.fsum(logs) / len(logs))) for size, logs in found.items()]


def _measure(
    spec: RunSpec, shapes: Sequence[Mapping[str, Any]], num_steps: int, num_seeds: int
) -> list[Change]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise SpecError(
            "a coordinate check trains networks and needs PyTorch; pip install 'bayeslr[runners]'"
        ) from error

    from bayeslr_runners.moe.coordinates import activation_changes
    from bayeslr_runners.moe.data import load_corpus

    torch.set_num_threads(Options.from_mapping(spec.options).train.num_threads)
    corpus = load_corpus(Options.from_mapping(spec.options).data)
    changes: list[Change] = []
    for number, shape in enumerate(shapes, start=1):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[Ksize {number} of {len(shapes)}")
            sys.stderr.flush()
        changes += activation_changes(
            spec, corpus, [shape], num_steps=num_steps, seeds=range(num_seeds)
        )
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    return changes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coordinate_check")
    parser.add_argument("--parametrization", choices=PARAMETRIZATIONS, required=True)
    parser.add_argument("--axis", choices=tuple(AXES), required=True)
    parser.add_argument("--base", required=True, help="shape of the smallest size, JSON")
    parser.add_argument("--options", default="{}", help="options of the trainer, JSON")
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bound", type=float, default=0.1)
    parser.add_argument("--out", required=True)
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
