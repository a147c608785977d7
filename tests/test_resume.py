"""A training that is killed goes on where it stood, and ends as if nothing had happened."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from explainable_mri.config import Component, TrainingConfig
from explainable_mri.training.checkpoints import read_history
from explainable_mri.training.trainer import train

EPOCHS = 5


class Scans(torch.utils.data.Dataset):
    "Noise, augmented, that takes `delay` seconds a scan to load."

    def __init__(self, scans: int, seed: int, delay: float = 0.0):
        self.volumes = torch.randn(scans, 1, 8, 10, 8, generator=torch.Generator().manual_seed(seed))
        self.targets, self.delay = torch.arange(scans) % 2, delay

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        time.sleep(self.delay)
        return {"volume": self.volumes[row] + 0.1 * torch.randn(()), "label": int(self.targets[row]), "row": row}


def run(folder, delay=0.0, workers=0):
    torch.set_num_threads(1)
    config = TrainingConfig(epochs=EPOCHS, batch_size=8, accelerator="cpu", workers=workers, monitor="validation_loss")
    return train(Component(name="dyrba2021"), Scans(40, 1, delay), Scans(16, 2), config, folder)


def assert_same(model, other):
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return run(folder), read_history(folder)


def test_kill(tmp_path, reference):
    process = subprocess.Popen([sys.executable, __file__, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "last.ckpt").exists():
            assert process.poll() is None and time.monotonic() < deadline, "no epoch was finished"
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(read_history(tmp_path)) < EPOCHS

    model, (expected, history) = run(tmp_path), reference
    assert model.epoch == expected.epoch
    assert_same(model, expected)
    assert read_history(tmp_path).drop(columns="seconds").equals(history.drop(columns="seconds"))


def test_workers_do_not_change_the_result(tmp_path, reference):
    assert_same(run(tmp_path, workers=2), reference[0])


if __name__ == "__main__":
    run(Path(sys.argv[1]), delay=0.02)
