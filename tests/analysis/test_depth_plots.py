"""Figures by stage show the numbers they are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from localsim.analysis import plots
from localsim.analysis.canvas import COLOURS
from localsim.analysis.depth_plots import UNITS
from localsim.analysis.geometry import GeometryRow
from localsim.errors import UserError


def row(quantity: str, value: float, low: float | None = None, high: float | None = None, n: int = 50) -> Any:
    return SimpleNamespace(quantity=quantity, value=value, low=low, high=high, n=n)


def test_rows_of_the_geometry_have_what_is_drawn():
    assert {"quantity", "value", "low", "high", "n"} <= set(GeometryRow.__dataclass_fields__)


REGIMES = {
    "untrained": [("stage1", [row("effective_rank", 3.0, 2.5, 3.6), row("nc1", 7.0)]),
                  ("stage2", [row("effective_rank", 4.0, 3.5, 4.2), row("nc1", 6.0)])],
    "blockwise": [("stage1", [row("effective_rank", 5.0, 4.0, 6.0)]),
                  ("stage2", [row("effective_rank", 8.0, 7.0, 9.0)])],
}  # fmt: skip


def test_geometry_has_a_panel_for_each_quantity_and_a_line_for_each_regime():
    figure = plots.geometry_by_stage(REGIMES)
    panels = [axes for axes in figure.axes if axes.axison]
    assert [(axes.get_title(loc="left"), axes.get_ylabel()) for axes in panels] == [
        UNITS["effective_rank"], UNITS["nc1"]
    ]  # fmt: skip
    rank, collapse = panels
    for number, (container, (_, found)) in enumerate(zip(rank.containers, REGIMES.items(), strict=True)):
        line, _, (bars,) = container
        assert to_hex(line.get_color()).upper() == COLOURS[number]
        np.testing.assert_allclose(np.array(line.get_xdata(), dtype=float), [0, 1], atol=0.05)
        rows = [rows[0] for _, rows in found]
        np.testing.assert_allclose(line.get_ydata(), [one.value for one in rows])
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, [(one.low, one.high) for one in rows])
    ((line, _, (bars,)),) = collapse.containers
    np.testing.assert_allclose(line.get_ydata(), [7, 6])
    assert all(segment[0, 1] == segment[1, 1] for segment in bars.get_segments()), "no interval, no bar"
    for axes in panels:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["stage1", "stage2"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["untrained", "blockwise"]
    assert legend.get_title().get_text() == "n = 50 images\nbars: 95 % intervals"


def test_quantities_can_be_chosen_and_nothing_is_refused():
    figure = plots.geometry_by_stage(REGIMES, quantities=["nc1"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [UNITS["nc1"][0]]
    for nothing in ({}, {"blockwise": []}):
        with pytest.raises(UserError, match="at least one regime with one stage and one quantity"):
            plots.geometry_by_stage(nothing)
    with pytest.raises(UserError, match="one quantity"):
        plots.geometry_by_stage(REGIMES, quantities=["entropy"])


def table(cosines: dict[int, list[float | None]], steps=(0, 10, 20)) -> Any:
    """Return a table of alignment with these cosines by stage and step, and others made of them."""
    rows = [
        SimpleNamespace(
            level="stage", stage=stage, step=step, n=6, cosine=value, low=None if value is None else value - 0.1,
            high=None if value is None else value + 0.1, self_cosine=0.2, norm_ratio=2.0 * stage,
            ratio_low=1.5 * stage, ratio_high=2.5 * stage,
        )
        for stage, values in cosines.items()
        for step, value in zip(steps, values, strict=True)
    ]  # fmt: skip

    def select(**fields):
        return [one for one in rows if all(getattr(one, name) == value for name, value in fields.items())]

    return SimpleNamespace(rows=rows, select=select)


def test_alignment_has_a_column_for_each_rule_and_a_line_for_each_stage():
    tables = {
        "blockwise": table({1: [0.1, 0.2, 0.3], 2: [1, 1, 1]}),
        "loco": table({1: [0.4, None, 0.6], 2: [1, 1, 1]}),
    }
    figure = plots.update_alignment(tables)
    above, below = np.array(figure.axes).reshape(2, 2)
    assert [axes.get_title(loc="left") for axes in above] == ["blockwise", "loco"]

    def solid(axes):
        return [line.get_data() for line in axes.lines if line.get_linestyle() == "-" and line.get_marker() == "o"]

    low, high = solid(above[0])
    np.testing.assert_allclose(low, [[0, 10, 20], [0.1, 0.2, 0.3]])
    np.testing.assert_allclose(high, [[0, 10, 20], [1, 1, 1]])
    np.testing.assert_allclose(solid(above[1])[0], [[0, 20], [0.4, 0.6]])  # no cosine, no point
    np.testing.assert_allclose(solid(below[0])[1], [[0, 10, 20], [4, 4, 4]])
    dashed = [line for line in above[0].lines if line.get_linestyle() == "--" and len(line.get_xdata())]  # pyright: ignore
    assert len(dashed) == 2 and {value for line in dashed for value in line.get_ydata()} == {0.2}
    band = above[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0, 0.4))  # pyright: ignore
    assert {axes.get_yscale() for axes in below} == {"log"}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["lowest stage", "highest stage", "backpropagation,\ntwo batches"]
    assert figure.legends[0].get_title().get_text().startswith("n = 6 batches")
    assert above[0].get_ylabel() == "cosine with\nbackpropagation"
    assert below[0].get_ylabel() == "norm relative to\nbackpropagation's"
    with pytest.raises(UserError, match="a figure of alignment needs at least one table"):
        plots.update_alignment({})


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for number in range(2):
        for suffix in (".png", ".svg"):
            plots.save(plots.geometry_by_stage(REGIMES), tmp_path / f"geometry{number}{suffix}")
            plots.save(
                plots.update_alignment({"loco": table({1: [0.1, 0.2, 0.3]})}), tmp_path / f"loco{number}{suffix}"
            )
    for name in ("geometry", "loco"):
        for suffix in (".png", ".svg"):
            one, two = ((tmp_path / f"{name}{number}{suffix}").read_bytes() for number in range(2))
            assert one == two and len(one) > 1000
