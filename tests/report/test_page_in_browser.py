"""The page as a reader meets it: drawn in headless Chromium, wide and narrow, light and dark, by
mouse and by keyboard.
"""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="the page tests need selenium")
from report_browser import PATIENCE, binary, console, forget, open_page, requests, resize
from report_fixtures import Shape, make_trace
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from moe_lab.report import write_report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (binary() and shutil.which("chromedriver")),
        reason="chromium and chromedriver are not installed",
    ),
]
WIDE, NARROWEST = 1280, 360
EMPTY_PLOTS = """
return [...document.querySelectorAll('.plot')].filter(plot => {
  const marks = plot.querySelectorAll('.scatterlayer .trace path, .heatmaplayer image');
  return ![...marks].some(mark => mark.getBoundingClientRect().width > 2);
}).map(plot => plot.dataset.figure + plot.dataset.plot);
"""
FAULTS = Path(__file__).with_name("page_checks.js").read_text() + "return faults();"


@pytest.fixture
def page(driver: Chrome, sweep_page: Path) -> Chrome:
    """The sweep's page, wide and light, with an empty console; opened again only where another test
    left it.
    """
    console(driver)
    state = script(
        driver, "return [location.href, innerWidth, document.documentElement.dataset.ready]"
    )
    if state != [sweep_page.resolve().as_uri(), WIDE, "light"]:
        resize(driver, WIDE)
        open_page(driver, sweep_page)
    return driver


def script(driver: Chrome, code: str, *arguments: Any) -> Any:
    return driver.execute_script(code, *arguments)


def test_the_first_screen_holds_question_answer_and_figure(
    driver: Chrome, sweep_page: Path
) -> None:
    resize(driver, 1400, 900)
    open_page(driver, sweep_page)
    ends = """return ['.question', '.lead', '#figure-frontier .plot', '.cards']
      .map(name => document.querySelector(name).getBoundingClientRect())
      .map(box => [box.top, box.bottom])"""
    question, answer, figure, cards = script(driver, ends)
    assert 0 < question[1] <= answer[0] < answer[1] <= figure[0] < figure[1] <= 900
    assert cards[0] < 900
    assert script(driver, EMPTY_PLOTS) == []


def test_the_navigation_stays_in_sight_and_leads_past_itself(page: Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, "nav a[href='#load']").click()
    place = "return arguments[0].getBoundingClientRect().toJSON()"
    nav, heading = (
        script(page, place, page.find_element(By.CSS_SELECTOR, name)) for name in ("nav", "#load-h")
    )
    assert nav["top"] == 0
    assert nav["bottom"] <= heading["top"] < 900


def test_a_table_sorts_by_numbers_and_filters_and_a_run_s_name_opens_its_row(page: Chrome) -> None:
    link = page.find_element(By.CSS_SELECTOR, ".cards a.run")
    link.click()
    row = script(page, "return document.querySelector(':target')")
    assert row.tag_name == "tr"
    WebDriverWait(page, PATIENCE).until(lambda _: row.is_displayed())
    table = row.find_element(By.XPATH, "ancestor::table")
    numbers = "return [...arguments[0].tBodies[0].rows].map(row => row.cells[3].textContent)"
    heading = table.find_elements(By.CSS_SELECTOR, "thead button")[3]
    script(page, "arguments[0].click()", heading)  # the navigation lies over it
    sizes = [float(text.removesuffix("M")) for text in script(page, numbers, table)]
    assert sizes == sorted(sizes)
    script(page, "arguments[0].click()", heading)
    assert script(page, numbers, table)[0] == "16M"
    field = table.find_element(By.XPATH, "preceding::input[1]")
    field.send_keys("dense")
    shown = [
        item for item in table.find_elements(By.CSS_SELECTOR, "tbody tr") if item.is_displayed()
    ]
    assert [item.find_element(By.TAG_NAME, "th").text for item in shown] == ["dense", "dense"]
    field.clear()
    assert console(page) == []


def test_an_entry_of_a_legend_hides_its_lines(page: Chrome) -> None:
    button = page.find_element(By.CSS_SELECTOR, "button.series")
    series = button.get_attribute("data-series")
    visible = """return [...document.querySelectorAll(".plot[data-figure='training_curves']")]
      .flatMap(plot => plot.data).filter(line => line.legendgroup === arguments[0])
      .map(line => line.visible !== false)"""
    assert all(script(page, visible, series))
    script(page, "arguments[0].click()", button)
    assert button.get_attribute("aria-pressed") == "false"
    assert not any(script(page, visible, series))
    script(page, "arguments[0].click()", button)
    assert all(script(page, visible, series))


def test_the_data_of_a_figure_come_from_inside_the_page(page: Chrome) -> None:
    link = page.find_element(By.CSS_SELECTOR, "#figure-frontier a.data")
    saved = """const link = arguments[0];
      link.addEventListener('click', event => event.preventDefault());
      link.click();
      return [link.download, link.href.slice(0, 60)]"""
    name, address = script(page, saved, link)
    assert name == "frontier.parquet"
    assert address.startswith("data:application/vnd.apache.parquet;base64,UEFSMR"), "PAR1"


def test_no_request_leaves_the_page(driver: Chrome, sweep_page: Path) -> None:
    forget(driver)
    open_page(driver, sweep_page)
    asked = [address for address in requests(driver) if not address.startswith(("data:", "blob:"))]
    assert asked == [sweep_page.resolve().as_uri()]


def test_hostile_text_of_a_document_runs_nothing_and_is_shown(page: Chrome) -> None:
    assert script(page, "return document.querySelectorAll('img, iframe, object').length") == 0
    assert "<script>alert(1)</script><img" in page.find_element(By.ID, "documents").text
    assert console(page) == []


def test_figures_keep_their_place_when_another_run_is_chosen(page: Chrome) -> None:
    select = page.find_element(By.CSS_SELECTOR, "select[data-figure='expert_load']")
    options = select.find_elements(By.TAG_NAME, "option")
    even = "Not drawn: topk 1:1, seed 0: every value is 1."
    assert even in page.find_element(By.ID, "figure-expert_load").text
    assert len(options) == 5, "of the six traces all but that one"
    options[-1].click()
    plot = page.find_element(By.CSS_SELECTOR, ".plot[data-figure='expert_load']")
    WebDriverWait(page, PATIENCE).until(lambda _: plot.get_attribute("data-drawn") == "4")
    assert script(page, EMPTY_PLOTS) == []
    assert script(page, "return arguments[0].calcdata[0][0].z[0].length", plot) == 4
    assert console(page) == []


def test_a_figure_can_be_saved(page: Chrome) -> None:
    saved = """const [button, done] = arguments;
      const link = HTMLAnchorElement.prototype, click = link.click;
      link.click = function () { link.click = click; done(this.download); };
      button.click();"""
    assert (
        page.execute_async_script(saved, page.find_element(By.CSS_SELECTOR, "button.save"))
        == "frontier.svg"
    )
    assert console(page) == []


def test_the_theme_button_goes_round_and_redraws_the_figures(page: Chrome) -> None:
    button = page.find_element(By.ID, "theme")
    ink = "return getComputedStyle(document.querySelector('.plot .xtitle')).fill"
    seen = []
    for _ in range(3):
        button.click()
        theme = script(page, "return document.documentElement.dataset.theme || 'light'")
        WebDriverWait(page, PATIENCE).until(
            lambda _, theme=theme: (
                script(page, "return document.documentElement.dataset.ready") == theme
            )
        )
        seen.append(
            (
                button.text,
                script(page, ink),
                script(page, "return getComputedStyle(document.documentElement).backgroundColor"),
            )
        )
    assert [text for text, _, _ in seen] == ["Theme: light", "Theme: dark", "Theme: system"]
    assert seen[0][1:] == seen[2][1:] != seen[1][1:]


def test_a_chosen_theme_outlives_the_visit(page: Chrome, sweep_page: Path) -> None:
    button = page.find_element(By.ID, "theme")
    button.click()
    button.click()
    page.get(sweep_page.resolve().as_uri())
    assert script(page, "return document.documentElement.dataset.theme") == "dark"
    script(page, "localStorage.clear()")
    open_page(page, sweep_page)


def test_arrow_keys_walk_the_text_and_the_panel_tells_the_experts(page: Chrome) -> None:
    box = page.find_element(By.CSS_SELECTOR, "[role=listbox]")
    first = box.find_element(By.CSS_SELECTOR, "[tabindex='0']")
    first.send_keys(Keys.ARROW_RIGHT)
    second = page.switch_to.active_element
    assert script(page, "return [...arguments[0].children].indexOf(arguments[1])", box, second) == 1
    assert len(box.find_elements(By.CSS_SELECTOR, "[tabindex='0']")) == 1
    spoken = page.find_element(By.ID, "spoken")
    assert spoken.get_attribute("aria-live") == "polite"
    assert "loss" in spoken.text
    assert "mean ffn_count" in spoken.text
    assert "layer 3: " in (spoken.get_attribute("textContent") or "")
    rows = page.find_elements(By.CSS_SELECTOR, "#layers tbody tr")
    assert [row.find_element(By.TAG_NAME, "th").text for row in rows] == ["0", "1", "2", "3"]
    second.send_keys(Keys.ARROW_DOWN)
    below = page.switch_to.active_element
    assert below.rect["y"] > second.rect["y"]
    below.send_keys(Keys.ARROW_UP)
    assert page.switch_to.active_element.rect["y"] == second.rect["y"]
    page.switch_to.active_element.send_keys(Keys.END)
    assert script(page, "return arguments[0].lastElementChild === document.activeElement", box)
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert script(page, "return arguments[0].lastElementChild === document.activeElement", box)


def test_the_panel_counts_real_experts_as_the_colour_does(page: Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, "#mode option:nth-child(3)").click()
    legend = {
        item.find_element(By.CLASS_NAME, "swatch").get_attribute("data-tint"): item.text
        for item in page.find_elements(By.CSS_SELECTOR, "#legend li")
    }
    for token in page.find_elements(By.CSS_SELECTOR, "[role=option]")[3:60:9]:
        script(page, "arguments[0].focus()", token)
        cells = page.find_elements(By.CSS_SELECTOR, "#layers tbody tr:nth-child(2) td")
        named = [expert for expert in cells[1].text.split(", ") if not expert.startswith("zero")]
        assert cells[0].text == str(len(named) if cells[1].text else 0)
        assert legend[token.get_attribute("data-tint") or ""].split(" ")[0] == cells[0].text


def test_pointing_at_a_token_shows_it(page: Chrome) -> None:
    token = page.find_elements(By.CSS_SELECTOR, "[role=option]")[4]
    ActionChains(page).move_to_element(token).perform()
    assert page.find_element(By.CSS_SELECTOR, "#spoken strong").text == token.text.strip()


def test_the_keyboard_reaches_content_first_and_sees_its_focus(
    page: Chrome, sweep_page: Path
) -> None:
    open_page(page, sweep_page)
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    skip = page.switch_to.active_element
    assert skip.text == "Skip to the content"
    assert skip.rect["x"] >= 0
    assert script(page, "return getComputedStyle(arguments[0]).outlineStyle", skip) != "none"
    skip.send_keys(Keys.ENTER)
    assert page.switch_to.active_element.get_attribute("id") == "main"


def test_headings_go_down_one_level_at_a_time(page: Chrome) -> None:
    levels = script(
        page,
        "return [...document.querySelectorAll('h1,h2,h3,h4')].map(heading => +heading.tagName[1])",
    )
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_control_has_a_name(page: Chrome) -> None:
    nameless = """const controls = 'button, select, [role=region], [role=img], [role=listbox]';
      const named = item => item.textContent.trim() || item.getAttribute('aria-label')
        || item.labels?.length;
      return [...document.querySelectorAll(controls)].filter(item => !named(item)).length"""
    assert script(page, nameless) == 0


@pytest.mark.slow
def test_a_map_of_512_experts_and_94_layers_can_be_read(driver: Chrome, tmp_path: Path) -> None:
    shape = Shape(layers=94, experts=512, zero_experts=256, top_k=12, documents=2, tokens=40)
    page = write_report(make_trace(tmp_path / "large", shape), tmp_path / "large.html")
    assert page.stat().st_size < 15_000_000
    for width in (WIDE, NARROWEST):
        resize(driver, width)
        open_page(driver, page)
        drawn = script(
            driver,
            "return document.querySelector('.heatmaplayer image').getBoundingClientRect().toJSON()",
        )
        assert drawn["width"] / 512 >= 1
        assert drawn["height"] / 94 >= 6
        assert script(driver, FAULTS) == []
    assert console(driver) == []
