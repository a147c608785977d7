"""The report of an experiment in a browser and on paper: it fits every width, and nothing is cut in print; in both languages."""
import io
import re
from collections import Counter
from pathlib import Path

import pytest

from explainable_mri.config import make_config
from explainable_mri.experiments.checklists import checklist_reports
from explainable_mri.experiments.explain import explain_fold
from explainable_mri.experiments.report import experiment_report, write_experiment_report
from explainable_mri.experiments.train import train_fold
from explainable_mri.report.slides import slides_of, write_slides

PAGES = ["report.html", "report-de.html", "checklists.html", "checklists-de.html", "model-card.html", "model-card-de.html"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    "A small experiment with two folds, its reports written."
    folder = tmp_path_factory.mktemp("experiment")
    config = make_config({"name": "tiny", "results": str(folder / "results"), "split": {"params": {"folds": 2}}, "training": {"epochs": 2},
                          "cohort": {"name": "phantom", "params": {"folder": str(folder / "data"), "scans": 48}},
                          "covariates": ["age"], "evaluation": {"replicates": 100}})
    for fold in (1, 2):
        train_fold(config, fold)
        explain_fold(config, fold)
    for language in ("en", "de"):
        write_experiment_report(config, language=language)
    return config


@pytest.fixture(scope="module")
def reports(experiment):
    "The report in both languages."
    return {language: experiment_report(experiment, language) for language in ("en", "de")}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut(experiment, browser, name):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((experiment.folder / name).as_uri())
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.get_attribute("html", "lang") == ("de" if "-de" in name else "en")
    for width in (1400, 820, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 695, "height": 900})  # the width of A4 between its margins
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 695
    cut = page.evaluate("[...document.querySelectorAll('.scroll, td, th')].filter((one) => one.scrollWidth > one.clientWidth + 1).length")
    assert cut == 0, f"{cut} tables or cells are wider than their place"
    page.close()


def test_pages_of_the_print_are_filled(experiment, browser):
    pypdf = pytest.importorskip("pypdf")
    page = browser.new_page()
    page.goto((experiment.folder / "report-de.html").as_uri())
    pages = pypdf.PdfReader(io.BytesIO(page.pdf(format="A4", prefer_css_page_size=True))).pages
    page.close()
    assert len(pages) <= 12
    bare = [number for number, one in enumerate(pages, 1) if len(one.extract_text()) < 40 and not one.images]
    assert not bare, f"pages {bare} are empty"


def test_slides_are_filled(reports):
    "Failed before: one picture or sentence a slide, and half of many slides empty."
    for report in reports.values():
        filled = [sum(band.fixed + band.most for band in bands) / 5.65 for _, bands in slides_of(report)]
        assert len(filled) < 24 and sum(part < 0.4 for part in filled) <= 2 and sum(min(part, 1) for part in filled) > 0.7 * len(filled), filled


def test_every_file_is_read_once(experiment, monkeypatch):
    "Failed before: mean maps, the table of scans, and the controls' maps were read for each figure and scale that needs them."
    from explainable_mri.experiments import explain

    read, load = Counter(), explain.load_map
    monkeypatch.setattr(explain, "load_map", lambda path, *rest: (read.update([str(path)]), load(path, *rest))[1])
    experiment_report(experiment)
    assert read and set(read.values()) == {1}, read.most_common(3)


def test_both_languages_hold_the_same(experiment, reports):
    for one, other in zip(reports["en"].sections, reports["de"].sections, strict=True):
        assert [type(block) for block in one.blocks] == [type(block) for block in other.blocks], one.title
        for block, same in zip(one.blocks, other.blocks):
            assert not hasattr(block, "frame") or block.frame.shape == same.frame.shape
    page = re.sub(r"<[^>]+>", " ", (experiment.folder / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"[A-Z]\w+_[LR]\b", page), "a region has the atlas's name, not a reader's"
    assert "is not an atrophy map" in page and "Red speaks for MCI or AD" in page and "class 1" not in page


def test_slides_hold_every_picture(experiment, reports, tmp_path):
    pptx, report = pytest.importorskip("pptx"), reports["de"]
    deck = pptx.Presentation(str(write_slides(report, tmp_path / "talk.pptx")))
    shapes = [shape for number, slide in enumerate(deck.slides) if number for shape in slide.shapes]  # the first has the cover, where there is room
    pictures = sum(type(block).__name__ == "Figure" for section in report.sections for block in section.blocks)
    assert sum(shape.shape_type == 13 for shape in shapes) == pictures
    lists = pptx.Presentation(str(write_slides(checklist_reports(experiment, "de")["checklists"], tmp_path / "lists.pptx")))
    shapes += [shape for slide in lists.slides for shape in slide.shapes]
    for slide in [*deck.slides, *lists.slides]:  # nothing lies over anything else, but for numbers in their frames
        boxes = [(one.left, one.top, one.left + one.width, one.top + one.height) for one in slide.shapes if one.shape_type != 1]
        over = [(one, other) for number, one in enumerate(boxes) for other in boxes[:number]
                if one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]]
        assert not over, slide.shapes.title.text
    out = [shape for shape in shapes if shape.left < 0 or shape.left + shape.width > deck.slide_width or shape.top + shape.height > deck.slide_height]
    assert not out, [shape.text_frame.text for shape in out if shape.has_text_frame]
