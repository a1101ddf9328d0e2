"""Files are whole or absent, whatever fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localsim.files import write_atomically, write_json, write_text


def test_text_and_json_come_back(tmp_path):
    write_text(tmp_path / "new" / "folder" / "a.txt", "σ = 0.25\n")
    assert (tmp_path / "new" / "folder" / "a.txt").read_text(encoding="utf-8") == "σ = 0.25\n"
    value = {"a": [1, 2.5, None], "b": {"c": "d"}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "new"], "nothing else is left"


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "a long first text")
    write_text(path, "second")
    assert path.read_text() == "second"


@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_everything_as_it_was(tmp_path, existed):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("first")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] * existed
    assert not existed or path.read_text() == "first"


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("first")

    def write(temporary: Path) -> None:
        assert temporary.suffix == ".png", "writers choose their format by it"
        assert temporary.parent == path.parent, "a rename is atomic within one file system only"
        temporary.write_text("second")
        assert path.read_text() == "first"

    write_atomically(path, write)
    assert path.read_text() == "second"


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), (object(), TypeError)])
def test_json_refuses_what_json_does_not_have(tmp_path, value, error):
    with pytest.raises(error):
        write_json(tmp_path / "a.json", {"a": value})
    assert list(tmp_path.iterdir()) == []
