"""What a newcomer writes, as the home page shows it, in a process of its own."""
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import explainable_mri as xm
from explainable_mri.registry import BASELINES, COHORTS, EXPLAINERS, LOSSES, MEASURES, NETWORKS, SPLITS, TRANSFORMS

ROOT = Path(__file__).parents[1]
COVARIATES = {"age": 74, "sex": "F", "tiv": 1410, "field_strength": 3}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> xm.Experiment:
    "A tiny experiment with its first fold trained and explained, and its report."
    folder = tmp_path_factory.mktemp("front")
    experiment = xm.Experiment(ROOT / "config" / "demo.yaml", "training.epochs=2", "split.params.folds=3", f"results={folder}/results",
                               f"cohort.params.folder={folder}/data", "cohort.params.scans=48", "transforms=[]")
    experiment.train(fold=1)
    experiment.explain(fold=1)
    experiment.report()
    return experiment


@pytest.fixture
def scan(experiment, monkeypatch) -> Path:
    "A scan called scan.nii.gz in the current folder, and the results where the demo has them."
    monkeypatch.chdir(experiment.folder)
    path = Path("scan.nii.gz")
    if not path.exists():
        os.link(experiment.cohort().table.path.iloc[0], path)
    return path


def python(code: str) -> str:
    "What a new Python process prints."
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_takes_no_time():
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", "import explainable_mri"], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    cumulative = int(run.stderr.strip().splitlines()[-1].split("|")[1])
    assert cumulative < 200_000, f"{cumulative} microseconds"


def test_names_are_shown_and_few():
    names = python("import explainable_mri as xm; print(*dir(xm))").split()
    wanted = "load_model load_keras load_volume load_cohort load_config Grid Model Explanation Experiment LRP build_explainer explain".split()
    assert set(wanted) <= set(names) and len(names) <= 20
    for name in names:
        assert getattr(xm, name).__doc__, name


def test_help_shows_parameters_with_units():
    text = python("import explainable_mri as xm; help(xm.load_volume); help(xm.Model.explain)")
    assert "Parameters" in text and "path of a scan's NIfTI file" in text and "age (years), sex, tiv (ml), field_strength (T)" in text


@pytest.mark.parametrize("registry", ["COHORTS", "SPLITS", "TRANSFORMS", "NETWORKS", "LOSSES", "EXPLAINERS", "MEASURES", "BASELINES"])
def test_registries_load_by_themselves(registry):
    assert len(python(f"from explainable_mri.registry import {registry}; print(*{registry}.names())").split()) > 1


@pytest.mark.parametrize("registry", [COHORTS, SPLITS, TRANSFORMS, NETWORKS, LOSSES, EXPLAINERS, MEASURES, BASELINES])
def test_every_part_says_in_a_line_what_it_is(registry):
    silent = [name for name, text in registry.describe().items() if not text]
    assert not silent, f"no description of the {registry.kind}s {', '.join(silent)}"


def test_trained_fold_explains_a_scan(experiment, scan, tmp_path):
    model = xm.load_model(experiment.folder / "fold-1")
    result = model.explain("scan.nii.gz", method="lrp.epsilon_plus", target="AD", covariates=COVARIATES)
    assert 0 <= result.probability <= 1 and result.target == "MCI or AD"
    assert result.plot() is not None
    assert {"Hippocampus_L", "Hippocampus_R"} <= set(result.regions("aal").region)
    saved = nib.load(result.save(tmp_path / "map.nii.gz"))
    assert saved.shape == nib.load(scan).shape and np.allclose(saved.affine, nib.load(scan).affine)
    assert np.array_equal(xm.load_volume(scan, model.grid).array, result.scan.array)


def test_viewer_opens_on_a_trained_experiment(experiment):
    pytest.importorskip("anywidget", reason="needs anywidget: pip install 'explainable-mri[viewer]'")
    from explainable_mri.viewer.app import open_collection
    from explainable_mri.viewer.widget import Session

    collection, predicted = open_collection(experiment.folder), pd.read_csv(experiment.folder / "fold-1" / "predictions.csv")
    assert len(collection.subjects) == len(predicted)  # each visit is a scan of its own
    told = Session(collection).update({})
    assert not told["message"] and "likelihood of MCI or AD is" in str(told)


def test_anybodys_network(scan):
    from torch import nn

    network = nn.Sequential(nn.Conv3d(1, 2, 5, stride=5), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(16, 2))
    model = xm.Model(network, grid=xm.Grid.from_image("scan.nii.gz"), classes=["CN", "AD"])
    with pytest.warns(UserWarning, match="not used"):
        result = model.explain("scan.nii.gz", method="lrp.epsilon_plus", target="AD", covariates=COVARIATES)
    assert result.target == "AD" and result.relevance.shape == model.grid.cropped_shape and "not used" in result.notes[-1]


def test_bare_level(scan):
    import torch

    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2 * 4 ** 3, 2))
    explainer = xm.build_explainer("lrp.sequential_preset_a", network, epsilon=1e-10)
    inputs = torch.rand(1, 1, 6, 6, 6)
    assert explainer.attribute(inputs, 1).shape == inputs.shape


def test_one_name_is_one_map():
    import torch

    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2 * 4 ** 3, 2))
    inputs = torch.rand(1, 1, 6, 6, 6)
    maps = [xm.build_explainer("lrp.sequential_preset_a", network, **params).attribute(inputs, 1) for params in ({}, {"epsilon": 1e-10})]
    assert torch.equal(*maps)
    assert xm.load_config(ROOT / "config" / "base.yaml").explanation.explainer.name == "lrp.sequential_preset_a"


def test_result_of_the_command_line_is_that_of_the_model(experiment):
    scans = experiment.explain(fold=1)
    row = scans.iloc[0]
    result = experiment.model(1).explain(row.path, target="MCI or AD", covariates=row[list(COVARIATES)].to_dict(), epsilon=1e-10)
    assert abs(result.probability - row.probability) < 1e-5
    assert np.allclose(result.relevance.array, xm.load_volume(row.relevance_map, "mni_3mm").array, atol=1e-6)


def test_models_of_keras_files(shared):
    folder = shared / "reference" / "keras_small"
    path = next(folder.glob("alexnet*.hdf5"))
    size = np.load(path.with_suffix(".npz"))["x"].squeeze().shape
    grid = xm.Grid.from_image(nib.Nifti1Image(np.zeros(size, np.float32), np.eye(4)))
    model = xm.load_model(path, grid=grid)
    network = xm.load_keras(path)
    assert model.task.outputs == list(network.class_names)


def test_everything_refused_has_one_base(tmp_path):
    with pytest.raises(xm.ExplainableMRIError):
        xm.load_model(tmp_path)
    with pytest.raises(xm.ExplainableMRIError):
        xm.load_volume(tmp_path / "nothing.nii.gz")
    with pytest.raises(xm.ExplainableMRIError):
        xm.load_config(tmp_path / "nothing.yaml")
    with pytest.raises(xm.ExplainableMRIError):
        xm.build_explainer("lrp.nothing", None)


def test_exceptions_of_the_package_share_the_base():
    import importlib
    import inspect
    import pkgutil

    import explainable_mri

    strangers = []
    for module in pkgutil.walk_packages(explainable_mri.__path__, "explainable_mri."):
        for name, thing in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(thing) and issubclass(thing, Exception) and not issubclass(thing, Warning) and thing.__module__ == module.name \
                    and not issubclass(thing, xm.ExplainableMRIError) and not name.startswith("_"):
                strangers.append(f"{module.name}.{name}")
    assert not strangers, f"not derived from ExplainableMRIError: {', '.join(strangers)}"
