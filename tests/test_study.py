"""A whole study by one command: folds as executed notebooks, one that fails, the same command again, and the page of it all."""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

ROOT = Path(__file__).parents[1]
TINY = """
name: tiny
cohort: {name: phantom, params: {folder: data/tiny, scans: 48, seed: 2}}
split: {params: {folds: 2}}
training: {epochs: 2, accelerator: cpu}
evaluation: {replicates: 100, subgroups: [sex, age]}
"""


def crossval(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    "Run the command as a user does."
    code = "import sys; from explainable_mri.cli import main; sys.argv[0] = 'explainable-mri'; main()"
    return subprocess.run([sys.executable, "-c", code, "crossval", "tiny.yaml", *arguments], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=900)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess, subprocess.CompletedProcess]:
    "A study of two folds: the second cannot be written at first, and the same command is given again."
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(TINY)
    obstacle = folder / "results" / "tiny" / "fold-2"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the folder of a fold should be")
    first = crossval(folder)
    (obstacle.parent / "times").write_text(str((obstacle.parent / "fold-1" / "train.ipynb").stat().st_mtime_ns))
    obstacle.unlink()
    return folder, first, crossval(folder)


def test_a_failing_fold_is_named_and_holds_up_no_other(study):
    folder, first, _ = study
    assert first.returncode == 1 and "1 folds finished: 1" in first.stdout and "fold-2 failed:" in first.stdout
    assert "Traceback" not in first.stdout and "whole log:" in first.stdout


def test_the_same_command_goes_on_and_repeats_nothing(study):
    folder, _, second = study
    results = folder / "results" / "tiny"
    assert second.returncode == 0 and "2 folds finished: 1, 2" in second.stdout, second.stdout + second.stderr
    assert str((results / "fold-1" / "train.ipynb").stat().st_mtime_ns) == (results / "times").read_text()
    for fold in (1, 2):
        cells = nbformat.read(results / f"fold-{fold}" / "train.ipynb", 4).cells
        assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
        assert not any(output.get("name") == "stderr" for cell in cells for output in cell.get("outputs", []))


def test_tables_give_every_auc_its_interval(study):
    place = study[0] / "results" / "tiny" / "study"
    metrics = pd.read_csv(place / "metrics.csv")
    auc = metrics[metrics.metric == "auc"]
    assert len(auc) == 2 and (auc.low <= auc.pooled).all() and (auc.pooled <= auc.high).all() and (auc.folds == 2).all()
    assert set(pd.read_csv(place / "subgroups.csv").column) == {"sex", "age"}
    assert set(pd.read_csv(place / "baselines.csv").against) == {"region_volume", "regional_volumes", "linear_maps"}
    assert all((place / f"{name}.tex").is_file() for name in ("metrics", "subgroups", "calibration", "baselines", "folds"))
    predictions = pd.read_csv(study[0] / "results" / "tiny" / "fold-1" / "predictions.csv")
    assert (predictions.likelihood_low <= predictions.likelihood).all() and (predictions.likelihood <= predictions.likelihood_high).all()


def test_the_notebook_is_the_page_of_the_study(study, monkeypatch):
    folder = study[0]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    papermill.execute_notebook(ROOT / "nbs" / "crossval.ipynb", folder / "page.ipynb", {"config": "tiny.yaml"}, kernel_name="python3",
                               progress_bar=False)
    outputs = [output for cell in nbformat.read(folder / "page.ipynb", 4).cells for output in cell.get("outputs", [])]
    text = "\n".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/html", "")) for output in outputs)
    assert "2 folds finished" in text and "region_volume" in text and "persons" in text
    assert not [output for output in outputs if output.get("name") == "stderr"]
