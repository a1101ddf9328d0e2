"""What the guide to watching a run says, done as it stands there, on a run that ends within a second."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny import TINY

import localsim
from localsim import runs
from localsim.board import flat
from localsim.cli import make_parser

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "live_view.md"
RUN_TINY = {name: value for name, value in TINY.items() if name != "log_every"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), flags=re.S | re.M)


class Tracker:
    """A stand-in for the run that `wandb.init` returns: it keeps what it is given, and ignores steps it has seen."""

    kept: dict[int, dict[str, float]]
    closed = False

    def __init__(self, earlier: dict[int, dict[str, float]], given: dict) -> None:
        self.kept, self.given = earlier, given

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_error: object) -> None:
        self.closed = True

    def log(self, data: dict[str, float], step: int) -> None:
        if step > max(self.kept, default=0):
            self.kept[step] = dict(data)


@pytest.fixture
def wandb(monkeypatch) -> list[Tracker]:
    """Put a stand-in in the place of `wandb`, and return the runs that it is asked for."""
    module, asked, by_id = ModuleType("wandb"), [], {}

    def init(**given) -> Tracker:
        asked.append(Tracker(by_id.setdefault(given["id"], {}) if given["resume"] == "allow" else {}, given))
        return asked[-1]

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return asked


@pytest.fixture
def tiny_runs(tmp_path, monkeypatch):
    """Make every `localsim.run` tiny, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    original = localsim.run

    def run(rule, **settings):
        given = {**settings, "granularity": 3, "log_every": 3, "probe_protocol": "none", "quiet": True}
        return original(rule, **{**RUN_TINY, **given})

    monkeypatch.setattr(localsim, "run", run, raising=False)


def test_the_hook_for_wandb_logs_what_the_file_holds_and_resumes_by_id(tiny_runs, wandb, monkeypatch):
    (code,) = (block for block in blocks("python") if "import wandb" in block)
    made = localsim.run
    monkeypatch.setattr(localsim, "run", lambda rule, **settings: made(rule, **settings, max_steps=7))
    exec(code, {})
    rows = {row["step"]: flat(row) for row in runs.read_metrics(Path("runs/first"))}
    (first,) = wandb
    assert list(rows) == [3, 5, 6] or list(rows)[-1] <= 7
    assert first.kept == rows and first.closed and "loss/stage1" in rows[3]
    assert first.given["config"]["rule"] == "blockwise" and first.given["config"]["preset"] == "quick"
    # as the guide says: resume=True, and the same id
    monkeypatch.setattr(localsim, "run", lambda rule, **settings: made(rule, **settings, resume=True))
    exec(code, {})
    rows = {row["step"]: flat(row) for row in runs.read_metrics(Path("runs/first"))}
    assert max(rows) == 10
    assert wandb[1].kept is first.kept and first.kept.keys() == rows.keys()


def test_the_plot_in_a_notebook_grows_with_every_line(tiny_runs, monkeypatch):
    display = pytest.importorskip("IPython.display")
    from matplotlib.figure import Figure

    shown = []

    class Place:
        """A stand-in for the handle that a notebook gives back."""

        def update(self, what: object) -> None:
            shown.append(what)

    monkeypatch.setattr(display, "display", lambda *_what, display_id: Place())
    (code,) = (block for block in blocks("python") if "IPython" in block)
    names: dict = {}
    exec(code, names)
    assert names["rows"] == names["run"].metrics() and len(shown) == len(names["rows"]) >= 3
    assert all(isinstance(figure, Figure) for figure in shown)
    lengths = [len(figure.axes[0].lines[0].get_xdata()) for figure in shown]
    assert lengths == sorted(lengths) and lengths[-1] > lengths[0]


def test_the_file_is_followed_to_its_last_line(tiny_runs, capsys):
    localsim.run("blockwise", out="runs/first")
    (code,) = (block for block in blocks("python") if "def follow" in block)
    exec(code, {})
    told = capsys.readouterr().out.splitlines()
    rows = runs.read_metrics(Path("runs/first"))
    assert told == [f"{row['step']} {row['loss']} {row['online_probe']}" for row in rows] and rows[-1]["step"] == 10


def test_every_block_is_one_of_these_and_every_name_is_a_metrics(tiny_runs):
    assert len(blocks("python")) == 3
    for line in (line for block in blocks("bash") for line in block.splitlines()):
        if line.startswith("localsim "):
            assert make_parser().parse_args(line.split()[1:])
    named = re.findall(r"`(\w+)/stage\d`|`(lr|images_per_second|held_bytes)`", GUIDE.read_text())
    row = localsim.run("blockwise", out="runs/first").metrics()[0]
    assert {name for pair in named for name in pair if name} == set(row) - {"step", "epoch"}
