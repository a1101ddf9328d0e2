"""The table of faults names tests that exist, and all of those that were written for it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "localsim" / "distributed"


def test_every_test_in_the_table_of_faults_exists_and_every_test_of_a_fault_is_in_it():
    rows = [
        line for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines() if "::" in line
    ]
    named = [re.search(r"\| `([\w/]+\.py)::(test_\w+)` \|$", row) for row in rows]
    assert all(named) and len(named) >= 15
    found = {(found[1], found[2]) for found in named if found}
    for file, name in found:
        text = ((ROOT if "/" in file else HERE) / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in text, (file, name)
    written = {(file.name, name) for file in (*HERE.glob("test_faults*.py"), HERE / "test_killed_at_random.py")
               for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), flags=re.M)}  # fmt: skip
    assert written == {(file, name) for file, name in found if "/" not in file}
