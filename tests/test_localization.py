"Localization equals Quantus where Quantus has the measure, and goes from a configuration to the table of scans."
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch

from explainable_mri.analysis.statistics import relevance_enrichment
from explainable_mri.data.volumes import get_grid
from explainable_mri.evaluation import localization
from explainable_mri.registry import MEASURES

SCANS, SHAPE = 6, (9, 10, 11)
OURS = {
    "RelevanceMassAccuracy": lambda a, s: relevance_enrichment(a, s, np.ones_like(s)).relevance_mass_accuracy,
    "RelevanceRankAccuracy": localization.relevance_rank_accuracy,
    "TopKIntersection": lambda a, s: localization.top_k_intersection(a, s, 40),
    "PointingGame": localization.pointing_game,
    "AUC": localization.localization_auc,
    "AttributionLocalisation": localization.attribution_localisation,
}


@pytest.fixture(scope="module")
def quantus():
    "Quantus 0.6, which the extra `dev` installs."
    try:
        installed = version("quantus")
    except PackageNotFoundError:
        pytest.skip("quantus is not installed: pip install quantus==0.6.0")
    if not installed.startswith("0.6."):
        pytest.skip(f"quantus is {installed}; the measures are those of 0.6")
    import quantus
    return quantus


@pytest.fixture(scope="module")
def maps() -> tuple[np.ndarray, np.ndarray]:
    "Relevance maps with negative values, some blind and some good, and masks of several sizes."
    rng = np.random.default_rng(0)
    masks = np.stack([rng.random(SHAPE) < share for share in (0.02, 0.1, 0.3, 0.05, 0.6, 0.2)])
    return rng.normal(size=(SCANS, *SHAPE)) + masks * np.arange(SCANS)[:, None, None, None] / 2, masks


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", ["signed", "positive", "sparse"])
def test_equal_to_quantus(quantus, maps, name, kind):
    relevance, masks = maps
    if kind != "signed" or name == "RelevanceMassAccuracy":  # ours asks for positive relevance; Quantus takes what it is given
        relevance = np.maximum(relevance, 0)
    if kind == "sparse":  # zeros as in a map of rectified gradients, but fewer than the highest voxels that are asked for
        relevance = np.where(relevance > np.quantile(relevance, 0.1), relevance, 0)
    options = {"disable_warnings": True, **({"k": 40} if name == "TopKIntersection" else {})}
    theirs = getattr(quantus, name)(**options)(
        model=torch.nn.Identity(), x_batch=np.zeros((SCANS, 1, *SHAPE)), y_batch=np.zeros(SCANS, int), a_batch=relevance[:, None],
        s_batch=masks[:, None], channel_first=True)
    ours = [OURS[name](a, s) for a, s in zip(relevance, masks)]
    assert np.ptp(ours) > 0.05
    assert np.allclose(np.ravel(theirs), ours, rtol=0, atol=1e-9)


def test_empty_mask_is_not_a_hit():
    "Quantus 0.6 calls it one: NaN becomes True in its array of bool."
    assert np.isnan(localization.pointing_game(np.ones(4), np.zeros(4, bool)))


def test_transport_between_dense_maps_stays_within_its_bound():
    grid, rng = get_grid("mni_3mm"), np.random.default_rng(1)
    relevance, truth = np.zeros(grid.cropped_shape), np.zeros(grid.cropped_shape)
    relevance[15:35:2, 15:35:2, 15:35:2], truth[18:30:2, 22:38:2, 12:30:2] = rng.random((10, 10, 10)), rng.random((6, 8, 9))
    voxels = localization.earth_movers_distance(relevance, truth, grid, cell=3)
    assert voxels.error == pytest.approx(0, abs=1e-9)
    for cell in (6, 10, 20):
        found = localization.earth_movers_distance(relevance, truth, grid, cell)
        assert abs(found.distance - voxels.distance) <= found.error
        assert abs(found.distance - voxels.distance) < cell / 8


def test_measure_is_found_by_name():
    assert "localization" in MEASURES.names()
