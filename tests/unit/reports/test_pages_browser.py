"""Both pages in a real browser: nothing is asked for, images load, tables sort, texts stay texts, every width fits."""

import re
import urllib.parse
from pathlib import Path

import page_shop
import pytest
from browser import Browser, chromium
from study_runs import Shop, make_study, plans
from training_shop import one_thread

from cm3.common.files import read_json, write_json
from cm3.common.strict import validate
from cm3.reports.analysis.compare import compare
from cm3.reports.analysis.spec import StudySpec
from cm3.reports.pages.experiment_page import experiment_page
from cm3.reports.pages.study_page import study_page

__all__ = ["one_thread"]  # used by every test here

pytestmark = pytest.mark.browser

PHONE, DESK = 360, 1280


@pytest.fixture(scope="module")
def browser():
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    chromium()  # skips before the work where there is none
    folder = tmp_path_factory.mktemp("trial")
    page = folder / "report.html"
    experiment_page(inputs=page_shop.experiment(folder), page_output=page, figures_output=folder / "figures")
    return page


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    chromium()
    folder = tmp_path_factory.mktemp("study")
    spec, inputs = make_study(Shop(folder), plans())
    study = compare(
        study=validate(StudySpec, spec, "study"),
        inputs=inputs,
        comparison_output=folder / "comparison.json",
        table_output=folder / "comparison.csv",
    )
    study["words"].append({"kind": "warning", "text": page_shop.ISLAND})
    write_json(folder / "comparison.json", study)
    page = folder / "comparison.html"
    study_page(comparison=folder / "comparison.json", page_output=page, figures_output=folder / "figures")
    return page


@pytest.fixture
def page(request, report, comparison) -> Path:
    return {"report": report, "comparison": comparison}[request.param]


both = pytest.mark.parametrize("page", ["report", "comparison"], indirect=True)


@both
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_page_asks_for_nothing_complains_of_nothing_and_fits(browser, page, width, dark):
    tab = browser.open(page, width=width, dark=dark)
    tab.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    for panels in ("neighbours", "users", "intervals", "differences", "slices"):
        tab.run(f"document.querySelectorAll('[data-panel={panels}]').forEach((one) => (one.hidden = false))")
    assert tab.overflow() == 0
    assert tab.complaints() == []
    assert tab.requests() == []
    assert tab.run("window.broken") is None


def test_what_the_policy_forbids_is_noticed_by_these_tests(browser, report, tmp_path):
    spoilt = tmp_path / "spoilt.html"
    bad = '<img src="http://127.0.0.1:9/x.png"><script>window.broken = true</script></body>'
    spoilt.write_text(report.read_text(encoding="utf-8").replace("</body>", bad), encoding="utf-8")
    tab = browser.open(spoilt)
    assert tab.run("window.broken") is None
    assert any("Content Security Policy" in text for text in tab.complaints())


# How large the image is that an <svg> refers to, once the browser has decoded it.
DRAWN = """
new Promise((done) => {{
  const use = document.querySelector("{selector} use");
  const image = new Image();
  image.onload = () => done(use.getBoundingClientRect().width > 0 ? image.naturalWidth : 0);
  image.src = document.querySelector(use.getAttribute("href")).getAttribute("href");
}})
"""


def test_images_are_there_without_scrolling_and_without_script(browser, report, tmp_path):
    colours = DRAWN.format(selector="#users .panel:not([hidden]) .frame svg")
    assert browser.open(report).run(colours) > 100, "without scrolling to it"
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<script>.*?</script>", "", report.read_text(encoding="utf-8"), flags=re.DOTALL))
    assert browser.open(bare).run(colours) > 100, "without the script"


def test_printing_shows_every_image(browser, report):
    tab = browser.open(report)
    tab.send("Emulation.setEmulatedMedia", media="print")
    uses = "[...document.querySelectorAll('.panel:not([hidden]) use, .gallery use')]"
    assert tab.run(f"{uses}.length > 10 && {uses}.every((use) => document.querySelector(use.getAttribute('href')))")
    assert tab.run(f"{uses}.every((use) => use.getBoundingClientRect().width > 40)")


def test_titles_with_tags_are_read_as_they_are_written(browser, report):
    tab = browser.open(report)
    options = tab.run("[...document.querySelectorAll('#choose-item option')].map((one) => one.textContent)")
    texts = tab.run("[...document.querySelectorAll('bdi')].map((one) => one.textContent)")
    hints = tab.run("[...document.querySelectorAll('p.title')].map((one) => one.title)")
    hostile = set(page_shop.HOSTILE.values())
    assert hostile <= set(texts) and hostile & set(options) and hostile & set(hints)
    assert tab.run("window.broken") is None
    assert tab.run("document.querySelectorAll('main script, main img').length") == 0


def column(tab, table, index):
    return tab.run(
        f"[...document.querySelector('{table}').tBodies[0].rows].map((row) => row.cells[{index}].textContent.trim())"
    )


def numbers(texts):
    return [float(text.split()[0].replace("\N{MINUS SIGN}", "-")) for text in texts]


def test_a_column_sorts_by_click_and_by_keyboard(browser, comparison):
    tab = browser.open(comparison)
    table = "#results-table"
    before = column(tab, table, 0)
    tab.click(f"{table} th:nth-child(2) button")
    values = numbers(column(tab, table, 1))
    assert values == sorted(values, reverse=True) and len(values) == 5, "the best come first"
    heading = f"document.querySelector('{table} th:nth-child(2)').getAttribute('aria-sort')"
    assert tab.run(heading) == "descending"
    tab.press("Enter")
    assert numbers(column(tab, table, 1)) == sorted(values) and tab.run(heading) == "ascending"
    tab.press("Tab")
    tab.press("Space")
    values = numbers(column(tab, table, 2))
    assert values == sorted(values, reverse=True)
    assert tab.run(heading) is None, "one column at a time is sorted"
    tab.click(f"{table} th:first-child button")
    assert column(tab, table, 0) == sorted(before)


def test_rows_without_a_value_sort_last_both_ways(browser, comparison):
    tab = browser.open(comparison)
    table = "#cells table"
    tab.run("document.querySelector('#cells details').open = true")
    for _ in range(2):
        tab.click(f"{table} th:nth-child(5) button")
        values = column(tab, table, 4)
        empty = [value == "–" for value in values]
        assert empty == sorted(empty) and any(empty), "grid points that were not chosen have no test score"


def test_best_cells_are_those_that_the_comparison_marks(browser, comparison):
    study = read_json(comparison.with_name("comparison.json"))
    tab = browser.open(comparison)
    marked = tab.run(
        "[...document.querySelectorAll('#results-table td.best')].map((one) => [one.parentElement.cells[0]"
        ".querySelector('a').textContent, one.cellIndex])"
    )
    shown = ["recall@5", "recall@10", "ndcg@10"]
    assert sorted(shown) == sorted(study["metrics"])
    expected = [
        [name, 1 + place]
        for name, one in study["experiments"].items()
        for place, metric in enumerate(shown)
        if one["metrics"][metric]["best"]
    ]
    assert sorted(marked) == sorted(expected)


@pytest.mark.parametrize("width", [1024, 1400])
def test_the_table_of_results_fits_from_1024_pixels_on(browser, comparison, width):
    tab = browser.open(comparison, width=width)
    box = "document.querySelector('#results-table').parentElement"
    assert tab.run(f"{box}.scrollWidth - {box}.clientWidth") == 0
    headings = tab.run("[...document.querySelectorAll('#results-table thead th')].map((one) => one.innerText.trim())")
    assert headings[:5] == ["Experiment", "Recall@5", "Recall@10", "NDCG@10", "in %"]
    assert column(tab, "#results-table", 4)[:2] == ["", relative_of(comparison, "noise")]
    assert column(tab, "#results-table", 6) == ["3", "3", "3", "any", "any"], "a closed form does not depend on a seed"


def relative_of(comparison, name):
    experiments = read_json(comparison.with_name("comparison.json"))["experiments"]
    own, base = (experiments[one]["metrics"]["recall@10"]["mean"] for one in (name, "cm3"))
    return f"{100 * (own / base - 1):+.0f} %".replace("-", "\N{MINUS SIGN}")


def test_the_names_stay_in_sight_while_a_wide_table_scrolls(browser, comparison):
    tab = browser.open(comparison, width=PHONE)
    tab.run("document.querySelector('#results-table').parentElement.scrollLeft = 200")
    assert tab.run("document.querySelector('#results-table tbody th').getBoundingClientRect().left") >= 0
    assert tab.run("document.querySelector('#results-table tbody th a').getAttribute('href')") == "../cm3/report.html"


def test_every_run_has_its_command_and_every_sentence_is_there(browser, comparison):
    study = read_json(comparison.with_name("comparison.json"))
    tab = browser.open(comparison)
    commands = tab.run("[...document.querySelectorAll('#cells code')].map((one) => one.textContent)")
    assert commands == list(dict.fromkeys(cell["command"] for cell in study["cells"]))
    assert len(commands) == study["counts"]["runs"] < len(study["cells"]), "a closed form has one run for all seeds"
    said = " ".join(tab.run("document.querySelector('#words').textContent").split())
    assert all(" ".join(one["text"].split()) in said for one in study["words"])


def test_the_hit_of_a_user_is_seen_without_scrolling_sideways(browser, report):
    for width in (PHONE, DESK):
        tab = browser.open(report, width=width)
        hit = "document.querySelector('#users .panel:not([hidden]) .hit').getBoundingClientRect()"
        assert tab.run(f"{hit}.left >= 0 && {hit}.right <= innerWidth")


def test_a_table_is_saved_as_csv_in_full_precision(browser, comparison):
    study = read_json(comparison.with_name("comparison.json"))
    tab = browser.open(comparison)
    tab.run("HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, this.href]; }")
    tab.click("#results .scroll + .tools")
    name, content = tab.run("window.saved")
    assert name.endswith("-results.csv")
    header, first, *_ = urllib.parse.unquote(content.partition(",")[2]).splitlines()
    assert header.startswith("Experiment,Recall@5,Recall@10,NDCG@10,") and first.startswith("cm3,")
    assert float(first.split(",")[2]) == study["experiments"]["cm3"]["metrics"]["recall@10"]["mean"]
    assert tab.complaints() == []


def test_the_choosers_work_by_keyboard(browser, report):
    tab = browser.open(report)
    shown = "[...document.querySelectorAll('[data-panel=neighbours]')].map((one) => !one.hidden)"
    count = len(tab.run(shown))
    assert tab.run(shown) == [True] + [False] * (count - 1)
    tab.run("document.querySelector('#choose-item').focus()")
    tab.press("ArrowDown", 2)
    tab.until(f"({shown})[2]")
    tab.press("Tab")  # to "Previous"
    tab.press("Enter", 3)
    assert tab.run(shown)[count - 1], "before the first comes the last"
    assert tab.run("document.querySelector('#choose-item').selectedIndex") == count - 1


def test_the_focus_is_seen_and_goes_from_the_top_down(browser, report):
    tab = browser.open(report)
    places = []
    for _ in range(6):
        tab.press("Tab")
        places.append(tab.run("document.activeElement.getBoundingClientRect().top + scrollY"))
        style = tab.run("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid"
    assert tab.run("document.activeElement.closest('nav') !== null")
    assert places == sorted(places)


CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  let lowest = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("script, style, option")) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parse(colour)), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < lowest[0]) lowest = [ratio, element.outerHTML.slice(0, 90)];
  }
  return lowest;
})()
"""


@both
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground_in_both_colour_schemes(browser, page, dark):
    tab = browser.open(page, dark=dark)
    ratio, where = tab.run(CONTRAST)
    assert ratio >= 4.5, f"{ratio:.2f} in {where}"
    ground = [int(part) for part in re.findall(r"\d+", tab.run("getComputedStyle(document.body).backgroundColor"))]
    assert (sum(ground) < 150) == dark


def test_without_its_script_the_page_shows_every_panel(browser, report, tmp_path):
    source = report.read_text(encoding="utf-8")
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL), encoding="utf-8")
    tab = browser.open(bare)
    assert tab.run("[...document.querySelectorAll('.panel')].every((one) => one.checkVisibility())")
    assert tab.run(
        "[...document.querySelectorAll('.chooser, button[data-copy]')].every((one) => !one.checkVisibility())"
    )
