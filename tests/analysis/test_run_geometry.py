from __future__ import annotations

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
