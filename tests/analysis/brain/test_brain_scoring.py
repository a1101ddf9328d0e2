"""Layers against recordings: what is run, how often, beside what, and what is refused before anything runs."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_recordings import LAYERS, N, Net, matrices, recorded, shown
from tiny import train_in
from torch import nn

from localsim.analysis import Source, brain, features
from localsim.analysis.brain import regression, scoring
from localsim.analysis.brain.baselines import BASELINES
from localsim.analysis.brain.contrasts import references_of
from localsim.analysis.brain.metrics import get_metric
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.training import training_behind
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.rng import key
from localsim.runs import load_run

QUICK = {"resamples": 20, "controls": ()}
SHORT = {"epochs": 2, "train_images": 16, "snapshot_every": 1, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Return folders of runs: blockwise of seeds 0 and 1, end_to_end of seed 0, with snapshots."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rule, seed in [("one", "blockwise", 0), ("two", "blockwise", 1), ("end", "end_to_end", 0)]:
        train_in(folder / name, rule, seed=seed, **SHORT)
    return [folder / name for name in ("one", "two", "end")]


def by_hand(x: np.ndarray, recording: Recording, region: str, metric: str = "ridgecv", **options):
    chosen = get_metric(metric)
    return chosen.compare(chosen.represent(x), chosen.target(recording.of(region), **options))


def test_a_score_is_the_metric_of_the_features_and_the_region():
    one, net = recorded(), Source("net", Net(), size=16)
    scores = brain.score(net, recordings=one, layers=LAYERS, resamples=20, seed=3, controls=["shuffled"])
    made = features(net, one.images, modules=["low", "high"], spatial="upto4x4")
    assert [str(layer) for layer in scores.layers] == ["net low", "net high"]
    assert scores.places == scores.headline == [("A", "V4"), ("A", "IT")]
    for region, neurons in (("V4", 4), ("IT", 2)):
        for layer in scores.layers:
            found = scores.score("A", region, layer)
            expected = by_hand(made[layer.name], one, region, draws=20, seed=3)
            assert found.value == expected.value
            np.testing.assert_array_equal(found.draws, expected.draws)
            shuffled = one.shuffled(key(3, "shuffle", 0))
            assert found.chance == by_hand(made[layer.name], shuffled, region).value != found.value
            ceiling = get_metric("ridgecv").target(one.of(region)).ceiling
            assert ceiling is not None and found.ceiling == ceiling
            assert found.ceiled == pytest.approx(np.sign(found.value) * found.value**2 / ceiling.value)
            assert (found.n, found.neurons) == (N, neurons)
            low, high = found.interval or (None, None)
            assert low is not None and high is not None and -1 <= low < found.value < high <= 1
    places = [(layer, region) for region in ("V4", "IT") for layer in scores.layers]
    assert scores.matrix("net") == {(one.name, area): scores.score("A", area, one).value for one, area in places}


def test_images_are_shown_once_for_all_layers_regions_and_time_bins():
    net = Net()
    recordings = [recorded("A", bins=3), recorded("B", n=32, seed=1)]
    scores = brain.score(net, recordings=recordings, layers=LAYERS, bins="each", choose_stage=True, **QUICK)
    assert [len(batch) for batch in net.seen] == [30, 32]
    assert len(scores.scores) == 2 * (6 + 2) and len(scores.best) == 6 + 2
    net.seen.clear()
    brain.score(net, recordings=recordings, layers=LAYERS, batch_size=16, **QUICK)
    assert [len(batch) for batch in net.seen] == [16, 14, 16, 16]


def test_images_are_shown_whole_and_at_the_size_asked_for():
    one, net = recorded(), Net()
    source = Source("net", net, size=8, crop=0.5)
    features(source, one.images, modules=["low"])
    cut, *_ = net.seen
    for size in (None, 12):
        net.seen.clear()
        scores = brain.score(source, recordings=one, layers=LAYERS, image_size=size, **QUICK)
        assert one.images.images is not None and scores.record["image_size"] == size
        side = size or 8
        whole = one.images.images.float()
        resized = nn.functional.interpolate(whole, size=(side, side), mode="bilinear", antialias=True)
        (seen,) = net.seen
        torch.testing.assert_close(seen * 255, resized.round())
        assert seen.shape != cut.shape or not torch.allclose(seen, cut, atol=0.1)


def test_every_control_is_in_its_place(runs):
    one = recorded()
    scores = brain.score(runs[0], recordings=one, controls=scoring.CONTROLS, resamples=0)
    assert scores.regimes == ["untrained", "calibrated", "blockwise", "pixels", "gabor"]
    assert scores.record["controls"] == list(scoring.CONTROLS)
    assert scores.record["unlearned"] == ["untrained", "calibrated"]
    assert scores.record["baselines"] == ["pixels", "gabor"]
    assert scores.untrained == {"blockwise": "untrained"} and scores.record["end_to_end"] == []
    for layer in scores.layers:
        found = scores.score("A", "V4", layer)
        assert found.chance is not None and found.chance != found.value
        assert (layer.depth == 0) == (layer.regime in BASELINES)
        assert layer.seed == (None if layer.regime in BASELINES else 0)
    assert len({scores.score("A", "V4", layer).value for layer in scores.layers}) == len(scores.layers)
    for name, baseline in BASELINES.items():
        x = features(baseline.source, one.images, modules=baseline.modules, spatial=baseline.spatial)[name]
        (layer,) = scores.finished(name)
        assert scores.score("A", "V4", layer).value == by_hand(x, one, "V4").value
    # the untrained network is the one that the run began with, shown whole images as the run's are sized
    untrained = replace(Source.of(load_run(runs[0]), which="untrained"), crop=None)
    layer = scores.finished("untrained")[-1]
    x = features(untrained, one.images, modules=[layer.name], spatial="upto4x4")[layer.name]
    assert scores.score("A", "V4", layer).value == pytest.approx(by_hand(x, one, "V4").value, abs=1e-6)
    without = brain.score(runs[0], recordings=one, controls=[], resamples=0)
    assert without.regimes == ["blockwise"] and without.untrained == {"blockwise": None}
    assert all(score.chance is None for score in without.scores.values())
    (layer, *_) = without.layers
    assert without.score("A", "IT", layer).value == scores.score("A", "IT", layer).value, "controls change no score"


def test_controls_alone_are_enough():
    scores = brain.score(recordings=recorded(), controls=["pixels", "shuffled", "pixels"], resamples=0)
    assert scores.regimes == ["pixels"] and len(scores.scores) == 2
    assert scores.untrained == {} and scores.record["runs"] == []


def test_of_several_regions_some_can_be_taken():
    recordings = [recorded(), recorded("B", seed=1, regions=("V1",) * 6)]
    everything = brain.score(Net(), recordings=recordings, layers=LAYERS, **QUICK)
    assert everything.record["regions"] == ["V4", "IT", "V1"]
    some = brain.score(Net(), recordings=recordings, layers=LAYERS, regions=["IT"], **QUICK)
    assert some.places == [("A", "IT")] and some.record["regions"] == ["IT"]
    for layer in some.layers:
        first, again = (scores.score("A", "IT", layer) for scores in (everything, some))
        assert first.value == again.value
        np.testing.assert_array_equal(first.draws, again.draws)


def test_recordings_of_one_region_are_also_averaged():
    recordings = [recorded("A"), recorded("B", n=36, seed=1), recorded("C", seed=2, regions=("V1",) * 6)]
    scores = brain.score(Net(), recordings=recordings, layers=LAYERS, **QUICK, metric="ridge")
    assert scores.headline == [("all", "V4"), ("all", "IT"), ("C", "V1")] and scores.places[:2] == scores.headline[:2]
    for layer in scores.layers:
        parts = [scores.score(name, "V4", layer) for name in ("A", "B")]
        mean = scores.score("all", "V4", layer)
        assert mean.value == np.mean([part.value for part in parts])
        np.testing.assert_array_equal(mean.draws, np.mean([part.draws for part in parts], axis=0))
        assert (mean.n, mean.neurons) == (66, 8)
    assert scores.matrix("Net")["low", "IT"] == scores.score("all", "IT", scores.layers[0]).value
    assert ("low", "V1") in scores.matrix("Net")


def test_images_that_recordings_share_are_counted_once():
    one, other = recorded("A"), recorded("C", n=36, seed=1)
    same = Recording("B", shown(), one.responses[:, :4] + 1, regions=("V4",) * 4)
    assert same.images is not one.images and same.images_hash == one.images_hash != other.images_hash
    scores = brain.score(Net(), recordings=[one, same, other], layers=LAYERS, metric="ridge", resamples=0, controls=[])
    for layer in scores.layers:
        v4, it = (scores.score("all", region, layer) for region in ("V4", "IT"))
        assert (v4.n, v4.neurons) == (30 + 36, 12) and (it.n, it.neurons) == (30 + 36, 4)
    assert "\nV4, mean over 3 recordings: 66 images, 12 neurons" in str(scores)


def test_the_chance_level_is_the_mean_over_orders_of_the_images():
    x, one = np.random.default_rng(0).normal(size=(N, 7)), recorded().of("V4")
    scores = brain.score({"x": x}, recordings=one, metric="cka", resamples=0, seed=3, controls=["shuffled"])
    orders = [one.shuffled(key(3, "shuffle", number)) for number in range(get_metric("cka").shuffles)]
    expected = np.mean([by_hand(x, order, "V4", "cka").value for order in orders])
    assert len(orders) == 20 and scores.score("A", "V4", scores.layers[0]).chance == pytest.approx(expected, abs=1e-12)


def test_regions_share_the_decompositions_of_a_layer(monkeypatch):
    """Of a thousand images they take most of the time."""
    decompose, calls = regression.decompose, []

    def counted(kernel):
        calls.append(len(kernel))
        return decompose(kernel)

    monkeypatch.setattr(regression, "decompose", counted)
    made = []
    for regions in (["V4"], ["V4", "IT"]):
        calls.clear()
        brain.score(Net(), recordings=recorded(), layers=LAYERS, regions=regions, resamples=0, controls=["shuffled"])
        made.append(len(calls))
    assert made == [2 * 10] * 2, "one of every split of every layer"


def test_the_seed_reaches_networks_that_are_untrained_by_name():
    name, one, values = "torchvision:resnet18", recorded().of("V4"), []
    settings = {"layers": {"modules": ["layer2"]}, "image_size": 32, "metric": "cka", "resamples": 0, "controls": []}
    for seed in (0, 1):
        scores = brain.score(name, recordings=one, seed=seed, **settings)
        values.append(scores.score("A", "V4", scores.layers[0]).value)
        source = Source.of(name, seed=seed).whole(32)
        x = features(source, one.images, modules=["layer2"], spatial="upto4x4")["layer2"]
        assert values[-1] == pytest.approx(by_hand(x, one, "V4", "cka").value, abs=1e-6)
    assert abs(values[0] - values[1]) > 1e-3


def test_time_bins_are_averaged_or_recordings_of_their_own():
    spans = ((50, 100), (100, 150.5))
    recordings = [recorded("A", bins=2).of("V4"), recorded("B", seed=1, bins=2).of("V4")]
    timed = [replace(one, bins=spans) for one in recordings]
    together = brain.score(Net(), recordings=timed, layers=LAYERS, **QUICK)
    assert together.places == [("all", "V4"), ("A", "V4"), ("B", "V4")]
    each = brain.score(Net(), recordings=timed, layers=LAYERS, bins="each", **QUICK)
    assert each.headline == [("all 50-100 ms", "V4"), ("all 100-150.5 ms", "V4")]
    assert each.places[2:] == [(f"{name} {when} ms", "V4") for name in "AB" for when in ("50-100", "100-150.5")]
    layer = each.layers[0]
    late = [each.score(f"{name} 100-150.5 ms", "V4", layer).value for name in "AB"]
    assert each.score("all 100-150.5 ms", "V4", layer).value == np.mean(late)
    x = features(Net(), timed[0].images, modules=["low"], spatial="upto4x4")["low"]
    assert late[0] == by_hand(x, timed[0].by_bin()[1], "V4").value
    printed = str(each)
    assert "\nV4, mean over 2 recordings 50-100 ms: " in printed and "recordings 100-150.5 ms: " in printed
    # when the bins were is not known, so that nobody else's are known to be the same
    unknown = brain.score(Net(), recordings=recordings, layers=LAYERS, bins="each", **QUICK)
    assert unknown.headline == [(f"{name} bin {number}", "V4") for name in "AB" for number in (1, 2)]


def test_seeds_of_a_rule_are_one_regime(runs):
    scores = brain.score(*runs, recordings=recorded(), controls=["untrained"], resamples=0)
    assert scores.regimes == ["untrained", "blockwise", "end_to_end"]
    assert scores.record["end_to_end"] == ["end_to_end"]
    assert scores.record["runs"] == [str(load_run(run).path) for run in runs]
    ends = [layer.name for layer in scores.finished("end_to_end")]
    assert [(layer.seed, layer.name) for layer in scores.finished("blockwise")] == [
        (seed, name) for seed in (0, 1) for name in ends
    ]
    first, second = scores.matrix("blockwise"), scores.matrix("blockwise", 1)
    assert first.keys() == second.keys() and first != second and first == scores.matrix("blockwise", 0)
    with pytest.raises(UserError, match="unknown seed of blockwise 7; allowed: 0, 1"):
        scores.matrix("blockwise", 7)
    with pytest.raises(UserError, match="unknown regime 'loco'; allowed: untrained, blockwise, end_to_end"):
        scores.matrix("loco")
    with pytest.raises(UserError, match=r"there is no score of blockwise seed 0 .* for V1 of A"):
        scores.score("A", "V1", scores.finished("blockwise")[0])


def test_a_network_whose_errors_return_by_other_weights_is_no_end_to_end_control(runs, tmp_path):
    train_in(tmp_path / "alignment", "end_to_end", transport="feedback_alignment", **SHORT)
    alone = brain.score(tmp_path / "alignment", recordings=recorded(), controls=[], resamples=0)
    assert alone.record["end_to_end"] == []
    scores = brain.score(tmp_path / "alignment", runs[2], recordings=recorded(), controls=[], resamples=0)
    (control,) = scores.record["end_to_end"]
    (other,) = [regime for regime in scores.regimes if regime != control]
    assert "feedback_alignment" in other and "feedback_alignment" not in control
    assert references_of(scores, other) == [control] and references_of(scores, control) == []


def test_over_training_steps_have_the_amount_of_training_behind_them(runs):
    one = recorded()
    scores = brain.score(runs[0], recordings=one, over_training=True, controls=["untrained"], resamples=0)
    run = load_run(runs[0])
    steps = [0, *run.snapshots]
    assert [layer.step for layer in scores.layers if layer.regime == "blockwise" and layer.depth == 1] == [*steps, None]
    behind = training_behind(run, steps)
    assert scores.training == {
        **{("blockwise", 0, step): behind[step] for step in steps},
        ("blockwise", 0, None): behind[run.step],
    }
    assert behind[0] == (0, 0) and behind[run.step][0] == 2 and behind[run.step][1] > 0

    def value(regime: str, step: int | None) -> float:
        (layer,) = [x for x in scores.layers if (x.regime, x.step) == (regime, step) and x.depth == 1]
        return scores.score("A", "V4", layer).value

    assert value("blockwise", 0) == value("untrained", None) != value("blockwise", None)
    assert value("blockwise", run.snapshots[-1]) == value("blockwise", None)
    assert [row.epoch for row in scores.rows if row.step == 0] == [0.0] * 2 * len(scores.finished("blockwise"))
    assert {row.epoch for row in scores.rows if row.regime == "untrained"} == {None}
    assert brain.score(runs[0], recordings=one, **QUICK).training == {}


def test_the_same_call_gives_the_same_bits_and_another_seed_other_draws():
    net, one = Net(), recorded()
    first, again, other = (
        brain.score(net, recordings=one, layers=LAYERS, choose_stage=True, resamples=20, controls=["shuffled"], seed=s)
        for s in (0, 0, 1)
    )
    assert first.to_json() == again.to_json() and first.to_csv() == again.to_csv()
    for place, score in first.scores.items():
        np.testing.assert_array_equal(score.draws, again.scores[place].draws)
        assert score.value == other.scores[place].value and score.ceiling == other.scores[place].ceiling
        assert score.chance != other.scores[place].chance
        assert not set(score.draws) & set(other.scores[place].draws)


def test_draws_are_the_same_images_and_neurons_for_all_layers():
    x = np.random.default_rng(1).normal(size=(N, 7))
    scores = brain.score({"one": x, "two": x.copy()}, recordings=recorded(), **QUICK)
    one, two = (scores.score("A", "V4", layer).draws for layer in scores.layers)
    np.testing.assert_array_equal(one, two)


def test_without_resamples_there_are_no_intervals():
    scores = brain.score(Net(), recordings=recorded(), layers=LAYERS, resamples=0, controls=[])
    assert all(score.interval is None and score.draws.shape == (0,) for score in scores.scores.values())
    assert scores.record["interval"] is None
    assert {(row.low, row.high) for row in scores.rows} == {(None, None)}


def test_arrays_and_kept_features_are_networks_too():
    one, net = recorded(bins=2), Net()
    kept = features(net, one.images, modules=["low", "high"], spatial="upto4x4")
    x = np.random.default_rng(0).normal(size=(N, 5))
    scores = brain.score(kept, {"V1": x}, net, recordings=one, layers=LAYERS, **QUICK)
    assert scores.regimes == ["Net 1", "arrays 2", "Net 2"]
    arrays, *own = ([scores.score("A", "IT", layer).value for layer in scores.finished(name)]
                    for name in ("arrays 2", "Net 1", "Net 2"))  # fmt: skip
    assert own[0] == own[1] and arrays == [by_hand(x, one, "IT").value]
    each = brain.score({"V1": x}, recordings=one, bins="each", **QUICK)
    assert len(each.scores) == 4, "time bins are of the same images"
    with pytest.raises(UserError, match="arrays 1 has features of 29 images, but A has 30"):
        brain.score({"V1": x[:-1]}, recordings=one, **QUICK)
    with pytest.raises(UserError, match="arrays 1 is features of one set of images; give a single recording with it"):
        brain.score({"V1": x}, recordings=[one, recorded("B", seed=1)], **QUICK)


def test_the_metric_suits_what_was_recorded():
    x = {"one": np.random.default_rng(0).normal(size=(N, 9))}
    assert brain.score(x, recordings=recorded(), **QUICK).metric.name == "ridgecv"
    assert brain.score(x, recordings=matrices(), **QUICK).metric.name == "rdm"
    both = brain.score(Net(), recordings=[recorded(), matrices()], layers=LAYERS, **QUICK)
    assert both.metric.name == "rdm"
    assert {name: one["of"] for name, one in both.record["recordings"].items()} == {"A": "neurons", "rdms": "matrices"}
    assert both.headline == [("all", "IT"), ("A", "V4")]
    for name in ("pls", "ridge", "ridgecv", "cka"):
        with pytest.raises(UserError, match=f"rdms holds RDMs only, which {name} cannot take; allowed: rdm, rsa"):
            brain.score(x, recordings=[recorded(), matrices()], metric=name, **QUICK)
    chosen = get_metric("pls", components=2, splits=3)
    assert brain.score(x, recordings=recorded(), metric=chosen, **QUICK).metric is chosen


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"controls": ["frozen"]}, "unknown control 'frozen'; allowed: untrained, calibrated, pixels, gabor, shuffled"),
        ({"regions": ["V4", "V9"]}, "unknown region 'V9'; allowed: V4, IT"),
        ({"bins": "all"}, "unknown handling of time bins 'all'; allowed: mean, each"),
        ({"metric": "pearson"}, "unknown neural metric 'pearson'; allowed: pls, ridge, ridgecv, rdm, rsa, cka"),
        ({"metric": "rsa"}, "A V4 has 1 subject, unknown; rsa needs 2 or more; allowed: rdm"),
        ({"resamples": 5}, "5 resamples are too few for an interval; allowed: 0 (none), or 20 or more"),
        ({"image_size": 0}, "image_size is 0; allowed: pixels, from 1"),
        ({"recordings": []}, "there are no recordings to compare with: none were given"),
        ({"recordings": [recorded(), recorded()]}, "two recordings are called 'A'; give them different names"),
        (
            {"recordings": [recorded(), recorded("all")]},
            "a recording is called 'all', as the mean over recordings is; give it another name",
        ),
        (
            {"recordings": recorded(n=19), "choose_stage": True, "metric": "rdm"},
            "recording A has 19 images, too few to choose a stage by some and score it on others; allowed: 20 or more",
        ),
        (
            {"recordings": recorded(n=22), "choose_stage": True},
            "the best stage is chosen by 4 of 5 folds of the 22 images: 17 images are too few for a regression",
        ),
        ({"recordings": recorded(n=7)}, "an interval over 7 images is not possible"),
        ({"recordings": "nowhere"}, "nowhere does not exist; allowed: a folder with a recording"),
        ({"layers": "all"}, "unknown choice of layers 'all'; allowed: ends, stages, units, readouts"),
        ({"layers": {"modules": ["lowest"]}}, "the network has no module 'lowest'"),
        ({"spatial": "5"}, "5"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_network_runs(options, sentence):
    net = Net()
    with pytest.raises(UserError) as raised:
        brain.score(net, **{"recordings": recorded(), "layers": LAYERS, "resamples": 20, **options})
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
    assert not net.seen


def test_with_neither_networks_nor_baselines_there_is_nothing_to_score():
    for controls in ([], ["untrained", "shuffled"]):
        with pytest.raises(UserError, match="nothing to score; give a run, a network, or one of the controls pixels"):
            brain.score(recordings=recorded(), controls=controls)


def test_training_that_cannot_be_counted_is_said_before_any_network_runs(runs, monkeypatch):
    def gone(*_):
        raise UserError("the training images are gone")

    monkeypatch.setattr(scoring, "training_behind", gone)
    monkeypatch.setattr(LocalNetwork, "forward", None)
    with pytest.raises(UserError, match="the training images are gone"):
        brain.score(runs[0], recordings=recorded(), over_training=True, **QUICK)


def test_an_error_says_of_which_layer():
    x = np.random.default_rng(0).normal(size=(N, 9))
    with pytest.raises(UserError, match=r"^arrays 1 flat: "):
        brain.score({"good": x, "flat": np.ones((N, 3))}, recordings=recorded(), **QUICK)


def test_resamples_of_one_recording_are_gone_before_those_of_the_next_are_made(monkeypatch):
    """With hundreds of sessions they would not fit into memory together."""
    alive: list[weakref.ref] = []
    make = scoring._Targets.of.__func__

    def counted(cls, *given):
        made = make(cls, *given)
        others = {there.own.recording.name for ref in alive if (there := ref()) is not None}
        assert others <= {made.own.recording.name}
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(scoring._Targets, "of", classmethod(counted))
    brain.score(Net(), recordings=[recorded(), recorded("B", seed=1)], layers=LAYERS, **QUICK)
    assert len(alive) == 4
