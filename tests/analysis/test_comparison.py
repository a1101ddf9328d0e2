"""Every layer against every other: of tiny runs, over their training, and of arrays alone."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import train_in
from torch import nn

from localsim.analysis import Source, compare, features
from localsim.analysis.comparison_plots import scaled
from localsim.analysis.regimes import common_images
from localsim.analysis.similarity import MEASURES, get_measure
from localsim.errors import UserError
from localsim.runs import load_run

SHORT = {"epochs": 2, "train_images": 16, "snapshot_every": 1, "warmup_epochs": 0}
QUICK = {"images": 40, "resamples": 20, "permutations": 4}
ENDS = ["layer1.2", "layer2.2", "layer3.2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Return folders of runs: two rules with two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    named = {f"{rule}{seed}": (rule, seed) for rule in ("end_to_end", "blockwise") for seed in (0, 1)}
    for name, (rule, seed) in named.items():
        train_in(folder / name, rule, seed=seed, **SHORT)
    return [folder / name for name in named]


@pytest.fixture(scope="module")
def compared(runs):
    return compare(*runs, over_training=True, **QUICK)


def arrays(n=30, seed=0):
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(n, 4))
    return {name: causes @ rng.normal(size=(4, 6)) + 0.5 * rng.normal(size=(n, 6)) for name in ("V1", "V4", "IT")}


def test_every_finished_layer_is_compared_with_every_other(compared):
    assert compared.regimes == ["untrained", "end_to_end", "blockwise"]
    assert [(layer.regime, layer.seed, layer.name) for layer in compared.finished] == [
        (regime, seed, name) for regime in compared.regimes for seed in (0, 1) for name in ENDS
    ]
    matrix = compared.matrix()
    assert matrix.shape == (18, 18)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-6)
    assert matrix.min() >= -1 and matrix.max() <= 1 and len(np.unique(matrix.round(9))) > 100
    for a in compared.finished:
        for b in compared.finished:
            score = compared.scores_of(a, b)
            assert score.low <= score.value <= score.high or a == b
            assert score.n == 40 and 0 < score.p <= 1


def test_a_score_is_the_measure_of_the_features(compared, runs):
    shown = common_images([load_run(runs[0])], 40)
    one, other = (features(run, shown, modules=ENDS) for run in (runs[0], runs[3]))
    a, b = (next(x for x in compared.finished if (x.regime, x.seed) == key and x.name == ENDS[1])
            for key in (("end_to_end", 0), ("blockwise", 1)))  # fmt: skip
    assert compared.scores_of(a, b).value == pytest.approx(get_measure("cka_debiased")(one[ENDS[1]], other[ENDS[1]]),
                                                          abs=1e-5)  # fmt: skip


def test_over_training_each_step_is_held_against_what_the_plots_need(compared):
    steps = sorted({layer.step for layer in compared.layers if layer.step is not None})
    assert steps == [0, 2, 4], "the untrained network and the end of two epochs of two steps"
    for (a, b), score in compared.scores.items():
        if a.step is None and b.step is None:
            continue
        assert a.name == b.name and a.seed == b.seed
        if a.regime == b.regime:
            assert {a.step, b.step} & {0, None}
        else:
            assert a.step == b.step
        assert score.n == 40
    course = {
        (layer.step, against): compared.score(layer, other).value
        for layer in compared.layers
        for other in compared.layers
        for against in (0, None)
        if (layer.regime, layer.seed, layer.name) == (other.regime, other.seed, other.name) == ("blockwise", 0, ENDS[2])
        and layer.step is not None and other.step == against
    }  # fmt: skip
    assert course[0, 0] == pytest.approx(1, abs=1e-6) and course[4, None] == pytest.approx(1, abs=1e-6)
    assert course[2, None] < 1 and course[2, 0] < 1
    beginnings = [layer for layer in compared.layers if layer.step == 0 and layer.name == ENDS[0] and layer.seed == 0]
    assert compared.score(*beginnings).value == pytest.approx(1, abs=1e-6), "both began as the same network"
    far = next(layer for layer in compared.layers if layer.step == 2)
    with pytest.raises(UserError, match=r"end_to_end seed 0 step 2 layer1.2 and .* were not compared"):
        compared.scores_of(far, compared.finished[-1])


def test_profiles_are_the_means_of_its_scores(compared):
    def value(regime_a, seed_a, regime_b, seed_b, name):
        a, b = (next(x for x in compared.finished if (x.regime, x.seed, x.name) == key)
                for key in ((regime_a, seed_a, name), (regime_b, seed_b, name)))  # fmt: skip
        return compared.scores_of(a, b).value

    points = compared.profile("end_to_end", "blockwise")
    assert [point.layer for point in points] == ENDS and [point.seed_pairs for point in points] == [2, 2, 2]
    for point in points:
        pairs = [value("end_to_end", i, "blockwise", 1 - i, point.layer) for i in (0, 1)]
        assert point.value == pytest.approx(np.mean(pairs))
        assert point.low < point.value < point.high
    same = compared.profile("end_to_end", "blockwise", same_seed=True)
    assert same[0].value == pytest.approx(np.mean([value("end_to_end", i, "blockwise", i, ENDS[0]) for i in (0, 1)]))
    floor = compared.profile("blockwise", "blockwise")
    assert [point.seed_pairs for point in floor] == [1, 1, 1]
    assert floor[2].value == pytest.approx(value("blockwise", 0, "blockwise", 1, ENDS[2]))
    with pytest.raises(UserError, match="unknown regime 'loco'; allowed: untrained, end_to_end, blockwise"):
        compared.profile("loco", "blockwise")


def test_it_prints_what_was_compared(compared):
    printed = str(compared)
    assert printed.startswith(
        "cka_debiased: similarity, debiased; 1 is alike; n = 40 images; 95 % intervals from half-"
    )
    assert "\nuntrained against itself, 1 pair of runs of different seeds: as different as seeds are; " in printed
    fixed = "intervals over images; runs held fixed"
    assert f"\nend_to_end against blockwise, 2 pairs of runs of the same seed; {fixed}\n" in printed
    assert "blockwise against end_to_end" not in printed, "each pair once"
    assert f"  {compared.profile('end_to_end', 'blockwise')[0]}\n" in printed


def test_the_same_call_gives_the_same_numbers(compared, runs):
    again = compare(*runs, over_training=True, **QUICK)
    assert again.to_csv() == compared.to_csv()
    assert again.to_json() == compared.to_json()


def test_the_tables_hold_every_score_and_no_nan(compared, tmp_path):
    rows = list(csv.DictReader(io.StringIO(compared.to_csv())))
    assert len(rows) == len(compared.scores)
    for row, ((a, b), score) in zip(rows, compared.scores.items(), strict=True):
        assert (row["regime_a"], row["layer_a"], row["regime_b"], row["layer_b"]) == (
            a.regime,
            a.name,
            b.regime,
            b.name,
        )
        assert (row["seed_a"], row["step_a"]) == (str(a.seed), "" if a.step is None else str(a.step))
        assert [float(row[name]) for name in ("value", "low", "high", "chance", "p", "depth_a", "depth_b")] == [
            score.value, score.low, score.high, score.chance, score.p, a.depth, b.depth
        ]  # fmt: skip
    made = compared.to_json()
    text = json.dumps(made, allow_nan=False)
    assert json.loads(text) == made
    assert made["measure"]["name"] == "cka_debiased" and made["measure"]["invariances"] == [
        "orthogonal", "scale", "translation",
    ]  # fmt: skip
    record = made["record"]
    assert [Path(run).name for run in record["runs"]] == ["end_to_end0", "end_to_end1", "blockwise0", "blockwise1"]
    assert {name: record[name] for name in ("n", "layers", "controls", "resamples", "permutations", "dtype")} == {
        "n": 40, "layers": "ends", "controls": ["untrained"], "resamples": 20, "permutations": 4, "dtype": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["predictivity", "procrustes"])
def test_measures_without_bounds_are_json_too(name):
    made = compare(arrays(), measure=name, resamples=0, permutations=0)
    assert json.loads(json.dumps(made.to_json(), allow_nan=False)) == made.to_json()


def test_saving_makes_a_folder_once(tmp_path):
    made = compare(arrays(), arrays(seed=1), resamples=20, permutations=0)
    folder = made.save(tmp_path)
    assert folder == tmp_path / "cka_debiased"
    names = {f"{name}{suffix}" for name in ("matrix", "map", "profiles") for suffix in (".png", ".svg")}
    assert {file.name for file in folder.iterdir()} == names | {"comparison.csv", "comparison.json"}
    assert (folder / "comparison.csv").read_text() == made.to_csv()
    assert json.loads((folder / "comparison.json").read_text()) == made.to_json()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="cka_debiased exists already; choose another folder, or move it away"):
        made.save(tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_turned_copy_is_the_same_layer():
    x = arrays()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    made = compare(x, {name: 3 * layer @ turn + 2 for name, layer in x.items()}, resamples=0, permutations=0)
    for point in made.profile("arrays 1", "arrays 2"):
        assert point.value == pytest.approx(1, abs=1e-9)
    assert [point.depth for point in made.profile("arrays 1", "arrays 2")] == pytest.approx([1 / 3, 2 / 3, 1])
    assert made.record["dtype"] == "float64" and made.record["runs"] == []
    np.testing.assert_allclose(made.distances()[:3, 3:].diagonal(), 0, atol=1e-5)


def test_an_asymmetric_measure_has_both_directions():
    made = compare(arrays(), measure="predictivity", resamples=0, permutations=0)
    matrix = made.matrix()
    a, b = made.finished[:2]
    x = arrays()
    assert matrix[0, 1] == made.scores_of(a, b).value == pytest.approx(get_measure("predictivity")(x["V1"], x["V4"]))
    assert matrix[1, 0] == made.scores_of(b, a).value != matrix[0, 1]
    assert len(made.scores) == 9
    mean = (matrix + matrix.T) / 2
    assert made.distances()[0, 1] == pytest.approx(np.sqrt(2 - 2 * mean[0, 1]))
    two = compare(arrays(), arrays(seed=1), measure="predictivity", resamples=0, permutations=0)
    both = [two.profile(*order)[0].value for order in (("arrays 1", "arrays 2"), ("arrays 2", "arrays 1"))]
    assert both[0] != both[1] and "arrays 1 V1 predicts arrays 2 V1" in str(two)
    assert "arrays 2 V1 predicts arrays 1 V1" in str(two)


def test_distances_stay_as_they_are_and_similarities_become_chords():
    distance = compare(arrays(), measure="procrustes", resamples=0, permutations=0)
    np.testing.assert_allclose(distance.distances(), distance.matrix(), atol=1e-7)
    similarity = compare(arrays(), measure="cka", resamples=0, permutations=0)
    chords = np.sqrt(np.clip(2 - 2 * similarity.matrix(), 0, None))
    np.testing.assert_allclose(similarity.distances(), chords - np.diag(np.diag(chords)))
    assert (np.diag(similarity.distances()) == 0).all()


def test_a_map_of_a_plane_is_the_plane():
    points = np.random.default_rng(0).normal(size=(7, 2)) * [3, 1]
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    places, shares = scaled(distances)
    np.testing.assert_allclose(np.linalg.norm(places[:, None] - places[None], axis=-1), distances, atol=1e-9)
    assert shares.sum() == pytest.approx(1) and shares[0] > shares[1] > 0
    np.testing.assert_allclose(places.mean(0), 0, atol=1e-9)
    assert (places[np.abs(places).argmax(0), range(2)] > 0).all()
    for number in (0, 1):
        assert (places[:, number] ** 2).sum() / (places**2).sum() == pytest.approx(shares[number])
    line, shares = scaled(np.abs(np.subtract.outer([0.0, 1, 4], [0.0, 1, 4])))
    np.testing.assert_allclose(np.abs(np.subtract.outer(line[:, 0], line[:, 0])), [[0, 1, 4], [1, 0, 3], [4, 3, 0]],
                               atol=1e-9)  # fmt: skip
    assert shares == pytest.approx([1, 0], abs=1e-9)


def test_floats_of_both_widths_can_be_compared():
    x = arrays()
    narrow = {name: layer.astype(np.float32) for name, layer in x.items()}
    mixed = compare(x, narrow, resamples=0, permutations=0)
    assert mixed.record["dtype"] == "float32"
    assert [point.value for point in mixed.profile("arrays 1", "arrays 2")] == pytest.approx([1, 1, 1], abs=1e-5)
    assert compare(x, narrow, dtype="float64", resamples=0, permutations=0).record["dtype"] == "float64"


def test_runs_and_networks_and_arrays_can_be_compared_on_the_same_images(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    recorded = {"V1": np.random.default_rng(0).normal(size=(20, 6))}
    subjects = (runs[0], recorded)
    made = compare(*subjects, images=20, resamples=0, permutations=0, controls=())
    assert [(layer.regime, layer.name) for layer in made.layers] == [
        *(("end_to_end", name) for name in ENDS), ("arrays 2", "V1"),
    ]  # fmt: skip
    two = compare(net, nn.Sequential(net[0]), layers={"modules": ["0"]}, images=torch.rand(20, 3, 16, 16), resamples=0,
                  permutations=0, device="auto")  # fmt: skip
    assert two.regimes == ["Sequential 1", "Sequential 2"] and two.matrix()[0, 1] == pytest.approx(1)
    assert two.record["layers"] == {"modules": ["0"]}


@pytest.mark.parametrize(
    ("subjects", "options", "sentence"),
    [([{"a": np.eye(8)}], {}, "a comparison needs two layers or more, not 1"),
     ([], {}, "a comparison needs two layers or more, not 0"),
     ([arrays(), arrays(n=20)], {}, "different numbers of images: arrays 1 30, arrays 2 20; a comparison needs"),
     ([arrays()], {"measure": "ckaa"}, "unknown measure 'ckaa'; allowed: "),
     ([arrays()], {"dtype": "half"}, "unknown dtype 'half'"),
     ([arrays()], {"controls": ["none"]}, "unknown control 'none'"),
     ([arrays()], {"measure": "rsa_crossnobis_cosine"}, "takes repeated measurements .repeats, n, p."),
     ([{"a": np.ones((8, 2)), "b": np.eye(8)}], {}, "features are constant"),
     ([{"a": np.full((8, 2), np.nan), "b": np.eye(8)}], {}, "layer a holds values that are not finite"),
     ([arrays(n=7)], {}, "an interval over 7 images is not possible"),
     ([arrays()], {"resamples": 3}, "3 resamples are too few"),
     ([nn.Sequential(nn.ReLU())], {}, "networks without a run have no images of their own; give images")],
)  # fmt: skip
def test_what_cannot_be_compared_is_a_sentence(subjects, options, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        compare(*subjects, **options)
    assert "\n" not in str(raised.value)


def test_networks_trained_on_different_images_need_images(runs):
    one, other = (load_run(run) for run in (runs[0], runs[2]))
    other = replace(other, config=replace(other.config, data="cifar10"))
    with pytest.raises(UserError, match="the runs were trained on cifar10, embedded; give the images to compare them"):
        compare(one, other, **QUICK)


def test_a_measure_of_ones_own_needs_no_name():
    mine = replace(MEASURES["cka"], name="mine", summary="as cka")
    made = compare(arrays(), measure=mine, resamples=0, permutations=0)
    assert made.rows[0].measure == "mine" and "mine: similarity, biased" in str(made)


def test_features_of_different_images_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    images = torch.rand(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one, other = (features(Source(name, net), shown, modules=["0", "1"])
                  for name, shown in zip("ab", images, strict=True))  # fmt: skip
    with pytest.raises(UserError, match="a and b saw different images; a comparison needs the same in the same order"):
        compare(one, other)
    same = compare(one, features(Source("c", net), images[0], modules=["1"]), resamples=0, permutations=0)
    assert same.record["images"] == one.record["images"]


@pytest.mark.parametrize("option", [{"images": 10}, {"layers": "units"}, {"over_training": True}])
def test_options_without_meaning_for_arrays_are_refused(option):
    (name,) = option
    with pytest.raises(UserError, match=f"{name} has no meaning for arrays"):
        compare(arrays(), **option)


def test_a_layer_that_cannot_be_compared_is_named():
    with pytest.raises(UserError, match="arrays 1 b: features are constant"):
        compare({"a": np.eye(9), "b": np.ones((9, 2))})


def test_arrays_are_printed_pair_by_pair():
    draw = np.random.default_rng(2).normal
    made = compare({"V1": draw(size=(9, 2)), "IT": draw(size=(9, 4))}, {"a": draw(size=(9, 3))}, resamples=0,
                   permutations=0)  # fmt: skip
    lines = str(made).splitlines()[2:]
    assert [line.split("  ")[1] for line in lines] == [
        "arrays 1 V1 with arrays 1 IT", "arrays 1 V1 with arrays 2 a", "arrays 1 IT with arrays 2 a",
    ]  # fmt: skip
