"""The predictions that the page on what the network adds is computed from: five folds of the demo study, on validation and on test scans.

    nice python scripts/demo_study.py config/demo.yaml nbs/data

Folds that are trained already are kept, so that an interrupted run goes on."""
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from explainable_mri.config import ExperimentConfig, load_config
from explainable_mri.data.phantom import draw_person
from explainable_mri.data.splits import make_splits
from explainable_mri.experiments.folder import load_cohort, read_scans
from explainable_mri.experiments.results import tested_scans
from explainable_mri.experiments.train import train_fold
from explainable_mri.files import replacing

WHO, SAID = ["subject", "session", "group"], ["probability", "likelihood", "likelihood_low", "likelihood_high", "youden_threshold"]


def write(table: pd.DataFrame, path: Path) -> None:
    "Write a table with six digits."
    with replacing(path) as partial:
        table.round(6).to_csv(partial, index=False)


def degree(config: ExperimentConfig, scan: Any) -> float:
    "The true fraction of the hippocampus that the simulation took from a person at a visit."
    number, session = (int(name.rpartition("-")[2]) for name in (scan.subject, scan.session))
    return draw_person(number, config.cohort.params["seed"]).degree_at(session)


def main(path: str, folder: str) -> None:
    "Train what is not trained, and write demo_study.csv and demo_validation.csv."
    config = load_config(path)
    cohort = load_cohort(config)
    folders = [train_fold(config, fold) for fold in range(1, len(make_splits(cohort.table, config.split, config.seed)) + 1)]
    scans = tested_scans(folders, cohort)
    others = [f"{one.name} probability" for one in config.evaluation.baselines]
    scans["fold"] = scans.fold.str.removeprefix("fold-").astype(int)
    scans["degree"] = [degree(config, one) for one in scans.itertuples()]
    write(scans[[*WHO, *SAID, "fold", *others, "degree"]], Path(folder, "demo_study.csv"))
    validated = [read_scans(one / "validation.csv").assign(fold=number) for number, one in enumerate(folders, 1)]
    write(pd.concat(validated)[[*WHO, "probability", "fold"]], Path(folder, "demo_validation.csv"))


if __name__ == "__main__":
    main(*sys.argv[1:])
