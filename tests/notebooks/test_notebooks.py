"""Every notebook: executed with tiny values by a clean kernel, and what is stored of it from its real values.

Its pictures and numbers come from `python notebooks/execute.py NUMBER`, which a change of its code asks for again.
"""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from localsim.errors import UserError

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# not imported: that would leave bytecode beside the notebooks
tool = SimpleNamespace(**runpy.run_path(str(FOLDER / "execute.py")))

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
TIMEOUT = 600
"""Seconds; with tiny values a notebook takes up to 25 on an idle core."""


def test_all_notebooks_are_there_and_linked():
    names = [path.name for path in NOTEBOOKS]
    assert [name[:2] for name in names] == ["01", "02", "03", "04", "05", "06"]
    linked = re.findall(r"\]\(([^)#]+)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert set(names) <= set(linked) and all((FOLDER / one).exists() for one in linked)


@by_notebook
def test_a_clean_kernel_executes_it_with_tiny_values(path, tmp_path):
    beside = sorted(file.name for file in FOLDER.iterdir())
    # raises if a cell fails, or leaves something in the working directory
    executed = tool.execute(tool.read(path), tmp_path, tiny=True, environment={"OMP_NUM_THREADS": "1"}, timeout=TIMEOUT)
    assert sorted(file.name for file in FOLDER.iterdir()) == beside
    cleaned = tool.cleaned(executed)
    assert tool.output_faults(cleaned) == []
    stored = {cell.id: cell.get("outputs") for cell in tool.read(path).cells}
    silent = [cell.source for cell in cleaned.cells if cell.get("outputs") and stored.get(cell.id, True) == []]
    assert not silent, f"outputs are not stored; {_again(path)}"


@by_notebook
def test_it_keeps_to_the_convention(path):
    assert tool.source_faults(tool.read(path)) == []


@by_notebook
def test_its_outputs_are_stored_and_made_by_its_code(path):
    notebook = tool.read(path)
    assert tool.output_faults(notebook) == [], _again(path)
    # nothing that differs from run to run, and the text that the command would write
    assert path.read_text(encoding="utf-8") == tool.as_text(tool.cleaned(notebook)), _again(path)


def _again(path: Path) -> str:
    return f"run: python notebooks/execute.py {path.stem[:2]}"


# -- the command itself -----------------------------------------------------------------------------------------------


def made_up(*code: str, tiny: dict | None = None) -> nbformat.NotebookNode:
    """Return a notebook with a title, a parameter and these cells."""
    new = nbformat.v4
    cells = [new.new_markdown_cell("# A title", id="title")]
    cells += [new.new_code_cell("N = 1000  # how many", id="n", metadata={"tags": ["parameters"]})]
    cells += [new.new_code_cell(source, id=f"code{i}") for i, source in enumerate(code)]
    ours = {"tiny": {"N": 2} if tiny is None else tiny}
    return new.new_notebook(cells=cells, metadata={"kernelspec": tool.KERNEL, "localsim": ours})


PICTURE = """\
import base64
from IPython.display import Image, display
display(Image(base64.b64decode("iVBORw0KGgo="), format="png"), metadata={"image/png": {"alt": "nothing"}})"""


def test_it_stores_what_was_printed_and_nothing_that_changes(tmp_path, monkeypatch, capsys):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    path = notebooks / "07_made_up.ipynb"
    path.write_text(tool.as_text(made_up("print(N)", "print(N + 1)\nprint(N + 2)", PICTURE)))
    main = monkeypatch_folder(monkeypatch, notebooks)
    before = path.read_bytes()
    assert main(["07", "--tiny"]) == 0, capsys.readouterr().err
    assert path.read_bytes() == before
    assert main([]) == 0, capsys.readouterr().err
    stored = tool.read(path)
    assert [output.text for cell in stored.cells[2:4] for output in cell.outputs] == ["1000\n", "1001\n1002\n"]
    assert stored.cells[4].outputs[0].metadata == {"image/png": {"alt": "nothing"}}
    assert [cell.id for cell in stored.cells] == ["title", "n", "code0", "code1", "code2"]
    assert tool.output_faults(stored) == tool.source_faults(stored) == []
    text = path.read_text()
    assert text == tool.as_text(tool.cleaned(stored)) and text.endswith("}\n") and "iopub" not in text
    stored.cells[2].source = "print(N )"
    assert tool.output_faults(stored) == ["the code is not that which made the outputs"]
    assert main(["08"]) == 2
    assert capsys.readouterr().err == "unknown notebook '08'; allowed: 07\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("open('left.txt', 'w').close()", "the notebook wrote left.txt to its working directory"),
        ("import sys; print('slow', file=sys.stderr)", "wrote to stderr: 'slow"),
        ("import tempfile; print(tempfile.mkdtemp(dir='/tmp'))", "shows '/tmp/"),
        ("object()", "shows 'at 0x"),
        ("import socket; print(socket.gethostname(), 'abcdef-host')", "shows 'abcdef-host'"),
    ],
)
def test_it_stores_nothing_that_failed_or_tells_of_the_machine(code, said, tmp_path, monkeypatch, capsys):
    path = tmp_path / "07_made_up.ipynb"
    path.write_text(tool.as_text(made_up(code, PICTURE)))
    before = path.read_bytes()
    main = monkeypatch_folder(monkeypatch, tmp_path)
    monkeypatch.setitem(main.__globals__, "private_words", lambda: ["abcdef-host"])
    assert main(["07"]) == 1
    assert said in capsys.readouterr().err
    assert path.read_bytes() == before


def monkeypatch_folder(monkeypatch, folder):
    """Return the command, for the notebooks of another folder."""
    monkeypatch.setitem(tool.main.__globals__, "FOLDER", folder)
    return tool.main


def test_what_breaks_the_convention_is_named(tmp_path):
    good = made_up()
    assert tool.source_faults(good) == []
    assert tool.source_faults(made_up(" \n", tiny={"M": 1})) == [
        "cell 2 is empty",
        "tiny names M, which is no parameter",
    ]
    bad = copy.deepcopy(good)
    bad.metadata.kernelspec.name = "mine"
    bad.cells[0].source = "No title"
    bad.cells[1].metadata.tags = []
    assert [fault.split(":")[0] for fault in tool.source_faults(bad)] == [
        "the first cell is not a title",
        "the kernel is not called python3",
        "0 cells are tagged parameters; allowed",
    ]
    bad = copy.deepcopy(good)
    bad.metadata.localsim = {}
    assert "no tiny values" in tool.source_faults(bad)[0]
    assert "no cell shows a picture" in tool.output_faults(good)
    (tmp_path / "old.ipynb").write_text("{}")
    with pytest.raises(UserError, match=r"^old.ipynb is not a notebook of version 4.5: "):
        tool.read(tmp_path / "old.ipynb")


@pytest.mark.parametrize(
    "text", ["images/second", "and/or", "see https://a.org/home/x", "</td></tr>", "1/2 or 3 / 4", "AB+/cd/ef=="]
)
def test_what_only_looks_like_a_path_is_let_pass(text):
    notebook = made_up("print()", PICTURE)
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    notebook.cells[3].outputs = [nbformat.v4.new_output("display_data", {"image/png": ""})]
    notebook.metadata.localsim.executed = tool.code_hash(notebook)
    assert tool.output_faults(notebook) == []
