"""`localsim report`: its options, and what it prints. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse

from localsim.options import add_debug

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
    where = parser.add_argument_group("where")
    where.add_argument("--out", metavar="FILE", help="the page, .html (default: reports/NAMES.html)")
    where.add_argument("--rule", metavar="FILE", help="the file of a rule of your own, for runs made with it; executed")
    where.add_argument("--data", metavar="DIR", help="where the runs' folder of images lies now")
    where.add_argument("--data-root", metavar="DIR", help="where the runs' named data set lies now")
    where.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N (default: the runs')")
    where.add_argument("--cache", metavar="DIR", help="keep features there, by their content, for another time")
    add_debug(where)


def report(arguments: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    from localsim.analysis.report import write_report

    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "debug", "without")}
    without = arguments.without.split(",") if arguments.without else ()
    path = write_report(without=without, progress=True, **options)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB); any browser shows it, and it needs nothing else")
    return 0
