"The simulated cohort on the two grids that are too large for the chapter."
import pandas as pd
import pytest

from explainable_mri.data.phantom import simulate_cohort
from explainable_mri.data.volumes import GRIDS, check_volume, load_volume


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
