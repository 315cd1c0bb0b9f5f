"""The report in a real browser: everything is drawn, nothing is fetched, the controls do what they say.

Without Debian's chromium and chromium-driver the tests are skipped, but fail where CI is set.
"""

import json
import os
import time
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from view_case import synthetic_analysis

import ntkscope
from ntkscope.experiments.demo import train_demo
from ntkscope.view.figures import FIGURES, drawable
from ntkscope.view.links import links
from ntkscope.view.report import write_report

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",  # WebGL without a graphics card
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    "--hide-scrollbars",
)
PATIENCE = 60  # seconds; a slow machine draws 3D on the CPU
TALLEST = 24_000  # pixels; the report with all fourteen figures is about 22,000 high on the narrowest screen


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    missing = [str(path) for path in (CHROMIUM, DRIVER) if not path.exists()]
    if missing:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop(f"no browser: {', '.join(missing)} missing (apt-get install chromium chromium-driver)")
    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_script_timeout(PATIENCE)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """The report, opened once and drawn."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(synthetic_analysis(has_gate=True), path)
    _resize(browser, 1280)
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser's own first page asked for
    browser.get(path.as_uri())
    _wait(browser, "return document.documentElement.dataset.drawn === 'true'")
    return browser


def _wait(browser, script: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not browser.execute_script(script):
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for: {script}"
        time.sleep(0.05)


def _resize(browser, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _plot(name: str) -> str:
    return f"document.querySelector('#figure-{name} .plot')"


def _assert_nothing_was_fetched(browser) -> None:
    requested = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requested.append(message["params"]["request"]["url"])
    assert requested, "the log saw no request at all, not even the page"
    foreign = [url for url in requested if not url.startswith(("file:", "data:", "blob:"))]
    assert not foreign


def test_all_figures_are_drawn_and_nothing_is_fetched(opened):
    _assert_nothing_was_fetched(opened)
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0

    for name in FIGURES:
        assert opened.execute_script(f"return document.querySelector('#figure-{name}').dataset.drawn") == "true"
        assert opened.execute_script(f"return {_plot(name)}.querySelectorAll('svg.main-svg').length") > 0
        assert "could not be drawn" not in opened.execute_script(f"return {_plot(name)}.textContent")
    errors = [entry["message"] for entry in opened.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors


@pytest.mark.parametrize("name", ["eigenstructure", "omega_surface"])
def test_the_scene_has_pixels(opened, name):
    colours = opened.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        Plotly.toImage(document.querySelector(arguments[0]), {format: "png", width: 300, height: 300}).then(function (url) {
          const image = new Image();
          image.onload = function () {
            const canvas = document.createElement("canvas");
            canvas.width = 300; canvas.height = 300;
            const context = canvas.getContext("2d", {willReadFrequently: true});
            context.drawImage(image, 0, 0);
            // Below the legend and above the colour bar.
            const pixels = context.getImageData(30, 60, 240, 160).data;
            const seen = new Set();
            for (let k = 0; k < pixels.length; k += 4) seen.add(pixels[k] + "," + pixels[k + 1] + "," + pixels[k + 2]);
            done([...seen]);
          };
          image.src = url;
        });
        """,
        f"#figure-{name} .plot",
    )
    saturated = [colour for colour in colours if max(map(int, colour.split(","))) - min(map(int, colour.split(","))) > 60]
    assert len(saturated) > 5, f"{len(colours)} colours"


def test_the_slider_moves_the_points_but_not_the_axes_or_the_camera(opened):
    plot = _plot("eigenstructure")
    opened.execute_script(f"Plotly.relayout({plot}, {{'scene.camera.eye': {{x: 0.4, y: 2.0, z: 0.3}}}})")
    state = f"const s = {plot}._fullLayout.scene; return [{plot}._fullData[0].x.join(), s.xaxis.range, s.camera.eye, s.xaxis.title.text]"
    before = opened.execute_script(state)
    slider = opened.find_element("css selector", "#figure-eigenstructure input[type=range]")
    steps = int(slider.get_attribute("max")) + 1
    assert steps == 11
    first_text = slider.get_attribute("aria-valuetext")
    slider.send_keys(Keys.HOME)  # by keyboard
    _wait(opened, f"return {plot}._fullData[0].x.join() !== {json.dumps(before[0])}")
    after = opened.execute_script(state)
    assert after[0] != before[0]
    assert after[1] == pytest.approx(before[1])
    assert after[2] == pytest.approx(before[2])
    assert after[3] == before[3], "the modes are those of the window's end in every frame"
    assert slider.get_attribute("aria-valuetext") != first_text


def test_play_runs_to_the_end_and_stops(opened):
    button = next(b for b in opened.find_elements("css selector", "#figure-eigenstructure button") if b.text == "Play")
    slider = opened.find_element("css selector", "#figure-eigenstructure input[type=range]")
    last = int(slider.get_attribute("max"))
    opened.execute_script("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", slider, last - 2)
    opened.execute_script("arguments[0].click()", button)
    assert button.text == "Pause"
    _wait(opened, f"return document.querySelector('#figure-eigenstructure input[type=range]').value == {last}")
    _wait(opened, "return document.querySelector('#figure-eigenstructure button').textContent === 'Play'")


def test_the_menu_changes_the_colours(opened):
    plot = _plot("eigenstructure")
    colours = f"return JSON.stringify([{plot}._fullData[0].marker.color, {plot}._fullLayout.coloraxis.cmax])"
    seen = {opened.execute_script(colours)}
    options = opened.execute_script("return document.querySelector('#figure-eigenstructure select').options.length")
    assert options == 4
    for position in (1, 2, 3):
        opened.execute_script(
            "const s = document.querySelector('#figure-eigenstructure select');"
            f"s.selectedIndex = {position}; s.dispatchEvent(new Event('change'))"
        )
        seen.add(opened.execute_script(colours))
    assert len(seen) == 4


def _click(browser, script: str) -> None:
    """Click the pixel that the script computes."""
    x, y = browser.execute_script(script)
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        event = {"type": kind, "x": x, "y": y, "button": "none" if kind == "mouseMoved" else "left", "clickCount": 1}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)
        time.sleep(0.15)


def _bring(browser, selector: str) -> None:
    browser.execute_script(
        "document.documentElement.style.scrollBehavior = 'auto'; document.querySelector(arguments[0]).scrollIntoView({block: 'center'})",
        selector,
    )
    time.sleep(0.3)


def test_a_click_on_a_mode_shows_its_examples_layers_and_gate_share(opened):
    _bring(opened, "#figure-spectrum .plot")
    pixel = (
        "const p = document.querySelector('#figure-spectrum .plot'), l = p._fullLayout, b = p.getBoundingClientRect();"
        "const a = l.xaxis, o = l.yaxis, t = p._fullData[0];"
        "return [b.left + a._offset + a.d2p(t.x[4]), b.top + o._offset + o.d2p(t.y[4])]"
    )
    _click(opened, pixel)
    _wait(opened, "return document.querySelector('#explore').dataset.chosen === 'mode 5'")
    shown = opened.find_element("css selector", "#explore .mode-pane").text
    found = links(synthetic_analysis(has_gate=True))
    for example, share in found["mode_examples"][4]:
        assert f"#{found['ids'][example]}" in shown
        assert f"{share / 10:.1f} %" in shown
    for name in found["layers"]["names"]:
        assert name in shown
    assert "gate keeps" in shown
    # the panel comes to the reader, and the mode and its examples are ringed
    assert "docked" in opened.find_element("css selector", "#explore").get_attribute("class")
    assert opened.execute_script(f"return {_plot('spectrum')}.data.at(-1).x") == [5]
    assert opened.execute_script(f"return {_plot('eigenstructure')}.data.at(-1).x.length") == len(found["mode_examples"][4])
    opened.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    assert "docked" not in opened.find_element("css selector", "#explore").get_attribute("class")


def test_a_click_on_an_example_shows_its_directions(opened):
    _bring(opened, "#figure-suspicious .plot")
    pixel = (
        "const b = document.querySelector('#figure-suspicious .bars .point path').getBoundingClientRect();"
        "return [b.left + b.width / 2, b.top + b.height / 2]"
    )
    _click(opened, pixel)
    _wait(opened, "return document.querySelector('#explore').dataset.chosen.startsWith('example')")
    name = opened.execute_script("return document.querySelector('#explore').dataset.chosen").split()[1]
    found = links(synthetic_analysis(has_gate=True))
    shown = opened.find_element("css selector", "#explore .example-pane").text
    for k, _ in found["example_modes"][found["ids"].index(name)]:
        assert f"direction {found['modes'][k]}" in shown
    assert opened.execute_script(f"return {_plot('eigenstructure')}.data.at(-1).x.length") == 1
    opened.find_element("css selector", "#explore .close").click()


def test_directions_and_examples_can_be_chosen_by_keyboard(opened):
    box = opened.find_element("css selector", "#explore input[name=mode]")
    box.clear()
    box.send_keys("17", Keys.ENTER)
    assert opened.execute_script("return document.querySelector('#explore').dataset.chosen") == "mode 17"
    assert "Direction 17 chosen" in opened.find_element("css selector", "#explore [aria-live]").get_attribute("textContent")
    link = opened.find_element("css selector", "#explore .mode-pane button.link")
    link.send_keys(Keys.ENTER)
    assert opened.execute_script("return document.querySelector('#explore').dataset.chosen") == f"example {link.text.strip('#')}"
    row = opened.find_element("css selector", "#examples button[data-example]")
    row.send_keys(Keys.ENTER)
    assert opened.execute_script("return document.querySelector('#explore').dataset.chosen") == f"example {row.text}"
    opened.find_element("css selector", "body").send_keys(Keys.ESCAPE)


def test_rings_follow_the_slider(opened):
    opened.execute_script("document.querySelector('#examples button[data-example]').click()")
    name = opened.execute_script("return document.querySelector('#explore').dataset.chosen").split()[1]
    where = (
        f"const d = {_plot('eigenstructure')}.data, ring = d.at(-1);"
        f"const t = d.find(t => (t.customdata || []).some(c => c[0] === '{name}')), k = t.customdata.findIndex(c => c[0] === '{name}');"
        "return [ring.x[0], t.x[k]]"
    )
    slider = opened.find_element("css selector", "#figure-eigenstructure input[type=range]")
    seen = set()
    for key in (Keys.HOME, Keys.END):
        slider.send_keys(key)
        _wait(opened, where.replace("return [ring.x[0], t.x[k]]", "return ring.x[0] === t.x[k]"))
        seen.add(opened.execute_script(where)[0])
    assert len(seen) == 2, "the point moved"
    opened.find_element("css selector", "body").send_keys(Keys.ESCAPE)


def test_the_scene_turns_when_dragged(opened):
    _bring(opened, "#figure-eigenstructure .plot")
    eye = f"return Object.values({_plot('eigenstructure')}._fullLayout.scene._scene.getCamera().eye)"
    before = opened.execute_script(eye)
    x, y = opened.execute_script(
        "const b = document.querySelector('#figure-eigenstructure canvas').getBoundingClientRect();"
        "return [b.left + b.width / 2, b.top + b.height / 2]"
    )
    for kind, dx in (("mouseMoved", 0), ("mousePressed", 0), ("mouseMoved", 60), ("mouseMoved", 120), ("mouseReleased", 120)):
        event = {"type": kind, "x": x + dx, "y": y, "button": "left", "buttons": int(kind != "mouseReleased"), "clickCount": 1}
        opened.execute_cdp_cmd("Input.dispatchMouseEvent", event)
        time.sleep(0.2)
    assert opened.execute_script(eye) != pytest.approx(before, abs=1e-3)


def test_print_leaves_out_what_needs_a_click(opened):
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = "return getComputedStyle(document.querySelector(arguments[0])).display"
    for selector in ("#explore", "nav", ".controls"):
        assert opened.execute_script(hidden, selector) == "none"
    assert opened.execute_script(hidden, "#figure-spectrum") != "none"
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_no_button_sends_data_away(opened):
    titles = opened.execute_script("return [...document.querySelectorAll('.modebar-btn')].map(b => b.getAttribute('data-title') || '')")
    assert titles
    assert not [title for title in titles if "share" in title.lower() or "cloud" in title.lower() or "plotly" in title.lower()]


@pytest.mark.parametrize("width", [380, 1280, 2560])
def test_the_page_does_not_overflow(opened, width):
    _resize(opened, width)
    _wait(opened, f"return innerWidth === {width}")
    _wait(opened, "return document.documentElement.scrollWidth <= innerWidth")
    _wait(opened, "return [...document.querySelectorAll('svg.main-svg')].every(s => s.getBoundingClientRect().right <= innerWidth + 1)")
    assert opened.execute_script("return document.documentElement.scrollHeight") < TALLEST


def test_dark_pages_get_light_text(opened):
    for scheme in ("light", "dark"):
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        wanted = "< 100" if scheme == "light" else "> 180"
        _wait(opened, f"return parseInt({_plot('spectrum')}._fullLayout.font.color.slice(1, 3), 16) {wanted}")


def test_everything_can_be_reached_by_keyboard(opened):
    controls = opened.find_elements(
        "css selector",
        "nav a, #explore input, #explore .link, #examples .link, .controls button, .controls select, .controls input, .scroll, summary",
    )
    assert len(controls) > 10
    for control in controls:
        reached = opened.execute_script("arguments[0].focus(); return document.activeElement === arguments[0]", control)
        assert reached, control.get_attribute("outerHTML")[:200]


def test_the_report_of_a_real_run_draws_everything_and_answers_clicks(browser, tmp_path):
    run = train_demo(optimizer="adamw", num_examples=30, num_steps=60, seed=1)
    analysis = ntkscope.analyze(run.recorder)
    write_report(analysis, tmp_path / "report.html")
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    _resize(browser, 1280)
    browser.get((tmp_path / "report.html").as_uri())
    _wait(browser, "return document.documentElement.dataset.drawn === 'true'")
    _assert_nothing_was_fetched(browser)
    assert not [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    drawn = browser.execute_script("return [...document.querySelectorAll('figure[data-figure]')].map(f => f.dataset.figure)")
    assert drawn == drawable(analysis)
    assert {"gate_motion", "eigenstructure", "suspicious"} <= set(drawn)
    _bring(browser, "#figure-suspicious .plot")
    bar = "const b = document.querySelector('#figure-suspicious .bars .point path').getBoundingClientRect(); return [b.left + 3, b.top + 4]"
    _click(browser, bar)
    _wait(browser, "return (document.querySelector('#explore').dataset.chosen || '').startsWith('example')")
    browser.execute_script("document.querySelector('#explore .example-pane button.link').click()")
    assert browser.execute_script("return document.querySelector('#explore').dataset.chosen").startswith("mode")
    assert "gate keeps" in browser.find_element("css selector", "#explore .mode-pane").text
    pixels = (
        "const c = document.querySelector('#explore .mode-pane canvas');"
        "return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    )
    assert browser.execute_script(pixels) > 3, "the digits are drawn"
