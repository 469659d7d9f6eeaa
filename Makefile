# `make demo` and `make test`; both create the environment first. INDEX_URL takes another build of torch, for example
#   make demo INDEX_URL=https://download.pytorch.org/whl/cu128
PYTHON ?= python3
VENV ?= .venv
INDEX_URL ?=
OUT ?= out/demo
RUN = $(VENV)/bin
PIP = $(RUN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED = $(VENV)/.installed

.PHONY: demo test lint install clean

demo: install
	$(RUN)/lightning-accel run recipes/gpt.py --out $(OUT)

test: lint  # in two processes of one thread each: most of the time is spent in torch.export and compilers
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(RUN)/ruff check .
	$(RUN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(INDEX_URL),--index-url $(INDEX_URL) --extra-index-url https://pypi.org/simple 'torch>=2.13',--constraint constraints.txt torch)
	$(PIP) $(if $(INDEX_URL),,--constraint constraints.txt) --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) out build *.egg-info
