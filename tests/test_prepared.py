"""Folders of CAT12, T1Prep and deepmriprep in each layout that their documentation describes.

Made after https://github.com/ChristianGaser/T1Prep (README.md, Names.tsv, src/t1prep/report.py, src/t1prep/qa.py) and
https://github.com/wwu-mmll/deepmriprep (README.md, deepmriprep/preprocess.py: get_output_paths, create_bids_output_paths, save_output)."""
import json

import nibabel as nib
import numpy as np
import pytest

from explainable_mri.data.cohorts import CohortError
from explainable_mri.data.volumes import find_grid, get_grid, load_volume
from explainable_mri.registry import COHORTS

GRID = get_grid("mni_3mm")
SIZES, MARKS = [1423.5, 1510.2, 1388.0], [2.1, 2.4, 5.3]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def write_map(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(GRID.shape, np.uint8)
    values[20:30, 20:30, 20:30] = number
    nib.save(nib.Nifti1Image(values, GRID.affine), path)


def t1prep(size, mark):
    return json.dumps({"filedata": {"bname": "x"}, "subjectmeasures": {"vol_TIV": {"value": size, "desc": "mL"}, "vol_abs_CGW": {"value": [1, 2, 3]}},
                       "qualitymeasures": {"IQR": {"value": mark}, "NCR": {"value": None}, "topo_defects_voxels_changed": {"value": 3}}})


def cat12(size, mark):
    return (f"<?xml version='1.0'?><S><subjectmeasures><vol_TIV>{size}</vol_TIV></subjectmeasures>"
            f"<qualityratings><IQR>{mark}</IQR></qualityratings></S>")


def losses(folder, name, layout, size, mark):
    for kind, column, value in (("tiv", "tiv_cm3", size), ("affine_loss", "0", -0.4 + mark / 100), ("warp_mse", "0", mark / 200)):
        place = {"sub": f"{name}/{kind}{name}.csv", "mod": f"{kind}/{name}.csv", "cat": f"{name}/label/{kind}{name}.csv", "flat": f"{kind}{name}.csv"}
        write(folder / place[layout], f"{column}\n{value}\n")


def make(folder, layout):
    "Three scans of three persons as a program leaves them."
    write(folder / "people.csv", "subject,group,age\nsub-01,CN,70\nsub-02,AD,75\nsub-03,AD,80\n")
    for number, (size, mark) in enumerate(zip(SIZES, MARKS), 1):
        name, root = f"sub-0{number}_T1w", folder / "out"
        bids = root / f"derivatives/T1Prep-v0.3.8/sub-0{number}/ses-1/anat"
        at = {"cat12": (root / f"mri/mwp1{name}.nii", root / f"report/cat_{name}.xml", cat12(size, mark)),
              "t1prep": (root / f"mri/mwp1{name}.nii.gz", root / f"report/log_{name}.json", t1prep(size, mark)),
              "t1prep bids": (bids / f"sub-0{number}_ses-1_space-MNI152NLin2009cAsym-nonlinear-modulated_label-GM_probseg.nii.gz",
                              bids / f"sub-0{number}_ses-1_log.json", t1prep(size, mark)),
              "sub": (root / f"{name}/mwp1{name}.nii.gz",), "mod": (root / f"mwp1/{name}.nii.gz",),
              "cat": (root / f"{name}/mri/mwp1{name}.nii.gz",), "flat": (root / f"mwp1{name}.nii.gz",)}[layout]
        write_map(at[0], number)
        if "mwp1" in at[0].name:
            write_map(at[0].with_name("s6" + at[0].name), 9)  # smoothed, not to be taken
        write(at[1], at[2]) if len(at) > 1 else losses(root, name, layout, size, mark)
    return {"folder": str(folder / "out"), "table": str(folder / "people.csv")}


def build(**params):
    return COHORTS.build("prepared", GRID, ["CN", "AD"], ["age", "tiv"], **params)


@pytest.mark.parametrize("layout", ["cat12", "t1prep", "t1prep bids"])
def test_cat12_and_t1prep(tmp_path, layout):
    table = build(**make(tmp_path, layout)).table
    assert table.tiv.tolist() == SIZES and table.subject.tolist() == ["sub-01", "sub-02", "sub-03"]
    assert table.iqr.tolist() == MARKS and table.iqr_percent.tolist() == pytest.approx([84, 81, 52])
    assert table.session.tolist() == (["ses-1"] * 3 if "bids" in layout else ["1"] * 3)


@pytest.mark.parametrize("layout", ["sub", "mod", "cat", "flat"])
def test_deepmriprep(tmp_path, layout):
    table = build(**make(tmp_path, layout)).table
    assert table.tiv.tolist() == SIZES and table.warp_mse.tolist() == pytest.approx([0.0105, 0.012, 0.0265])
    assert table.warp_mse_percentile.tolist() == pytest.approx([100 / 3, 200 / 3, 100])


def test_deepmriprep_in_a_bids_dataset_with_two_visits_of_one_name(tmp_path):
    "The report that lies nearest is the scan's, also where the names of scans do not tell them apart."
    write(tmp_path / "people.csv", "subject,session,group,age\n1,a,CN,70\n1,b,CN,71\n2,a,AD,75\n")
    for number, (person, visit) in enumerate([("1", "a"), ("1", "b"), ("2", "a")], 1):
        folder = tmp_path / f"out/p{person}/{visit}/anat"
        write_map(folder / f"mri/mwp1{person}-{visit}.nii.gz", number)
        write(folder / f"label/tiv{person}-{visit}.csv", f"tiv_cm3\n{1400 + number}\n")
    parameters = {"folder": str(tmp_path / "out"), "table": str(tmp_path / "people.csv"), "pattern": r"(?P<subject>\d)-(?P<session>\w)"}
    assert build(**parameters).table.tiv.tolist() == [1401, 1402, 1403]
    for path in sorted((tmp_path / "out").rglob("mwp1*")):
        path.rename(path.with_name(f"mwp1T1_{path.name[4:]}"))
    with pytest.raises(CohortError, match="There is no column 'tiv'"):
        build(**parameters)


def test_quality_leaves_scans_out_with_a_note(tmp_path):
    parameters = make(tmp_path, "t1prep")
    cohort = build(**parameters, at_least={"iqr_percent": 60})
    assert len(cohort) == 2 and any("1 scans with iqr_percent below 60 left out: mwp1sub-03_T1w" in note for note in cohort.notes)
    with pytest.raises(CohortError, match="to be chosen by 'iqr_percnt', but no scan has it. Did you mean 'iqr_percent'"):
        build(**parameters, at_least={"iqr_percnt": 60})
    with pytest.raises(CohortError, match="There are no scans in it"):
        build(**parameters, at_most={"iqr": 1})


def test_reports_that_are_damaged_or_missing_are_named(tmp_path):
    parameters = make(tmp_path, "t1prep")
    (tmp_path / "out/report/log_sub-02_T1w.json").write_text("[1")
    with pytest.raises(CohortError, match=r"log_sub-02_T1w.json: 1 problem.\n  This is not a report of CAT12, T1Prep or deepmriprep"):
        build(**parameters)
    (tmp_path / "out/report/log_sub-02_T1w.json").unlink()
    with pytest.raises(CohortError, match=r"\(sub-02\): tiv is missing"):
        build(**parameters)
    (tmp_path / "none").mkdir()
    with pytest.raises(CohortError, match="None of 0 NIfTI files is a modulated grey-matter map"):
        build(**parameters | {"folder": str(tmp_path / "none")})


def test_the_table_goes_before_the_reports_and_says_so(tmp_path):
    parameters = make(tmp_path, "t1prep")
    write(tmp_path / "people.csv", "subject,group,age,tiv\nsub-01,CN,70,1500\nsub-02,AD,75,1501\nsub-03,AD,80,1502\n")
    cohort = build(**parameters)
    assert cohort.table.tiv.tolist() == [1500, 1501, 1502] and any("tiv from people.csv, not from the reports" in note for note in cohort.notes)


def test_deepmriprep_on_its_own_grid(tmp_path):
    """Maps as deepmriprep 0.3 writes them: on its template (Template_4_GS.nii.gz: 113×137×113, x from right to left, 1.5 mm), as float32, with the numbers
    of its tables under the headings that pandas gives them."""
    grid, affine = get_grid("cat12.8_1.5mm"), np.array([[-1.5, 0, 0, 84], [0, 1.5, 0, -120], [0, 0, 1.5, -72], [0, 0, 0, 1.0]])
    write(tmp_path / "people.csv", "subject,group,age\nsub-01,CN,70\nsub-02,AD,75\n")
    for number, size in ((1, 1423.5), (2, 1510.2)):
        name, folder = f"sub-0{number}_T1w", tmp_path / "out" / f"sub-0{number}_T1w"
        folder.mkdir(parents=True)
        values = np.zeros((113, 137, 113), np.float32)
        values[76, 70, 38] = number  # at x = 84 - 1.5 * 76 = -30 mm: left
        image = nib.Nifti1Image(values, affine)
        image.header.set_qform(affine, 2)
        image.header.set_sform(affine, 2)
        nib.save(image, folder / f"mwp1{name}.nii.gz")
        for kind, column, value in (("tiv", "tiv_cm3", size), ("affine_loss", "0", 0.1), ("warp_mse", "0", 0.01)):
            write(folder / f"{kind}{name}.csv", f"{column}\n{value}\n")
    parameters = {"folder": str(tmp_path / "out"), "table": str(tmp_path / "people.csv")}
    cohort = COHORTS.build("prepared", grid, ["CN", "AD"], ["age", "tiv"], **parameters)
    assert cohort.table.tiv.tolist() == [1423.5, 1510.2] and find_grid(cohort.table.path[0]) is grid
    loaded = load_volume(cohort.table.path[1], grid)
    assert loaded.shape == (100, 120, 100)
    place = np.argwhere(np.asarray(loaded) == 2)[0]
    np.testing.assert_allclose(nib.affines.apply_affine(grid.cropped_affine, place), (-30, -15, -15))
    with pytest.raises(CohortError, match="but on 'cat12.8_1.5mm'"):
        COHORTS.build("prepared", get_grid("cat12_1.5mm"), ["CN", "AD"], ["age", "tiv"], **parameters)
