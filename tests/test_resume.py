"""A training that is killed goes on where it stood, and ends as if nothing had happened."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

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


def run(folder, delay=0.0, workers=0, **settings):
    torch.set_num_threads(1)
    config = TrainingConfig(**{"epochs": EPOCHS, "batch_size": 8, "accelerator": "cpu", "workers": workers, "monitor": "validation_loss"} | settings)
    return train(Component(name="dyrba2021"), Scans(40, 1, delay), Scans(16, 2), config, folder)


def assert_same(model, other):
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return run(folder), read_history(folder)


def kill_after(folder, epochs, settings=None):
    "Train in a process of its own, and kill it once so many epochs are written."
    command = [sys.executable, __file__, str(folder), json.dumps(settings or {})]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "last.ckpt").exists() or len(read_history(folder)) < epochs:
            assert process.poll() is None and time.monotonic() < deadline, f"{epochs} epochs were not finished"
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_kill(tmp_path, reference):
    kill_after(tmp_path, 1)
    assert 1 <= len(read_history(tmp_path)) < EPOCHS

    model, (expected, history) = run(tmp_path), reference
    assert model.epoch == expected.epoch
    assert_same(model, expected)
    assert read_history(tmp_path).drop(columns="seconds").equals(history.drop(columns="seconds"))


@pytest.mark.parametrize("settings", [
    {"accumulate": 3, "clip": 0.5, "optimizer": {"name": "sgd", "params": {"momentum": 0.9}}},
    {"precision": "bf16-mixed", "schedule": {"name": "cosine"}}, {"schedule": {"name": "plateau", "params": {"patience": 0}}},
    {"epochs": 40, "patience": 3, "learning_rate": 0.01}], ids=["accumulation", "bfloat16 and schedule", "plateau", "early stopping"])
def test_kill_under_other_settings(settings, tmp_path):
    "Accumulation, bfloat16, schedules, and a training that is to stop early, killed in the epoch before its last."
    expected, history = run(tmp_path / "whole", **settings), read_history(tmp_path / "whole")
    assert len(history) < settings.get("epochs", EPOCHS + 1), "the training did not stop early"
    kill_after(tmp_path / "killed", len(history) - 1, settings)
    model = run(tmp_path / "killed", **settings)
    assert model.epoch == expected.epoch
    assert_same(model, expected)
    assert read_history(tmp_path / "killed").drop(columns="seconds").equals(history.drop(columns="seconds"))


def test_workers_do_not_change_the_result(tmp_path, reference):
    assert_same(run(tmp_path, workers=2), reference[0])


class Unplug(Callback):
    "Ends a training after the first batch of an epoch, as a lost node would."

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            raise KeyError("unplugged")


@pytest.mark.parametrize("settings", [
    {"schedule": {"name": "cosine"}}, {"schedule": {"name": "plateau", "params": {"patience": 0}}}, {"schedule": {"name": "one_cycle"}},
    {"schedule": {"name": "warmup_cosine"}}, {"optimizer": {"name": "sgd", "params": {"momentum": 0.9}}, "accumulate": 3, "clip": 0.5},
    {"precision": "bf16-mixed"}, {"deterministic": True}, {"learning_rate": "auto"}], ids=str)
def test_an_interruption_changes_nothing(settings, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run(whole, **settings)
    with pytest.raises(KeyError):
        train(*arguments(settings), parts, callbacks=[Unplug(2)])
    assert len(read_history(parts)) == 2
    assert_same(run(parts, **settings), expected)
    assert read_history(parts).drop(columns="seconds").equals(read_history(whole).drop(columns="seconds"))


def arguments(settings):
    "What `run` gives to `train`."
    config = TrainingConfig(epochs=EPOCHS, batch_size=8, accelerator="cpu", monitor="validation_loss", **settings)
    return Component(name="dyrba2021"), Scans(40, 1), Scans(16, 2), config


class Ranks(Callback):
    "Writes down which scans each process sees."

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, *_):
        with open(self.folder / f"rank-{trainer.global_rank}.txt", "a") as file:
            file.write("".join(f"{trainer.current_epoch} {row}\n" for row in batch["row"].tolist()))


def test_two_processes_share_the_scans_and_resume(tmp_path):
    settings, whole, parts = {"devices": 2}, tmp_path / "whole", tmp_path / "parts"
    expected = train(*arguments(settings), whole, callbacks=[Ranks(tmp_path)])
    seen = [set((tmp_path / f"rank-{rank}.txt").read_text().split("\n")) - {""} for rank in (0, 1)]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 40 * EPOCHS
    with pytest.raises(Exception, match="unplugged"):
        train(*arguments(settings), parts, callbacks=[Unplug(2)])
    assert_same(train(*arguments(settings), parts), expected)
    assert read_history(parts).drop(columns="seconds").equals(read_history(whole).drop(columns="seconds"))


def test_training_starts_from_pretrained_weights(tmp_path, reference):
    model, _ = reference
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.network.state_dict().items()}}, weights)
    config = arguments({})[3].model_copy(update={"epochs": 1, "learning_rate": 1e-12})
    started = train(*arguments({})[:3], config, tmp_path / "run", pretrained=weights)
    for name, value in model.network.named_parameters():
        torch.testing.assert_close(started.network.get_parameter(name), value, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "run" / "pretrained.csv").exists()


if __name__ == "__main__":
    run(Path(sys.argv[1]), delay=0.02, **json.loads(sys.argv[2]))
