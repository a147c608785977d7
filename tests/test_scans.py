"""In folders of any make, participants and visits are named by paths alone, and every file that looks like a scan is accounted for."""
import gzip
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from explainable_mri.cli import main
from explainable_mri.data.tables import TableError
from explainable_mri.data.volumes import VolumeError
from explainable_mri.errors import ExplainableMRIError
from explainable_mri.preprocessing import study as module
from explainable_mri.preprocessing.participants import match_participants, read_participants
from explainable_mri.preprocessing.scans import PrepareError, find_scans, read_scan, survey
from explainable_mri.preprocessing.simulation import write_dicom
from explainable_mri.preprocessing.study import prepare

AFFINE = nib.affines.from_matvec(np.diag([4, 4.5, 5.0]), (-80, -70, -60))
VOXELS = np.random.default_rng(0).integers(1, 1000, (40, 30, 28)).astype(np.int16)
BLOCK = nib.Nifti1Image(VOXELS, AFFINE)


def put(folder: Path, *names: str) -> Path:
    "Write a small scan under each name."
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(BLOCK, folder / name)
    return folder


def people(folder: Path, **keywords) -> list[tuple[str, str]]:
    "Participant and visit of each scan that can be prepared."
    return [(scan.subject, scan.session) for scan in find_scans(folder, **keywords) if not scan.problem]


@pytest.mark.parametrize(("path", "subject", "session"), [
    ("sub-01/ses-M06/anat/sub-01_ses-M06_T1w.nii.gz", "sub-01", "M06"),
    ("ADNI/002_S_0295/MP-RAGE/2006-04-18_08_20_30.0/I13722/ADNI_002_S_0295_MR_MP-RAGE_br_raw_1_I13722.nii", "002_S_0295", "2006-04-18"),
    ("ADNI_011_S_0003_MR_MPR__GradWarp__B1_Correction_Br_20070108234513_S12345_I35521.nii", "011_S_0003", "2007-01-08"),
    ("disc1/OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon.nii.gz", "OAS1_0001", "MR1"),
    ("OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_T1w.nii.gz", "sub-OAS30001", "d0129"),
    ("OAS30001_MR_d0129/scan.nii.gz", "OAS30001", "d0129"),
    ("P01/visit1/t1.nii.gz", "P01", "visit1"), ("visit2/P01.nii.gz", "P01", "visit2"), ("P01_m12_T1.nii.gz", "P01", "m12"),
    ("P01/2/t1.nii.gz", "P01", "2"), ("AD/P01/nifti/t1_mprage.nii.gz", "P01", "1"), ("P01/20100503/brain.nii.gz", "P01", "20100503"),
    ("AIBL/10/MPRAGE/2008-01-02_10_00_00.0/S1/AIBL_10_MR_MPRAGE_br_raw_1.nii", "10", "2008-01-02"),
    ("miriad_188_AD_M_02_MR_1.nii", "miriad_188", "02-1"), ("P001_sc.nii.gz", "P001", "sc"), ("P001/2019/t1.nii.gz", "P001", "2019"),
    ("P001/01.02.2019/t1.nii.gz", "P001", "01.02.2019"), ("P01_t1_mprage_20200131101010_5.nii.gz", "P01", "20200131"),
    ("sub001/ses1/T1w.nii.gz", "sub001", "ses1"), ("Proband_01/Verlauf/t1.nii", "Proband_01", "Verlauf"),
    ("P1/month 6.nii", "P1", "month_6"), ("DELCODE_001_M12_T1.nii.gz", "DELCODE_001", "M12"), ("FRA_AD_001.nii", "FRA_AD_001", "1"),
    ("P01_pre.nii.gz", "P01", "pre"), ("Project_S001_MR1/SCANS/3/NIFTI/t1.nii.gz", "Project_S001", "MR1"),
    ("baseline/001.nii.gz", "001", "baseline"), ("mprage_001.nii.gz", "001", "1"), ("Größe 1/t1.nii.gz", "Größe_1", "1")])
def test_a_path_alone_says_who_and_when(tmp_path, path, subject, session):
    put(tmp_path, path)
    assert people(tmp_path) == [(subject, session)]
    name = find_scans(tmp_path)[0].name
    put(tmp_path, "P99/visit7/t1.nii.gz", "zzz.nii.gz", "P98/t1.nii.gz")  # other files change nothing
    assert name in [scan.name for scan in find_scans(tmp_path)] and (subject, session) in people(tmp_path)


def test_visits_and_people_of_the_same_file_name_are_told_apart(tmp_path):
    put(tmp_path, *(f"P{person}/visit{visit}.nii.gz" for person in (1, 2) for visit in (1, 2)))
    assert people(tmp_path) == [(f"P{person}", f"visit{visit}") for person in (1, 2) for visit in (1, 2)]
    with zipfile.ZipFile(tmp_path / "P1" / "visit3.zip", "w") as archive:
        archive.writestr("1.dcm", b"x")
    assert ("P1", "visit3") in people(tmp_path)


@pytest.mark.parametrize(("names", "message"), [
    (["site1/P01.nii.gz", "site1/P02.nii.gz"], "'site1' may be a participant, or the folder of several (p1, p2)"),
    (["P01/t1.nii.gz", "P01/mprage.nii.gz"], "would be P01, visit 1"), (["Study/P01/2019-01-01/t1.nii", "Study/P02/2020-01-01/t1.nii"],
                                                                         "'Study' may be a participant, or the folder of several"),
    (["AD/001.nii.gz", "CN/001.nii.gz"], "would be 001, visit 1"), (["P01/t1.nii.gz", "P01/t1 (1).nii.gz"], "would be P01, visit 1"),
    (["V1/P01.nii.gz"], "'V1' may be a participant or a visit of 'P01'"), (["P1.nii.gz", "P01.nii.gz"], "differ in spelling only"),
    (["Müller.nii.gz", unicodedata.normalize("NFD", "Müller.nii.gz")], "Remove all but one"), (["sub-1/sub-2_T1w.nii.gz"], "names sub-1 and sub-2"),
    (["a b.nii.gz", "a_b.nii.gz"], "Remove all but one"), (["sub-1/ses-1/sub-1_ses-2_T1w.nii.gz"], "names ses-1 and ses-2")])
def test_what_can_be_read_in_two_ways_is_not_guessed(tmp_path, names, message):
    put(tmp_path, *names, "Q9.nii.gz")
    problems = [scan.problem for scan in find_scans(tmp_path)]
    assert sum(message in problem for problem in problems) == len(names) and problems.count("") == 1


def test_a_pattern_says_it(tmp_path):
    put(tmp_path, "AD/site1/P01-V1.nii.gz", "AD/site1/P01-V2.nii.gz", "CN/site2/P02-V1.nii.gz", "CN/site2/phantom.nii.gz")
    found = survey(tmp_path, pattern=r"(?P<group>AD|CN)/[^/]+/(?P<subject>P\d+)-V(?P<session>\d)")
    assert [(scan.name, scan.subject, scan.session, scan.columns["group"]) for scan in found.scans] == [
        ("P01_ses-1", "P01", "1", "AD"), ("P01_ses-2", "P01", "2", "AD"), ("P02_ses-1", "P02", "1", "CN")]
    assert found.left_out == {"CN/site2/phantom.nii.gz": "does not fit the pattern"}
    for pattern, message in {"(P": "is not a regular expression", "(.*)": "does not say where the participant stands"}.items():
        with pytest.raises(PrepareError, match=message):
            survey(tmp_path, pattern=pattern)
    with pytest.raises(PrepareError, match="AD/site1/P01-V1.nii.gz: does not fit the pattern"):
        survey(tmp_path, pattern="(?P<subject>none)")


def test_people_in_folders_that_are_none_of_theirs_are_not_named_by_guess(tmp_path):
    pytest.importorskip("pydicom", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    for number in (1, 2):
        write_dicom(BLOCK.slicer[:3], tmp_path / "site1" / f"X{number}", PatientID=f"p{number}")
    problems = [scan.problem for scan in find_scans(tmp_path)]
    assert len(problems) == 2 and all("'site1' would be the name of 2 people" in problem for problem in problems)
    assert people(tmp_path, pattern="site1/(?P<subject>[^/]+)") == [("X1", "1"), ("X2", "1")]


def test_folders_of_several_people_without_numbers_are_not_taken_for_visits(tmp_path):
    pytest.importorskip("pydicom", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    nobody = {"PatientID": "", "PatientName": ""}
    for number, visit in ((1, "2019-01-01"), (2, "2020-01-01")):
        write_dicom(BLOCK.slicer[:3], tmp_path / "A" / f"P{number}", **nobody)
        write_dicom(BLOCK.slicer[:3], tmp_path / "B" / f"P{number}" / visit, **nobody)
        write_dicom(BLOCK.slicer[:3], tmp_path / "C" / visit / f"series{number}_of_this", **nobody)
        put(tmp_path, f"D/nifti/P{number}_v{number}.nii", f"E/v{number}/scan_{number}x.nii")
    problems = {(scan.subject, scan.problem.partition("(")[0]) for scan in find_scans(tmp_path)}
    assert problems == {*((name, f"'{name}' may be a participant, or the folder of several ") for name in "ABD"), ("C", ""), ("E", "")}


def test_every_file_that_looks_like_a_scan_is_accounted_for(tmp_path):
    pytest.importorskip("pydicom", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    put(tmp_path, "P01/P01_T1.nii.gz")
    for number, image in {2: nib.Nifti1Pair(VOXELS, AFFINE), 3: nib.MGHImage(VOXELS, AFFINE)}.items():
        (tmp_path / f"P0{number}").mkdir()
        nib.save(image, tmp_path / f"P0{number}" / f"P0{number}_T1{'.img' if number == 2 else '.mgz'}")
    for name in ("P04/P04.tar.gz", "P06/IM1.dcm.gz", "P06/IM2.dcm.gz", "P07/1.dcm", "P07/2.dcm", "P08/t1.nrrd", "P09/t1.hdr"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"nothing")
    for name in ("P05/P05_T1.nii.gz", "P10/IM1", "P10/IM2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to("../.git/annex/objects/nowhere")
    os.mkfifo(put(tmp_path, "P11/x.nii") / "P11" / "t1.nii")
    (tmp_path / "P11" / "x.nii").unlink()
    (tmp_path / "README").write_text("no scan")
    (tmp_path / ".git").mkdir()
    shutil.copy(tmp_path / "P01" / "P01_T1.nii.gz", tmp_path / ".git" / "object.nii.gz")
    elsewhere = put(tmp_path.parent / f"{tmp_path.name}-elsewhere", "t1.nii.gz")
    (tmp_path / "P12").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(tmp_path)  # a circle
    problems = {scan.subject: scan.problem for scan in find_scans(tmp_path)}
    expected = {"P01": "", "P02": "", "P03": "", "P04": "archive", "P05": "link to a file that is not there", "P06": "compressed file",
                "P07": "no readable DICOM image", "P08": "a format that is not read", "P09": "the .img file beside it is missing",
                "P10": "link to a file that is not there", "P11": "no ordinary file", "P12": ""}
    assert list(problems) == list(expected)
    assert all(words in problems[name] and bool(words) == bool(problems[name]) for name, words in expected.items())
    for scan in find_scans(tmp_path)[:3]:
        image = read_scan(scan).image
        np.testing.assert_array_equal(image.get_fdata(), VOXELS)
        np.testing.assert_allclose(image.affine, AFFINE)


def test_reports_among_dicom_files_are_no_lost_scans(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    write_dicom(BLOCK.slicer[:3], tmp_path / "P01")
    report = pydicom.Dataset()
    report.file_meta = pydicom.dataset.FileMetaDataset()
    report.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    report.SOPClassUID, report.SOPInstanceUID, report.Modality = pydicom.uid.BasicTextSRStorage, "1.2.3", "SR"
    report.save_as(tmp_path / "P01" / "report.dcm", enforce_file_format=True)
    (tmp_path / "P01" / "damaged.dcm").write_bytes(b"nothing")
    scan, = find_scans(tmp_path)
    assert scan.notes == ("1 of 5 files with it are not used: damaged.dcm is no readable DICOM image. Copy it again",)


def test_one_t1w_hides_nothing(tmp_path):
    put(tmp_path, *(f"sub-0{number}/anat/sub-0{number}_{suffix}.nii.gz" for number, suffix in enumerate(
        ["T1w", "UNIT1", "t1w", "mprage", "FLAIR", "T2w", "T1map"], start=1)), "sub-01/anat/sub-01_UNIT1.nii.gz",
        "derivatives/x/sub-01_desc-preproc_T1w.nii.gz")
    found = survey(tmp_path)
    assert [scan.name for scan in found.scans] == ["sub-01_T1w", "sub-02_UNIT1", "sub-03_t1w", "sub-04_mprage"]
    assert {path.rpartition("/")[2]: reason for path, reason in found.left_out.items()} == {
        "sub-05_FLAIR.nii.gz": "named FLAIR, not T1w", "sub-06_T2w.nii.gz": "named T2w, not T1w", "sub-07_T1map.nii.gz": "named T1map, not T1w",
        "sub-01_UNIT1.nii.gz": "the visit has a T1w image", "sub-01_desc-preproc_T1w.nii.gz": "in the folder 'derivatives'"}


@pytest.mark.parametrize(("code", "axes"), list(enumerate(["LAS", "LSA", "ASL", "LPS", "LIA", "AIL"])))
def test_analyze_pairs_are_read_by_their_code_of_orientation(tmp_path, code, axes):
    turned = BLOCK.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axes)))
    image = nib.AnalyzeImage(np.asarray(turned.dataobj), None)
    image.header.set_zooms(turned.header.get_zooms())
    nib.save(image, tmp_path / "P01.img")
    header = bytearray((tmp_path / "P01.hdr").read_bytes())
    header[252] = code
    (tmp_path / "P01.hdr").write_bytes(header)
    raw = read_scan(find_scans(tmp_path)[0])
    np.testing.assert_array_equal(raw.image.get_fdata(), VOXELS)
    np.testing.assert_allclose(nib.affines.voxel_sizes(raw.image.affine), nib.affines.voxel_sizes(AFFINE))
    assert f"by convention (axes {axes}" in raw.notes[0]
    header[252] = 9
    (tmp_path / "P01.hdr").write_bytes(header)
    with pytest.raises(VolumeError, match="P01.img: the Analyze header has the code 9 of orientation"):
        read_scan(find_scans(tmp_path)[0])


def test_nan_background_is_read_as_zero_with_a_note(tmp_path):
    voxels = VOXELS.astype(np.float32)
    voxels[[0, -1]] = np.nan
    nib.save(nib.Nifti1Image(voxels, AFFINE), tmp_path / "P01.nii.gz")
    raw = read_scan(find_scans(tmp_path)[0])
    assert np.isfinite(raw.image.get_fdata()).all() and "are NaN, as SPM writes the background" in raw.notes[0]


@pytest.mark.parametrize(("kept", "names"), [
    (["mri/orig.mgz"], ["mri/aseg.mgz", "mri/T1.mgz", "mri/orig/001.mgz"]), (["T1.nii"], ["c1T1.nii", "wc1T1.nii", "mT1.nii", "y_T1.nii"]),
    (["T1.nii"], ["mri/mwp1T1.nii", "mri/p0T1.nii", "mri/wmT1.nii"]), (["T1.nii"], ["T1_brain.nii", "T1_brain_pve_0.nii", "T1_seg.nii"]),
    (["T1_brain.nii"], []), (["P01-T1.nii"], ["P01-T2.nii", "P01-PD.nii"])])
def test_what_was_made_of_a_scan_is_no_second_scan(tmp_path, kept, names):
    for name in (*kept, *names):
        (tmp_path / "P01" / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save((nib.MGHImage if name.endswith(".mgz") else nib.Nifti1Image)(VOXELS, AFFINE), tmp_path / "P01" / name)
    found = survey(tmp_path)
    assert [scan.files[0].relative_to(tmp_path / "P01").as_posix() for scan in found.scans] == kept and people(tmp_path) == [("P01", "1")]
    assert len(found.left_out) == len(names)


def test_repeats_of_oasis_and_runs_of_bids(tmp_path):
    put(tmp_path, *(f"disc1/OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-{number}_anon.nii" for number in (1, 2, 3)),
        "disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/OAS1_0001_MR1_mpr_n4_anon_sbj_111.nii", "sub-1_run-1_T1w.nii", "sub-1_run-2_T1w.nii")
    scans = find_scans(tmp_path)
    assert [scan.name for scan in scans] == ["OAS1_0001_ses-MR1", "sub-1_run-1_T1w", "sub-1_run-2_T1w"]
    assert scans[0].files[0].name == "OAS1_0001_MR1_mpr-1_anon.nii"
    assert scans[1].notes == ("of the same participant and visit as sub-1_run-2_T1w; keep one in a cohort",)


def test_names_that_hide_what_is_in_a_file(tmp_path):
    put(tmp_path, "P01.nii.gz", "P02.nii", "P03.nii.gz")
    (tmp_path / "P01.nii.gz").rename(tmp_path / "P01.NII.GZ")
    (tmp_path / "P02.nii").rename(tmp_path / "P02.nii.gz")
    (tmp_path / "P03.nii.gz").rename(tmp_path / "P03.nii")
    scans = find_scans(tmp_path)
    np.testing.assert_array_equal(read_scan(scans[0]).image.get_fdata(), VOXELS)
    for scan, words in zip(scans[1:], ("not compressed, against its name; name it P02.nii)", "is compressed, against its name; name it P03.nii.gz"),
                           strict=True):
        with pytest.raises(VolumeError) as caught:
            read_scan(scan)
        assert words in str(caught.value)


def announce(path: Path, shape: tuple[int, int, int] = (30000, 30000, 3000), offset: float = 352) -> Path:
    "Write a file that announces much and holds little."
    header = bytearray(BLOCK.header.binaryblock)
    header[40:48], header[108:112] = struct.pack("<4h", 3, *shape), struct.pack("<f", offset)
    content = bytes(header) + b"\0" * 10**6
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["P01.nii", "P01.nii.gz", "P01.mgz", "P01.hdr"])
def test_announced_sizes_are_bounded_before_anything_is_read(tmp_path, name):
    if name.endswith(".mgz"):
        (tmp_path / name).write_bytes(gzip.compress(struct.pack(">5i", 1, 30000, 30000, 3000, 1) + b"\0" * 10**6))
    else:
        announce(tmp_path / name)
    if name.endswith(".hdr"):
        (tmp_path / "P01.img").write_bytes(b"\0" * 1000)
    with pytest.raises(VolumeError, match="announces 2700000 million voxels"):
        read_scan(find_scans(tmp_path)[0])


def test_damaged_files_are_refused_by_name(tmp_path):
    pytest.importorskip("dicom2nifti", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    packed = bytearray(gzip.compress(BLOCK.header.binaryblock + b"\0" * 4 + VOXELS.tobytes()))
    packed[20:60] = b"\xff" * 40
    (tmp_path / "P01.nii.gz").write_bytes(packed)
    (tmp_path / "P02.mgz").write_bytes(packed)
    announce(tmp_path / "P03.nii", (40, -30, 28))
    import pydicom
    for path in write_dicom(BLOCK, tmp_path / "P04").iterdir():
        header = pydicom.dcmread(path)
        header.file_meta.TransferSyntaxUID = "1.2.3"
        header.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=False)
    for scan, message in zip(find_scans(tmp_path), ("P01.nii.gz: not a readable", "P02.mgz: not a readable", "announces 40 × -30 × 28 voxels",
                                                    "cannot be converted"), strict=True):
        with pytest.raises(ExplainableMRIError, match=message):
            read_scan(scan)


def test_an_extension_of_gigabytes_is_refused(tmp_path):
    announce(tmp_path / "P01.nii.gz", (40, 30, 28), 3e9)
    with pytest.raises(VolumeError, match="3000000000 bytes from its start"):
        read_scan(find_scans(tmp_path)[0])


def test_a_zip_file_holds_a_pair_or_one_image(tmp_path):
    nib.save(nib.Nifti1Pair(VOXELS, AFFINE), tmp_path / "a.img")
    with zipfile.ZipFile(tmp_path / "P01.zip", "w") as archive:
        for name in ("a.hdr", "a.img"):
            archive.write(tmp_path / name, f"folder/{name}")
            (tmp_path / name).unlink()
    np.testing.assert_array_equal(read_scan(find_scans(tmp_path)[0]).image.get_fdata(), VOXELS)
    with zipfile.ZipFile(tmp_path / "P01.zip", "w") as archive:
        archive.writestr("x/Lovelace.nii.gz", b"nothing")
    with pytest.raises(VolumeError, match="P01.zip, 000000.nii.gz: not a readable NIfTI") as caught:
        read_scan(find_scans(tmp_path)[0])
    assert "Lovelace" not in str(caught.value)


def known(folder: Path, table: str) -> tuple[pd.DataFrame, list[str]]:
    "What participants.tsv says of the scans in a folder."
    (folder / "participants.tsv").write_text(table)
    return match_participants(find_scans(folder), read_participants(folder), folder)


def test_participants_are_matched_as_in_every_cohort(tmp_path):
    put(tmp_path, "001.nii.gz", "002.nii.gz")
    table, notes = known(tmp_path, "participant_id\tage\tgroup\ttiv\n1 \t70\tAD\t1400,5\n2\t71\tCN\t1500,25\n9\tn/a\tCN\tn/a\n")
    assert table.loc["001", ["age", "group", "tiv"]].tolist() == [70, "AD", 1400.5] and table.loc["002", "tiv"] == 1500.25
    assert "have no file: 9" in notes[0]
    _, notes = known(tmp_path, "participant_id\tage\n1\t70\n")
    assert "1 scans without a row" in notes[0] and "002" in notes[0]
    table, _ = known(put(tmp_path / "visits", "sub-01_ses-M06_T1w.nii.gz", "sub-01_ses-M12_T1w.nii.gz"),
                     "participant_id\tsession_id\tage\nsub-01\tses-M06\t70\nsub-01\tses-M12\t71\n")
    assert table["age"].tolist() == [70, 71]


@pytest.mark.parametrize(("table", "message"), [
    ("participant_id\ttiv\n001\tlarge\n", r"row 2 \(001\): tiv is 'large'"), ("participant_id\tage\n001\t-4\n", "row 2 .*age is '-4'"),
    ("participant_id\tage\n001\t999\n", "age is '999', expected a number from 0 to 120"), ("id\tage\n001\t70\n", "no column 'participant_id'"),
    ("participant_id\tage\nX\t70\n", "1 of 1 files have no row|have no row"), ("participant_id\tage\n001\t70\n1\t71\n", "row 2, row 3")])
def test_participants_that_cannot_be_used_are_refused_before_the_first_scan(tmp_path, monkeypatch, table, message):
    put(tmp_path / "study", "001.nii.gz")
    (tmp_path / "study" / "participants.tsv").write_text(table)
    monkeypatch.setattr(module, "_start", lambda *_: pytest.fail("a scan was prepared"))
    monkeypatch.setattr(module, "_require_parts", lambda _: None)
    with pytest.raises(TableError, match=message):
        prepare(tmp_path / "study", tmp_path / "out", grid="mni_3mm")


def test_scans_that_cannot_be_read_are_failures(tmp_path, monkeypatch):
    put(tmp_path / "study", "P01/t1.nii.gz")
    (tmp_path / "study" / "P02.tar.gz").touch()
    monkeypatch.setattr(module, "_start", lambda scan, *_: f"{scan.name} was tried")
    monkeypatch.setattr(module, "_require_parts", lambda _: None)
    with pytest.raises(PrepareError, match="All 2 scans failed.\n  P01: P01 was tried\n  P02: P02.tar.gz: an archive of a kind"):
        prepare(tmp_path / "study", tmp_path / "out", grid="mni_3mm")
    assert pd.read_csv(tmp_path / "out" / "failed.tsv", sep="\t")["scan"].tolist() == ["P01", "P02"]
    assert pd.read_csv(tmp_path / "out" / "scans.tsv", sep="\t")["subject"].tolist() == ["P01", "P02"]


def test_command_lists_people_and_visits(tmp_path):
    put(tmp_path, "P01/visit1.nii.gz", "P01/visit2.nii.gz", "P02.nii.gz", "P02_FLAIR.nii.gz")
    result = CliRunner().invoke(main, ["prepare", str(tmp_path), "--list"])
    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.output.splitlines()[1:4]] == [["P01", "visit1"], ["P01", "visit2"], ["P02", "1"]]
    assert "3 scans of 2 participants; 1 file left out." in result.output and "named flair: P02_FLAIR.nii.gz" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["P01", "P02.nii.gz", "P02_FLAIR.nii.gz"]
    result = CliRunner().invoke(main, ["prepare", str(tmp_path)])
    assert result.exit_code == 2 and "Name the folder for the results, OUT, or give --list." in result.output


def test_nothing_that_lies_in_the_current_folder_is_run(tmp_path):
    pytest.importorskip("ants", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "P01.nii.gz").write_bytes(b"no scan, so that it fails as soon as it is read")
    marker = tmp_path / "was-run"
    for name in ("explainable_mri", "numpy", "tempfile", "ants", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write('{name} ')\nraise SystemExit(3)\n")
    command = [sys.executable, "-P", "-c", "from explainable_mri.cli import main; main()", "prepare", "study", "out", "--grid", "mni_3mm"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])})
    assert not marker.exists()
    assert "P01: study/P01.nii.gz: not a readable NIfTI file" in result.stderr.replace(f"{tmp_path}/", "")
