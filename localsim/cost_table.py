"""Costs as text: a row for each with a line that explains each column, one cost stage by stage, several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localsim.cost import Cost
    from localsim.scaling import Prediction

SHARED = ("backbone", "image_size", "batch_size", "views", "precision")
"""What costs may differ in besides rule and cut; what they share is said once, above the table."""


def in_words(name: str, value: Any) -> str:
    """Return one of the settings in `SHARED` as a phrase."""
    if name == "views":
        return f"{value} view{'s' * (value > 1)}"
    return {"image_size": "{} px", "batch_size": "{} images a step", "precision": "{} precision"}.get(
        name, "{}"
    ).format(value)


@dataclass(frozen=True)
class _Column:
    head: str
    value: Callable[[Cost], str]
    meaning: str


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mib(number: int) -> str:
    return _number(number / 2**20)


COLUMNS = (
    _Column("trunk M", lambda c: _number(c.trunk_parameters / 1e6), "parameters of all stages, in millions"),
    _Column("taps M", lambda c: _number(c.tap_parameters / 1e6), "parameters of all readouts and heads, in millions"),
    _Column(
        "fwd GFLOP",
        lambda c: _number(c.forward_flops / 1e9),
        "arithmetic of a step's forward passes: convolutions and matrix products, 2 FLOPs per multiply-add",
    ),
    _Column("bwd GFLOP", lambda c: _number(c.backward_flops / 1e9), "the same of its backward passes"),
    _Column(
        "held MiB",
        lambda c: _mib(c.held_bytes),
        "activations that autograd holds at the peak; temporary buffers, weights and gradients come on top",
    ),
    _Column("path", lambda c: str(c.gradient_path), "longest gradient path, in unit blocks"),
    _Column(
        "lock",
        lambda c: str(c.update_lock),
        "longest update lock: unit blocks that must run forward, from a stage's first one on, until it may be updated",
    ),
    _Column("up MiB", lambda c: _mib(sum(c.up_bytes)), "activations that cross from stage to stage in a step"),
    _Column("down MiB", lambda c: _mib(sum(c.down_bytes)), "boundary gradients that cross back"),
    _Column("context MiB", lambda c: _mib(c.context_bytes), "maps from elsewhere that taps read (0 for most rules)"),
    _Column("gradients MiB", lambda c: _mib(c.gradient_bytes), "most parameter gradients that are alive at once"),
)


def cost_table(costs: Sequence[Cost]) -> str:
    """Return costs as aligned text: what they share, a row for each, and a line that explains each column."""
    apart = [name for name in SHARED if len({getattr(cost, name) for cost in costs}) > 1]
    head = ["rule", "stages", *(name.replace("_", " ") for name in apart), *(column.head for column in COLUMNS)]
    rows = [
        [
            cost.rule,
            str(len(cost.stages)),
            *(str(getattr(cost, name)) for name in apart),
            *(column.value(cost) for column in COLUMNS),
        ]
        for cost in costs
    ]
    meanings = explained({column.head: column.meaning for column in COLUMNS})
    return "\n".join([shared_settings(costs), "", aligned([head, *rows], left=1), "", *meanings])


def stage_table(cost: Cost) -> str:
    """Return what a cost says of every stage, as aligned text; boundaries are those above each stage."""
    head = ["stage", "unit blocks", "of them", "path", "lock", "updated after stage", "up MiB", "down MiB"]
    crossing = [*zip(map(_mib, cost.up_bytes), map(_mib, cost.down_bytes), strict=True), ("", "")]
    rows = [
        [str(number + 1), name, str(units), str(path), str(lock), str(run) if run else "never", *bytes_above]
        for number, (name, units, path, lock, run, bytes_above) in enumerate(
            zip(cost.stages, cost.units, cost.paths, cost.update_locks, cost.stages_run, crossing, strict=True)
        )
    ]
    return aligned([head, *rows], left=2)


_SCALING_MEANINGS = {
    "parallel": "data: the batch is divided; blocks:P: the stages among P processes, the batch among copies of each",
    "groups": "how many stages each of the P runs, from the input up",
    "ms/step": "from one step to the next, pipeline full",
    "efficiency": "images/s, as a share of as many times what one process would do",
    "compute ... others": "ms of it that the busiest process spends on arithmetic, in the optimiser, and waiting: for "
    "statistics\nof batch norms, embeddings, sums of gradients, and for the processes below and above",
    "messages, MB sent": "of the process that sends most in a step: what it hands over",
    "GiB": "weights, optimiser state, gradients, held activations and what comes in, of the process that needs most",
}
_SPENT_HEADS = {"norms": "norms", "embeddings": "embed.", "gradients": "grad.", "neighbours": "others"}


def scaling_table(rows: Sequence[tuple[Cost, float, Prediction]]) -> str:
    """Return predictions as aligned text, a row for each.

    Args:
        rows: the configuration's cost, images per second of one process, and what is predicted.
    """
    head = ["rule", "stages", "processes", "parallel", "groups", "ms/step", "images/s", "efficiency"]
    head += [_SPENT_HEADS.get(name, name) for name in rows[0][2].spent]
    head += ["messages", "MB sent", "GiB"]
    table = [
        [
            cost.rule,
            str(len(cost.stages)),
            str(made.processes),
            made.parallel,
            "+".join(str(len(group)) for group in made.groups),
            _number(1000 * made.seconds),
            _number(made.images_per_second),
            f"{made.images_per_second / (made.processes * alone):.0%}",
            *(_number(1000 * seconds) for seconds in made.spent.values()),
            str(sum(message.number for message in made.messages)),
            _number(sum(message.bytes for message in made.messages) / 1e6),
            _number(made.memory / 2**30),
        ]
        for cost, alone, made in rows
    ]
    return "\n".join([aligned([head, *table], left=1), "", *explained(_SCALING_MEANINGS)])


def explained(meanings: Mapping[str, str]) -> list[str]:
    """Return lines that say what columns mean, names flush left."""
    longest = max(len(name) for name in meanings)
    return [
        f"{name:<{longest}}  {meaning}".replace("\n", "\n" + " " * (longest + 2)) for name, meaning in meanings.items()
    ]


def shared_settings(costs: Sequence[Cost]) -> str:
    """Return in words what all costs have in common besides rule and cut."""
    values = {name: {getattr(cost, name) for cost in costs} for name in SHARED}
    return ", ".join(in_words(name, *found) for name, found in values.items() if len(found) == 1)


def aligned(table: Sequence[Sequence[str]], left: int) -> str:
    """Return lines of cells, the first `left` columns flush left."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
