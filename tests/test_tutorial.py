"""Your own cohort in an afternoon: every command of the tutorial, run as it stands there on the cohort that the tutorial writes."""
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from explainable_mri.cli import main

PAGE = Path(__file__).parents[1] / "nbs" / "own_data.ipynb"


def commands() -> list[list[str]]:
    "The arguments of each command in the tutorial's shell blocks, in their order."
    text = "\n".join(cell.source for cell in nbformat.read(PAGE, 4).cells if cell.cell_type == "markdown")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line.strip()]
    assert all(line.startswith("explainable-mri ") for line in lines), lines
    return [line.split()[1:] for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A folder with the tutorial's table, maps and configuration, made by the tutorial's own cells."
    folder, names = tmp_path_factory.mktemp("afternoon"), {}
    for source in [cell.source for cell in nbformat.read(PAGE, 4).cells if cell.cell_type == "code"]:
        exec(source, names)  # the cells up to the one that writes the configuration
        if "config" in names:
            break
    quick = {"training": {"epochs": 1}, "split": {"params": {"folds": 2}}, "evaluation": {"replicates": 100, "baselines": []}}
    config = names["config"] | quick | {"results": "results", "covariates": ["age", "tiv"]}  # half of so few controls are all men
    shutil.copytree(names["study"], folder / "data")
    config["cohort"]["params"]["path"] = "data/Kohorte.csv"
    (folder / "config").mkdir()
    (folder / "config/study.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    shutil.rmtree(names["study"])
    return folder


@pytest.mark.slow
def test_every_command_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    assert [arguments[0] for arguments in commands()] == ["check", "train", "explain", "report", "crossval"]
    for arguments in commands():
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, (arguments, result.output)
        if arguments[0] == "check":
            for words in ("'Kontrolle' as CN (16)", "'männlich' as M", "points between thousands", "Windows-1252"):
                assert words in result.output, result.output
    metrics = pd.read_csv(place / "results/study/study/metrics.csv")
    assert {"AD vs CN", "MCI vs CN"} <= set(metrics.comparison) and metrics.scans.max() <= 48
    assert "study" in (place / "results/study/report.html").read_text(encoding="utf-8")
