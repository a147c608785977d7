"""Augmentation gives the same training whether it is done in the data loader or in batches on the device."""
import numpy as np
import pytest
import torch

from explainable_mri.config import Component, TrainingConfig
from explainable_mri.data.transforms import build_transforms
from explainable_mri.data.datasets import ScanDataset
from explainable_mri.data.volumes import Grid, get_grid
from explainable_mri.training import trainer

COMPONENTS = [Component(name="flip"), Component(name="shift", params={"distance": 6}), Component(name="published", params={"distance": 3})]


@pytest.fixture(scope="module")
def grid() -> Grid:
    "A small part of the 3 mm grid."
    whole = get_grid("mni_3mm")
    return Grid("small", whole.shape, whole.affine, (slice(24, 37), slice(30, 42), slice(20, 31)))


def train(folder, grid, workers=0):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    volumes = rng.normal(size=(24, *grid.cropped_shape)).astype(np.float32) + labels[:, None, None, None]
    config = TrainingConfig(epochs=3, batch_size=5, accelerator="cpu", workers=workers, monitor="validation_loss")
    return trainer.train(Component(name="dyrba2021"),
                         ScanDataset(volumes, labels, range(18), build_transforms(COMPONENTS, grid)),
                         ScanDataset(volumes, labels, range(18, 24)), config, folder)


def test_batches_on_the_device_are_those_of_the_loader(tmp_path, grid, monkeypatch):
    loader = train(tmp_path / "loader", grid)
    workers = train(tmp_path / "workers", grid, workers=2)
    calls = []
    batch = trainer.NetworkTraining.on_after_batch_transfer

    def counted(module, *args):
        calls.append(module.augmentation is not None and module.trainer.training)
        return batch(module, *args)

    monkeypatch.setattr(trainer.NetworkTraining, "on_after_batch_transfer", counted)
    monkeypatch.setattr(trainer, "_augments_on", lambda device, dataset: True)
    device = train(tmp_path / "device", grid)
    assert calls.count(True) == 12 and calls.count(False) == 6, "4 training batches are varied in an epoch, 2 of validation are not"
    for name, value in loader.network.state_dict().items():
        assert torch.equal(value, workers.network.state_dict()[name]), name
        assert torch.equal(value, device.network.state_dict()[name]), name


def test_where_it_is_done(grid):
    ours, theirs = (ScanDataset(np.zeros((2, 3, 3, 3)), [0, 1], transform=build_transforms([Component(name=name)], grid))
                    for name in ("flip", "torchio.RandomNoise"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert trainer._augments_on(cuda, ours) and not trainer._augments_on(cpu, ours)
    assert not trainer._augments_on(cuda, theirs) and not trainer._augments_on(cuda, ours.without_transform())
