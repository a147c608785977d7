"Cohorts as a user meets them: a configuration and a folder that is not quite right, and what the command says."
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner, Result

from explainable_mri.cli import main
from explainable_mri.config import load_config, make_config
from explainable_mri.data.volumes import get_grid
from explainable_mri.experiments.folder import load_cohort
from explainable_mri.experiments.train import train_fold
from explainable_mri.training.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "config").glob("*.yaml"))
GROUPS = ["CN", "AD", "MCI"]


def check(config: Path) -> Result:
    "Run `explainable-mri check`, which checks the cohort of a configuration."
    return CliRunner().invoke(main, ["check", str(config)])


def write_map(path: Path, seed: int, grid: str = "mni_3mm", empty: bool = False) -> None:
    "Write a small map that differs from every other."
    grid, path = get_grid(grid), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(grid.shape, np.float32)
    values[20:40, 25:45, 20:40] = 0 if empty else np.random.default_rng(seed).random((20, 20, 20))
    nib.save(nib.Nifti1Image(values, grid.affine), path)


def people(count: int) -> pd.DataFrame:
    "A table of people with covariates that all differ."
    return pd.DataFrame({"subject": [f"{number:02d}" for number in range(count)], "diagnosis": [GROUPS[n % 3] for n in range(count)],
                         "age": [60.5 + number for number in range(count)], "sex": ["FM"[n // 3 % 2] for n in range(count)]})


@pytest.fixture
def layouts(tmp_path: Path) -> dict[str, dict]:
    "A folder with six scans in each layout; the parameters of each source."
    table = people(6)
    bids = table.rename(columns={"subject": "participant_id"})
    bids["participant_id"] = "sub-" + bids["participant_id"]
    for place in ("folder", "bids", "caps", "table"):
        (tmp_path / place).mkdir()
    table.assign(path=[f"{subject}.nii.gz" for subject in table.subject]).to_csv(tmp_path / "table/scans.csv", index=False)
    table.to_excel(tmp_path / "people.xlsx", index=False)
    bids.to_csv(tmp_path / "bids/participants.tsv", sep="\t", index=False)
    (tmp_path / "bids/dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    bids.assign(session_id="ses-M000").to_csv(tmp_path / "merge.tsv", sep="\t", index=False)
    for number, subject in enumerate(table.subject):
        write_map(tmp_path / f"table/{subject}.nii.gz", number)
        write_map(tmp_path / f"folder/mwp1ADNI_002_S_{subject}_MR.nii.gz", number)
        write_map(tmp_path / f"bids/sub-{subject}/anat/sub-{subject}_label-GM_probseg.nii.gz", number)
        write_map(tmp_path / f"caps/subjects/sub-{subject}/ses-M000/t1/spm/segmentation/normalized_space/sub-{subject}_ses-M000_T1w"
                  "_segm-graymatter_space-Ixi549Space_modulated-on_probability.nii.gz", number)
    columns = {"columns": {"group": "diagnosis"}}
    return {
        "table": {"path": "table/scans.csv", **columns},
        "folder": {"folder": "folder", "pattern": r"_S_(?P<subject>\d+)_", "table": "people.xlsx", **columns},
        "bids": {"folder": "bids", "entities": {"label": "GM"}, **columns},
        "caps": {"folder": "caps", "table": "merge.tsv", **columns},
        "joined": {"cohorts": {"here": {"name": "table", "params": {"path": "table/scans.csv", **columns, "ignore_groups": ["MCI"]}},
                               "there": {"name": "bids", "params": {"folder": "bids", **columns, "ignore_groups": ["CN", "AD"]}}}},
    }


def write_config(folder: Path, source: str, params: dict) -> Path:
    "Write a configuration with this cohort."
    path = folder / "trial.yaml"
    values = {"name": "trial", "covariates": ["age", "sex"], "cohort": {"name": source, "params": json.loads(json.dumps(params))}}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    config = load_config(path)
    assert get_grid(config.grid).name == config.grid


@pytest.mark.parametrize("name", ["adni", "rostock_excel", "bids", "caps", "joined"])
def test_shipped_configurations_say_what_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"1 problem\.\n  There is no such (file|folder)"):
        load_cohort(load_config(ROOT / "config" / f"{name}.yaml"))


@pytest.mark.parametrize("source", ["table", "folder", "bids", "caps", "joined"])
def test_every_layout_becomes_the_same_cohort(source, layouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = load_cohort(load_config(write_config(tmp_path, source, layouts[source]))).table
    assert sorted(table.age) == people(6).age.tolist()
    for row in table.itertuples():
        expected = people(6).set_index("subject").loc[row.subject[-2:]]
        assert (row.group, row.age, row.sex) == (expected.diagnosis, expected.age, expected.sex)
        assert row.subject[-2:] in Path(row.path).name


BAD = [
    ("table", {"path": "nowhere.csv"}, "There is no such file"),
    ("table", {"columns": {"group": "diagnose"}}, "Did you mean 'diagnosis'?"),
    ("table", {"columns": "diagnosis"}, "'columns' is 'diagnosis': Input should be"),
    ("table", {"ignore_groups": "MCI"}, "It is a list"),
    ("table", {"missing": "skip"}, "'missing' is 'skip'"),
    ("table", {"ignore_groups": ["CN", "AD", "MCI"]}, "There are no scans in it"),
    ("table", {"ignore_groups": ["MCI"]}, "There is no scan of group 'MCI'"),
    ("table", {"values": {"group": {"CN": "NC"}}}, "group 'NC' is unknown. Did you mean 'CN'?"),
    ("table", {"sheets": "x"}, "Did you mean 'sheet'?"),
    ("folder", {"folder": "nowhere"}, "There is no such folder"),
    ("folder", {"pattern": "(?P<subject>"}, "is not a regular expression"),
    ("folder", {"pattern": "S_(?P<rid>[0-9]+)"}, "does not say where the subject stands"),
    ("folder", {"pattern": "mwp1(?P<subject>[A-Z]+)"}, "6 of 6 files have no row"),
    ("folder", {"pattern": "wm(?P<subject>[0-9]+)"}, "None of 6 NIfTI files fits"),
    ("folder", {"unmatched": "keep"}, "'unmatched' is 'keep': Input should be 'error' or 'drop'"),
    ("folder", {"table": None}, "'table' is None"),
    ("folder", {"sheet": "Sheet2"}, "Did you mean 'Sheet1'?"),
    ("folder", {"table": "folder"}, "A table ends in"),
    ("bids", {"entities": {"label": "CSF"}}, "There is no NIfTI file '…label-CSF_probseg'"),
    ("bids", {"participants": "nowhere.tsv"}, "There is no such file"),
    ("bids", {"columns": {"group": "DX"}}, "There is no column 'DX'"),
    ("caps", {"pipeline": "t1-freesurfer"}, "'pipeline' is 't1-freesurfer': Input should be"),
    ("caps", {"fwhm": "8mm"}, "'fwhm' is '8mm'"),
    ("caps", {"pipeline": "t1-linear"}, "Has t1-linear been run?"),
    ("caps", {"table": "bids/participants.tsv"}, "There is no column 'session_id'"),
    ("oasis", {"unrated": "young"}, "'unrated' is 'young'"),
    ("oasis", {"people": 0}, "Incorrect number of subjects"),
    ("oasis", {"people": "ten"}, "'people' is 'ten'"),
    ("joined", {"same_people": 3}, "list of lists"),
    ("joined", {"cohorts": {}}, "two cohorts or more"),
    ("joined", {"cohorts": {"here": {"params": {}}, "there": 3}}, "has a 'name'"),
]


@pytest.mark.parametrize("source, change, words", BAD)
def test_a_mistake_is_explained(source, change, words, layouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_cohort(load_config(write_config(tmp_path, source, {**layouts.get(source, {}), **change})))
    assert words in str(error.value)


def test_the_command_reports_one_message_and_fails(layouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder/mwp1ADNI_002_S_99_MR.nii.gz").write_bytes(b"no scan")
    result = check(write_config(tmp_path, "folder", layouts["folder"]))
    assert result.exit_code == 1 and not result.stdout and result.stderr.startswith("Error: ")
    assert "1 of 7 files have no row" in result.stderr and "subject '99'" in result.stderr


def test_the_command_shows_the_people_and_the_notes(layouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = check(write_config(tmp_path, "joined", layouts["joined"]))
    assert result.exit_code == 0, result.stderr
    assert "One-way ANOVA" in result.stdout and "Note: here: 2 scans of other groups left out" in result.stdout


def test_a_copied_scan_is_caught(layouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scans = sorted((tmp_path / "folder").iterdir())
    scans[5].write_bytes(scans[1].read_bytes())
    config = load_config(write_config(tmp_path, "folder", layouts["folder"]))
    with pytest.raises(ValueError, match=r"S_05_MR.nii.gz \(05\): a duplicate, its file is a copy of that of .*S_01_MR"):
        load_cohort(config)


def test_gaps_are_filled_from_the_training_controls_alone(tmp_path):
    table = people(30).rename(columns={"diagnosis": "group"})
    for number, subject in enumerate(table.subject):
        write_map(tmp_path / f"{subject}.nii.gz", number)
    table["path"] = table.subject + ".nii.gz"
    table.loc[[3, 4], "age"] = np.nan
    table.to_csv(tmp_path / "scans.csv", index=False)
    config = make_config({
        "name": "gaps", "results": str(tmp_path / "results"), "covariates": ["age", "sex"], "split": {"params": {"folds": 2}},
        "training": {"epochs": 1, "monitor": "validation_loss"},
        "cohort": {"name": "table", "params": {"path": str(tmp_path / "scans.csv"), "missing": "impute"}}})
    cohort = load_cohort(config)
    assert cohort.notes == ("age is missing in 2 scans (03, 04); each fold takes the mean of its training controls instead "
                            "(missing: impute).",)
    folder = train_fold(config, 1)
    split = pd.read_csv(folder / "split.csv", dtype={"subject": str})
    controls = split[(split.part == "train") & (split.group == "CN")].subject
    state = load_checkpoint(folder / "best.ckpt").extra["residuals"]
    ages = table.set_index("subject").age
    np.testing.assert_allclose(state["encoding"]["age"][0], ages[controls].mean())
    assert ages[controls].mean() != ages.mean()
    np.testing.assert_allclose(state["means"]["age"], [0], atol=1e-12)


def test_the_groups_three_cohorts_join_as_shipped(tmp_path, monkeypatch):
    "Names of files, headings and codes as in the group's notebooks; the parameters are those of config/joined.yaml."
    monkeypatch.chdir(tmp_path)
    files = {
        "mwp1_MNI/AD/mwp1ADNI_002_S_0729_MR_MT1__GradWarp__N3m_Br_20120322163605283_S89463_I291876.nii.gz": 0,
        "mwp1_MNI/CN/mwp1ADNI_002_S_0295_MR_MT1__N3m_Br_20110412_S1_I2.nii.gz": 1,
        "mwp1_MNI_AIBL/mwp1AIBL_1000_MR_MPRAGE_ADNI_confirmed__br_raw_20090107130529821_43_S61337_I132872.nii.gz": 2,
        "mwp1_MNI_AIBL/mwp1AIBL_7_MR_MPRAGE_ADNI_confirmed__br_raw_20090107130529821_43_S1_I2.nii.gz": 3,
        "mwp1_CAT12_DELCODE/0_CN/mwp1dzne_MPRAGE_011d501d1M0_T1_01_1.nii.gz": 4,
        "mwp1_CAT12_DELCODE/2_MCI/mwp1dzne_MPRAGE_0f3a9b2c8M0_T1_01_1.nii.gz": 5,
    }
    grid = get_grid("cat12_1.5mm")
    for name, seed in files.items():
        values = np.zeros(grid.shape, np.uint8)
        values[30:60, 30:60, 30:60] = seed + 1
        (path := tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, grid.affine), path)
    sheets = {
        "hippocampus_volume_relevance_ADNI2.xlsx": ("ADNI2_LRP_CMP", {
            "subject_ID": [729, 295], "Group at scan date (1=CN, 2=EMCI, 3=LMCI, 4=AD, 5=SMC)": [4, 1], "Age at scan": [70.1, 80.2],
            "Sex (1=female)": [1, 0], "TIV_CAT12": [1400.5, 1500.5], "MRI_Field_Strength": [3, 3]}),
        "aibl_ptdemog_final.xlsx": ("aibl_ptdemog_final", {
            "RID": [1000, 7, 8], "DXCURREN": [3, 1, 2], "age": [71, 82, 60], "PTGENDER(1=Female)": [0, 1, 1],
            "Total": [1600.1, 1300.2, 1350], "field_strength": [3, 1.5, 3]}),
        "hippocampus_volume_relevance_DELCODE.xlsx": ("DELCODE_LRP_CMP", {
            "SID": ["011d501d1", "0f3a9b2c8"], "prmdiag": [0, 2], "age": [66.6, 77.7], "sex_bin_1female": [1, 0],
            "TIV_CAT12": [1450.5, 1550.5], "FieldStrength": [3, 3]}),
    }
    for name, (sheet, columns) in sheets.items():
        pd.DataFrame(columns).to_excel(tmp_path / "data" / name, sheet_name=sheet, index=False)
    cohort = load_cohort(load_config(ROOT / "config" / "joined.yaml"))
    found = {row.subject: (row.cohort, row.group, row.sex, row.age, row.tiv, row.field_strength) for row in cohort.table.itertuples()}
    assert found == {
        "adni2_0729": ("adni2", "AD", "F", 70.1, 1400.5, 3), "adni2_0295": ("adni2", "CN", "M", 80.2, 1500.5, 3),
        "aibl_1000": ("aibl", "AD", "M", 71, 1600.1, 3), "aibl_7": ("aibl", "CN", "F", 82, 1300.2, 1.5),
        "delcode_011d501d1": ("delcode", "CN", "F", 66.6, 1450.5, 3), "delcode_0f3a9b2c8": ("delcode", "MCI", "M", 77.7, 1550.5, 3)}
    assert any("1 of 3 rows" in note and "aibl" in note for note in cohort.notes), cohort.notes
