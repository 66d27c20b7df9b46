"""The whole page: what is in it, and how it behaves in a real browser."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

from stability_probe import StabilityProbeError, Verdict
from stability_probe.report import pictures, render_report, write_report
from stability_probe.runs import open_runs
from stability_probe.verify import verify
from tests.oracles.browser import browser, faults, needs_browser, opened
from tests.oracles.evidence import stored, training
from tests.oracles.pages import Parsed
from tests.oracles.reported import HOSTILE, every_kind, own_loop

SECTIONS = ["verdicts", "claims", "figures", "runs", "blame", "cost", "again", "words"]


@pytest.fixture(scope="module")
def report_file(tmp_path_factory) -> Path:
    """The report of runs of every kind, with small figures."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "DPI", 50)
        write_report(every_kind(folder / "runs"), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def runs(report_file):
    return open_runs([report_file.parent / "runs"])


@pytest.fixture(scope="module")
def verdicts(runs):
    return verify(runs)


@pytest.fixture(scope="module")
def html(report_file):
    return report_file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Parsed(html)


class TestContent:
    def test_every_verdict_has_its_row_and_they_are_all(self, page, verdicts):
        head, *rows = page.rows["verdicts"]
        assert head[:4] == ["verdict", "claim", "run", "theorem"]
        told = sorted((row[0].split()[-1], row[2], row[3], row[-1]) for row in rows)
        assert told == sorted((v.status, v.run, v.theorem, v.advice) for v in verdicts)
        assert len(verdicts) > 15 and len({v.status for v in verdicts}) > 1

    def test_numbers_of_a_row(self, page, verdicts):
        (v,) = (v for v in verdicts if v.run == "cs:0.7 seed 1" and v.theorem == "3.4")
        is_it = ["Reaction to the input", v.run, "3.4"]
        (row,) = (row for row in page.rows["verdicts"] if row[1:4] == is_it)
        numbers = [f"{v.measured:.3g}", f"{v.bound:.3g}", f"{v.slack:.3g}"]
        assert row[4:9] == [*numbers, "share of points: 1 [0.631, 1] 95 %", "8"]

    def test_every_claim_is_explained_and_linked_to(self, page, verdicts):
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len({*ids})
        links = [a["href"][1:] for a in page.of("a") if a["href"].startswith("#")]
        assert {*links} <= {*ids}
        claims = {v.claim for v in verdicts}
        assert sum(name.startswith("claim-") for name in links) >= len(claims)
        assert all(claim in page.text for claim in claims)

    def test_sections(self, page):
        assert [a["id"] for a in page.of("section")] == SECTIONS

    def test_figures_are_inside_with_a_text_and_a_size(self, page):
        images = page.of("img")
        assert len(images) == 7 + 4
        for image in images:
            assert image["src"].startswith("data:image/png;base64,iVBOR")
            assert len(image["alt"]) > 10 and int(image["width"]) > 100 < int(image["height"])

    def test_nothing_is_fetched(self, html, page):
        assert re.findall(r"https?://[^\"'<\s]+", html) == ["https://arxiv.org/abs/2310.13545"]
        assert not {"iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
        assert "url(" not in html and "@import" not in html
        sources = [a.get("src") for tag, a in page.tags if tag != "img" and "src" in a]
        assert sources == []

    def test_hostile_names_stay_names(self, html, page):
        assert HOSTILE not in html and "</script><script>" not in html
        assert HOSTILE in page.text and "</script><script>alert(2)</script>" in page.text
        assert len(page.of("script")) == 1

    def test_commands(self, html):
        commands = re.findall(r"<code>(stability-probe train.*?)</code>", html)
        assert [c.split(" --seed ")[1][0] for c in commands] == ["0", "1"]
        assert commands[0].startswith("stability-probe train --scheme cs:0.7 --steps 100 ")
        assert "record_ensemble(EnsembleConfig(networks=20)" in html
        assert html.count("The command is not known") == 2  # a checkpoint by hand, a loop by hand

    def test_costs(self, page):
        rows = [row for row in page.rows["cost"] if row[0] == "cs:0.7 seed 0"]
        assert rows == [["cs:0.7 seed 0", "1.85 %", "0.25", "0.5", "0.125", "2", "50"]]

    def test_the_templates_are_in_the_package(self):
        for name in ("report.html", "report.css", "report.js"):
            assert files("stability_probe.report").joinpath(name).is_file()
        settings = (files("stability_probe") / ".." / "pyproject.toml").read_text()
        assert '"stability_probe.report" = ["*.html", "*.css", "*.js"]' in settings


class TestWriting:
    def test_nothing_but_a_run_that_has_just_begun(self, tmp_path):
        write_report([own_loop(tmp_path / "run")], tmp_path / "new" / "r.html")
        page = Parsed((tmp_path / "new" / "r.html").read_text(encoding="utf-8"))
        assert not page.of("img")
        assert "run: has recorded nothing yet." in page.text
        assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "r.html"]

    def test_no_run(self, tmp_path):
        with pytest.raises(StabilityProbeError, match="at least one run is needed, got none"):
            write_report([], tmp_path / "r.html")
        assert not (tmp_path / "r.html").exists()

    def test_a_file_that_cannot_be_written_is_refused_before_the_work(self, tmp_path, monkeypatch):
        monkeypatch.setattr("stability_probe.report.page.gather", pytest.fail)
        run = stored(training(), tmp_path / "run")
        with pytest.raises(
            StabilityProbeError, match=r"the report cannot be written \(it is a folder"
        ):
            write_report([run], tmp_path / "run")
        (tmp_path / "file").write_text("mine")
        with pytest.raises(StabilityProbeError, match=r"file/r\.html: the report cannot be"):
            write_report([run], tmp_path / "file" / "r.html")

    def test_a_claim_that_nobody_has_explained_is_shown_as_it_is(self):
        page = Parsed(render_report([], [Verdict("3.1", "run", "a new claim", "HOLDS")]))
        assert page.rows["verdicts"][-1][:4] == ["✓ HOLDS", "a new claim", "run", "3.1"]


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


VIEWS = [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)]


@needs_browser
class TestInABrowser:
    @pytest.mark.parametrize(("colours", "width"), VIEWS)
    def test_nothing_is_wrong(self, chromium, report_file, colours, width):
        with opened(chromium, report_file, colours=colours, width=width) as (page, complaints):
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert faults(page, complaints) == []
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (back == "rgb(255, 255, 255)") == (colours == "light")
            assert page.title() == "Training stability report"

    @pytest.mark.parametrize("width", [1200, 1000, 390])
    def test_the_verdicts_need_no_scrolling(self, chromium, report_file, width):
        with opened(chromium, report_file, width=width) as (page, _):
            needed, there = page.locator("#verdicts .scroll").evaluate(
                "box => [box.scrollWidth, box.clientWidth]"
            )
            assert needed <= there
            lines = page.locator("#verdicts td.number").evaluate_all(
                "cells => cells.map(c => c.innerText && getComputedStyle(c).whiteSpace)"
            )
            assert {*lines} <= {"", "nowrap"} and "nowrap" in lines

    def test_a_phone_shows_figures_at_a_legible_size(self, chromium, report_file):
        with opened(chromium, report_file, width=390) as (page, _):
            shown = "i => i.getBoundingClientRect().width / i.getAttribute('width')"
            assert min(page.evaluate(f"[...document.images].map({shown})")) > 0.55

    @pytest.mark.parametrize(("section", "column"), [
        ("verdicts", "slack"), ("verdicts", "verdict"), ("blame", "κ"), ("cost", "run"),
    ])  # fmt: skip
    def test_a_click_on_a_heading_sorts(self, chromium, report_file, section, column):
        with opened(chromium, report_file) as (page, complaints):
            table = page.locator(f"#{section} table.sortable").first
            at = table.locator("thead th").all_inner_texts().index(column)
            head = table.locator("thead th").nth(at)

            def keys() -> list:
                return table.evaluate(
                    "(t, at) => [...t.tBodies[0].rows].map(r => r.cells[at].dataset.key ??"
                    " r.cells[at].innerText)", at)  # fmt: skip

            def ranked(values: list, backwards: bool = False) -> list:
                full = [v for v in values if v != ""]
                key = str if column == "run" else float
                return sorted(full, key=key, reverse=backwards) + [v for v in values if v == ""]

            before = keys()
            assert head.get_attribute("aria-sort") == "none"
            head.click(position={"x": 2, "y": head.bounding_box()["height"] - 3})
            assert keys() == ranked(before) and head.get_attribute("aria-sort") == "ascending"
            head.get_by_role("button").press("Enter")
            assert keys() == ranked(before, backwards=True) != ranked(before)
            assert head.get_attribute("aria-sort") == "descending"
            others = table.locator("thead th:not([aria-sort=none])").count()
            assert (others, complaints) == (1, [])

    def test_a_link_leads_to_the_explanation(self, chromium, report_file):
        with opened(chromium, report_file) as (page, _):
            page.locator("#verdicts tbody a").first.click()
            assert re.search(r"#claim-\d+$", page.url)
            assert page.locator("article.claim:target").is_visible()


PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
GOOD = f'<p>Some text</p><img src="{PIXEL}" width="50" height="50" alt="dot">'


@needs_browser
@pytest.mark.parametrize(
    ("body", "found"),
    [
        (GOOD, ""),
        ('<img src="data:image/png;base64,AAAA" width="50" height="50" alt="broken">',
         "image: broken"),
        (f'<img src="{PIXEL}" width="50" height="50" style="display: none" alt="hidden">',
         "image: hidden"),
        (f'<img src="{PIXEL}" width="50" height="0" alt="flat">', "image: flat"),
        ('<img src="missing.png" width="50" height="50" alt="gone">', "asked for: file:"),
        ('<script src="https://example.org/x.js"></script>', "asked for: https://example.org/x.js"),
        ("<script>console.error('so it is')</script>", "console: so it is"),
        ("<script>throw new Error('thrown')</script>", "script: thrown"),
        ('<div style="width: 2000px">wide</div>', "overflow: 2"),
        ('<p style="color: #999">pale</p>', "contrast: P. rgb(153, 153, 153)"),
    ],
)  # fmt: skip
def test_the_check_finds_what_is_planted(chromium, tmp_path, body, found):
    (tmp_path / "page.html").write_text(f"<!doctype html><html lang=en><body>{body}</body></html>")
    with opened(chromium, tmp_path / "page.html") as (page, complaints):
        told = faults(page, complaints)
    assert any(line.startswith(found) for line in told) if found else told == []
