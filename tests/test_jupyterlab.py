"""The viewer in JupyterLab itself, as somebody who edits notebooks sees it."""
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_app import free_port, wait

pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install 'explainable-mri[dev]'")

ROOT = Path(__file__).parents[1]
CELL = f"""import explainable_mri as xm
from explainable_mri.data.phantom import phantom_cohort
model = xm.load_model({str(ROOT / "nbs" / "tour.ckpt")!r})
table = phantom_cohort(model.grid, model.task.groups, [], "data", scans=4, seed=7).table
result = model.explain(table.path.iloc[model.predict_maps(model.maps(table))[:, 1].argmax()], "lrp.epsilon_plus", target="AD")
viewer = result.view(language="de")
viewer"""



@contextmanager
def opened_notebook(browser, folder: Path) -> Iterator[Any]:
    "A notebook in JupyterLab, in a browser, with its kernel ready."
    cells = [{"cell_type": "code", "id": f"cell-{number}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
             for number, source in enumerate((CELL, "print('threshold is', round(viewer.state['threshold'], 2))"))]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    (folder / "look.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", f"--notebook-dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": f"{folder}/.settings", "JUPYTERLAB_WORKSPACES_DIR": f"{folder}/.settings"}
    with (folder / ".log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=2).status == 200
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait(answers, 120)
        page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
        page.set_default_timeout(120_000)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/look.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_selector("#jp-main-statusbar :text('| Idle')")  # before, a cell that is run is lost
        yield page
        page.context.close()
    finally:
        server.terminate()
        server.wait(60)


def run_cell(page, number: int) -> None:
    "Run a cell."
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").nth(number).click()
    page.keyboard.press("Shift+Enter")


@pytest.mark.slow
def test_viewer_opens_in_jupyterlab_and_hands_its_state_to_python(browser, tmp_path):
    with opened_notebook(browser, tmp_path) as page:
        run_cell(page, 0)
        page.wait_for_selector(".xmri[data-ready=yes]")
        assert "Schwelle" in page.locator(".xmri").inner_text()
        page.locator('.xmri [data-part="threshold"]').evaluate("(one) => { one.value = 0.37; one.dispatchEvent(new Event('input')) }")
        page.wait_for_timeout(1000)
        run_cell(page, 1)
        page.wait_for_selector(".jp-OutputArea-output:has-text('threshold is 0.37')")
