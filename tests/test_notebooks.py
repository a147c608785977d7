"""The experiment notebooks as papermill runs them: other parameters in, an executed report out."""
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    "A project folder with the notebooks and a tiny experiment."
    folder = tmp_path_factory.mktemp("project")
    (folder / "nbs").mkdir()
    for name in ("train", "explain"):
        shutil.copy(ROOT / "nbs" / f"{name}.ipynb", folder / "nbs")
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "config" / "tiny.yaml").write_text(
        "base: base.yaml\nname: tiny\ncohort: {name: phantom, params: {folder: data/tiny, scans: 48, seed: 2}}\n"
        "split: {params: {folds: 2}}\ntraining: {epochs: 9}\n")
    return folder


def execute(project: Path, name: str, monkeypatch, **parameters) -> str:
    "Run a notebook as papermill does; return the text and the kinds of its outputs."
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = project / f"{name}_out.ipynb"
    papermill.execute_notebook(f"nbs/{name}.ipynb", out, parameters=parameters, kernel_name="python3", progress_bar=False)
    outputs = [output for cell in nbformat.read(out, 4).cells for output in cell.get("outputs", [])]
    texts = [str(output.get("text", "")) + str(output.get("data", {}).get("text/html", "")) for output in outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "\n".join(texts) + f"\n{pictures} pictures"


def test_train_then_explain(project, monkeypatch):
    parameters = {"config": "config/tiny.yaml", "overrides": "training.epochs=2 training.monitor=validation_loss", "fold": 2}
    text = execute(project, "train", monkeypatch, **parameters)
    assert "epochs: 2" in text and "balanced_accuracy" in text and "AD vs CN" in text and "4 pictures" in text
    assert (project / "results" / "tiny" / "fold-2" / "metrics.json").exists()

    text = execute(project, "explain", monkeypatch, **parameters)
    assert "scans explained by lrp.sequential_preset_a" in text and "volume_share" in text and "9 pictures" in text
    assert list((project / "results" / "tiny" / "fold-2" / "explanations" / "relevance").glob("*.nii.gz"))
