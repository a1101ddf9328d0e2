"""What a report says, read from the page itself; and what it does with what is missing, wrong or hostile."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from tiny import exit_code

from localsim.analysis.report import SECTIONS, write_report
from localsim.analysis.report.brains import SAVED
from localsim.analysis.report.elements import png_picture, said
from localsim.errors import UserError
from localsim.runs import load_run

QUICK = ("similarity", "geometry", "cost")
VOID = {"meta", "img", "br", "link"}
HOSTILE = "<script>alert(1)</script>\"'&$\\frac{"


class Page(HTMLParser):
    """Everything that is asked of a page: elements in order, their attributes, and what is written in them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append((tag, []))

    def handle_endtag(self, tag):
        opened, words = self.open.pop()
        assert opened == tag, f"{opened} is closed by {tag}"
        self.texts.append((tag, "".join(words)))
        self.handle_data(" ")  # what stands side by side in a table is not one word

    def handle_data(self, data):
        for _, words in self.open:
            words.append(data)

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def said(self, tag: str) -> list[str]:
        return [" ".join(words.split()) for closed, words in self.texts if closed == tag]


def sections(text: str) -> dict[str, str]:
    found = re.findall(r'<section id="(\w+)".*?</section>', text, flags=re.DOTALL)
    return {name: Page(part).said("section")[0]
            for name, part in zip(found, re.findall(r"<section id=.*?</section>", text, flags=re.DOTALL),
                                  strict=True)}  # fmt: skip


@pytest.fixture(scope="module")
def whole(whole_page) -> str:
    """Return the page of three runs, with everything on it."""
    return whole_page.read_text()


@pytest.fixture
def copied(reported_runs, tmp_path) -> Path:
    """Return a copy of the run `one` that may be changed."""
    return Path(shutil.copytree(reported_runs / "one", tmp_path / "copied"))


def made(tmp_path: Path, *runs: Path, **settings) -> str:
    """Return the page of runs, by default without what takes time."""
    number = len(list(tmp_path.glob("page*.html")))
    return write_report(runs, tmp_path / f"page{number}.html", **{"without": QUICK, **settings}).read_text()


# -- what the page is -------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_its_parts_find_each_other(whole):
    page = Page(whole)
    assert page.all("html") == [{"lang": "en"}] and len(page.said("title")[0]) > 10
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    links = [attributes["href"] for attributes in page.all("a")]
    assert len(links) >= len(SECTIONS) + 2 and all(link[1:] in ids for link in links if link[0] == "#")
    named = [name for _, one in page.elements for name in one.get("aria-labelledby", "").split()]
    assert len(named) > 10 and set(named) <= set(ids)
    assert [one["id"] for one in page.all("section")] == list(SECTIONS)
    assert page.elements[[tag for tag, _ in page.elements].index("body") + 1] == ("a", {"class": "skip",
                                                                                       "href": "#main"})  # fmt: skip


def test_headings_stand_in_order_below_one_title(whole):
    levels = [int(tag[1]) for tag, _ in Page(whole).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(2) == len(SECTIONS)
    assert all(below - above <= 1 for above, below in pairwise(levels))


def test_the_page_loads_and_runs_nothing(whole):
    page = Page(whole)
    assert not page.all("script", "link", "iframe", "object", "embed", "form", "base")
    sources = [one["src"] for one in page.all("img")]
    assert len(sources) >= 8 and all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in sources)
    assert not [name for _, one in page.elements for name in one if name.startswith("on") or name == "style"]
    style = page.said("style")[0]
    assert "url(" not in style and "@import" not in style
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    (text,) = re.findall("<style>(.*?)</style>", whole, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")
    assert "unsafe" not in policy
    outside = re.sub(r'src="data:[^"]*"', "", whole)
    assert not re.findall(r"https?://|//\w+\.\w+/", outside)
    assert len(whole) < 5_000_000


def test_every_picture_says_in_numbers_what_it_shows(whole):
    alternatives = [one["alt"] for one in Page(whole).all("img")]
    assert all(len(alt) > 40 and re.search(r"\d", alt) for alt in alternatives)
    assert len(set(alternatives)) == len(alternatives)
    assert any(re.search(r"blockwise.* seed 0: blockwise 0\.\d\d at stage 1", alt) for alt in alternatives)


def test_tables_have_captions_headings_and_as_many_cells_in_every_row(whole):
    page = Page(whole)
    tables = re.findall("<table>.*?</table>", whole, flags=re.DOTALL)
    assert len(tables) >= 12 and len(page.said("caption")) == len(tables)
    for table in tables:
        one = Page(table)
        assert {cell.get("scope") for cell in one.all("th")} == {"col", "row"}
        rows = [row.count("<th ") + row.count("<td") for row in table.split("<tr>")[1:]]
        assert len(set(rows)) == 1 and len(rows) > 1, one.said("caption")
    regions = [one for one in page.all("div", "pre") if one.get("role") == "region"]
    assert len(regions) > len(tables) and all(one["tabindex"] == "0" for one in regions)
    assert all(one.get("aria-label") or one.get("aria-labelledby") for one in regions)


# -- what it says -----------------------------------------------------------------------------------------------------


def test_every_section_says_what_is_there(whole, reported_runs):
    found = sections(whole)
    assert "3 runs of 2 regimes" in found["runs"] and "2 of 2 finished" in found["runs"]
    assert re.search(r"The 5 settings in which .* seed 0 1 0", found["runs"])
    assert "The same for all: backbone resnet20, 16 px; data embedded; training images 16;" in found["runs"]
    assert "tap on stage 1 1 – tap on stage 2 0 1" in found["credit"]
    held = max(row["held_bytes"] for row in load_run(reported_runs / "one").metrics()) / 2**20
    assert f"{held:.1f}" in found["training"] and f"{held:.1f}" in found["cost"]
    table = load_run(reported_runs / "one").probe()
    assert table is not None
    (row,) = table.select(network="blockwise", stage=2, features="raw", probe="linear")
    assert f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]" in found["probes"]
    assert f"{row.gain:+.3f} [{row.gain_low:+.3f}, {row.gain_high:+.3f}]" in found["probes"]
    assert f"n = {row.n_test} test images" in found["probes"]
    assert "Not probed: blockwise, seed 1. This does it: localsim probe two" in found["probes"]
    for name in ("similarity", "geometry"):
        assert "n = 40 images" in found[name] and "untrained" in found[name], name
        assert re.search(r"\d [\[(]?-?\d+\.\d+, -?\d+\.\d+\]", found[name]), f"{name} has intervals"
    assert "calibrated" in found["geometry"]
    assert "localsim brain one two end --recordings FOLDER" in found["brain"]
    assert "predicted MiB" in found["cost"]
    assert '"rule": "blockwise"' in found["remake"] and "torch" in found["remake"]
    assert found["remake"].count("localsim run ") == 3 and "localsim report one two end --images 40" in found["remake"]


def test_predicted_and_measured_memory_agree(whole):
    ratios = re.findall(r"(?<=seed 0|seed 1)(?: \d+\.\d+){2} (\d\.\d{3})", sections(whole)["cost"])
    assert ratios == ["1.000"] * 3


def test_no_host_and_no_place_of_this_machine_is_shown(whole, reported_runs):
    (start,) = json.loads((reported_runs / "one" / "environment.json").read_text())
    assert f">{start['host']}<" not in whole and str(reported_runs) not in whole and str(Path.home()) not in whole


def test_the_same_runs_give_the_same_page(reported_runs, tmp_path):
    pages = [made(tmp_path, reported_runs / "one", without=("similarity", "cost"), images=40) for _ in range(2)]
    assert pages[0].replace("page0.html", "page1.html") == pages[1]


# -- what is missing --------------------------------------------------------------------------------------------------


def test_a_run_without_a_checkpoint_says_so_and_the_rest_is_written(untrained_run, reported_runs, tmp_path):
    text = made(tmp_path, untrained_run, without=("cost",), images=40)
    found = sections(text)
    assert "unfinished" in found["runs"] and "no checkpoint" in found["runs"] and "0 of 2" in found["runs"]
    assert "Not compared: no run has a checkpoint." in found["similarity"]
    assert "Not computed: no run has a checkpoint." in found["geometry"]
    assert "has no lines of metrics" in found["training"] and "localsim probe failed" in found["probes"]
    assert "do not say with which versions" in found["remake"] and list(found) == list(SECTIONS)


def test_a_collapsed_run_that_stopped_is_named(copied, tmp_path):
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[-1]) | {"embedding_rank": {"stage1": 1.02, "stage2": 9.0}}
    (copied / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n")
    (copied / "plan.txt").write_text("training: 4 epochs, 30 of 40 steps of 8 images x 2 views\n")
    found = sections(made(tmp_path, copied))
    assert "2 of 40" in found["runs"]
    assert "unfinished: stopped or failed, or still running; collapsed: stage1" in found["runs"]


def test_images_that_are_not_here_cost_only_the_sections_that_need_them(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text()) | {"data": "/nowhere/secret/pictures"}
    (copied / "config.json").write_text(json.dumps(config))
    text = made(tmp_path, copied, without=(), images=40)
    found = sections(text)
    assert found["similarity"].endswith(".") and "Not compared:" in found["similarity"]
    assert "Not computed:" in found["geometry"] and "secret" not in text
    assert '--data "$IMAGES"' in found["remake"] and '"data": ".../pictures"' in found["remake"]
    assert "predicted MiB" in found["cost"]


def test_runs_that_cannot_be_compared_say_why(reported_runs, copied, tmp_path):
    found = sections(made(tmp_path, reported_runs / "one", copied, without=("geometry", "cost"), images=40))
    assert "Not compared:" in found["similarity"] and "are both blockwise with seed 0" in found["similarity"]
    assert "blockwise, seed 0 (copied)" in found["probes"], "labels tell them apart"


def test_what_is_left_out_as_asked_says_so(reported_runs, tmp_path):
    found = sections(made(tmp_path, reported_runs / "one"))
    assert all(f"Left out as asked: --without {name}." in found[name] for name in QUICK)
    assert "--without similarity,geometry,cost" in found["remake"]


def test_a_rule_that_is_not_known_here_costs_its_own_sections_only(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text()) | {"rule": "somebodys"}
    (copied / "config.json").write_text(json.dumps(config))
    found = sections(made(tmp_path, copied, without=("geometry", "similarity")))
    assert "cannot be drawn: unknown rule 'somebodys'" in found["credit"]
    assert "No command can be given" in found["remake"] and "accuracy" in found["probes"].lower()


# -- what is hostile --------------------------------------------------------------------------------------------------


def test_whatever_a_run_folder_holds_is_text_on_the_page(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(
        json.dumps(config | {"rule": HOSTILE, "augmentation": HOSTILE, "data": HOSTILE})
    )
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"loss": {HOSTILE: 1.0, "$\\bad$": 2.0}, "effective_rank": {HOSTILE: 3.0}} for row in rows]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probed = json.loads((copied / "probe.json").read_text())
    for row in probed:
        row["network"] = HOSTILE if row["network"] == "blockwise" else row["network"]
        row["settings"]["protocol"] = HOSTILE
    (copied / "probe.json").write_text(json.dumps(probed))
    starts = json.loads((copied / "environment.json").read_text())
    (copied / "environment.json").write_text(json.dumps([starts[0] | {"torch": HOSTILE, "gpu": HOSTILE}]))
    hostile = copied.rename(copied.with_name("<img src=x onerror=alert(1)>"))
    text = made(tmp_path, hostile, without=(), images=40, title=HOSTILE)
    page = Page(text)
    assert not page.all("script") and all(one["src"].startswith("data:") for one in page.all("img"))
    assert "<script" not in text and page.said("title") == [HOSTILE] == page.said("h1")
    assert HOSTILE in sections(text)["probes"] and HOSTILE in sections(text)["remake"]
    (label,) = [line for line in sections(text)["probes"].split("This") if "protocol" in line]
    assert HOSTILE in label


def test_commands_with_hostile_names_are_quoted(copied, tmp_path):
    hostile = copied.rename(copied.with_name("a; rm -rf ~ $(id)"))
    (hostile / "probe.json").unlink()
    code = re.findall("<code>(localsim probe [^<]*)</code>", made(tmp_path, hostile))
    assert code == ["localsim probe &#39;a; rm -rf ~ $(id)&#39;"]


def test_damaged_files_are_named_in_a_sentence(copied, tmp_path):
    (copied / "probe.json").write_text('[{"other": 1}]')
    (copied / "environment.json").write_text("{")
    found = sections(made(tmp_path, copied))
    assert "probe.json of copied is not of this version of localsim." in found["probes"]
    assert "do not say with which versions" in found["remake"]


def test_errors_lose_the_folders_of_the_machine():
    assert said(UserError("cifar10 is not in /home/me/data and no more")) == "cifar10 is not in .../data and no more."
    assert said(UserError("a/b of torch/vision stays")) == "a/b of torch/vision stays."


# -- brain scores -----------------------------------------------------------------------------------------------------


@pytest.fixture
def scores(tmp_path, reported_runs) -> Path:
    """Return a folder as `localsim brain` saves it, of the run `one` and another."""
    from made_up_scores import made_up

    path = made_up(regions=("V4", "IT")).save(tmp_path / "brain" / HOSTILE.replace("/", ""))
    found = json.loads((path / SAVED).read_text())
    made_of = [str(reported_runs / "one"), "runs/other"]
    (path / SAVED).write_text(json.dumps(found | {"record": found["record"] | {"runs": made_of}}))
    return path


def test_brain_scores_are_shown_with_their_pictures(scores, reported_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [made(tmp_path, reported_runs / "one", brain=brain) for brain in ((scores,), (scores.parent,), ())]
    for text in texts:
        found = sections(text)["brain"]
        rows = json.loads((scores / SAVED).read_text())["rows"]
        assert all(f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in found for row in rows)
        assert "are also of runs that this report is not of: other." in found
        assert len([one for one in Page(text).all("img") if "rain scores" in one["alt"]]) == 2
    other = made(tmp_path, reported_runs / "end")
    assert "There are no scores of these runs" in sections(other)["brain"], "of other runs, and not asked for"


def test_scores_of_another_run_of_the_same_name_are_not_taken_for_these(scores, reported_runs, tmp_path, monkeypatch):
    """Cells of all sweeps are called alike."""
    monkeypatch.chdir(tmp_path)
    text = (scores / SAVED).read_text()
    (scores / SAVED).write_text(text.replace(str(reported_runs / "one"), "another/one"))
    assert "There are no scores of these runs" in sections(made(tmp_path, reported_runs / "one"))["brain"]
    asked = sections(made(tmp_path, reported_runs / "one", brain=[scores]))["brain"]
    assert "They were made of folders called one in another place" in asked


def test_brain_folders_that_are_none_are_errors(reported_runs, scores, tmp_path):
    (scores / SAVED).write_text('{"rows": [1], "metric": {"name": "x"}, "record": 1}')
    for folder, reason in ((tmp_path / "empty", "holds no scores"), (scores, "cannot be read|not of this version")):
        with pytest.raises(UserError, match=reason):
            made(tmp_path, reported_runs / "one", brain=[folder])
    assert not list(tmp_path.glob("page*.html"))
    with pytest.raises(UserError, match="not a PNG"):
        png_picture(b"<svg onload=alert(1)>", "alt", "caption")


# -- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"without": ("probes",)}, "unknown section to leave out 'probes'; allowed: similarity, geometry, cost"),
        ({"images": 7}, "images is 7; allowed: whole numbers from 8"),
        ({"measure": "likeness"}, "likeness"),
        ({"device": "abacus"}, "abacus"),
        ({"rule": "nowhere.py"}, "there is no rule file nowhere.py"),
    ],
)
def test_what_cannot_be_is_one_sentence(reported_runs, tmp_path, settings, reason):
    with pytest.raises(UserError, match=reason):
        write_report([reported_runs / "one"], tmp_path / "page.html", **settings)
    assert not list(tmp_path.iterdir())


def test_runs_that_are_none_or_given_twice_are_errors(reported_runs, tmp_path):
    one = reported_runs / "one"
    for runs, reason in (([], "at least one"), ([tmp_path], "not a run folder"), ([one, one], "given twice")):
        with pytest.raises(UserError, match=reason):
            write_report(runs, tmp_path / "page.html")


def test_a_page_goes_where_it_is_told_and_replaces_nothing(reported_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = reported_runs / "one"
    path = write_report([one], without=QUICK)
    assert path == Path("reports/one.html") and path.exists()
    before = path.read_bytes()
    for out, reason in ((path, "exists already"), ("page.pdf", "format of a report"), ("page", "format of a report")):
        with pytest.raises(UserError, match=reason):
            write_report([one], out, without=QUICK)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["reports"]


def test_the_command_writes_the_page_and_says_where(reported_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = reported_runs / "one"
    assert exit_code(f"report {run} --without similarity,geometry,cost --out page.html --title Mine") == 0
    out, err = capsys.readouterr()
    assert out.startswith("page.html (") and not err
    assert Page((tmp_path / "page.html").read_text()).said("h1") == ["Mine"]
    assert exit_code(f"report {run} --out page.html") == 2
    assert capsys.readouterr().err == "localsim: page.html exists already; choose another --out, or move it away\n"
    assert exit_code("report nowhere") == 2
