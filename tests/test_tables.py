"""Tables as people have them: of all countries and programs, damaged, hostile, and with columns that are not what they seem."""
import gzip
import os
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import openpyxl
import pandas as pd
import pytest

from explainable_mri.data.cohorts import CohortError, read_cohort
from explainable_mri.data.tables import ColumnTypes, TableError, map_columns, missing_codes, plain_number, read_table, to_numbers, understand
from explainable_mri.data.volumes import get_grid
from explainable_mri.registry import COHORTS

GRID = get_grid("mni_3mm")


def text(folder: Path, content: str, name: str = "t.csv", encoding: str = "utf-8") -> pd.DataFrame:
    "The table that a text file gives."
    (folder / name).write_text(content, encoding=encoding)
    return read_table(folder / name)


def workbook(path: Path, *rows, name: str = "Sheet") -> Path:
    book = openpyxl.Workbook()
    book.active.title = name
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def study(folder: Path, **columns) -> Path:
    "A table of scans with these columns beside the usual ones."
    table = pd.DataFrame({"path": "", "subject": [f"P{number}" for number in range(12)], "group": ["CN", "AD"] * 6, "age": range(60, 72),
                          "sex": ["F", "M", "M"] * 4} | columns)
    for number in table.index:
        values = np.zeros(GRID.shape, np.uint8)
        values[20:30, 20:30, 20:30] = number + 1
        nib.save(nib.Nifti1Image(values, GRID.affine), folder / f"{number}.nii")
        table.loc[number, "path"] = f"{number}.nii"
    table.to_csv(folder / "study.tsv", sep="\t", index=False)
    return folder / "study.tsv"


def test_texts_of_many_kinds(tmp_path):
    assert list(text(tmp_path, "subject;age\n0042;71,5\n\n7;80\n").index) == [2, 4]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        table = text(tmp_path, "subject,Größe\n0042, 1\n", encoding=encoding)
        assert table.subject.tolist() == ["0042"] and table["Größe"].tolist() == ["1"] and not table.attrs["notes"]
    assert text(tmp_path, "Age  at scan,x\n70,1\nn/a,2\n")["Age at scan"].isna().tolist() == [False, True]
    assert text(tmp_path, "\n\nsubject,age\n1,70\n").index.tolist() == [4]
    assert text(tmp_path, 'subject,"a, b"\n1,"x\ny"\n')["a, b"].tolist() == ["x\ny"]


def test_windows_text_is_read_with_a_note(tmp_path):
    "Failed before: refused, with an error of Python's about a byte."
    table = text(tmp_path, "subject;sex\nJürgen;männlich\n", encoding="cp1252")
    assert table.subject.tolist() == ["Jürgen"] and "Windows-1252" in table.attrs["notes"][0]


@pytest.mark.parametrize("content, message", [
    ("", "it is empty"), ("\n\n", "it is empty"), ("a,b\n1,2,3\n", "row 2 has 3 columns, the rows above it 2"),
    ("a,b\n1,2\n3,4,5\n", "row 3 has 3 columns")])
def test_texts_that_are_no_tables(content, message, tmp_path):
    "Rows with more entries than headings shifted all columns by one before."
    with pytest.raises(TableError, match=message):
        text(tmp_path, content)


def test_files_that_are_no_tables(tmp_path):
    for name, content in (("scans.docx", b""), ("scans.xls", b""), ("broken.xlsx", b"x"), ("bytes.csv", bytes(range(256)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TableError):
            read_table(tmp_path / name)
    for name in ("none.csv", "none.xlsx"):
        with pytest.raises(TableError, match="There is no such file"):
            read_table(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.csv", "folder.csv"):
        with pytest.raises(TableError, match="This is not a file"):
            read_table(tmp_path / name)


def test_two_columns_of_one_heading_are_told_apart(tmp_path):
    "Failed before: the first was taken, the second became 'age.1'."
    table = text(tmp_path, "path,subject,group,age,age\na.nii,1,CN,70,50\n")
    assert list(table) == ["path", "subject", "group", "age (column D)", "age (column E)"]
    with pytest.raises(CohortError, match=r"several columns 'age': age \(column D\), age \(column E\)"):
        read_cohort(tmp_path / "t.csv", GRID, covariates=["age"])
    assert map_columns(table, {"age": "age (column E)"}).age.tolist() == ["50"]


def test_hidden_first_sheet_is_not_read(tmp_path):
    "Failed before: the hidden sheet was read."
    book = openpyxl.load_workbook(workbook(tmp_path / "b.xlsx", ["subject"], ["old"], name="archive"))
    book["archive"].sheet_state = "hidden"
    for name in ("ADNI2", "AIBL"):
        book.create_sheet(name).append(["subject"])
        book[name].append([f"0{name}"])
    book.save(tmp_path / "b.xlsx")
    table = read_table(tmp_path / "b.xlsx")
    assert table.subject.tolist() == ["0ADNI2"] and "others: archive, AIBL" in table.attrs["notes"][0]
    assert read_table(tmp_path / "b.xlsx", "archive").subject.tolist() == ["old"]
    with pytest.raises(TableError, match="Did you mean 'ADNI2'"):
        read_table(tmp_path / "b.xlsx", "ADN2")


def test_entries_of_a_workbook(tmp_path):
    import datetime
    rows = ["subject", "age", "day", "x"], [729, 70.0, datetime.datetime(2019, 12, 15), None], ["0730", 71.5, "n/a", "#N/A"]
    table = read_table(workbook(tmp_path / "b.xlsx", *rows))
    assert table.subject.tolist() == ["729", "0730"] and table.age.tolist() == ["70", "71.5"]
    assert table.day.tolist()[0] == "2019-12-15" and table.x.isna().all() and table.day.isna()[3]


def test_far_away_cell_and_bomb_are_refused_quickly(tmp_path):
    "Failed before: a hundred million empty rows were made; gigabytes were unpacked."
    workbook(tmp_path / "b.xlsx", ["subject", "age"], ["1", 70])
    with zipfile.ZipFile(tmp_path / "b.xlsx") as book:
        parts = {name: book.read(name) for name in book.namelist()}
    sheet = parts["xl/worksheets/sheet1.xml"].decode()
    far = sheet.replace("</sheetData>", '<row r="99999999"><c r="A99999999" t="n"><v>1</v></c></row></sheetData>')
    for name, content in (("far.xlsx", far.encode()), ("bomb.xlsx", sheet.encode() + b" " * 300_000_000)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as book:
            for part, old in parts.items():
                book.writestr(part, content if part.endswith("sheet1.xml") else old)
    with pytest.raises(TableError, match="an entry below row 1048576"):
        read_table(tmp_path / "far.xlsx")
    with pytest.raises(TableError, match="unpacks to 300 MB"):
        read_table(tmp_path / "bomb.xlsx")
    near = sheet.replace("</sheetData>", '<row r="900000"><c r="A900000" t="n"><v>1</v></c></row></sheetData>')
    with zipfile.ZipFile(tmp_path / "near.xlsx", "w") as book:
        for part, old in parts.items():
            book.writestr(part, near.encode() if part.endswith("sheet1.xml") else old)
    assert read_table(tmp_path / "near.xlsx").index.tolist() == [2, 900000]


@pytest.mark.parametrize("entries, decimal, values", [
    (["8,5", "12", "13,25"], None, [8.5, 12, 13.25]), (["8,5", "12.5"], None, [None, 12.5]), (["1,500", "1,410"], None, [None, None]),
    (["1,500", "1,410"], ",", [1.5, 1.41]), (["0,500", "0,410"], None, [0.5, 0.41]), (["8,5"], ".", [None]), (["−4", "-4"], None, [-4, -4]),
    (["1e3", " 7 "], None, [1000, 7]), (["1,2,3"], None, [None])])
def test_numbers(entries, decimal, values):
    assert to_numbers(pd.Series(entries), decimal).replace(np.nan, None).tolist() == values


def test_decimal_commas_of_a_covariate_of_ones_own_are_numbers(tmp_path):
    "Failed before: one word, and one dummy column, a value."
    cohort = read_cohort(study(tmp_path, education=[f"{years},5" for years in range(8, 20)]), GRID, covariates=["age", "education"])
    assert cohort.table.education.tolist() == [years + 0.5 for years in range(8, 20)]
    assert any("decimal commas" in note for note in cohort.notes)
    with pytest.raises(TableError, match="which is not a number"):
        read_cohort(study(tmp_path, age=["70,5", "71.5", *range(60, 70)]), GRID, covariates=["age"])


def test_codes_for_missing_values_are_asked_about(tmp_path):
    "Failed before: −4 and 999 were numbers, and went into the regression."
    path = study(tmp_path, education=[8, 9, 10, 11, 12, 13, 8, 9, 10, -4, 999, 12])
    with pytest.raises(CohortError, match=r"row 11 \(P9\): education is -4, which seems to mean that there is no value(.|\n)*999"):
        read_cohort(path, GRID, covariates=["education"])
    with pytest.raises(CohortError, match="education is missing"):
        read_cohort(path, GRID, covariates=["education"], values={"education": {-4: "n/a", 999: None}})
    assert read_cohort(path, GRID, covariates=["education"], types=ColumnTypes({"education": "number"})).table.education.max() == 999
    with pytest.raises(CohortError, match=r"age is -4, expected 0 to 120 years \(where it means that there is no value"):
        read_cohort(study(tmp_path, age=[-4, *range(60, 71)]), GRID, covariates=["age"])


@pytest.mark.parametrize("values, codes", [
    ([8, 13, -4], [-4]), ([8, 13, 99], [99]), ([8, 13, 999], [999]), ([-0.5, -1, 0.7], []), ([60, 75, 99], []), ([28, 30, 99.9], [99.9]), ([-9, 0, 1], [-9]),
    ([0, 1, 2], []), ([], []), ([999], []), ([1, 5, 9], []), ([8, 13, -9999.0], [-9999])])
def test_which_numbers_are_codes(values, codes):
    assert missing_codes(pd.Series(values, dtype=float)) == codes


def test_columns_that_are_neither_numbers_nor_words_are_asked_about(tmp_path):
    "Failed before: the majority decided."
    path = study(tmp_path, cdr=["0", "0.5", "unclear", *"000000000"])
    with pytest.raises(CohortError, match="cdr is 'unclear', but in 11 other rows a number such as 0"):
        read_cohort(path, GRID, covariates=["cdr"])
    words = read_cohort(path, GRID, covariates=["cdr"], types=ColumnTypes({"cdr": "word"}))
    assert words.table.cdr.tolist()[:3] == ["0", "0.5", "unclear"]
    with pytest.raises(CohortError, match="cdr is 'unclear', which is not a number"):
        read_cohort(path, GRID, covariates=["cdr"], types=ColumnTypes({"cdr": "number"}))
    built = COHORTS.build("table", GRID, ["CN", "AD"], ["cdr"], path=str(path), types={"cdr": "word"})
    assert built.table.cdr[1] == "0.5"
    with pytest.raises(TableError, match="Choose from: number, word"):
        COHORTS.build("table", GRID, ["CN", "AD"], ["cdr"], path=str(path), types={"cdr": "text"})


def test_what_a_column_was_taken_for_is_said(tmp_path):
    "Failed before: site numbers became one slope without a word."
    notes = read_cohort(study(tmp_path, site=[1, 2, 3] * 4), GRID, covariates=["site"]).notes
    assert any("site as a number (1 to 3)" in note for note in notes)
    cohort = read_cohort(study(tmp_path, site=[1, 2, 3] * 4), GRID, covariates=["site"], types=ColumnTypes({"site": "word"}))
    assert cohort.table.site.tolist()[:3] == ["1", "2", "3"] and any("site as words (1, 2, 3)" in note for note in cohort.notes)


def test_german_sexes(tmp_path):
    "Failed before: refused."
    cohort = read_cohort(study(tmp_path, sex=["männlich", "weiblich", "W", "m", "Frau", "Mann"] * 2), GRID, covariates=["sex"])
    assert cohort.table.sex.tolist()[:6] == ["M", "F", "F", "M", "F", "M"]


def test_codes_are_translated_whatever_their_spelling():
    foreign = pd.DataFrame({"DX": ["4", "1.0", "02", "x"], "Age at scan": list("1234")})
    assert map_columns(foreign, {"group": "DX"}, {"group": {1: "CN", "4": "AD", 2: "n/a"}}).group.fillna("?").tolist() == ["AD", "CN", "?", "x"]
    assert [plain_number(one) for one in ("0729", "1.0", "0", "000", "1.50", "AD", " 7 ")] == ["729", "1", "0", "0", "1.50", "AD", "7"]
    assert list(map_columns(foreign.assign(age="9"), {"age": "Age at scan"})) == ["DX", "age (not used)", "age"]
    with pytest.raises(TableError, match="'values.DX' must hold keys and values"):
        map_columns(foreign, values={"DX": "CN"})
    with pytest.raises(TableError, match="no column 'group'"):
        map_columns(foreign, values={"group": {1: "CN"}})


def test_visit_without_a_value_is_not_filled_from_baseline(tmp_path):
    "Failed before: n/a in sessions.tsv took the age and the diagnosis of participants.tsv."
    for visit in (1, 2):
        path = tmp_path / f"sub-01/ses-{visit}/anat/sub-01_ses-{visit}_T1w.nii"
        path.parent.mkdir(parents=True)
        values = np.zeros(GRID.shape, np.uint8)
        values[20:30, 20:30, 20:30] = visit
        nib.save(nib.Nifti1Image(values, GRID.affine), path)
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\tgroup\tage\nsub-01\tF\tCN\t70\n")
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tsex\tgroup\tage\nses-1\tn/a\tCN\t70\nses-2\tn/a\tn/a\tn/a\n")
    with pytest.raises(CohortError, match="age is missing(.|\n)*group is missing") as caught:
        COHORTS.build("bids", GRID, ["CN", "AD"], ["age", "sex"], folder=tmp_path, suffix="T1w")
    assert "sex" not in str(caught.value)
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tgroup\nses-1\tCN\nses-2\tAD\n")
    table = COHORTS.build("bids", GRID, ["CN", "AD"], ["age", "sex"], folder=tmp_path, suffix="T1w").table
    assert table.group.tolist() == ["CN", "AD"] and table.age.tolist() == [70, 70]


def test_broken_description_is_named(tmp_path):
    "Failed before: an error of the JSON reader without a file."
    shutil.copytree(study(tmp_path).parent, tmp_path / "x", ignore=lambda *_: ["x", *(f"{number}.nii" for number in range(12))])
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "derivatives/old").mkdir(parents=True)
    (tmp_path / "derivatives/old/dataset_description.json").write_text("{Name: x")
    with pytest.raises(CohortError, match=r"derivatives/old/dataset_description\.json is not a JSON file"):
        COHORTS.build("bids", GRID, ["CN", "AD"], ["age"], folder=tmp_path)


def test_packed_text_is_no_table(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a,b\n"))
    with pytest.raises(TableError, match="A table ends in"):
        read_table(tmp_path / "t.csv.gz")
    assert understand(pd.DataFrame({"a": [None, None]}), ["a"])[1] == []


def test_column_of_many_words_is_asked_about(tmp_path):
    "Failed before: one dummy column a value, as for '70 years' or '1.410,5'."
    path = study(tmp_path, education=[f"{years} years" for years in range(8, 20)])
    with pytest.raises(CohortError, match="education has 12 different words in 12 rows, such as 8 years"):
        read_cohort(path, GRID, covariates=["education"])
    assert read_cohort(path, GRID, covariates=["education"], types=ColumnTypes({"education": "word"})).table.education[0] == "8 years"
