"""The commands that a report gives, and the one that makes it."""

from __future__ import annotations

import argparse
import re
import shlex

from localsim import options
from localsim.analysis.report.remaking import needed_settings, run_command
from localsim.analysis.report.reported import open_reported
from localsim.config import FREE, Config
from localsim.presets import resolve
from localsim.report_command import REPORT_EXAMPLES, add_report_options
from localsim.rules import rules


def test_the_commands_that_remake_runs_give_their_configurations(reported_runs):
    for name in ("one", "two", "end"):
        (run,) = open_reported([reported_runs / name])
        words = shlex.split(run_command(run))
        assert words[:4] == ["localsim", "run", "--rule", run.run.config.rule]
        assert parsed(words[2:]) == decisive(run.run.config)


def decisive(config: Config) -> dict:
    return {name: value for name, value in config.to_json().items() if name not in FREE}


def parsed(words: list[str]) -> dict:
    """Return the configuration that options of `localsim run` mean."""
    given, pairs = {}, []
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option == "--set":
            pairs.append(value)
        elif option != "--out":
            whole = option in ("--reach", "--epochs", "--batch-size", "--seed")
            given[option[2:].replace("-", "_")] = (
                float(value) if option == "--lr" else int(value) if whole else options.int_or_word(value)
            )
    rule, preset = given.pop("rule"), given.pop("preset")
    return decisive(resolve(rule, preset, given | options.settings(pairs)))


def test_settings_that_are_needed_give_every_rule_again_and_none_is_needless():
    for rule in rules:
        config = resolve(rule, "stl10", {"seed": 3, "batch_size": 24, "num_classes": 10})
        needed = needed_settings(config)
        assert decisive(resolve(rule, "stl10", needed)) == decisive(config)
        assert set(needed) <= {"seed", "batch_size", "num_classes"} and needed["seed"] == 3


def test_the_commands_examples_parse():
    parser = argparse.ArgumentParser()
    add_report_options(parser)
    lines = [line.split("  ")[1] for line in REPORT_EXAMPLES.splitlines()[1:]]
    found = [parser.parse_args(shlex.split(re.split(r"\s{3,}", line)[0])[2:]) for line in lines]
    assert len(found) == 4 and found[1].title == "Reach 1 to 4, two seeds" and found[3].brain == ["brain/first+second"]
