"""A run's trunk is the plain model of another library, and other libraries' weights are a trunk."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import images, tiny_config, tiny_state, train_in
from torch import nn
from torchvision import models

import localsim
from localsim import runs
from localsim.analysis import Source, features
from localsim.assembly import build_network
from localsim.backbones import BACKBONES, build_backbone, trunk_state_dict
from localsim.cli import make_parser
from localsim.config import Config
from localsim.errors import UserError
from localsim.interop import LIBRARIES, load_into, load_trunk, read_weights, trunk_weights
from localsim.network import LocalNetwork

SMALL: dict = {"image_size": 32, "granularity": 2, "zero_init_residual": False}
NETWORKS: dict[str, dict] = {
    "resnet18": {"backbone": "resnet18", **SMALL},
    "cifar": {"backbone": "resnet18", "stem": "cifar", **SMALL},
    "vgg11": {"backbone": "vgg11", **SMALL},
}
Made = Callable[..., tuple[runs.Run, LocalNetwork]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """Return a function that gives a run, and its network with weights and statistics as training leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    kept = {}

    def run_of(name: str, **settings) -> tuple[runs.Run, LocalNetwork]:
        if name not in kept:
            config = tiny_config(**(settings or NETWORKS[name]))
            net = build_network(config).eval()
            draw = torch.Generator().manual_seed(3)
            for value in net.trunk_state_dict().values():
                if value.is_floating_point():
                    change = 0.1 * value.std().nan_to_num() + 0.01
                    value += change * torch.rand(value.shape, generator=draw)
            run = runs.start_run(folder / name, config)
            runs.save_checkpoint(run.path, 7, tiny_state(net))
            kept[name] = run, net
        return kept[name]

    return run_of


def importing(library: str) -> None:
    if library == "timm":
        pytest.importorskip("timm")


# -- from a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_plain_model_gives_what_the_runs_last_stage_gives(name, library, made):
    importing(library)
    run, net = made(name)
    model, x = load_trunk(run, library=library), images(3)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        (*_, last) = net.stage_outputs(x)
        given = model(x)
    assert torch.allclose(given, last.mean((2, 3)), rtol=1e-6, atol=1e-7)
    (*_, stage) = features(Source("run", net), x).values()
    assert np.allclose(given, stage, rtol=1e-6, atol=1e-7) and stage.std() > 1e-3


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11", "vgg11_bn"])
def test_names_and_shapes_are_those_of_both_libraries(name, library):
    """On the meta device, for they have 132 million weights."""
    importing(library)
    with torch.device("meta"):
        mine = trunk_state_dict(build_backbone(name).units)
        model = models.get_model(name) if library == "torchvision" else __import__("timm").create_model(name)
    assert {key: value.shape for key, value in trunk_weights(model).items()} == {
        key: value.shape for key, value in mine.items()
    }


@pytest.mark.parametrize("name", ["resnet18", "vgg11"])
def test_the_model_is_the_librarys_own(name, made):
    run, _ = made(name)
    model = load_trunk(run)
    assert type(model) is getattr(models, {"resnet18": "ResNet", "vgg11": "VGG"}[name])
    assert model.state_dict().keys() == trunk_weights(run).keys()
    timm = pytest.importorskip("timm")
    other, x = load_trunk(run, library="timm"), images(2)
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
    missing, unexpected = theirs.load_state_dict(trunk_weights(run), strict=False, assign=True)
    assert type(other) is type(theirs) and other.num_classes == 0
    assert not unexpected and all(key.startswith("pre_logits.") for key in missing)
    with torch.no_grad():
        maps = other.forward_features(x)
        assert torch.equal(maps, theirs.eval().forward_features(x))
        assert torch.equal(other.forward_head(maps, pre_logits=True), other(x))


def test_models_of_both_libraries_share_no_memory_with_anything(made):
    run, _ = made("resnet18")
    one, other = load_trunk(run), load_trunk(run)
    for parameter in one.parameters():
        assert parameter.requires_grad and parameter.device.type == "cpu"
        with torch.no_grad():
            parameter.zero_()
    assert all(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_loading_draws_no_random_numbers(made):
    run, _ = made("resnet18")
    before = torch.get_rng_state()
    load_trunk(run), load_trunk(run, "untrained")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["cifar", "vgg11"])
def test_a_new_classifier_is_drawn_and_everything_can_be_trained(name, library, made):
    importing(library)
    model = load_trunk(made(name)[0], library=library, num_classes=5).train()
    logits = model(images(3))
    logits.square().sum().backward()
    assert logits.shape == (3, 5)
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_which_weights_are_chosen(tmp_path):
    net = train_in(tmp_path, snapshot_every=1, train_images=8)
    run = runs.load_run(tmp_path)
    assert run.snapshots == [1, 2]
    with torch.no_grad():
        outputs = {which: load_trunk(run, which)(images()) for which in ("trained", "untrained", *run.snapshots)}
        for which, out in outputs.items():
            assert torch.equal(out, run.network(which)(images()).mean((2, 3))), which
        assert torch.equal(outputs["trained"], net.eval()(images()).mean((2, 3)))
    assert torch.equal(outputs["trained"], outputs[2]) and not torch.equal(outputs[1], outputs[2])
    with pytest.raises(UserError, match="unknown network 3; allowed: trained, untrained, 1, 2"):
        load_trunk(run, 3)


def test_the_untrained_regime_has_a_trunk_too(tmp_path):
    run = localsim.run("untrained", out=tmp_path / "run", quiet=True, probe_protocol="none", device="cpu", **TINY_DATA)
    with torch.no_grad():
        assert torch.equal(load_trunk(run)(images()), run.network()(images()).mean((2, 3)))


TINY_DATA = {"backbone": "resnet20", "image_size": 16, "train_images": 20, "test_images": 10, "batch_size": 10}


@pytest.mark.parametrize(
    ("name", "settings", "pooled"),
    [("resnet20", {"image_size": 16}, True), ("vgg6", {"image_size": 16, "backbone_width": 0.1}, False),
     ("preact_resnet50", {"image_size": 16, "backbone_width": 0.1}, False)],
)  # fmt: skip
def test_backbones_of_no_library_are_localsims_own_module(name, settings, pooled, made):
    run, net = made(name, backbone=name, granularity=2, **settings)
    model, x = load_trunk(run), images(3, 16)
    with torch.no_grad():
        want = net(x)
        assert torch.allclose(model(x), want.mean((2, 3)) if pooled else want, rtol=1e-6, atol=1e-7)
    if not pooled:
        with pytest.raises(UserError, match=f"{name} ends in a map and takes no classifier; allowed: num_classes None"):
            load_trunk(run, num_classes=3)
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=f"timm has no {name}; with library torchvision you get localsim's own"):
        load_trunk(run, library="timm")


def test_a_backbone_of_ones_own_is_said_to_be_so(made, monkeypatch):
    run, _ = made("resnet18")
    monkeypatch.delitem(BACKBONES, "resnet18")
    monkeypatch.setattr("localsim.interop.trunk_weights", lambda _run, _which: {})
    with pytest.raises(UserError, match="backbone resnet18 is your own: make its model"):
        load_trunk(run)


def test_what_cannot_be_loaded_is_said_in_a_sentence(tmp_path, made, monkeypatch):
    run, _ = made("resnet18")
    for given, sentence in (
        ({"library": "keras"}, "unknown library 'keras'; allowed: torchvision, timm"),
        ({"num_classes": 0}, "num_classes is 0; allowed: whole numbers from 1, or None"),
        ({"num_classes": True}, "num_classes is True; allowed"),
        ({"which": "best"}, "unknown network 'best'; allowed: trained, untrained"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            load_trunk(run, **given)
    with pytest.raises(UserError, match="is not a run folder"):
        load_trunk(tmp_path)
    empty = runs.start_run(tmp_path / "empty", run.config)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_trunk(empty)
    for name, change in (("fewer", lambda state: state.pop("layer4.1.conv2.weight")),
                         ("more", lambda state: state.update(extra=torch.zeros(1))),
                         ("other", lambda state: state.update({"conv1.weight": torch.zeros(1)}))):  # fmt: skip
        state = dict(trunk_weights(run))
        change(state)
        folder = tmp_path / name / "checkpoints" / "00000007"
        damaged = runs.start_run(tmp_path / name, run.config)
        folder.mkdir(parents=True)
        save_file(state, folder / "trunk.safetensors")
        with pytest.raises(UserError, match="the trunk does not fit resnet18"):
            load_trunk(damaged)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="timm is not installed; install it with `pip install timm`"):
        load_trunk(run, library="timm")


# -- into a network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["resnet18", "vgg11"])
def test_a_librarys_model_becomes_a_trunk(name, library, tmp_path):
    importing(library)
    with torch.device("meta"):  # else half a gigabyte of VGG's classifier would be drawn
        model = models.get_model(name) if library == "torchvision" else __import__("timm").create_model(name)
    for part in {"classifier", "pre_logits"} & dict(model.named_children()).keys():
        setattr(model, part, nn.Identity())  # the ResNet's shows that classifiers are left out
    model.to_empty(device="cpu")
    x, draw = images(2), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            # variances above 0, convolutions about 0
            value.copy_(0.1 * torch.rand(value.shape, generator=draw) + (0.01 if value.ndim < 2 else -0.05))
        trunk = model.features if name == "vgg11" else nn.Sequential(*list(model.children())[:-2])
        want = trunk.eval()(x)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    net = build_network(tiny_config(**NETWORKS[name])).eval()
    taps = [parameter.clone() for parameter in net.taps.parameters()]
    for given in (model, model.state_dict(), str(tmp_path / "weights.pth"), tmp_path / "weights.safetensors"):
        with torch.no_grad():
            for parameter in net.stages.parameters():
                parameter.zero_()
            assert not torch.equal(net(x), want)
            assert load_into(net, given) is net
            assert torch.equal(net(x), want)
    assert all(torch.equal(p, q) for p, q in zip(net.taps.parameters(), taps, strict=True))


def test_runs_and_networks_are_sources_too_and_back_is_the_same(made):
    run, net = made("resnet18")
    other = build_network(tiny_config(**NETWORKS["resnet18"], seed=5)).eval()
    for given in (run, run.path, str(run.path), net, load_trunk(run, num_classes=3)):
        with torch.no_grad():
            for parameter in other.stages.parameters():
                parameter.zero_()
            assert torch.equal(load_into(other, given)(images()), net(images()))
    with pytest.raises(UserError, match="which 'untrained' has a meaning for runs only"):
        trunk_weights(net, "untrained")


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    net = build_network(tiny_config(**NETWORKS["resnet18"]))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = models.resnet18().state_dict()
    torch.save({"model": state}, tmp_path / "nested.pth")
    torch.save(models.resnet18(), tmp_path / "module.pth")
    for given, sentence in (
        (models.resnet34(), "another architecture: unexpected: layer1.2"),
        ({f"module.{key}": value for key, value in state.items()}, "missing: conv1.weight"),
        ({**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}, "conv1.weight (64, 3, 3, 3) instead of (64, 3, 7, 7)"),
        ({}, "what was given holds no weights"),
        ({"a": 1}, "what was given holds no weights"),
        (7, "what was given holds no weights"),
        (tmp_path / "nested.pth", "nested.pth holds no weights: a dictionary of names and tensors is expected"),
        (tmp_path / "module.pth", "module.pth cannot be read"),  # it would execute code
        (tmp_path / "nowhere.safetensors", "nowhere.safetensors cannot be read"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            load_into(net, given)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_file_keeps_its_classifier_when_it_is_read_as_it_is(tmp_path):
    torch.save(models.resnet18().state_dict(), tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").keys() == models.resnet18().state_dict().keys()


# -- the guide --------------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "interop.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), flags=re.S | re.M)


def test_the_python_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    """With a run that has learned next to nothing, and weights of torchvision's that nobody published."""
    pytest.importorskip("rsatoolbox")
    pytest.importorskip("h5netcdf")
    pytest.importorskip("xarray")
    monkeypatch.chdir(tmp_path)
    train_in(Path("runs/blockwise"), backbone="resnet18", granularity=4, image_size=32, epochs=1, train_images=48)
    torch.save(models.resnet18().state_dict(), "resnet18.pth")
    names: dict = {}
    code = blocks("python")
    assert len(code) >= 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))  # rsatoolbox's own
        for block in code:
            exec(block, names)
    said = capsys.readouterr().out
    assert re.findall(r"^(?:True|False)$", said, flags=re.M) == ["True", "True", "True"]
    assert said.count("ProbeScore(accuracy=") == 4 and "published" in said
    assert {path.name for path in Path("upload").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    net = load_into(build_network(tiny_config(backbone="resnet18")), "upload/model.safetensors")
    assert all(torch.equal(value, net.trunk_state_dict()[key]) for key, value in names["model"].state_dict().items())
    config = Config.from_json(json.loads(Path("upload/config.json").read_text()), "upload")
    assert config == runs.load_run("runs/blockwise").config
    assert "# resnet18 trained by blockwise on embedded" in Path("upload/README.md").read_text()
    texts = [Path("upload", name).read_text() for name in ("config.json", "README.md")]
    assert not any(str(Path.cwd()) in text for text in texts)


def test_every_command_of_the_guide_parses_and_every_link_leads_somewhere():
    text = GUIDE.read_text()
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        assert make_parser().parse_args(line.split()[1:])
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (GUIDE.parent / target).exists(), target
