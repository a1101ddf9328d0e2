"""Who may import whom, who may cut a graph, and who may know a rule by its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from localsim.rules import rules

ROOT = Path(__file__).resolve().parents[1]
CORE = ("credit", "backbones", "partition", "engine", "network")
SOURCES = sorted(file for folder in ("localsim", "rules", "analysis") for file in (ROOT / folder).rglob("*.py"))


def name_of(file: Path) -> str:
    """Return the module's name as it is imported: rules/ and analysis/ are parts of localsim."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "localsim" else ("localsim", *parts)).removesuffix(".__init__")


MODULES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES}


def names_in(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute"
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported: not those of functions, nor those for type checkers."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            yield from at_import([*node.body, *getattr(node, "orelse", [])])


def imported(module: str, *, anywhere: bool = False) -> set[str]:
    tree = MODULES[module]
    nodes = ast.walk(tree) if anywhere else at_import(tree.body)
    return {name for node in nodes for name in names_in(node)} & set(MODULES)


def reaches(module: str) -> set[str]:
    """Return all modules of localsim that importing `module` imports, itself included."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {name for one in new for name in imported(one)} - found
    return found


def within(modules: set[str], *packages: str) -> list[str]:
    return sorted(name for name in modules if any(f"{name}.".startswith(f"localsim.{p}.") for p in packages))


def test_the_sources_were_found():
    assert len(MODULES) > 35 and {f"localsim.{name}" for name in CORE} <= set(MODULES)
    assert "localsim.errors" in reaches("localsim.engine") and "localsim.rules.blockwise" in reaches("localsim.rules")
    assert within({"localsim.rules", "localsim.rules.rule", "localsim.runs"}, "rules") == [
        "localsim.rules", "localsim.rules.rule",
    ]  # fmt: skip


@pytest.mark.parametrize("name", CORE)
def test_the_core_knows_of_no_rule_no_trainer_and_no_analysis(name):
    assert within(reaches(f"localsim.{name}"), "rules", "train", "analysis", "experiment", "data", "config") == []


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("localsim.rules")])
def test_rules_know_of_no_trainer_and_no_analysis(name):
    found = reaches(name) | imported(name, anywhere=True)
    assert within(found, "train", "analysis", "experiment", "runs", "cli", "engine", "monitor") == []


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("localsim.analysis")])
def test_analysis_never_imports_the_trainer(name):
    """Not in a function either; nor by way of another module."""
    found = reaches(name).union(*(reaches(other) for other in imported(name, anywhere=True)))
    assert within(found, "train", "experiment", "cli") == []


def test_no_module_imports_itself_in_a_circle():
    for name in MODULES:
        later = set().union(*(reaches(other) for other in imported(name) if other != name))
        # a package is imported before its parts, whose imports may name it
        assert name not in later or all(part.startswith(f"{name}.") for part in later if name in imported(part)), name


# -- cutting graphs ---------------------------------------------------------------------------------------------------

CUTTERS = {"requires_grad_", "grad", "backward", "no_grad", "set_grad_enabled", "inference_mode", "enable_grad"}


def called(module: str) -> list[tuple[str, str]]:
    """Return (last name, whole expression) of everything that a module calls."""
    calls = [node.func for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)]
    return [(f.attr if isinstance(f, ast.Attribute) else ast.unparse(f), ast.unparse(f)) for f in calls]


def test_only_the_engine_decides_where_gradients_flow():
    """A rule is its matrix: what `.detach()` here or a gradient there would add could not be seen in it."""
    asks, starts = set(), set()
    for module in MODULES:
        if module.startswith("localsim.analysis"):
            continue  # fits classifiers of its own on features that carry no gradient
        for last, whole in called(module):
            if last == "requires_grad_":
                asks.add(module)
            if whole in ("torch.autograd.grad", "torch.autograd.backward") or (
                last == "backward" and whole != "engine.backward"
            ):
                starts.add(module)
    assert asks == starts == {"localsim.engine"}


def test_detached_activity_goes_into_no_graph_but_the_engines():
    detaching = {module for module in MODULES if any(last in ("detach", "detach_") for last, _ in called(module))}
    detaching = {module for module in detaching if not module.startswith("localsim.analysis")}
    # transport is the engine's: how a gradient crosses a layer; gradients is what a loss may hold constant, inside a
    # tap; runs writes weights to a file, memory looks at what autograd saved, messages carry values to other processes
    values = ("runs", "memory", "distributed.messages", "distributed.peers")
    assert detaching == {f"localsim.{name}" for name in ("engine", "transport", "gradients", *values)}


def test_no_forward_pass_of_a_module_switches_gradients_off():
    switching = CUTTERS - {"requires_grad_", "grad", "backward"} | {"detach", "detach_"}
    found = []
    for module, tree in MODULES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name in ("forward", "__call__"):
                nodes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
                found += [f"{module}: {node.attr}" for node in nodes if node.attr in switching]
    assert found == []


# -- names of rules ---------------------------------------------------------------------------------------------------


def compares_a_rules_name(tree: ast.AST) -> list[str]:
    """Return the comparisons, matches and look-ups of a rule or a name with what rules are called."""

    def about_a_rule(node: ast.AST) -> bool:
        return any(
            (isinstance(part, ast.Name) and part.id in ("rule", "rule_name"))
            or (isinstance(part, ast.Attribute) and part.attr in ("rule", "name"))
            for part in ast.walk(node)
        )

    def names_a_rule(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Constant) and part.value in tuple(rules) for part in ast.walk(node))

    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(about_a_rule(side) for side in sides) and any(names_a_rule(side) for side in sides):
                found.append(node)
        elif isinstance(node, ast.Match) and about_a_rule(node.subject):
            found += [case.pattern for case in node.cases if names_a_rule(case.pattern)]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            if about_a_rule(node.slice) and names_a_rule(node.value):
                found.append(node)
    return [ast.unparse(node) for node in found]


def test_no_code_outside_rules_asks_which_rule_it_is():
    """A new rule is one file: nothing else may need a case for it."""
    found = {
        module: compared
        for module, tree in MODULES.items()
        if not module.startswith("localsim.rules") and (compared := compares_a_rules_name(tree))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ("config.rule == 'end_to_end'", True),
        ("rule in ('blockwise', 'layerwise')", True),
        ("'untrained' != chosen.name", True),
        ("{'end_to_end': 1}[config.rule]", True),
        ("match rule:\n case 'blockwise': pass", True),
        ("config.rule == other.rule", False),
        ("run(rule or 'blockwise')", False),
        ("rule is not None", False),
    ],
)
def test_the_search_for_names_finds_what_it_should(code, caught):
    assert bool(compares_a_rules_name(ast.parse(code))) == caught


def test_no_name_that_analysis_exports_is_that_of_a_module():
    """Importing a module of a package sets its attribute there: a function of the same name would be lost."""
    from localsim import analysis
    from localsim.analysis import brain

    for package, folder, meant in (
        (analysis, ROOT / "analysis", analysis._MODULES),
        (brain, ROOT / "analysis/brain", ()),
    ):
        modules = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        assert modules & set(package.__all__) == set(meant)
        for name in package.__all__:
            assert getattr(package, name) is getattr(package, name), name
