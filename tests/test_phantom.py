"The simulated cohort on the two grids that are too large for the chapter, and its folder under several hands."
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from explainable_mri.data import phantom
from explainable_mri.data.phantom import simulate_cohort
from explainable_mri.data.volumes import GRIDS, check_volume, load_map, load_volume
from explainable_mri.registry import COHORTS


@pytest.mark.parametrize("grid", ["cat12_1.5mm", "clinica_1mm"])
def test_same_person_on_another_grid(tmp_path, grid):
    tables = {name: pd.read_csv(simulate_cohort(tmp_path / name, scans=1, grid=name), sep="\t") for name in ("mni_3mm", grid)}
    fine, coarse = tables[grid].iloc[0], tables["mni_3mm"].iloc[0]
    for column in ("path", "truth"):
        check_volume(tmp_path / grid / fine[column], GRIDS[grid])
    assert fine.hippocampus_volume == pytest.approx(coarse.hippocampus_volume, abs=0.3)
    volume = load_volume(tmp_path / grid / fine.path, GRIDS[grid]).sum() * GRIDS[grid].voxel_volume
    reference = load_volume(tmp_path / "mni_3mm" / coarse.path, GRIDS["mni_3mm"]).sum() * GRIDS["mni_3mm"].voxel_volume
    assert volume == pytest.approx(reference, rel=0.02)


def snapshot(folder):
    "Every file with its time and content."
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_several_processes_simulate_into_one_folder(tmp_path):
    "Failed before: 3 of 12 pairs, over the temporary files of each other."
    command = ("from explainable_mri.data.phantom import simulate_cohort; import sys; simulate_cohort(sys.argv[1], scans=4)")
    running = [subprocess.Popen([sys.executable, "-c", command, str(tmp_path / "shared")], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert len(pd.read_csv(tmp_path / "shared/participants.tsv", sep="\t")) == 4
    assert not list((tmp_path / "shared").rglob("*partial*"))


def test_complete_cohort_is_used_as_it_is(tmp_path, monkeypatch, capfd):
    "Failed before: every command rewrote the table, so that a folder without permission to write could not be used, and read all scans."
    simulate_cohort(tmp_path / "data", scans=4)
    before = snapshot(tmp_path)
    for name in ("replacing", "write_json", "save_volume", "FileLock"):
        monkeypatch.setattr(phantom, name, lambda *_: pytest.fail("something is written"))
    monkeypatch.setattr(phantom, "hash_file", lambda *_: pytest.fail("a scan is read"))
    capfd.readouterr()
    cohort = COHORTS.build("phantom", GRIDS["mni_3mm"], ["CN", "MCI", "AD"], ["age"], folder=tmp_path / "data", scans=3)
    assert len(cohort) == 3 and snapshot(tmp_path) == before
    assert "simulating" not in "".join(capfd.readouterr())


def test_copied_folder_is_recognised_and_a_changed_scan_refused(tmp_path):
    path = simulate_cohort(tmp_path / "data", scans=2)
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    times = {file: stamp for file, (stamp, _) in snapshot(tmp_path / "copy").items()}
    simulate_cohort(tmp_path / "copy", scans=2)
    assert times == {file: stamp for file, (stamp, _) in snapshot(tmp_path / "copy").items()}
    scan = path.parent / pd.read_csv(path, sep="\t").path[1]
    scan.write_bytes(scan.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(phantom.PhantomError, match=f"{scan.name} is not what was simulated"):
        simulate_cohort(tmp_path / "data", scans=2)
    scan.unlink()
    simulate_cohort(tmp_path / "data", scans=2)
    assert scan.is_file()


def test_table_never_shrinks(tmp_path):
    assert len(pd.read_csv(simulate_cohort(tmp_path, scans=4), sep="\t")) == 4
    assert len(pd.read_csv(simulate_cohort(tmp_path, scans=2), sep="\t")) == 4
    assert len(pd.read_csv(simulate_cohort(tmp_path, scans=5), sep="\t")) == 5


def test_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    "Failed before: 'This was not expected'."
    (tmp_path / "file").write_text("")
    with pytest.raises(phantom.PhantomError, match="cannot be written to .*file/data"):
        simulate_cohort(tmp_path / "file/data", scans=1)


def test_folder_of_an_earlier_version_gets_a_manifest(tmp_path):
    simulate_cohort(tmp_path, scans=2)
    (tmp_path / "manifest.json").unlink()
    before = {path: stamp for path, (stamp, _) in snapshot(tmp_path).items() if path.name.endswith(".gz")}
    simulate_cohort(tmp_path, scans=2)
    after = {path: stamp for path, (stamp, _) in snapshot(tmp_path).items() if path.name.endswith(".gz")}
    assert before == after and (tmp_path / "manifest.json").is_file()


@pytest.mark.parametrize("kind", ["noise", "mark", "rim"])
def test_shortcut_is_all_that_a_cohort_with_one_differs_in(tmp_path, kind):
    grid, options = GRIDS["mni_6mm"], {"scans": 9, "grid": "mni_6mm", "repeat_fraction": 0.5}
    plain = pd.read_csv(simulate_cohort(tmp_path / "plain", **options), sep="\t")
    path = simulate_cohort(tmp_path / "cheat", shortcut={"kind": kind, "share": 0.75}, **options)
    cheat = pd.read_csv(path, sep="\t")
    pd.testing.assert_frame_equal(cheat.drop(columns="shortcut"), plain)
    assert 0 < cheat.shortcut.notna().sum() < len(cheat) and (cheat.groupby("subject").shortcut.agg(lambda own: own.notna().nunique()) == 1).all()
    brain = phantom.load_brain_mask(grid)
    for row in cheat.itertuples():
        scan, without = (load_volume(tmp_path / name / row.path, grid).array for name in ("cheat", "plain"))
        added = load_map(path.parent / row.shortcut, grid).array if isinstance(row.shortcut, str) else np.zeros_like(scan)
        assert np.array_equal(scan, without + added) and not added[brain].any()
        assert (tmp_path / "cheat" / row.truth).read_bytes()[10:] == (tmp_path / "plain" / row.truth).read_bytes()[10:]
        assert added.any() == isinstance(row.shortcut, str)
    before = snapshot(tmp_path / "cheat")
    simulate_cohort(tmp_path / "cheat", shortcut={"kind": kind, "share": 0.75}, **options)
    assert snapshot(tmp_path / "cheat") == before


def test_folder_with_a_shortcut_is_not_taken_for_one_without(tmp_path):
    simulate_cohort(tmp_path, scans=1, grid="mni_6mm", shortcut={"kind": "rim"})
    with pytest.raises(phantom.PhantomError, match="shortcut {'kind': 'rim', 'strength': 1.0, 'share': 1.0} \\(not None\\)"):
        simulate_cohort(tmp_path, scans=1, grid="mni_6mm")
    for wrong, words in (({"kind": "halo"}, "noise"), ({"kind": "rim", "share": 2}, "share"), ({"kind": "rim", "size": 2}, "size"), ("rim", "Describe it like")):
        with pytest.raises(phantom.PhantomError, match=words):
            simulate_cohort(tmp_path / "new", scans=1, grid="mni_6mm", shortcut=wrong)
    assert not (tmp_path / "new").exists()
