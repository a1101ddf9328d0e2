"""Section: how alike the layers of the runs are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from localsim.analysis.comparison import Comparison, compare
from localsim.analysis.comparison_plots import similarity_map, similarity_matrix, similarity_profiles
from localsim.analysis.profiles import ProfilePoint
from localsim.analysis.report.asked import Asked
from localsim.analysis.report.elements import (
    Fold,
    Part,
    Section,
    Table,
    in_interval,
    listed,
    parts_or_note,
    picture,
)
from localsim.analysis.report.reported import Reported, usable_runs
from localsim.errors import UserError

Profile = tuple[str, str, bool, list[ProfilePoint]]
"""Two regimes, whether pairs of runs share a seed, and how alike they are at each depth."""


def section(runs: Sequence[Reported], asked: Asked) -> Section:
    """Return the section."""
    return Section(
        "similarity", "Similarity",
        f"How alike what ends the backbone's own stages is, within and between regimes, by {asked.measure}, on the "
        "runs' own test images, beside the untrained network of each seed; features are maps averaged over positions. "
        "Runs of one seed share their initial weights and order of images, so pairs of the same seed and of different "
        "seeds are kept apart. Alike is not equally good, nor does it say what is alike.",
        parts_or_note(lambda: _compared(runs, asked), "Not compared"),
    )  # fmt: skip


def _compared(runs: Sequence[Reported], asked: Asked) -> list[Part]:
    usable = usable_runs(runs)
    if all(not run.trains for run in usable):
        raise UserError("no run has learned anything")
    found = compare(
        *(run.run for run in usable), images=asked.images, measure=asked.measure, permutations=0, device=asked.device,
        cache=asked.cache, progress=asked.progress,
    )  # fmt: skip
    n, kind = found.record["n"], found.measure.kind
    ends = "1 is alike" if kind == "similarity" else "0 is alike"
    profiles = list(_profiles(found))
    parts: list[Part] = []
    if profiles:
        parts.append(picture(
            similarity_profiles(found), _profiles_alt(found, profiles),
            f"Against depth, a panel for each regime: how alike the others are to it. {found.measure.name}, {ends}, "
            f"n = {n} images; bars are 95 % intervals over {found.record['interval']}. The grey band is what two seeds "
            "of the panel's own regime differ by, where it has several.",
        ))  # fmt: skip
        parts.append(_table(found, profiles))
    learned = [regime for regime in found.regimes if regime not in found.record["unlearned"]]
    pictures: list[Part] = [picture(
        similarity_matrix(found), _matrix_alt(found),
        f"Every layer of every network with every other: {found.measure.name}, {ends}, n = {n} images, no intervals.",
    )]  # fmt: skip
    if len(learned) > 1 and len(found.finished) > 2:
        pictures.append(picture(
            similarity_map(found, learned), _map_alt(found, learned),
            "A map of the layers of the regimes that learned, controls left out: near is alike. Two dimensions hold "
            "only the share of all distances that the axes say.",
        ))  # fmt: skip
    return [*parts, Fold("All layers against all, and a map of them", pictures)]


def _profiles(found: Comparison) -> Iterator[Profile]:
    symmetric = found.measure.symmetric
    for place, a in enumerate(found.regimes):
        for b in found.regimes[place if symmetric else 0 :]:
            for same_seed in (True, False):
                if points := found.profile(a, b, same_seed=same_seed):
                    yield a, b, same_seed, points


def _between(found: Comparison, a: str, b: str) -> str:
    if found.measure.symmetric:
        return f"{a} with itself" if a == b else f"{a} with {b}"
    return f"{b} predicted from {a}"


def _table(found: Comparison, profiles: Sequence[Profile]) -> Table:
    names = list(dict.fromkeys(point.layer for *_, points in profiles for point in points))
    over = list(dict.fromkeys(points[0].over for *_, points in profiles))
    rows = []
    for a, b, same_seed, points in profiles:
        cells = {point.layer: in_interval(point.value, point.low, point.high) for point in points}
        pairs = f"{points[0].seed_pairs} of {'the same seed' if same_seed else 'different seeds'}"
        rows.append([
            _between(found, a, b), pairs, *([points[0].over] if len(over) > 1 else []),
            *(cells.get(name, "–") for name in names),
        ])  # fmt: skip
    head = ["regimes", "pairs of runs", *(["interval over"] if len(over) > 1 else []), *names]
    return Table(
        f"{found.measure.name} by layer, means over pairs of runs with 95 % intervals"
        f"{f' over {over[0]}' if len(over) == 1 else ''}; n = {found.record['n']} images.",
        head, rows, names=range(len(head) - len(names)),
    )  # fmt: skip


def _course(points: Sequence[ProfilePoint]) -> str:
    if len(points) == 1:
        return f"{points[0].value:.2f} at {points[0].layer}"
    first, last = points[0], points[-1]
    steady = all(a.value >= b.value for a, b in pairwise(points)) or all(
        a.value <= b.value for a, b in pairwise(points)
    )
    way = "" if steady else " with turns"
    return f"{first.value:.2f} at {first.layer} to {last.value:.2f} at {last.layer}{way}"


def _profiles_alt(found: Comparison, profiles: Sequence[Profile]) -> str:
    told = [f"{_between(found, a, b)} ({'same' if same else 'different'} seeds): {_course(points)}"
            for a, b, same, points in profiles]  # fmt: skip
    return f"{found.measure.name} against depth. {listed(told, 6)}"


def _matrix_alt(found: Comparison) -> str:
    matrix, layers = found.matrix(), found.finished
    apart = [(matrix[i, j], i, j) for i, a in enumerate(layers) for j, b in enumerate(layers)
             if i < j and (a.regime, a.seed) != (b.regime, b.seed)]  # fmt: skip
    told = f"Heat map of {len(layers)} layers of {len({(one.regime, one.seed) for one in layers})} networks."
    if not apart:
        return told
    (low, a, b), (high, c, d) = min(apart), max(apart)
    return (f"{told} Between networks, values run from {low:.2f} ({layers[a]} with {layers[b]}) to {high:.2f} "
            f"({layers[c]} with {layers[d]}).")  # fmt: skip


def _map_alt(found: Comparison, regimes: Sequence[str]) -> str:
    distances, layers = found.distances(), found.finished
    tops = {layer.regime: place for place, layer in enumerate(layers)}
    told = [f"{a} and {b} end {distances[tops[a], tops[b]]:.2f} apart"
            for place, a in enumerate(regimes) for b in regimes[place + 1 :]]  # fmt: skip
    return f"Map of the layers of {', '.join(regimes)}. Distances of their highest layers: {listed(told, 6)}"
