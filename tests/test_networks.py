"""Networks of one's own, of MONAI and with covariates, from the configuration to the relevance map."""
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from explainable_mri.config import make_config
from explainable_mri.errors import ExplainableMRIError
from explainable_mri.experiments.explain import explain_fold
from explainable_mri.experiments.train import train_fold
from explainable_mri.inference import load_model
from explainable_mri.training.checkpoints import CheckpointError

PROGRAM = [sys.executable, "-c", "from explainable_mri.cli import main; main(prog_name='explainable-mri')"]
OWN = '''
from torch import nn

class Net(nn.Module):
    "One strided convolution and the mean of its maps."

    def __init__(self, classes, filters=4):
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv3d(1, filters, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool3d(1)
        self.flatten, self.output = nn.Flatten(), nn.Linear(filters, classes)

    def forward(self, volumes):
        return self.output(self.flatten(self.pool(self.relu(self.conv(volumes)))))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "A folder for a small cohort and results."
    return tmp_path_factory.mktemp("networks")


def tiny(folder: Path, name: str, **values):
    "A configuration of two epochs on a small cohort."
    return make_config({"name": name, "results": str(folder / "results"), "split": {"params": {"folds": 2}}, "training": {"epochs": 2},
                        "cohort": {"name": "phantom", "params": {"folder": str(folder / "cohort"), "scans": 48, "seed": 1}}, **values})


@pytest.mark.parametrize("method", ["lrp.sequential_preset_a", "input_t_gradient"])
def test_covariates_beside_the_scan_are_trained_and_explained(folder, method):
    explainer = {"name": method, "params": {"epsilon": 1e-10} if method.startswith("lrp") else {}}
    config = tiny(folder, f"both-{method}", model={"name": "alexnet", "covariates": ["age", "sex"]}, covariates=["tiv"],
                  explanation={"explainer": explainer})
    fold = train_fold(config)
    model = load_model(fold)
    table = pd.read_csv(fold / "split.csv")
    training = table[table.part == "train"]
    mean, deviation = model.covariates.design.encoding["age"]
    assert np.isclose(mean, training.age.mean()) and np.isclose(deviation, training.age.std(ddof=0))

    scans = pd.read_csv(explain_fold(config) / "scans.csv")
    assert scans[["age_relevance", "sex_relevance"]].abs().gt(0).all().all()
    maps = np.array([nib.load(path).get_fdata().sum() for path in scans.relevance_map])
    np.testing.assert_allclose(maps + scans.age_relevance + scans.sex_relevance, scans.map_sum, rtol=1e-3, atol=1e-5)

    first = scans.iloc[0]
    again = model.explain(first.path, method, 1, {"age": first.age, "sex": first.sex, "tiv": first.tiv}, **explainer["params"])
    assert again.covariates["age"] == pytest.approx(first.age_relevance, rel=1e-3, abs=1e-6)
    assert again.prediction.probabilities["MCI or AD"] == pytest.approx(first.probability, abs=1e-5)


def test_a_covariate_cannot_be_what_is_estimated(folder):
    config = tiny(folder, "leak", model={"name": "alexnet", "covariates": ["age"]}, loss={"name": "mse"},
                  covariates=["sex", "tiv"], task={"kind": "regression", "target": "age"})
    with pytest.raises(ExplainableMRIError, match="model.covariates holds 'age'"):
        train_fold(config)


def test_a_network_of_ones_own_is_imported_for_the_configuration_and_never_for_a_checkpoint(folder):
    (folder / "our_networks.py").write_text(OWN)
    (folder / "own.yaml").write_text(
        f"name: own\nresults: {folder}/results\nsplit: {{params: {{folds: 2}}}}\ntraining: {{epochs: 1}}\n"
        "model: {name: 'our_networks:Net', params: {filters: 3}}\n"
        f"cohort: {{name: phantom, params: {{folder: {folder}/cohort, scans: 48, seed: 1}}}}\n")
    for command in ("train", "explain"):
        result = subprocess.run([*PROGRAM, command, "own.yaml"], cwd=folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    assert "our_networks" not in sys.modules
    with pytest.raises(CheckpointError, match="run 'import our_networks' first"):
        load_model(folder / "results" / "own" / "fold-1")
    assert "our_networks" not in sys.modules


def test_networks_of_monai_train_and_load(folder):
    params = {"channels": [4, 8, 8], "strides": [2, 2, 2]}
    config = tiny(folder, "monai", model={"name": "monai.Classifier", "params": params})
    model = load_model(train_fold(config))
    assert type(model.network).__name__ == "Classifier"
    assert torch.isfinite(next(model.network.parameters())).all()


def test_relevance_of_chosen_subjects_goes_to_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = pd.read_csv(next((folder / "results").glob("*/fold-1/split.csv"))).subject[0]
    config = tiny(folder, "snapshots", model={"name": "alexnet"}, training={"epochs": 2, "snapshots": [str(first)]})
    log = EventAccumulator(str(train_fold(config) / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in log.Images(f"relevance/{first}")] == [1, 2]
    assert "validation_loss" in log.Tags()["scalars"]
    with pytest.raises(ExplainableMRIError, match="names the subject 'nobody'"):
        train_fold(tiny(folder, "nobody", training={"epochs": 1, "snapshots": ["nobody"]}))


def test_info_lists_networks_without_importing_monai():
    code = ("import sys\nfrom explainable_mri.registry import NETWORKS\n"
            "for name, text in NETWORKS.describe().items(): print(name, '|', text)\n"
            "assert 'monai' not in sys.modules and 'lightning' not in sys.modules")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for name in ("dyrba2021", "alexnet", "vgg", "resnet", "densenet", "monai.*", "*:*", "with_covariates"):
        assert f"{name} | " in result.stdout and not result.stdout.partition(f"{name} | ")[2].startswith("\n"), name
