"""The report in headless Chromium: slide, sort, filter and enlarge, by mouse and keyboard."""

import csv
import shutil

import pytest

pytest.importorskip("selenium", reason="the extra `test` brings selenium")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium-driver)"
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--window-size=1280,1600", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, finished):
    browser.get((finished[0] / "report.html").as_uri())
    return browser


@pytest.fixture
def panel(page):
    return page.find_element(By.CSS_SELECTOR, '.threshold[data-run="patchcore/parts/seed1"]')


def scores(finished):
    with (finished[0] / "patchcore/parts/seed1/scores.csv").open(newline="") as file:
        return [(row["label"], float(row["score"])) for row in csv.DictReader(file)]


def counts(panel):
    cells = panel.find_elements(By.CSS_SELECTOR, 'tr[data-domain="all"] td')
    return [int(cell.text) for cell in cells[:4]]


def expected(rows, threshold):
    good = [score > threshold for label, score in rows if label == "good"]
    bad = [score > threshold for label, score in rows if label == "anomaly"]
    return [good.count(False), good.count(True), bad.count(True), bad.count(False)]


def slide(page, panel, position):
    slider = panel.find_element(By.CSS_SELECTOR, "input")
    page.execute_script(
        "arguments[0].value = arguments[1];"
        "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        slider,
        position,
    )


def test_the_page_runs_its_script_and_nothing_else(page):
    assert "js" in page.find_element(By.TAG_NAME, "html").get_attribute("class")
    assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.intruder = 1';"
        "document.body.append(s)"
    )
    assert page.execute_script("return window.intruder") is None, "the policy stops other scripts"


def test_the_slider_counts_again_per_domain(page, panel, finished):
    rows = scores(finished)
    threshold = float(panel.find_element(By.CSS_SELECTOR, "output").text)
    before = counts(panel)
    slide(page, panel, 0)
    low = min(score for _, score in rows)
    at_lowest = float(panel.find_element(By.CSS_SELECTOR, ".bound").text)
    assert counts(panel) == expected(rows, low)
    assert counts(panel) != before
    slider = panel.find_element(By.CSS_SELECTOR, "input")
    slider.send_keys(Keys.END)  # the keyboard moves it too
    assert float(panel.find_element(By.CSS_SELECTOR, ".bound").text) < at_lowest
    assert counts(panel)[1:3] == [0, 0], "nothing exceeds the largest score or the threshold"
    panel.find_element(By.CSS_SELECTOR, "button").send_keys(Keys.ENTER)
    assert counts(panel) == before
    assert float(panel.find_element(By.CSS_SELECTOR, "output").text) == threshold


def test_pictures_are_filtered_by_their_outcome_at_the_threshold(page, panel):
    slide(page, panel, 0)
    bar = page.find_element(By.CSS_SELECTOR, '.filters[data-run="patchcore/parts/seed1"]')
    figures = page.find_elements(By.CSS_SELECTOR, 'figure[data-run="patchcore/parts/seed1"]')
    outcomes = [figure.get_attribute("data-outcome") for figure in figures]
    assert len(set(outcomes)) > 1
    for wanted in sorted(set(outcomes)):
        Select(bar.find_element(By.NAME, "outcome")).select_by_visible_text(wanted)
        shown = [figure.is_displayed() for figure in figures]
        assert shown == [outcome == wanted for outcome in outcomes]
        assert f"{sum(shown)} of {len(figures)}" in bar.find_element(By.TAG_NAME, "output").text
    slide(page, panel, int(panel.find_element(By.CSS_SELECTOR, "input").get_attribute("max")))
    assert not any(f.is_displayed() for f in figures if f.get_attribute("data-outcome") != wanted)


def test_pictures_are_enlarged_and_put_away_by_keyboard_and_mouse(page):
    pictures = page.find_element(By.CSS_SELECTOR, "figure .pictures")
    dialog = page.find_element(By.ID, "enlarged")
    assert not dialog.is_displayed()
    width = pictures.find_element(By.TAG_NAME, "img").size["width"]
    pictures.send_keys(Keys.ENTER)
    assert dialog.is_displayed()
    images = dialog.find_elements(By.TAG_NAME, "img")
    assert images[0].size["width"] > 1.5 * width
    dialog.find_element(By.TAG_NAME, "button").send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    page.execute_script("arguments[0].click()", pictures)
    dialog.find_element(By.TAG_NAME, "button").click()
    assert not dialog.is_displayed()


def test_a_column_sorts_its_rows_both_ways(page):
    page.execute_script(  # one method's rows under another name, with other numbers
        "const b = document.querySelector('table.sortable tbody');"
        "for (const v of ['12.5', '99.0', '–']) {"
        "  const r = b.rows[1].cloneNode(true);"
        "  r.className = 'category added'; r.cells[1].textContent = v; b.rows[1].after(r); }"
    )
    head = page.find_elements(By.CSS_SELECTOR, "table.sortable thead tr:last-child th")[1]

    def column():
        rows = page.find_elements(By.CSS_SELECTOR, "table.sortable tbody:first-of-type tr.added")
        return [row.find_elements(By.TAG_NAME, "td")[0].text for row in rows]

    head.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "descending"
    assert column() == ["99.0", "12.5", "–"]
    head.send_keys(Keys.ENTER)
    assert column() == ["12.5", "99.0", "–"]


def test_a_phone_sees_the_page_without_scrolling_sideways(browser, finished):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        browser.get((finished[0] / "report.html").as_uri())
        wide = browser.execute_script("return document.documentElement.scrollWidth")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 390


def test_paper_holds_the_whole_command_and_nothing_to_click(browser, page):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_cdp_cmd(  # the printed width of A4
        "Emulation.setDeviceMetricsOverride",
        {"width": 720, "height": 1000, "deviceScaleFactor": 1, "mobile": False},
    )
    try:
        cut, shown = browser.execute_script(
            "const all = (css) => [...document.querySelectorAll(css)];"
            "const seen = (e) => e.getClientRects().length > 0;"
            "return [all('pre, .scroll').filter(e => seen(e) && e.scrollWidth > e.clientWidth + 1)"
            "          .map(e => e.textContent.slice(0, 60)),"
            "        all('nav, .slide, .filters, .config').filter(seen).length]"
        )
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert cut == []
    assert shown == 0
