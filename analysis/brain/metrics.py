"""Brain-Score's metrics of how well a layer accounts for a recording: the same numbers, from one matrix per layer.

    features (n, p) --represent--> predictor      recording --target--> target      compare(predictor, target) --> r

`represent` reads the features once, in chunks; what it returns has n x n numbers. `target` prepares one region of a
recording, with its resamples, for all layers of all networks: resamples depend on the recording alone, so that the
difference of two networks is paired.
"""

from __future__ import annotations

from typing import Any, Literal

from localsim.analysis.brain.ceilings import (
    Ceiling,
    cka_similarity,
    internal_consistency,
    pearson,
    rdm_similarity,
    subject_ceiling,
)
from localsim.analysis.brain.held_out import HeldOut, Regression, mean, median
from localsim.analysis.brain.interface import NeuralMetric, Outcome, Predictor, Target
from localsim.analysis.brain.matrices import Dissimilarities, Products
from localsim.analysis.brain.recordings import Recording, Seeds
from localsim.analysis.brain.regression import ALPHAS, Layer
from localsim.analysis.brain.resampled import Resampled, ResponsePairs, SubjectPairs, by_subject
from localsim.analysis.brain.splits import check_splits
from localsim.errors import UserError, one_of

__all__ = ["METRICS", "NAMES", "Ceiling", "NeuralMetric", "Outcome", "Predictor", "Target", "get_metric"]


def _regression(method: Literal["pls", "ridge", "ridgecv"], splits: int, train_size: float, components: int) -> dict:
    fit = Regression(method, components)

    def prepare(recording: Recording, draws: int, seeds: Seeds) -> Target:
        held_out = HeldOut.of(recording, fit, splits, train_size, draws, seeds)
        return Target(recording, held_out, lambda: internal_consistency(recording, pearson, "neurons"))

    def score(layer: Layer, held_out: HeldOut) -> Outcome:
        r, draws = held_out.scores(layer)
        return Outcome(float(median(r).mean()), mean(r), draws)

    return {"represent": Layer.of, "prepare": prepare, "score": score}


def _pairs(kind: Literal["rdm", "cka"]) -> dict:
    similarity = {"rdm": rdm_similarity, "cka": cka_similarity}[kind]

    def prepare(recording: Recording, draws: int, seeds: Seeds) -> Target:
        whose = f"{recording.name} {recording.areas[0]}"
        if recording.responses is None:
            source = SubjectPairs(by_subject(recording)[1], True, whose, seeds, draws)
        else:
            source = ResponsePairs(recording.means(), kind, whose, seeds, draws)
        made = Resampled(source)
        _ = made.whole  # so that a recording that does not fit is refused here
        return Target(recording, made, lambda: internal_consistency(recording, similarity, kind))

    def score(layer: Any, made: Resampled) -> Outcome:
        return Outcome(made.score(layer), None, made.scores(layer))

    return {"represent": (Dissimilarities if kind == "rdm" else Products).of, "prepare": prepare, "score": score}


def _subjects() -> dict:
    def prepare(recording: Recording, draws: int, seeds: Seeds) -> Target:
        names, rdms = by_subject(recording)
        if len(names) < 2:
            raise UserError(
                f"{recording.name} {recording.areas[0]} has 1 subject, {names[0]}; rsa needs 2 or more; allowed: rdm, "
                "or other regions (--regions, in Python regions=[...])"
            )
        whose = f"{len(names)} subjects"
        made = Resampled(SubjectPairs(rdms, False, whose, seeds, draws))
        return Target(recording, made, lambda: subject_ceiling(rdms, whose))

    def score(layer: Dissimilarities, made: Resampled) -> Outcome:
        assert isinstance(made.source, SubjectPairs)
        each = made.source.each @ layer.unit()
        return Outcome(float(each.mean()), each, made.scores(layer))

    return {"represent": Dissimilarities.of, "prepare": prepare, "score": score}


def _make(name: str, splits: int, train_size: float, components: int) -> NeuralMetric:
    by_split = f"median over neurons, mean over {splits} splits, {train_size:.0%} of the images fitted"
    if name in ("pls", "ridge", "ridgecv"):
        words = {
            "pls": f"partial least squares with {components} components",
            "ridge": "ridge regression with penalty 1",
            "ridgecv": f"ridge regression with the best of {len(ALPHAS)} penalties by leave-one-out error",
        }
        sources = {
            "pls": "Yamins et al. 2014, PNAS 111:8619; Schrimpf et al. 2018, bioRxiv 407007",
            "ridge": "Schrimpf et al. 2018, bioRxiv 407007; Hoerl & Kennard 1970, Technometrics 12:55",
            "ridgecv": "Schrimpf et al. 2018, bioRxiv 407007; Rifkin & Lippert 2007, MIT-CSAIL-TR-2007-025",
        }
        theirs = {
            "pls": "load_metric('pls')",
            "ridge": "load_metric('ridge')",
            "ridgecv": "CrossRegressedCorrelation(dual_ridge_cv_regression(), pearsonr_correlation())",
        }
        every = {"splits": splits, "train_size": train_size, "components": components}
        options = {option: value for option, value in every.items() if option in _USES[name]}
        as_there = all(value == _DEFAULTS[option] for option, value in options.items())
        return NeuralMetric(
            name=name,
            summary=f"Pearson's r of neurons with held-out predictions by {words[name]}: {by_split}.",
            source=sources[name],
            brainscore=theirs[name] + ("" if as_there else f", with {options}"),
            takes="responses",
            over="images (fits held fixed) and neurons",
            resamples=1000,
            shuffles=1,
            options=options,
            **_regression(name, splits, train_size, components),
        )
    if name == "rdm":
        return NeuralMetric(
            name=name,
            summary="Spearman's r of the layer's and the region's distances between images, 1 - Pearson's r each.",
            source="Kriegeskorte, Mur & Bandettini 2008, Front. Syst. Neurosci. 2:4",
            brainscore="load_metric('rdm')",
            takes="both",
            over="halves of the images, and neurons or subjects",
            resamples=200,
            shuffles=20,
            **_pairs("rdm"),
        )
    if name == "rsa":
        return NeuralMetric(
            name=name,
            summary="Mean over subjects of Spearman's r of the layer's and the subject's distances between images.",
            source="Nili et al. 2014, PLoS Comput. Biol. 10:e1003553",
            brainscore="RSABenchmark",
            takes="both",
            over="halves of the images, and subjects",
            resamples=200,
            shuffles=20,
            squared=False,
            **_subjects(),
        )
    return NeuralMetric(
        name=name,
        summary="Unbiased linear centred kernel alignment of the layer's and the region's responses to images.",
        source="Kornblith et al. 2019, ICML; Song et al. 2012, J. Mach. Learn. Res. 13:1393",
        brainscore="load_metric('cka')",
        takes="responses",
        over="halves of the images, and neurons",
        resamples=200,
        shuffles=20,
        **_pairs("cka"),
    )


_DEFAULTS = {"splits": 10, "train_size": 0.9, "components": 25}
_USES = {"pls": set(_DEFAULTS), "ridge": {"splits", "train_size"}, "ridgecv": {"splits", "train_size"}}


def get_metric(
    name: str, *, splits: int | None = None, train_size: float | None = None, components: int | None = None
) -> NeuralMetric:
    """Return a metric by its name, by default as Brain-Score has it.

    Args:
        name: `pls`, `ridge`, `ridgecv`, `rdm`, `rsa` or `cka`.
        splits: of the regressions, by default 10.
        train_size: of the regressions, share of the images that are fitted, by default 0.9.
        components: of pls, by default 25.

    Raises:
        UserError: unknown name, an option that the metric has not, or one out of range.
    """
    if name not in NAMES:
        raise one_of("neural metric", name, NAMES)
    given = {"splits": splits, "train_size": train_size, "components": components}
    given = {option: value for option, value in given.items() if value is not None}
    for option, value in given.items():
        if option not in _USES.get(name, ()):
            users = [one for one, uses in _USES.items() if option in uses]
            raise UserError(f"{name} has no {option}, but was given {value}; allowed: {option} of {', '.join(users)}")
    chosen = {**_DEFAULTS, **given}
    check_splits(chosen["splits"], chosen["train_size"])
    if chosen["components"] < 1:
        raise UserError(f"{components} PLS components are not possible; allowed: 1 or more")
    return _make(name, **chosen)


NAMES = ("pls", "ridge", "ridgecv", "rdm", "rsa", "cka")
METRICS = {name: get_metric(name) for name in NAMES}
"""Every metric by its name, with Brain-Score's choices."""
