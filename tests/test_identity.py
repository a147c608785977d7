"""Who is who: spellings of people and visits, from the file's name to the split."""
from pathlib import Path

import nibabel as nib
import numpy as np
import openpyxl
import pandas as pd
import pytest

from explainable_mri.config import SplitConfig
from explainable_mri.data.cohorts import InclusionCriteria, read_cohort
from explainable_mri.data.identity import conflicts, identity_key, join_covariates, order_visits, unify, when
from explainable_mri.data.splits import LeakageError, Split, check_leakage, make_splits
from explainable_mri.data.tables import TableError
from explainable_mri.data.volumes import get_grid
from explainable_mri.registry import COHORTS

GRID = get_grid("mni_3mm")


def write_scan(path: Path, seed: int) -> str:
    "A small map that differs from every other."
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(GRID.shape, np.uint8)
    values[30:34, 36, 30:40] = np.random.default_rng(seed).integers(1, 255, (4, 10))
    nib.save(nib.Nifti1Image(values, GRID.affine), path)
    return path.name


def build(name: str, **params):
    return COHORTS.build(name, GRID, ["CN", "AD"], ["age", "sex"], **params)


@pytest.mark.parametrize("one, other", [
    ("0729", "729"), ("0729", 729), (729.0, "729"), ("sub-0729", "729"), ("Mu\u0308ller", "Müller"), (" P1 ", "P1"), ("ADNI_01", "adni_01"),
    ("002_S_0729", "sub-002S0729"), ("OAS1_0001", "sub-OAS1_0001"),
    ("SUB-0001", "sub-0001"), ("Sub-0001", "sub-0001"), ("SUB_0001", "sub-0001"), ("sub0001", "sub-0001"), ("SES-M12", "ses-m12")])
def test_spellings_of_one_key(one, other):
    "Failed before, for all but the numbers: compared as they stand."
    assert identity_key(one) == identity_key(other)


@pytest.mark.parametrize("one, other", [("P1", "P2"), ("1.5", "15"), ("P10", "P1"), ("a_1", "a_11"), ("100", "1"), ("1_01", "11"), ("A1_1", "A11"), ("1-2", "12")])
def test_different_names_have_different_keys(one, other):
    assert identity_key(one) != identity_key(other)


def test_names_with_letters_that_differ_in_spelling_are_refused():
    "Failed before: sub-1 took sub-01's diagnosis, P7 and P007 were two people."
    assert conflicts(["sub-1", "sub-01", "P2", "007", "7"]) == [["sub-01", "sub-1"]]
    for names in (["sub-1", "sub-01"], ["P7", "P007"], ["p7", "P7"], ["002_S_0729", "002S0729"]):
        with pytest.raises(TableError, match="differ in spelling only"):
            unify(pd.Series(names, name="subject"))
    scans = pd.DataFrame({"path": ["a"], "subject": ["sub-1"]}, index=["a.nii"])
    with pytest.raises(TableError, match="'sub-01' and 'sub-1', of files and rows, differ in spelling only"):
        join_covariates(scans, pd.DataFrame({"subject": ["sub-01"], "age": ["70"]}, index=[2]), "t.csv", "drop")
    found, _ = join_covariates(scans, pd.DataFrame({"subject": ["01"], "age": ["70"]}, index=[2]), "t.csv")
    assert found.age.tolist() == ["70"]  # a spreadsheet's number


def test_prefix_in_capitals_does_not_make_another_person_of_someone():
    "Failed before: SUB-0001, Sub-0001 and sub-0001 were three people, who stood in the training and the test part of one fold."
    names = [f"{prefix}-{number:04}" for number in range(1, 21) for prefix in ("SUB", "Sub", "sub")]
    table = pd.DataFrame({"subject": names, "group": ["CN" if int(name[-4:]) % 2 else "AD" for name in names], "path": [f"{name}.nii" for name in names]})
    assert unify(table.subject).nunique() == 20
    for split in make_splits(table, SplitConfig(params={"folds": 4}), seed=0):
        check_leakage(table, split)
        people = [{name[-4:] for name in table.subject.iloc[rows]} for _, rows in split.parts()]
        assert len(set.union(*people)) == sum(map(len, people)) == 20
    rows = np.arange(60)
    with pytest.raises(LeakageError, match="train and test parts share 1 subject: SUB-0001"):
        check_leakage(table, Split(np.r_[0, rows[3:42]], rows[42:], np.array([1, 2])))


def test_bids_label_does_not_take_the_row_of_another(tmp_path):
    "Failed before: sub-1 came out as a patient of 71 years, who is sub-01."
    for number, subject in enumerate(["sub-1", "sub-01"]):
        write_scan(tmp_path / f"{subject}/anat/{subject}_T1w.nii.gz", number)
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\tgroup\nsub-01\t71\tM\tAD\n")
    with pytest.raises(TableError, match="'sub-01' and 'sub-1'"):
        build("bids", folder=tmp_path, suffix="T1w")


def test_one_person_of_two_cohorts_in_two_spellings(tmp_path):
    "Failed before: 4 people instead of 3, and the same person accepted twice without a word."
    (tmp_path / "a.csv").write_text("subject,group,age,sex\n0729,AD,70,F\n0730,CN,71,M\n")
    for number, name in enumerate(["a/x_0729.nii.gz", "a/x_0730.nii.gz", "1.nii.gz", "2.nii.gz"]):
        write_scan(tmp_path / name, number)
    book = openpyxl.Workbook()
    for row in [["path", "subject", "group", "age", "sex"], ["1.nii.gz", 729, "AD", 70, "F"], ["2.nii.gz", 731, "CN", 60, "M"]]:
        book.active.append(row)
    book.save(tmp_path / "b.xlsx")
    parts = {"adni2": {"name": "folder", "params": {"folder": str(tmp_path / "a"), "pattern": r"_(?P<subject>\d{4})",
                                                    "table": str(tmp_path / "a.csv")}},
             "adni3": {"name": "table", "params": {"path": str(tmp_path / "b.xlsx")}}}
    assert build("joined", cohorts=parts, same_people=[["adni2", "adni3"]]).table.subject.nunique() == 3
    with pytest.raises(TableError, match="with the same age, sex"):
        build("joined", cohorts=parts)


def test_visits_of_one_person_in_two_spellings(tmp_path):
    "Failed before: 3 people instead of 2, and check_leakage found nothing."
    for number, name in enumerate(["P007_2019", "P7_2021", "P008_2019"]):
        write_scan(tmp_path / f"c/{name}.nii.gz", number)
    (tmp_path / "c.csv").write_text("subject,group,age,sex\n7,AD,70,F\n8,CN,71,M\n")
    cohort = build("folder", folder=tmp_path / "c", pattern=r"P(?P<subject>\d+)_(?P<session>\d{4})", table=tmp_path / "c.csv")
    assert cohort.table.subject.tolist() == ["007", "008", "007"]
    assert any("written in several ways, such as '7' for '007'" in note for note in cohort.notes)
    first = build("folder", folder=tmp_path / "c", pattern=r"P(?P<subject>\d+)_(?P<session>\d{4})", table=tmp_path / "c.csv", visits="first")
    assert first.table.session.tolist() == ["2019", "2019"]


def test_leakage_is_found_whatever_the_spelling():
    "Failed before: compared as they stand. So did the folds, which put 0729 and 729 on two sides."
    table = pd.DataFrame({"subject": ["0729", "5", "729"], "path": ["a", "b", "c"]})
    with pytest.raises(LeakageError, match="share 1 subject"):
        check_leakage(table, Split(np.array([0, 1]), np.array([], int), np.array([2])))
    people = pd.DataFrame({"subject": [f"{number:04}" for number in range(40)] + [str(number) for number in range(40)],
                           "path": [f"{number}.nii" for number in range(80)], "group": ["CN", "AD"] * 40})
    for split in make_splits(people, SplitConfig(params={"folds": 4}), seed=0):
        check_leakage(people, split)


def test_same_visit_in_two_spellings_is_a_duplicate(tmp_path):
    "Failed before: two scans of one visit, named 01 and 1, were two visits."
    rows = "".join(f"{write_scan(tmp_path / f'{number}.nii.gz', number)},{subject},{visit},CN,70,F\n"
                   for number, (subject, visit) in enumerate([("0729", "01"), ("729", "1")]))
    (tmp_path / "t.csv").write_text("path,subject,session,group,age,sex\n" + rows)
    with pytest.raises(TableError, match="row 3 .*a duplicate, the same subject and session as row 2"):
        read_cohort(tmp_path / "t.csv", GRID, covariates=["age", "sex"])


VISITS = [
    ["ADNI Screening", "ADNI1/GO Month 6", "ADNI1/GO Month 12"], ["ADNI2 Screening MRI-New Pt", "ADNI2 Month 3 MRI-New Pt", "ADNI2 Year 1 Visit"],
    ["ADNI2 Initial Visit-Cont Pt", "ADNI2 Year 1 Visit"], ["Baseline visit", "12 months", "24 months"], ["15.12.2019", "05.01.2021"],
    ["12/15/2019", "1/5/2021"], ["pre", "post"], ["sc", "bl", "m06", "m12", "y2"], ["ses-M000", "ses-M006", "ses-M012", "ses-M108"],
    ["V1", "V2", "V10"], ["2019-12-15", "2021-01-05"], ["20191215", "20210105"], ["Baseline", "6 Monate", "1 Jahr", "18 Monate", "2 Jahre"],
    ["baseline", "follow-up"], ["ses-01", "ses-02", "ses-11"], ["MR1", "MR2"], ["bl", "2", "3"], ["Dec 15, 2019", "Jan 5, 2021"],
    ["2019-12-15 10:30:00", "2020-01-01 09:00:00"], ["week 2", "week 12", "month 6"], ["4_sc", "4_bl", "4_m12"], ["2019", "2021"],
]


@pytest.mark.parametrize("visits", VISITS, ids=lambda visits: visits[0])
@pytest.mark.parametrize("age", [False, True])
def test_visits_are_put_in_order(visits, age):
    "Failed before for words, months, years and dates: sorted as text. Ages that are those of the first visit do not matter."
    table = pd.DataFrame({"subject": "a", "session": visits[::-1]})
    if age:
        table["age"] = 74
    assert [visits[::-1][row] for row in order_visits(table)["a"]] == visits


@pytest.mark.parametrize("visits", [["left", "right"], ["bl", "screening visit 2", "x"], ["5/1/2021", "3/2/2021"], ["M6", "month 6"], ["2019-12-15", "V2"]])
def test_order_of_visits_that_is_not_known_is_asked_for(visits):
    "Failed before: sorted as text."
    with pytest.raises(TableError, match="the order of the visits .* is not known"):
        order_visits(pd.DataFrame({"subject": "a", "session": visits}))


def test_names_and_ages_that_contradict_each_other_are_refused(tmp_path):
    "Failed before: the age won."
    visits = pd.DataFrame({"subject": "a", "session": ["M0", "M12"], "age": [72, 70]})
    with pytest.raises(TableError, match="by their names, but 'M12' before 'M0' by the ages 70, 72"):
        order_visits(visits)
    rows = "".join(f"{write_scan(tmp_path / f'{number}.nii.gz', number)},a,{visit},CN,{age},F\n"
                   for number, (visit, age) in enumerate([("M0", 72), ("M12", 70)]))
    (tmp_path / "t.csv").write_text("path,subject,session,group,age,sex\n" + rows)
    assert len(read_cohort(tmp_path / "t.csv", GRID, covariates=["age"])) == 2
    with pytest.raises(TableError, match="Correct the one or the other"):
        read_cohort(tmp_path / "t.csv", GRID, covariates=["age"], criteria=InclusionCriteria(visits="first"))


def test_kinds_of_time():
    assert when("m06") == when("Month 6") == ("time", 6) and when("Year 1 Month 6") == ("time", 18)
    assert when("unclear") is None and when("") is None and when("99.99.2019") is None
