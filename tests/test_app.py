"""The app in a browser: uploads, many visitors at once, and what happens when something breaks."""
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import psutil
import pydicom
import pytest

pytest.importorskip("voila", reason="needs Voilà: pip install 'explainable-mri[viewer]'")

import explainable_mri as xm
from explainable_mri.data.phantom import phantom_cohort
from explainable_mri.preprocessing.simulation import simulate_raw_scan

ROOT = Path(__file__).parents[1]
UPLOADED = "explainable-mri-uploads-*/*/*.nii.gz"
GIGABYTE = 2**30


class Served:
    "The app in a process of its own, with its own folder for what is temporary."

    def __init__(self, folder: Path, port: int, *options: str):
        self.folder, self.address, self.log = folder, f"http://127.0.0.1:{port}/", folder / "log"
        command = [sys.executable, "-c", "from explainable_mri.cli import main; main()", "app", "nbs/tour.ckpt", "--port", str(port), *options]
        with self.log.open("a") as log:
            self.server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)})
        wait(self.answers, 120)

    def answers(self) -> bool:
        "Whether it can be asked."
        assert self.server.poll() is None, self.log.read_text()
        try:
            urllib.request.urlopen(self.address + "voila/static/nothing", timeout=1)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def visitors(self) -> list[psutil.Process]:
        "The processes of the visitors, one that is kept ready among them."
        living = [one for one in psutil.Process(self.server.pid).children() if one.status() != psutil.STATUS_ZOMBIE]
        return [one for one in living if "ipykernel" in " ".join(one.cmdline())]

    def process_of(self, page: Any) -> psutil.Process:
        "The process of a page."
        number = page.evaluate("JSON.parse(document.querySelector('#jupyter-config-data').textContent).kernelId")
        return next(one for one in self.visitors() if number in " ".join(one.cmdline()))

    def uploads(self) -> list[Path]:
        "The files that visitors handed over."
        return list(self.folder.glob(UPLOADED))


def wait(condition: Any, seconds: float) -> None:
    "Wait until a condition holds."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come about in {seconds:g} s"
        time.sleep(0.2)


def free_port() -> int:
    "A port on which nobody listens."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(folder: Path, *options: str, port: int | None = None) -> Iterator[Served]:
    "The app while it is needed."
    app = Served(folder, port or free_port(), *options)
    try:
        yield app
    finally:
        app.server.terminate()
        app.server.wait(30)


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[Served]:
    "The app with the network of the tour."
    with served(tmp_path_factory.mktemp("app")) as app:
        yield app


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    "A simulated map, under a name that could do harm."
    model, folder = xm.load_model(ROOT / "nbs" / "tour.ckpt"), tmp_path_factory.mktemp("scan")
    table = phantom_cohort(model.grid, model.task.groups, [], folder / "data", scans=4, seed=7).table
    return Path(shutil.copy(table.path.iloc[-1], folder / "Frau X <b>bold<b>.nii.gz"))


def visit(browser, address: str) -> Any:
    "A page of the app, in a browser of its own; it is there when the form for uploads is."
    page = browser.new_context(accept_downloads=True).new_page()
    page.set_default_timeout(120_000)
    page.errors = []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    assert page.goto(address).ok, page.inner_text("body")
    page.wait_for_selector(".xmri-upload")
    return page


def begin_upload(page, path: Path, age: str = "74") -> None:
    "Choose a file and send it."
    page.set_input_files(".xmri-upload input[type=file]", path)
    page.fill(".xmri-upload [name=age]", age)
    page.click(".xmri-upload [type=submit]")


def upload(page, path: Path, age: str = "74") -> str:
    "Upload a file; returns what the page says of it."
    begin_upload(page, path, age)
    page.wait_for_function("document.querySelector('.xmri-upload [name=cancel]').disabled && document.querySelector('[role=status]').textContent")
    return page.locator(".xmri-upload [role=status]").inner_text()


@pytest.mark.slow
def test_uploads_are_taken_bad_ones_refused_and_visitors_kept_apart(browser, app, scan, tmp_path):
    page, other = visit(browser, app.address), visit(browser, app.address)
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(scan.read_bytes()[:5000])
    assert "bad.nii.gz" in upload(page, bad)
    assert page.locator(".xmri").count() == 0
    assert "is shown below" in upload(page, scan)
    page.wait_for_selector(".xmri[data-ready=yes]")
    assert page.locator('.xmri [data-part="subject"] option').all_inner_texts() == [scan.name]
    assert "MCI or AD" in page.locator('.xmri [data-part="sentence"]').inner_text()
    page.locator('.xmri [data-part="peak"]').click()
    page.wait_for_function("document.querySelector('.xmri [data-part=link]').value.includes('crosshair')")
    page.locator('.xmri [data-part="language"]').select_option("de")
    page.wait_for_function("document.querySelector('.xmri-upload strong').textContent === 'Eigener Scan'")
    assert page.locator(".xmri-upload [role=status]").inner_text() == f"{scan.name} ist unten gezeigt."
    for form, begins in (("html", b"<!doctype html>"), ("pdf", b"%PDF"), ("pptx", b"PK"), ("dicom", b"PK")):
        with page.expect_download() as download:
            page.locator(f'.xmri [data-part="report-{form}"]').click()
        assert Path(download.value.path()).read_bytes()[:20].lower().startswith(begins.lower())
    assert other.locator(".xmri").count() == 0, "nobody sees another's scan"
    assert (page.errors, other.errors) == ([], [])
    assert "Frau" not in app.log.read_text() and "GET" not in app.log.read_text()
    assert len(app.uploads()) == 1
    page.goto("about:blank")  # leaves the page, as closing it does
    wait(lambda: not app.uploads(), 30)  # what was uploaded goes with the page
    other.context.close()


@pytest.mark.slow
def test_raw_scan_is_prepared_and_its_preparation_can_be_cancelled(browser, app, tmp_path):
    pytest.importorskip("ants", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    raw = tmp_path / "head.nii.gz"
    nib.save(simulate_raw_scan(seed=3, voxel_size=2.5).image, raw)
    page = visit(browser, app.address)
    page.select_option(".xmri-upload [name=sex]", "F")
    begin_upload(page, raw)
    page.wait_for_function("/[2-9] s so far/.test(document.querySelector('[role=status]').textContent)")
    process = app.process_of(page)
    wait(lambda: process.children(recursive=True), 60)
    page.click(".xmri-upload [name=cancel]")
    page.wait_for_function("document.querySelector('[role=status]').textContent === 'Cancelled.'")
    wait(lambda: not process.children(recursive=True), 20)
    wait(lambda: not app.uploads(), 20)  # the raw scan, and what was prepared
    page.set_default_timeout(400_000)
    assert upload(page, raw) == "head.nii.gz is shown below."
    page.wait_for_selector(".xmri[data-ready=yes]")
    assert "prepared by another program" in page.locator(".xmri").inner_text()
    with page.expect_download() as download:  # the map for the archive lies on the scan as it came
        page.locator('.xmri [data-part="report-dicom"]').click()
    with zipfile.ZipFile(download.value.path()) as packed:
        found = pydicom.dcmread(io.BytesIO(packed.read("relevance.dcm")))
    assert sorted([found.Rows, found.Columns, int(found.NumberOfFrames)]) == sorted(nib.load(raw).shape)
    page.context.close()


@pytest.mark.slow
def test_ten_visitors_at_once_in_bounded_memory_which_is_freed(browser, scan, tmp_path):
    with served(tmp_path, "--visitors", "10", "--idle", "60") as app:
        pages = [visit(browser, app.address) for _ in range(10)]
        wait(lambda: len(app.visitors()) == 10, 30)
        for page in pages:
            begin_upload(page, scan)
        for page in pages:
            page.wait_for_selector(".xmri[data-ready=yes]")
        assert [page.locator('.xmri [data-part="subject"] option').count() for page in pages] == [1] * 10
        used = sum(one.memory_full_info().uss for one in app.visitors())
        assert used < 10 * 0.9 * GIGABYTE, f"{used / GIGABYTE:.1f} GB for ten visitors"
        late = browser.new_page()
        assert late.goto(app.address).status == 503 and "All places are taken" in late.inner_text("body")
        for page in pages[:5]:
            page.goto("about:blank")    # says good-bye
        for page in pages[5:]:
            page.context.close()        # does not
        wait(lambda: len(app.uploads()) <= 5, 30)
        wait(lambda: not app.uploads(), 150)
        wait(lambda: len(app.visitors()) == 1, 60)
        assert sum(one.memory_full_info().uss for one in app.visitors()) < GIGABYTE
        late.close()


@pytest.mark.slow
def test_lost_connections_and_restarts_are_said(browser, scan, tmp_path):
    port, alert = free_port(), ".xmri-upload [role=alert]:not([hidden])"
    with served(tmp_path, port=port) as app:
        page, other = visit(browser, app.address), visit(browser, app.address)
        upload(page, scan)
        app.process_of(page).kill()  # as the kernel of the machine does where memory ends
        page.wait_for_selector(alert)
        assert "This session has ended" in page.inner_text(alert)
        page.reload()
        page.wait_for_selector(".xmri-upload")
        assert "is shown below" in upload(page, scan)
        processes = app.visitors()
        app.server.send_signal(signal.SIGTERM)
        app.server.wait(60)
        assert not app.uploads() and not any(one.is_running() for one in processes)
        other.wait_for_selector(alert)
        assert "connection to the server is lost" in other.inner_text(alert)
    with served(tmp_path, port=port) as app:
        other.wait_for_function("document.querySelector('[role=alert]').textContent.includes('has ended')")
        other.reload()
        other.wait_for_selector(".xmri-upload")
        assert "is shown below" in upload(other, scan)
    page.context.close()
    other.context.close()


@pytest.mark.slow
def test_token_is_asked_for_and_a_page_of_another_site_can_do_nothing(browser, tmp_path):
    token = "a-token-of-a-clinic"
    with served(tmp_path, "--token", token) as app:
        page = browser.new_page()
        page.goto(app.address)
        assert page.locator(".xmri-upload").count() == 0 and page.locator("input[type=password]").count() == 1
        opened = visit(browser, f"{app.address}?token={token}")
        number = opened.evaluate("JSON.parse(document.querySelector('#jupyter-config-data').textContent).kernelId")
        for path, data in ((f"api/kernels/{number}", None), (f"voila/api/shutdown/{number}", b""), ("voila/static/../../etc/passwd", None)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(app.address + path, data=data), timeout=10)
            assert refused.value.code in (403, 404), path
        assert app.process_of(opened).is_running()
        page.close()
        opened.context.close()


@pytest.mark.slow
def test_commands_of_the_dockerfile(copy, tmp_path):
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    run = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]
    packages = next(line for line in run if line.startswith("apt-get")).partition("recommends ")[2].partition(" &&")[0].split()
    if shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "--dry-run", *packages], check=True, capture_output=True)
    virtual = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", virtual], check=True)
    pip = next(line for line in run if line.startswith("pip ")).replace("--extra-index-url https://download.pytorch.org/whl/cpu ", "")
    subprocess.run(f"{virtual}/bin/{pip}", shell=True, cwd=copy, check=True, capture_output=True)
    assert any(line.startswith("useradd ") for line in run) and "USER viewer" in lines
    command = json.loads(lines[-1].removeprefix("CMD "))
    assert command[:3] == ["explainable-mri", "app", "/results"]
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([virtual / "bin" / command[0], command[1], copy / "nbs" / "tour.ckpt", *command[3:], "--port", str(port)],
                                  cwd=tmp_path, stdout=log, stderr=log, env=environment)
    try:
        wait(lambda: "?token=" in (tmp_path / "log").read_text(), 120)
        token = (tmp_path / "log").read_text().partition("?token=")[2].split()[0]

        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())  # the token is kept in a cookie

        def page() -> bool:
            try:
                return b"jupyter-config-data" in opener.open(f"http://127.0.0.1:{port}/?token={token}", timeout=60).read()
            except urllib.error.URLError:
                return False

        wait(page, 120)
    finally:
        server.terminate()
        server.wait(30)


def test_port_that_is_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, "-c", "from explainable_mri.cli import main; main()", "app", "nbs/tour.ckpt", "--port", str(port)],
                              cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode != 0 and f"cannot listen on port {port}" in done.stderr and "Traceback" not in done.stderr
