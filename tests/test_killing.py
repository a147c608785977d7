"""Commands that are stopped or killed in the middle, as processes: nothing goes on behind them, and the same command ends with the same results."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-c", "from explainable_mri.cli import main; main(prog_name='explainable-mri')"]
TINY = """
name: tiny
cohort: {name: phantom, params: {folder: data/tiny, scans: 48, seed: 3}}
split: {params: {folds: 2}}
training: {epochs: 6, patience: 6, accelerator: cpu}
evaluation: {replicates: 100, baselines: [{name: region_volume}]}
sweep: {folds: 2, keys: {training.learning_rate: {low: 0.0005, high: 0.01, log: true}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A folder with a configuration and its simulated cohort."
    folder = tmp_path_factory.mktemp("killing")
    (folder / "tiny.yaml").write_text(TINY)
    run(folder, "simulate", "tiny.yaml")
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    "Start a command as a user does, in a group of processes of its own, as a terminal would; it prints to said.txt, which nobody waits for."
    with (folder / "said.txt").open("w") as said:
        return subprocess.Popen([*PROGRAM, *arguments], cwd=folder, stdout=said, stderr=said, start_new_session=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def ended(folder: Path, process: subprocess.Popen, seconds: float) -> str:
    "Wait for the end of a command, and give what it printed."
    process.wait(timeout=seconds)
    return (folder / "said.txt").read_text()


def run(folder: Path, *arguments: str) -> str:
    "Run a command that must succeed, and give what it printed."
    process = start(folder, *arguments)
    said = ended(folder, process, 600)
    assert process.returncode == 0, said
    return said


def wait_for(found, process: subprocess.Popen, seconds: float = 400) -> None:
    "Wait until something is there while a command runs."
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, "the command ended before it was to be stopped"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def without_time(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


def test_crossval_stopped_by_hand_and_killed_goes_on(place):
    fold = place / "results" / "tiny" / "fold-1"
    command = ("crossval", "tiny.yaml")
    for stop in ("Ctrl-C", "SIGINT", "SIGKILL"):  # Ctrl-C reaches all processes of a terminal, SIGINT the command alone
        epochs = len(without_time(fold)) if (fold / "history.csv").exists() else 0
        process = start(place, *command)
        wait_for(lambda: (fold / "last.ckpt").exists() and len(without_time(fold)) > epochs, process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # submitit's, papermill's, the kernel
        number = signal.SIGINT if stop == "Ctrl-C" else signal.Signals[stop]
        (os.killpg if stop == "Ctrl-C" else os.kill)(process.pid, number)
        said = ended(place, process, 60)
        if stop == "SIGKILL":
            assert process.returncode == -signal.SIGKILL
            continue
        assert process.returncode == 128 + number, said
        assert f"Stopped by {number.name}. Continue with the same command." in said and "Traceback" not in said
        assert not psutil.wait_procs(family, timeout=2)[1], "a process of a fold goes on"
        assert not (fold / "metrics.json").exists()
    left = [one for one in family if one.is_running()]
    assert "2 folds finished: 1, 2" in run(place, *command)
    assert not psutil.wait_procs(left, timeout=2)[1], "what a killed command left behind goes on"
    assert not list((place / "results" / "tiny" / "study" / "logs").glob("running-*.json"))
    run(place, "train", "tiny.yaml", "name=whole")
    whole = place / "results" / "whole" / "fold-1"
    assert without_time(fold).equals(without_time(whole))
    for name in ("metrics.json", "predictions.csv", "baselines.csv"):
        assert (fold / name).read_text() == (whole / name).read_text(), name


def test_a_search_killed_in_the_middle_of_a_trial_ends_as_if_it_had_not_been(place):
    command = ("sweep", "tiny.yaml", "training.epochs=3", "training.patience=3", "--trials", "3")
    process = start(place, *command, "name=killed")
    trials = place / "results" / "killed" / "sweep" / "fold-1" / "trials"
    wait_for(lambda: len(list(trials.glob("*/fold-2/metrics.json"))) == 1 and len(list(trials.glob("*/fold-1/last.ckpt"))) == 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (trials.parent / "best.yaml").exists()
    done = next(trials.glob("*/fold-2/metrics.json")).stat().st_mtime_ns
    run(place, *command, "name=killed")
    assert min(path.stat().st_mtime_ns for path in trials.glob("*/fold-2/metrics.json")) == done  # what was done is not done again
    run(place, *command, "name=never")
    tables = [pd.read_csv(place / "results" / name / "sweep" / "fold-1" / "trials.csv") for name in ("killed", "never")]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 3
    metrics = [json.loads((place / "results" / f"{name}-sweep-1" / "fold-1" / "metrics.json").read_text()) for name in ("killed", "never")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("settings", [
    ("training.accumulate=2", "training.precision=bf16-mixed", "training.schedule={name: cosine}"),
    ("training.epochs=30", "training.patience=2", "training.learning_rate=0.01")], ids=["accumulation, bfloat16, schedule", "early stopping"])
def test_train_killed_under_other_settings_gives_the_same_metrics(place, settings):
    name = f"other{len(settings[0])}"
    run(place, "train", "tiny.yaml", f"name={name}-whole", *settings)
    whole, fold = (place / "results" / f"{name}-{one}" / "fold-1" for one in ("whole", "killed"))
    epochs = len(without_time(whole))
    process = start(place, "train", "tiny.yaml", f"name={name}-killed", *settings)
    wait_for(lambda: (fold / "last.ckpt").exists() and len(without_time(fold)) >= epochs - 1, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (fold / "metrics.json").exists()
    run(place, "train", "tiny.yaml", f"name={name}-killed", *settings)
    assert without_time(fold).equals(without_time(whole))
    assert (fold / "metrics.json").read_text() == (whole / "metrics.json").read_text()
