"""What several tests use: the repository, a copy of it to work in, and the reference data beside it."""
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LONGEST = ("test_tutorial", "test_lrp_references", "test_packaging", "test_study", "test_networks", "test_predict", "test_repository")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take a minute or more, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    "Leave out slow tests unless they are asked for, and begin with the files that take minutes, so that no worker is left with one at the end."
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes a minute or more: make test-slow"))


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder of reference data beside the repository, which is not part of it."
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"there is no folder of reference data {folder}")
    return folder


@pytest.fixture(scope="session")
def copy_repository() -> Callable[[Path], Path]:
    "A function that copies the repository's files as they are now, committed or not, without docs and what git ignores."

    def copy(target: Path) -> Path:
        listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=REPOSITORY,
                                 check=True, capture_output=True, text=True).stdout
        for name in filter(None, listing.split("\0")):
            if not name.startswith("docs/") and os.path.lexists(REPOSITORY / name):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, target / name, follow_symlinks=False)
        return target

    return copy


@pytest.fixture
def copy(tmp_path: Path, copy_repository: Callable[[Path], Path]) -> Path:
    "A copy of the repository to work in."
    return copy_repository(tmp_path / "copy")


@contextmanager
def launched_browser(*options: str) -> Iterator[Any]:
    "Headless Chromium."
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *options])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    "Headless Chromium that draws without a graphics processor."
    with launched_browser("--disable-gpu") as browser:
        yield browser


@pytest.fixture(scope="module")
def drawing_browser() -> Iterator[Any]:
    "Headless Chromium in which WebGL is drawn by software."
    with launched_browser("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist") as browser:
        yield browser
