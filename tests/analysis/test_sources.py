from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from tiny import tiny_config, train_in
from torch import nn

from localsim import runs
from localsim.analysis import catalogue, sources
from localsim.analysis.points import whole
from localsim.analysis.sources import Source
from localsim.assembly import build, build_network
from localsim.backbones import build_backbone
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.rng import keyed

LAST = "torchvision:resnet18:"


class Scaled(nn.Module):
    """A module whose settings no text and no weight shows."""

    def __init__(self, factor: float = 2.0, act=torch.relu) -> None:
        super().__init__()
        self.factor, self.act, self.line = factor, act, nn.Linear(2, 2)
        with torch.no_grad():
            self.line.weight.zero_()
            self.line.bias.zero_()
        self.register_buffer("hidden", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.act(x)


def named(points) -> list[str]:
    return [point.key for point in points]


def network(rule: str = "blockwise", **settings):
    return build_network(tiny_config(rule, **settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> runs.Run:
    path = tmp_path_factory.mktemp("runs") / "first"
    train_in(path, snapshot_every=1)
    return runs.load_run(path)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_seen_as_its_probe_sees_it(run):
    source = Source.of(run)
    data = sources.open_data(run.config)
    assert (source.name, source.size, source.mean, source.std) == ("first", 16, data.mean, data.std)
    assert not source.grey and source.crop is None and not source.network.training
    assert source.images is not None and torch.equal(source.images.images, data.test.images)
    same = Source.of(str(run.path))
    assert same.weights_hash() == source.weights_hash() == Source.of(run.network()).weights_hash()


def test_snapshots_and_the_untrained_twin_have_weights_and_names_of_their_own(run):
    assert run.snapshots == [5, 10]
    made = [Source.of(run, which=which) for which in ("trained", "untrained", 5, 10)]
    assert [source.name for source in made] == ["first", "first untrained", "first step 5", "first step 10"]
    hashes = [source.weights_hash() for source in made]
    assert hashes[0] == hashes[3] and len(set(hashes)) == 3
    assert Source.of(run, which=5, name="early").name == "early"
    with pytest.raises(UserError, match="unknown network 7; allowed: trained, untrained, 5, 10"):
        Source.of(run, which=7)


def test_the_images_of_a_run_are_opened_once_for_all_its_snapshots(run, monkeypatch):
    opened = []
    monkeypatch.setattr(sources, "_OPENED", {})
    monkeypatch.setattr(sources, "open_data", lambda config, to=sources.open_data: opened.append(1) or to(config))
    Source.of(run), Source.of(run, which=5)
    assert len(opened) == 1


def test_networks_see_the_colours_and_the_scale_they_were_trained_on():
    seen = [sources.colour_and_crop(tiny_config(augmentation=name)) for name in ("small", "none", "patches")]
    assert seen == [(False, None), (False, None), (True, pytest.approx(2 / 3))]


# -- places -----------------------------------------------------------------------------------------------------------


def test_a_local_network_has_stages_units_readouts_and_torchvisions_names():
    net = network(credit=Credit.overlapping(3).to_config())
    points = Source.of(net).points
    assert named(points.choose(None, None, None, None)) == ["stage1", "stage2", "stage3"]
    assert named(points.choose([2, 0], ["stem", "layer2.0"], "all", ["layer1", "layer3.0.conv1"])) == [
        "stage3", "stage1", "stem", "layer2.0", "readout2", "readout3", "layer1", "layer3.0.conv1",
    ]  # fmt: skip
    by_name = {unit.name: unit for unit in net.units}
    modules = points.modules
    assert modules["layer2"].module is by_name["layer2.2"] and modules["conv1"].module is by_name["stem"].parts[0]
    assert modules["layer3.0.conv1"].module is by_name["layer3.0"].parts[0].conv1
    assert modules["stages.1"].module is net.stages[1]
    assert named(points.choose(None, "all", None, None)) == list(by_name)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"stages": [3]}, "the network has no stage 3; allowed, from 0: 0, 1, 2"),
        ({"stages": [True]}, "no stage True"),
        ({"stages": "stage1"}, "no stage 'stage1'; allowed, from 0: 0, 1, 2"),
        ({"readouts": [0]}, "the network has no readout 0; allowed, from 0: 2"),
        ({"units": ["layer1.9"]}, "no unit block 'layer1.9'; close: layer1.2"),
        ({"modules": ["layer9"]}, "no module 'layer9'; close: layer"),
        ({"modules": "all"}, "no module 'all'"),
        ({"modules": []}, "no layer is asked for"),
    ],
)
def test_what_is_not_there_is_refused_by_name(chosen, told):
    points = Source.of(network(credit=Credit.end_to_end(3).to_config())).points
    with pytest.raises(UserError, match=told):
        points.choose(**{"stages": None, "units": None, "readouts": None, "modules": None, **chosen})


def test_torchvisions_networks_have_the_natural_stages_and_units_of_our_backbones():
    resnet = torchvision.models.resnet18()
    points = Source.of(resnet).points
    assert named(points.natural) == ["layer1", "layer2", "layer3", "layer4"]
    assert points.natural[1].module is resnet.layer2
    assert list(points.units) == [unit.name for unit in build_backbone("resnet18").units]
    assert points.units["stem"].module is resnet.maxpool and points.units["layer2.1"].module is resnet.layer2[1]
    vgg = torchvision.models.vgg11()
    assert named(Source.of(vgg).points.natural) == [f"features.{i}" for i in (2, 5, 10, 15, 20)]
    assert all(isinstance(point.module, nn.MaxPool2d) for point in Source.of(vgg).points.natural)


def test_a_network_without_stages_says_what_can_be_named():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
    with pytest.raises(UserError, match=r"no stages of its own; name layers .* for instance 0, 1"):
        Source.of(net).points.choose(None, None, None, None)
    with pytest.raises(UserError, match="has no stages to choose; name layers"):
        Source.of(net).points.choose([0], None, None, None)
    with pytest.raises(UserError, match="but it has none"):
        Source.of(nn.ReLU()).points.choose(None, None, None, None)


def test_maps_of_patches_lie_where_the_patches_lie():
    """An image in patches that do not overlap comes back as it was."""
    net = network("clapp", patches="4:4")
    image = torch.arange(2 * 3 * 16.0 * 16).reshape(2, 3, 16, 16)
    assert torch.equal(whole(net.fold(image), net, 2, 16, "x"), image)
    assert torch.equal(whole(image, net, 2, 16, "x"), image)
    with pytest.raises(UserError, match=r"x gives an array \(3, 3, 16, 16\) for 2 images; allowed: one row per image"):
        whole(image[[0, 1, 0]], net, 2, 16, "x")


# -- what a network is ------------------------------------------------------------------------------------------------


def test_the_hash_is_of_what_the_network_computes_not_of_its_name_or_heads():
    net = network()
    before = Source.of(net).weights_hash()
    assert Source("other", net, grey=True).weights_hash() == before == Source.of(network()).weights_hash()
    nn.init.zeros_(next(net.taps[0].head.parameters()))
    net.train()
    assert Source.of(net).weights_hash() == before


def test_any_weight_buffer_setting_or_function_changes_the_hash():
    changed = [Scaled(), Scaled(3.0), Scaled(act=torch.tanh), Scaled().double()]
    for name in ("hidden", "line.bias"):
        one = Scaled()
        with torch.no_grad():
            one.get_buffer(name).add_(1) if name == "hidden" else one.get_parameter(name).view(torch.int32).add_(1)
        changed.append(one)
    hashes = [Source.of(one).weights_hash() for one in changed]
    assert len(set(hashes)) == len(hashes) and Source.of(Scaled()).weights_hash() == hashes[0]


def test_readouts_without_weights_are_told_apart():
    nets = [network(readout=readout) for readout in ("global", "local2x2")]
    assert len({Source.of(net).weights_hash() for net in nets}) == 2


def test_a_network_is_left_as_it_was_even_after_an_error():
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    net.train()[1].eval()
    with pytest.raises(KeyError), Source.of(net).evaluating(torch.device("cpu")):
        assert not any(part.training for part in net.modules())
        raise KeyError
    assert [part.training for part in net.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (3, "features cannot be taken of an object of type int; allowed: a Run or its folder"),
        ("no/such/folder", "no/such/folder is not a run folder"),
        ("torchvision:resnet19", "torchvision has no model 'resnet19'; close: resnet1"),
        ("torchvision:resnet18:NONE", "'NONE' is neither a file nor weights .*; allowed: DEFAULT, IMAGENET1K_V1"),
    ],
)
def test_what_is_no_source_is_refused(source, told):
    with pytest.raises(UserError, match=told):
        Source.of(source)


def test_which_has_a_meaning_for_runs_only():
    with pytest.raises(UserError, match="which 'untrained' has a meaning for runs only, not for an object of type"):
        Source.of(nn.ReLU(), which="untrained")
    with pytest.raises(UserError, match="only one of mean and std"):
        Source("x", nn.ReLU(), mean=(0.0, 0.0, 0.0))


# -- networks by name -------------------------------------------------------------------------------------------------


def test_an_untrained_network_by_name_follows_the_seed_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    source = Source.of("torchvision:resnet18", seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    with keyed(4, "init", "trunk"):
        twin = torchvision.models.resnet18()
    assert all(torch.equal(x, twin.state_dict()[name]) for name, x in source.network.state_dict().items())
    assert not source.network.training and source.size == 224 and source.name == "torchvision:resnet18"
    assert source.mean == (0.485, 0.456, 0.406) and source.std == (0.229, 0.224, 0.225)
    assert Source.of("torchvision:resnet18", seed=5).weights_hash() != source.weights_hash()
    assert replace(source, size=32).weights_hash() == source.weights_hash()


def test_published_weights_are_asked_of_torchvision(monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: asked.append(weights) or nn.ReLU())
    for text in (LAST + "DEFAULT", LAST + "IMAGENET1K_V1", "torchvision:resnet18"):
        Source.of(text)
    weights = torchvision.models.ResNet18_Weights
    assert asked == [weights.DEFAULT, weights.IMAGENET1K_V1, None]

    def unreachable(name: str, weights: object) -> nn.Module:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    with pytest.raises(UserError, match="torchvision:resnet18:DEFAULT could not be had: no network"):
        Source.of(LAST + "DEFAULT")


def test_the_trunk_of_a_run_loads_into_torchvisions_model(tmp_path):
    net = build("blockwise", backbone="resnet18", granularity="stage", expand_width=8, projector=[8], image_size=32)
    save_file(net.trunk_state_dict(), tmp_path / "trunk.safetensors")
    torch.save(net.trunk_state_dict(), tmp_path / "trunk.pt")
    for file in ("trunk.safetensors", "trunk.pt"):
        source = Source.of(f"{LAST}{tmp_path / file}")
        assert isinstance(source.network.fc, nn.Identity), "no layer of random weights passes for a trained one"
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(source.network(x), net.eval()(x).mean((2, 3)))


def test_a_whole_model_keeps_its_classifier(tmp_path):
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    assert torch.equal(Source.of(f"{LAST}{tmp_path / 'whole.pt'}").network.fc.weight, model.fc.weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), "does not fit: missing layer1.0.conv1.weight$"),
        (lambda state: state.update(more=torch.zeros(1), last=torch.zeros(1)), "unexpected more and 1 more"),
        (lambda state: state.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), "size mismatch for conv1.weight"),
        (lambda state: state.pop("fc.bias"), "does not fit: missing fc.bias"),
        (lambda state: state.update(optimizer="adam"), "holds no weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_the_first_name(tmp_path, change, told):
    state = dict(torchvision.models.resnet18().state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=told):
        Source.of(f"{LAST}{tmp_path / 'w.pt'}")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_is_no_checkpoint_is_one_sentence_and_runs_nothing(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        Source.of(f"{LAST}{tmp_path / name}")


def test_timm_is_asked_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match="timm:vit needs timm, which is not installed; install it with `pip install timm`"
    ):
        Source.of("timm:vit")
    shown = {"input_size": (3, 96, 96), "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    made: list[tuple] = []
    fake = SimpleNamespace(
        is_model=lambda name: name == "vit", list_models=lambda: ["vit"],
        create_model=lambda name, pretrained: made.append((name, pretrained)) or nn.Linear(2, 2),
        data=SimpleNamespace(resolve_model_data_config=lambda model: shown),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "timm", fake)
    monkeypatch.setitem(sys.modules, "timm.data", fake.data)
    source = Source.of("timm:vit", seed=1)
    assert (source.size, source.mean, source.std) == (96, (0.1, 0.2, 0.3), (1, 2, 3))
    Source.of("timm:vit:pretrained")
    assert made == [("vit", False), ("vit", True)]
    with pytest.raises(UserError, match="timm has no model 'vat'; close: vit"):
        Source.of("timm:vat")
    with pytest.raises(UserError, match="unknown weights of timm's networks 'best'"):
        Source.of("timm:vit:best")
    assert catalogue.open_named("timm:vit", 1)["network"].weight.equal(source.network.weight)
