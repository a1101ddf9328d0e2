"""`localsim report`: its options, and what it prints. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse

from localsim.options import add_where

REPORT_EXAMPLES = """\
examples:
  localsim report runs/first runs/second               one HTML page: reports/first+second.html
  localsim report runs/* --out everything.html --title "Reach 1 to 4, two seeds"
  localsim report runs/first --without similarity,geometry    without what runs the networks
  localsim report runs/* --brain brain/first+second    with scores that localsim brain has saved
"""


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    what = parser.add_argument_group("what is on the page")
    what.add_argument("--title", metavar="TEXT", help="of the page")
    what.add_argument("--measure", metavar="NAME", default="cka_debiased",
                      help="of similarity: cka_debiased (default), rsa, ...; see localsim compare")  # fmt: skip
    what.add_argument("--images", metavar="N", type=int, default=500,
                      help="test images for similarity and geometry (default 500)")  # fmt: skip
    what.add_argument("--brain", metavar="DIR", action="append", default=[],
                      help="a folder that localsim brain saved; may be repeated (default: those in brain/ that name "
                           "one of the runs)")  # fmt: skip
    what.add_argument("--without", metavar="NAMES", default="",
                      help="sections to leave out, with commas: similarity, geometry, cost")  # fmt: skip
    add_where(parser, "the page, .html (default: reports/NAMES.html)", metavar="FILE")


def report(arguments: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    from localsim.analysis.report import write_report

    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "debug", "without")}
    without = arguments.without.split(",") if arguments.without else ()
    path = write_report(without=without, progress=True, **options)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB); any browser shows it, and it needs nothing else")
    return 0
