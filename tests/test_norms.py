"""The norms that a fold keeps are those of its scans, however the scans are read and kept."""
import numpy as np
import pandas as pd
import pytest

from explainable_mri.analysis.wscores import node_volumes
from explainable_mri.config import make_config
from explainable_mri.data.atlases import load_atlas
from explainable_mri.data.volumes import load_volume
from explainable_mri.experiments.folder import load_cohort, read_scans
from explainable_mri.experiments.train import train_fold
from explainable_mri.inference import load_model


@pytest.fixture(scope="module", params=["in memory", "in a cache", "float16"])
def trained(request, tmp_path_factory):
    "A fold that was trained for one epoch, with its cohort."
    folder = tmp_path_factory.mktemp("norms")
    cache = {"in memory": {}, "in a cache": {"folder": f"{folder}/cache"}, "float16": {"dtype": "float16"}}[request.param]
    config = make_config({
        "name": "normed", "results": f"{folder}/results", "grid": "mni_6mm", "covariates": ["age", "sex", "tiv", "field_strength"], "cache": cache,
        "split": {"params": {"folds": 2}}, "cohort": {"name": "phantom", "params": {"folder": f"{folder}/data", "scans": 200}},
        "model": {"name": "dyrba2021", "params": {"momentum": 0.5}}, "training": {"epochs": 1, "accelerator": "cpu"}, "evaluation": {"replicates": 100, "baselines": []}})
    return train_fold(config), load_cohort(config)


def test_controls_whom_nobody_saw_are_as_expected_and_patients_have_less(trained):
    fold, cohort = trained
    norms, atlas, split = load_model(fold).norms, load_atlas("aal", cohort.grid), read_scans(fold / "split.csv")
    test = cohort.table.merge(split[split.part == "test"][["subject", "session"]])
    volumes = pd.DataFrame([node_volumes(load_volume(path, cohort.grid).array, atlas, cohort.grid) for path in test.path], test.index)
    known = [node for node in volumes if node in norms.coefficients]
    scores, controls = norms.wscores(volumes[known], test), test.group == "CN"
    assert abs(scores[controls].to_numpy().mean()) < 0.3 and 0.8 < np.median(scores[controls].std()) < 1.4
    hippocampi = [name for name in known if name.rsplit("/", 1)[-1] in ("left", "right") and "Hippocampus" in name]
    assert len(hippocampi) == 2 and (scores.loc[test.group == "AD", hippocampi].mean() < -1.5).all()
    expected = norms.expected(test[controls])[hippocampi[0]].mean()
    assert expected == pytest.approx(volumes.loc[controls, hippocampi[0]].mean(), rel=0.05)
