"""The Rostock group's format for linear models: files that are none, units, and voxels without a model."""
import h5py
import numpy as np
import pandas as pd
import pytest

from explainable_mri.data.axes import AXES
from explainable_mri.data.linear_models import LinearModelsError, load_linear_models, save_linear_models
from explainable_mri.data.residuals import CovariateError, ResidualModel, check_sizes

COVARIATES = ["age", "sex", "tiv", "field_strength"]
ROSTOCK = AXES["rostock"]


@pytest.fixture
def study():
    "Covariates and maps of 30 people."
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"age": rng.normal(75, 7, 30), "sex": rng.choice(["F", "M"], 30), "tiv": rng.normal(1420, 140, 30),
                          "field_strength": rng.choice([1.5, 3.0], 30)})
    return table, rng.random((30, 4, 5, 6), np.float32) - 0.01 * (table.age.to_numpy(np.float32) - 75)[:, None, None, None]


def write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


LMARRAY = np.random.default_rng(1).random((5, 4, 6, 5), np.float32)


@pytest.mark.parametrize("datasets, message", [
    ({"images": np.zeros(3)}, "has no dataset 'linearmodels'. It has: images"), ({}, "It has: nothing"),
    ({"linearmodels": LMARRAY[..., :4]}, r"have the shape \(5, 4, 6, 4\). Four axes"), ({"linearmodels": LMARRAY[0]}, r"have the shape \(4, 6, 5\)"),
    ({"linearmodels": LMARRAY * np.nan}, "are not finite in 120 voxels")])
def test_other_files_are_refused(datasets, message, tmp_path):
    with pytest.raises(LinearModelsError, match=message):
        load_linear_models(write(tmp_path / "damaged.hdf5", **datasets), ROSTOCK)


def test_files_that_are_no_hdf5(tmp_path):
    (tmp_path / "text.hdf5").write_text("x")
    with pytest.raises(LinearModelsError, match="cannot be read as an HDF5 file"):
        load_linear_models(tmp_path / "text.hdf5", ROSTOCK)
    with pytest.raises(LinearModelsError, match="There is no file"):
        load_linear_models(tmp_path / "absent.hdf5", ROSTOCK)


def test_model_survives_the_way_there_and_back(study, tmp_path):
    table, maps = study
    model = ResidualModel(COVARIATES).fit(maps, table)
    save_linear_models(model, tmp_path / "ours.hdf5", ROSTOCK)
    back = load_linear_models(tmp_path / "ours.hdf5", ROSTOCK)
    np.testing.assert_allclose(back.transform(maps, table), model.transform(maps, table), atol=1e-4)
    np.testing.assert_allclose(back.effect("sex F"), -model.effect("sex M"), atol=1e-5)
    again = ResidualModel.from_state_dict(back.state_dict())
    assert np.array_equal(again.transform(maps, table), back.transform(maps, table))
    with pytest.raises(ValueError, match=r"fitted on maps of shape \(4, 5, 6\)"):
        back.transform(np.zeros((30, 3, 3, 3), np.float32), table)


def test_other_covariates_and_units_are_refused(study, tmp_path):
    table, maps = study
    with pytest.raises(CovariateError, match="this model has the columns intercept, age, sex M"):
        save_linear_models(ResidualModel(["age", "sex"]).fit(maps, table), tmp_path / "never.hdf5", ROSTOCK)
    in_litres = ResidualModel(COVARIATES).fit(maps, table.assign(tiv=table.tiv / 1000))
    with pytest.raises(CovariateError, match="mean tiv of 1.4"):
        save_linear_models(in_litres, tmp_path / "never.hdf5", ROSTOCK)


def test_model_that_imputes_asks_for_complete_covariates_when_read_back(study, tmp_path):
    table, maps = study
    imputing = ResidualModel(COVARIATES, impute=True).fit(maps, table.assign(age=table.age.where(table.index > 1)))
    save_linear_models(imputing, tmp_path / "imputing.hdf5", ROSTOCK)
    reread = load_linear_models(tmp_path / "imputing.hdf5", ROSTOCK)
    np.testing.assert_allclose(reread.transform(maps, table), imputing.transform(maps, table), atol=1e-4)
    with pytest.raises(CovariateError, match="'age' is missing in 30"):
        reread.transform(maps, table.assign(age=np.nan))


def test_voxel_without_a_model_is_left_at_zero(study, tmp_path):
    "As the group's viewer treats it, whatever the scan has there."
    table, maps = study
    hole = LMARRAY.copy()
    hole[2, 3, 1] = 0
    model = load_linear_models(write(tmp_path / "hole.hdf5", linearmodels=hole), ROSTOCK)
    left = ResidualModel.from_state_dict(model.state_dict()).transform(maps, table)
    images = np.stack([np.flip(np.transpose(volume, (2, 0, 1))) for volume in left])
    assert not images[:, 1, 3, 2].any() and images[:, 1, 3, 1].all()


@pytest.mark.parametrize("wrong", [lambda volume: 255 * volume, lambda volume: 1e38 * volume, lambda volume: volume / 255,
                                   lambda volume: np.full_like(volume, np.nan), lambda volume: -volume])
def test_scan_that_cannot_be_one_is_seen(study, wrong):
    "Failed before: got a residual map and a prediction like any other."
    table, maps = study
    maps = np.abs(maps)
    model = ResidualModel(COVARIATES).fit(maps, table)
    model = ResidualModel.from_state_dict(model.state_dict())
    sound, bad = check_sizes(model, [maps[0], wrong(maps[0])])
    assert not sound and "not a scan of the same kind" in bad
