"""The viewer in a browser: each control does what it says, at once in the browser and then in Python."""
import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("anywidget", reason="needs anywidget: pip install 'explainable-mri[viewer]'")

import explainable_mri as xm
from explainable_mri.data.phantom import phantom_cohort
from explainable_mri.viewer.state import Collection, Subject, read_link
from explainable_mri.viewer.widget import _SCRIPT, _STYLE, Session, session_report

ROOT = Path(__file__).parents[1]
VIEWS = ("coronal", "axial", "sagittal")
PAGE = """<!doctype html><meta charset="utf-8"><style>body { margin: 0 } STYLE</style><div id="here"></div><script type="module">
SCRIPT
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer)
const revive = (name, value) => name === "panels" ? value.map((one) => ({ ...one, scan: bytes(one.scan), map: bytes(one.map) }))
  : name === "dropped" ? value.map(bytes) : name === "labels" ? bytes(value) : value
const values = { panels: [], link: "", message: "", busy: false }, listeners = {}
const tell = (told) => {
  for (const [name, value] of Object.entries(told)) values[name] = revive(name, value)
  for (const name of Object.keys(told)) (listeners[`change:${name}`] || []).forEach((listener) => listener())
}
const model = {
  get: (name) => values[name], set: (name, value) => { values[name] = value }, off: () => {},
  on: (name, listener) => (listeners[name] ||= []).push(listener),
  send: async (message) => { if (!message.report) return; const [head, data] = JSON.parse(await python_report(JSON.stringify(message))); (listeners["msg:custom"] || []).forEach((one) => one(head, [bytes(data)])) },
  save_changes: async () => { window.asked = (window.asked || 0) + 1; tell(JSON.parse(await python_update(JSON.stringify(values.state)))); window.answered = window.asked },
}
tell(JSON.parse(await python_update("{}")))
render({ model, el: document.querySelector("#here") })
</script>"""


def plain(told: dict[str, Any]) -> str:
    "An answer of the session as JSON, with base64 in place of bytes."
    return json.dumps(told, default=lambda data: base64.b64encode(data).decode())


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Collection:
    "Two simulated scans and the network of the tour."
    model = xm.load_model(ROOT / "nbs" / "tour.ckpt")
    table = phantom_cohort(model.grid, model.task.groups, [], tmp_path_factory.mktemp("viewer") / "data", scans=4, seed=7).table
    subjects = {f"<b>{row.group}</b> {number}": Subject(row.path) for number, row in enumerate(table.itertuples(), 1) if number in (1, 4)}
    return Collection(subjects, {"tour": model}, "lrp.epsilon_plus")


class Opened:
    "A viewer in a page, with the session behind it."

    def __init__(self, browser, source, width: int = 1400, height: int = 1500, state: dict[str, Any] | None = None):
        self.session, self.said = Session(source), []
        self.page = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
        self.page.on("console", lambda message: self.said.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.expose_function("python_update", lambda text: plain(self.session.update({**(state or {}), **json.loads(text)})))
        self.page.expose_function("python_report", lambda text: plain(session_report(self.session, json.loads(text)["report"])))
        self.page.route("http://viewer.test/**", lambda route: route.fulfill(
            content_type="text/html", body=PAGE.replace("SCRIPT", _SCRIPT.replace("export default", "//")).replace("STYLE", _STYLE)))
        self.page.goto("http://viewer.test/")
        self.page.wait_for_selector(".xmri[data-ready=yes]")

    def part(self, name: str) -> Any:
        "A part of the viewer."
        return self.page.locator(f'.xmri [data-part="{name}"]')

    def settle(self) -> None:
        "Wait until Python has answered."
        self.page.wait_for_timeout(110)
        self.page.wait_for_function("window.answered === window.asked")
        self.page.wait_for_timeout(40)

    def slide(self, name: str, value: float) -> None:
        "Move a slider."
        self.part(name).evaluate("(one, value) => { one.value = value; one.dispatchEvent(new Event('input')) }", value)
        self.settle()

    def picture(self, view: str, panel: int = 0) -> np.ndarray:
        "The pixels of a view."
        from PIL import Image

        url = self.part(f"{view}-{panel}").evaluate("(one) => one.toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)

    def coloured(self, view: str = "coronal", panel: int = 0) -> int:
        "How many pixels are red or blue rather than grey; green and light blue lines are neither."
        red, green, blue = np.moveaxis(self.picture(view, panel), 2, 0)
        return int(((red - green > 40) | ((blue - red > 40) & (green - red < 60))).sum())

    @property
    def state(self):
        "What Python has heard."
        return self.session.state


@pytest.fixture(scope="module")
def viewer(browser, collection):
    "A viewer, for the tests of its controls."
    opened = Opened(browser, collection)
    yield opened
    assert opened.said == []


def test_threshold_smallest_opacity_and_hide(viewer):
    viewer.slide("threshold", 0.2)
    before = viewer.coloured()
    assert before > 100, "the map is not drawn"
    viewer.slide("threshold", 0.6)
    assert viewer.coloured() < 0.7 * before and viewer.state.threshold == 0.6
    viewer.slide("threshold", 0.2)
    shown = viewer.part("clusters").inner_text()
    viewer.slide("smallest", 5)
    assert viewer.part("clusters").inner_text() != shown and viewer.coloured() < before
    viewer.slide("smallest", 0)
    viewer.slide("opacity", 0)
    assert viewer.coloured() < before / 3
    viewer.slide("opacity", 0.85)
    viewer.part("hidden").check()
    viewer.settle()
    assert viewer.coloured() < before / 3 and viewer.state.hidden
    viewer.part("hidden").uncheck()
    viewer.settle()
    assert viewer.coloured() == before


def test_smoothing_scaling_and_contrast(viewer):
    before, vmax = viewer.picture("axial"), viewer.session.clusters[0].vmax
    viewer.slide("smoothing", 8)
    assert viewer.state.smoothing == 8 and (viewer.picture("axial") != before).any()
    viewer.part("scaling").select_option("adaptive")
    viewer.settle()
    assert viewer.session.clusters[0].vmax < vmax
    viewer.part("scaling").select_option("fixed")
    viewer.slide("smoothing", 0)
    assert (viewer.picture("axial") == before).all()
    viewer.slide("contrast", 0.3)
    assert viewer.picture("axial").mean() > before.mean() + 5
    viewer.slide("contrast", 1)


def test_slices_follow_slider_click_drag_wheel_and_keys(viewer):
    page = viewer.page
    for view, axis in (("coronal", 1), ("axial", 2), ("sagittal", 0)):
        viewer.slide(view, 25)
        assert viewer.session.scenes[0].grid.cropped_affine[axis] @ [25, 25, 25, 1] == viewer.state.crosshair[axis]
    box = viewer.part("coronal-0").bounding_box()
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    viewer.settle()
    x, y, z = viewer.state.crosshair
    assert x < 0 < z, "a click above on the left shows the left"
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    page.mouse.up()
    viewer.settle()
    assert viewer.state.crosshair[0] > 0 > viewer.state.crosshair[2] - z and viewer.state.crosshair[1] == y
    page.mouse.wheel(0, -100)
    viewer.settle()
    assert viewer.state.crosshair[1] == y + 3
    viewer.part("coronal-0").focus()
    x, y, z = viewer.state.crosshair
    for key in ("ArrowRight", "ArrowUp", "PageDown"):
        page.keyboard.press(key)
    viewer.settle()
    assert viewer.state.crosshair == (x + 3, y - 3, z + 3)
    chart = viewer.part("axial-profile").bounding_box()
    page.mouse.click(chart["x"] + 0.5 * chart["width"], chart["y"] + 10)
    viewer.settle()
    assert abs(viewer.session.scenes[0].grid.cropped_affine[2] @ [25, 25, 25, 1] - viewer.state.crosshair[2]) <= 3


def test_peak_regions_table_and_wheel_move_the_crosshair(viewer):
    viewer.part("peak").click()
    viewer.settle()
    relevance, grid = viewer.session.scenes[0].relevance.array, viewer.session.scenes[0].grid
    voxel = np.unravel_index(np.abs(relevance).argmax(), relevance.shape)
    assert np.allclose(viewer.state.crosshair, (grid.cropped_affine @ [*voxel, 1])[:3])
    told = viewer.part("here").inner_text()
    peak = viewer.session.update({**vars(viewer.state)})["here"][0]
    assert f"{peak['voxels']} voxels" in told and f"{abs(peak['peak']):.3g}" in told
    viewer.part("to_region").select_option(label="Putamen, right")
    viewer.settle()
    assert viewer.part("region").inner_text() == "Putamen, right" and viewer.state.crosshair[0] > 0
    row = viewer.part("regions").locator("tbody tr").first
    name = row.locator("td").first.inner_text()
    row.click()
    viewer.settle()
    assert viewer.part("region").inner_text() == name
    sector = viewer.part("wheel").locator("path").nth(1)
    sector.focus()
    viewer.page.keyboard.press("Enter")
    viewer.settle()
    assert viewer.state.crosshair[0] > 0, "the first side, clockwise, is the right"


def test_outline_and_flip(viewer):
    viewer.part("to_region").select_option(label="Hippocampus, left")
    viewer.settle()
    outlined = viewer.picture("coronal")
    viewer.part("outline").uncheck()
    viewer.settle()
    bare = viewer.picture("coronal")
    assert 20 < (outlined != bare).any(axis=2).sum() < 5000
    viewer.part("flipped").check()
    viewer.settle()
    turned = viewer.picture("coronal")
    body = slice(60, None)  # below the letters
    assert (np.abs(turned[body] - bare[body, ::-1]) <= 2).mean() > 0.98 and (turned != bare).any()
    x = viewer.state.crosshair[0]
    viewer.part("coronal-0").focus()
    viewer.page.keyboard.press("ArrowRight")
    viewer.settle()
    assert viewer.state.crosshair[0] == x - 3
    viewer.part("flipped").uncheck()
    viewer.part("outline").check()
    viewer.settle()


def test_choices_language_theme_and_link(viewer, collection):
    assert viewer.part("subject").locator("option").all_inner_texts() == list(collection.subjects)  # names are text, not markup
    before = viewer.part("sentence").inner_text()
    viewer.part("subject").select_option(list(collection.subjects)[1])
    viewer.settle()
    assert viewer.part("sentence").inner_text() != before
    viewer.part("target").select_option("CN")
    viewer.settle()
    assert "CN" in viewer.part("sentence").inner_text() and viewer.session.scenes[0].explanation.target == "CN"
    viewer.part("explainer").select_option("gradient")
    viewer.settle()
    assert viewer.session.scenes[0].explanation.method == "gradient"
    viewer.part("other_explainer").select_option("lrp.epsilon_plus")
    viewer.settle()
    assert viewer.page.locator(".xmri canvas").count() == 6
    viewer.slide("coronal", 20)
    assert (viewer.picture("coronal", 0) != viewer.picture("coronal", 1)).any(), "two methods, two maps"
    viewer.part("language").select_option("de")
    viewer.settle()
    assert "Schwelle" in viewer.page.locator(".xmri").inner_text() and "Für die Forschung" in viewer.page.locator(".xmri").inner_text()
    viewer.part("theme").select_option("dark")
    viewer.settle()
    assert viewer.page.locator(".xmri").get_attribute("data-theme") == "dark"
    link = viewer.part("link").input_value()
    assert read_link(link.partition("#view?")[2]) == viewer.state
    viewer.part("language").select_option("en")
    viewer.part("other_explainer").select_option("")
    viewer.settle()


def test_report_is_saved_from_a_button(viewer):
    with viewer.page.expect_download() as download:
        viewer.part("report-html").click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert download.value.suggested_filename == "report.html" and "not an atrophy map" in text and "&lt;b&gt;" in text and "<b>AD" not in text


def test_link_brings_the_view_back_and_errors_are_said(browser, collection):
    state = {"threshold": 0.35, "crosshair": [20, -20, -14], "theme": "dark", "flipped": True}
    opened = Opened(browser, collection, state=state)
    assert opened.part("threshold").input_value() == "0.35" and opened.part("flipped").is_checked()
    assert "(20 · -20 · -14) mm" in opened.part("crosshair").inner_text()
    opened.session.source = Collection({"gone": Subject("/nowhere/<i>x</i>.nii")}, collection.models, "lrp.epsilon_plus")
    opened.slide("coronal", 3)
    assert re.search("There is no subject", opened.part("message").inner_text())
    opened.page.close()


def test_controls_have_names_and_the_page_fits(browser, collection):
    opened = Opened(browser, collection, width=390, height=900, state={"language": "de"})  # whose names are long
    nameless = opened.page.evaluate("""() => [...document.querySelectorAll(".xmri input, .xmri select, .xmri button, .xmri canvas")].filter((one) =>
      !(one.getAttribute("aria-label") || one.closest("label")?.innerText.trim() || one.innerText?.trim())).map((one) => one.outerHTML)""")
    assert nameless == []
    for width in (390, 820, 1000, 1400):
        opened.page.set_viewport_size({"width": width, "height": 900})
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        table, wheel = (opened.part(name).bounding_box() for name in ("regions", "wheel"))
        assert table["x"] + table["width"] <= wheel["x"] or table["y"] + table["height"] <= wheel["y"], f"the table lies under the wheel at {width}"
    opened.page.close()
