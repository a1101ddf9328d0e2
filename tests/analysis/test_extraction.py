from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from shown import MEAN, STD, Net, assert_equal, hooks_of, network, pixels, seeded, source
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from localsim.analysis import stimuli
from localsim.analysis.extract import batch_features, collect_features
from localsim.analysis.extraction import features
from localsim.data import ImageSet, plain_batches
from localsim.errors import UserError


def test_torchvisions_network_gives_what_a_plain_forward_pass_gives():
    net = seeded(torchvision.models.resnet18)
    x = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    made = features(net, x, modules=["layer1", "layer3.0.conv1", "avgpool", "fc"], spatial="flatten", batch_size=5)
    with torch.no_grad():
        net.eval()
        h1 = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        h2 = net.layer2(h1)
        pooled = net.avgpool(net.layer4(net.layer3(h2)))
        plain = {"layer1": h1, "layer3.0.conv1": net.layer3[0].conv1(h2), "avgpool": pooled, "fc": net(x)}
    assert made.names == list(plain)
    for name, h in plain.items():
        assert made[name].dtype == np.float32 and np.array_equal(made[name], h.flatten(1).numpy())


def test_stages_and_readouts_are_those_of_the_probe():
    net, images = network(), ImageSet(pixels(), None, torch.arange(7))
    made = features(source(net), images, stages="all", readouts="all", batch_size=4)
    net.eval()
    batches = plain_batches(images, size=16, batch_size=4, mean=MEAN, std=STD)
    raw, labels = collect_features(net, batches)
    for stage in range(3):
        assert np.array_equal(made[f"stage{stage + 1}"], raw[stage, "raw"].numpy())
        assert np.array_equal(made[f"readout{stage + 1}"], raw[stage, "readout"].numpy())
    assert made.labels is not None and np.array_equal(made.labels, labels.numpy())
    assert np.array_equal(made.indices, np.arange(7))


def test_units_stages_and_torchvisions_names_agree_where_they_mean_the_same():
    made = features(source(), pixels(), stages=[0], units=["layer1.2"], modules=["layer1", "stages.0", "layer1.2"])
    assert made.names == ["stage1", "layer1.2", "layer1", "stages.0"]
    assert all(np.array_equal(array, made["stage1"]) for array in made.values())


@pytest.mark.parametrize("rule", ["clapp", "greedy_infomax"])
def test_images_in_patches_give_one_row_each(rule):
    net = network(rule).eval()
    assert net.patches_per_image == 9
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    readouts = sorted({tap.stage for tap in net.taps})
    made = features(net, x, stages="all", readouts=readouts, batch_size=2)
    expected = batch_features(net, x)
    for stage in range(len(net.stages)):
        np.testing.assert_allclose(made[f"stage{stage + 1}"], expected[stage, "raw"].numpy(), rtol=1e-4, atol=1e-6)
    assert all(len(array) == 3 for array in made.values())
    flat, (last, *_) = features(net, x, stages=[0], spatial="flatten")["stage1"], net.stage_outputs(x)
    np.testing.assert_allclose(
        np.sort(flat, axis=1), np.sort(last.detach().reshape(3, -1).numpy(), axis=1), rtol=1e-4, atol=1e-6
    )


def test_what_a_layer_gave_is_kept_although_the_next_works_in_place_and_the_last_call_counts():
    net, x = seeded(Net).eval(), torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    made = features(net, x, modules=["first", "relu", "twice"], spatial="flatten")
    with torch.no_grad():
        first = net.first(x)
        expected = {"first": first, "relu": first.relu(), "twice": net(x)}
    assert (made["first"] < 0).any()
    for name, h in expected.items():
        assert np.array_equal(made[name], h.flatten(1).numpy())


def test_transformers_give_tokens():
    layer = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.block = nn.Conv2d(3, 8, 4, 4), layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.cut(x).flatten(2).mT).mean(1)

    net, x = seeded(Tokens).eval(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = features(net, x, modules=["block"])
    np.testing.assert_allclose(made["block"], net(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="spatial 2x2 needs maps, but block gives tokens"):
        features(net, x, modules=["block"], spatial="2x2")


def test_maps_with_channels_last_are_refused_where_their_order_matters():
    class Last(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.movedim(1, -1)

    net, x = nn.Sequential(Last()), torch.rand(2, 3, 4, 4)
    for spatial in ("mean", "2x2"):
        with pytest.raises(UserError, match=r"0 gives an array \(2, 4, 4, 3\), whose channels seem to come last"):
            features(net, x, modules=["0"], spatial=spatial)
    assert np.array_equal(features(net, x, modules=["0"], spatial="flatten")["0"], x.movedim(1, -1).flatten(1).numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_is_taken_to_the_device_asked_for_and_back():
    net = network()
    away = features(source(net), pixels(), stages="all", readouts="all", device="cuda", spatial="project9")
    assert net.device.type == "cpu"
    here = features(source(net), pixels(), stages="all", readouts="all", spatial="project9")
    for name in here:
        np.testing.assert_allclose(away[name], here[name], rtol=1e-2, atol=1e-2)


def test_bf16_is_close_and_not_equal():
    exact, rough = (features(source(), pixels(), precision=precision)["stage3"] for precision in ("full", "bf16"))
    assert 0 < np.linalg.norm(rough - exact) < 0.05 * np.linalg.norm(exact)


def test_other_batches_give_the_same():
    whole, parts = (features(source(), pixels(), spatial="project40", batch_size=size) for size in (7, 2))
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-5)


# -- images -----------------------------------------------------------------------------------------------------------


class Drawn(Dataset):
    """A data set without `__iter__` whose items never end."""

    def __init__(self, as_pil: bool) -> None:
        self.as_pil = as_pil

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int):
        image = pixels()[index % 7]
        return (Image.fromarray(image.permute(1, 2, 0).numpy()) if self.as_pil else image), index % 3


def test_all_kinds_of_images_are_the_same_images(tmp_path):
    images, labels = pixels(), torch.arange(7) % 3
    for index, image in enumerate(images):
        folder = tmp_path / f"class{labels[index]}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    order = labels.argsort(stable=True)
    made = {
        "tensor": features(source(), images),
        "array": features(source(), images.numpy()),
        "set": features(source(), ImageSet(images, None, labels)),
        "dataset": features(source(), TensorDataset(images, labels)),
        "pil": features(source(), Drawn(True)),
        "endless": features(source(), Drawn(False)),
        "loader": features(source(), DataLoader(TensorDataset(images, labels), batch_size=3)),
        "unlabelled loader": features(source(), DataLoader(images, batch_size=2)),
    }
    for kind, one in made.items():
        assert_equal(one, made["tensor"])
        assert one.record["images"] == made["tensor"].record["images"]
        assert (one.labels is None) == (kind in ("tensor", "array", "unlabelled loader"))
        assert one.labels is None or np.array_equal(one.labels, labels)
    folder = features(source(), tmp_path)
    np.testing.assert_allclose(folder["stage3"], made["set"]["stage3"][order], rtol=1e-4, atol=1e-5)
    assert folder.labels is not None and np.array_equal(folder.labels, labels[order])


def test_floats_between_0_and_1_are_the_images_that_they_stand_for():
    images = pixels()
    made = features(source(), images.float() / 255)
    assert_equal(made, features(source(), images))
    assert_equal(features(source(), images.double().numpy() / 255), made)


def test_images_are_resized_cropped_and_decoloured_as_by_the_probe():
    images = pixels(4, size=24)
    for look in ({"size": 16}, {"size": 16, "crop": 2 / 3}, {"size": 20, "crop": 0.5, "grey": True}, {"size": 24}):
        fields = {"size": 16, "grey": False, "crop": None, **look}
        (batch,) = plain_batches(ImageSet(images, None, None), batch_size=4, mean=MEAN, std=STD, **fields)
        shown = stimuli.shown(list(images), mean=MEAN, std=STD, device=torch.device("cpu"), **fields)
        assert torch.equal(shown, batch.views[0])
        floats = stimuli.shown(list(images.float() / 255), mean=MEAN, std=STD, device=torch.device("cpu"), **fields)
        assert (floats - shown).abs().max() <= 0.51 / 255 / min(STD)


def test_images_of_several_sizes_need_a_size():
    images = [pixels(1, size)[0] for size in (16, 24)]
    made = features(source(), DataLoader(images, batch_size=None))
    np.testing.assert_allclose(made["stage1"][:1], features(source(), images[0][None])["stage1"], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"images differ \(torch.uint8 \(3, 16, 16\), .*has no size"):
        features(source(size=None), DataLoader(images, batch_size=None))


def test_without_mean_images_are_shown_as_they_come():
    net, x = seeded(Net).eval(), torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    made = features(net, x, modules=["twice"], spatial="flatten")
    assert np.array_equal(made["twice"], net(x).detach().flatten(1).numpy())


def test_unreadable_files_are_left_out_and_indices_say_which(tmp_path):
    for index, image in enumerate(pixels(3)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped an unreadable image") as warned:
        made = features(source(), tmp_path, cache=tmp_path / "cache")
    assert len(warned) == 1 and made.indices.tolist() == [0, 2] and len(made["stage1"]) == 2


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(3, 16, 16), r"an array of shape \(3, 16, 16\); allowed: \(n, 3, H, W\)"),
        (torch.zeros(2, 16, 16, 3), r"an array of shape \(2, 16, 16, 3\); allowed"),
        (torch.zeros(0, 3, 16, 16), "there are no images to show"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "images hold int64; allowed: uint8, or float"),
        (torch.full((2, 3, 16, 16), 1.5), "images run from 1.5 to 1.5; allowed: uint8, or float between 0 and 1"),
        (torch.full((2, 3, 16, 16), torch.nan), "images hold values that are not finite"),
        ("no/folder", "images 'no/folder' is not a folder that exists"),
        (5, "images are of type int; allowed: an array"),
        (TensorDataset(pixels(2), torch.zeros(2, 2)), r"the label of image 0 is .*; allowed: whole numbers"),
        (TensorDataset(torch.zeros(2, 1, 16, 16)), r"an image has shape \(1, 16, 16\); allowed: \(3, H, W\)"),
        (DataLoader(["x"], batch_size=None), "images hold str; allowed: an array"),
        (None, "tiny has no test images of its own; give images"),
    ],
)
def test_what_are_no_images_is_refused(images, told):
    net = network()
    with pytest.raises(UserError, match=told):
        features(source(net), images)
    assert hooks_of(net) == 0 and net.training


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch_size": 0}, "batch_size is 0; allowed: whole numbers from 1"),
        ({"precision": "half"}, "unknown precision 'half'; allowed: full, bf16"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
        ({"spatial": "5x5"}, "spatial 5x5 is finer than the map of stage3, 4x4"),
        ({"spatial": "best"}, "unknown spatial handling 'best'"),
        ({"modules": ["taps.0.readout"]}, "taps.0.readout of tiny does not take part in the forward pass"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, told):
    with pytest.raises(UserError, match=told):
        features(source(), pixels(), **settings)


# -- the network is left as it was ------------------------------------------------------------------------------------


def test_modes_gradients_hooks_and_statistics_stay():
    net = network().train()
    net.stages[1].eval()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    features(source(net), pixels(), stages="all", readouts="all")
    assert [module.training for module in net.modules()] == modes and hooks_of(net) == 0
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert torch.is_grad_enabled() and all(p.grad is None and p.requires_grad for p in net.parameters())


def test_errors_in_the_network_are_told_and_leave_no_hooks():
    net = seeded(Net)
    with pytest.raises(UserError, match=r"Net cannot be run on images \(3, 2, 2\): .*[Kk]ernel size"):
        features(net, torch.zeros(1, 3, 2, 2), modules=["first", "twice"])
    assert hooks_of(net) == 0 and net.training

    def stop(*_given: object) -> None:
        raise KeyboardInterrupt

    net.relu.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        features(net, torch.zeros(1, 3, 5, 5), modules=["first"])
    assert hooks_of(net) == 1 and net.training
    with pytest.raises(UserError, match="unused of Net does not take part"):
        features(seeded(Net), torch.zeros(1, 3, 5, 5), modules=["unused"])


@pytest.mark.parametrize("error", [ValueError, TypeError, IndexError, AssertionError])
def test_whatever_a_network_says_is_told_with_the_images(error):
    net = seeded(Net)

    def refuse(*_given: object) -> None:
        raise error("three channels too many")

    net.relu.register_forward_pre_hook(refuse)
    with pytest.raises(UserError, match=r"Net cannot be run on images \(3, 5, 5\): three channels too many"):
        features(net, torch.zeros(1, 3, 5, 5), modules=["first"])


def test_a_single_number_for_all_images_is_refused():
    net = seeded(Net)
    net.relu.register_forward_hook(lambda module, given, output: output.mean())
    net.relu.register_forward_hook(lambda module, given, output: None)
    with pytest.raises(UserError, match=r"^relu gives an array \(\) for 2 images; allowed: one row per image"):
        features(net, torch.zeros(2, 3, 5, 5), modules=["relu"])


def test_features_that_are_not_finite_are_refused():
    net = seeded(Net)
    nn.init.constant_(net.first.bias, torch.inf)
    with pytest.raises(UserError, match="first of Net gives values that are not finite"):
        features(net, torch.zeros(1, 3, 5, 5), modules=["first"])


# -- to files and from a cache ----------------------------------------------------------------------------------------
