"""Writes docs/rules.md from the rules themselves: `python docs/rules_table.py > docs/rules.md`.

With `--short` it prints the table of the README instead.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys

from localsim.assembly import build_credit, build_trunk
from localsim.config import Config
from localsim.credit import Credit
from localsim.presets import resolve
from localsim.rules import own_rules
from localsim.rules.heads import HEADS
from localsim.rules.objectives import OBJECTIVES
from localsim.rules.rule import Rule

HEAD = """\
# The rules

Made by `python docs/rules_table.py` from the code; a test compares the two.

Every row is a rule at full size, under `--preset imagenet`; other presets have smaller networks, widths and batches,
and bring their own augmentation and optimiser to the rules that name none. In the credit matrices rows are losses,
from the lowest up, columns are stages 1 to 4 (a rule whose partition is `block` has as many as its backbone has unit
blocks; the pattern is the same), entries the weight with which a loss may change a stage. The gradient path is the
longest on the rule's default backbone, in unit blocks: how far a learning signal travels. What a rule leaves out of its
paper stands in its file in `rules/` and in the docstrings of its head and objective.

Any objective, reach, cut, schedule or transport can be given to any rule where it has a meaning:
`localsim run --rule blockwise --objective vicreg --reach 2 --granularity 8 --set schedule=sequential`.
"""

COLUMNS = (
    "rule", "paper", "backbone, partition", "credit (4 stages)", "readout", "head", "objective", "boundary", "schedule",
    "transport", "gradient path", "augmentation, optimiser",
)  # fmt: skip


def drawn(credit: Credit) -> str:
    """Return the matrix in a table's cell."""
    if not credit.num_taps:
        return "no loss"
    rows = [" ".join("·" if weight == 0 else f"{weight:g}" for weight in row) for row in credit.matrix]
    return "<br>".join(f"`{row}`" for row in rows)


def gradient_path(config: Config) -> str:
    """Return the longest gradient path of a configuration, of all unit blocks."""
    backbone, stages = build_trunk(config)
    path = build_credit(config, len(stages)).longest_path([len(units) for units in stages])
    return f"{path} of {len(backbone.units)}"


def row(rule: Rule) -> str:
    """Return the table's line for a rule."""
    config = resolve(rule.name, "imagenet")
    patches = "" if config.patches == "none" else f", patches {config.patches} of {config.image_size} px"
    sequential = "" if config.view_strength == "uniform" else ", views by receptive field"
    untrained = not rule.credit(4).num_taps
    cells = [
        f"`{rule.name}`",
        rule.paper,
        f"{config.backbone}, `{config.granularity}`{patches}",
        drawn(rule.credit(4)),
        *(["-"] * 3 if untrained else [options(config.readout), options(config.head, config.head_options),
                                       options(config.objective, config.objective_options)]),
        "noise " + config.noise if config.noise != "none" else "-",
        "-" if untrained else config.schedule + sequential,
        "-" if untrained else config.transport,
        gradient_path(config),
        "-" if untrained else recipe(rule, config),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def recipe(rule: Rule, config: Config) -> str:
    """Return augmentation and optimiser, where the rule names them."""
    supervised = all(OBJECTIVES[name].needs_labels for name in config.objective.split(","))
    augmentation = config.augmentation if supervised or "augmentation" in rule.settings else "the preset's"
    if not (supervised or "optimizer" in rule.settings):
        return f"{augmentation}, the preset's" if augmentation != "the preset's" else "the preset's"
    per = " per 256 images" if config.lr_scaling == "linear" else ""
    return f"{augmentation}, {config.optimizer} {config.lr:g}{per}, weight decay {config.weight_decay:g}"


def options(name: str, values: dict | None = None) -> str:
    """Return a name with its options."""
    ends = [
        f", {option} {value['from']:g} to {value['to']:g}" if isinstance(value, dict) else f", {option} {value}"
        for option, value in (values or {}).items()
    ]
    return f"`{name}`" + "".join(ends)


def document() -> str:
    """Return docs/rules.md."""
    summaries = [f"- `{rule.name}`: {rule.summary}" for rule in own_rules()]
    table = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *(row(rule) for rule in own_rules())]
    words = "## Who may change what, in words"
    return "\n".join([HEAD, *table, "", words, "", *summaries, "", AXES, *objectives(), "", *heads(), ""])


def short_table() -> str:
    """Return the table of the README: a line per rule."""
    rows = ["| rule | who may change what | each loss | paper |", "|---" * 4 + "|"]
    for rule in own_rules():
        config = resolve(rule.name, "imagenet")
        loss = f"`{config.objective}`" if rule.credit(4).num_taps else "-"
        rows.append(f"| `{rule.name}` | {rule.summary} | {loss} | {cited(rule.paper)} |")
    return "\n".join(rows) + "\n"


def cited(paper: str) -> str:
    """Return the authors of a paper in short, linked where it has an arXiv number."""
    if paper.startswith("a control"):
        return "control"
    first = paper.split(",")[0]
    authors = first if " & " in first or first.endswith(" et al.") else f"{first} et al."
    number = re.search(r"arXiv (\d+\.\d+)", paper)
    return f"[{authors}](https://arxiv.org/abs/{number[1]})" if number else authors


AXES = """\
## What can be combined

Any objective below works under any credit matrix and cut. `--objective NAME` brings the head and the readout that it
needs, `--set head=conv` and `--readout NAME` choose others that fit; a comma list gives every loss its own, from the
lowest up: `--objective simclr,vicreg,barlow_twins,barlow_twins`. (`infonce` and `hinge` with the head `predictor`
compare patches: images are then cut into patches of 16 pixels, which a deep network must not shrink away, and batch
norm mixes the patches of an image, which makes the task easier than it should be; `vgg6` and `preact_resnet50` have
none.) Options: `--set 'objective_options={"lambda_": 0.01}'`, one by one in place of the rule's; with
`{"from": 1, "to": 0}` in place of a number they run from the lowest loss to the highest; where losses differ, options
go by name, `{"barlow_twins": {"lambda_": 0.01}}`.

- **Schedule**: `simultaneous`, or `--set schedule=sequential`: one loss after the other, from the lowest up, each with
  its share of the steps and a learning rate that warms up and falls anew; the stages below its reach are frozen, in
  evaluation mode and so without noise. `feature_cache=true` keeps their outputs for one draw of views on disk: a stage
  then costs itself alone. `view_strength=receptive_field` scales the augmentation with what a stage sees of the image.
- **Transport** (`localsim/transport.py`), within the reach: `exact`; `feedback_alignment` (Lillicrap et al. 2016),
  fixed random weights on the way back; `sign_symmetric` (Liao et al. 2016), the signs of the weights; `direct_feedback`
  (Noekland 2016), every layer hears a random projection of the loss's error. The credit matrix is the same under all.
- **Provenance**: readouts and heads of `private` draws; heads that start as `identical` copies (where their shapes
  agree); readouts and heads `frozen` at random; and the readout `subsample`, the mean over a random part of the
  positions.
"""


def objectives() -> list[str]:
    """Return the table of objectives."""
    rows = ["| objective | what it does | reads | default head | options | labels |", "|---" * 6 + "|"]
    for name, kind in OBJECTIVES.items():
        shown = ", ".join(f"{f.name} {f.default}" for f in dataclasses.fields(kind))
        labels = "yes" if kind.needs_labels else ""
        rows.append(f"| `{name}` | {first_line(kind)} | {kind.reads} | `{kind.head}` | {shown} | {labels} |")
    return rows


def heads() -> list[str]:
    """Return the table of heads."""
    rows = ["| head | what it does | takes | gives | also reads | options |", "|---" * 6 + "|"]
    for name, kind in HEADS.items():
        given = [p for p in inspect.signature(kind).parameters.values() if p.name != "site"]
        shown = ", ".join(f"{p.name} {p.default}" for p in given)
        context = getattr(kind, "context", "")
        rows.append(f"| `{name}` | {first_line(kind)} | {kind.takes} | {kind.gives} | {context} | {shown} |")
    return rows


def first_line(kind: type) -> str:
    """Return the first sentence of a class's docstring."""
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    print(short_table() if "--short" in sys.argv else document(), end="")
