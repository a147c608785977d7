"""New scans by the command: what a killed batch keeps, raw scans with and without ANTs, and what is refused."""
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from explainable_mri.config import ExperimentConfig, make_config
from explainable_mri.experiments.folder import load_cohort
from explainable_mri.experiments.train import train_fold
from explainable_mri.preprocessing.simulation import simulate_raw_scan, write_dicom

ROOT = Path(__file__).parents[1]
PERSON = ("--age", "74", "--sex", "F", "--tiv", "1410", "--field-strength", "3")
WITHOUT_ANTS = "import sys; sys.modules['ants'] = None; from explainable_mri.cli import main; main()"


def start(folder: Path, *arguments: object, code: str = "from explainable_mri.cli import main; main()") -> subprocess.Popen:
    "Start `explainable-mri predict` in a process of its own."
    return subprocess.Popen([sys.executable, "-c", code, "predict", *map(str, arguments)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def predict(folder: Path, *arguments: object, **options: str) -> tuple[int, str, str]:
    "Run `explainable-mri predict`; returns its exit code, and what it said on both channels."
    process = start(folder, *arguments, **options)
    out, error = process.communicate(timeout=600)
    assert "Traceback" not in out + error, error
    return process.returncode, out, error


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> ExperimentConfig:
    "A tiny experiment with its first fold trained."
    folder = tmp_path_factory.mktemp("predict")
    config = make_config({
        "name": "tiny", "results": f"{folder}/results", "split": {"params": {"folds": 2}}, "evaluation": {"replicates": 100, "baselines": []},
        "cohort": {"name": "phantom", "params": {"folder": f"{folder}/data", "scans": 40}}, "training": {"epochs": 2}})
    train_fold(config)
    return config


@pytest.fixture(scope="module")
def table(experiment, tmp_path_factory) -> Path:
    "A table of 30 scans with their covariates."
    path = tmp_path_factory.mktemp("table") / "new.csv"
    load_cohort(experiment).table.head(30)[["path", "age", "sex", "tiv", "field_strength"]].to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_a_killed_batch_goes_on_and_ends_as_if_nothing_had_happened(experiment, table, tmp_path):
    arguments = [experiment.folder / "fold-1", "--table", table, "--explain", "lrp.epsilon_plus", "--target", "MCI or AD", "--out"]
    process = start(tmp_path, *arguments, "killed")
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "killed").glob("*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the batch was done before it could be killed"
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.json")}
    assert 3 <= len(done) < 30 and not (tmp_path / "killed" / "predictions.csv").exists()
    lost = Path(tmp_path, json.loads(sorted(done)[0].read_text())["row"]["relevance_map"])
    lost.unlink()  # an answer whose map is gone is no answer
    done.pop(sorted(done)[0])

    assert predict(tmp_path, *arguments, "killed")[0] == 0 and lost.is_file()
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished scan was predicted again"
    assert predict(tmp_path, *arguments, "whole")[0] == 0
    killed, whole = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("killed", "whole"))
    assert len(killed) == 30 and killed.drop(columns="relevance_map").equals(whole.drop(columns="relevance_map"))
    for one, other in zip(killed.relevance_map, whole.relevance_map):
        np.testing.assert_array_equal(nib.load(tmp_path / one).get_fdata(), nib.load(tmp_path / other).get_fdata())
    assert not list((tmp_path / "killed").glob(".partial-*"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    "A simulated head as a NIfTI file, with a name that says nothing, and zipped as a DICOM study."
    folder = tmp_path_factory.mktemp("raw")
    head = simulate_raw_scan(seed=3, voxel_size=2.5).image
    nib.save(head, folder / "V1.nii.gz")
    study = write_dicom(head, folder / "exam")
    with zipfile.ZipFile(folder / "P7.zip", "w") as archive:
        for path in study.iterdir():
            archive.write(path, f"t1/{path.name}")
    return folder


def test_raw_scans_without_ants_are_refused_with_what_to_install(experiment, table, raw, tmp_path):
    scan = pd.read_csv(table).path[0]
    code, out, error = predict(tmp_path, experiment.folder / "fold-1", raw / "V1.nii.gz", scan, *PERSON, code=WITHOUT_ANTS)
    assert code == 1 and "Not predicted: " in error and "pip install 'explainable-mri[preprocess]'" in error
    found = pd.read_csv(tmp_path / "predictions" / "predictions.csv")
    assert found.probability.notna().tolist() == [False, True]  # and holds up no other


def test_raw_scans_are_prepared_and_predicted(experiment, raw, tmp_path):
    pytest.importorskip("ants", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    arguments = [experiment.folder / "fold-1", "--explain", "lrp.epsilon_plus", raw / "V1.nii.gz", *PERSON]
    code, out, error = predict(tmp_path, *arguments)
    assert code == 0, error
    found = pd.read_csv(tmp_path / "predictions" / "predictions.csv").iloc[0]
    assert found.path == str(raw / "V1.nii.gz") and 0 <= found.likelihood_low <= found.likelihood <= found.likelihood_high <= 1
    assert nib.load(tmp_path / found.prepared).shape == nib.load(tmp_path / found.relevance_map).shape
    assert "Prepared here, with ANTs" in found.notes
    record = next((tmp_path / "predictions" / "prepared").rglob("provenance.json"))
    stamp = record.stat().st_mtime_ns
    assert predict(tmp_path, *arguments)[0] == 0 and record.stat().st_mtime_ns == stamp, "it is prepared twice"


@pytest.mark.slow
def test_a_zip_of_dicom_brings_its_covariates(experiment, raw, tmp_path):
    pytest.importorskip("ants", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    code, out, error = predict(tmp_path, experiment.folder / "fold-1", raw / "P7.zip", "--age", "60")
    assert code == 0, error
    found = pd.read_csv(tmp_path / "predictions" / "predictions.csv").iloc[0]
    assert np.isfinite(found.likelihood) and "age is 60.0, as given; the scan's header says 73" in found.notes
    assert not [path for path in (tmp_path / "predictions").rglob("*.json") if "MRN-4711" in path.read_text() or "Testperson" in path.read_text()]


def test_what_is_no_scan_is_named(experiment, tmp_path):
    pytest.importorskip("ants", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no scan")
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((10, 10, 10), np.float32), np.eye(4)), tmp_path / "noise.nii.gz")
    expected = {"noise.nii.gz": "field of view", "notes.txt": "no DICOM images", "lost.nii.gz": "no such file", "empty": "no DICOM images"}
    code, out, error = predict(tmp_path, experiment.folder / "fold-1", *expected, *PERSON, "--out", "out")
    assert code == 1 and error.count("Not predicted: ") == 4, error
    found = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert [words in said for words, said in zip(expected.values(), found.error)] == [True] * 4


def test_results_do_not_lie_among_the_scans(experiment, tmp_path):
    nib.save(nib.Nifti1Image(np.ones((10, 10, 10), np.float32), np.eye(4)), tmp_path / "scan.nii.gz")
    code, out, error = predict(tmp_path, experiment.folder / "fold-1", tmp_path, *PERSON)
    assert code == 1 and "Choose another folder with --out" in error
