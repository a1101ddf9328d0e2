"""Writes docs/measures.md from the measures themselves: `python docs/measures_table.py > docs/measures.md`."""

from __future__ import annotations

from localsim.analysis.similarity import INVARIANCES, MEASURES, Measure
from localsim.analysis.similarity.comparators import COMPARATORS
from localsim.analysis.similarity.dissimilarity import KINDS

HEAD = """\
# The measures of similarity

Made by `python docs/measures_table.py` from what the code declares; a test compares the two. [analysis.md](analysis.md)
says how to use and how to choose them.

Every measure takes features `(n, p)` and `(n, q)` of the same n images and gives a number: `MEASURES["cka"](x, y)`, or
`localsim compare RUN RUN --measure cka,rsa`. Columns:

- **kind**: of a `similarity` larger is more alike, of a `distance` smaller.
- **symmetric**: where not, the first argument is the one that predicts.
- **metric**: a distance that obeys the triangle inequality, as clustering and maps assume.
- **bias**: `biased` measures grow or shrink with the numbers of images and features where layers are unrelated;
  `debiased` ones are then 0 on average; `cross-validated` ones score images that nothing was fitted to.
- **unchanged by**: what may be done to the features of either layer: an offset, a rotation (or reflection), a positive
  factor, any invertible linear map.
"""
COLUMNS = ("measure", "what it is", "kind", "range", "symmetric", "metric", "bias", "unchanged by", "source")
WORDS = {"translation": "offset", "orthogonal": "rotation", "scale": "factor", "linear": "linear map"}


def row(measure: Measure) -> str:
    """Return the table's line for a measure."""
    yes = {True: "yes", False: "no"}
    return line(f"`{measure.name}`", measure.summary, measure.kind, span(measure), yes[measure.symmetric],
                yes[measure.metric], measure.bias, unchanged_by(measure), measure.source)  # fmt: skip


def unchanged_by(measure: Measure) -> str:
    """Return the invariances in words; rotations and factors are linear maps."""
    implied = {"orthogonal", "scale"} if "linear" in measure.invariances else set()
    return ", ".join(WORDS[name] for name in INVARIANCES if name in measure.invariances - implied)


def span(measure: Measure) -> str:
    """Return the range of a measure."""
    return f"{measure.low:.4g} to {measure.high:.4g}"


def combinations() -> list[str]:
    """Return the tables of distances and comparators, which every name `rsa_<distance>_<comparator>` is made of."""
    made = {
        (kind, name): MEASURES[f"rsa_{kind}_{name}"]
        for kind in KINDS
        for name in COMPARATORS
        if f"rsa_{kind}_{name}" in MEASURES
    }
    lines = [line("distance between images", "unchanged by", "features"), line(*["---"] * 3)]
    for kind in KINDS:
        one = next(measure for (own, _), measure in made.items() if own == kind)
        lines.append(line(f"`{kind}`", unchanged_by(one), "`(repeats, n, p)`" if one.repeats else "`(n, p)`"))
    lines += ["", line("comparator", "what it is", "range", "bias", "of", "source"), line(*["---"] * 6)]
    for name, comparator in COMPARATORS.items():
        kinds = [kind for kind in KINDS if (kind, name) in made]
        spans = {kind: span(made[kind, name]) for kind in kinds}
        usual = max(spans.values(), key=list(spans.values()).count)
        ranges = [usual, *(f"{text} of `{kind}`" for kind, text in spans.items() if text != usual)]
        missing = [f"`{kind}`" for kind in KINDS if kind not in kinds]
        (bias,) = {made[kind, name].bias for kind in kinds}
        lines.append(line(f"`{name}`", comparator.words, ", ".join(ranges), bias,
                          f"all but {', '.join(missing)}" if missing else "all", comparator.source))  # fmt: skip
    return lines


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def document() -> str:
    """Return docs/measures.md."""
    alone = [row(measure) for measure in MEASURES.values() if not measure.name.startswith("rsa_")]
    return "\n".join([HEAD, line(*COLUMNS), line(*["---"] * len(COLUMNS)), *alone, "", RSA, *combinations(), ""])


RSA = """\
## Representational similarity: `rsa_<distance>_<comparator>`

All are similarities and symmetric, and none is a metric. `rsa` is `rsa_correlation_spearman`. Distances of
`(repeats, n, p)` are in units of the noise between repeated measurements.
"""


if __name__ == "__main__":
    print(document(), end="")
