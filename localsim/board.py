"""Metrics for TensorBoard, where it is installed (extra `log`); `metrics.jsonl` holds the same numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def open_board(path: Path, step: int) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that shows a row of metrics in TensorBoard, or one that does nothing where that is missing.

    Scalars carry the names of the metrics: `lr`, `loss/stage1`, `effective_rank/stage2`, ... Rows after `step`, which a
    resumed run writes again, are hidden.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return lambda _row: None
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(path / "tensorboard"), purge_step=step + 1)

    def show(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            for suffix, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                writer.add_scalar(f"{name}/{suffix}" if suffix else name, number, row["step"])
        writer.flush()

    return show
