"""Brain scores as text: a table for each region, and whether regimes differ."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from localsim.analysis.brain.contrasts import BrainDifference, differences, references_of
from localsim.analysis.brain.means import SeedMean, counted, members, profile
from localsim.analysis.brain.scores import EVERY

if TYPE_CHECKING:
    from localsim.analysis.brain.scores import BrainScores, Place


def as_text(scores: BrainScores) -> str:
    """Return, for each region, the scores of all layers with intervals, chance and ceiling, and the differences."""
    intervals = f"; 95 % intervals over {scores.metric.over}" if scores.record["resamples"] else ""
    lines = [f"{scores.metric.name}: {scores.metric.summary.rstrip('.')}{intervals}"]
    for place in scores.headline:
        lines += ["", *_table(scores, place), *_differences(scores, place), *_best(scores, place)]
    if scores.untrained and not scores.record["end_to_end"]:
        lines += ["", "no end_to_end run was given to hold these against: `localsim run --rule end_to_end` makes one"]
    return "\n".join(lines)


def _table(scores: BrainScores, place: Place) -> list[str]:
    recording, region = place
    pooled = members(scores, place)
    name = f"mean over {len(pooled)} recordings{recording.removeprefix(EVERY)}" if len(pooled) > 1 else recording
    lines = [f"{region}, {name}: {counted(scores, place)}; {_ceiling(scores, pooled)}"]
    rows = [(_label(regime, one), one) for regime in scores.regimes for one in profile(scores, place, regime)]
    width = max(len(label) for label, _ in rows)
    for label, one in rows:
        interval = "" if one.interval is None else f" [{one.interval[0]:.3f}, {one.interval[1]:.3f}]"
        more = "" if one.ceiled is None else f"  of ceiling {one.ceiled:+.3f}"
        more += "" if one.chance is None else f"  shuffled {one.chance:+.3f}"
        lines.append(f"  {label:<{width}}  {one.value:+.3f}{interval}{more}")
    return lines


def _label(regime: str, one: SeedMean) -> str:
    if regime == one.name:
        return regime
    if one.seeds == (None,):
        return f"{regime} {one.name}"
    seeds = f" seed {one.seeds[0]}" if len(one.seeds) == 1 else f", {len(one.seeds)} seeds,"
    return f"{regime}{seeds} {one.name}"


def _ceiling(scores: BrainScores, places: Sequence[Place]) -> str:
    found = {place[0]: scores.score(*place, scores.layers[0]) for place in places}
    known = {name: one.ceiling for name, one in found.items() if one.ceiling is not None}
    if not known:
        return f"no ceiling: {next(iter(found.values())).unceiled}"
    ceiling = next(iter(known.values()))
    lower = "" if ceiling.lower is None else f", lower bound {ceiling.lower:.3f}"
    values = ", ".join(f"{one.value:.3f}" + f" in {name}" * (len(places) > 1) for name, one in known.items())
    told = f"ceiling {values} ({ceiling.kind}{lower})"
    if len(known) < len(places):
        return f"{told} only"
    return f"{told}; of ceiling: {'sign(r) r²' if scores.metric.squared else 'r'} / ceiling"


def _differences(scores: BrainScores, place: Place) -> list[str]:
    lines = []
    for regime in scores.untrained:
        for reference in references_of(scores, regime):
            if found := differences(scores, regime, reference, [place]):
                lines.append(f"  {regime} minus {reference}, {_pairs(found)}:")
                lines += [f"    {one.layer:<12} {one}" for one in found]
    return lines


def _pairs(found: Sequence[BrainDifference]) -> str:
    most = max(one.pairs for one in found)
    of = {True: " of the same seed", False: " of different seeds", None: ""}[found[0].same_seed]
    return f"{most} pair{'s' * (most > 1)} of networks{of}"


def _best(scores: BrainScores, place: Place) -> list[str]:
    """Return the cross-validated best stages, averaged over the recordings that a place stands for."""
    recordings = [name for name, _ in members(scores, place)]
    lines = []
    for regime in scores.regimes:
        own = [
            one
            for one in scores.best
            if one.regime == regime and one.region == place[1] and one.recording in recordings
        ]
        if own:
            names = dict.fromkeys(layer.name for layer in scores.finished(regime))
            chosen = {name: sum(one.chosen.get(name, 0) for one in own) for name in names}
            folds = sum(chosen.values())
            times = ", ".join(f"{layer} {count} of {folds}" for layer, count in chosen.items() if count)
            lines.append(
                f"  best stage of {regime}: {fmean(one.value for one in own):+.3f}, chosen by other images: {times}"
            )
    return lines
