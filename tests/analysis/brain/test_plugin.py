"""Runs as plugin folders of Brain-Score's: what is written loads as its own and gives our activations."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny import train_in

import localsim.rules
from localsim.analysis import features
from localsim.analysis.brain.brainscore import prepare, quiet
from localsim.analysis.brain.models import identifier_of
from localsim.analysis.brain.plugin import export_plugin
from localsim.analysis.scripts import export_brainscore
from localsim.analysis.sources import Source
from localsim.analysis.spatial import Reducer
from localsim.data import ImageSet
from localsim.errors import UserError
from localsim.rules import get_rule, rules
from localsim.rules.heads import HEADS
from localsim.rules.objectives import OBJECTIVES
from localsim.runs import load_run, newest_checkpoint

SHORT = {"epochs": 1, "train_images": 8, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return a folder with a run whose backbone torchvision has, and with one whose backbone only localsim has."""
    folder = tmp_path_factory.mktemp("runs")
    train_in(folder / "torchvision", backbone="resnet18", stem="cifar", image_size=16, **SHORT)
    train_in(folder / "own", **SHORT)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Return images of several kinds: wide, tall, square, as they are trained on, grey, with a palette, of 16 bits."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    made = []
    for number, shape in enumerate([(40, 61, 3), (90, 33, 3), (70, 70, 3), (32, 32, 3), (16, 16, 3), (50, 40)]):
        made.append(Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)))
        made[-1].save(folder / f"{number}.png")
    made[0].quantize(16).save(folder / "6.png", transparency=3)
    Image.fromarray(rng.integers(0, 2**16, (40, 40), dtype=np.uint16)).save(folder / "7.png")
    return sorted(folder.iterdir())


@pytest.fixture
def models(monkeypatch):
    """Return Brain-Score's registry of models; what a test adds to it goes again."""
    prepare()
    brainscore = pytest.importorskip("brainscore_vision", reason="needs the extra [brain]")
    registry: dict = {}
    monkeypatch.setattr(brainscore, "model_registry", registry)
    return registry


def look(model, region: str, files: list[Path]) -> np.ndarray:
    """Return what a model shows of a region for image files."""
    from brainscore_core.supported_data_standards.brainio.stimuli import StimulusSet

    stimuli = StimulusSet({"stimulus_id": [file.stem for file in files], "number": range(len(files))})
    stimuli.stimulus_paths = {file.stem: str(file) for file in files}
    stimuli.identifier = "files"
    with quiet():
        model.start_recording(region, time_bins=[(70, 170)])
        return model.look_at(stimuli).transpose("presentation", "neuroid").values


needs_brainscore = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@needs_brainscore
@pytest.mark.parametrize(
    ("run", "layers", "spatial", "alone"),
    [
        ("torchvision", {"V1": "stem", "V4": "stage2", "IT": "layer4.0.bn2"}, "2x2", True),
        ("torchvision", {"V4": "stage2"}, "mean", True),
        ("torchvision", {"V4": "stage2"}, "flatten", True),
        ("torchvision", {"V4": "stage2"}, "project8", False),
        ("torchvision", {"V4": "readout2"}, "mean", False),
        ("own", {"V4": "stage2", "IT": "readout3"}, "2x2", False),
    ],
)
def test_the_plugin_gives_our_activations(runs, files, models, tmp_path, monkeypatch, run, layers, spatial, alone):
    name = f"plugin_{abs(hash((run, str(layers), spatial)))}"
    identifier = export_plugin(runs / run, tmp_path / name, region_layers=layers, degrees=5, spatial=spatial)
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module(name)
    model = models[identifier]()
    source = Source.of(runs / run).whole()
    assert identifier == model.identifier == identifier_of(source, Reducer(spatial))
    assert model.visual_degrees() == 5 and (tmp_path / name / "config.json").exists() != alone
    for region, layer in layers.items():
        kind = "stages" if layer.startswith("stage") else "readouts" if layer.startswith("readout") else "modules"
        asked = [int(layer[-1]) - 1] if kind != "modules" else ["relu" if layer == "stem" else layer]
        expected = features(source, ImageSet(None, tuple(files), None), spatial=spatial, batch_size=64, **{kind: asked})
        np.testing.assert_allclose(
            look(model, region, files), next(iter(expected.arrays.values())), rtol=2e-5, atol=2e-5
        )
    assert set(Path(str(package.__file__)).parent.iterdir()) >= {
        tmp_path / name / "README.md",
        tmp_path / name / "test.py",
    }


@needs_brainscore
def test_a_plugin_of_torchvisions_runs_where_localsim_is_not(runs, files, tmp_path):
    pytest.importorskip("brainscore_vision", reason="needs the extra [brain]")
    export_plugin(runs / "torchvision", tmp_path / "mine", region_layers={"IT": "stage2"}, identifier="mine.1")
    assert (tmp_path / "mine" / "requirements.txt").read_text().split() == ["torch", "torchvision", "safetensors"]
    code = f"""
import sys
sys.modules["localsim"] = None
sys.path.insert(0, {str(tmp_path)!r})
import mine.model
model = mine.get_model()
shown = mine.model.show({[str(file) for file in files]!r})
print(model.identifier, shown.shape, model.layer_model.region_layer_map)
"""
    environment = {"BS_INSTALL_DEPENDENCIES": "no", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "mine.1 (8, 3, 16, 16) {'IT': 'layer2.1'}\n", done.stderr


@needs_brainscore
def test_brainscore_finds_and_loads_the_plugin_among_its_models(runs, models, tmp_path, monkeypatch):
    import brainscore_vision
    import brainscore_vision.models
    from brainscore_core.plugin_management import import_plugin

    identifier = export_plugin(runs / "own", tmp_path / "models" / "found", region_layers={"IT": "stage2"})
    searched = import_plugin.ImportPlugin.__new__(import_plugin.ImportPlugin)
    searched.plugins_dir, searched.registry_name = tmp_path / "models", "model_registry"
    searched.identifier = identifier
    assert searched.locate_plugin() == "found"
    monkeypatch.setattr(import_plugin.ImportPlugin, "locate_plugin", lambda _: "found")
    monkeypatch.setattr(brainscore_vision.models, "__path__", [str(tmp_path / "models")])
    assert brainscore_vision.load_model(identifier).identifier == identifier


@needs_brainscore
@pytest.mark.parametrize("run", ["torchvision", "own"])
def test_weights_that_were_changed_are_refused(runs, models, tmp_path, monkeypatch, run):
    folder = tmp_path / f"changed_{run}"
    identifier = export_plugin(runs / run, folder, region_layers={"IT": "stage2"})
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(folder.name)
    with pytest.raises(ValueError, match="does not hold the weights that were exported"):
        models[identifier]()


def test_the_folder_says_what_it_is(runs, tmp_path):
    layers = {"V4": "stage1", "IT": "stage2"}
    identifier = export_plugin(runs / "torchvision", tmp_path / "one", region_layers=layers, which="untrained")
    names = {path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one").rglob("*")}
    maps = {"region_layer_map", f"region_layer_map/{identifier}.json"}
    files = {"__init__.py", "model.py", "test.py", "requirements.txt", "README.md", "settings.json"}
    assert names == maps | files | {"weights.safetensors"}
    assert list(tmp_path.iterdir()) == [tmp_path / "one"], "no partial folder stays"
    named = json.loads((tmp_path / "one" / f"region_layer_map/{identifier}.json").read_text())
    assert named == {"V4": "layer1.1", "IT": "layer2.1"}
    text = (tmp_path / "one" / "README.md").read_text()
    for said in (
        identifier,
        "untrained network",
        "backbone resnet18, rule `blockwise`, seed 0",
        "| IT | layer2.1 |",
        "8 degrees",
    ):
        assert said in text
    assert f"model_registry['{identifier}']" in (tmp_path / "one" / "__init__.py").read_text()
    assert export_plugin(runs / "torchvision", tmp_path / "two", region_layers=layers) != identifier


def test_what_cannot_be_exported_gets_a_sentence_and_leaves_nothing(runs, tmp_path):
    layers = {"IT": "stage2"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    for arguments, told in (
        ({"folder": tmp_path / "full"}, "full exists already"),
        ({"folder": tmp_path / "a.b"}, "folder 'a.b' cannot be a plugin's"),
        ({"folder": tmp_path / "file" / "x"}, "x cannot be written: Not a directory"),
        ({"identifier": "it's"}, """identifier "it's" cannot be a plugin's"""),
        ({"region_layers": {}}, "no region has a layer"),
        ({"region_layers": {"IT": "stage77"}}, "has no layer 'stage77'"),
        ({"degrees": -1}, "degrees is -1; allowed"),
        ({"spatial": "x"}, "unknown spatial handling 'x'"),
        ({"which": 5}, "unknown network 5"),
        ({"spatial": "9x9"}, "spatial 9x9 is finer than the map of stage2"),
    ):
        with pytest.raises(UserError) as raised:
            export_plugin(runs / "own", **{"folder": tmp_path / "new", "region_layers": layers, **arguments})
        assert told in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file"}


def test_the_script_exports_or_says_why_not(runs, tmp_path, capsys):
    common = [str(runs / "own"), "--out", str(tmp_path / "made")]
    export_brainscore.start([*common, "--regions", "V4=stage1,IT=stage2", "--identifier", "mine", "--degrees", "6"])
    assert capsys.readouterr().out == f"mine is in {tmp_path / 'made'}, see its README.md\n"
    assert json.loads((tmp_path / "made" / "settings.json").read_text())["degrees"] == 6
    for regions, told in (
        ("V4=stage1", f"{tmp_path / 'made'} exists already"),
        ("V4", "--regions has 'V4'; allowed: REGION=LAYER"),
        ("V4=a,V4=b", "names a region twice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            export_brainscore.start([*common, "--regions", regions])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("export_brainscore: ") and told in error


RULE = """
from localsim.credit import Credit
from localsim.rules.heads import HEADS
from localsim.rules.objectives import OBJECTIVES
from localsim.rules.rule import Rule

HEADS["my_head"], OBJECTIVES["my_loss"] = HEADS["projector"], OBJECTIVES["vicreg"]
RULE = Rule(name="mine_alone", summary="Lowest and highest.", paper="none", readout="expand", head="my_head",
            objective="my_loss", credit=lambda num: Credit([[1, 0, 0], [1, 0, 1]], (0, 2)), granularity=3,
            meaningless={"reach": "its matrix is fixed"})
"""


@pytest.fixture(scope="module")
def own_rule(tmp_path_factory) -> Iterator[tuple[Path, Path]]:
    """Yield the file of a rule that no other process knows, with a head and a loss of its own, and a run with it."""
    folder = tmp_path_factory.mktemp("own_rule")
    (folder / "mine.py").write_text(RULE)
    with pytest.MonkeyPatch.context() as known:  # other tests list all rules, heads and objectives
        known.setattr("localsim.rules._rules", dict(rules))
        known.setattr("localsim.rules._sources", dict(localsim.rules._sources))
        known.setitem(HEADS, "my_head", HEADS["projector"])
        known.setitem(OBJECTIVES, "my_loss", OBJECTIVES["vicreg"])
        get_rule(folder / "mine.py")
        train_in(folder / "run", "mine_alone", snapshot_every=1, **SHORT)
        yield folder / "mine.py", folder / "run"


@needs_brainscore
def test_the_plugin_of_a_run_with_ones_own_rule_needs_no_file_of_it(own_rule, files, tmp_path):
    pytest.importorskip("brainscore_vision", reason="needs the extra [brain]")
    export_plugin(own_rule[1], tmp_path / "mine", region_layers={"IT": "readout3", "V4": "stage2"}, spatial="mean")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import mine.model
import numpy as np
from localsim.rules import rules
assert "mine_alone" not in rules
model = mine.model.get_model()
found = model.activations_model({[str(file) for file in files]!r}, layers=["readout3", "stage2"])
for layer in ("readout3", "stage2"):
    np.save({str(tmp_path)!r} + f"/{{layer}}.npy", found.values[:, found["layer"].values == layer])
"""
    environment = {"BS_INSTALL_DEPENDENCIES": "no", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    source, images = Source.of(own_rule[1]).whole(), ImageSet(None, tuple(files), None)
    expected = features(source, images, readouts=[2], stages=[1], spatial="mean", batch_size=64)
    for layer in ("readout3", "stage2"):
        assert np.array_equal(np.load(tmp_path / f"{layer}.npy"), expected[layer])


def test_the_script_takes_a_rule_a_folder_of_images_and_which_network(own_rule, files, tmp_path, capsys):
    rule, run = own_rule
    config = json.loads((run / "config.json").read_text())
    for kind in ("train", "test"):
        (tmp_path / "images" / kind / "a").mkdir(parents=True)
        for file in files[:2]:
            (tmp_path / "images" / kind / "a" / file.name).symlink_to(file)
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    lost = {"data": str(tmp_path / "gone"), "train_images": None, "test_images": None}
    (moved / "config.json").write_text(json.dumps(config | lost))
    common = [str(moved), "--regions", "IT=stage2", "--data", str(tmp_path / "images")]
    code = "import sys; from localsim.analysis.scripts import export_brainscore; export_brainscore.start(sys.argv[1:])"

    def export(*arguments: str) -> subprocess.CompletedProcess:
        """Export in a process that does not know the rule."""
        command = [sys.executable, "-W", "error", "-c", code, *common, *arguments]
        return subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )

    refused = export("--out", str(tmp_path / "none"))
    assert refused.returncode == 2 and "unknown rule 'mine_alone'" in refused.stderr
    done = export("--out", str(tmp_path / "made_trained"), "--rule", str(rule))
    assert done.returncode == 0, done.stderr
    for which in ("untrained", "1"):
        export_brainscore.start([*common, "--out", str(tmp_path / f"made_{which}"), "--which", which])
    with pytest.raises(SystemExit):
        export_brainscore.start([*common, "--out", str(tmp_path / "none"), "--which", "9"])
    assert "unknown network 9; allowed: trained, untrained, 1" in capsys.readouterr().err
    made = [tmp_path / f"made_{which}" for which in ("trained", "untrained", "1")]
    written = {folder.name.removeprefix("made_"): load_file(folder / "weights.safetensors") for folder in made}
    for which, folder in (("trained", newest_checkpoint(run)), ("1", run / "snapshots" / "00000001")):
        assert folder is not None
        trunk = load_file(folder / "trunk.safetensors")
        assert trunk and all(np.array_equal(written[which][name], tensor) for name, tensor in trunk.items())
    untrained = load_run(run).network("untrained").trunk_state_dict()
    assert all(np.array_equal(written["untrained"][name], tensor) for name, tensor in untrained.items())


def test_equal_exports_have_equal_bytes(runs, tmp_path):
    for name in ("one", "two"):
        export_plugin(runs / "own", tmp_path / name, region_layers={"IT": "stage2"})
    files = [sorted((tmp_path / name).rglob("*.*")) for name in ("one", "two")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
