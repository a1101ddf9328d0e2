"""Figures of a comparison show its numbers, and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from localsim.analysis import plots
from localsim.analysis.canvas import COLOURS
from localsim.analysis.comparison import Comparison
from localsim.analysis.comparison_plots import FLOOR, NAMED, SEEDS, scaled
from localsim.analysis.regimes import Layer
from localsim.analysis.similarity import MEASURES
from localsim.analysis.similarity.scoring import Score
from localsim.errors import UserError

DEPTHS = {"layer1": 0.25, "layer2": 0.5, "layer3": 1.0}


def made_up(measure="cka_debiased", regimes=("untrained", "blockwise", "loco"), seeds=(0, 1), steps=(), resamples=20):
    """Return a comparison with a different, made-up score for every pair."""
    declared = MEASURES[measure]
    rng = np.random.default_rng(0)
    layers = tuple(
        Layer(regime, seed, step, name, depth)
        for regime in regimes
        for seed in seeds
        for step in (*(steps if regime != "untrained" else ()), None)
        for name, depth in DEPTHS.items()
    )
    scores = {}
    for i, a in enumerate(layers):
        for b in layers[i if declared.symmetric else 0 :]:
            value = (declared.kind == "similarity") * 1.0 if a == b else rng.uniform(0.1, 0.9)
            draws = value + 0.05 * rng.normal(size=resamples) if resamples else np.empty(0)
            ends = (value - 0.05, value + 0.07) if resamples else (None, None)
            scores[a, b] = Score(value, *ends, 60, 0.0, 0.1, draws)
    return Comparison(declared, layers, scores, {"n": 60, "resamples": resamples})


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def words(figure) -> str:
    """Return everything that is written on a figure."""
    import matplotlib.text

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible())


def inside(figure) -> bool:
    """Return whether all that is written lies on the page."""
    import matplotlib.text

    figure.draw_without_rendering()
    page = figure.bbox
    # numbers are labels of ticks, of which matplotlib keeps some beyond the axes without drawing them
    written = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip(" .0123456789−")]
    boxes = [text.get_window_extent() for text in written if text.get_visible()]
    return all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1 for box in boxes)


@pytest.mark.parametrize("measure", ["cka_debiased", "procrustes", "predictivity"])
def test_the_matrix_shows_every_score_once(measure):
    comparison = made_up(measure)
    figure = plots.similarity_matrix(comparison)
    axes = figure.axes[0]
    (image,) = axes.images
    np.testing.assert_allclose(np.asarray(image.get_array()), comparison.matrix())
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(DEPTHS) * 6
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(DEPTHS) * 6
    networks = ["untrained s0", "untrained s1", "blockwise s0", "blockwise s1", "loco s0", "loco s1"]
    assert all(words(figure).count(network) == 2 for network in networks)
    kind = MEASURES[measure].kind
    assert f"{measure} ({kind}), n = 60" in words(figure)
    assert image.get_cmap().name == ("viridis" if kind == "similarity" else "viridis_r"), "dark is unlike"
    low, high = image.get_clim()
    assert low == 0 and high == (1 if kind == "similarity" else pytest.approx(comparison.matrix().max()))
    assert [line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1]] == [
        2.5, 5.5, 8.5, 11.5, 14.5,
    ]  # fmt: skip
    if measure == "predictivity":
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted layer", "predicting layer")
    assert inside(figure)


def test_the_matrix_of_many_layers_names_networks_only():
    comparison = made_up(seeds=range(5))
    assert len(comparison.finished) > NAMED
    figure = plots.similarity_matrix(comparison)
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        f"{regime} s{seed}" for regime in comparison.regimes for seed in range(5)
    ]
    assert list(axes.get_yticks()) == list(np.arange(15) * 3 + 1.0)
    assert "layer1" not in words(figure) and inside(figure)


def test_scores_below_zero_widen_the_scale():
    comparison = made_up()
    scores = dict(comparison.scores)
    pair = (comparison.finished[0], comparison.finished[4])
    scores[pair] = Score(-0.3, None, None, 60, None, None, np.empty(0))
    figure = plots.similarity_matrix(Comparison(comparison.measure, comparison.layers, scores, comparison.record))
    assert figure.axes[0].images[0].get_clim() == (-0.3, 1)


def drawn(axes):
    """Return what error bars of a panel show: for each its colour, and depth, value, low and high of every point."""
    found = []
    for container in axes.containers:
        line, _, (bars,) = container
        x, y = line.get_data()
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        points = np.column_stack([x, y, ends]).astype(float)
        found.append((to_hex(line.get_color()).upper(), points))
    return found


def shown_as(points):
    return np.array([[point.value, point.low, point.high] for point in points])


@pytest.mark.parametrize("measure", ["cka_debiased", "procrustes", "predictivity"])
def test_profiles_show_every_regime_against_every_other_and_the_floor(measure):
    comparison = made_up(measure)
    figure = plots.similarity_profiles(comparison)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == comparison.regimes
    for axes, regime in zip(panels, comparison.regimes, strict=True):
        others = [other for other in comparison.regimes if other != regime]
        for other, (colour, points) in zip(others, drawn(axes), strict=True):
            expected = comparison.profile(regime, other)
            assert colour == COLOURS[comparison.regimes.index(other)]
            np.testing.assert_allclose(points[:, 0], list(DEPTHS.values()), atol=0.02)
            np.testing.assert_allclose(points[:, 1:], shown_as(expected), atol=1e-9)
        (floor,) = [line for line in axes.lines if line.get_color() == FLOOR]
        expected = comparison.profile(regime, regime)
        np.testing.assert_allclose(floor.get_data(), [list(DEPTHS.values()), [point.value for point in expected]])
        (band,) = [found for found in axes.collections if len(found.get_facecolor())]  # pyright: ignore
        assert to_hex(band.get_facecolor()[0]) == FLOOR  # pyright: ignore
        corners = band.get_paths()[0].vertices
        assert (corners[:, 1].min(), corners[:, 1].max()) == pytest.approx(  # pyright: ignore
            (min(point.low for point in expected), max(point.high for point in expected))  # pyright: ignore
        )
    assert labels(figure) == ["untrained", "blockwise", "loco", SEEDS]
    verb = {"cka_debiased": "likeness with", "procrustes": "distance from", "predictivity": "predicted from"}[measure]
    assert figure.legends[0].get_title().get_text() == (
        f"{verb} the\npanel's regime\npairs of runs of different seeds\nn = 60 images\nbars: 95 % intervals"
    )
    assert "runs of different seeds" in words(figure) and "depth (share of the unit blocks)" in words(figure)
    assert f"{measure} ({MEASURES[measure].kind})" in words(figure)
    assert inside(figure)


def test_profiles_of_one_seed_show_pairs_of_the_same_seed_without_floor():
    comparison = made_up(seeds=(0,))
    figure = plots.similarity_profiles(comparison)
    assert labels(figure) == ["untrained", "blockwise", "loco"]
    assert "runs of the same seed" in words(figure)
    (_, points), _ = drawn(figure.axes[0])
    expected = shown_as(comparison.profile("untrained", "blockwise", same_seed=True))
    np.testing.assert_allclose(points[:, 1:], expected, atol=1e-9)


def test_profiles_without_intervals_claim_none():
    figure = plots.similarity_profiles(made_up(resamples=0))
    assert figure.legends[0].get_title().get_text() == (
        "likeness with the\npanel's regime\npairs of runs of different seeds\nn = 60 images"
    )
    assert not [axes.collections for axes in figure.axes if axes.collections]
    assert labels(figure) == ["untrained", "blockwise", "loco", SEEDS], "the dashed line is named too"


def test_the_map_places_layers_by_their_distances():
    comparison = made_up()
    figure = plots.similarity_map(comparison)
    (axes,) = figure.axes
    places, shares = scaled(comparison.distances())
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert len(lines) == 6
    np.testing.assert_allclose(np.concatenate([np.column_stack(line.get_data()) for line in lines]), places)
    markers = [line for line in axes.lines if line.get_linestyle() == "None"]
    np.testing.assert_allclose(np.concatenate([np.column_stack(line.get_data()) for line in markers]), places)
    faces = [line.get_markerfacecolor() for line in markers]
    assert [face == "white" for face in faces] == [True, False, False] * 6
    assert [line.get_markersize() for line in markers[:3]] == sorted(line.get_markersize() for line in markers[:3])
    assert axes.get_xlabel() == f"first dimension ({shares[0]:.0%} of squared distance)"
    assert labels(figure) == comparison.regimes
    assert "n = 60 images" in words(figure) and axes.get_aspect() == 1
    assert inside(figure)


def test_over_training_puts_layers_of_other_names_where_they_are_nearest_in_depth():
    made = made_up(steps=(0, 10, 20))
    other = {name: f"block{place}" for place, name in enumerate(DEPTHS)}

    def renamed(layer):
        moved = {"name": other[layer.name], "depth": layer.depth - 0.04}
        return replace(layer, **moved) if layer.regime == "loco" else layer

    scores = {(renamed(a), renamed(b)): score for (a, b), score in made.scores.items()}
    mixed = Comparison(made.measure, tuple(map(renamed, made.layers)), scores, made.record)
    grids = [np.array(plots.similarity_over_training(one).axes).reshape(3, -1) for one in (made, mixed)]
    assert [axes.get_title(loc="left") for axes in grids[1][0]] == list(DEPTHS)
    for before, after in zip(grids[0][:2].flat, grids[1][:2].flat, strict=True):
        for (_, expected), (_, points) in zip(drawn(before), drawn(after), strict=True):
            np.testing.assert_allclose(points, expected)


def test_controls_have_no_place_on_the_map_of_what_learned():
    comparison = made_up()
    assert "map_of_learned" not in plots.comparison_figures(comparison)
    told = Comparison(comparison.measure, comparison.layers, comparison.scores,
                      {**comparison.record, "unlearned": ["untrained"]})  # fmt: skip
    figure = plots.comparison_figures(told)["map_of_learned"]
    assert labels(figure) == ["blockwise", "loco"]
    kept = [i for i, layer in enumerate(told.finished) if layer.regime != "untrained"]
    places, _ = scaled(told.distances()[np.ix_(kept, kept)])
    shown = [line.get_xydata()[0] for line in figure.axes[0].lines if line.get_marker() != "None"]
    np.testing.assert_allclose(np.array(shown), places)


def test_over_training_shows_means_over_seeds():
    comparison = made_up(steps=(0, 10, 20))
    figure = plots.similarity_over_training(comparison)
    grid = np.array(figure.axes).reshape(3, 3)
    assert [axes.get_title(loc="left") for axes in grid[0]] == list(DEPTHS)
    assert [axes.get_ylabel() for axes in grid[:, 0]] == [
        "with its own end", "with its beginning", "with blockwise,\nsame step",
    ]  # fmt: skip

    def value(regime, step, name, other, against):
        found = []
        for seed in (0, 1):
            a, b = (Layer(*one, name, DEPTHS[name]) for one in ((regime, seed, step), (other, seed, against)))
            found.append(comparison.scores_of(a, b).value)
        return np.mean(found)

    for column, name in enumerate(DEPTHS):
        for row, against in enumerate((None, 0)):
            for regime, (colour, points) in zip(("blockwise", "loco"), drawn(grid[row, column]), strict=True):
                assert colour == COLOURS[comparison.regimes.index(regime)]
                np.testing.assert_allclose(points[:, 0], [0, 10, 20])
                expected = [value(regime, step, name, regime, against) for step in (0, 10, 20)]
                np.testing.assert_allclose(points[:, 1], expected)
                np.testing.assert_allclose(points[:, 2:], np.add.outer(expected, [-0.05, 0.07]))
        ((_, points),) = drawn(grid[2, column])
        np.testing.assert_allclose(points[:, 1], [value("loco", step, name, "blockwise", step) for step in (0, 10, 20)])
    assert labels(figure) == ["blockwise", "loco"], "the untrained network has no course"
    assert "training step" in words(figure) and "bars: 95 % intervals" in words(figure)
    assert inside(figure)
    alone = plots.similarity_over_training(made_up(regimes=("loco",), steps=(0, 10)))
    assert len(alone.axes) == 6, "no other regime, no third row"
    with pytest.raises(UserError, match="no steps of training; compare with over_training=True"):
        plots.similarity_over_training(made_up())


def test_figures_are_those_there_are_numbers_for():
    assert list(plots.comparison_figures(made_up(steps=(0, 4)))) == ["matrix", "map", "profiles", "over_training"]
    assert list(plots.comparison_figures(made_up())) == ["matrix", "map", "profiles"]
    assert list(plots.comparison_figures(made_up(regimes=("loco",), seeds=(0,)))) == ["matrix", "map"]


def test_many_regimes_keep_apart_and_on_the_page():
    regimes = tuple(f"blockwise granularity={i} reach=2" for i in range(10))
    comparison = made_up(regimes=regimes, seeds=(0,))
    for figure in plots.comparison_figures(comparison).values():
        assert inside(figure)
    names = [f"blockwise\ngranularity={i} reach=2" for i in range(10)]
    figure = plots.similarity_map(comparison)
    assert labels(figure) == names
    lines = [line for line in figure.axes[0].lines if line.get_label() in names]
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == len(regimes)
    figure = plots.similarity_profiles(comparison)
    figure.draw_without_rendering()
    titles = [axes._left_title.get_window_extent() for axes in figure.axes if axes.get_title(loc="left")]  # pyright: ignore
    assert len(titles) == 10
    assert not any(one.overlaps(other) for one, other in itertools.combinations(titles, 2))


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for number, suffix in itertools.product(range(2), (".png", ".svg")):
        for name, figure in plots.comparison_figures(
            made_up(regimes=("loco", "mine"), steps=(0, 4), seeds=(0,))
        ).items():
            plots.save(figure, tmp_path / f"{number}-{name}{suffix}")
    for name, suffix in itertools.product(("matrix", "map", "profiles", "over_training"), (".png", ".svg")):
        one, two = ((tmp_path / f"{number}-{name}{suffix}").read_bytes() for number in range(2))
        assert one == two and len(one) > 1000
