"Atrophy is put into controls by a command, and the cohort that it writes is trained on like any other."
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from explainable_mri.cli import main
from explainable_mri.config import load_config
from explainable_mri.data.atlases import load_atlas
from explainable_mri.data.atrophy import AtrophyError, simulate_atrophy
from explainable_mri.data.phantom import simulate_cohort
from explainable_mri.data.volumes import get_grid, load_map, load_volume
from explainable_mri.experiments.folder import load_cohort
from explainable_mri.experiments.train import train_fold

GRID = get_grid("mni_6mm")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with the table of 18 controls with visits, and a configuration of them."
    folder = tmp_path_factory.mktemp("atrophy")
    table = pd.read_csv(simulate_cohort(folder / "phantom", scans=54, grid=GRID, atrophy=0), sep="\t")
    controls = table[table.group == "CN"].drop(columns="truth")
    controls.assign(path=[str(folder / "phantom" / path) for path in controls.path]).to_csv(folder / "controls.csv", index=False)
    (folder / "controls.yaml").write_text(f"name: controls\ngrid: mni_6mm\ncovariates: [age]\nresults: {folder}/results\ncohort: {{name: table, params: {{path: {folder}/controls.csv}}}}\n"
                                          "split: {name: stratified, params: {folds: 2}}\ntraining: {epochs: 1, batch_size: 4, accelerator: cpu}\n")
    return folder


def command(*arguments):
    "Run the command; give its exit code and output."
    result = CliRunner().invoke(main, ["simulate-atrophy", *map(str, arguments)])
    return result.exit_code, result.output


def test_command_writes_a_cohort_to_train_on(place):
    out = place / "out"
    arguments = (place / "controls.yaml", "--out", out, "--region", "Hippocampus", "--region", "Temporal_Inf_L", "--degree", 0.4, "--spread", 0.1)
    code, said = command(*arguments)
    assert code == 0, said
    config = load_config(out / "experiment.yaml")
    cohort = load_cohort(config)
    assert {"CN", "AD"} == set(cohort.table.group) and "hippocampus_volume" not in cohort.table
    assert (cohort.table.groupby("subject").group.nunique() == 1).all()
    inside = load_atlas("aal", GRID).mask("Hippocampus", "Temporal_Inf_L")
    originals = pd.read_csv(place / "controls.csv").set_index(["subject", "session"]).path
    for scan in cohort.table[cohort.table.group == "AD"].itertuples():
        before, after, truth = load_volume(originals[scan.subject, scan.session], GRID), load_volume(scan.path, GRID), load_map(scan.truth, GRID)
        by_maps = float(np.sum((before.array - after.array)[inside], dtype=np.float64)) * GRID.voxel_volume
        by_degree = scan.degree * float(np.sum(before.array[inside], dtype=np.float64)) * GRID.voxel_volume
        assert by_maps == pytest.approx(by_degree, rel=1e-4) and scan.lost_volume == pytest.approx(by_maps, abs=1e-3)
        assert np.array_equal(after.array[truth.array == 0], before.array[truth.array == 0])
        assert nib.load(scan.path).shape == GRID.shape
    assert (train_fold(config) / "metrics.json").is_file()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    table = (out / "participants.tsv").stat().st_mtime_ns
    assert command(*arguments)[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")} and table == (out / "participants.tsv").stat().st_mtime_ns


@pytest.mark.parametrize("options, words", [
    (["--region", "Hipocampus"], "Did you mean 'Hippocampus'?"),
    (["--region", "Hippocampus", "--degree", 1.5], "degree is 1.5"),
    (["--region", "Hippocampus", "--share", 0], "share is 0"),
    (["--region", "Hippocampus", "--atlas", "aall"], "no atlas named 'aall'"),
    (["--region", "Hippocampus", "task.classes={A: [MCI], B: [CN]}"], "no scan of MCI"),
])
def test_what_cannot_be_is_refused(place, options, words):
    code, said = command(place / "controls.yaml", "--out", place / "refused", *options)
    assert code == 1 and words in said and "Traceback" not in said
    assert not (place / "refused").exists()


def test_folder_of_something_else_is_left_alone(place):
    (place / "mine").mkdir()
    (place / "mine/thesis.txt").write_text("years of work")
    code, said = command(place / "controls.yaml", "--out", place / "mine", "--region", "Hippocampus")
    assert code == 1 and "something else already" in said and [path.name for path in (place / "mine").iterdir()] == ["thesis.txt"]


def test_killed_run_goes_on(place, monkeypatch):
    made = []
    from explainable_mri.data import atrophy

    cohort = atrophy.control_scans(load_config(place / "controls.yaml"))
    real = atrophy.save_volume

    def dies(array, path, grid):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(path)
        return real(array, path, grid)

    monkeypatch.setattr(atrophy, "save_volume", dies)
    with pytest.raises(KeyboardInterrupt):
        simulate_atrophy(cohort, place / "killed", ["Hippocampus"])
    assert not (place / "killed/participants.tsv").exists()
    monkeypatch.setattr(atrophy, "save_volume", lambda array, path, grid: (made.append(path), real(array, path, grid))[1])
    table = pd.read_csv(simulate_atrophy(cohort, place / "killed", ["Hippocampus"]), sep="\t")
    assert len(made) == len(set(made)) + 1 == 2 * table.group.eq("AD").sum() + 1  # only the scan that was cut short is begun anew
    with pytest.raises(AtrophyError, match="degree 0.3"):
        simulate_atrophy(cohort, place / "killed", ["Hippocampus"], degree=0.2)
