"""Every metric and ceiling equals that of Brain-Score's own objects on the same assembly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from localsim.analysis.brain.brainscore import prepare, quiet
from localsim.analysis.brain.metrics import get_metric
from localsim.analysis.brain.recordings import Recording
from localsim.data import ImageSet

prepare()
pytest.importorskip("brainscore_vision", reason="needs the extra [brain]")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of old xarray, pandas

N, NEURONS, TRIALS = 60, 11, 6
STIMULI = np.array([f"im{number:03d}" for number in range(N)])
GROUPS = np.array([f"object {number % 4}" for number in range(N)])
SUBJECTS = np.array([f"monkey {number % 3}" for number in range(NEURONS)])


@pytest.fixture(scope="module")
def features():
    """More features than images, of falling variance, with a mean."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, 200)) * np.arange(1, 201) ** -0.7 + rng.normal(size=200)


def recording(features: np.ndarray, missing: str = "none", groups: bool = False) -> Recording:
    """Return responses made from the features, with noise; some trials not given to an image, or to a neuron."""
    rng = np.random.default_rng(1)
    made = (features @ rng.normal(size=(features.shape[1], NEURONS)))[:, :, None]
    made = made + 2 * rng.normal(size=(N, NEURONS, TRIALS)) + 5
    if missing == "trials":  # the last ones, as many sessions end
        given = rng.integers(TRIALS // 2 + 1, TRIALS + 1, size=N)
        made[(np.arange(TRIALS) >= given[:, None])[:, None].repeat(NEURONS, 1)] = np.nan
    if missing == "neurons":
        gone = rng.uniform(size=made.shape) < 0.1
        gone[:, :, 0] = False
        made[gone] = np.nan
    return Recording(
        "made",
        ImageSet(torch.zeros((N, 3, 2, 2), dtype=torch.uint8), None, None),
        made,
        regions=("V4",) * NEURONS,
        subjects=tuple(SUBJECTS),
        stimuli=tuple(STIMULI),
        groups=tuple(GROUPS) if groups else None,
    )


def assembly(values: np.ndarray, presentations: dict, neuroids: dict):
    from brainscore_core.supported_data_standards.brainio.assemblies import (  # type: ignore[import-not-found]
        NeuroidAssembly,
    )

    coordinates = {name: ("presentation", value) for name, value in presentations.items()}
    coordinates |= {name: ("neuroid", value) for name, value in neuroids.items()}
    return NeuroidAssembly(values, coords=coordinates, dims=["presentation", "neuroid"])


def layer(features: np.ndarray):
    neuroids = {"neuroid_id": np.arange(features.shape[1]), "layer": np.array(["one"] * features.shape[1])}
    return assembly(features, {"stimulus_id": STIMULI, "object_name": GROUPS}, neuroids)


def neurons(values: np.ndarray, **presentations):
    given = presentations or {"stimulus_id": STIMULI, "object_name": GROUPS}
    return assembly(values, given, {"neuroid_id": np.arange(NEURONS), "subject": SUBJECTS})


def trials(recorded: Recording):
    """Return an assembly with a presentation per image and trial, without those that no neuron has."""
    assert recorded.responses is not None
    values = recorded.responses[..., 0]
    trial, image = np.argwhere(~np.isnan(values).all(1).T).T
    places = {"stimulus_id": STIMULI[image], "object_name": GROUPS[image], "repetition": trial}
    return neurons(values[image, :, trial], **places)


def theirs(name: str, groups: bool = False):
    from brainscore_vision import load_metric  # type: ignore[import-not-found]
    from brainscore_vision.metrics.regression_correlation import metric  # type: ignore[import-not-found]

    options = {} if name in ("rdm", "cka") else {"stratification_coord": "object_name" if groups else None}
    keywords = {"crossvalidation_kwargs": options} if options else {}
    if name == "ridgecv":
        return metric.CrossRegressedCorrelation(
            metric.dual_ridge_cv_regression(), metric.pearsonr_correlation(), **keywords
        )
    return load_metric(name, **keywords)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", ["pls", "ridge", "ridgecv"])
def test_regressions(name, groups, features):
    recorded = recording(features, groups=groups)
    with quiet():
        expected = theirs(name, groups)(layer(features), neurons(recorded.means()))
    metric = get_metric(name)
    target = metric.target(recorded)
    predictor = metric.represent(features)
    outcome = metric.compare(predictor, target)
    assert outcome.value == pytest.approx(float(expected), abs=1e-8)
    raw = expected.raw.transpose("split", "neuroid").values
    np.testing.assert_allclose(target.content.scores(predictor)[0], raw, atol=1e-8)
    np.testing.assert_allclose(outcome.each, raw.mean(0), atol=1e-8)


def test_a_neuron_that_is_silent_in_a_test_set_is_left_out_of_its_median(features):
    recorded = recording(features)
    values = np.round(recorded.means())
    values[:, 3] = 0
    values[:4, 3] = 1  # seldom tested
    rare = Recording("rare", recorded.images, values, stimuli=tuple(STIMULI))
    with quiet(), np.errstate(all="ignore"), pytest.warns(match="(?i)constant"):
        expected = theirs("ridge")(layer(features), neurons(values))
    metric = get_metric("ridge")
    raw = expected.raw.transpose("split", "neuroid").values
    assert np.isnan(raw).any() and not np.isnan(raw).all(0).any()
    target, predictor = metric.target(rare), metric.represent(features)
    np.testing.assert_allclose(target.content.scores(predictor)[0], raw, atol=1e-8)
    assert metric.compare(predictor, target).value == pytest.approx(float(expected), abs=1e-8)


@pytest.mark.parametrize("name", ["rdm", "cka"])
def test_matrices(name, features):
    recorded = recording(features)
    metric = get_metric(name)
    outcome = metric.compare(metric.represent(features), metric.target(recorded))
    expected = theirs(name)(layer(features), neurons(recorded.means()))
    assert outcome.value == pytest.approx(float(expected), abs=1e-9)


def test_rsa_and_its_ceiling(features):
    from brainscore_vision import load_ceiling
    from brainscore_vision.metrics.rdm.metric import RDM, RDMSimilarity  # type: ignore[import-not-found]

    recorded = recording(features)
    whole = neurons(recorded.means())
    each = [
        float(RDMSimilarity()(RDM()(layer(features)), RDM()(whole[:, whole["subject"].values == name])))
        for name in np.unique(SUBJECTS)
    ]
    ceiling = load_ceiling("rsa_ceiling")(whole)
    metric = get_metric("rsa")
    target = metric.target(recorded)
    outcome = metric.compare(metric.represent(features), target)
    np.testing.assert_allclose(outcome.each, each, atol=1e-9)
    assert outcome.value == pytest.approx(np.mean(each), abs=1e-9)
    assert target.ceiling.value == pytest.approx(float(ceiling), abs=1e-9)
    assert target.ceiling.lower == pytest.approx(ceiling.attrs["lower_bound_loo"], abs=1e-9)
    assert metric.ceiled(outcome.value, target.ceiling.value) == pytest.approx(np.mean(each) / float(ceiling))


@pytest.mark.parametrize("missing", ["none", "trials", "neurons"])
@pytest.mark.parametrize("name", ["pls", "rdm", "cka"])
def test_internal_consistency(name, missing, features):
    from brainscore_vision import load_ceiling, load_metric
    from brainscore_vision.metrics.internal_consistency.ceiling import (  # type: ignore[import-not-found]
        InternalConsistency,
    )

    recorded = recording(features, missing)
    ceiler = load_ceiling("internal_consistency") if name == "pls" else InternalConsistency(load_metric(name))
    with quiet():
        expected = ceiler(trials(recorded))
    found = get_metric(name).target(recorded).ceiling
    assert found.value == pytest.approx(float(expected), abs=1e-9) and found.lower is None


def test_the_ceiled_score_is_that_of_their_benchmarks(features):
    from brainscore_core import Score  # type: ignore[import-not-found]
    from brainscore_vision.benchmark_helpers.neural_common import explained_variance  # type: ignore[import-not-found]

    assert get_metric("pls").ceiled(0.6, 0.8) == pytest.approx(float(explained_variance(Score(0.6), Score(0.8))))
