"""How many scans are enough: AUC on fixed test persons against the number of training scans, on the simulated cohort.

    nice python scripts/sample_size.py config/demo.yaml nbs/data/sample_size.csv

The network is the published CNN on maps averaged to 6 mm, so that many trainings fit into minutes; beside it stand the baselines of the study.
Rows that are in the file already are kept, so that an interrupted run goes on."""
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from explainable_mri.config import Component, load_config
from explainable_mri.data.cache import load_volumes, residual_maps
from explainable_mri.data.datasets import ScanDataset
from explainable_mri.data.splits import Split
from explainable_mri.evaluation.baselines import fit_baseline
from explainable_mri.experiments.folder import load_cohort
from explainable_mri.experiments.train import fit_residuals
from explainable_mri.files import replacing
from explainable_mri.registry import BASELINES
from explainable_mri.training.metrics import group_metrics
from explainable_mri.training.trainer import train

SIZES, SEEDS, TEST = (20, 40, 80, 160, 300), (0, 1, 2), 120  # training scans, seeds, test scans


def draw(table: pd.DataFrame, size: int, seed: int) -> Split:
    "The last persons are tested, always the same; of the others so many are drawn, and more for validation."
    people = list(dict.fromkeys(table.subject))
    tested = [person for person in people if person in set(table.subject[-TEST:])]
    others = [person for person in people if person not in set(tested)]
    shuffled = pd.Series(np.random.default_rng(seed).permutation(others))
    groups = shuffled.map(table.drop_duplicates("subject").set_index("subject").group)
    order = shuffled.iloc[np.lexsort([groups, shuffled.groupby(groups).cumcount()])]  # the diagnoses take turns
    rows = [row for person in order for row in np.flatnonzero(table.subject == person)]
    total = min(size + max(12, size // 6), len(rows))
    return Split(np.array(rows[:size]), np.array(rows[size:total]), np.flatnonzero(table.subject.isin(tested)))


def measure(config, cohort, volumes, size: int, seed: int) -> list[dict]:
    "AUC of the network and the baselines after training on so many scans."
    table, split = cohort.table, draw(cohort.table, size, seed)
    maps = residual_maps(volumes.copy(), table, cohort.grid, fit_residuals(config, cohort, split, volumes))
    labels = config.task.labels(table)
    small = torch.nn.functional.avg_pool3d(torch.from_numpy(np.asarray(maps, np.float32))[:, None], 2)[:, 0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        found = train(config.model.component(0), ScanDataset(small, labels, split.train), ScanDataset(small, labels, split.validation),
                      config.training, folder, loss=config.loss, seed=seed, task=config.task)
    with torch.no_grad():
        probability = torch.softmax(found.network(torch.from_numpy(small[split.test])[:, None]), 1)[:, 1].numpy()
    scores = {"network": probability}
    for name in ("region_volume", "linear_maps"):
        features = Component(name=name, params={}).build(BASELINES, maps, cohort.grid)
        scores[name] = fit_baseline(features, labels, table.subject, split.train, seed=seed)[split.test, 1]
    return [{"scans": size, "seed": seed, "of": name, "comparison": comparison.replace("_", " "), "auc": round(values["auc"], 5),
             "tested": len(split.test)} for name, score in scores.items()
            for comparison, values in group_metrics(table.group.iloc[split.test], score).items()]


def main(path: str, target: str) -> None:
    config, target = load_config(path), Path(target)
    cohort = load_cohort(config)
    volumes = load_volumes(cohort.table, cohort.grid, config.cache)
    rows = pd.read_csv(target).to_dict("records") if target.exists() else []
    for seed in SEEDS:
        for size in SIZES:
            if not any(row["seed"] == seed and row["scans"] == size for row in rows):
                rows += measure(config, cohort, volumes, size, seed)
                with replacing(target) as partial:
                    pd.DataFrame(rows).to_csv(partial, index=False, lineterminator="\n")
                print(rows[-6:], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
