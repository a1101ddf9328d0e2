"""Every registered measure keeps what it declares, and refuses what it cannot compare."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.analysis.similarity import INVARIANCES, MEASURES, get_measure
from localsim.errors import UserError

every = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
N = 24


def layers(measure, number=2, n=N, seed=0):
    """Return layers of different widths with common and own causes, with repeats where the measure takes those."""
    rng = np.random.default_rng(seed)
    wide = 25 * ("pls" in measure.name)  # as many features, and more images, than components
    causes = rng.normal(size=(n + wide, 3))
    made = []
    for width in (5 + wide, 8 + wide, 6 + wide)[:number]:
        clean = causes @ rng.normal(size=(3, width)) + 0.7 * rng.normal(size=(len(causes), width)) + 1
        made.append(clean + 0.3 * rng.normal(size=(3, *clean.shape)) if measure.repeats else clean)
    return made


def turned(x, rng):
    return x @ np.linalg.qr(rng.normal(size=(x.shape[-1],) * 2))[0]


CHANGES = {
    "translation": lambda x, rng: x + 3 * rng.normal(size=x.shape[-1]),
    "orthogonal": turned,
    "scale": lambda x, rng: x * rng.uniform(0.2, 5),
    "linear": lambda x, rng: turned(x, rng) * rng.uniform(0.5, 2, size=x.shape[-1]),
}


def test_names_are_unique_and_the_registry_has_all_of_every_family():
    from localsim.analysis.similarity import (
        alignment,
        canonical,
        latent,
        neighbours,
        prediction,
        representational,
        shape,
    )

    families = (alignment, representational, shape, canonical, prediction, latent, neighbours)
    listed = [measure.name for family in families for measure in family.MEASURES]
    assert len(listed) == len(set(listed)) and listed == list(MEASURES)
    assert all(get_measure(name) is measure for name, measure in MEASURES.items())


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(UserError, match=r"unknown measure 'ckaa'; allowed: cka, cka_debiased, .*mutual_knn"):
        get_measure("ckaa")


@every
def test_declarations_are_complete(measure):
    assert measure.summary.endswith(".") or measure.summary
    assert measure.source and measure.low < measure.high
    assert measure.invariances <= set(INVARIANCES)
    assert not measure.metric or (measure.symmetric and measure.kind == "distance")
    if "linear" in measure.invariances:
        assert {"orthogonal", "scale"} <= measure.invariances
    if measure.kind == "similarity":
        assert measure.high == 1
    else:
        assert measure.low == 0


@every
def test_it_is_a_float_within_its_range(measure):
    for seed in range(5):
        x, y = layers(measure, seed=seed)
        value = measure(x, y)
        assert type(value) is float
        assert measure.low <= value <= measure.high
        unrelated = np.random.default_rng(seed + 50).normal(size=y.shape)
        assert measure.low <= measure(x, unrelated) <= measure.high


@every
def test_a_layer_is_most_like_itself(measure):
    x, y = layers(measure)
    itself, other = measure(x, x), measure(x, y)
    if measure.kind == "distance":
        assert itself == pytest.approx(0, abs=1e-6) and other > 0.01
    else:
        assert itself > other
        if measure.bias != "cross-validated":
            assert itself == pytest.approx(1, abs=1e-6)


@every
def test_it_is_symmetric_where_it_says_so(measure):
    x, y = layers(measure)
    same = measure(x, y) == pytest.approx(measure(y, x), abs=1e-9)
    assert same == measure.symmetric


@pytest.mark.parametrize("measure", [m for m in MEASURES.values() if m.metric], ids=lambda measure: measure.name)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_a_metric_obeys_the_triangle_inequality(measure, seed):
    x, y, z = layers(measure, 3, n=12, seed=seed)
    near = y + 0.1 * np.random.default_rng(seed).normal(size=y.shape)
    for a, b, c in itertools.permutations((x, y, z, near), 3):
        assert measure(a, c) <= measure(a, b) + measure(b, c) + 1e-9


@every
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 1000), side=st.integers(0, 1))
def test_declared_invariances_hold(measure, seed, side):
    pair = layers(measure, seed=seed)
    value = measure(*pair)
    for name in measure.invariances:
        changed = list(pair)
        changed[side] = CHANGES[name](changed[side], np.random.default_rng(seed + 1))
        assert measure(*changed) == pytest.approx(value, abs=1e-6), name


@every
def test_float32_agrees_with_float64(measure):
    x, y = layers(measure)
    wide = measure(x, y)
    narrow = measure(x.astype(np.float32), y.astype(np.float32))
    # a neighbour or a rank more or less
    assert narrow == pytest.approx(wide, abs=1e-4)
    assert measure(x, y, dtype="float32") == pytest.approx(narrow, abs=1e-6)
    assert measure(torch.from_numpy(x), torch.from_numpy(y)) == wide


@every
def test_arguments_are_left_as_they_are(measure):
    pair = layers(measure)
    before = [x.copy() for x in pair]
    measure(*pair)
    measure(*map(torch.from_numpy, pair))
    assert all((x == y).all() for x, y in zip(pair, before, strict=True))


def spoiled(x, value):
    bad = x.copy()
    bad[..., 2, 1] = value
    return bad


@every
@pytest.mark.parametrize("side", [0, 1])
def test_what_cannot_be_compared_is_a_sentence_and_never_a_number(measure, side):
    x, y = layers(measure)
    for wrong, sentence in [
        (x[..., :3, :], "3 images are too few to compare layers; allowed: 4 or more"),
        (spoiled(x, np.nan), "NaN or infinite"),
        (spoiled(x, -np.inf), "NaN or infinite"),
        (np.ones_like(x), "constant|as far|no structure|same|equal|noise|never vary"),
        (x[..., :-1, :], "images; a comparison needs the same images"),
        (x[0, 0] if measure.repeats else x[0], "features must be"),
        (x[0] if measure.repeats else x[None], "features must be"),
        (x[..., :0], "features must be"),
    ]:
        pair = (wrong, y) if side == 0 else (y, wrong)
        with pytest.raises(UserError, match=sentence) as raised:
            measure(*pair)
        assert "\n" not in str(raised.value)


@every
def test_a_word_that_is_no_dtype_is_refused(measure):
    with pytest.raises(UserError, match="unknown dtype 'half'; allowed: float32, float64"):
        measure(*layers(measure), dtype="half")
