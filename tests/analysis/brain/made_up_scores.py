"""Scores without meaning, and what is read from the figures that are drawn of them."""

from __future__ import annotations

from typing import Any

import matplotlib.text
import numpy as np
from matplotlib.colors import to_hex

from localsim.analysis.brain.metrics import METRICS, Ceiling
from localsim.analysis.brain.scores import BrainScore, BrainScores
from localsim.analysis.regimes import Layer

REGIMES = ("end_to_end", "loco")
LONG = (
    "end_to_end", "blockwise granularity=4 reach=1", "blockwise granularity=8 reach=2", "loco", "greedy_infomax",
    "layerwise", "clapp temperature=0.07_symmetrised", "lpl",
)  # fmt: skip


def made_up(
    metric: str = "ridgecv", regimes=REGIMES, seeds=(0,), layers: int = 3, regions=("V4",), recordings=("mine",),
    steps=(), resamples: int = 20, ceiling: float | None = 0.4, lower: float | None = None, controls: bool = True,
    names=(),
) -> BrainScores:  # fmt: skip
    """Return scores without meaning: all different, draws included."""
    rng = np.random.default_rng(0)
    unlearned = ("untrained",) if controls else ()
    baselines = ("pixels", "gabor") if controls else ()
    found = [Layer(one, None, None, one, 0.0) for one in baselines]
    for regime, seed in [(regime, seed) for regime in (*unlearned, *regimes) for seed in seeds]:
        for step in (*(steps if regime in regimes else ()), None):
            own = [f"{dict(names).get(regime, 'layer')}{i + 1}" for i in range(layers)]
            found += [Layer(regime, seed, step, name, (i + 1) / layers) for i, name in enumerate(own)]
    scores: dict[tuple[str, str, Layer], BrainScore] = {}
    for recording, region, layer in [(a, b, c) for a in recordings for b in regions for c in found]:
        value = rng.uniform(0.2, 0.5)
        scores[recording, region, layer] = BrainScore(
            value, value + 0.02 * rng.normal(size=resamples), 0.01 * rng.normal() if controls else None,
            None if ceiling is None else Ceiling(ceiling, "consistency", lower), None, 60, 7, -1, 1,
        )  # fmt: skip
    pooled = []
    if len(recordings) > 1:
        for region in regions:
            pooled.append({"recording": "all", "region": region, "of": list(recordings)})
            for layer in found:
                scores["all", region, layer] = BrainScore.mean(
                    [scores[one, region, layer] for one in recordings], 60 * len(recordings)
                )
    training = {
        (one.regime, one.seed, one.step): (step / 10, 1e6 * step * (1 + regimes.index(one.regime)))
        for one in found
        if steps and one.regime in regimes
        for step in [max(steps) if one.step is None else one.step]
    }
    record: dict[str, Any] = {
        "recordings": {one: {"n": 60, "of": "matrices" if metric == "rsa" else "neurons"} for one in recordings},
        "pooled": pooled, "resamples": resamples, "baselines": list(baselines), "unlearned": list(unlearned),
        "end_to_end": [one for one in regimes if one == "end_to_end"],
    }  # fmt: skip
    untrained = dict.fromkeys(regimes, "untrained") if controls else {}
    return BrainScores(METRICS[metric], tuple(found), scores, training, untrained, [], record)


LARGE: dict[str, Any] = {"regimes": LONG, "seeds": (0, 1), "layers": 17, "regions": ("V4", "human IT"), "steps": (0, 9)}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "over training": {"steps": (0, 10, 500), "seeds": (0, 1), "regions": ("V4", "IT"), "layers": 4},
    "recordings": {"recordings": ("cowley2026 210325", "cowley2026 201025"), "layers": 5, "ceiling": 0.9},
    "many columns": {"recordings": ("one", "two", "three"), "regions": ("V1", "V2", "V4", "IT", "TE")},
    "matrices": {"metric": "rsa", "lower": 0.3, "regions": ("monkey IT", "human IT"), "regimes": LONG[:5]},
    "bare": {"regimes": ("loco",), "controls": False, "resamples": 0, "ceiling": None, "layers": 1, "steps": (0, 9)},
    "many seeds": {"seeds": tuple(range(9)), "regimes": LONG[1:2]},
    "large": LARGE,
}


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def words(figure) -> str:
    """Return everything that is written on a figure, in one line."""
    found = [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible()]
    return " ".join("\n".join(found).split())


def written(figure) -> list[matplotlib.text.Text]:
    """Return the texts that are drawn; matplotlib keeps labels of ticks beyond the axes too."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.findobj(matplotlib.text.Text))]
    for axes in figure.axes:
        if not axes.axison:
            continue
        found += [*axes.texts, axes._left_title, axes.title, axes._right_title, axes.xaxis.label, axes.yaxis.label]
        for one in (axes, *axes.child_axes):
            for axis in (one.xaxis, one.yaxis):
                low, high = sorted(axis.get_view_interval())
                shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
                found += [label for tick in shown for label in (tick.label1, tick.label2)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def drawn(axes) -> dict[str, np.ndarray]:
    """Return what error bars of a panel show, by colour: x, value, low and high of every point."""
    found = {}
    for container in axes.containers:
        line, _, bars = container
        x, y = map(np.asarray, line.get_data())
        ends = np.array([segment[:, 1] for segment in bars[0].get_segments()]) if bars else np.stack([y, y], 1)
        found[to_hex(line.get_color()).upper()] = np.column_stack([x, y, ends]).astype(float)
    return found


def levels(axes) -> dict[str, float]:
    """Return level lines by colour and dashes."""
    lines = [line for line in axes.lines if list(line.get_xdata()) == [0, 1] and len(set(line.get_ydata())) == 1]
    return {f"{to_hex(line.get_color()).upper()} {line.get_linestyle()}": line.get_ydata()[0] for line in lines}


def spans(axes) -> list[tuple[float, float]]:
    corners = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
    return sorted((box.y0, box.y1) for box in corners)


def by_hand(score: BrainScore) -> tuple[float, float, float]:
    low, high = np.quantile(score.draws - score.draws.mean(), [0.025, 0.975])
    return score.value, score.value + low, score.value + high
