"""Region sums of the published relevance maps: Dyrba et al. (2021), repository DeepLearningInteractiveVis."""
import json
from pathlib import Path

import numpy as np
import pytest

from explainable_mri.analysis.regions import region_table
from explainable_mri.analysis.statistics import relevance_enrichment
from explainable_mri.data.atlases import Atlas
from explainable_mri.data.volumes import get_grid, load_volume

GRID = get_grid("cat12_1.5mm")


@pytest.fixture(scope="module")
def published(shared: Path) -> Path:
    "The folder of published maps."
    return shared / "reference" / "published"


@pytest.fixture(scope="module")
def masks(published: Path) -> dict[str, np.ndarray]:
    "The published masks by name."
    return {path.name.removesuffix(".nii.gz"): load_volume(path, GRID) > 0.5 for path in published.glob("masks/*.nii.gz")}


@pytest.mark.parametrize("group", ["AD", "CN"])
def test_region_sums_are_the_published_ones(published: Path, masks: dict[str, np.ndarray], group: str):
    "Masks overlap, so each is an atlas of one region; the published sums are rounded to three digits."
    relevance = load_volume(published / f"mean_relevance_ADNI2_{group}.nii.gz", GRID)
    expected = json.loads((published / f"region_sums_ADNI2_{group}.json").read_text())
    found = {name: region_table(relevance, Atlas(name, mask.astype(int), {1: name}), GRID).relevance[0]
             for name, mask in masks.items()}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-3)


def test_relevance_of_patients_concentrates_in_the_hippocampus(published: Path, masks: dict[str, np.ndarray]):
    "In the published map of patients the hippocampus stands out, in that of the controls far less."
    ratio = {group: relevance_enrichment(load_volume(published / f"mean_relevance_ADNI2_{group}.nii.gz", GRID),
                                            masks["aal_hippocampus"], masks["brainmask"]).ratio
             for group in ("AD", "CN")}
    assert ratio["AD"] > 2 * ratio["CN"] > 2
