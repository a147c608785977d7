"""The experiment notebooks as papermill runs them: other parameters in, an executed report out."""
import re
import shutil
import subprocess
import sys
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
    for name in ("train", "explain", "crossval"):
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
    assert not [output for output in outputs if "%|" in str(output.get("data", {}).get("text/plain", "")) or output.get("name") == "stderr"]
    texts = [str(output.get("text", "")) + str(output.get("data", {}).get("text/html", "")) + str(output.get("data", {}).get("text/markdown", ""))
             for output in outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "\n".join(texts) + f"\n{pictures} pictures"


def test_train_then_explain(project, monkeypatch):
    parameters = {"config": "config/tiny.yaml", "overrides": "training.epochs=2 training.monitor=validation_loss", "fold": 2}
    text = execute(project, "train", monkeypatch, **parameters)
    assert "# Training of tiny, fold 2 of 2" in text and "balanced accuracy" in text and "AD vs CN" in text and "7 pictures" in text
    assert "epochs: 2" in text and "<details>" in text and "2 epochs" in text and "Brier score" in text  # configuration folded, durations, calibration
    assert (project / "results" / "tiny" / "fold-2" / "metrics.json").exists()

    text = execute(project, "explain", monkeypatch, **parameters)
    assert "# Explanation of tiny, fold 2 of 2" in text and "lrp.sequential_preset_a" in text and "share of the brain" in text and "13 pictures" in text
    assert "is not an atrophy map" in text and "Red speaks for MCI or AD" in text
    assert list((project / "results" / "tiny" / "fold-2" / "explanations" / "relevance").glob("*.nii.gz"))


@pytest.mark.slow
def test_a_fold_as_a_page_without_code(project, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = [str(Path(sys.executable).with_name("explainable-mri"))]
    done = subprocess.run([*program, "run", "explain", "config/tiny.yaml", "training.epochs=2", "training.monitor=validation_loss", "--fold", "2", "--report",
                           "--language", "de"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Unable to parse" not in done.stderr and "unknown parameter" not in done.stderr and "Traceback" not in done.stderr
    page = (project / "results" / "tiny" / "fold-2" / "explain.html").read_text(encoding="utf-8")
    assert "<h1>Erklärung von tiny, Fold 2 von 2</h1>" in page and "keine Atrophiekarte" in page and "nicht für die Diagnose" in page
    assert "import " not in re.sub(r"<style>.*?</style>|<pre>.*?</pre>", "", page, flags=re.DOTALL) and "%|" not in page and "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png|#)', page) and not re.findall(r"<img(?![^>]*alt=\"[^\"]+\")[^>]*>", page)
    wrong = subprocess.run([*program, "run", "train", "config/tiny.yaml", "training.epochs=3", "--fold", "2"], cwd=project, capture_output=True, text=True)
    assert wrong.returncode == 1 and "training.epochs: there 2, now 3" in wrong.stderr and "failed-train.ipynb" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_all_folds_as_a_page_without_code(project, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = [str(Path(sys.executable).with_name("explainable-mri"))]
    done = subprocess.run([*program, "run", "crossval", "config/tiny.yaml", "name=both", "training.epochs=2", "evaluation.replicates=100", "--report", "--language",
                           "de"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    page = (project / "results" / "both" / "crossval.html").read_text(encoding="utf-8")
    assert "<h1>Experiment both (simulierte Kohorte)</h1>" in page and "Mittel ± SD über Folds" in page and "keine Atrophiekarte" in page
    assert "import " not in re.sub(r"<style>.*?</style>|<pre>.*?</pre>", "", page, flags=re.DOTALL) and "%|" not in page and "<script" not in page


def test_papermill_knows_the_parameters():
    for name in ("train", "explain", "crossval"):
        found = papermill.inspect_notebook(ROOT / "nbs" / f"{name}.ipynb")
        assert {"config", "overrides"} <= set(found)
        assert all(one["inferred_type_name"] not in (None, "None") for one in found.values()), found
