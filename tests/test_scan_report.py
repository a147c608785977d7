"""The report of a scan in a browser: it works from the file alone, at every width and on paper."""
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHROMIUM

import explainable_mri as xm
from explainable_mri.data.phantom import phantom_cohort
from explainable_mri.evaluation.calibration import fit_calibration

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    "The report of a scan in both languages."
    folder = tmp_path_factory.mktemp("reports")
    model = xm.load_model(ROOT / "nbs" / "tour.ckpt")
    table = phantom_cohort(model.grid, model.task.groups, [], folder / "data", scans=16, seed=7).table
    probability = model.predict_maps(model.maps(table))[:, 1]
    model.calibration = fit_calibration(table.assign(probability=probability), (table.group != "CN").to_numpy(), replicates=50)
    found = model.explain(table[table.group != "CN"].path.iloc[0], "lrp.epsilon_plus", target="AD")
    return {language: found.report(folder / f"{language}.html", language=language) for language in ("en", "de")}


def open_page(drawing_browser, path: Path, width: int = 1200, height: int = 900) -> Any:
    "A page of a file, once its brain is drawn, with what it asked for and complained about."
    page = drawing_browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(180_000)  # software draws, on a machine that may be busy
    page.asked, page.said = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector(".brain[data-ready=yes]", state="attached")
    return page


def slide(page, name: str, value: float) -> None:
    "Move a slider."
    page.locator(f".brain [data-part={name}]").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }", value)


def picture(page) -> bytes:
    "What the canvas shows."
    page.wait_for_timeout(300)
    return page.locator(".brain canvas").screenshot()


def colours(png: bytes) -> int:
    "How many pixels are red or blue rather than grey."
    import io

    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((np.abs(pixels[..., 0] - pixels[..., 2]) > 40).sum())


def test_the_page_needs_nothing_but_itself(reports, drawing_browser):
    page = open_page(drawing_browser, reports["en"])
    assert [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert [words for words in page.said if "GL Driver" not in words and "WebGL" not in words] == []
    page.close()


def test_every_control_of_the_brain_does_what_it_says(reports, drawing_browser):
    page = open_page(drawing_browser, reports["en"])
    part = lambda name: page.locator(f".brain [data-part={name}]")  # noqa: E731
    before = picture(page)
    assert colours(before) > 200, "the map is not drawn"
    assert "Hippocampus, left" in part("crosshair").inner_text() and "(-26 · -22 · -16) mm" in part("crosshair").inner_text()
    most, start = float(part("threshold").get_attribute("max")), float(part("threshold").input_value())
    slide(page, "threshold", most)
    assert colours(picture(page)) < 0.7 * colours(before)
    slide(page, "threshold", 0)
    assert colours(picture(page)) > colours(before)
    slide(page, "opacity", 0)
    assert colours(picture(page)) < 50
    slide(page, "threshold", start)
    slide(page, "opacity", 0.85)
    assert picture(page) == before, "the map alone, drawn again, is not what the first drawing of everything was"
    slide(page, "opacity", 1)
    slide(page, "threshold", most / 4)
    shown = {}
    for signs in ("both", "for", "against"):
        part("signs").select_option(signs)
        shown[signs] = picture(page)
    assert len(set(shown.values())) == 3
    part("signs").select_option("both")
    part("view").select_option("1")
    assert picture(page) != shown["both"]
    part("view").select_option("3")
    part("peak").click()
    assert "(-26 · -22 · -16) mm" not in part("crosshair").inner_text()
    part("mtl").click()
    upright = picture(page)
    part("flip").check()
    assert picture(page) != upright
    box = page.locator(".brain canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.4)
    assert "mm — " in part("pointer").inner_text() or part("pointer").inner_text().endswith("–")
    page.close()


def test_the_text_comes_before_the_brain(reports, drawing_browser):
    page = drawing_browser.new_page()
    page.add_init_script("""const given = HTMLCanvasElement.prototype.getContext
        HTMLCanvasElement.prototype.getContext = function (...asked) { window.begun ??= performance.now(); return given.apply(this, asked) }""")
    page.goto(reports["en"].as_uri())
    page.wait_for_selector(".brain[data-ready=yes]", state="attached")
    painted, begun = page.evaluate("[performance.getEntriesByName('first-contentful-paint')[0].startTime, window.begun]")
    assert painted < begun, "the graphics were prepared before the text was on the screen"
    page.close()


def test_a_browser_without_graphics_says_so_and_shows_the_rest(reports, drawing_browser):
    plain = drawing_browser.browser_type.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-3d-apis"])
    page = plain.new_page()
    page.goto(reports["de"].as_uri())
    page.wait_for_function("document.querySelector('.brain [data-part=hint]').textContent.includes('WebGL 2')")
    assert not page.locator(".brain .stage").is_visible()
    assert page.locator("h1").is_visible()
    plain.close()


@pytest.mark.parametrize("language, sentence", [("en", "A relevance map is not an atrophy map"), ("de", "Eine Relevanzkarte ist keine Atrophiekarte")])
def test_the_page_fits_every_width(reports, drawing_browser, language, sentence):
    page = open_page(drawing_browser, reports[language], 1400)
    assert sentence in page.inner_text("main") and page.get_attribute("html", "lang") == language
    for width in (1400, 820, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_nothing_is_cut_in_print(reports, drawing_browser):
    page = open_page(drawing_browser, reports["en"], 695)  # the width of A4 between its margins
    page.emulate_media(media="print")
    assert not page.locator(".brain").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 695
    cut = page.evaluate("[...document.querySelectorAll('.scroll, td, th')].filter((one) => one.scrollWidth > one.clientWidth + 1).length")
    assert cut == 0, f"{cut} tables or cells are wider than their place"
    assert len(page.pdf(format="A4")) > 50_000
    page.close()
