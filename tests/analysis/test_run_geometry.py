from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny import TINY

import localsim
from localsim.analysis import geometry, stage_geometry
from localsim.analysis.extraction import features
from localsim.analysis.regimes import common_images
from localsim.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("geometry") / "run"
    return localsim.run(out=path, quiet=True, **TINY)


def test_every_stage_is_described_as_its_features_are(run):
    found = stage_geometry(run, images=24, views=0, resamples=20)
    plain = features(run, common_images([run], 24), stages="all")
    assert [layer.name for layer in found] == list(plain)
    assert [layer.depth for layer in found] == sorted(layer.depth for layer in found)
    assert next(reversed(found)).depth == 1
    for layer, rows in found.items():
        assert rows == geometry.describe(plain[layer.name], plain.labels, resamples=20)
        assert {row.n for row in rows} == {24}


def test_views_are_those_of_training_and_bring_their_quantities(run):
    with_views = stage_geometry(run, images=24, views=2, resamples=0)
    for rows in with_views.values():
        assert {"alignment", "shared_variance"} <= {row.quantity for row in rows}
    (alignment,) = [row for row in next(iter(with_views.values())) if row.quantity == "alignment"]
    net = run.network()
    from localsim.data import AUGMENTATIONS, ViewLoader
    from localsim.opening import open_data

    data = open_data(run.config)
    loader = ViewLoader(
        common_images([run], 24), AUGMENTATIONS[run.config.augmentation], size=run.config.image_size, batch_size=24,
        seed=0, mean=data.mean, std=data.std,
    )  # fmt: skip
    (batch,) = loader.all_views(0)
    with torch.no_grad():
        first, second = (next(net.stage_outputs(view)).mean((2, 3)).double() for view in batch.views)
    unit = [z / z.norm(dim=1, keepdim=True) for z in (first, second)]
    expected = (unit[0] - unit[1]).square().sum(1).mean()
    np.testing.assert_allclose(alignment.value, float(expected), rtol=1e-5)


def test_other_weights_have_another_geometry(run):
    trained, untrained = (stage_geometry(run, which=which, images=24, views=0, resamples=0)
                          for which in ("trained", "untrained"))  # fmt: skip
    assert [layer.step for layer in untrained] == [0, 0, 0]
    assert list(trained.values())[-1] != list(untrained.values())[-1]


def test_one_view_is_refused(run):
    with pytest.raises(UserError, match="views is 1; allowed: 0 \\(none\\), or 2 or more"):
        stage_geometry(run, views=1)


def test_a_folder_is_as_good_as_its_run(run):
    asked = {"images": 24, "views": 0, "resamples": 0}
    assert stage_geometry(str(run.path), **asked) == stage_geometry(run, **asked) == stage_geometry(run.path, **asked)
    with pytest.raises(UserError, match="not an object of type int; allowed: a Run or its folder"):
        stage_geometry(3)


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_images_and_views_are_shown_in_the_runs_precision(run, monkeypatch, precision):
    seen = []

    def listening(*given, **options):
        seen.append(options["precision"])
        return features(*given, **options)

    monkeypatch.setattr("localsim.analysis.run_geometry.features", listening)
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, precision=precision))
    found = stage_geometry(other, images=24, views=2, resamples=0)
    assert seen == [precision] * 3
    plain = features(run, common_images([run], 24), stages="all", precision=precision)
    layer = next(iter(found))
    assert found[layer][0] == geometry.describe(plain[layer.name], plain.labels, resamples=0)[0]


def collapsing(run, monkeypatch, value):
    """Return the run, whose second stage gives the same value for all images."""
    network = type(run).network

    def changed(self, which="trained"):
        net = network(self, which)
        net.stages[1].register_forward_hook(lambda module, given, output: torch.full_like(output, value))
        return net

    monkeypatch.setattr(type(run), "network", changed)
    return run


def test_a_dead_stage_is_a_finding_and_costs_the_others_nothing(run, monkeypatch):
    found = stage_geometry(collapsing(run, monkeypatch, 0), images=24, resamples=20)
    names = {layer.name: [(row.quantity, row.value) for row in rows] for layer, rows in found.items()}
    assert names["stage2"] == [("participation_ratio", 0)]
    assert {"effective_rank", "uniformity", "alignment"} <= {quantity for quantity, _ in names["stage1"]}


def test_errors_that_remain_name_the_layer(run, monkeypatch):
    monkeypatch.setattr("localsim.analysis.run_geometry.common_images", lambda runs, images: common_images(runs, 3))
    with pytest.raises(UserError, match=r"stage1: .*n >= 4"):
        stage_geometry(run, views=0, resamples=0)
    with pytest.raises(UserError, match=r"^an interval over 3 images"):
        stage_geometry(run, views=0)
