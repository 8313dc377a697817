"""The tables and the page of `lp-dist bench scale`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lp_dist.benchmarks.json_lines import ResultRow
from lp_dist.benchmarks.markdown import markdown_table
from lp_dist.benchmarks.scale.models import MODELS, TENSOR_PARALLEL
from lp_dist.benchmarks.scale.simulation import CUT, PHASES, SHARDINGS

# Seconds between two updates: 20 steps of 5 s.
_BETWEEN_UPDATES = 20 * 5.0
_KINDS = {"allreduce_": "all-reduce", "allgather_": "all-gather", "_allgather_base_": "all-gather"}


class Table(NamedTuple):
    """A table of the page.

    Args:
        title: above it.
        notes: what its columns are.
        columns: headers.
        rows: cells, as printed.
        left: numbers of the columns that are aligned left.
    """

    title: str
    notes: str
    columns: Sequence[str]
    rows: list[list[str]]
    left: Sequence[int]


def tables(rows: Sequence[ResultRow]) -> list[Table]:
    """The tables of a run: times, collectives, growth with layers and experts, and memory.

    Args:
        rows: of simulated ranks, as `measure` returns them, or with the reason why they were "skipped".
    """
    measured = [row for row in rows if "skipped" not in row]
    complete = [row for row in measured if row["is_cut"] and row["layers"] is None and row["experts"] is None]
    grown = {_key(row) for row in measured if row["layers"] or row["experts"]}
    first = [
        row
        for row in measured
        if row["is_cut"] and not row["rank"] and row["sharding"] == SHARDINGS[0] and _key(row) in grown
    ]
    keys = [_key(row) for row in first]

    def size(row: ResultRow) -> tuple[float, ...]:
        return keys.index(_key(row)), row["layers"] or math.inf, row["experts"] or math.inf

    skipped = [[*_key(row), str(row["rank"]), row["skipped"].splitlines()[0]] for row in rows if "skipped" in row]
    what = ("model", "sharding", "target", "ranks")
    results = [
        Table(
            "Host time",
            f"Seconds of CPU time, the largest of the measured ranks. Local tensors are cut to {CUT:,} elements, or"
            " one row of a matrix. The last column is the update's share of 20 steps of 5 s.",
            (*what, "attach, s", "step, s", "preparation of a step, s", "update, s", "share"),
            _lines(complete, _times),
            (0, 1, 2),
        ),
        Table(
            "Collectives",
            "How many, and the bytes of their results. A step is one without an update.",
            (*what, "attach", "step", "update", "final pruning"),
            _lines(complete, _volumes),
            (0, 1, 2, 4, 5, 6, 7),
        ),
        Table(
            "Growth with layers and experts",
            "On the first rank, under FSDP2, cut as above.",
            (*what, "layers", "experts", "attach, s", "update, s", "sent in an update"),
            [_growth(row) for row in sorted(first, key=size)],
            (0, 1, 2, 8),
        ),
        Table(
            "Memory",
            "Of one rank at full size. AdamW's: weights, gradients and two moments in fp32. The other columns are the"
            " most that is allocated beyond that, in MB. Tiles are as large as on an accelerator. The last column is"
            " CPU time with all of the arithmetic, on one core.",
            (*what, "rank", "AdamW's, MB", *PHASES, "update, s"),
            [_memory(row) for row in measured if not row["is_cut"]],
            (0, 1, 2),
        ),
        Table("Skipped", "", (*what, "rank", "reason"), skipped, (0, 1, 2, 5)),
    ]
    return [table for table in results if table.rows]


def _key(row: ResultRow) -> tuple[str, str, str, str]:
    """What a table has a line for."""
    return MODELS[row["model"]].title, row["sharding"], row["target"], f"{row['ranks']:,}"


def _lines(rows: Sequence[ResultRow], cells: Callable[[list[ResultRow]], list[str]]) -> list[list[str]]:
    by_key: dict[tuple[str, ...], list[ResultRow]] = {}
    for row in rows:
        by_key.setdefault(_key(row), []).append(row)
    return [[*key, *cells(of_key)] for key, of_key in by_key.items()]


def _times(rows: list[ResultRow]) -> list[str]:
    slowest = {name: max(row["seconds"][name] for row in rows) for name in rows[0]["seconds"]}
    seconds = [f"{slowest[name]:.3f}" for name in ("attach", "step", "preparation", "update")]
    return [*seconds, f"{slowest['update'] / _BETWEEN_UPDATES:.2%}"]


def _volumes(rows: list[ResultRow]) -> list[str]:
    return [
        " or ".join(dict.fromkeys(_volume(row["collectives"][name]) for row in rows))
        for name in ("attach", "step", "update", "final pruning")
    ]


def _volume(by_kind: dict[str, list[int]]) -> str:
    return (
        ", ".join(
            f"{calls} {_KINDS.get(kind, kind)}{'s' * (calls > 1)} of {_bytes(in_bytes)}"
            for kind, (calls, in_bytes) in by_kind.items()
        )
        or "none"
    )


def _bytes(count: int) -> str:
    return f"{count:,} B" if count < 1e4 else f"{count / 1e3:,.0f} kB" if count < 1e7 else f"{count / 1e6:,.0f} MB"


def _growth(row: ResultRow) -> list[str]:
    shape = MODELS[row["model"]]
    return [
        *_key(row),
        str(row["layers"] or shape.layers),
        str(row["experts"] or shape.experts or ""),
        f"{row['seconds']['attach']:.3f}",
        f"{row['seconds']['update']:.3f}",
        _volume(row["collectives"]["update"]),
    ]


def _memory(row: ResultRow) -> list[str]:
    beyond = row["bytes"]["beyond"]
    return [
        *_key(row),
        f"{row['rank']:,}",
        f"{row['bytes']['training state'] / 1e6:,.0f}",
        *(f"{beyond[phase] / 1e6:,.0f}" for phase in PHASES),
        f"{row['seconds']['update']:.2f}",
    ]


def markdown(header: ResultRow, rows: Sequence[ResultRow]) -> str:
    """The page of a run.

    Args:
        header: of the run: its command, date, machine and versions.
        rows: of its simulated ranks.
    Returns:
        The text of scale.md.
    """
    versions = ", ".join(
        f"{name} {version}" for name, version in header["versions"].items() if name in ("torch", "transformers")
    )
    lines = [
        "# What a thousand ranks cost",
        "",
        f"`{header['command']}`",
        "",
        f"{header['machine']}, {header['cores']} cores, one thread, no GPU; {versions}; {header['date']}.",
        "Each row as it was measured: [scale.jsonl](scale.jsonl).",
        "",
        "torch's fake process group lets one process be rank r of N. Nothing is communicated. What a gather returns",
        "is this rank's value for each rank. Sums are this rank's, made as large as those of the model, and where a",
        "sum of floats is zero here, a random number stands for what another rank has.",
        "",
        "The models are made on the meta device from their configs, and sharded with `fully_shard`, each layer and",
        f"the rest. FSDP2 × TP has tensor parallelism of {TENSOR_PARALLEL} neighbouring ranks inside of it; experts",
        "are divided between these. Then this rank's shards are made, with random weights and gradients.",
        "Stacked experts are sharded along their second dimension where there are fewer of them than ranks.",
        "",
        "For times the local tensors are cut to their first rows. Names, shapes, placements and meshes stay as they",
        "are. So the host does all of its tasks, on few weights. Times are CPU time of the process, with one thread.",
        "A step is LpAdamW's. Its preparation is `after_step()` where no update is due.",
        "The run has a `SparsityTarget(0.5)`: of all weights, or of feed-forward channels or experts.",
    ]
    for table in tables(rows):
        lines += ["", f"## {table.title}", "", *([table.notes, ""] if table.notes else [])]
        lines += markdown_table(table.columns, table.rows, table.left)
    return "\n".join(lines) + "\n"
