# make demo              run the whole pipeline, without GPU or download; SEED=1: another run; PRESET=smoke: a minute or two
# make play              play the repository's checkpoints before and after training: a page, in a minute
# make test              run the tests
# make lint              check format and lint rules
# make docs              the documentation as a site: open site/index.html
# All set up .venv first: minutes, and up to 6 GB with a CUDA build of torch. TORCH chooses torch's version (2.11 or
# later); PIP_FLAGS passes options to pip, such as an index with CPU builds.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
PRESET ?= tiny
SEED ?= 0
SITE ?= site
OUT ?= runs/$(if $(filter tiny,$(PRESET)),demo,$(PRESET))$(if $(filter-out 0,$(SEED)),_seed$(SEED))

.PHONY: demo play test lint docs clean

demo: $(VENV)/.demo
	$(VENV)/bin/python demo.py --preset $(PRESET) --seed $(SEED) --out-dir $(OUT)

play: $(VENV)/.demo
	$(VENV)/bin/python play.py

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadscope

lint: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --site-dir $(SITE)

clean:
	rm -rf $(VENV) runs site

$(VENV)/.demo $(VENV)/.test $(VENV)/.docs: $(VENV)/.%: setup.cfg pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): minutes, and up to 6 GB"
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) "$(TORCH)" --editable ".[$*]"
	touch $@
