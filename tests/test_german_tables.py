"""Tables as German Excel saves them: semicolons, decimal commas, points between thousands, Windows-1252, German words; one message for a column."""
import unicodedata

import numpy as np
import openpyxl
import nibabel as nib
import pandas as pd
import pytest

from explainable_mri.data.cohorts import CohortError, InclusionCriteria, read_cohort
from explainable_mri.data.tables import ColumnTypes, TableError, read_table, to_numbers
from explainable_mri.data.volumes import get_grid
from explainable_mri.registry import COHORTS

GRID = get_grid("mni_3mm")
COLUMNS = {"subject": "Patient", "group": "Diagnose", "age": "Alter", "sex": "Geschlecht", "tiv": "Schädelgröße", "path": "Datei"}


def saved(folder, encoding="cp1252", header="", **columns):
    "A table of twelve scans as German Excel saves it, with these columns in place of the usual ones."
    table = pd.DataFrame({
        "Patient": [f"P{number}" for number in range(12)], "Diagnose": ["Kontrolle", "LKS", "Alzheimer"] * 4,
        "Alter": [f"{60 + number},5" for number in range(12)], "Geschlecht": ["männlich", "weiblich"] * 6,
        "Schädelgröße": ["1.423,5", "987,25", "1.398"] * 4, "Datei": [f"{number}.nii" for number in range(12)]} | columns)
    for number, name in enumerate(table.Datei):
        values = np.zeros(GRID.shape, np.uint8)
        values[20:30, 20:30, 20:30] = number + 1
        nib.save(nib.Nifti1Image(values, GRID.affine), folder / f"{number}.nii")
    (folder / "Kohorte.csv").write_text(header + table.to_csv(sep=";", index=False), encoding=encoding)
    return folder / "Kohorte.csv"


def read(path, groups=("CN", "MCI", "AD"), **more):
    return read_cohort(path, GRID, groups, ["age", "sex", "tiv"], columns=COLUMNS, **more)


def problems(path, **more):
    with pytest.raises(CohortError) as caught:
        read(path, **more)
    return caught.value.problems


@pytest.mark.parametrize("encoding, header", [("cp1252", ""), ("utf-8-sig", ""), ("cp1252", "sep=;\n")])
def test_a_german_table_is_understood_and_says_so(tmp_path, encoding, header):
    cohort = read(saved(tmp_path, encoding, header))
    assert cohort.table.group.tolist() == ["CN", "MCI", "AD"] * 4 and cohort.table.sex.tolist() == ["M", "F"] * 6
    assert cohort.table.age.tolist() == [60.5 + number for number in range(12)] and cohort.table.tiv.tolist()[:3] == [1423.5, 987.25, 1398]
    notes = "\n".join(cohort.notes)
    assert ("Windows-1252" in notes) == (encoding == "cp1252")
    for words in ("sex: 'männlich' as M (6), 'weiblich' as F (6)", "group: 'Kontrolle' as CN (4), 'LKS' as MCI (4), 'Alzheimer' as AD (4)",
                  "age is written with decimal commas", "tiv is written with points between thousands, such as 1.423,5 for 1423.5"):
        assert words in notes, notes


def test_a_workbook_of_german_excel(tmp_path):
    table = read_table(saved(tmp_path))
    book = openpyxl.Workbook()
    for row in [list(table.columns), *table.values.tolist()]:
        book.active.append(row)
    book.save(tmp_path / "Kohorte.xlsx")
    assert read(tmp_path / "Kohorte.xlsx").table.tiv.tolist()[:3] == [1423.5, 987.25, 1398]


def test_headings_are_one_however_their_umlauts_are_stored(tmp_path):
    "Failed before: a heading with a decomposed umlaut, as macOS writes it, was not found."
    path = saved(tmp_path)
    path.write_text(unicodedata.normalize("NFD", path.read_text("cp1252")), encoding="utf-8")
    assert len(read(path)) == 12


@pytest.mark.parametrize("word, meant", [
    ("gesund", "CN"), ("Kontrollen", "CN"), ("Leichte kognitive Störung", "MCI"), ("leichte kognitive Beeinträchtigung", "MCI"),
    ("Alzheimer-Demenz", "AD"), ("Alzheimer's disease", "AD"), ("Demenz vom Alzheimer-Typ", "AD")])
def test_diagnoses(tmp_path, word, meant):
    assert read(saved(tmp_path, Diagnose=[word] * 12)).table.group.unique().tolist() == [meant]


@pytest.mark.parametrize("word, kind", [("Demenz", "any dementia"), ("Patient", "any disease"), ("HC", "Huntington"), ("unauffällig", "a normal scan")])
def test_words_that_may_mean_several_are_asked_about_once(tmp_path, word, kind):
    told = problems(saved(tmp_path, Diagnose=["Kontrolle", word, word] * 4))
    assert len(told) == 1 and f"group '{word}' may be" in told[0] and kind in told[0] and "8 rows, 3, 4, 6, …" in told[0], told
    assert f"values: {{group: {{{word}: …}}}}" in told[0]
    assert read(tmp_path / "Kohorte.csv", values={"group": {word: "AD"}}).table.group.value_counts().AD == 8


def test_only_groups_of_the_experiment_are_translated(tmp_path):
    path = saved(tmp_path)
    assert read(path, groups=None).table.group.unique().tolist() == ["Kontrolle", "LKS", "Alzheimer"]
    assert read(path, groups=["Kontrolle", "LKS", "Alzheimer"]).table.group.unique().tolist() == ["Kontrolle", "LKS", "Alzheimer"]
    for ignored in ("MCI", "LKS"):
        assert len(read(path, groups=["CN", "AD"], criteria=InclusionCriteria(ignore_groups=[ignored]))) == 8
    assert "group 'LKS' is unknown" in problems(path, groups=["CN", "AD"])[0]


def test_one_message_for_a_column(tmp_path):
    "Failed before: three lines a row, of which the first 20 were shown."
    told = problems(saved(tmp_path, Alter=[f"{60 + number} J" for number in range(12)], Geschlecht=["1", "2"] * 6, Datei=["weg.nii"] * 11 + ["fort.nii"]))
    ages, sexes = [next(one for one in told if column in one) for column in ("age is", "sex '")]
    assert len([one for one in told if "duplicate" not in one]) == 3
    assert ages.startswith("12 rows, 2, 3, 4, … (P0 and others): age is '60 J', which is not a number. In all: '60 J', '61 J'")
    assert sexes.startswith("12 rows, 2, 3, 4, … (P0 and others): sex '1' is unknown") and sexes.endswith("In all: '1' (6 rows), '2' (6 rows).")
    few = problems(saved(tmp_path, Alter=["x", "y", "z", *["70"] * 9]))
    assert [one.partition(":")[0] for one in few] == ["row 2 (P0)", "row 3 (P1)", "row 4 (P2)"]


@pytest.mark.parametrize("entries, decimal, values", [
    (["1.423,5", "987,25", "1.398"], None, [1423.5, 987.25, 1398]), (["1.398", "1.423"], None, [1.398, 1.423]), (["1.398", "1.423"], ",", [1398, 1423]),
    (["1,423.5"], None, [None]), (["1.423,5", "70.5"], None, [None, 70.5]), (["0.125", "1,5"], ",", [0.125, 1.5]), (["1.234.567,5"], None, [1234567.5])])
def test_points_between_thousands(entries, decimal, values):
    assert to_numbers(pd.Series(entries), decimal).replace(np.nan, None).tolist() == values


def test_decimal_is_a_parameter_of_the_cohort(tmp_path):
    path = saved(tmp_path, **{"Schädelgröße": ["1.423", "1.398", "1.5"] * 4, "MMST": ["28,5", "1.000"] * 6})
    told = problems(path)
    assert any("tiv is 1.423" in one and "where a point separates thousands, say decimal: ','" in one for one in told), told
    path = saved(tmp_path, **{"Schädelgröße": ["1.423", "1.398", "1.410"] * 4, "MMST": ["28,5", "29,0"] * 6})
    parameters = {"path": str(path), "columns": COLUMNS, "decimal": ","}
    table = COHORTS.build("table", GRID, ["CN", "MCI", "AD"], ["age", "sex", "tiv"], **parameters).table
    assert table.tiv.tolist()[:3] == [1423, 1398, 1410] and table.MMST.tolist()[:2] == [28.5, 29]
    assert read(path, types=ColumnTypes(decimal=",")).table.tiv.max() == 1423


def test_headings_that_seem_to_be_meant_are_named(tmp_path):
    with pytest.raises(TableError) as caught:
        read_cohort(saved(tmp_path), GRID, ["CN"], ["age", "sex"])
    for name, heading in {"age": "Alter", "sex": "Geschlecht", "group": "Diagnose", "subject": "Patient", "path": "Datei"}.items():
        assert f"If '{heading}' is meant, say so under 'columns': {{{name}: {heading}}}." in str(caught.value)
