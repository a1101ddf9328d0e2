"""Metrics for TensorBoard, where it is installed (extra `log`); `metrics.jsonl` holds the same numbers."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

TEXTS = {"config": "config.json", "plan": "plan.txt"}
FIGURES = ("credit", "views")


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """Return a row of metrics with one number per name: `lr`, `loss/stage1`, `effective_rank/stage2`, ..."""
    numbers = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{part}": number for part, number in value.items()}
        else:
            numbers[name] = value
    return numbers


def open_board(path: Path, step: int) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that shows a row of metrics in TensorBoard, or one that does nothing where that is missing.

    Scalars carry the names of `flat`. Rows after `step`, which a resumed run writes again, are hidden. What the run
    folder holds of configuration, plan and first figures is shown beside them. The files are closed when the function
    is no longer referred to.

    Args:
        path: the run folder; TensorBoard's files go to `tensorboard/` in it.
        step: how many steps the run has seen.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return lambda _row: None
    from torch.utils.tensorboard.writer import SummaryWriter

    begun = (path / "tensorboard").exists()
    writer = SummaryWriter(str(path / "tensorboard"), purge_step=step + 1)
    if not begun:
        _show_what_is_done(writer, path)

    def show(row: Mapping[str, Any]) -> None:
        for name, number in flat(row).items():
            writer.add_scalar(name, number, row["step"])
        writer.flush()

    # a run that fails or is stopped leaves no open file and no thread behind either
    weakref.finalize(show, writer.close)
    return show


def _show_what_is_done(writer: SummaryWriter, path: Path) -> None:
    """Show the texts and figures that the run folder holds already."""
    import numpy as np
    from PIL import Image

    for name, file in TEXTS.items():
        if (path / file).exists():
            lines = (path / file).read_text(encoding="utf-8").splitlines()
            writer.add_text(name, "\n".join(f"    {line}" for line in lines), 0)  # as code: spaces are kept
    for name in FIGURES:
        if (file := path / "figures" / f"{name}.png").exists():
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            writer.add_image(f"figures/{name}", pixels, 0, dataformats="HWC")
    writer.flush()
