"""New scans by the command: what a killed batch keeps, raw scans with and without ANTs, and what is refused."""
import json
import os
import shutil
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
from explainable_mri.preprocessing.study import to_own_space

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


def read_dicom(place: str) -> tuple[dict, nib.Nifti1Image]:
    "The headers of the files for the archive by name, and the map as an image of nibabel."
    import highdicom
    import pydicom

    volume = highdicom.imread(Path(place, "relevance.dcm")).get_volume()
    image = nib.Nifti1Image(volume.array.astype(np.float32), np.diag([-1, -1, 1, 1]) @ volume.affine)
    return {path.name: pydicom.dcmread(path) for path in Path(place).iterdir()}, nib.as_closest_canonical(image)


def test_maps_for_the_archive_are_nobodys_and_lie_where_the_map_does(experiment, table, raw, tmp_path):
    pytest.importorskip("highdicom", reason="needs the extra: pip install 'explainable-mri[report]'")
    scans = pd.read_csv(table).path
    model, none = experiment.folder / "fold-1", tmp_path / "none"
    code, out, error = predict(tmp_path, model, scans[0], *PERSON, "--dicom", "--out", "out")
    assert code == 0, error
    found = pd.read_csv(tmp_path / "out" / "predictions.csv").iloc[0]
    headers, image = read_dicom(tmp_path / found.dicom)
    assert sorted(headers) == ["relevance.dcm", "slices_axial.dcm", "slices_coronal.dcm", "slices_sagittal.dcm"]
    assert {header.PatientID[:5] for header in headers.values()} == {"XMRI-"} and not any(header.PatientName for header in headers.values())
    whole = nib.load(tmp_path / found.relevance_map)
    hot = np.unravel_index(np.abs(image.get_fdata()).argmax(), image.shape)
    assert whole.get_fdata()[tuple(np.rint(nib.affines.apply_affine(np.linalg.inv(whole.affine) @ image.affine, hot)).astype(int))] == image.get_fdata()[hot]

    for arguments, words in [((scans[0], "--identity-from", raw / "exam"), "ask for these with --dicom"),
                             ((scans[0], scans[1], "--dicom", "--identity-from", raw / "exam"), "An identity belongs to one scan, and there are 2"),
                             ((scans[0], "--dicom", "--identity-from", none), "is not there"),
                             ((scans[0], "--dicom", "--identity-from", table), "holds no DICOM image of magnetic resonance")]:
        code, out, error = predict(tmp_path, model, *arguments, *PERSON, "--out", "refused")
        assert code == 1 and words in error, error
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_maps_for_the_archive_lie_on_the_scan_as_it_came(experiment, raw, tmp_path):
    for name, reason in {"ants": "preprocess", "highdicom": "report"}.items():
        pytest.importorskip(name, reason=f"needs the extra: pip install 'explainable-mri[{reason}]'")
    arguments = (experiment.folder / "fold-1", raw / "exam", "--tiv", "1410", "--dicom", "--out", "out")
    code, out, error = predict(tmp_path, *arguments, "--identity-from", raw / "exam")
    assert code == 0, error
    found = pd.read_csv(tmp_path / "out" / "predictions.csv").iloc[0]
    headers, image = read_dicom(tmp_path / found.dicom)
    assert {str(header.PatientName) for header in headers.values()} == {"Testperson^Ada"}
    scan = nib.as_closest_canonical(nib.load(raw / "V1.nii.gz"))
    assert image.shape == scan.shape and np.allclose(image.affine, scan.affine, atol=0.01)
    carried = to_own_space(nib.load(tmp_path / found.relevance_map), (tmp_path / found.prepared).parent, scan)
    np.testing.assert_allclose(image.get_fdata(), carried.get_fdata(), atol=1e-6 * np.abs(carried.get_fdata()).max())
    brain = scan.get_fdata() > scan.get_fdata().mean()
    assert np.abs(image.get_fdata())[brain].sum() > 0.8 * np.abs(image.get_fdata()).sum(), "the map does not lie on the head"

    other = write_dicom(simulate_raw_scan(seed=4, voxel_size=2.5).image, tmp_path / "other")
    code, out, error = predict(tmp_path, *arguments, "--identity-from", other)
    assert code == 1 and "no series there has the voxels of the scan" in error and "Testperson" not in error


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


def test_the_viewers_report_shows_the_cases_that_predict_shows(experiment, table, tmp_path):
    from explainable_mri.viewer.state import Collection, Subject
    from explainable_mri.viewer.widget import Session, session_report

    scan = pd.read_csv(table).iloc[0]
    covariates = {"age": float(scan.age), "sex": scan.sex, "tiv": float(scan.tiv), "field_strength": float(scan.field_strength)}
    fold = experiment.folder / "fold-1"
    session = Session(Collection({"P": Subject(Path(scan.path), covariates)}, {"fold": fold}))
    session.update({})
    heading = b"The nearest cases of the training part"
    shutil.rmtree(fold / "neighbours", ignore_errors=True)
    assert heading not in session_report(session, "html")[1], "the viewer does not make a visitor wait for the features of all training scans"
    person = [part for name, value in covariates.items() for part in ("--" + name.replace("_", "-"), value)]
    code, out, error = predict(tmp_path, fold, scan.path, *person, "--report", "en")
    assert code == 0, error
    page = next(tmp_path.rglob("*_report.html")).read_bytes()
    mine = session_report(session, "html")[1]
    cases = [text[text.index(heading):][:3000].split(b"</table>")[0].split(b"<table")[1] for text in (page, mine)]
    assert cases[0] == cases[1]
