"""InfoPro: every module classifies and still reconstructs the image, the lower ones more, the upper ones less."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="infopro",
    summary="Every module classifies and keeps what it takes to reconstruct the image, less so with depth.",
    paper="Wang, Ni, Song, Yang & Huang, Revisiting Locally Supervised Learning: an Alternative to End-to-end "
    "Training, ICLR 2021, arXiv 2101.10832",
    credit=Credit.banded,
    readout="map",
    head="infopro",
    objective="infopro",
    # from the lowest to the highest module; the published weights were tuned for every network, these are ours
    settings={"objective_options": {"reconstruction": {"from": 1.0, "to": 0.0}}},
)
