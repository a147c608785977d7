"""The command line as a user meets it: a process, its exit code, and what it prints."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-c", "from explainable_mri.cli import main; main(prog_name='explainable-mri')"]
COMMANDS = ("simulate", "simulate-atrophy", "check", "train", "explain", "report", "crossval", "compare", "reproduce", "sweep", "evaluate", "predict", "info", "prepare", "import-keras")


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    "Run `explainable-mri` in a process of its own."
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def fails(*arguments: object, cwd: Path) -> str:
    "Run a command that must fail with one message and no traceback; return the message."
    result = run(*arguments, cwd=cwd)
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr + result.stdout, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    "A folder with the project's configurations and one for a tiny experiment, its cohort simulated."
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "config" / "tiny.yaml").write_text(
        "base: base.yaml\nname: tiny\ncohort: {name: phantom, params: {folder: data/tiny, scans: 48, seed: 1}}\n"
        "split: {params: {folds: 2}}\ntransforms: [{name: flip}]\ntraining: {epochs: 2, monitor: validation_loss}\n")
    result = run("simulate", "config/tiny.yaml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, tmp_path):
    result = run(command, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert f"explainable-mri {command} " in result.stdout.partition("Example:")[2]


def test_main_job(workplace):
    for command in ("train", "explain", "report"):
        result = run(command, "config/tiny.yaml", cwd=workplace)
        assert result.returncode == 0, result.stderr
    report = workplace / "results" / "tiny" / "report.html"
    assert str(report.relative_to(workplace)) in result.stdout
    page = report.read_text(encoding="utf-8")
    assert "not for diagnosis" in page and "AD vs CN" in page and "truly atrophied" in page
    fold = workplace / "results" / "tiny" / "fold-1"
    for name in ("split.csv", "best.ckpt", "predictions.csv", "metrics.json", "history.csv"):
        assert (fold / name).exists(), name
    before = (fold / "best.ckpt").stat().st_mtime
    assert run("train", "config/tiny.yaml", cwd=workplace).returncode == 0
    assert (fold / "best.ckpt").stat().st_mtime == before, "a finished fold is trained again"


def test_relevance_maps_overlay_their_scans(workplace):
    scans = pd.read_csv(workplace / "results" / "tiny" / "fold-1" / "explanations" / "scans.csv")
    scan, relevance = nib.load(scans.path[0]), nib.load(scans.relevance_map[0])
    assert relevance.shape == scan.shape
    np.testing.assert_allclose(relevance.affine, scan.affine)


def test_other_configuration_is_refused(workplace):
    message = fails("train", "config/tiny.yaml", "training.learning_rate=0.5", cwd=workplace)
    assert "training.learning_rate: there 0.001, now 0.5" in message


def test_killed_training_resumes(workplace):
    arguments = ["config/tiny.yaml", "name=killed", "training.epochs=4", "training.patience=4"]
    command = [*PROGRAM, "train", *arguments]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    fold = workplace / "results" / "killed" / "fold-1"
    deadline = time.monotonic() + 300
    while not (fold / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (fold / "last.ckpt").exists() and not (fold / "metrics.json").exists()
    assert run("train", *arguments, cwd=workplace).returncode == 0
    assert run("explain", *arguments, cwd=workplace).returncode == 0
    result = run("report", *arguments, cwd=workplace)
    assert result.returncode == 0
    history = pd.read_csv(fold / "history.csv")
    assert history.epoch.tolist() == [1, 2, 3, 4]
    killed, whole = ((workplace / "results" / name / "report.html").read_text() for name in ("killed", "tiny"))
    assert killed.count("<h2") == whole.count("<h2") and killed.count("<img") == whole.count("<img")


def test_five_problems_in_one_message(workplace):
    table = pd.read_csv(next((workplace / "data" / "tiny").rglob("participants.tsv")), sep="\t")
    source = next((workplace / "data" / "tiny").rglob("participants.tsv")).parent
    table["path"] = [str(source / path) for path in table.path]
    other = workplace / "other_grid.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((10, 10, 10), np.float32), np.eye(4)), other)
    table.loc[0, "path"] = str(workplace / "missing.nii.gz")
    table.loc[1, "group"] = "FTD"
    table.loc[2, "age"] = np.nan
    table.loc[3, "path"] = str(other)
    table = pd.concat([table, table.iloc[[5]]])
    table.to_csv(workplace / "bad.csv", index=False)
    message = fails("train", "config/tiny.yaml", "name=bad", "cohort.name=table", "cohort.params.path=bad.csv",
                    cwd=workplace)
    for part in ("missing.nii.gz", "FTD", "age", "other_grid.nii.gz", "duplicate"):
        assert part in message, f"{part} is not in:\n{message}"


@pytest.mark.parametrize("arguments, part", [
    (("train", "config/nowhere.yaml"), "no configuration file"),
    (("train", "config/demo.yaml", "training.epoch=5"), "Did you mean 'epochs'?"),
    (("train", "config/demo.yaml", "model.name=dyrba2012"), "Did you mean 'dyrba2021'?"),
    (("train", "config/demo.yaml", "grid=mni_4mm"), "mni_3mm"),
    (("train", "config/demo.yaml", "epochs"), "KEY=VALUE"),
    (("explain", "config/tiny.yaml", "--fold", "2"), "explainable-mri train"),
    (("report", "config/tiny.yaml", "name=nothing"), "explainable-mri train"),
    (("train", "config/tiny.yaml", "--fold", "3"), "fold"),
    (("fly",), "No such command"),
])
def test_errors_are_one_message(workplace, arguments, part):
    assert part in fails(*arguments, cwd=workplace)


def test_debug_shows_the_traceback(workplace):
    result = run("--debug", "train", "config/nowhere.yaml", cwd=workplace)
    assert result.returncode != 0 and "Traceback" in result.stderr


def test_info(workplace):
    versions = run("info", cwd=workplace)
    assert versions.returncode == 0 and "dyrba2021" in versions.stdout and "torch" in versions.stdout
    values = run("info", "config/tiny.yaml", "training.epochs=7", cwd=workplace)
    assert "epochs: 7" in values.stdout and "batch_size: 20" in values.stdout


@pytest.mark.parametrize("arguments, heavy", [
    (["info"], {"monai", "nilearn", "lightning", "sklearn", "matplotlib", "torchio", "captum", "scipy.stats"}),
    (["train", "--help"], {"torch", "nibabel", "sklearn", "matplotlib", "lightning"}),
])
def test_a_quick_command_loads_no_slow_library(arguments, heavy):
    code = (f"import sys; sys.argv = ['explainable-mri', *{arguments!r}]\nfrom explainable_mri.cli import main\n"
            f"try:\n    main()\nfinally:\n    print('LOADED', sorted({heavy!r} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "LOADED []" in result.stdout, result.stdout[-300:] + result.stderr[-500:]
