"""How long the viewer takes to show a change, measured in a headless browser without a graphics processor, beside NiiVue.

    python benchmarks/viewer.py

A map of 121 x 145 x 121 voxels, the CAT12 grid without a field of view. A change is timed from the event of the control to the frame after the
slices are drawn; the first view from the call in Python to the drawn slices, explanation excluded; a new scan from its file to the answer of Python.
A page of the app is timed from its address to the form, a report of a scan from its file to the first painted text (as the browser tells it)
and to the drawn brain.
"""
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright
from results import write_section
from scipy.ndimage import gaussian_filter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import test_app  # noqa: E402  # serves the app
import test_viewer  # noqa: E402  # the page in which the tests open the viewer
from conftest import CHROMIUM  # noqa: E402

from explainable_mri.data.atlases import load_atlas, load_template  # noqa: E402
from explainable_mri.data.volumes import Volume, get_grid  # noqa: E402
from explainable_mri.inference import Model  # noqa: E402
import explainable_mri.models.networks  # noqa: E402, F401  # fills the registry
from explainable_mri.registry import NETWORKS  # noqa: E402
from explainable_mri.report.figures import relevance_limits  # noqa: E402
from explainable_mri.report.scan import Scale, _half, _pack, _viewer  # noqa: E402
from explainable_mri.viewer.state import Collection, Scene, Single, Subject, ViewerState  # noqa: E402
from explainable_mri.viewer.widget import Session  # noqa: E402

REPEATS = 15
CHANGES = {"threshold": ("threshold", 0.2, 0.02), "opacity": ("opacity", 0.2, 0.05), "slice": ("coronal", 40, 3)}
TIMED = """async ([name, low, by, repeats]) => {
  const root = document.querySelector(".xmri"), control = root.querySelector(`[data-part="${name}"]`), times = []
  for (let i = 0; i < repeats; i++) {
    const begin = performance.now(), draws = +root.dataset.draws
    control.value = low + by * i; control.dispatchEvent(new Event("input"))
    await new Promise((done) => { const look = () => +root.dataset.draws > draws ? done() : requestAnimationFrame(look); look() })
    times.push(performance.now() - begin)
    await new Promise((done) => setTimeout(done, 400))
  }
  return times
}"""
NIIVUE = """(async () => {
  const nv = new niivue.Niivue({ show3Dcrosshair: false, multiplanarShowRender: 0, loadingText: "", logLevel: "silent" })
  await nv.attachToCanvas(document.querySelector("canvas"))
  for (const [name, colors] of Object.entries(data.colors)) nv.addColormap(name, colors)
  const load = (base64, name) => niivue.NVImage.loadFromBase64({ base64, name }), scan = await load(data.scan, "scan.nii.gz"), map = await load(data.map, "map.nii.gz")
  map.colormapType = 1; map.colormap = "speaks_for"; map.colormapNegative = "speaks_against"; map.cal_max = 1; map.cal_maxNeg = -1
  nv.addVolume(scan); nv.addVolume(map); nv.setSliceType(3)
  const pixel = new Uint8Array(4), wait = () => nv.gl.readPixels(9, 9, 1, 1, nv.gl.RGBA, nv.gl.UNSIGNED_BYTE, pixel)
  const timed = (act) => Array.from({ length: 7 }, (_, i) => { const begin = performance.now(); act(i); wait(); return performance.now() - begin })
  const limit = (i) => { map.cal_min = map.cal_minPos = 0.2 + 0.02 * i; map.cal_minNeg = -map.cal_min }
  window.found = { "threshold": timed((i) => { limit(i); nv.updateGLVolume() }),
    "threshold, map alone": timed((i) => { limit(i); nv.refreshLayers(map, 1); nv.drawScene() }),
    "slice": timed((i) => { nv.scene.crosshairPos = [0.3 + 0.02 * i, 0.5, 0.5]; nv.drawScene() }) }
})()"""


def made_up() -> Scene:
    "A template with smooth noise for a map."
    grid = get_grid("cat12_1.5mm")
    grid = replace(grid, field_of_view=tuple(slice(0, size) for size in grid.shape))
    scan = load_template(grid)
    relevance = gaussian_filter(np.random.default_rng(0).standard_normal(grid.shape), 2).astype(np.float32) * (scan > 0.1)
    relevance /= np.abs(relevance).max()
    return Scene(Volume(scan, grid), Volume(relevance, grid), load_atlas("aal", grid), Scale(*relevance_limits(relevance)))


def measure_viewer(browser, scene: Scene) -> list[tuple[str, float, float]]:
    "Median and largest time of each change, in ms."
    opened = test_viewer.Opened(browser, Single(scene), height=1000, state={"threshold": 0.3})
    found = []
    for name, change in CHANGES.items():
        times = opened.page.evaluate(TIMED, [*change, REPEATS])
        found.append((f"viewer, {name}", float(np.median(times)), max(times)))
    opened.page.close()
    return found


def measure_niivue(browser, scene: Scene) -> list[tuple[str, float, float]]:
    "The same with NiiVue, whose drawing ipyniivue shows."
    data = {"scan": _pack(scene.scan.array, scene.grid, np.uint8), "map": _pack(scene.relevance.array, scene.grid, np.int16),
            "colors": {"speaks_for": _half(0.5, 1), "speaks_against": _half(0.5, 0)}}
    page = browser.new_page(viewport={"width": 1240, "height": 600})
    page.set_default_timeout(300_000)
    with tempfile.TemporaryDirectory() as folder:
        script = _viewer()[1].replace("</script", "<\\/script")
        path = Path(folder, "page.html")
        path.write_text(f"<canvas style='width:1200px;height:440px'></canvas><script>{script}</script><script>const data = {json.dumps(data)};{NIIVUE}</script>")
        page.goto(path.as_uri())
        page.wait_for_function("window.found")
        found = page.evaluate("window.found")
        page.close()
    return [(f"NiiVue, {name}", float(np.median(times)), max(times)) for name, times in found.items()]


def measure_python(scene: Scene) -> list[tuple[str, float, float]]:
    "What Python takes: the first answer, a new threshold, and a new scan with its map by a network of the group on the whole grid."
    def timed(act) -> float:
        begin = time.perf_counter()
        act()
        return 1000 * (time.perf_counter() - begin)

    session = Session(Single(scene))
    first = [timed(lambda: Session(Single(scene)).update({})) for _ in range(3)]
    session.update({})
    changes = [timed(lambda value=value: session.update({"threshold": value})) for value in (0.2, 0.3, 0.4, 0.5)]
    grid = get_grid("cat12_1.5mm")
    model = Model(NETWORKS["dyrba2021"](input_shape=grid.cropped_shape, classes=2), grid, classes=["CN", "AD"])
    scans = []
    with tempfile.TemporaryDirectory() as folder:
        path = Volume(load_template(grid), grid).save(Path(folder, "scan.nii.gz"))
        for _ in range(3):
            scans.append(timed(lambda: Session(Collection({"scan": Subject(path)}, {"network": model}, "lrp.epsilon_plus")).update(
                vars(ViewerState()))))
    return [("Python, first answer", float(np.median(first)), max(first)), ("Python, threshold", float(np.median(changes)), max(changes)),
            ("Python, new scan: likelihood, map and answer", float(np.median(scans)), max(scans))]


def measure_app(browser) -> tuple[list[tuple[str, float, float]], float]:
    "A page with a process that is kept ready, one without, and the memory of a visitor in GB."
    ready, cold = [], []
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, test_app.served(Path(folder), "--visitors", "8") as app:
        time.sleep(15)
        for _ in range(3):
            for times in (ready, cold):
                begin = time.perf_counter()
                page = test_app.visit(browser, app.address)
                times.append(1000 * (time.perf_counter() - begin))
            time.sleep(15)  # until the next process is ready
        used = app.process_of(page).memory_full_info().uss / 2**30
    return [(f"app, page {name}", float(np.median(times)), max(times)) for name, times in (("at once", ready), ("a second visitor's, within a second", cold))], used


def measure_report(start) -> tuple[list[tuple[str, float, float]], float]:
    "A report of a scan on the whole grid, opened from disk in a browser that has shown nothing else, and its size in MB."
    grid, readable, drawn = get_grid("cat12_1.5mm"), [], []
    model = Model(NETWORKS["dyrba2021"](input_shape=grid.cropped_shape, classes=2), grid, classes=["CN", "AD"])
    with tempfile.TemporaryDirectory() as folder:
        scan = Volume(load_template(grid), grid).save(Path(folder, "scan.nii.gz"))
        report = model.explain(scan, "lrp.epsilon_plus").report(Path(folder, "report.html"))
        for _ in range(7):
            browser = start()
            page = browser.new_page()
            begin = time.perf_counter()
            page.goto(report.as_uri(), wait_until="commit")
            page.wait_for_selector(".brain[data-ready=yes]", state="attached")
            drawn.append(1000 * (time.perf_counter() - begin))
            readable.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            browser.close()
            time.sleep(1)
        rows = [(f"report of a scan, opened from disk, {name}", float(np.median(one)), max(one)) for name, one in (("text on the screen", readable), ("brain drawn", drawn))]
        return rows, report.stat().st_size / 1e6


def main() -> None:
    "Measure, print and write down."
    scene = made_up()
    with sync_playwright() as playwright:
        start = lambda *more: playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *more])  # noqa: E731
        browser = start("--disable-gpu")
        found = measure_viewer(browser, scene)
        browser.close()
        found += measure_python(scene)
        drawing = partial(start, "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
        browser = drawing()
        found += measure_niivue(browser, scene)
        browser.close()
        rows, size = measure_report(drawing)
        browser = start("--disable-gpu")
        pages, used = measure_app(browser)
        found += [*rows, *pages]
        browser.close()
    lines = ["| | median (ms) | largest (ms) |", "|---|---|---|", *(f"| {name} | {middle:.0f} | {most:.0f} |" for name, middle, most in found)]
    print("\n".join(lines))
    write_section("viewer", "\n".join(["## The viewer", "",
        "121 × 145 × 121 voxels, headless Chromium without a graphics processor, two cores (`python benchmarks/viewer.py`). From a control's event to the "
        "drawn slices; NiiVue draws by SwiftShader, in the report too. Python's rows are one thread of the CPU. "
        f"The report has {size:.1f} MB; a visitor of the app takes {used:.2f} GB.", "", *lines]))


if __name__ == "__main__":
    main()
