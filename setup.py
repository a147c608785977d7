"""Package the library; every fact comes from settings.ini, so that nbdev and pip agree."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def requirements(key: str) -> list[str]:
    "The requirements listed, separated by blanks, under `key` of settings.ini."
    return settings.get(key, "").split()


class BuildWithNotebooks(build_py):
    "Takes the notebooks that papermill runs along, so that a study needs no copy of the repository."

    def run(self) -> None:
        super().run()
        for name in ("train", "explain", "crossval"):
            self.mkpath(f"{self.build_lib}/explainable_mri/notebooks")
            self.copy_file(str(here / "nbs" / f"{name}.ipynb"), f"{self.build_lib}/explainable_mri/notebooks/{name}.ipynb")


notebook, preprocess, sweep, report, viewer = (
    requirements(f"{name}_requirements") for name in ("notebook", "preprocess", "sweep", "report", "viewer"))
setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    keywords=settings["keywords"].split(),
    license="MIT",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
    ],
    packages=find_packages(include=["explainable_mri", "explainable_mri.*"]),
    package_data={"explainable_mri": ["__init__.pyi"], "explainable_mri.report": ["niivue/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=requirements("requirements"),
    extras_require={"notebook": notebook, "preprocess": preprocess, "sweep": sweep, "report": report,
                    "viewer": viewer, "dev": notebook + preprocess + sweep + report + viewer + requirements("dev_requirements")},
    entry_points={"console_scripts": requirements("console_scripts"),
                  "nbdev": ["explainable_mri=explainable_mri._modidx:d"]},
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
