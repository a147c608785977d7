"""Take the pictures of the gallery: viewer, app, a visit as a film strip, and a scan's report as page, PDF and slides.

    python scripts/take_pictures.py [NAME ...]

Needs Chromium and the extra `dev`; for the report's PDF and slides pdftoppm (poppler-utils) and LibreOffice too. The pictures lie in nbs/images.
"""
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "nbs" / "images"
sys.path.insert(0, str(ROOT / "tests"))

import test_app  # noqa: E402  # serves the app
import test_jupyterlab  # noqa: E402  # opens a notebook
import test_viewer  # noqa: E402  # opens the viewer in a page
from conftest import CHROMIUM  # noqa: E402

import explainable_mri as xm  # noqa: E402
from explainable_mri.data.phantom import phantom_cohort  # noqa: E402
from explainable_mri.viewer.state import Collection, Subject  # noqa: E402

LIMIT = 150_000  # bytes of a picture


def keep(name: str, picture: Image.Image, width: int) -> None:
    "Save a picture at a width, as well as fits into the limit."
    picture = picture.convert("RGB").resize((width, round(picture.height * width / picture.width)), Image.LANCZOS)
    for quality in (90, 80, 70, 60):
        data = io.BytesIO()
        picture.save(data, "WEBP", quality=quality, method=6)
        if len(data.getvalue()) <= LIMIT:
            break
    (IMAGES / f"{name}.webp").write_bytes(data.getvalue())
    print(f"{name}.webp {picture.width} x {picture.height}, quality {quality}, {len(data.getvalue()) / 1000:.0f} kB")


def shot(page, **options) -> Image.Image:
    "What a page shows."
    return Image.open(io.BytesIO(page.screenshot(**options)))


def take_viewer(browser, collection: Collection) -> None:
    "The viewer as a notebook shows it."
    for name, width, state in (("viewer_light_en", 1400, {}), ("viewer_dark_de", 1400, {"theme": "dark", "language": "de"}),
                               ("viewer_two_maps", 1400, {"other_explainer": "gradient"}), ("viewer_phone", 390, {})):
        opened = test_viewer.Opened(browser, collection, width=width, state=state)
        opened.page.wait_for_timeout(500)
        keep(name, shot(opened.page, clip={"x": 0, "y": 0, "width": width, "height": 1500}), min(width, 900))
        opened.page.close()


def take_notebook(browser) -> None:
    "The viewer in JupyterLab."
    with tempfile.TemporaryDirectory() as folder, test_jupyterlab.opened_notebook(browser, Path(folder)) as page:
        test_jupyterlab.run_cell(page, 0)
        page.wait_for_selector(".xmri[data-ready=yes]")
        if (no := page.get_by_role("button", name="No", exact=True)).count():
            no.click()
        page.wait_for_timeout(1500)
        page.locator(".xmri").scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
        keep("viewer_jupyterlab", shot(page), 1000)


def take_app(browser, scan: Path) -> None:
    "The app after an upload, and a visit as a film strip."
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, test_app.served(Path(folder)) as app:
        page = test_app.visit(browser, app.address)
        page.set_viewport_size({"width": 1280, "height": 960})
        frames = [("The page opens", shot(page))]
        page.select_option(".xmri-upload [name=sex]", "F")
        test_app.begin_upload(page, scan)
        frames.append(("A scan is uploaded", shot(page)))
        page.wait_for_selector(".xmri[data-ready=yes]")
        page.wait_for_timeout(800)
        frames.append(("Likelihood and map", shot(page)))
        page.set_viewport_size({"width": 1280, "height": 1500})
        page.wait_for_timeout(500)
        keep("app_light_en", shot(page), 900)
        page.locator('.xmri [data-part="peak"]').click()
        page.wait_for_timeout(800)
        top = page.locator('.xmri [data-part="sentence"]').bounding_box()
        frames.append(("The region at the peak", shot(page, clip={"x": top["x"] - 10, "y": top["y"] - 10, "width": 800, "height": 600})))
        with page.expect_download() as download:
            page.locator('.xmri [data-part="report-html"]').click()
        report = Path(folder, "report.html")
        download.value.save_as(report)
        page.locator('.xmri [data-part="theme"]').select_option("dark")
        page.locator('.xmri [data-part="language"]').select_option("de")
        page.wait_for_timeout(1500)
        keep("app_dark_de", shot(page), 900)
        page.context.close()
        page = browser.new_page(viewport={"width": 1100, "height": 825})
        page.goto(report.as_uri())
        page.wait_for_selector(".brain[data-ready=yes]", state="attached", timeout=120_000)
        frames.append(("The report", shot(page)))
        page.locator(".brain").scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        frames.append(("The brain in the report, to be turned", shot(page)))
        page.close()
    keep("visit", film_strip(frames), 1600)


def film_strip(frames: list[tuple[str, Image.Image]], across: int = 3) -> Image.Image:
    "Pictures in rows, with a line under each."
    width, height, gap, line = 640, 480, 16, 44
    strip = Image.new("RGB", (across * (width + gap) - gap, -(-len(frames) // across) * (height + line)), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(24)
    for number, (text, frame) in enumerate(frames):
        left, top = number % across * (width + gap), number // across * (height + line)
        strip.paste(frame.convert("RGB").resize((width, height), Image.LANCZOS), (left, top))
        draw.rectangle((left, top, left + width - 1, top + height - 1), outline="#8090a0")
        draw.text((left + 4, top + height + 6), f"{number + 1}  {text}", fill="#1c2530", font=font)
    return strip


def take_report(browser, result) -> None:
    "The report of a scan: page, telephone, PDF, slides."
    with tempfile.TemporaryDirectory() as folder:
        page = result.report(Path(folder, "report.html"))
        for name, width, height in (("report_page", 1200, 1500), ("report_phone", 390, 1100)):
            opened = browser.new_page(viewport={"width": width, "height": height})
            opened.goto(page.as_uri())
            opened.wait_for_selector(".brain[data-ready=yes]", state="attached", timeout=120_000)
            opened.wait_for_timeout(500)
            keep(name, shot(opened), min(width, 800))
            opened.close()
        if shutil.which("pdftoppm"):
            keep("report_pdf", as_pages(result.report(Path(folder, "report.pdf")), 4), 1000)
        if shutil.which("pdftoppm") and shutil.which("soffice"):
            slides = result.report(Path(folder, "slides.pptx"))
            subprocess.run(["soffice", "--headless", "--convert-to", "pdf", "--outdir", folder, str(slides)], check=True, capture_output=True)
            keep("report_slides", as_pages(slides.with_suffix(".pdf"), 6, across=3), 1200)


def as_pages(path: Path, number: int, across: int = 4) -> Image.Image:
    "The first pages of a PDF beside each other."
    subprocess.run(["pdftoppm", "-r", "60", "-l", str(number), "-png", str(path), str(path.with_suffix(""))], check=True)
    pages = [Image.open(one).convert("RGB") for one in sorted(path.parent.glob(f"{path.stem}-*.png"))]
    width, height = max(one.width for one in pages) + 10, max(one.height for one in pages) + 10
    sheet = Image.new("RGB", (min(across, len(pages)) * width, -(-len(pages) // across) * height), "#8090a0")
    for place, one in enumerate(pages):
        sheet.paste(one, (place % across * width + 5, place // across * height + 5))
    return sheet


def main(names: list[str]) -> None:
    "Take those that are named, or all."
    model = xm.load_model(ROOT / "nbs" / "tour.ckpt")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        table = phantom_cohort(model.grid, model.task.groups, [], Path(folder, "data"), scans=4, seed=7).table
        scans = {f"{row.group} {number}": Subject(row.path) for number, row in enumerate(table.itertuples(), 1)}
        surest = model.predict_maps(model.maps(table))[:, 1].argmax()
        patient = Path(shutil.copy(table.path.iloc[surest], Path(folder, "P042.nii.gz")))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--use-angle=swiftshader",
                                             "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"])
        takes: dict[str, Callable[[], None]] = {
            "viewer": lambda: take_viewer(browser, Collection(scans, {"tour": model}, "lrp.epsilon_plus")),
            "notebook": lambda: take_notebook(browser),
            "app": lambda: take_app(browser, patient),
            "report": lambda: take_report(browser, model.explain(patient, "lrp.epsilon_plus", target="AD"))}
        for name in names or takes:
            takes[name]()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
