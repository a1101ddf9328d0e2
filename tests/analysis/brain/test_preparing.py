"""Brain-Score at hand: nothing is written to the user's home, nothing of the user's is overridden."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from localsim.analysis.brain import preparing as ours
from localsim.analysis.brain.preparing import brainscore_at_hand, prepare
from localsim.errors import UserError

HOMELESS = """
import os, sys, socket
from pathlib import Path
def refuse(*arguments): raise SystemExit(f"the network was tried: {arguments[1:]}")
socket.socket.connect = refuse
import numpy as np, torch
from torch import nn
from localsim.analysis.brain import brainscore
from localsim.analysis.brain.assemblies import benchmark
from localsim.analysis.brain.models import brain_model
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.sources import Source
from localsim.data import ImageSet
rng = np.random.default_rng(0)
images = ImageSet(torch.from_numpy(rng.integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)), None, None)
recording = Recording("made", images, rng.normal(size=(20, 4, 3)), regions=("IT",) * 4, degrees=5)
net = nn.Sequential(nn.Conv2d(3, 4, 3))
model = brain_model(Source("x", net, 8), {"IT": "0"}, spatial="2x2")
score = brainscore.score_benchmark(benchmark(recording, "IT", "ridge"), model)
assert np.isfinite(score.raw)
for name in ("RESULTCACHING_HOME", "BRAINSCORE_HOME", "MT_HOME", "BRAINIO_HOME"):
    assert Path(os.environ[name]).is_relative_to(brainscore.prepare()), name
assert os.environ["BS_INSTALL_DEPENDENCIES"] == "no"
written = brainscore.prepare() / "brainio"
assert (written / "abc" / "kept.nc").read_text() == "filled before", "a cache at its usual place is read"
from brainscore_core.supported_data_standards.brainio.fetch import get_local_data_path
assert get_local_data_path() == str(written)
(written / "abc" / "new.nc").write_text("downloaded")
print(brainscore.prepare())
"""


@pytest.mark.skipif(find_spec("brainscore_vision") is None, reason="needs the extra [brain]")
def test_nothing_is_written_to_the_users_home_and_nothing_stays(tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    (home / ".brainio" / "abc").mkdir(parents=True)
    (home / ".brainio" / "abc" / "kept.nc").write_text("filled before")
    temporary.mkdir()
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    ours_or_theirs = ("BRAIN", "RESULTCACHING", "MT_", "BS_", "XDG_", "MPL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours_or_theirs)}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "BS_INSTALL_DEPENDENCIES": "yes"}
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
    assert Path(done.stdout.strip()).parent == temporary, "and nothing else is printed"
    assert not list(temporary.glob("*brainscore*")), "it goes with the process"


@pytest.fixture
def unprepared(monkeypatch) -> dict[str, str]:
    """Return an environment of its own, for a preparation that begins anew."""
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(ours, "_prepared", None)
    monkeypatch.delitem(sys.modules, "brainscore_vision.benchmark_helpers.screen", raising=False)
    return environment


def test_what_the_user_has_set_stays(unprepared, tmp_path):
    given = {"BRAINIO_HOME": "mine", "RESULTCACHING_DISABLE": "0", "MT_MULTITHREAD": "1"}
    unprepared |= {**given, "BS_INSTALL_DEPENDENCIES": "newenv"}
    assert prepare(tmp_path) == prepare() == tmp_path
    assert unprepared.items() >= given.items() and unprepared["BS_INSTALL_DEPENDENCIES"] == "no"
    assert unprepared["MT_HOME"] == str(tmp_path / "model-tools") and "OMP_NUM_THREADS" not in unprepared
    with pytest.raises(UserError, match=rf"writes to {tmp_path} already in this process, and cannot to elsewhere"):
        prepare(Path("elsewhere"))


def test_a_kept_folder_follows_the_cache_it_shows(unprepared, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "expanduser", lambda _: tmp_path / "cache")
    kept = tmp_path / "cache" / "abc"
    for file in ("one.nc", "two.nc"):
        kept.mkdir(parents=True, exist_ok=True)
        (kept / file).write_text(file)
        unprepared.clear()
        monkeypatch.setattr(ours, "_prepared", None)
        shown = prepare(tmp_path / "mine") / "brainio" / "abc"
        assert [link.read_text() for link in shown.iterdir()] == [file]
        (kept / file).unlink()


def test_brainscore_that_was_imported_before_is_a_sentence(unprepared, monkeypatch, tmp_path):
    screen = SimpleNamespace(framework_home=Path("home/.brain-score"))
    monkeypatch.setitem(sys.modules, "brainscore_vision.benchmark_helpers.screen", screen)
    with pytest.raises(
        UserError, match=r"imported before localsim prepared it, and would write to home/\.brain-score;"
    ):
        prepare()
    unprepared["BRAINSCORE_HOME"] = "chosen"
    assert prepare(tmp_path) == tmp_path


def test_without_brainscore_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'not installed; do pip install "localsim\[brain\]" in an environment'):
        brainscore_at_hand()
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda _: object())

    def broken(_):
        raise AttributeError("np.float_ was removed")

    monkeypatch.setattr(ours.importlib, "import_module", broken)
    with pytest.raises(UserError, match=r"cannot be imported \(np.float_ was removed\); do pip install"):
        brainscore_at_hand()
