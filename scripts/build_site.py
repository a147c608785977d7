"""Render the book into docs/ from the notebooks as they were executed: nbdev prepares the pages, Quarto or smalldocs lays
them out. What is added to nbdev's own preparation: chapters carry their numbers, the source of what a chapter exports can be
unfolded below its signature, and formulas become MathML, which browsers show without a network."""
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.serve import proc_nbs

DEFINITION = ast.FunctionDef | ast.ClassDef
FOREIGN_FONTS = re.compile(r"@import\s+(?:url\()?[\"']?https?:[^)\"']*[\"']?\)?;")
EXPORT = re.compile(r"#\|\s*export[is]?\b.*\n")
FORMULA = re.compile(r"(?P<code>```.*?```|`[^`]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>\S[^$]*)\$", re.DOTALL)


def title_cells(
    cell: nbformat.NotebookNode,  # first cell of a notebook: title, description, and perhaps more
    number: str,                  # number of the chapter; empty for other pages
) -> list[nbformat.NotebookNode]:
    "Number the title, and keep the text below it in a cell of its own, because nbdev makes page metadata of the first."
    head = re.match(r"# (?P<title>.+)\n*(?P<description>(?:> .*\n?)*)", cell.source)
    if not head:
        return [cell]
    description = " ".join(line.removeprefix("> ") for line in head["description"].splitlines())
    title = f"# {number} {head['title']}".replace("  ", " ")
    return [nbformat.v4.new_markdown_cell(text) for text in (f"{title}\n\n> {description}", cell.source[head.end():]) if text]


def methods(
    node: ast.ClassDef,  # a class
) -> list[str]:          # "Grid.crop" and so on: its public methods that have a docstring
    "Name the methods of a class that deserve a signature of their own."
    return [f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)
            and item.name[0] != "_" and ast.get_docstring(item) and not item.decorator_list]


def has_signature(
    node: ast.FunctionDef | ast.ClassDef,
) -> bool:  # False for exceptions, pydantic models and the like, whose arguments are their parents'
    "Tell whether the signature of a definition says how to call it."
    return isinstance(node, ast.FunctionDef) or "dataclass" in ast.unparse(node.decorator_list) or any(
        isinstance(item, ast.FunctionDef) and item.name == "__init__" for item in node.body)


def command_name(
    node: ast.FunctionDef | ast.ClassDef,  # a public definition
) -> str | None:                           # such as "train"; None for what is no command
    "The name of a command of the command line, as its decorator gives it."
    calls = [item for item in node.decorator_list if isinstance(item, ast.Call) and isinstance(item.func, ast.Attribute)]
    return next((item.args[0].value for item in calls if item.func.attr == "command" and item.args), None)


def headings(
    node: ast.FunctionDef | ast.ClassDef,  # a public definition
) -> list[nbformat.NotebookNode]:          # cells that name it, and that nbdev turns into signatures
    "Head a definition with its signature and its methods', a command with its name and help, or anything else with its name alone."
    if command := command_name(node):
        text, _, example = (ast.get_docstring(node) or "").partition("\b")
        lines = [line.strip() for line in example.splitlines() if line.strip() and line.strip() != "Example:"]
        example = "\n".join(["", "```bash", *lines, "```"]) if lines else ""
        return [nbformat.v4.new_markdown_cell(f"### explainable-mri {command}\n\n{text.strip()}\n{example}")]
    if not has_signature(node):
        return [nbformat.v4.new_markdown_cell(f"### {node.name}")]
    inner = methods(node) if isinstance(node, ast.ClassDef) else []
    return [nbformat.v4.new_code_cell(text) for text in
            (f"show_doc({node.name})", *(f"show_doc({name}, title_level=4)" for name in inner))]


def source_cell(
    code: str,          # part of an exported cell
    summary: str = "",  # line that unfolds it; empty where the code stands open
) -> nbformat.NotebookNode:
    "Show code that is not run again."
    fold = f"#| code-fold: true\n#| code-summary: '{summary}'\n" if summary else ""
    return nbformat.v4.new_code_cell(f"#| eval: false\n{fold}{code}")


def document(
    cell: nbformat.NotebookNode,   # an exported cell; nbdev runs it and takes it off the page
) -> list[nbformat.NotebookNode]:  # the cell, and what the page shows of it
    "Show each definition with its source, which is folded where there is a signature or the signature of its caller."
    code = EXPORT.sub("", cell.source)
    nodes = ast.parse(code).body
    public = [node for node in nodes if isinstance(node, DEFINITION) and not node.name.startswith("_")]
    cells = [nbformat.v4.new_code_cell(f"#| exporti\n{code}")]
    lines, start, above = code.splitlines(), 0, None
    for node in nodes:
        source, start = "\n".join(lines[start:node.end_lineno]), node.end_lineno
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        heading = headings(node) if node in public else []
        fold = isinstance(node, DEFINITION) and has_signature(node) and any(map(has_signature, public))
        if above and not heading and not fold:
            above.source += f"\n{source}"
            continue
        shown = source_cell(source.strip("\n"), f"Source of {node.name}" if fold else "")
        cells += [*heading, shown]
        above = None if fold else shown
    return cells


PLOTTING = re.compile(r"\b(plt|plotting)\.|\b(axis|axes|ax)\w*\.")


def figure_options(
    cell: nbformat.NotebookNode,  # a cell that is shown
    before: str,                  # the text before it
) -> str:                         # options for the renderer, a line each
    "Fold code that draws a picture and is long, and describe the picture by the sentence that introduces it."
    if not any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
        return ""
    options = ""
    if "fig-alt" not in cell.source:
        words = re.sub(r"[#*`>|$]|\[([^\]]*)\]\([^)]*\)", lambda found: found[1] or "", before)
        sentences = re.split(r"(?<=[.:?])\s+", " ".join(words.split()))
        title = re.search(r"title=f?[\"']([^\"'{]{8,})", cell.source)
        text = (title[1] if title else sentences[-1] or "figure of this chapter").rstrip(":. ")
        options += f"#| fig-alt: {json.dumps(text[:200], ensure_ascii=False)}\n"
    if len(cell.source.splitlines()) > 6 and PLOTTING.search(cell.source) and "code-fold" not in cell.source:
        options += "#| code-fold: true\n#| code-summary: 'Code of the figure'\n"
    return options


def with_formulas(
    text: str,  # Markdown with formulas between dollars
) -> str:       # the same with MathML in their places
    "Turn formulas, but not what is code, into MathML."

    def formula(found: re.Match) -> str:
        tex = found["block"] or found["inline"]
        return convert(tex.strip(), display="block" if found["block"] else "inline") if tex else found[0]

    return FORMULA.sub(formula, text)


def prepare(
    path: Path,  # a notebook, rewritten in place
) -> None:
    "Add to a copy of a notebook what its page shows beyond the notebook itself."
    notebook = nbformat.read(path, as_version=4)
    number = re.match(r"\d\d(?=_)", path.name)
    first, *others = notebook.cells
    before = first.source
    cells = title_cells(first, number.group() if number else "")
    for cell in others:
        if cell.cell_type == "code" and EXPORT.match(cell.source):
            cells += document(cell)
            continue
        if cell.cell_type == "markdown":
            before = cell.source
            cell.source = with_formulas(cell.source)
        if cell.cell_type == "code" and not cell.source.startswith("show_doc"):
            cell.source = f"#| eval: false\n{figure_options(cell, before)}{cell.source}"  # nbdev would run what imports something
        cells.append(cell)
    notebook.cells = cells
    nbformat.write(notebook, path)


def finish(
    path: Path,         # a page prepared by nbdev, rewritten in place
    site: str,          # address of the site, without a slash at the end
    pages: list[Path],  # all pages
) -> None:
    "Make nbdev's links to other chapters relative; it calls them by their names without numbers, the files here keep them."
    ordered = sorted(pages, key=lambda page: page.stem[:1].isdigit())  # chapter 81_train wins over the notebook train
    names = {re.sub(r"^\d\d_", "", page.stem): page.stem for page in ordered}
    link = re.compile(rf"{re.escape(site)}/(\w+)\.html")
    text = link.sub(lambda match: f"{names[match[1]]}.html", path.read_text(encoding="utf-8"))
    notebook = nbformat.reads(text, as_version=4)
    notebook.cells[0].source = re.sub(r"^output-file: .*\n", "", notebook.cells[0].source, flags=re.MULTILINE)
    nbformat.write(notebook, path)


def without_foreign_fonts(
    site: Path,  # the rendered site
) -> None:
    "Take out of the themes what loads fonts from somebody else's server; `styles.css` names fonts that readers have."
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        if (clean := FOREIGN_FONTS.sub("", text)) != text:
            path.write_text(clean, encoding="utf-8")


def main() -> int:
    "Prepare the pages in _proc/ and render them; returns the exit status of the renderer."
    config = get_config()
    pages = config.config_path / "_proc"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(config.nbs_path, Path(folder, "nbs"), ignore=shutil.ignore_patterns(".*")))
        for path in copy.rglob("*.ipynb"):
            prepare(path)
        proc_nbs(copy, n_workers=2, force=True)
    prepared = sorted(pages.glob("*.ipynb"))
    for path in prepared:
        finish(path, f"{config.doc_host}{config.doc_baseurl}", prepared)
    quarto = ["quarto", "render", pages, "--no-execute"]
    status = subprocess.call(quarto if shutil.which("quarto") else ["smalldocs", "render", "--strict", pages])
    without_foreign_fonts(config.doc_path)
    index = (config.doc_path / "search.json").read_text(encoding="utf-8")
    (config.doc_path / "search.js").write_text(f"window.searchIndex = {index};\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
