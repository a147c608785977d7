"""A whole study by one command: folds as executed notebooks, one that fails, the same command again, and the page of it all."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import papermill
import pytest

ROOT = Path(__file__).parents[1]
TINY = """
name: tiny
cohort: {name: phantom, params: {folder: data/tiny, scans: 48, seed: 2}}
split: {params: {folds: 2}}
training: {epochs: 2, accelerator: cpu}
evaluation: {replicates: 100, subgroups: [sex, age]}
"""


PROGRAM = [sys.executable, "-c", "import sys; from explainable_mri.cli import main; sys.argv[0] = 'explainable-mri'; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    "Run a command as a user does."
    return subprocess.run([*PROGRAM, *arguments], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, timeout=900)


def stop(folder: Path, how: signal.Signals, seen: Callable[[], bool], *arguments: str) -> str:
    "Run a command, stop it once something is seen, and return what it said: Ctrl-C reaches all its processes, as in a terminal."
    process = subprocess.Popen([*PROGRAM, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT, start_new_session=True)
    deadline = time.monotonic() + 300
    while not seen():
        assert process.poll() is None and time.monotonic() < deadline, f"{arguments} ended before it could be stopped"
        time.sleep(0.02)
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[how], said
    return said


def crossval(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    "Run the study as a user does."
    return command(folder, "crossval", "tiny.yaml", *arguments)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess, subprocess.CompletedProcess]:
    "A study of two folds: the second cannot be written at first, and the same command is given again."
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(TINY)
    obstacle = folder / "results" / "tiny" / "fold-2"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the folder of a fold should be")
    first = crossval(folder)
    (obstacle.parent / "times").write_text(str((obstacle.parent / "fold-1" / "train.ipynb").stat().st_mtime_ns))
    obstacle.unlink()
    return folder, first, crossval(folder)


def test_a_failing_fold_is_named_and_holds_up_no_other(study):
    folder, first, _ = study
    assert first.returncode == 1 and "1 folds finished: 1" in first.stdout and "fold-2 failed:" in first.stdout
    assert "Traceback" not in first.stdout and "whole log:" in first.stdout


def test_the_same_command_goes_on_and_repeats_nothing(study):
    folder, _, second = study
    results = folder / "results" / "tiny"
    assert second.returncode == 0 and "2 folds finished: 1, 2" in second.stdout, second.stdout + second.stderr
    assert str((results / "fold-1" / "train.ipynb").stat().st_mtime_ns) == (results / "times").read_text()
    for fold in (1, 2):
        cells = nbformat.read(results / f"fold-{fold}" / "train.ipynb", 4).cells
        assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
        assert not any(output.get("name") == "stderr" for cell in cells for output in cell.get("outputs", []))


def test_tables_give_every_auc_its_interval(study):
    place = study[0] / "results" / "tiny" / "study"
    metrics = pd.read_csv(place / "metrics.csv")
    auc = metrics[metrics.metric == "auc"]
    assert len(auc) == 2 and (auc.low <= auc.pooled).all() and (auc.pooled <= auc.high).all() and (auc.folds == 2).all()
    assert set(pd.read_csv(place / "subgroups.csv").column) == {"sex", "age"}
    assert set(pd.read_csv(place / "baselines.csv").against) == {"region_volume", "regional_volumes", "linear_maps"}
    assert all((place / f"{name}.tex").is_file() for name in ("metrics", "subgroups", "calibration", "baselines", "folds"))
    predictions = pd.read_csv(study[0] / "results" / "tiny" / "fold-1" / "predictions.csv")
    assert (predictions.likelihood_low <= predictions.likelihood).all() and (predictions.likelihood <= predictions.likelihood_high).all()
    at_youden = metrics[metrics.threshold.str.startswith("Youden's, likelihood", na=False)]
    names = {"balanced_accuracy", "sensitivity", "specificity", "ppv", "npv", "f1"}
    for comparison in ("MCI vs CN", "AD vs CN"):
        assert set(at_youden[at_youden.comparison == comparison].metric) == names
        assert set(metrics[(metrics.comparison == comparison) & (metrics.threshold == "probability 0.5")].metric) == names
    told = at_youden.pooled.notna() & at_youden.low.notna()
    assert told.any() and (at_youden.low[told] <= at_youden.pooled[told]).all() and (at_youden.pooled[told] <= at_youden.high[told]).all()
    page = (study[0] / "results" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "Youden&#39;s, likelihood" in page and "probability 0.5" in page


AGE = ("name=age", "task={kind: regression, target: age, unit: years}", "loss.name=mse", "training.monitor=validation_mae")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A folder with the configuration and its simulated cohort."
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny.yaml").write_text(TINY)
    assert command(folder, "simulate", "tiny.yaml").returncode == 0
    return folder


def test_a_number_is_compared_with_ridge_regressions(place):
    folder, few = place, "covariates=[sex, tiv, field_strength]"
    refused = command(folder, "train", "tiny.yaml", *AGE)
    assert refused.returncode == 1 and "covariates holds 'age', which the network is to estimate" in refused.stderr and "Traceback" not in refused.stderr
    for name in ("train", "report"):
        done = command(folder, name, "tiny.yaml", *AGE, few)
        assert done.returncode == 0, done.stderr
    results = folder / "results" / "age"
    predicted, others = (pd.read_csv(results / "fold-1" / f"{name}.csv") for name in ("predictions", "baselines"))
    table = pd.read_csv(results / "study" / "baselines.csv").set_index("against")
    assert set(table.index) == {"region_volume", "regional_volumes", "linear_maps"}
    for name, row in table.iterrows():
        assert row["other"] == pytest.approx((others[f"{name} prediction"] - predicted.age).abs().mean(), rel=1e-5)
        assert row.network == pytest.approx((predicted.prediction - predicted.age).abs().mean(), rel=1e-5)
        assert row.difference == pytest.approx(row.network - row["other"]) and row.low <= row.difference <= row.high and 0 < row.p <= 1
        assert row.network_low <= row.network <= row.network_high and row.other_r_low <= row.other_r <= row.other_r_high
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "Mean absolute error in years" in page and "Youden" not in page and "probability of 0.5" not in page


def test_three_classes_have_no_threshold(place):
    for name in ("train", "report"):
        done = command(place, name, "tiny.yaml", "name=three", "task.classes={CN: [CN], MCI: [MCI], AD: [AD]}", "explanation.target=AD")
        assert done.returncode == 0, done.stderr
    results = place / "results" / "three"
    page, metrics = (results / "report.html").read_text(encoding="utf-8"), pd.read_csv(results / "study" / "metrics.csv")
    assert "A scan is called the class that is likeliest" in page and "probability of 0.5" not in page and "Youden" not in page
    assert set(metrics.threshold.dropna()) == {"the likelier of the two", "the likeliest class"}


def test_the_notebook_is_the_page_of_the_study(study, monkeypatch):
    folder = study[0]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    papermill.execute_notebook(ROOT / "nbs" / "crossval.ipynb", folder / "page.ipynb", {"config": "tiny.yaml"}, kernel_name="python3",
                               progress_bar=False)
    outputs = [output for cell in nbformat.read(folder / "page.ipynb", 4).cells for output in cell.get("outputs", [])]
    text = "\n".join(str(output.get("text", "")) + "".join(str(output.get("data", {}).get(kind, "")) for kind in ("text/html", "text/markdown")) for output in outputs)
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", (folder / "results" / "tiny" / "report.html").read_text(encoding="utf-8"))
    assert len(headings) > 5 and "persons" in text
    assert [heading for heading in headings if heading not in text] == ["Configuration"]  # the report's own, folded there
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.slow
def test_a_study_that_is_stopped_in_any_way_ends_like_an_uninterrupted_one(study):
    folder, whole = study[0], study[0] / "results" / "tiny"
    results, arguments = folder / "results" / "stopped", ("crossval", "tiny.yaml", "name=stopped")
    for how, seen in ((signal.SIGINT, lambda: (results / "fold-1" / "last.ckpt").exists()),
                      (signal.SIGKILL, lambda: any((results / "fold-1" / "explanations").rglob("*.nii.gz"))),
                      (signal.SIGTERM, lambda: (results / "fold-2" / "last.ckpt").exists())):
        said = stop(folder, how, seen, *arguments)
        assert how == signal.SIGKILL or f"Stopped by {how.name}. Continue with the same command." in said and "Traceback" not in said
    last = command(folder, *arguments)
    assert last.returncode == 0 and "2 folds finished: 1, 2" in last.stdout, last.stdout + last.stderr
    for name in ("metrics", "folds", "subgroups", "calibration", "baselines"):
        old, new = (pd.read_csv(place / "study" / f"{name}.csv").drop(columns="minutes", errors="ignore") for place in (whole, results))
        pd.testing.assert_frame_equal(old, new)
    for fold in (1, 2):
        old, new = ([pd.read_csv(place / f"fold-{fold}" / name) for name in ("predictions.csv", "explanations/scans.csv")]
                    for place in (whole, results))
        pd.testing.assert_frame_equal(old[0], new[0])
        for one, other in zip(old[1].relevance_map, new[1].relevance_map, strict=True):
            assert one != other and np.array_equal(nib.load(folder / one).get_fdata(), nib.load(folder / other).get_fdata())


SEARCH = ("sweep", "tiny.yaml", "cohort.params={folder: data/search, scans: 96}", "sweep={folds: 2, keys: {training.learning_rate: {low: 0.001, high: 0.01}}}", "--trials", "2")


@pytest.mark.slow
def test_a_search_that_is_killed_in_a_trial_tries_and_finds_the_same(place):
    pytest.importorskip("optuna")
    whole = command(place, *SEARCH, "name=whole")
    assert whole.returncode == 0, whole.stderr
    trials = place / "results" / "killed" / "sweep" / "fold-1" / "trials"
    stop(place, signal.SIGKILL, lambda: any(trials.glob("*/fold-1/last.ckpt")), *SEARCH, "name=killed")
    stop(place, signal.SIGINT, lambda: len([*trials.glob("*/fold-2/last.ckpt")]) == 2, *SEARCH, "name=killed")
    again = command(place, *SEARCH, "name=killed")
    assert again.returncode == 0, again.stderr
    tables = [pd.read_csv(place / "results" / name / "sweep" / "fold-1" / "trials.csv") for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) == 2 and tables[0].value.notna().all()


def test_several_studies_are_one_command_and_end_in_a_comparison(study):
    folder = study[0]
    shutil.copytree(folder / "results" / "tiny", folder / "results" / "twin")
    for path in (folder / "results" / "twin").rglob("config.yaml"):
        path.write_text(path.read_text().replace("name: tiny", "name: twin"))
    (folder / "twin.yaml").write_text(TINY.replace("name: tiny", "name: twin"))
    (folder / "wrong.yaml").write_text(TINY.replace("name: tiny", "name: wrong") + "model: {name: resnett}\n")
    done = crossval(folder, "wrong.yaml", "twin.yaml", "--jobs", "2")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "wrong: " in done.stdout and "resnett" in done.stdout  # and holds up no other
    assert "tiny: 2 folds finished: 1, 2" in done.stdout and "twin: 2 folds finished: 1, 2" in done.stdout
    place = folder / "results" / "compare-tiny-twin"
    table, differences = pd.read_csv(place / "comparison.csv"), pd.read_csv(place / "differences.csv")
    metrics = pd.read_csv(folder / "results" / "tiny" / "study" / "metrics.csv")
    auc = metrics[metrics.metric == "auc"].set_index("comparison")
    for row in table.itertuples():  # the same numbers as in the study's own tables
        assert [row.auc, row.auc_low, row.auc_high, row.persons] == auc.loc[row.comparison, ["pooled", "low", "high", "persons"]].tolist()
    assert len(table) == 4 and (differences.difference == 0).all() and (differences.p == 1).all()
    assert (place / "comparison.png").stat().st_size > 10_000 and "tiny" in (place / "comparison.tex").read_text()


def test_two_configurations_of_one_name_are_refused(study):
    refused = crossval(study[0], "tiny.yaml", "training.epochs=1")
    assert refused.returncode == 1 and "Two of the configurations are named 'tiny'" in refused.stderr
    assert command(study[0], "crossval", "training.epochs=1").returncode == 2


def test_what_is_no_experiment_is_not_compared(study):
    for folders, words in ((["results/tiny", "data"], "holds no config.yaml"), (["results/tiny"], "two experiments or more"),
                           (["results/tiny", "results/tiny/"], "given twice")):
        refused = command(study[0], "compare", *folders)
        assert refused.returncode == 1 and words in refused.stderr and "Traceback" not in refused.stderr


SITES = """
name: sites
cohort:
  name: joined
  params:
    cohorts:
      north: {name: phantom, params: {folder: data/north, scans: 30, seed: 4}}
      south: {name: phantom, params: {folder: data/south, scans: 36, seed: 5}}
split: {name: leave_one_cohort_out}
training: {epochs: 1, accelerator: cpu}
explanation: {measures: []}
evaluation: {replicates: 100, subgroups: [sex], baselines: []}
"""


@pytest.mark.slow
def test_each_cohort_is_left_out_in_turn_and_named_in_the_tables(tmp_path):
    (tmp_path / "sites.yaml").write_text(SITES)
    done = command(tmp_path, "crossval", "sites.yaml", "--jobs", "2")
    assert done.returncode == 0 and "2 folds finished: 1, 2" in done.stdout, done.stdout + done.stderr
    results = tmp_path / "results" / "sites"
    table = pd.read_csv(results / "study" / "held_out.csv")
    for fold, name, other in ((1, "north", "south"), (2, "south", "north")):
        parts = pd.read_csv(results / f"fold-{fold}" / "split.csv")
        test = parts[parts.part == "test"]
        assert parts.subject[parts.part == "test"].str.startswith(f"{name}_").all()
        assert parts.subject[parts.part != "test"].str.startswith(f"{other}_").all()
        metrics = json.loads((results / f"fold-{fold}" / "metrics.json").read_text())
        for comparison in ("MCI_vs_CN", "AD_vs_CN"):
            row = table[(table.held_out == name) & (table.comparison == comparison.replace("_", " ")) & (table.metric == "auc")].iloc[0]
            assert row.value == pytest.approx(metrics[comparison]["auc"]) and row.low <= row.value <= row.high
            assert row.scans == test.group.isin(["CN", comparison[:comparison.index("_")]]).sum()
    page = (results / "report.html").read_text()
    assert "Cohort by cohort" in page and "north" in page and "south" in page


@pytest.mark.slow
def test_an_experiment_is_run_again_and_gives_the_same_numbers(study):
    again = command(study[0], "reproduce", "results/tiny")
    assert again.returncode == 0 and "Equal: scans, weights, predictions and metrics" in again.stdout, again.stdout + again.stderr
    assert (pd.read_csv(study[0] / "results" / "tiny-again" / "reproduction.csv").differ == 0).all()
    assert "Traceback" not in command(study[0], "reproduce", "results/nothing").stderr
