"""The report in a real browser: Debian's Chromium, headless, through playwright, opened by file://.

Skipped where either is missing; in continuous integration (CI=true) that is a failure.
"""

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flows import made_up_flow
from test_report import EVIL, made_up_runs

from deepscale.report import ReportRun, tables, write_page, write_report
from deepscale.report.quantities import quantities
from deepscale.report.thin import edges

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    "--disable-sync",
]
DRAWN_MS = 3000  # the promise, from the start of loading
INDEX_BYTES = 15e6
# Pixels that are not empty, on the canvas of the lines.
INK = """c => {
    const copy = Object.assign(document.createElement('canvas'), { width: c.width, height: c.height }).getContext('2d', { willReadFrequently: true });
    copy.drawImage(c, 0, 0);
    const pixels = new Uint32Array(copy.getImageData(0, 0, c.width, c.height).data.buffer);
    let count = 0;
    for (const pixel of pixels) if (pixel) count++;
    return count;
}"""
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests of this file."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None  # type: ignore[assignment]
    if program is None or sync_playwright is None:
        reason = "no Chromium is installed (Debian: apt-get install chromium)" if program is None else "playwright is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """`open_page(path, width=1200, dark=False)`: the page, drawn. Fails for an error in it and for anything it wants from elsewhere."""
    troubles: list[str] = []
    contexts = []

    def show(path: Path, width: int = 1200, dark: bool = False) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"{error}"))
        page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or troubles.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        return page

    yield show
    for context in contexts:
        context.close()
    assert not troubles


def drawn_ms(page: Any) -> float:
    return float(page.evaluate("document.documentElement.dataset.drawn"))


def column(page: Any, key: str) -> list[str]:
    """The texts of a column of the table from top to bottom."""
    heads = page.eval_on_selector_all("thead th", "all => all.map(head => head.dataset.key)")
    return [text.strip() for text in page.locator(f"tbody tr > :nth-child({heads.index(key) + 1})").all_inner_texts()]


@pytest.mark.parametrize("count", [2, 20, 200])
def test_runs_are_drawn_within_3_seconds(count: int, tmp_path: Path, open_page: Open) -> None:
    """Of 10,001 layers, every second one; index.html within 15 MB; every figure has ink."""
    report = write_report(made_up_runs(count, depths=(10_001, 26, 10_001, 1004)), tmp_path)
    assert report.stat().st_size <= INDEX_BYTES
    page = open_page(report)
    if drawn_ms(page) > DRAWN_MS:  # the machine may have been busy: once more
        page = open_page(report)
    assert drawn_ms(page) <= DRAWN_MS
    inks = page.eval_on_selector_all("figure canvas:first-child", f"all => all.map({INK})")
    assert len(inks) == 7
    assert min(inks[:5]) > 1000
    assert len(column(page, "name")) == count
    assert page.locator("#legend .chip").count() == (count if count <= 20 else 0)


def test_what_the_page_draws_is_the_geometric_mean_of_the_layers(tmp_path: Path, open_page: Open) -> None:
    """What the script unpacks, against a plain mean over the record's values."""
    run = made_up_runs(1, depths=(10_001,))[0]
    page = open_page(write_page([run], tmp_path / "one.html", single_file=True))
    found = page.evaluate("Array.from(unpacked(runs[0].curves.output)[1].y)")
    assert run.flow is not None
    values = next(quantities(run.flow)).values[-1].astype(float)
    bins = edges(len(values), 1000)
    plain = [sum(map(math.log10, values[start:end])) / (end - start) for start, end in itertools.pairwise(bins)]
    np.testing.assert_allclose(found, plain, atol=0.001)


def test_the_table_sorts_by_click_and_by_keyboard(tmp_path: Path, open_page: Open) -> None:
    """Numbers as numbers, upwards first, then downwards; what is missing comes last both ways; aria-sort says it."""
    runs = made_up_runs(6, depths=(1004, 26, 110))
    del runs[0].numbers["validation_accuracy"]
    page = open_page(write_report(runs, tmp_path))
    page.click("thead th[data-key=depth] button")
    assert column(page, "depth") == ["26", "26", "110", "110", "1,004", "1,004"]
    assert page.get_attribute("thead th[data-key=depth]", "aria-sort") == "ascending"
    head = page.locator("thead th[data-key=validation_accuracy] button")
    head.focus()
    page.keyboard.press("Enter")
    upwards = column(page, "validation_accuracy")
    page.keyboard.press("Space")
    downwards = column(page, "validation_accuracy")
    assert upwards == ["50.00 %", "55.00 %", "60.00 %", "65.00 %", "70.00 %", "–"]
    assert downwards == [*reversed(upwards[:-1]), "–"]
    assert page.get_attribute("thead th[data-key=validation_accuracy]", "aria-sort") == "descending"
    assert page.get_attribute("thead th[data-key=depth]", "aria-sort") is None
    assert column(page, "converged").count("no") == 1  # 50 % is not above 50 %


def test_a_run_is_loaded_on_click_and_stepped_through(tmp_path: Path, open_page: Open) -> None:
    """Nothing of it is loaded before; slider, heatmap and files; a missing file is a sentence."""
    runs = made_up_runs(3, records=6, depths=(110,))
    page = open_page(write_report(runs, tmp_path))
    assert page.evaluate("Object.keys(data.details)") == []
    page.click("tbody tr:nth-child(3) th button")
    page.wait_for_selector("#run .stepper")
    assert "vanishing: as made up" in page.inner_text("#run")
    assert page.inner_text(".stepper output") == "step 60, record 6 of 6"
    page.focus(".stepper input")
    page.keyboard.press("Home")
    assert page.inner_text(".stepper output") == "step 1, record 1 of 6"
    assert min(page.eval_on_selector_all("#run canvas:first-child", f"all => all.map({INK})")) > 500
    page.locator("#run figure.wide canvas").last.click(position={"x": 500, "y": 140})
    assert page.inner_text(".stepper output") == "step 11, record 4 of 6"
    assert page.inner_text("#tip").startswith("step 11\nlayer")
    links = page.eval_on_selector_all("#run .files a", "all => all.map(a => a.getAttribute('href'))")
    assert sorted(links) == sorted(f"runs/id-2/{name}" for name in [*tables.FILES.values(), tables.FIRST_LAYER])
    assert all((tmp_path / link).is_file() for link in links)


def test_figures_are_read_with_mouse_and_keyboard_and_runs_are_hidden(tmp_path: Path, open_page: Open) -> None:
    page = open_page(write_report(made_up_runs(2, depths=(26, 110)), tmp_path))
    top = page.locator("#gradient-first canvas").last
    top.focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tip").startswith("run 0\nstep 1, layer 4\n")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tip").startswith("run 0\nstep 1, layer 7\n")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#tip").startswith("run 1\nstep 1, layer 31\n")  # 7 of 26 is 29.6 of 110
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")
    ink = page.eval_on_selector("#gradient-last canvas", INK)
    page.focus("#legend .chip")
    page.keyboard.press("Enter")
    assert page.get_attribute("#legend .chip", "aria-pressed") == "false"
    assert page.eval_on_selector("#gradient-last canvas", INK) < ink
    assert not page.is_checked("tbody tr:first-child input")
    page.click("label:has(input[value=weight])")
    assert "of the weights" in page.inner_text("#gradient-first figcaption")


def test_zeros_and_what_is_not_finite_are_marked_in_their_strips(tmp_path: Path, open_page: Open) -> None:
    """gamma 0 at the first record, NaN at the last: no logarithm of either, and the readout says what it is."""
    flow = made_up_flow(26, 4, gamma=0.0)
    flow.mean_abs[0, 0] = 0.0
    flow.nonfinite[-1, 2:] = 1.0
    flow.mean_abs[-1, 2:] = np.nan
    page = open_page(write_page([ReportRun("a", "id-0", flow=flow)], tmp_path / "one.html", single_file=True))
    page.select_option("#run select", "weight")
    page.locator("#run canvas").nth(1).focus()
    page.keyboard.press("Shift+ArrowRight")
    assert "not finite" in page.inner_text("#tip")
    page.focus(".stepper input")
    page.keyboard.press("Home")
    page.locator("#run canvas").nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tip").endswith("layer 1\nexactly 0")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tip").endswith("layer 2\nexactly 0: closed by gamma")
    assert page.locator("#run .scale span").all_inner_texts() == ["exactly 0", "exactly 0: closed by gamma", "not finite"]
    levels = page.evaluate(
        "unpacked(data.details['id-0'].weight).flatMap(row => Array.from(row.y)).filter(v => !Number.isFinite(v) && !Number.isNaN(v))"
    )
    assert levels == []


def test_probes_have_one_record_each_and_no_first_and_last(tmp_path: Path, open_page: Open) -> None:
    page = open_page(write_report(made_up_runs(3, records=1, depths=(26,)), tmp_path))
    assert page.locator("figure:visible figcaption").all_inner_texts()[:2] == [
        "Gradient norm at the block outputs, at the only record",
        "Standard deviation of the block outputs, at the only record",
    ]
    assert page.is_hidden("#training")
    page.click("tbody tr:first-child th button")
    page.wait_for_selector("#run .stepper")
    assert page.inner_text("#run .stepper output") == "step 1"
    assert page.is_hidden("#run figure.wide")


def test_a_narrow_page_does_not_scroll_sideways_and_dark_is_dark(tmp_path: Path, open_page: Open) -> None:
    report = write_report(made_up_runs(20), tmp_path, single_file=True)
    light, dark = open_page(report, width=400), open_page(report, width=400, dark=True)
    for page in (light, dark):
        page.click("tbody tr:first-child th button")
        page.wait_for_selector("#run .stepper")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    colours = [page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)") for page in (light, dark)]
    assert min(colours[0]) > 240
    assert max(colours[1]) < 40
    texts = [page.evaluate("getComputedStyle(document.body).color.match(/[0-9]+/g).map(Number)") for page in (light, dark)]
    assert max(texts[0]) < 60
    assert min(texts[1]) > 200


def test_a_single_file_gives_its_tables(tmp_path: Path, open_page: Open) -> None:
    """The CSV that is downloaded from inside the page, against the one of the folder."""
    runs = made_up_runs(2, depths=(26,))
    page = open_page(write_report(runs, tmp_path, single_file=True))
    page.click("tbody tr:first-child th button")
    with page.expect_download() as download:
        page.click("text=gradient_of_weights.csv")
    assert runs[0].flow is not None
    weights = list(quantities(runs[0].flow))[1]
    assert Path(download.value.path()).read_text() == tables.quantity_csv(weights, 100)


def test_hostile_names_are_shown_and_not_run(tmp_path: Path, open_page: Open) -> None:
    run = made_up_runs(1, depths=(26,))[0]
    evil = ReportRun(EVIL, EVIL, {EVIL: EVIL, "skip": EVIL}, run.numbers, EVIL, EVIL, flow=run.flow, status=EVIL)
    page = open_page(write_report([evil, run], tmp_path, title=EVIL, warnings=[EVIL]))
    page.click("tbody tr:first-child th button")
    page.wait_for_selector("#run .stepper")
    assert page.evaluate("window.owned") is None
    assert page.inner_text("h1") == EVIL
    assert column(page, "name")[0] == EVIL
    assert page.locator("img").count() == 0


def test_a_run_without_a_record_and_one_that_goes_on_stand_in_the_table(tmp_path: Path, open_page: Open) -> None:
    one = made_up_runs(1, depths=(26,))[0]
    going = ReportRun("going on", "2", status="RUNNING", curves={"first_layer": [(1.0, 0.5), (2.0, 0.0), (3.0, math.inf)]}, problem="it goes on")
    page = open_page(write_report([one, going, ReportRun("none", "3", problem="it was off")], tmp_path, warnings=["no record of 2 of 3 runs"]))
    assert column(page, "verdict") == ["healthy", "running, no record yet", "no record"]
    assert page.inner_text("#warnings") == "no record of 2 of 3 runs"
    page.select_option("#which", "3")
    assert "it was off" in page.inner_text("#run")
    assert page.evaluate("figures.training.series.map(s => s.run.name)") == ["run 0", "going on"]
