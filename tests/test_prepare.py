"""Raw scans of known anatomy become maps that agree with the truth, in any format, and a study survives accidents."""
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from explainable_mri.data.atlases import load_brain_mask, load_template
from explainable_mri.data.cohorts import read_cohort
from explainable_mri.data.volumes import VolumeError, get_grid, load_volume
from explainable_mri.preprocessing import study as module
from explainable_mri.preprocessing.dicom import DicomError, choose_series, convert_series, find_series, unpack
from explainable_mri.preprocessing.pipeline import Recipe, preprocess
from explainable_mri.preprocessing.scans import PrepareError, find_scans, read_scan
from explainable_mri.preprocessing.simulation import simulate_raw_scan, write_dicom, write_enhanced_dicom
from explainable_mri.preprocessing.study import prepare

GRID = get_grid("mni_3mm")
LESION = (-40, -30, 20, 14)
PERSON = {"PatientName": "Lovelace^Augusta", "PatientID": "SECRET-1815", "PatientBirthDate": "18151210",
          "InstitutionName": "Analytical Hospital", "StudyInstanceUID": "1.2.3.4.1852", "StudyDate": "18521127",
          "PatientAddress": "12 St James's Square", "ReferringPhysicianName": "Babbage^Charles",
          "PatientComments": "Countess", "AccessionNumber": "ENGINE-7"}
MARK = "QXZ-7431"  # stands in every text of the headers
BLOCK = nib.Nifti1Image(np.random.default_rng(0).integers(0, 1000, (40, 30, 28)).astype(np.int16),
                        nib.affines.from_matvec(np.diag([4, 4.5, 5.0]), (-80, -70, -60)))  # quick to write and read


def identify() -> dict[str, object]:
    "Every attribute of the person, the study and the request that may hold text, and one in a sequence, marked."
    import pydicom
    marked = {entry[4]: [MARK] if entry[1] != "1" else MARK for tag, entry in pydicom.datadict.DicomDictionary.items()
              if entry[0] in {"PN", "LO", "LT", "SH", "ST", "UT", "UC", "AE"} and not entry[3]
              and tag >> 16 in {0x0008, 0x0010, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040, 0x4008}}
    step = pydicom.Dataset()
    step.RequestedProcedureDescription, step.ScheduledProcedureStepID = MARK, MARK
    return {**marked, **PERSON, "PatientName": f"{MARK}^Augusta", "PatientID": MARK, "Manufacturer": "SIMULATED", "ContrastBolusAgent": "none",
            "SequenceName": "tfl3d", "RequestAttributesSequence": [step]}


def write_study(folder: Path) -> dict:
    "Write a study as it comes; returns the true scans by name."
    head, bare = simulate_raw_scan(seed=3, lesion=LESION), simulate_raw_scan(seed=4, head=False)
    person = identify()
    exam = write_dicom(head.image, folder / "exam", **{**person, "SeriesDescription": f"t1_mprage {MARK}"})
    write_dicom(head.image, exam, **{**person, "SeriesNumber": 2, "SeriesDescription": f"t2_flair {MARK}", "EchoTime": 388.0,
                                     "SequenceName": "spc"})
    source = folder / "study"
    source.mkdir()
    with zipfile.ZipFile(source / "zipped.zip", "w") as archive:
        for path in exam.iterdir():
            archive.write(path, f"{MARK}/{path.name}")
    nib.save(head.image.as_reoriented(nib.orientations.axcodes2ornt("ASL")), source / "turned.nii.gz")
    nib.save(bare.image, source / "bare.nii.gz")
    (source / "broken.nii.gz").write_bytes(gzip.compress(b"nothing"))
    return {"zipped": head, "turned": head, "bare": bare}


def run_command(*arguments: object) -> subprocess.CompletedProcess:
    "Run `explainable-mri prepare` in a process of its own."
    code = "from explainable_mri.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, "prepare", *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=600)


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> tuple[Path, Path, dict, subprocess.CompletedProcess]:
    "A study as it comes, the folder it was prepared to by the command, the true scans by name, and what the command said."
    pytest.importorskip("ants", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    folder = tmp_path_factory.mktemp("prepare")
    scans = write_study(folder)
    result = run_command(folder / "study", folder / "prepared", "--grid", GRID.name, "--jobs", 2)
    return folder / "study", folder / "prepared", scans, result


def read_map(out: Path, name: str) -> np.ndarray:
    return load_volume(out / name / f"mwp1{name}.nii.gz", GRID)


@pytest.mark.parametrize("name", ["zipped", "turned", "bare"])
def test_map_agrees_with_template_and_truth(study, name):
    _, out, scans, _ = study
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


def lesion_shares(grey: np.ndarray) -> list[float]:
    "Grey matter where the lesion is on the left, and at its mirror image, relative to what is expected there."
    places = nib.affines.apply_affine(GRID.cropped_affine, np.moveaxis(np.indices(GRID.cropped_shape), 0, -1))
    balls = [np.linalg.norm(places - np.array(LESION[:3]) * [side, 1, 1], axis=-1) < 10 for side in (1, -1)]
    relative = grey / grey.sum() * load_template(GRID).sum()  # the map holds volumes, and heads differ in size
    return [float(relative[ball].sum() / load_template(GRID)[ball].sum()) for ball in balls]


@pytest.mark.parametrize("name", ["zipped", "turned"])
def test_left_stays_left(study, name):
    left, right = lesion_shares(read_map(study[1], name))
    assert left < 0.5 < 0.7 < right


def test_mirrored_map_would_not_pass(study):
    grey, brain = read_map(study[1], "turned"), load_brain_mask(GRID)
    assert np.corrcoef(grey[brain], grey[::-1][brain])[0, 1] < 0.95
    left, right = lesion_shares(grey[::-1])
    assert left > 0.7 and right < 0.5


def test_table_is_a_cohort(study):
    out = study[1]
    table = pd.read_csv(out / "participants.tsv", sep="\t").set_index("subject")
    assert sorted(table.index) == ["bare", "turned", "zipped"]
    assert table.loc["zipped", ["age", "sex", "field_strength"]].tolist() == [73, "F", 3]
    assert table["flags"].isna().all()
    filled = table.reset_index().assign(group="CN", path=lambda rows: [str(out / path) for path in rows["path"]])
    filled.to_csv(out.parent / "cohort.csv", index=False)
    assert len(read_cohort(out.parent / "cohort.csv", GRID, groups=["CN"], covariates=["tiv"])) == 3


def test_failed_scan_is_reported_and_pages_are_self_contained(study):
    out = study[1]
    failed = pd.read_csv(out / "failed.tsv", sep="\t")
    assert failed["scan"].tolist() == ["broken"] and "not a readable NIfTI" in failed["error"][0]
    listed = pd.read_csv(out / "scans.tsv", sep="\t")
    assert listed["subject"].tolist() == ["bare", "broken", "turned", "zipped"]
    result = study[3]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"1 of 4 scans failed.\n  broken: {study[0] / 'broken.nii.gz'}: not a readable NIfTI" in result.stderr
    assert str(out / "failed.tsv") in result.stderr and "run the same command again" in result.stderr
    assert result.stdout.startswith("4 scans of 4 participants; 0 files left out.")
    assert f"Prepared: {out / 'participants.tsv'}" in result.stdout and "4/4" in result.stderr
    page = (out / "zipped" / "quality.html").read_text()
    assert "data:image/png;base64" in page and "t2_flair" not in page and "named t2, flair" in page
    assert "http" not in page.split("<body>")[1]


def test_nothing_identifies_the_person(study):
    private = [MARK, MARK.lower(), *(word for value in PERSON.values() for word in {value, *value.split("^")})]
    said = (study[3].stdout + study[3].stderr).encode()
    for path in [*study[1].rglob("*"), None]:
        content = path.read_bytes() if path and path.is_file() else said
        content = gzip.decompress(content) if path and path.suffix == ".gz" else content
        for word in private:
            assert word.encode() not in content and word not in str(path), path
    header = nib.load(study[1] / "zipped" / "mwp1zipped.nii.gz").header
    assert not header.extensions and not any(bytes(header[name]).strip(b"\0") for name in
                                             ("descrip", "aux_file", "db_name", "intent_name"))


def test_rerun_makes_only_what_is_missing(study, monkeypatch):
    source, out = study[:2]
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


def test_what_was_filled_in_stays(study, tmp_path):
    source, out = study[0], tmp_path / "prepared"
    shutil.copytree(study[1], out)
    table = pd.read_csv(out / "participants.tsv", sep="\t", dtype=object).set_index("subject", drop=False).assign(mmse=None)
    table.loc["bare", ["group", "age", "mmse"]] = ["CN", 71, 29]
    table.to_csv(out / "participants.tsv", sep="\t", index=False)
    prepare(source, out, grid=GRID.name)
    again = pd.read_csv(out / "participants.tsv", sep="\t").set_index("subject")
    assert again.loc["bare", ["group", "age", "mmse"]].tolist() == ["CN", 71, 29]
    assert again.loc["zipped", "age"] == 73 and pd.isna(again.loc["zipped", "group"])
    with pytest.raises(PrepareError, match=r"other settings \(grid mni_3mm instead of cat12_1.5mm; smooth None instead of 8"):
        prepare(source, out, recipe=Recipe(smooth=8.0))
    table.to_csv(out / "participants.tsv", index=False)  # commas, as a spreadsheet may save it
    prepare(source, out, grid=GRID.name)
    assert pd.read_csv(out / "participants.tsv", sep="\t").set_index("subject").loc["bare", "mmse"] == 29
    table.drop(columns="path").to_csv(out / "participants.tsv", sep="\t", index=False)
    with pytest.raises(PrepareError, match="expected a table with a column 'path'"):
        prepare(source, out, grid=GRID.name)


def test_entries_follow_the_files_of_a_scan_not_its_version(study, tmp_path, monkeypatch, capsys):
    out = tmp_path / "prepared"
    shutil.copytree(study[1], out)
    table = pd.read_csv(out / "participants.tsv", sep="\t", dtype=object).assign(group="CN")
    table.to_csv(out / "participants.tsv", sep="\t", index=False)
    monkeypatch.setattr(module, "_versions", lambda: {"antspyx": "9.9"})

    def start(scan, folder, *_):
        if scan.name == "broken":
            return "broken as before"
        record = json.loads((folder / "provenance.json").read_text())
        record.update(versions={"antspyx": "9.9"}, **({"source_sha256": "another"} if scan.name == "turned" else {}))
        (folder / "provenance.json").write_text(json.dumps(record))

    monkeypatch.setattr(module, "_start", start)
    prepare(study[0], out, grid=GRID.name)
    groups = pd.read_csv(out / "participants.tsv", sep="\t").set_index("subject")["group"]
    assert groups.drop("turned").eq("CN").all() and pd.isna(groups["turned"])
    assert "turned/mwp1turned.nii.gz: what had been filled into the table is left out" in capsys.readouterr().out


def test_rows_that_vanish_are_kept_and_said(study, tmp_path, monkeypatch, capsys):
    out = tmp_path / "prepared"
    shutil.copytree(study[1], out)
    table = pd.read_csv(out / "participants.tsv", sep="\t", dtype=object).assign(group="CN")
    table.to_csv(out / "participants.tsv", sep="\t", index=False)
    (tmp_path / "study").mkdir()
    for name in ("bare.nii.gz", "turned.nii.gz"):
        shutil.copy(study[0] / name, tmp_path / "study")
    prepare(tmp_path / "study", out, grid=GRID.name)
    assert sorted(pd.read_csv(out / "participants.tsv", sep="\t")["subject"]) == ["bare", "turned"]
    assert "1 rows of the earlier table are not in the new one, such as zipped/mwp1zipped.nii.gz" in capsys.readouterr().out
    assert pd.read_csv(out / "participants.before.tsv", sep="\t").set_index("subject").loc["zipped", "group"] == "CN"


def test_one_run_at_a_time_which_clears_up_after_killed_ones(study, tmp_path):
    out = tmp_path / "prepared"
    shutil.copytree(study[1], out)
    for left in (out / ".partial-1", out / "bare" / ".partial-2"):
        left.mkdir()
        (left / "half.nii.gz").touch()
    with FileLock(out / ".lock"), pytest.raises(PrepareError, match="another run is preparing scans into this folder. Wait"):
        prepare(study[0], out, grid=GRID.name)
    prepare(study[0], out, grid=GRID.name)
    assert not list(out.rglob(".partial-*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in Linux's /proc")
def test_killed_run_leaves_no_process_and_no_files(study, tmp_path):
    (tmp_path / "temporary").mkdir()
    command = f"from {module.__name__} import prepare; prepare({str(study[0])!r}, {str(tmp_path / 'out')!r}, '{GRID.name}')"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", command], env=environment, stderr=subprocess.DEVNULL)

    def children() -> list[str]:
        return [number for path in Path(f"/proc/{parent.pid}/task").glob("*/children") for number in path.read_text().split()]

    def wait_for(condition: Callable) -> None:
        end = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)

    try:
        wait_for(children)
        child = Path("/proc", children()[0])
        wait_for(lambda: "ants" in (child / "maps").read_text())  # the work has begun
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not child.exists() or (child / "stat").read_text().rpartition(")")[2].split()[0] == "Z")
    assert not [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
    assert not [path for path in tmp_path.joinpath("out").rglob("*") if ".partial" in str(path)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in Linux's /proc")
def test_command_that_is_told_to_end_ends_at_once_with_its_processes(tmp_path):
    pytest.importorskip("ants", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    (tmp_path / "study").mkdir()
    nib.save(simulate_raw_scan(seed=3).image, tmp_path / "study" / "P01.nii.gz")
    command = [sys.executable, "-c", "from explainable_mri.cli import main; main()", "prepare", tmp_path / "study", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([*map(str, command), "--grid", "cat12_1.5mm"], env=environment, stderr=subprocess.PIPE, text=True) as parent:
        children = Path(f"/proc/{parent.pid}/task")
        end = time.monotonic() + 100
        while not (found := [each for path in children.glob("*/children") for each in path.read_text().split()
                             if "_run_job" in Path("/proc", each, "cmdline").read_text()]):
            assert time.monotonic() < end and parent.poll() is None
            time.sleep(0.1)
        begin = time.monotonic()
        parent.send_signal(signal.SIGTERM)
        said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 143 and "Stopped by SIGTERM. Continue with the same command." in said
    assert time.monotonic() - begin < 30 and not Path("/proc", found[0]).exists()
    assert not list((tmp_path / "out").rglob(".partial-*"))


def test_crash_is_reported(study, monkeypatch, tmp_path):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(PrepareError, match="ended with code 1"):
        prepare(study[0] / "bare.nii.gz", tmp_path, grid=GRID.name)


def read_dicom(folder: Path) -> nib.Nifti1Image:
    return convert_series(choose_series(find_series(folder))[0])


def edit(folder: Path, change: Callable, which: slice = slice(None)) -> None:
    "Change the header of some files of a series."
    import pydicom
    for number, path in enumerate(sorted(folder.iterdir())[which]):
        header = pydicom.dcmread(path)
        change(header, number)
        header.save_as(path)


def strip_preamble(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])


def copy_slices(folder: Path) -> None:
    for path in sorted(folder.iterdir())[:5]:
        shutil.copy(path, folder / f"copy_{path.name}")


def damage_header(folder: Path) -> None:
    first = sorted(folder.iterdir())[0]
    first.with_name("DICOMDIR").write_bytes(first.read_bytes()[:300])
    content = bytearray(first.read_bytes())
    at = content.index(b"CS\x02\x00MR")
    content[at:at + 2] = b"ZZ"  # no such value representation
    first.with_name("damaged.dcm").write_bytes(content)


HARMLESS = {
    "without file endings": lambda folder: [path.rename(path.with_suffix("")) for path in list(folder.iterdir())],
    "without preamble": strip_preamble,
    "some slices twice": copy_slices,
    "beside damaged files": damage_header,
    "empty SOPInstanceUID": lambda folder: edit(folder, lambda header, _: setattr(header, "SOPInstanceUID", "")),
    "the same SOPInstanceUID everywhere": lambda folder: edit(folder, lambda each, _: setattr(each, "SOPInstanceUID", "1.2")),
    "no SeriesInstanceUID": lambda folder: edit(folder, lambda header, _: delattr(header, "SeriesInstanceUID")),
    "no InstanceNumber": lambda folder: edit(folder, lambda header, _: delattr(header, "InstanceNumber")),
    "shuffled InstanceNumber": lambda folder: edit(folder, lambda each, i: setattr(each, "InstanceNumber", 1 + 7 * i % 40))}


@pytest.mark.parametrize("damage", HARMLESS.values(), ids=HARMLESS)
def test_untidy_dicom_is_read(tmp_path, damage):
    pytest.importorskip("dicom2nifti", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    damage(write_dicom(BLOCK, tmp_path / "exam"))
    image = read_dicom(tmp_path / "exam")
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(BLOCK.dataobj))
    np.testing.assert_allclose(image.affine, BLOCK.affine, atol=1e-4)


def compress_unreadably(header, _) -> None:
    import pydicom
    header.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
    header.PixelData = pydicom.encaps.encapsulate([b"\0" * 100])


def announce_much(header, _) -> None:
    header.Rows = header.Columns = 65535


HARMFUL = {
    "slices are missing": lambda folder: sorted(folder.iterdir())[20].unlink(),
    "compressed as High-Throughput JPEG 2000": lambda folder: edit(folder, compress_unreadably),
    "differ in PixelSpacing": lambda folder: edit(folder, lambda each, _: setattr(each, "PixelSpacing", [9, 9]), slice(3, 4)),
    "differ in Rows": lambda folder: edit(folder, lambda each, _: setattr(each, "Rows", 20), slice(3, 4)),
    "3 of the 43 images that its header announces are missing": lambda folder: edit(
        folder, lambda each, _: setattr(each, "ImagesInAcquisition", 43)),
    "differ in the name and date of birth": lambda folder: write_dicom(
        BLOCK, folder, **{**PERSON, "PatientName": "Byron^Ada", "PatientBirthDate": "18160101", "SeriesNumber": 2}),
    "more than one study": lambda folder: write_dicom(BLOCK, folder, SeriesNumber=2, PatientID="another"),
    r"40 of its 40 files lack PixelData \(7FE0,0010\)": lambda folder: edit(folder, lambda each, _: delattr(each, "PixelData")),
    r"1 of its 40 files lack ImagePositionPatient \(0020,0032\)": lambda folder: edit(
        folder, lambda each, _: delattr(each, "ImagePositionPatient"), slice(7, 8)),
    r"lack ImageOrientationPatient \(0020,0037\)": lambda folder: edit(
        folder, lambda each, _: delattr(each, "ImageOrientationPatient")),
    r"lack PixelSpacing \(0028,0030\)": lambda folder: edit(folder, lambda each, _: delattr(each, "PixelSpacing")),
    r"lack Rows \(0028,0010\)": lambda folder: edit(folder, lambda each, _: delattr(each, "Rows")),
    r"lack Modality \(0008,0060\)": lambda folder: edit(folder, lambda each, _: delattr(each, "Modality")),
    "million voxels, more than the": lambda folder: edit(folder, announce_much),
    "damaged or of an unknown kind": lambda folder: edit(folder, lambda each, _: setattr(each, "PixelData", b"short"))}


@pytest.mark.parametrize(("message", "damage"), HARMFUL.items(), ids=HARMFUL)
def test_unusable_dicom_is_refused_without_a_word_about_the_person(tmp_path, message, damage):
    pytest.importorskip("dicom2nifti", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    damage(write_dicom(BLOCK, tmp_path / "exam", **PERSON))
    with pytest.raises(DicomError, match=message) as caught:
        read_dicom(tmp_path / "exam")
    assert not any(value in str(caught.value) for value in PERSON.values())


def write_frames(path: Path, change: Callable) -> nib.Nifti1Image:
    "Write an enhanced file after `change` was made to it, and read it."
    import pydicom
    file = pydicom.dcmread(write_enhanced_dicom(BLOCK, path))
    change(file)
    file.save_as(path)
    return read_dicom(path.parent)


def shuffle_frames(file) -> None:
    "Store the frames in any order, each with the place and number that it had."
    order = np.random.default_rng(0).permutation(file.NumberOfFrames)
    pixels, frames = file.pixel_array[order], list(file.PerFrameFunctionalGroupsSequence)
    file.PerFrameFunctionalGroupsSequence = [frames[index] for index in order]
    file.PixelData = pixels.tobytes()


def number_backwards(file) -> None:
    for number, frame in enumerate(file.PerFrameFunctionalGroupsSequence):
        frame.FrameContentSequence[0].InStackPositionNumber = file.NumberOfFrames - number


def drop_content(file) -> None:
    shuffle_frames(file)
    for frame in file.PerFrameFunctionalGroupsSequence:
        del frame.FrameContentSequence


@pytest.mark.parametrize("change", [lambda file: None, shuffle_frames, number_backwards, drop_content])
def test_frames_of_enhanced_dicom_lie_where_they_say(tmp_path, change):
    pytest.importorskip("dicom2nifti", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    image = write_frames(tmp_path / "exam" / "1.dcm", change)
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(BLOCK.dataobj))
    np.testing.assert_allclose(image.affine, BLOCK.affine, atol=1e-4)


def test_frames_that_are_no_single_volume_are_refused(tmp_path):
    pytest.importorskip("dicom2nifti", reason="needs the extra: pip install 'explainable-mri[preprocess]'")

    def repeat(file) -> None:
        frames = file.PerFrameFunctionalGroupsSequence
        frames[3].PlanePositionSequence = frames[4].PlanePositionSequence

    def lose_place(file) -> None:
        del file.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0].ImagePositionPatient

    for message, change in {"40 frames lie at 39 places": repeat, "frames of it lack ImagePositionPatient": lose_place}.items():
        with pytest.raises(DicomError, match=message):
            write_frames(tmp_path / message[:3] / "1.dcm", change)


def test_a_conversion_that_mirrors_is_noticed(tmp_path, monkeypatch):
    convert = pytest.importorskip("dicom2nifti.convert_dicom", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    write_dicom(BLOCK, tmp_path / "exam")
    right = convert.dicom_array_to_nifti

    def mirror(*arguments, **keywords):
        image = right(*arguments, **keywords)["NII"]
        return {"NII": nib.Nifti1Image(np.asarray(image.dataobj)[:, :, ::-1], image.affine)}

    monkeypatch.setattr(convert, "dicom_array_to_nifti", mirror)
    with pytest.raises(DicomError, match="do not lie where its headers say"):
        read_dicom(tmp_path / "exam")


@pytest.mark.parametrize("description", ["t1_mprage +Gd", "t1 mprage KM", "T1 post contrast", "t1_mprage_ce"])
def test_series_without_contrast_agent_is_preferred(tmp_path, description):
    pytest.importorskip("dicom2nifti", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    from explainable_mri.preprocessing.dicom import find_warnings
    write_dicom(BLOCK, tmp_path, SeriesNumber=2, SeriesDescription=description, StudyInstanceUID="1.2")
    series, _ = choose_series(find_series(tmp_path))
    assert find_warnings(series) == ["a contrast agent is noted in the header or the description"]
    write_dicom(BLOCK.slicer[4:], tmp_path, SeriesNumber=3, SeriesDescription="t1_mprage pre contrast", StudyInstanceUID="1.2")
    series, report = choose_series(find_series(tmp_path))
    assert series.number == 3 and report[0].endswith("fit, but series 3 has no contrast agent") and not find_warnings(series)


def test_deflated_dicom_is_bounded(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    from explainable_mri.preprocessing.dicom import _check_inflated
    path = next(write_dicom(BLOCK, tmp_path).iterdir())
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID, header.PixelData = pydicom.uid.DeflatedExplicitVRLittleEndian, b"\0" * 2**24
    header.save_as(path)
    assert path.stat().st_size < 2**16
    _check_inflated(path)
    with pytest.raises(DicomError, match="unpacks to more than"):
        _check_inflated(path, most=2**20)


def mirror_qform(image: nib.Nifti1Image) -> None:
    image.set_qform(np.diag([-1, 1, 1, 1]) @ BLOCK.affine, 1)


def stretch(image: nib.Nifti1Image) -> None:
    image.set_sform(np.diag([1.2, 1, 1, 1]) @ BLOCK.affine, 4)
    image.header["pixdim"][1] = 4


@pytest.mark.parametrize(("message", "change"), {
    "left and right cannot be told apart": lambda image: (image.set_sform(None, 0), image.set_qform(None, 0)),
    "RAS by its sform and LAS by its qform": mirror_qform,
    "by its sform and of": stretch,
    "are in micron": lambda image: image.header.set_xyzt_units("micron")}.items())
def test_nifti_of_uncertain_geometry_is_refused(tmp_path, message, change):
    image = nib.Nifti1Image(np.asarray(BLOCK.dataobj), BLOCK.affine)
    image.set_qform(BLOCK.affine, 1)
    change(image)
    nib.save(image, tmp_path / "scan.nii")
    with pytest.raises(VolumeError, match=message):
        read_scan(find_scans(tmp_path)[0])


def test_people_are_told_apart(tmp_path):
    pytest.importorskip("pydicom", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    slab = BLOCK.slicer[:3]
    for number in (1, 2):  # one study number for all, as some anonymizers write it
        write_dicom(slab, tmp_path / "DICOM" / f"PA{number}" / "SE1", PatientID=f"p{number}", StudyInstanceUID="1.2")
        write_dicom(slab, tmp_path / "flat", PatientID=f"p{number}", SeriesNumber=number)
        (tmp_path / f"Größe {number}").mkdir()
        nib.save(slab, tmp_path / f"Größe {number}" / "t1.nii.gz")
        (tmp_path / f"Größe {number}" / "._t1.nii.gz").write_bytes(b"a resource fork of macOS")
    scans = find_scans(tmp_path)
    assert [(scan.name, scan.subject) for scan in scans] == [
        *[(name, name) for number in (1, 2) for name in [f"Größe_{number}"]], *[(f"PA{number}", f"PA{number}") for number in (1, 2)],
        *[(f"flat-{number}", f"flat-{number}") for number in (1, 2)]]
    assert not any(scan.problem for scan in scans) and "the number may change" in scans[-1].notes[0]
    write_dicom(slab, tmp_path / "Lovelace" / "t1", **PERSON)
    with pytest.raises(PrepareError, match="'Lovelace' is named after the patient"):
        find_scans(tmp_path)
    with pytest.raises(PrepareError, match="lie in the folder for the results"):
        find_scans(tmp_path, exclude=tmp_path)


def test_same_numbers_do_not_make_one_person(tmp_path):
    pytest.importorskip("pydicom", reason="needs the extra: pip install 'explainable-mri[preprocess]'")
    numbers = {"PatientID": "anon", "PatientName": "anon", "StudyInstanceUID": "1.2"}
    for name in ("P01", "P02"):
        write_dicom(BLOCK, tmp_path / name, **numbers)
    shutil.copytree(tmp_path / "P01", tmp_path / "P03")
    scans = find_scans(tmp_path)
    assert [(scan.subject, len(scan.files)) for scan in scans] == [("P01", 40), ("P02", 40), ("P03", 40)]
    assert "number of P02, P03 too" in scans[0].notes[0]
    exam = tmp_path / "P01"
    write_dicom(BLOCK.slicer[:10], exam / "localizer", SeriesDescription="localizer", SeriesNumber=2, **numbers)
    for number, path in enumerate(sorted(exam.glob("*.dcm"))):  # a series cut into folders
        path.rename(exam / ("first" if number < 25 else "second") / path.name) if number else (exam / "first").mkdir()
        (exam / "second").mkdir(exist_ok=True)
    assert [(scan.name, len(scan.files)) for scan in find_scans(exam)] == [("P01", 50)]
    for number in (1, 2):
        write_dicom(BLOCK, tmp_path / "flat", PatientID="7", PatientSex="FM"[number - 1], SeriesNumber=number)
    assert any("'flat' bear one patient number, but differ in the sex of the person" in scan.problem for scan in find_scans(tmp_path))


def test_copies_and_warnings_are_flagged(study, tmp_path):
    source, out = tmp_path / "study", tmp_path / "out"
    source.mkdir()
    shutil.copytree(study[1] / "bare", out / "bare")
    for name in ("bare", "copy"):
        shutil.copy(study[0] / "bare.nii.gz", source / f"{name}.nii.gz")
    shutil.copytree(out / "bare", out / "copy")
    record = json.loads((out / "copy" / "provenance.json").read_text())
    record.update(subject="copy", notes=["slices may be missing: <b>"])
    (out / "copy" / "provenance.json").write_text(json.dumps(record))
    table = pd.read_csv(prepare(source, out, grid=GRID.name).table, sep="\t").set_index("subject")
    assert table["flags"].to_dict() == {"bare": "the same data as copy",
                                        "copy": "slices may be missing: <b>; the same data as bare"}
    page = (out / "copy" / "quality.html").read_text()
    assert "&lt;b&gt;; the same data" in page and "research, not for diagnosis" in page


def test_cut_scan_is_flagged_and_nothing_temporary_stays(study, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    measures = json.loads((study[1] / "turned" / "provenance.json").read_text())["measures"]
    assert measures["brain_at_edge"] < 5
    image = nib.load(study[0] / "turned.nii.gz")
    upper = nib.as_closest_canonical(image).slicer[..., :-45]  # 9 cm from the top are missing
    measures = preprocess(upper, GRID, Recipe(place_iterations=(5, 0, 0), syn_iterations=(5, 0, 0))).measures
    assert measures["brain_at_edge"] > 50
    assert not list(tmp_path.iterdir()) and tempfile.tempdir == str(tmp_path)


def test_other_versions_are_said(study, monkeypatch, tmp_path, capsys):
    source, out = study[:2]
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "turned" / "quality.png").unlink()
    monkeypatch.setattr(module, "_versions", lambda: {"antspyx": "9.9"})
    monkeypatch.setattr(module, "_start", lambda *_: "not now")
    with pytest.raises(PrepareError, match="All 4 scans failed.\n  bare: not now"):
        prepare(source, tmp_path / "out", grid=GRID.name)
    said = capsys.readouterr().out
    assert "bare is prepared again: it was made with antspyx 0." in said and "instead of 9.9" in said
    assert "broken is prepared again" not in said


@pytest.mark.parametrize(("message", "source", "out"), [
    ("no such file or folder. Check", "nowhere", "out"), ("no DICOM images, zip files or NIfTI files", "empty", "out"),
    ("is a file; expected a folder for the results. Name another", "full", "full/scan.nii"),
    ("is a file; expected a folder", "full", "file"), ("cannot be the folder for the results", "full", "file/inside"),
    ("lie in the folder for the results. Choose another, such as", "full", "full")])
def test_command_says_what_to_do(tmp_path, message, source, out):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "file").touch()
    nib.save(BLOCK, tmp_path / "full" / "scan.nii")
    with pytest.raises(PrepareError, match=message):
        prepare(tmp_path / source, tmp_path / out, grid=GRID.name)
    assert not (tmp_path / "out").exists()


def test_unexpected_error_quotes_no_header(tmp_path, monkeypatch):
    def quote(_) -> None:
        raise KeyError(PERSON["PatientName"])

    monkeypatch.setattr(module, "read_scan", quote)
    monkeypatch.setattr(module.threading.Thread, "start", lambda _: None)
    job = tmp_path / "job.json"
    scan = {"name": "a", "subject": "a", "session": "1", "kind": "dicom", "files": [], "notes": [], "problem": "", "columns": {}, "other": ""}
    job.write_text(json.dumps({"scan": scan, "folder": str(tmp_path), "grid": GRID.name, "recipe": {},
                               "failure": str(tmp_path / "failure.json")}))
    module._run_job(job)
    error = json.loads((tmp_path / "failure.json").read_text())["error"]
    assert error.startswith("KeyError in test_prepare.py, line") and "Lovelace" not in error


def test_derivatives_of_bids_are_no_raw_scans(tmp_path):
    for name in ("sub-1/ses-2/anat/sub-1_ses-2_T1w", "sub-1/anat/sub-1_FLAIR", "derivatives/x/sub-1_desc-preproc_T1w",
                 "sourcedata/sub-1_T1w"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(BLOCK, tmp_path / f"{name}.nii.gz")
    assert [(scan.subject, scan.session) for scan in find_scans(tmp_path)] == [("sub-1", "2")]


def test_unpack_keeps_inside_and_within_bounds(tmp_path):
    archive, folder = tmp_path / "odd.zip", tmp_path / "inside"
    folder.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("..outside/...", b"x")  # dots, but no way out
        opened.writestr("Lovelace/1", b"\0" * 10**6)
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        opened.writestr(link, "/etc/passwd")
    assert [path.parent for path in unpack(archive, folder)] == [folder]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "odd.zip"]
    with pytest.raises(DicomError, match="more than"):
        unpack(archive, folder, limit=10**5)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("Lovelace/2", b"x")
    with pytest.raises(DicomError, match="more than the 1 allowed"):
        unpack(archive, folder, most=1)
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("Lovelace/inner.zip", b"x")
    with pytest.raises(DicomError, match="holds other zip files"):
        unpack(archive, folder)
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("Lovelace/1.dcm", b"sound" * 10)
    archive.write_bytes(archive.read_bytes().replace(b"sound", b"wrong", 1))
    with pytest.raises(DicomError, match="damaged") as caught:
        unpack(archive, folder)
    assert "Lovelace" not in str(caught.value)


@pytest.mark.parametrize(("name", "shape"), {"../Lovelace/1.dcm": "'../…/…'", "Lovelace/../../1.dcm": "'…/../../…'", "..\\1.dcm": "'../…'",
                                             "../": "'../'", "/etc/Lovelace": "'/…/…'", "C:\\1.dcm": "'…/…'"}.items())
def test_archive_with_a_name_that_leads_out_is_refused(tmp_path, name, shape):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as opened:
        for path in sorted(write_dicom(BLOCK, tmp_path / "exam").iterdir()):
            opened.write(path, path.name)
        opened.writestr(name, b"x")
    (tmp_path / "inside").mkdir()
    with pytest.raises(DicomError, match="evil.zip: member 41 of 41 has a name of the kind") as caught:
        unpack(tmp_path / "evil.zip", tmp_path / "inside")
    assert shape in str(caught.value) and "unpack it into an empty folder yourself" in str(caught.value)
    assert "Lovelace" not in str(caught.value) and not list((tmp_path / "inside").iterdir())
