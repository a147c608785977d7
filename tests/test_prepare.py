"""Raw scans of known anatomy become maps that agree with the truth, in any format, and a study survives accidents."""
import gzip
import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from explainable_mri.data.atlases import load_brain_mask, load_template
from explainable_mri.data.cohorts import read_cohort
from explainable_mri.data.dicom import DicomError, simulate_raw_scan, unpack, write_dicom
from explainable_mri.data.volumes import get_grid, load_volume
from explainable_mri.experiments import prepare as module
from explainable_mri.experiments.prepare import PrepareError, prepare

GRID = get_grid("mni_3mm")
LESION = (-40, -30, 20, 14)
PERSON = {"PatientName": "Lovelace^Augusta", "PatientID": "SECRET-1815", "PatientBirthDate": "18151210",
          "InstitutionName": "Analytical Hospital", "StudyInstanceUID": "1.2.3.4", "StudyDate": "18521127"}


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> tuple[Path, Path, dict]:
    "A study as it comes, the folder it was prepared to, and the true scans by name."
    pytest.importorskip("ants", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    folder = tmp_path_factory.mktemp("prepare")
    source, out = folder / "study", folder / "prepared"
    head, bare = simulate_raw_scan(seed=3, lesion=LESION), simulate_raw_scan(seed=4, head=False)
    exam = write_dicom(head.image, folder / "exam", **PERSON)
    write_dicom(head.image, exam, SeriesNumber=2, SeriesDescription="t2_flair", EchoTime=388.0, **PERSON)
    source.mkdir()
    with zipfile.ZipFile(source / "zipped.zip", "w") as archive:
        for path in exam.iterdir():
            archive.write(path, f"../../{path.name}")
    nib.save(head.image.as_reoriented(nib.orientations.axcodes2ornt("ASL")), source / "turned.nii.gz")
    nib.save(bare.image, source / "bare.nii.gz")
    (source / "broken.nii.gz").write_bytes(gzip.compress(b"nothing"))
    prepare(source, out, grid=GRID.name, jobs=2)
    return source, out, {"zipped": head, "turned": head, "bare": bare}


def read_map(out: Path, name: str) -> np.ndarray:
    return load_volume(out / name / f"mwp1{name}.nii.gz", GRID)


@pytest.mark.parametrize("name", ["zipped", "turned", "bare"])
def test_map_agrees_with_template_and_truth(study, name):
    _, out, scans = study
    grey, brain = read_map(out, name), load_brain_mask(GRID)
    assert np.corrcoef(grey[brain], load_template(GRID)[brain])[0, 1] >= 0.85
    measures = json.loads((out / name / "provenance.json").read_text())["measures"]
    assert measures["tiv"] == pytest.approx(scans[name].volume("brain"), rel=0.06)
    assert measures["gm_volume"] == pytest.approx(scans[name].volume("grey_matter"), rel=0.2)
    assert grey.sum() * GRID.voxel_volume == pytest.approx(measures["gm_volume"], rel=0.01)


def test_both_ways_agree(study):
    brain = load_brain_mask(GRID)
    dicom, nifti = (read_map(study[1], name)[brain] for name in ("zipped", "turned"))
    assert np.corrcoef(dicom, nifti)[0, 1] > 0.98


@pytest.mark.parametrize("name", ["zipped", "turned"])
def test_left_stays_left(study, name):
    places = nib.affines.apply_affine(GRID.cropped_affine, np.moveaxis(np.indices(GRID.cropped_shape), 0, -1))
    shares = []
    for side in (1, -1):
        ball = np.linalg.norm(places - np.array(LESION[:3]) * [side, 1, 1], axis=-1) < 10
        shares.append(read_map(study[1], name)[ball].sum() / load_template(GRID)[ball].sum())
    left, right = shares
    assert left < 0.5 < 0.7 < right


def test_table_is_a_cohort(study):
    _, out, _ = study
    table = pd.read_csv(out / "participants.tsv", sep="\t").set_index("subject")
    assert sorted(table.index) == ["bare", "turned", "zipped"]
    assert table.loc["zipped", ["age", "sex", "field_strength"]].tolist() == [73, "F", 3]
    assert table["flags"].isna().all()
    filled = table.reset_index().assign(group="CN", path=lambda rows: [str(out / path) for path in rows["path"]])
    filled.to_csv(out.parent / "cohort.csv", index=False)
    assert len(read_cohort(out.parent / "cohort.csv", GRID, groups=["CN"], covariates=["tiv"])) == 3


def test_failed_scan_is_reported_and_pages_are_self_contained(study):
    _, out, _ = study
    failed = pd.read_csv(out / "failed.tsv", sep="\t")
    assert failed["scan"].tolist() == ["broken"] and "not a readable NIfTI" in failed["error"][0]
    page = (out / "zipped" / "quality.html").read_text()
    assert "data:image/png;base64" in page and "t2_flair" not in page and "named t2, flair" in page
    assert "http" not in page.split("<body>")[1]


def test_nothing_identifies_the_person(study):
    for path in (each for each in study[1].rglob("*") if each.is_file()):
        content = path.read_bytes()
        content = gzip.decompress(content)[:352] if path.suffix == ".gz" else content
        for private in PERSON.values():
            assert private.encode() not in content, path


def test_rerun_makes_only_what_is_missing(study, monkeypatch):
    source, out, _ = study
    record = out / "bare" / "provenance.json"
    text = record.read_text()
    started = []

    def start(scan, *_):
        started.append(scan.name)
        if scan.name == "bare":
            record.write_text(text)
            return None
        return "broken as before"

    monkeypatch.setattr(module, "_start", start)
    prepare(source, out, grid=GRID.name)
    assert started == ["broken"]
    record.unlink()
    prepare(source, out, grid=GRID.name)
    assert started[1:] == ["bare", "broken"]


def test_crash_is_reported(study, monkeypatch, tmp_path):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(PrepareError, match="ended with code 1"):
        prepare(study[0] / "bare.nii.gz", tmp_path, grid=GRID.name)


def test_unpack_keeps_inside_and_within_bounds(tmp_path):
    archive, folder = tmp_path / "evil.zip", tmp_path / "inside"
    folder.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("../outside", b"x")
        opened.writestr("/absolute", b"\0" * 10**6)
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        opened.writestr(link, "/etc/passwd")
    assert [path.parent for path in unpack(archive, folder)] == [folder] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.zip", "inside"]
    with pytest.raises(DicomError, match="more than"):
        unpack(archive, folder, limit=10**5)
