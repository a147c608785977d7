"""Maps for the archive: pydicom, highdicom and dcm2niix read back the values in their places, and nobody's name is in them unless asked for."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from explainable_mri.data.volumes import Volume, get_grid
from explainable_mri.inference import Explanation, Prediction
from explainable_mri.preprocessing.simulation import write_dicom, write_enhanced_dicom
from explainable_mri.tasks import Classification

pydicom, highdicom = (pytest.importorskip(name, reason="needs the extra: pip install 'explainable-mri[report]'") for name in ("pydicom", "highdicom"))

from explainable_mri.report.archive import (  # noqa: E402
    ArchiveError, OnScan, anonymous, draw_pages, identity_from, make_pseudonym, parametric_map, write_dicom_files)

GRID = get_grid("mni_6mm")
PERSON = {"PatientName": "Lovelace^Augusta^QXZ", "PatientID": "SECRET-1815", "PatientBirthDate": "18151210", "InstitutionName": "Analytical Hospital",
          "StudyInstanceUID": "1.2.3.4.1852", "StudyDate": "18521127", "ReferringPhysicianName": "Babbage^Charles", "AccessionNumber": "ENGINE-7",
          "FrameOfReferenceUID": "1.2.3.4.7431", "PatientAddress": "12 St James's Square"}
SECRETS = ("Lovelace", "SECRET-1815", "18151210", "Analytical", "1.2.3.4.1852", "18521127", "Babbage", "ENGINE-7", "1.2.3.4.7431", "James")
HOT = (20, 9, 6)  # a voxel on the right, behind, below: no turn or mirror image puts it at another's place


def make_explanation(hot: tuple[int, int, int] = HOT, value: float = 2.5) -> Explanation:
    "A map with one hot voxel, over a scan of noise."
    rng = np.random.default_rng(0)
    relevance = np.zeros(GRID.cropped_shape, np.float32)
    relevance[4:-4, 4:-4, 4:-4] = rng.normal(0, 0.01, tuple(size - 8 for size in GRID.cropped_shape))
    relevance[hot] = value
    scan = rng.uniform(0.1, 1, GRID.cropped_shape).astype(np.float32)
    task = Classification(classes={"CN": ["CN"], "AD": ["AD"]})
    return Explanation(Volume(relevance, GRID), Volume(scan, GRID, Path("/home/Lovelace/SECRET-1815.nii.gz")), Prediction(task, (0.25, 0.75)), "AD",
                       "lrp.epsilon_plus", {"epsilon": 0.1}, network={"kind": "Tiny", "sha256": "ab" * 32, "file": "/home/Lovelace/best.ckpt"})


def on_scan() -> OnScan:
    "A map with one hot voxel on the voxels of a scan that lies obliquely, with voxels of three different sizes."
    rng = np.random.default_rng(1)
    turn = nib.eulerangles.euler2mat(0.15, -0.1, 0.2) @ np.diag([2.0, 2.5, 3.0])
    affine = nib.affines.from_matvec(turn, (-40, -55, -30))
    scan, relevance = rng.integers(1, 1000, (40, 44, 30)).astype(np.int16), np.zeros((40, 44, 30), np.float32)
    relevance[5:-5, 5:-5, 5:-5] = rng.normal(0, 0.01, (30, 34, 20))
    relevance[31, 8, 7] = 2.5
    return OnScan(nib.Nifti1Image(relevance, affine), nib.Nifti1Image(scan, affine))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    "The scan of `on_scan` as a hospital has it: sagittal slices, with a recognisable person in every header."
    return write_dicom(on_scan().scan, tmp_path_factory.mktemp("source"), **PERSON)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> dict[str, list[Path]]:
    "Files of four kinds: on the grid and on the scan, of nobody and of the person."
    folder, explanation = tmp_path_factory.mktemp("written"), make_explanation()
    return {"grid": write_dicom_files(explanation, folder / "a"), "scan": write_dicom_files(explanation, folder / "b", on_scan()),
            "grid known": write_dicom_files(explanation, folder / "c", source=source),
            "scan known": write_dicom_files(explanation, folder / "d", on_scan(), source, language="de")}


def expected(kind: str) -> nib.Nifti1Image:
    "The map of some files, as nibabel has it."
    if kind.startswith("scan"):
        return on_scan().relevance
    explanation = make_explanation()
    return nib.Nifti1Image(explanation.relevance.array, GRID.cropped_affine)


KINDS = ("grid", "scan", "grid known", "scan known")


@pytest.mark.parametrize("kind", KINDS)
def test_pydicom_reads_the_values_and_their_places(written, kind):
    read, image = pydicom.dcmread(written[kind][0]), expected(kind)
    values = np.frombuffer(read.FloatPixelData, np.float32).reshape(int(read.NumberOfFrames), read.Rows, read.Columns)
    assert sorted(values.shape) == sorted(image.shape)
    np.testing.assert_array_equal(np.sort(values.ravel()), np.sort(np.asarray(image.dataobj).ravel()))
    frame, row, column = np.unravel_index(values.argmax(), values.shape)
    shared = read.SharedFunctionalGroupsSequence[0]
    across, down = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    down_mm, across_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)  # between rows, then between columns
    corner = np.array(read.PerFrameFunctionalGroupsSequence[frame].PlanePositionSequence[0].ImagePositionPatient, float)
    place = corner + column * across_mm * across + row * down_mm * down  # PS3.3 C.7.6.2.1.1
    hot = np.unravel_index(np.asarray(image.dataobj).argmax(), image.shape)
    np.testing.assert_allclose(place * [-1, -1, 1], nib.affines.apply_affine(image.affine, hot), atol=0.01)
    mapping = shared.RealWorldValueMappingSequence[0]
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
    assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "1" and mapping.QuantityDefinitionSequence
    assert read.ContentQualification == "RESEARCH" and "RESEARCH ONLY" in read.ContentDescription
    assert "RESEARCH ONLY" in read.SeriesDescription and "explainable-mri" in read.SoftwareVersions[0]


@pytest.mark.parametrize("kind", KINDS)
def test_highdicom_reads_the_same_volume(written, kind):
    volume, image = highdicom.imread(written[kind][0]).get_volume(), expected(kind)
    other = highdicom.Volume(np.asarray(image.dataobj), np.diag([-1, -1, 1, 1]) @ image.affine, "PATIENT")
    turned = volume.match_orientation(other)
    np.testing.assert_array_equal(turned.array.astype(np.float32), other.array)
    np.testing.assert_allclose(turned.affine, other.affine, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_dcm2niix_reads_the_same_image(written, kind, tmp_path):
    command = shutil.which("dcm2niix") or shutil.which("dcm2niix", path=Path(sys.executable).parent)
    if not command:
        pytest.skip("dcm2niix is not installed: pip install dcm2niix")
    alone = tmp_path / "in"
    alone.mkdir()
    shutil.copy(written[kind][0], alone)
    subprocess.run([command, "-z", "n", "-f", "map", "-o", tmp_path, alone], check=True, capture_output=True, timeout=60)
    read, image = nib.as_closest_canonical(nib.load(tmp_path / "map.nii")), nib.as_closest_canonical(expected(kind))
    np.testing.assert_array_equal(read.get_fdata(dtype=np.float32), image.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(read.affine, image.affine, atol=1e-3)
    assert json.loads((tmp_path / "map.json").read_text())["SeriesDescription"].startswith("Relevance map - RESEARCH ONLY")


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_in_the_files_only_when_asked_for(written, kind):
    for path in written[kind]:
        found, read = path.read_bytes(), pydicom.dcmread(path)
        held = {secret for secret in SECRETS if secret.encode() in found}
        if kind.endswith("known"):
            assert {"Lovelace", "SECRET-1815", "18151210", "1.2.3.4.1852", "ENGINE-7"} <= held
            assert (read.PatientID, read.StudyInstanceUID) == (PERSON["PatientID"], PERSON["StudyInstanceUID"])
            assert read.get("PatientIdentityRemoved", "NO") == "NO"
        else:
            assert not held
            assert (read.PatientID, str(read.PatientName), read.PatientBirthDate) == (make_pseudonym(make_explanation()), "", "")
            assert read.PatientIdentityRemoved == "YES"
        assert b"best.ckpt" not in found and str(path.parent).encode() not in found


def test_only_a_map_on_the_scan_is_in_the_space_of_the_source(written):
    frames = {kind: pydicom.dcmread(files[0]).FrameOfReferenceUID for kind, files in written.items()}
    assert frames["scan known"] == PERSON["FrameOfReferenceUID"]
    assert len(set(frames.values())) == 3 and frames["grid"] == frames["grid known"]
    assert "does not lie under the map" in pydicom.dcmread(written["grid known"][0]).DerivationDescription


def test_map_refers_to_the_slices_of_its_source_and_to_nothing_else(written, source):
    slices = {pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in source.iterdir()}
    known, nobody = (pydicom.dcmread(written[kind][0]) for kind in ("scan known", "scan"))
    assert {one.ReferencedSOPInstanceUID for one in known.ReferencedSeriesSequence[0].ReferencedInstanceSequence} == slices
    assert "ReferencedSeriesSequence" not in nobody and "ReferencedSOPInstanceUID" not in str(nobody)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_say_in_their_pixels_that_they_are_for_research(written, kind):
    pictures = [pydicom.dcmread(path) for path in written[kind][1:]]
    assert len({one.SeriesInstanceUID for one in pictures}) == 1 and len({one.SOPInstanceUID for one in pictures}) == 3
    for one in pictures:
        assert (one.BurnedInAnnotation, one.ConversionType, one.Modality) == ("YES", "WSD", "OT")
        pixels = one.pixel_array
        yellow = np.abs(pixels.astype(int) - (255, 210, 31)).max(-1) < 30
        assert yellow[:60].sum() > 500 and yellow[-200:].sum() > 500, "no banner above or below"
        assert (pixels[60:200] > 200).all(-1).sum() > 500, "no text below the banner"
        assert "lrp.epsilon_plus" in one.DerivationDescription and "Tiny" in one.DerivationDescription


def halves(page: np.ndarray) -> tuple[int, int]:
    "Red pixels left and right of the middle of each of five slices in a row, the colour bar left out."
    part = page[260:-160, :int(0.885 * page.shape[1])].astype(int)
    red = (part[..., 0] - part[..., 2] > 60) & (part[..., 0] - part[..., 1] > 40)
    width = part.shape[1] / 5
    columns = np.arange(part.shape[1]) % width / width
    return int(red[:, columns < 0.5].sum()), int(red[:, columns >= 0.5].sum())


def test_right_is_drawn_where_the_convention_says():
    explanation = make_explanation()
    relevance = np.zeros(GRID.cropped_shape, np.float32)
    relevance[16:20, 9:22, 6:18] = 1  # on the right
    relevance[4:21, 4:-4, 4:-4] += 0.01
    right = Explanation(Volume(relevance, GRID), explanation.scan, explanation.prediction, "AD", "lrp.epsilon_plus")
    radiological, neurological = (draw_pages(right, convention=name) for name in ("radiological", "neurological"))
    for plane in ("axial", "coronal"):
        left_half, right_half = halves(radiological[plane])
        assert left_half > 10 * max(right_half, 1), f"{plane}: the right is not on the left"
        left_half, right_half = halves(neurological[plane])
        assert right_half > 10 * max(left_half, 1), f"{plane}: the right is not on the right"


def test_enhanced_source_is_as_good(tmp_path):
    write_enhanced_dicom(on_scan().scan, tmp_path / "one.dcm", **PERSON)
    made = parametric_map(make_explanation(), identity_from(tmp_path / "one.dcm", make_explanation(), on_scan()), on_scan())
    assert (made.PatientID, made.FrameOfReferenceUID) == (PERSON["PatientID"], PERSON["FrameOfReferenceUID"])
    other = expected("scan")
    peak = made.get_volume().map_indices_to_reference(np.argwhere(made.get_volume().array > 2))[0] * [-1, -1, 1]
    np.testing.assert_allclose(peak, nib.affines.apply_affine(other.affine, (31, 8, 7)), atol=0.01)


def mirrored() -> OnScan:
    "The map on a scan of the same size that lies elsewhere: mirrored."
    own = on_scan()
    affine = np.diag([-1, 1, 1, 1]) @ own.scan.affine
    return OnScan(*(nib.Nifti1Image(np.asarray(one.dataobj), affine) for one in (own.relevance, own.scan)))


@pytest.mark.parametrize("change, message", [
    (lambda folder: folder / "nowhere", "is not there"),
    (lambda folder: Path(__file__), "holds no DICOM image of magnetic resonance"),
    (lambda folder: next(folder.iterdir()), "no series there has the voxels"),
    (lambda folder: next(folder.iterdir()).unlink() or folder, "no series there has the voxels"),
    (lambda folder: write_dicom(on_scan().scan, folder, **{**PERSON, "SeriesNumber": 2, "StudyInstanceUID": "9.9"}), "holds 2 studies"),
])
def test_unfit_source_is_refused_without_a_word_about_the_person(source, tmp_path, change, message):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    with pytest.raises(ArchiveError, match=message) as caught:
        write_dicom_files(make_explanation(), tmp_path / "out", on_scan(), change(copy))
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert not (tmp_path / "out").exists()


def test_map_of_a_mirrored_scan_is_not_filed_under_the_series(source):
    with pytest.raises(ArchiveError, match="no series there has the voxels"):
        identity_from(source, make_explanation(), mirrored())


def test_source_of_an_old_scanner_that_names_no_space_will_do(tmp_path):
    plain = write_dicom(on_scan().scan, tmp_path, **{key: value for key, value in PERSON.items() if key != "FrameOfReferenceUID"})
    one, other = (identity_from(plain, make_explanation(), on_scan()) for _ in range(2))
    made = parametric_map(make_explanation(), one, on_scan())
    assert made.PatientID == PERSON["PatientID"] and made.FrameOfReferenceUID == one.frame_of_reference == other.frame_of_reference


def test_another_head_in_the_same_place_is_not_filed_under_the_series(source):
    own = on_scan()
    other = np.random.default_rng(9).integers(1, 1000, own.scan.shape).astype(np.int16)
    with pytest.raises(ArchiveError, match="shows another head"):
        identity_from(source, make_explanation(), OnScan(own.relevance, nib.Nifti1Image(other, own.scan.affine)))


def test_second_series_of_the_study_is_found(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    write_dicom(on_scan().scan.slicer[:20], copy, **{**PERSON, "SeriesNumber": 2, "FrameOfReferenceUID": "5.5"})
    assert identity_from(copy, make_explanation(), on_scan()).frame_of_reference == PERSON["FrameOfReferenceUID"]


def test_files_are_not_written_over_unless_that_is_said(written):
    folder = written["grid"][0].parent
    before = [path.read_bytes() for path in written["grid"]]
    with pytest.raises(ArchiveError, match="exists already"):
        write_dicom_files(make_explanation(), folder)
    assert before == [path.read_bytes() for path in written["grid"]]


@pytest.mark.parametrize("pseudonym", ["", " ", "a" * 65, "a\\b", "Müller", "a\nb"])
def test_pseudonym_that_dicom_cannot_hold_is_refused(pseudonym):
    with pytest.raises(ArchiveError, match="pseudonym"):
        anonymous(make_explanation(), pseudonym)


def test_two_scans_have_two_pseudonyms_and_one_scan_has_one():
    one, same = make_explanation(), make_explanation(hot=(5, 6, 7))
    other = Explanation(one.relevance, Volume(one.scan.array + 1, GRID), one.prediction, "AD", "lrp.epsilon_plus")
    assert make_pseudonym(one) == make_pseudonym(same) != make_pseudonym(other)
    assert anonymous(one).headers[0].StudyInstanceUID == anonymous(same).headers[0].StudyInstanceUID != anonymous(other).headers[0].StudyInstanceUID
