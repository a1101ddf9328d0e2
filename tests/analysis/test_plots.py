"""Figures hold the right marks in the right places, and leave no state behind."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, Polygon

from localsim.analysis import plots, trunk
from localsim.errors import UserError

NAMES = ["stem", "layer1", "layer2", "layer3"]
END_TO_END = ([[1, 1, 1, 1]], [3])
BLOCKWISE = (np.eye(4), range(4))
LOCO = ([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], [1, 2, 3])
INTERLOCKING = ([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], [0, 1, 2, 3])
DEEP = (np.tril(np.ones((4, 4))), range(4))


def labelled(axes, prefix: str) -> dict[str, Any]:
    return {artist.get_label(): artist for artist in axes.get_children() if str(artist.get_label()).startswith(prefix)}


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# -- accuracy ----------------------------------------------------------------------------------------------------------


def test_accuracy_by_stage_shows_every_point_and_interval():
    table = {
        "blockwise": [("stem", 0.3, 0.25, 0.36), ("layer1", 0.5, 0.45, 0.55)],
        "untrained": [("layer1", 0.2, 0.1, 0.3), ("layer2", 0.25, 0.2, 0.3)],
        "empty": [],
    }
    figure = plots.accuracy_by_stage(table, title="Probes", chance=0.1)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Probes"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("stage", "accuracy")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["stem", "layer1", "layer2"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["blockwise", "untrained", "chance"]
    for container, (series, positions) in zip(
        axes.containers, [("blockwise", [0, 1]), ("untrained", [1, 2])], strict=True
    ):
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_ydata(), [point[1] for point in table[series]])
        np.testing.assert_array_equal(np.round(np.array(line.get_xdata(), dtype=float)), positions)
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, [point[2:] for point in table[series]])
    (chance,) = [line for line in axes.lines if line.get_label() == "chance"]
    assert set(chance.get_ydata()) == {0.1}
    assert chance.get_linestyle() == "--"
    low, high = axes.get_ylim()
    assert low < 0.1
    assert high > 0.55
    assert axes.yaxis.get_major_formatter()(0.125, 0) == "12.5 %"


def test_accuracy_by_stage_without_chance_or_points():
    figure = plots.accuracy_by_stage({"a": [("s", 0.5, 0.4, 0.6)]}, title="")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]
    with pytest.raises(UserError, match="at least one series"):
        plots.accuracy_by_stage({"a": []}, title="")


def test_legend_stays_outside_the_data():
    figure = plots.accuracy_by_stage({"a long series name": [("s", 0.5, 0.4, 0.6)]}, title="", chance=0.1)
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x0 >= figure.axes[0].get_window_extent().x1


# -- losses ------------------------------------------------------------------------------------------------------------


def test_loss_curves_draw_each_tap_as_measured_and_smoothed():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(200, 2)) + 10
    rows = [{"step": 3 * step, "loss": {"low": a, "high": b}} for step, (a, b) in enumerate(losses)]
    figure = plots.loss_curves([*rows[:100], {"epoch": 0}, *rows[100:]])
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["low", "high"]
    for column, (raw, smooth) in enumerate([axes.lines[:2], axes.lines[2:]]):
        np.testing.assert_array_equal(raw.get_xdata(), 3 * np.arange(200))
        np.testing.assert_array_equal(raw.get_ydata(), losses[:, column])
        assert raw.get_color() == smooth.get_color()
        assert raw.get_alpha() < 0.5
        assert smooth.get_ydata()[100] == np.median(losses[95:106, column])
    assert axes.lines[0].get_color() != axes.lines[2].get_color()


def test_loss_curves_of_a_tap_that_joins_late_or_diverges():
    rows = [{"step": step, "loss": {"a": np.nan} if step < 90 else {"a": 1.0, "b": 2.0}} for step in range(120)]
    figure = plots.loss_curves(rows)
    late = next(line for line in figure.axes[0].lines if line.get_label() == "b")
    np.testing.assert_array_equal(late.get_xdata(), range(90, 120))
    with pytest.raises(UserError, match="no losses"):
        plots.loss_curves([{"epoch": 1}])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 5))
def test_running_median_is_the_median_of_each_window(values, half):
    expected = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(plots.running_median(np.array(values), half), expected)


# -- images ------------------------------------------------------------------------------------------------------------


def test_contact_sheet_puts_each_image_above_its_views():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 8, 6), generator=generator, dtype=torch.uint8)
    first = torch.rand(3, 3, 4, 4, generator=generator)
    second = torch.randn(3, 3, 4, 4, generator=generator) * torch.tensor([1.0, 5.0, 9.0])[:, None, None]
    figure = plots.contact_sheet(images, [first, second], ["cup", 7, "hat"])
    shown = np.array(figure.axes, dtype=object).reshape(3, 3)
    assert [axes.get_ylabel() for axes in shown[:, 0]] == ["image", "view 1", "view 2"]
    assert [axes.get_title() for axes in shown[0]] == ["cup", "7", "hat"]
    pixels = [[np.asarray(axes.images[0].get_array()) for axes in row] for row in shown]
    for column in range(3):
        np.testing.assert_allclose(pixels[0][column], images[column].permute(1, 2, 0).numpy() / 255)
        np.testing.assert_allclose(pixels[1][column], first[column].permute(1, 2, 0).numpy())
    stretched = np.stack(pixels[2])
    np.testing.assert_allclose(stretched.min(axis=(0, 1, 2)), 0)
    np.testing.assert_allclose(stretched.max(axis=(0, 1, 2)), 1)
    for channel in range(3):  # stretching is one affine map per channel
        correlation = np.corrcoef(stretched[..., channel].ravel(), second[:, channel].numpy().ravel())[0, 1]
        assert correlation == pytest.approx(1, abs=1e-6)


def test_contact_sheet_refuses_what_does_not_fit():
    images = np.zeros((3, 3, 4, 4))
    with pytest.raises(UserError, match=r"\[3, 2\]"):
        plots.contact_sheet(images, [images[:2]])
    with pytest.raises(UserError, match=r"\[3, 3, 1\]"):
        plots.contact_sheet(images, [images], ["a"])
    with pytest.raises(UserError, match=r"\(3, 1, 4, 4\)"):
        plots.contact_sheet(images[:, :1], [])


# -- credit ------------------------------------------------------------------------------------------------------------


def test_credit_matrix_fills_exactly_the_cells_with_credit():
    matrix = np.array([[1.0, 0, 0, 0], [0.5, 0, 1, 0]])
    figure = plots.credit_matrix(matrix, (0, 2), NAMES, "mine")
    (axes,) = figure.axes
    cells = labelled(axes, "tap")
    assert set(cells) == {"tap 0 stage 0", "tap 1 stage 0", "tap 1 stage 1", "tap 1 stage 2"}
    assert to_rgb(cells["tap 1 stage 2"].get_facecolor()) == pytest.approx(to_rgb(trunk.COLOURS[2]))
    half = to_rgb(cells["tap 1 stage 0"].get_facecolor())
    assert half == pytest.approx([1 - 0.625 * (1 - part) for part in to_rgb(trunk.COLOURS[2])])
    assert to_rgb(cells["tap 1 stage 1"].get_facecolor()) == to_rgb("#f2f2f2")
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "1"),
        ((0, 1), "0.5"),
        ((2, 1), "1"),
    }
    assert [tick.get_text() for tick in axes.get_xticklabels()] == NAMES
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["tap on stem", "tap on layer2"]
    assert axes.yaxis_inverted()
    assert axes.get_title(loc="left") == "mine"


def test_credit_matrix_without_taps_says_so():
    assert texts(plots.credit_matrix(np.zeros((0, 4)), (), NAMES).axes[0]) == ["no tap: nothing is trained"]


@pytest.mark.parametrize(
    ("rule", "lanes", "stops"),
    [
        (END_TO_END, [0], []),
        (BLOCKWISE, [0, 0, 0, 0], [0, 1, 2]),
        (LOCO, [0, 1, 2], []),
        (INTERLOCKING, [0, 1, 2, 3], []),
        (DEEP, [0, 1, 2, 3], []),
        (([[1, 1, 0, 0], [0, 0, 1, 1]], [1, 3]), [0, 0], [1]),
        ((np.zeros((0, 4)), []), [], []),
        (([[1, 0, 0, 0]], [0]), [0], [0, 1, 2]),
    ],
)
def test_arrows_never_cross_and_stops_stand_where_no_gradient_crosses(rule, lanes, stops):
    weights = trunk.checked(*rule, NAMES)
    assert trunk.lanes(weights, rule[1]) == lanes
    assert trunk.stops(weights, rule[1]) == stops


@st.composite
def matrices(draw):
    num_stages = draw(st.integers(1, 6))
    taps = sorted(draw(st.lists(st.integers(0, num_stages - 1), min_size=1, max_size=6)))
    weights = [
        [draw(st.sampled_from([0, 0.5, 1])) if stage <= tap else 0 for stage in range(num_stages)] for tap in taps
    ]
    return np.array(weights, dtype=float), taps, [f"s{stage}" for stage in range(num_stages)]


@settings(deadline=None, max_examples=30)
@given(matrices())
def test_gradient_paths_draw_what_the_matrix_says(rule):
    weights, taps, names = rule
    axes = plots.gradient_paths([("mine", weights, taps, names)]).axes[0]
    segments = {
        label: line for label, line in labelled(axes, "tap").items() if " stage " in label.replace("changes", "")
    }
    lines = {label: line for label, line in segments.items() if "changes" not in label}
    stripes = {label for label in segments if "changes" in label}
    assert stripes == {f"tap {tap} changes stage {stage}" for tap, stage in zip(*np.nonzero(weights), strict=True)}
    for tap, top in enumerate(taps):
        changed = np.flatnonzero(weights[tap])
        reached = range(changed[0], top + 1) if changed.size else range(0)
        drawn = {label for label in lines if label.startswith(f"tap {tap} ")}
        assert drawn == {f"tap {tap} stage {stage}" for stage in reached}
        for stage in reached:
            assert (lines[f"tap {tap} stage {stage}"].get_linestyle() == "-") == (weights[tap, stage] > 0)
    assert sum(isinstance(patch, Circle) for patch in axes.patches) == len(taps)
    heads = sum(isinstance(patch, Polygon) for patch in axes.patches)
    assert heads == (weights.any(axis=1)).sum() + len(names) - 1  # one per loss with credit, one between stages
    assert {int(label.split()[1]) for label in labelled(axes, "stop")} == set(trunk.stops(weights, taps))


def test_gradient_paths_align_the_rules_and_name_everything():
    rules = [
        ("Backprop\none loss", *END_TO_END, NAMES),
        ("Blockwise", *BLOCKWISE, NAMES),
        ("Interlocking", *INTERLOCKING, NAMES),
    ]
    figure = plots.gradient_paths(rules)
    first, second, third, key = figure.axes
    assert texts(first)[:2] == ["Backprop", "one loss"]
    assert set(NAMES) <= set(texts(second))
    assert texts(key) == ["L", "loss", "may change these stages", "only passes through", "stop-gradient"]
    # the one arrow of backpropagation ends where blockwise's first does: at the left edge of the trunk
    tips = [
        min(patch.get_xy()[:, 0].min() for patch in a.patches if isinstance(patch, Polygon)) for a in (first, second)
    ]
    assert tips == [trunk.LEFT, trunk.LEFT]
    # a loss stands above the end of the stage it reads
    circles = sorted(patch.center[0] for patch in second.patches if isinstance(patch, Circle))
    reads = [labelled(second, f"tap {tap} reads")[f"tap {tap} reads {tap}"].get_xdata()[0] for tap in range(4)]
    assert circles == reads
    assert circles == [patch.center[0] for patch in third.patches if isinstance(patch, Circle)]
    assert texts(plots.gradient_paths(rules[:1]).axes[-1]) == ["L", "loss", "may change these stages"]


def test_arrow_width_grows_with_credit():
    axes = plots.gradient_paths([("mine", [[0.1, 0.5, 1.0]], [2], ["a", "b", "c"])]).axes[0]
    widths = [labelled(axes, "tap 0 stage")[f"tap 0 stage {stage}"].get_linewidth() for stage in range(3)]
    assert widths == sorted(widths)
    assert widths[2] > 2 * widths[0]


def test_narrow_stages_are_numbered_instead_of_named():
    names = [f"layer{i}.conv" for i in range(16)]
    shown = texts(plots.gradient_paths([("layerwise", np.eye(16), range(16), names)]).axes[0])
    assert [str(i) for i in range(1, 17)] == [text for text in shown if text.isdigit()]
    assert not set(names) & set(shown)


def test_credit_that_does_not_fit_is_refused():
    for draw in (plots.credit_matrix, lambda *rule: plots.gradient_paths([("x", *rule)])):
        with pytest.raises(UserError, match="does not fit"):
            draw(np.eye(3), [0, 1, 2], NAMES)
        with pytest.raises(UserError, match="does not fit"):
            draw(np.eye(4), [0, 1, 2, 4], NAMES)
        with pytest.raises(UserError, match="does not fit"):
            draw(np.eye(4), [0, 1, 2], NAMES)
    with pytest.raises(UserError, match="at least one rule"):
        plots.gradient_paths([])


# -- files and state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_save_writes_the_same_bytes_each_time(tmp_path, suffix, start):
    written = []
    for name in ("a", "b"):
        path = tmp_path / "deeper" / f"{name}{suffix}"
        plots.save(plots.credit_matrix(*BLOCKWISE, NAMES), path)
        written.append(path.read_bytes())
    assert written[0].startswith(start)
    assert written[0] == written[1]
    assert {path.name for path in (tmp_path / "deeper").iterdir()} == {f"a{suffix}", f"b{suffix}"}


def test_save_refuses_other_formats(tmp_path):
    with pytest.raises(UserError, match=r"unknown figure format '.gif'; allowed: .png, .svg, .pdf"):
        plots.save(plots.credit_matrix(*BLOCKWISE, NAMES), tmp_path / "a.gif")


def test_plots_leave_matplotlib_settings_and_pyplot_alone():
    before = [mpl.rcParams[name] for name in mpl.rcParams]
    plots.gradient_paths([("x", *LOCO, NAMES)])
    assert [mpl.rcParams[name] for name in mpl.rcParams] == before
    code = (
        "import sys, localsim.analysis.plots as p; assert 'matplotlib' not in sys.modules;"
        "p.accuracy_by_stage({'a': [('s', .5, .4, .6)]}, title='t'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
