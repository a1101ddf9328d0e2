"""The figure of `localsim cost` shows its numbers, and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from localsim.analysis import plots
from localsim.analysis.cost_plots import cost_figure
from localsim.cost import Cost

MADE_UP = Cost(
    rule="blockwise",
    backbone="resnet50",
    image_size=64,
    batch_size=16,
    views=2,
    precision="bf16",
    stages=("stem..top",),
    units=(4,),
    trunk_parameters=5,
    tap_parameters=3,
    forward_flops=10**9,
    backward_flops=2 * 10**9,
    held_bytes=2**22,
    paths=(4,),
    update_locks=(4,),
    stages_run=(1,),
    up_bytes=(),
    down_bytes=(),
    context_bytes=0,
    gradient_bytes=32,
)
CUT = replace(MADE_UP, stages=("stem", "top"), units=(1, 3), held_bytes=2**21, paths=(1, 3), forward_flops=3 * 10**9)
LOCO = replace(CUT, rule="loco", held_bytes=3 * 2**20, paths=(4, 3))


def lines(figure):
    return [
        {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.get_lines()}
        for axes in figure.axes
    ]  # fmt: skip


def test_every_panel_has_a_line_per_rule_in_the_order_of_stages():
    figure = cost_figure([CUT, LOCO, MADE_UP])
    held, arithmetic, path = lines(figure)
    assert held == {"blockwise": [[0, 4], [1, 2]], "loco": [[1, 3]]}
    assert arithmetic == {"blockwise": [[0, 3], [1, 5]], "loco": [[1, 5]]}
    assert path == {"blockwise": [[0, 4], [1, 3]], "loco": [[1, 4]]}
    for axes in figure.axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2"]
        assert axes.get_ylim()[0] == 0
    assert figure.get_suptitle() == "resnet50, 64 px, 16 images a step, 2 views, bf16 precision"


def test_rules_that_see_other_numbers_of_views_say_so():
    figure = cost_figure([CUT, replace(LOCO, views=1)])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["blockwise (2 views)", "loco (1 view)"]
    assert "view" not in figure.get_suptitle()


def test_no_two_rules_look_alike():
    figure = cost_figure([replace(CUT, rule=f"rule{number}") for number in range(19)])
    drawn = [(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()]
    assert all(a != b for a, b in itertools.combinations(drawn, 2))


def test_nothing_lies_on_anything():
    figure = cost_figure([CUT, replace(LOCO, rule="deep_supervision", views=1), MADE_UP])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [part.get_tightbbox(canvas.get_renderer()) for part in (*figure.axes, *figure.legends)]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_costs_give_the_same_file(suffix, tmp_path):
    for name in ("one", "two"):
        plots.save(cost_figure([CUT, LOCO, MADE_UP]), tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
