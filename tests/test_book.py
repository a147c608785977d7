"""The book as its readers and authors meet it: chapters of small cells, quiet outputs, and a site that stands on its own."""
import ast
import importlib
import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
import pytest

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted(REPOSITORY.glob("nbs/*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]
LONGEST, AVERAGE = 60, 30  # lines of an exported cell


def exported(path: Path) -> list[str]:
    "Exported cells that define something."
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return [source for source in cells if re.match(r"#\|\s*export\b", source) and not re.match(r"#\|\s*exports?\s*\n(import|from) ", source)]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_exported_cells_are_short(path):
    long = [f"{source.splitlines()[1][:50]!r}: {len(source.splitlines())}" for source in exported(path) if len(source.splitlines()) > LONGEST]
    assert not long, f"cut these cells, each followed by a use: {'; '.join(long)}"


def test_exported_cells_are_short_on_average():
    lengths = [len(source.splitlines()) for path in CHAPTERS for source in exported(path)]
    assert sum(lengths) / len(lengths) <= AVERAGE


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_free_of_debris(path):
    notebook = nbformat.read(path, 4)
    assert "widgets" not in notebook.metadata, "the notebook holds the state of widgets"
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", f"cell {cell.id} writes to stderr: {output.text[:200]!r}"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), f"cell {cell.id} shows a widget without its state"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_module_has_the_name_of_its_chapter(path):
    for cell in nbformat.read(path, 4).cells:
        if found := re.match(r"#\|\s*default_exp (\S+)", cell.source):
            assert found[1].rpartition(".")[2] == path.stem[3:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saving_untouched_changes_nothing(path, tmp_path):
    pytest.importorskip("jupyter_server")
    from jupyter_server.services.contents.filemanager import FileContentsManager
    from traitlets.config import Config
    from traitlets.config.loader import PyFileConfigLoader

    config = Config(PyFileConfigLoader("jupyter_server_config.py", str(REPOSITORY)).load_config())
    manager, copied = FileContentsManager(config=config, root_dir=str(tmp_path), parent=None), Path(shutil.copy(path, tmp_path))
    model = manager.get(path.name, content=True, type="notebook")
    model["content"]["metadata"]["language_info"] = {"name": "python", "version": "3.11.7"}  # as JupyterLab adds when a kernel starts
    manager.save({key: model[key] for key in ("type", "format", "content")}, path.name)
    assert copied.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_code_fits_the_column(path):
    wide = [line for source in exported(path) for line in source.splitlines() if len(line) > 150]
    assert not wide, f"longer than 150 characters: {wide[0]!r}"


def site() -> list[Path]:
    "The rendered pages, or none where the site is not rendered."
    return sorted((REPOSITORY / "docs").glob("*.html"))


def test_pages_ask_nobody_else():
    sources = [path for path in (REPOSITORY / "docs").rglob("*.css")] + site()
    loads = re.compile(r"(?:@import\s+(?:url\()?|url\()[\"']?(https?:[^\"')]+)|<(?:script|img|iframe)[^>]+src=\"(https?:[^\"]+)\"|"
                       r"<link[^>]+rel=\"(?:stylesheet|preload|icon)\"[^>]+href=\"(https?:[^\"]+)\"")
    found = [f"{path.name}: {next(filter(None, match.groups()))}" for path in sources for match in loads.finditer(path.read_text(encoding="utf-8"))]
    assert not found, f"pages load from others: {', '.join(found[:5])}"


def test_pictures_are_described():
    bare = [path.name for path in site() for tag in re.findall(r"<img[^>]*>", path.read_text(encoding="utf-8"))
            if not re.search(r"alt=\"[^\"]+\"", tag)]
    assert not bare, f"pictures without alternative text in {', '.join(sorted(set(bare)))}"


def test_notebooks_are_valid_python():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_use_follows_every_pair_of_definitions(path):
    row, most = 0, 0
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code" or re.match(r"#\|\s*(default_exp|hide)", cell.source):
            continue
        defines = re.match(r"#\|\s*export\b", cell.source) and re.search(r"^(class|def|@|\w+\s*[:=])", cell.source, re.MULTILINE)
        row = row + 1 if defines else 0
        most = max(most, row)
    assert most <= 2, f"{most} definitions stand in a row; show the first ones in use"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_page_imports_is_there(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code" or "explainable_mri" not in cell.source:
            continue
        lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!", "?"))]
        for node in ast.walk(ast.parse("\n".join(lines) or "pass")):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("explainable_mri"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), f"{node.module} has no {name.name}"
