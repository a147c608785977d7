"""Write README.md from nbs/index.ipynb: hidden cells are left out, and links are made relative to the repository's root."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
RELATIVE_LINK = re.compile(r"(\]\(|src=\")(?![a-z]+:|#|/)")


def readme(
    notebook: Path,  # the home page of the book
) -> str:            # the same in Markdown, for the repository's root
    "Turn the home page into the text of README.md."
    page = nbformat.read(notebook, as_version=4)
    page.cells = [cell for cell in page.cells if not re.match(r"#\|\s*hide\b", cell.source)]
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source)
    page.metadata["language_info"] = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(page)
    return RELATIVE_LINK.sub(rf"\1{notebook.parent.name}/", text).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
