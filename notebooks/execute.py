"""Execute notebooks in clean kernels and store what they printed and drew.

    python notebooks/execute.py 01 05        # these two, in place, with the values of their parameters cells
    python notebooks/execute.py              # all of them
    python notebooks/execute.py 01 --tiny    # with tiny values, within seconds; nothing is stored

A kernel works in an empty temporary folder, so that a notebook writes nothing beside itself. The number of threads is
that of OMP_NUM_THREADS. What is stored is the same whenever the same is printed and drawn; README.md, in this folder,
says what a notebook has to be like.
"""

from __future__ import annotations

import argparse
import ast
import copy
import getpass
import hashlib
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from localsim.errors import UserError, one_of
from localsim.files import write_text

FOLDER = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
MOST_BYTES = 1_000_000
WIDGET = "application/vnd.jupyter.widget-view+json"
# an absolute path, wherever one may begin; an address in memory differs from run to run as well
_PLACES = re.compile(r"(?<![\w.:/<+=-])/[A-Za-z][\w.-]*/[\w.-]+[^\s'\"<>)]*|\b[A-Z]:\\[^\s'\"<>)]+|\bat 0x[0-9a-f]{6,}")


# -- reading ----------------------------------------------------------------------------------------------------------


def find(numbers: Iterable[str] = ()) -> list[Path]:
    """Return the notebooks whose names begin with these numbers, all for none; UserError if there is no such one."""
    paths = {path.name.split("_")[0]: path for path in sorted(FOLDER.glob("*.ipynb"))}
    chosen = list(numbers) or list(paths)
    for number in chosen:
        if number not in paths:
            raise one_of("notebook", number, paths)
    return [paths[number] for number in chosen]


def read(path: Path) -> NotebookNode:
    """Return a notebook; UserError if the file is none of version 4.5, in which cells have ids."""
    text = path.read_text(encoding="utf-8")
    try:
        written = json.loads(text)
        if not isinstance(written, dict) or (written.get("nbformat"), written.get("nbformat_minor")) != (4, 5):
            raise UserError("it is of another version")
        nbformat.validate(written)
    except (ValueError, nbformat.ValidationError) as error:
        raise UserError(f"{path.name} is not a notebook of version 4.5: {str(error).splitlines()[0]}") from None
    return nbformat.reads(text, as_version=nbformat.NO_CONVERT)


def code_hash(notebook: NotebookNode) -> str:
    """Return what identifies the code of a notebook: the SHA-256 of its code cells, the first 16 digits."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def tiny_values(notebook: NotebookNode) -> Mapping[str, Any]:
    """Return the values that make the notebook end within seconds, by name of the parameter."""
    return notebook.metadata.get("localsim", {}).get("tiny", {})


def parameter_cells(notebook: NotebookNode) -> list[int]:
    """Return which cells are tagged `parameters`; a notebook is to have one."""
    return [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]


# -- executing --------------------------------------------------------------------------------------------------------


def execute(
    notebook: NotebookNode,
    folder: Path,
    *,
    tiny: bool = False,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> NotebookNode:
    """Return a copy of a notebook as a clean kernel executed it; the kernel ends with it.

    Args:
        notebook: stays as it is.
        folder: an empty one: `here/` in it is made the kernel's working directory, `tmp/` its place for temporary
            files.
        tiny: put a cell with the tiny values behind the parameters.
        environment: variables of the kernel beside those of this process.
        timeout: seconds that a cell may take; None: any number.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        UserError: a file was left in the working directory.
    """
    executed = copy.deepcopy(notebook)
    if tiny:
        values = "\n".join(f"{name} = {value!r}" for name, value in tiny_values(notebook).items())
        (where,) = parameter_cells(notebook)
        executed.cells.insert(where + 1, nbformat.v4.new_code_cell(values, id="tiny"))
    here, tmp = folder / "here", folder / "tmp"
    here.mkdir()
    tmp.mkdir()
    # a user's own start-up files of IPython have no place in a clean kernel
    places = {"TMPDIR": str(tmp), "IPYTHONDIR": str(tmp / "ipython")}
    # the kernel would say on stderr that it listens on this machine without encryption
    quiet = ["--log-level=ERROR"]
    client = NotebookClient(
        executed, timeout=timeout, kernel_name=KERNEL["name"], coalesce_streams=True, extra_arguments=quiet
    )
    client.execute(cwd=str(here), env={**os.environ, **places, **(environment or {})})
    if left := sorted(file.name for file in here.iterdir()):
        raise UserError(f"the notebook wrote {', '.join(left)} to its working directory; allowed: its OUT folder alone")
    return executed


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Return an executed notebook without what differs from run to run: times, ids of widgets, versions."""
    kept = copy.deepcopy(notebook)
    ours = {**kept.metadata.get("localsim", {}), "executed": code_hash(kept)}
    kept.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"}, localsim=ours)
    for cell in kept.cells:
        cell.metadata = NotebookNode({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        if cell.cell_type == "code":
            # a widget is drawn by the kernel that made it: stored, it would be an empty place
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return kept


def as_text(notebook: NotebookNode) -> str:
    """Return the file's text, the same for the same notebook."""
    return nbformat.writes(notebook) + "\n"


# -- what a notebook has to be like -----------------------------------------------------------------------------------


def source_faults(notebook: NotebookNode) -> list[str]:
    """Return what breaks the convention in a notebook's cells, a sentence each."""
    faults = []
    cells = notebook.cells
    if not cells or cells[0].cell_type != "markdown" or not cells[0].source.startswith("# "):
        faults.append("the first cell is not a title: allowed: Markdown that begins with '# '")
    faults += [f"cell {i} is empty" for i, cell in enumerate(cells) if not cell.source.strip()]
    if notebook.metadata.get("kernelspec", {}).get("name") != KERNEL["name"]:
        faults.append(f"the kernel is not called {KERNEL['name']}")
    found = parameter_cells(notebook)
    if len(found) != 1 or cells[found[0]].cell_type != "code":
        return [*faults, f"{len(found)} cells are tagged parameters; allowed: exactly one, of code"]
    assigned = _assigned(cells[found[0]].source)
    if not tiny_values(notebook):
        faults.append('the metadata name no tiny values: {"localsim": {"tiny": {NAME: VALUE, ...}}}')
    faults += [f"tiny names {name}, which is no parameter" for name in tiny_values(notebook) if name not in assigned]
    return faults


def output_faults(notebook: NotebookNode, private: Iterable[str] = ()) -> list[str]:
    """Return what should not be stored in a notebook's outputs, or is missing there, a sentence each.

    Args:
        notebook: executed.
        private: words to look for beside absolute paths: names of machines and users.
    """
    faults = []
    if notebook.metadata.get("localsim", {}).get("executed") != code_hash(notebook):
        faults.append("the code is not that which made the outputs")
    words = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in private) or r"(?!)")
    for i, output in _outputs(notebook):
        if output.output_type == "error" or output.get("name") == "stderr":
            faults.append(f"cell {i} ended in an error or wrote to stderr: {''.join(_texts(output))[:200]!r}")
        for text in _texts(output):
            faults += [f"cell {i} shows {hit[0]!r}" for regex in (_PLACES, words) for hit in regex.finditer(text)]
    pictures = [i for i, output in _outputs(notebook) if "image/png" in output.get("data", {})]
    if not pictures:
        faults.append("no cell shows a picture")
    if (size := len(as_text(notebook).encode())) > MOST_BYTES:
        faults.append(f"the file takes {size / 1e6:.2f} MB; allowed: {MOST_BYTES / 1e6:g} MB")
    return faults


def private_words() -> list[str]:
    """Return what would say on which machine and by whom a notebook was executed."""
    words = [socket.gethostname(), str(Path.home()), str(FOLDER.parent)]
    try:
        words.append(getpass.getuser())
    except (OSError, KeyError):  # a process whose user has no name
        pass
    return [word for word in words if len(word) > 3 and word not in ("root", "localhost")]


def _assigned(source: str) -> set[str]:
    targets = [t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _outputs(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    for i, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            yield i, output


def _texts(output: NotebookNode) -> list[str]:
    """Return all that an output says in words, whatever kind it is."""
    data = [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/png")]
    said = [output.get("text", ""), output.get("evalue", ""), *output.get("traceback", [])]
    return [text for text in (*said, *data) if text]


# -- the command ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Execute what the command line names; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python notebooks/execute.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", help="as 01; all notebooks if none is given")
    parser.add_argument("--tiny", action="store_true", help="with each notebook's tiny values; nothing is stored")
    asked = parser.parse_args(arguments)
    try:
        return max((_carry_out(path, asked.tiny) for path in find(asked.numbers)), default=0)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _carry_out(path: Path, tiny: bool) -> int:
    notebook = read(path)
    began = time.monotonic()
    faults = source_faults(notebook)
    if not faults:
        try:
            with tempfile.TemporaryDirectory() as folder:
                executed = execute(notebook, Path(folder), tiny=tiny)
        except (CellExecutionError, CellTimeoutError, DeadKernelError, UserError) as error:
            faults = [str(error)]
        else:
            executed = cleaned(executed)
            faults = output_faults(executed, private_words())
            if not faults and not tiny:
                write_text(path, as_text(executed))
    seconds = time.monotonic() - began
    outcome = "not stored" if faults or tiny else f"stored, {path.stat().st_size / 1e6:.2f} MB"
    print(f"{path.name}: {seconds:.0f} s, {outcome}", flush=True)
    for fault in faults:
        print(f"  {fault}", file=sys.stderr, flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
