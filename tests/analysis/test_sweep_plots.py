"""The figures of a sweep show every cell once, every seed, and the controls; what cannot be is hatched."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from made_up_sweep import made_up_rows, made_up_table
from matplotlib.backends.backend_agg import FigureCanvasAgg

from localsim.analysis.canvas import save
from localsim.analysis.sweep_plots import (
    accuracy_against_memory,
    accuracy_against_path,
    accuracy_map,
    accuracy_profiles,
    sweep_figures,
)
from localsim.analysis.sweeps import SweepTable
from localsim.errors import UserError


def words(axes):
    return {tuple(round(v) for v in text.get_position()): text.get_text() for text in axes.texts}


def points(axes, **look):
    """Return the points of the lines that look like this."""
    found = []
    for line in axes.get_lines():
        if all(getattr(line, f"get_{name}")() == value for name, value in look.items()):
            found += [(round(x, 6), round(y, 6)) for x, y in np.asarray(line.get_xydata()).tolist()]
    return sorted(found)


def several_rules(number: int) -> SweepTable:
    """Return rules by granularity, the later ones lower."""
    rows = [
        replace(row, rule=f"rule{place}", accuracy=row.accuracy - place / 100)
        for place in range(number)
        for granularity in (1, 2)
        for row in made_up_rows(granularity, None, 0, 0.6)
    ]
    return SweepTable(tuple(rows))


def test_the_map_has_means_and_numbers_of_seeds_and_hatches_the_rest():
    table = made_up_table()
    table = SweepTable(tuple(row for row in table.rows if (row.granularity, row.reach) != (4, 1)))
    figure = accuracy_map(table)
    axes, bar = figure.axes
    assert words(axes) == {
        (0, 0): "52.0\n2 seeds", (1, 0): "53.0\n2 seeds", (2, 0): "not run",
        (0, 1): "no such\nmatrix", (1, 1): "63.0\n2 seeds", (2, 1): "65.0\n2 seeds",
    }  # fmt: skip
    assert [patch.get_hatch() for patch in axes.patches if patch.get_label() == "accuracy"] == [None] * 4
    assert [patch.get_hatch() for patch in axes.patches if patch.get_label() != "accuracy"] == ["///"] * 2
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("granularity", "reach")
    # the untrained network of each seed is a line on the scale, which begins just below them
    assert sorted(line.get_ydata()[0] for line in bar.get_lines()) == pytest.approx([0.16, 0.17])
    assert 0.14 < bar.get_ylim()[0] < 0.16 and "untrained 16.5 %" in figure.get_suptitle()
    assert "n = 1000 test images" in figure.get_suptitle()


def test_rules_take_the_place_of_reach():
    axes = accuracy_map(several_rules(2)).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["rule0", "rule1"]
    assert words(axes)[0, 1] == "59.0\n1 seed"
    with pytest.raises(UserError, match="needs two settings that vary, not 1"):
        accuracy_map(made_up_table(reaches=(1,)))


def test_cells_stand_at_their_paths_and_memory_with_all_seeds():
    table = made_up_table()
    for figure, places in (
        (accuracy_against_path(table), {1: 4, 2: 2, 3: 4, 4: 1, 5: 2}),
        (accuracy_against_memory(table), {1: 6, 2: 4, 3: 6, 4: 3, 5: 4}),
    ):
        (axes,) = figure.axes
        means = points(axes, markersize=8)
        expected = sorted(zip(places.values(), (0.52, 0.53, 0.63, 0.55, 0.65), strict=True))
        # paths of the same length stand side by side
        assert np.allclose(sorted((round(x), y) for x, y in means), expected)
        seeds = points(axes, markersize=3)
        assert [y for _, y in seeds] == pytest.approx([y for _, y in points(axes, marker="", linewidth=1.2)])
        assert len(seeds) == 10 and {round(y, 2) for _, y in seeds} >= {0.51, 0.53, 0.66}
        pale = points(axes, linewidth=5)
        assert np.allclose(sorted(y for _, y in pale), sorted(y + d for _, y in means for d in (-0.02, 0.03)))
        dashed = [line for line in axes.get_lines() if line.get_linestyle() in ("--", ":")]
        assert [line.get_ydata()[0] for line in dashed] == pytest.approx([0.165, 0.215])
        (band,) = axes.patches
        assert (band.get_y(), band.get_height()) == pytest.approx((0.155, 0.02))
        assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > max(x for x, _ in means)
    assert len({x for x, _ in points(accuracy_against_path(table).axes[0], markersize=8)}) == 5


def test_bars_are_intervals_from_three_seeds_on_and_never_of_two():
    two, three = (accuracy_against_path(made_up_table(seeds=seeds)) for seeds in (2, 3))
    assert points(two.axes[0], marker="_") == []
    cell = made_up_table(seeds=3).cells()[0]
    assert [
        y for x, y in points(three.axes[0], marker="_") if round(x, 1) in (3.9, 4.0) and y < 0.585
    ] == pytest.approx(cell.over_seeds, abs=1e-6)
    told = [figure.legends[0].get_title().get_text() for figure in (two, three)]
    assert ["t intervals over seeds" in text for text in told] == [False, True]
    assert all("n = 1000 test images\npale: 95 % intervals over images" in text for text in told)
    single = accuracy_against_path(made_up_table(seeds=1)).axes[0]
    assert points(single, markersize=3) == [] and len(points(single, markersize=8)) == 5


def test_controls_that_cells_do_not_share_stand_beside_each():
    rows = [replace(row, calibrated=row.granularity / 20) for row in made_up_table(seeds=1).rows]
    axes = accuracy_against_path(SweepTable(tuple(rows))).axes[0]
    assert sorted({y for _, y in points(axes, marker="x")}) == [0.05, 0.1, 0.2]
    assert len([line for line in axes.get_lines() if line.get_linestyle() in ("--", ":")]) == 1


def test_what_was_not_trained_is_the_control_and_no_point():
    bare = [replace(row, rule="untrained", path=0, held_bytes=None) for row in made_up_rows(2)]
    table = SweepTable((*made_up_rows(2, accuracy=0.7), *bare))
    assert [y for _, y in points(accuracy_against_path(table).axes[0], markersize=8)] == [0.7]
    assert [y for _, y in points(accuracy_against_memory(table).axes[0], markersize=8)] == [0.7]
    with pytest.raises(UserError, match="none of these was"):
        accuracy_against_path(SweepTable(tuple(bare)))
    assert list(sweep_figures(SweepTable(tuple(bare)))) == ["accuracy_profiles"]


def test_profiles_have_a_panel_per_granularity_and_a_line_per_reach():
    figure = accuracy_profiles(made_up_table())
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["granularity 1", "granularity 2", "granularity 4"]
    last = figure.axes[-1]
    means = [np.asarray(line.get_xydata()) for line in last.get_lines() if line.get_linewidth() == 1.5]
    assert np.allclose(means[0], [(0.25, 0.52), (0.5, 0.53), (0.75, 0.54), (1, 0.55)])
    assert np.allclose(means[1], [(0.25, 0.62), (0.5, 0.63), (0.75, 0.64), (1, 0.65)])
    grey = {
        line.get_linestyle(): np.asarray(line.get_xydata())
        for line in last.get_lines()
        if line.get_color() == "#777777"
    }
    assert np.allclose(grey["--"], [(0.25, 0.195), (0.5, 0.185), (0.75, 0.175), (1, 0.165)])
    assert np.allclose(grey[":"][:, 1], grey["--"][:, 1] + 0.05)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["reach 1", "reach 2", "untrained", "calibrated"]


def test_nothing_but_seeds_is_averaged():
    rows = [
        replace(row, rule=rule, settings={"lr": rate}, accuracy=row.accuracy + bonus + rate)
        for rule, bonus in (("blockwise", 0), ("chunked", 0.001))
        for rate in (0.01, 0.1)
        for row in made_up_table(granularities=(1, 2)).rows
    ]
    table = SweepTable(tuple(rows))
    expected = sorted(round(cell.mean, 6) for cell in table.cells())
    assert len(set(expected)) == 12
    for figure in (accuracy_against_path(table), accuracy_against_memory(table)):
        assert sorted(y for axes in figure.axes for _, y in points(axes, markersize=8)) == expected
    titles = [axes.get_title(loc="left") for axes in accuracy_map(table).axes]
    assert titles[:4] == ["blockwise, lr 0.01", "blockwise, lr 0.1", "chunked, lr 0.01", "chunked, lr 0.1"]
    profiles = accuracy_profiles(table)
    ends = [np.asarray(line.get_xydata())[-1, 1] for axes in profiles.axes for line in axes.get_lines()
            if line.get_linewidth() == 1.5]  # fmt: skip
    assert sorted(round(float(y), 6) for y in ends) == expected


def test_no_two_cells_look_alike():
    figure = accuracy_against_path(several_rules(9))  # more than there are markers
    looks = [
        (axes.get_title(loc="left"), str(line.get_color()), line.get_marker())
        for axes in figure.axes
        for line in axes.get_lines()
        if line.get_markersize() == 8
    ]
    assert len(looks) == len(set(looks)) == 18
    only_rules = SweepTable(tuple(row for row in several_rules(9).rows if row.granularity == 1))
    drawn = [str(line.get_color()) for line in accuracy_against_path(only_rules).axes[0].get_lines()
             if line.get_markersize() == 8]  # fmt: skip
    assert len(drawn) == len(set(drawn)) == 9


def test_figures_are_those_that_make_sense_for_what_varies():
    every = ["accuracy_map", "accuracy_against_path", "accuracy_against_memory", "accuracy_profiles"]
    assert list(sweep_figures(made_up_table(seeds=1))) == every
    assert list(sweep_figures(made_up_table(seeds=1, reaches=(1,)))) == every[1:]
    assert list(sweep_figures(made_up_table(granularities=(2,), reaches=(1,)))) == every[3:]


def test_nothing_lies_on_anything():
    for figure in sweep_figures(made_up_table(seeds=3)).values():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [part.get_tightbbox(canvas.get_renderer()) for part in (*figure.axes, *figure.legends)]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_same_table_gives_the_same_file(tmp_path):
    for name in ("one", "two"):
        save(accuracy_map(made_up_table()), tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
