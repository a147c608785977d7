# `make help` lists what there is to do. Everything runs in .venv, which is made on first use.
SHELL := bash
CONFIG ?= config/demo.yaml
FOLD ?= 1
READY := .venv/ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo app test test-slow export docs readme clean

help: ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 18

install: $(READY) ## create .venv and install the project into it

$(READY): settings.ini setup.py constraints.txt
	scripts/install .venv -e '.[dev]'
	@touch $@

demo: $(READY) ## simulate a cohort, train fold 1, explain its test scans, write the report
	explainable-mri simulate $(CONFIG)
	explainable-mri train $(CONFIG) --fold $(FOLD)
	explainable-mri explain $(CONFIG) --fold $(FOLD)
	explainable-mri report $(CONFIG)

app: $(READY) ## open the viewer in the browser, on the demo's test scans and your own uploads
	test -f results/demo/report.html || $(MAKE) demo
	explainable-mri app results/demo

# Two workers with a thread each; numbered chapters and the home page only, because pytest runs the experiment notebooks.
test: export OMP_NUM_THREADS := 1
test: $(READY) ## pass every test: chapters, tests/, code in step with the book, clean notebooks, the site's links
	@scripts/test

test-slow: $(READY) ## pass the tests that take a minute or more, which `make test` leaves out
	OMP_NUM_THREADS=1 MPLBACKEND=agg pytest --slow -m slow

export: $(READY) ## write the package and README.md from the notebooks, and clean the notebooks
	nbdev_export
	nbdev_clean
	python scripts/build_readme.py

readme: $(READY) ## write README.md from nbs/index.ipynb
	python scripts/build_readme.py

docs: $(READY) readme ## render the book into docs/, with Quarto where it is installed, else with smalldocs
	python scripts/build_site.py

clean: ## remove what the other commands made, except results/ and data/
	rm -rf .venv _proc build dist *.egg-info .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
