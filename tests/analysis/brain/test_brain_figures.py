"""Figures of brain scores show these scores, and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_scores import CASES, LARGE, LONG, REGIMES, by_hand, drawn, labels, levels, made_up, spans, words, written

from localsim.analysis import plots
from localsim.analysis.brain.contrasts import differences
from localsim.analysis.brain.difference_figures import score_differences
from localsim.analysis.brain.figure_parts import GREYS, NEUTRALS
from localsim.analysis.brain.figures import CEILING, CHANCE, best_depth, best_depths, brain_figures, score_matrix
from localsim.analysis.brain.figures import scores_by_depth as by_depth
from localsim.analysis.brain.means import profile, raw_ceiling
from localsim.analysis.brain.metrics import METRICS, Ceiling
from localsim.analysis.brain.training_figures import SHOWN, scores_over_training
from localsim.analysis.canvas import COLOURS
from localsim.analysis.regimes import Layer
from localsim.errors import UserError

# -- all figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_all_is_on_the_page_and_within_the_axes_and_legible(case):
    for name, figure in brain_figures(made_up(**CASES[case])).items():
        figure.draw_without_rendering()
        page = figure.bbox
        boxes = [(text.get_text(), text.get_window_extent().extents) for text in written(figure)]
        for text, (left, bottom, right, top) in boxes:
            assert left >= -1 and bottom >= -1 and right <= page.x1 + 1 and top <= page.y1 + 1, (name, text)
        for (text, one), (other, two) in itertools.combinations(boxes, 2):
            across = min(one[2], two[2]) - max(one[0], two[0])
            along = min(one[3], two[3]) - max(one[1], two[1])
            assert across < 2 or along < 2, f"in {name} {text!r} lies on {other!r}"
        for axes in figure.axes:
            (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
            points = [line.get_xydata() for line in axes.lines if line.get_transform() == axes.transData]
            points += [part for one in axes.collections if one.get_transform() == axes.transData
                       for part in getattr(one, "get_segments", list)()]  # fmt: skip
            points += [[text.get_position()] for text in axes.texts if text.get_transform() == axes.transData]
            for x, y in np.concatenate(points) if points else ():
                assert left <= x <= right and bottom <= y <= top, (name, x, y)


def test_figures_are_those_there_are_numbers_for():
    assert list(brain_figures(made_up())) == ["regimes", "matrix", "differences"]
    assert list(brain_figures(made_up(controls=False))) == ["regimes", "matrix"]
    assert list(brain_figures(made_up(regions=("V4", "IT")))) == ["regimes", "matrix", "differences", "hierarchy"]
    assert list(brain_figures(made_up(regions=("V4", "IT"), regimes=(), controls=True)))[:2] == ["regimes", "matrix"]
    assert "training" in brain_figures(made_up(steps=(0, 10)))
    assert "hierarchy" not in brain_figures(made_up(recordings=("one", "two"))), "two recordings of one region"


@pytest.mark.parametrize("case", ["plain", "over training", "matrices", "many seeds"])
def test_every_figure_says_how_many_images_and_what_intervals_are_over(case):
    scores = made_up(**CASES[case])
    what = "7 matrices" if scores.metric.name == "rsa" else "7 neurons"
    over, seeds = scores.metric.over, CASES[case].get("seeds", (0,))
    made = brain_figures(scores)
    for name, figure in made.items():
        assert f"n = 60 images, {what}" in words(figure)
        each = ", each by itself," if name == "differences" else ""
        assert f"95 % intervals{each} over {over}" in words(figure)
    several = {name for name, figure in made.items() if "means over seeds" in words(figure)}
    held = {
        name for name, figure in made.items() if f"over {over}; runs held fixed where fewer than 5" in words(figure)
    }
    # a row of the matrix is one network
    assert several == held == (set(made) - {"matrix", "differences"} if len(seeds) > 1 else set())
    redrawn = " and seeds" if len(seeds) >= 5 else "; runs held fixed"
    assert f"by itself, over {over}{redrawn}; open: holds zero" in words(made["differences"])
    for figure in brain_figures(made_up(**{**CASES[case], "resamples": 0})).values():
        assert "no intervals: no resamples" in words(figure) and "intervals over" not in words(figure)
        assert not any(len(container[2]) for axes in figure.axes for container in axes.containers), "bars"


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for number, suffix in itertools.product(range(2), (".png", ".svg")):
        made = brain_figures(made_up(regimes=("loco",), steps=(0, 10), regions=("V4", "IT"), layers=1))
        assert len(made) == 5
        for name, figure in made.items():
            plots.save(figure, tmp_path / f"{name}{number}{suffix}")
    for name, suffix in itertools.product(made, (".png", ".svg")):
        one, two = ((tmp_path / f"{name}{number}{suffix}").read_bytes() for number in range(2))
        assert one == two and len(one) > 1000


# -- regimes against depth ---------------------------------------------------------------------------------------------


def test_regimes_are_lines_with_the_scores_of_one_seed():
    scores = made_up(regions=("V4", "IT"))
    figure = by_depth(scores)
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == ["V4", "IT"]
    for axes, region in zip(panels, ("V4", "IT"), strict=True):
        found = drawn(axes)
        assert list(found) == [colour.upper() for colour in (GREYS[0], *COLOURS[:2])]
        for regime, points in zip(("untrained", *REGIMES), found.values(), strict=True):
            own = [scores.score("mine", region, layer) for layer in scores.finished(regime)]
            np.testing.assert_allclose(points[:, 0], [1 / 3, 2 / 3, 1], atol=0.03)
            np.testing.assert_allclose(points[:, 1:], [by_hand(one) for one in own])
        dashed = [container[0].get_linestyle() for container in axes.containers]
        assert dashed == ["--", "-", "-"], "the untrained network is dashed"
    assert labels(figure) == ["untrained", *REGIMES, "pixels", "gabor", CHANCE, CEILING]


def test_controls_and_the_ceiling_are_level_lines():
    scores = made_up(seeds=(0, 1))
    axes = by_depth(scores).axes[0]
    found = levels(axes)
    for place, name in enumerate(("pixels", "gabor")):
        (layer,) = scores.finished(name)
        colour = NEUTRALS[place][0].upper()
        (drawn_at,) = [value for key, value in found.items() if key.startswith(colour)]
        assert drawn_at == pytest.approx(scores.score("mine", "V4", layer).value)
    intervals = [by_hand(scores.score("mine", "V4", scores.finished(name)[0]))[1:] for name in ("pixels", "gabor")]
    np.testing.assert_allclose(spans(axes), sorted(intervals), atol=1e-9)
    chances = [scores.score("mine", "V4", layer).chance for layer in scores.layers]
    assert found["#222222 :"] == pytest.approx(np.mean(np.array(chances, dtype=float)))
    assert found["#222222 -"] == pytest.approx(np.sqrt(0.4)), "r^2 / ceiling is 1 where r is the root of the ceiling"


def test_the_ceiling_of_rsa_is_a_band_from_its_lower_to_its_upper_end():
    axes = by_depth(made_up("rsa", ceiling=0.55, lower=0.41)).axes[0]
    assert levels(axes)["#222222 -"] == pytest.approx(0.55)
    assert any(span == pytest.approx((0.41, 0.55)) for span in spans(axes))


def test_a_ceiling_far_above_is_told_and_not_drawn():
    for ceiling, shown in ((0.99, "score at the ceiling 0.99, far above"), (None, "no ceiling")):
        figure = by_depth(made_up(ceiling=ceiling))
        assert shown in words(figure) and CEILING not in labels(figure)
        values = [part for points in drawn(figure.axes[0]).values() for part in points[:, 1:].flat]
        assert figure.axes[0].get_ylim()[1] < max(values) + 0.1, "data keep their room"


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(METRICS)), st.floats(0.05, 1))
def test_the_raw_ceiling_is_the_raw_score_that_reaches_it(metric, ceiling):
    scores = made_up(metric, layers=1, ceiling=ceiling)
    ends = raw_ceiling(scores, ("mine", "V4"))
    assert ends is not None and ends[0] == ends[1]
    assert scores.metric.ceiled(ends[0], ceiling) == pytest.approx(1)


def test_the_ceiling_of_a_mean_over_recordings_is_the_mean_of_theirs():
    scores = made_up(recordings=("one", "two"))
    other = {key: replace(one, ceiling=Ceiling(0.9, "", None)) if key[0] == "two" else one
             for key, one in scores.scores.items()}  # fmt: skip
    ends = raw_ceiling(replace(scores, scores=other), ("all", "V4"))
    assert ends == pytest.approx([(np.sqrt(0.4) + np.sqrt(0.9)) / 2] * 2)
    figure = by_depth(scores)
    assert "mean over 2 recordings n = 120 images, 14 neurons" in words(figure)


@pytest.mark.parametrize("number", [3, 6])
def test_seeds_are_averaged_and_marked_and_drawn_as_differences_draw_them(number):
    scores = made_up(seeds=range(number), resamples=40)
    axes = by_depth(scores).axes[0]
    found = list(drawn(axes).values())
    for regime, points in zip(("untrained", *REGIMES), found, strict=True):
        own = np.array([scores.score("mine", "V4", layer).value for layer in scores.finished(regime)]).reshape(
            number, 3
        )
        np.testing.assert_allclose(points[:, 1], own.mean(0))
        marked = [line.get_ydata() for line in axes.lines if line.get_marker() == "_"]
        for column in own.T:
            assert any(np.array_equal(column, one) for one in marked)
    ones = profile(scores, ("mine", "V4"), "loco"), profile(scores, ("mine", "V4"), "end_to_end")
    for one, other, difference in zip(*ones, differences(scores, "loco", "end_to_end"), strict=True):
        draws = one.draws - other.draws
        assert one.value - other.value == pytest.approx(difference.value)
        low, high = np.quantile(draws - draws.mean(), [0.025, 0.975]) + difference.value
        assert (low, high) == pytest.approx((difference.low, difference.high))


# -- all layers and regions --------------------------------------------------------------------------------------------


def test_the_matrix_shows_every_score_and_interval_once():
    scores = made_up(recordings=("one", "two"), seeds=(0, 1))
    figure = score_matrix(scores)
    axes: Any = figure.axes[0]
    places = [("all", "V4"), ("one", "V4"), ("two", "V4")]
    expected = np.array([[scores.score(*place, layer).value for place in places] for layer in scores.layers])
    np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), expected)
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    for (i, layer), (j, place) in itertools.product(enumerate(scores.layers), enumerate(places)):
        value, low, high = by_hand(scores.score(*place, layer))
        assert cells[j, i] == f"{value:.3f} [{low:.3f}, {high:.3f}]"
    names = ["pixels", "gabor", *(layer.name for layer in scores.layers[2:]), "score at the ceiling"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == names
    last = [text for (_, y), text in cells.items() if y > len(scores.layers) - 1]
    assert last == ["0.632"] * 3
    parted = [line.get_ydata()[0] for line in axes.lines]
    assert parted == [0.5, 1.5, 4.5, 7.5, 10.5, 13.5, 16.5]
    titles = [tick.get_text() for tick in axes.child_axes[0].get_yticklabels()]
    assert titles == ["pixels", "gabor", *(f"{name} s{seed}" for name in ("untrained", *REGIMES) for seed in (0, 1))]
    heads = [" ".join(tick.get_text().split()) for tick in axes.get_xticklabels()]
    assert heads[0] == "V4 mean over 2 recordings n = 120 images, 14 neurons"
    assert heads[2] == "V4 two n = 60 images, 7 neurons"


def test_the_matrix_of_many_layers_names_networks_only():
    scores = made_up(**LARGE)
    axes = score_matrix(scores).axes[0]
    assert np.asarray(axes.images[0].get_array()).shape == (2 + 9 * 2 * 17, 2)
    shown = [tick.get_text() for tick in axes.get_yticklabels()]
    assert shown == ["pixels, gabor", *(f"{name} s{seed}" for name in ("untrained", *LONG) for seed in (0, 1)),
                     "score at the ceiling"]  # fmt: skip
    assert axes.get_yticks()[1] == pytest.approx(2 + 8)
    assert len(axes.texts) == 2, "ceilings"


# -- differences -------------------------------------------------------------------------------------------------------


def test_differences_are_those_of_the_table():
    scores = made_up(regions=("V4", "IT"), seeds=(0, 1))
    far = {("loco", "layer1"): -0.5, ("loco", "layer3"): 0.4}  # clearly worse, clearly better
    moved = {key: replace(one, value=one.value + step, draws=one.draws + step)
             for key, one in scores.scores.items()
             for step in [far.get((key[2].regime, key[2].name), 0.0)]}  # fmt: skip
    scores = replace(scores, scores=moved)
    figure = score_differences(scores)
    titles = [" ".join(axes.get_title(loc="left").split()) for axes in figure.axes]
    pairs = list(itertools.product(("V4", "IT"), ("untrained", "end_to_end")))
    assert titles == [f"{region} minus {reference}" for region, reference in pairs]
    rows = [(tick.get_text(), tick.get_position()[1]) for tick in figure.axes[0].get_yticklabels()]
    assert [name for name, _ in rows] == ["end_to_end", *(f"layer{i}" for i in (1, 2, 3)), "loco",
                                          *(f"layer{i}" for i in (1, 2, 3))]  # fmt: skip
    heights = {"end_to_end": [y for _, y in rows[1:4]], "loco": [y for _, y in rows[5:]]}
    panels: list[Any] = figure.axes
    for axes, (region, reference) in zip(panels, pairs, strict=True):
        expected = [
            (one.value, height, *(end for end in (one.low, one.high) if end is not None))
            for regime in REGIMES
            if regime != reference
            for one, height in zip(
                differences(scores, regime, reference, [("mine", region)]), heights[regime], strict=True
            )
        ]
        points = [line for line in axes.lines if line.get_marker() != "None"]
        bars = [line for line in axes.lines if line.get_marker() == "None" and line.get_linestyle() == "-"]
        zero, *bars = bars
        assert list(zero.get_xdata()) == [0, 0]
        shown = [(*line.get_xdata(), *line.get_ydata(), *bar.get_xdata())
                 for line, bar in zip(points, bars, strict=True)]  # fmt: skip
        np.testing.assert_allclose(shown, np.array(expected, dtype=float))
        filled = [line.get_markerfacecolor() != "white" for line in points]
        assert filled == [low > 0 or high < 0 for _, _, low, high in expected]
        assert filled[-3] and filled[-1]
    assert "runs held fixed; open" in words(figure) and "2 of the same seed" in words(figure)
    with pytest.raises(UserError, match="no regime has a reference"):
        score_differences(made_up(controls=False))


# -- hierarchy ---------------------------------------------------------------------------------------------------------


def test_the_hierarchy_shows_the_depth_of_the_best_layer():
    scores = made_up(regions=("IT", "V1", "V4"))
    figure = best_depths(scores)
    (axes,) = figure.axes
    assert len({line.get_linestyle() for line in axes.lines}) == 2, "the untrained network is dashed"
    assert [tick.get_text().split()[0] for tick in axes.get_xticklabels()] == ["IT", "V1", "V4"]
    for line, regime in zip(axes.lines, ("untrained", *REGIMES), strict=True):
        expected = []
        for region in ("IT", "V1", "V4"):
            values = {layer.depth: scores.score("mine", region, layer).value for layer in scores.finished(regime)}
            expected.append(max(values, key=lambda depth: values[depth]))
        np.testing.assert_array_equal(line.get_ydata(), expected)
        np.testing.assert_allclose(np.array(line.get_xdata(), dtype=float), [0, 1, 2], atol=0.3)
    assert len(axes.collections) == 9, "an interval for each regime and region"
    assert "chosen on the images it is scored on" in words(figure)
    assert labels(figure) == ["untrained", *REGIMES]


def test_the_hierarchy_of_several_time_bins_joins_none():
    scores = made_up(regions=("V4", "IT"), recordings=("0-50 ms", "50-99 ms"))
    apart = {key: one for key, one in scores.scores.items() if key[0] != "all"}
    figure = best_depths(replace(scores, scores=apart, record={**scores.record, "pooled": []}))
    (axes,) = figure.axes
    assert [tick.get_text().split("\n")[:2] for tick in axes.get_xticklabels()] == [
        [region, span] for span in ("0-50 ms", "50-99 ms") for region in ("V4", "IT")
    ]
    assert {line.get_linestyle() for line in axes.lines} == {"None"}


def test_the_interval_of_the_best_depth_is_of_the_layers_that_draws_choose():
    (first, second, third) = profile(made_up(), ("mine", "V4"), "loco")
    draws = np.zeros((3, 100))
    draws[0, :2], draws[1, 2:90], draws[2, 90:] = 1, 1, 1  # 2 % choose the first, 88 % the second, 10 % the third
    points = [replace(one, draws=own, value=value)
              for one, own, value in zip((first, second, third), draws, (0, 0.5, 0.2), strict=True)]  # fmt: skip
    assert best_depth(points) == (second.depth, (second.depth, third.depth))
    assert best_depth([replace(one, draws=np.empty(0)) for one in points]) == (second.depth, None)


# -- over training -----------------------------------------------------------------------------------------------------


def test_scores_over_training_stand_at_their_epochs_and_weight_updates():
    scores = made_up(steps=(0, 10, 500), seeds=(0, 1), regions=("V4", "IT"))
    figure = scores_over_training(scores)
    grid = np.array(figure.axes).reshape(4, 3)
    assert [axes.get_title(loc="left") for axes in grid[2]] == ["IT, layer1", "layer2", "layer3"]
    for row, column in itertools.product(range(4), range(3)):
        region, name = ("V4", "IT")[row // 2], f"layer{column + 1}"
        for number, (regime, points) in enumerate(zip(REGIMES, drawn(grid[row, column]).values(), strict=True)):
            expected = []
            for step in (0, 10, None):  # the last snapshot is the end
                own = [scores.score("mine", region, Layer(regime, seed, step, name, (column + 1) / 3))
                       for seed in (0, 1)]  # fmt: skip
                assert step is not None or own, "the end"
                at = 500 if step is None else step
                x = at / 10 if row % 2 == 0 else 1e6 * at * (1 + number)
                expected.append((x, np.mean([one.value for one in own])))
            np.testing.assert_allclose(points[:, :2], expected)
            assert (points[:, 2] < points[:, 1]).all() and (points[:, 1] < points[:, 3]).all()
    assert labels(figure) == list(REGIMES), "the untrained network is the point at 0"


def test_the_axis_of_weight_updates_is_logarithmic_and_has_0():
    axes = scores_over_training(made_up(steps=(0, 10, 500))).axes[3]
    place = axes.transData.transform
    x = [place((value, 0))[0] for value in (0, 1e7, 1e8, 1e9)]
    assert x[2] - x[1] == pytest.approx(x[3] - x[2]) and x[0] < x[1]
    assert list(axes.get_xticks()) == [0, 1e7, 1e8, 1e9]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "$10^{7}$", "$10^{8}$", "$10^{9}$"]
    close = scores_over_training(made_up(regimes=("loco",), steps=(0, 20, 70))).axes[3]
    assert [tick.get_text() for tick in close.get_xticklabels()] == [
        "0",
        "$2\\!\\cdot\\!10^{7}$",
        "$5\\!\\cdot\\!10^{7}$",
    ]


def test_columns_hold_layers_of_other_names_and_few_of_many():
    scores = made_up(steps=(0, 10), names={"loco": "stage"}.items())
    figure = scores_over_training(scores)
    assert [len(axes.containers) for axes in figure.axes] == [2] * 6
    own = [scores.score("mine", "V4", Layer("loco", 0, step, "stage2", 2 / 3)).value for step in (0, None)]
    np.testing.assert_allclose(list(drawn(figure.axes[1]).values())[1][:, 1], own)
    figure = scores_over_training(made_up(steps=(0, 10), layers=17))
    titles = [axes.get_title(loc="left") for axes in figure.axes[:SHOWN]]
    assert titles == ["V4, layer1", "layer5", "layer9", "layer13", "layer17"]
    assert "5 of 17 layers" in words(figure)
    with pytest.raises(UserError, match="no steps of training; score with over_training=True"):
        scores_over_training(made_up())
