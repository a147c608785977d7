"""The predictions that the page on what the network adds is computed from, taken from the folders of a study of several networks.

    explainable-mri crossval config/study/*.yaml
    python scripts/study_predictions.py nbs/data results/study-cnn results/study-alexnet results/study-densenet results/study-resnet results/study-vgg

Of the first experiment study_cnn.csv holds the test scans with likelihoods, baselines and the true degree of atrophy; study_probabilities.csv holds
the probabilities of all networks on validation and test scans. Likelihoods are made anew from the validation scans, as a training makes them."""
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from explainable_mri.config import load_config
from explainable_mri.data.phantom import draw_person
from explainable_mri.evaluation.calibration import fit_calibration, youden_threshold
from explainable_mri.experiments.folder import fold_number, read_scans, trained_folds
from explainable_mri.files import replacing

WHO = ["subject", "session", "group"]


def write(table: pd.DataFrame, path: Path) -> None:
    "Write a table with six digits."
    with replacing(path) as partial:
        table.round(6).to_csv(partial, index=False)


def degree(scan: Any, seed: int) -> float:
    "The true fraction of the hippocampus that the simulation took from a person at a visit."
    number, session = (int(name.rpartition("-")[2]) for name in (scan.subject, scan.session))
    return draw_person(number, seed).degree_at(session)


def tested(config: Any, folder: Path) -> pd.DataFrame:
    "The test scans of a fold with likelihoods, Youden's threshold and baselines."
    scans, validated = (read_scans(folder / f"{name}.csv") for name in ("predictions", "validation"))
    truth = config.task.labels(validated) == 1
    fitted = fit_calibration(validated, truth, config.evaluation.calibration, config.evaluation.age_edges, seed=config.seed)
    scans = scans[[*WHO, "probability"]].join(fitted.likelihood(scans.probability))
    scans["youden_threshold"] = youden_threshold(truth, fitted.likelihood(validated.probability).likelihood)
    others = read_scans(folder / "baselines.csv").drop(columns=["path", "group"])
    return scans.assign(fold=fold_number(folder)).merge(others, on=["subject", "session"], validate="one_to_one")


def main(folder: str, *experiments: str) -> None:
    "Write study_cnn.csv and study_probabilities.csv."
    parts = []
    for number, place in enumerate(experiments):
        config = load_config(Path(place, "config.yaml"))
        folds = trained_folds(config.model_copy(update={"results": Path(place).parent}))
        if number == 0:
            scans = pd.concat([tested(config, one) for one in folds], ignore_index=True)
            scans["degree"] = [degree(scan, config.cohort.params["seed"]) for scan in scans.itertuples()]
            write(scans, Path(folder, "study_cnn.csv"))
        for one in folds:
            for part, name in (("validation", "validation"), ("test", "predictions")):
                own = read_scans(one / f"{name}.csv")[[*WHO, "probability"]]
                parts.append(own.assign(part=part, fold=fold_number(one), network=config.model.name))
    table = pd.concat(parts)
    wide = table.pivot(index=[*WHO, "fold", "part"], columns="network", values="probability").reset_index()
    write(wide, Path(folder, "study_probabilities.csv"))


if __name__ == "__main__":
    main(*sys.argv[1:])
