# `make demo` and `make test` need Python 3.11 to 3.13 and make; they set everything up themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Runs of the demo and what they need stay in the checkout.
DEMO := demo
export OMP_NUM_THREADS ?= 1
# pip's progress bar: in a terminal; elsewhere it names the packages alone.
BAR ?= $(shell test -t 2 && echo on || echo off)

# Of the virtual environment with the extra dev; PyTorch's CUDA build is larger.
SIZE := 3 GB

.PHONY: setup demo test test-slow test-cuda contract fuzz fuzz-kills mutants lint wheel docs clean

setup: $(READY)

# torch goes first: once the pinned build is there, no other package pulls in another.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), "offrl needs Python 3.11 to 3.13; set PYTHON=..."'
	@echo "Setting up $(VENV): about $(SIZE), 3 to 10 minutes with a good connection. Once; later calls of make start at once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar $(BAR) $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar $(BAR) -c constraints.txt -e ".[dev]"
	touch $@

# Cloning of Hopper data of which a twentieth is an expert's, with uniform and with advantage-weighted sampling: a table, curves,
# the runs, and a film of the second policy where there is something to render with.
HOME_OF_DEMO = OFFRL_HOME=$${OFFRL_HOME:-$(CURDIR)/$(DEMO)/home}
DATA_OF_DEMO := forge/hopper/random-expert-0.05-v0

demo:
	@echo "The demo: sets up $(VENV) ($(SIZE)) unless it is there, builds a dataset, trains twice (a minute each on two idle"
	@echo "cores), and leaves some 50 MB in $(DEMO)/. Open $(DEMO)/report/report.html afterwards."
	@$(MAKE) --no-print-directory $(READY)
	$(HOME_OF_DEMO) $(BIN)/offrl data build $(DATA_OF_DEMO)
	$(HOME_OF_DEMO) $(BIN)/offrl train agent=bc preset=demo dataset=$(DATA_OF_DEMO) lanes=3 out=$(DEMO)/runs
	$(HOME_OF_DEMO) $(BIN)/offrl train agent=bc sampler=advantage_weighted preset=demo dataset=$(DATA_OF_DEMO) lanes=3 out=$(DEMO)/runs
	$(BIN)/offrl report $(DEMO)/runs --out $(DEMO)/report
	@$(HOME_OF_DEMO) $(BIN)/offrl data info $(DATA_OF_DEMO) | grep "behaviour's score" || true
	$(HOME_OF_DEMO) $(BIN)/offrl evaluate $(DEMO)/runs/bc+AW/*/* --lane best --episodes 1 --max-episode-steps 200 --video $(DEMO)/hopper.gif || true

# Two processes: each holds torch and a share of the datasets that the tests build.
WORKERS ?= 2

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Longer tests: every agent compiled, sweeps that start other processes, trainings of a minute.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-cuda: $(READY)
	$(BIN)/python -m pytest -m cuda

# `make contract AGENT=NAME CONFIG_DIR=DIR`: what every agent must do, for one in DIR/agent (without CONFIG_DIR: one of ours).
# MARK="not cuda" compiles it, too, which takes minutes.
MARK ?= not slow and not cuda

contract: $(READY)
	OFFRL_AGENT=$(AGENT) OFFRL_CONFIG_DIR=$(abspath $(CONFIG_DIR)) $(BIN)/python -m pytest tests/contract/test_agents.py -m "$(MARK)"

# N mutated inputs of every kind (tests/fuzz/fuzz.py), and N trainings that are killed and continued; both need Linux.
# FUZZ="--seed 1 --keep DIR" goes to the script.
fuzz: $(READY)
	$(BIN)/python tests/fuzz/fuzz.py $(or $(N),2000) $(FUZZ)

fuzz-kills: $(READY)
	$(BIN)/python tests/fuzz/kills.py $(or $(N),20) $(FUZZ)

# N changes of each module's code, one at a time, against the module's tests; FUZZ="--seed 1 --only agents/iql".
mutants: $(READY)
	$(BIN)/python tests/fuzz/mutants.py $(or $(N),10) $(FUZZ)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/deptry offrl hydra_plugins

# The documentation as a site: site/index.html.
docs: $(READY)
	$(BIN)/mkdocs build --quiet --strict --site-dir site

wheel: $(READY)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) $(DEMO) build dist site runs multirun
