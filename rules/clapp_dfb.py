"""CLAPP++ with direct feedback: every layer is predicted from the activity of the highest one."""

from localsim.credit import Credit
from localsim.rules.greedy_infomax import ADAM
from localsim.rules.rule import Rule

RULE = Rule(
    name="clapp_dfb",
    summary="Every layer's activity is predicted from the highest layer's for another view; no gradient comes down.",
    paper="Wu, Delrocq, Bellec & Gerstner, Can Local Learning Match Self-Supervised Backpropagation?, ICML 2026, "
    "arXiv 2601.21683",
    credit=Credit.banded,
    granularity="block",
    head="feedback_predictor",
    objective="hinge",
    settings={"backbone": "vgg6", **ADAM},
)
