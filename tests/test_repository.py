"""The repository keeps its promises: code, README and site follow from the notebooks, and the modules know only what they may."""
import ast
import base64
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("nbs/**/[!._]*.ipynb")
                   if ".ipynb_checkpoints" not in path.parts)
CHAPTERS = [name for name in NOTEBOOKS if re.match(r"nbs/\d\d_", name)]
MODULES = sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("explainable_mri/**/*.py"))
FIGURE_BYTES = 150_000
AUTHORING = {"nbdev", "fastcore", "execnb", "ghapi", "IPython", "ipykernel", "jupyter", "papermill", "nbconvert", "pytest"}

# Which part of the package may import which; a part may always import itself. "data.axes" admits one module of a part.
GROUND = {"errors", "registry", "files", "environment", "docstrings"}
EXPERIMENT = GROUND | {"config", "tasks"}
LAYERS = {
    "__init__": {"docstrings"},
    "docstrings": set(),
    "errors": set(),
    "files": {"errors"},
    "registry": {"errors"},
    "environment": {"errors"},
    "tasks": GROUND,
    "config": GROUND | {"tasks"},
    "explainers": EXPERIMENT,
    "data": EXPERIMENT,
    "models": EXPERIMENT | {"data.axes", "data.volumes"},
    "training": EXPERIMENT | {"models", "data.datasets"},
    "analysis": EXPERIMENT | {"data"},
    "inference": EXPERIMENT | {"data", "models", "training", "explainers", "analysis", "report.figures", "report.scan", "viewer.widget", "evaluation.calibration"},  # report.scan, viewer.widget: what Explanation.report and .view call
    "evaluation": EXPERIMENT | {"data", "models", "training", "explainers", "analysis", "inference"},
    "report": EXPERIMENT | {"data", "analysis", "evaluation", "inference"},
    "preprocessing": EXPERIMENT | {"data", "report"},
    "experiments": EXPERIMENT | {"data", "models", "training", "explainers", "analysis", "evaluation", "inference", "report", "preprocessing"},
    "viewer": EXPERIMENT | {"data", "models", "training", "explainers", "analysis", "evaluation", "inference", "report", "preprocessing", "experiments"},
    "cli": EXPERIMENT | {"data", "models", "training", "explainers", "analysis", "evaluation", "inference", "report", "preprocessing", "experiments", "viewer"},
}


def contents(folder: Path) -> dict[str, bytes]:
    "Every file under `folder`, by name."
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts}


def changes(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    "Names of files that differ."
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def cells(name: str) -> list[nbformat.NotebookNode]:
    "The cells of a notebook of the repository."
    return nbformat.read(REPOSITORY / name, as_version=4).cells


@pytest.mark.parametrize("command, remedy", [
    (["nbdev_export"], "make export"),
    (["nbdev_clean"], "make export"),
    (["python", "scripts/build_readme.py"], "make readme"),
])
def test_files_follow_from_the_notebooks(copy, command, remedy):
    before = contents(copy)
    subprocess.run(command, cwd=copy, check=True)
    changed = changes(before, contents(copy))
    assert not changed, f"{' '.join(command)} changes {', '.join(changed)}; run '{remedy}' and commit the result"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_figures_are_light(name):
    for cell in cells(name):
        for output in cell.get("outputs", []):
            for kind, value in output.get("data", {}).items():
                size = len(base64.b64decode(value)) if kind in ("image/png", "image/jpeg") else len(str(value))
                assert size <= FIGURE_BYTES, f"a {kind} of cell {cell.id} has {size} bytes; draw it with fewer dots per inch"


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_is_committed_as_executed(name):
    code = [cell for cell in cells(name) if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code), "the chapter shows nothing; execute it before committing"
    for cell in code:
        assert not any(output.output_type == "error" for output in cell.outputs), f"cell {cell.id} ends in an error"
        last = cell.source.strip().splitlines()[-1] if cell.source.strip() else ""
        if re.match(r"print\(", last) and not re.search(r"^#\|\s*(export|eval:\s*false)", cell.source, re.MULTILINE):
            assert cell.outputs, f"cell {cell.id} prints, but its output is not there; execute the chapter"


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_opens_with_title_and_description(name):
    assert re.match(r"# \S.*\n+> \S", cells(name)[0].source), "the first cell must hold '# Title' and '> one-line description'"


def imported(name: str, source: str | None = None) -> set[str]:
    "Whole names of what a module imports, wherever in its code: modules, and names taken from modules."
    package = name.removesuffix(".py").split("/")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source or (REPOSITORY / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def forbidden_imports(name: str, source: str | None = None) -> list[str]:
    "What a module of the package imports although it stands beside or above it."
    part = name.removesuffix(".py").split("/")[1]
    assert part in LAYERS, f"{part} has no place in LAYERS yet, which says what it may import"
    allowed = {f"explainable_mri.{other}" for other in LAYERS[part] | {part}} | {"explainable_mri.__version__"}
    return sorted(one for one in imported(name, source) if one.startswith("explainable_mri.")
                  and not any(one == other or one.startswith(f"{other}.") for other in allowed))


@pytest.mark.parametrize("name", MODULES)
def test_package_does_without_the_tools_of_its_authors(name):
    notebooks = {"IPython"} if name.endswith("environment.py") else set()  # a bar in a notebook, where IPython runs already
    assert not {module.split(".")[0] for module in imported(name)} & AUTHORING - notebooks


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("_modidx.py")])
def test_module_imports_only_what_stands_below_it(name):
    forbidden = forbidden_imports(name)
    assert not forbidden, f"{name} may not import {', '.join(forbidden)}"


@pytest.mark.parametrize("name, source", [
    ("explainable_mri/explainers/lrp.py", "from ..training import trainer"),
    ("explainable_mri/explainers/lrp.py", "def inside():\n    from ..training.trainer import train"),
    ("explainable_mri/explainers/lrp.py", "import explainable_mri.training.trainer"),
    ("explainable_mri/models/keras.py", "from ..data.cohorts import Cohort"),
    ("explainable_mri/config.py", "from .data import volumes"),
])
def test_import_from_above_is_seen(name, source):
    assert len(forbidden_imports(name, source)) == 1


class Page(HTMLParser):
    "The ids of a page, its links, and those of its sidebar."

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.sidebar, self.inside = set(), [], [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.inside |= attributes.get("id") == "quarto-sidebar"
        link = attributes.get("href") or attributes.get("src")
        if link:
            self.links.append(link)
        if link and self.inside:
            self.sidebar.append(link)

    def handle_endtag(self, tag):
        self.inside &= tag != "nav"


def broken_links(site: Path) -> list[str]:
    "Links between the pages of a site that lead nowhere."
    pages = {path: Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if not target.exists() or fragment and target in pages and fragment not in pages[target].ids:
                found.append(f"{path.name}: {link}")
    return found


def test_site_is_rendered_without_a_broken_link(copy):
    subprocess.run(["python", "scripts/build_site.py"], cwd=copy, check=True)
    site = (copy / "docs").resolve()
    assert not broken_links(site)
    sidebar = {Path(link).stem for link in Page(site / "index.html").sidebar}
    missing = [name for name in NOTEBOOKS if Path(name).stem not in sidebar]
    assert not missing, f"_quarto.yml does not list {', '.join(missing)}"
