# `make demo` and `make test` do everything, on a fresh machine too: environment, installation, run.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

SECONDS ?= 60

.PHONY: demo test quick slow test-pytorch-lightning fuzz bench check docs examples claims install third-party clean

demo: $(INSTALLED)
	$(BIN)/python examples/threes.py

# Tests start processes, of which each would compile all files again: their bytecode is kept.
export PYTHONDONTWRITEBYTECODE :=

# One worker a core, each of one thread: most matrices here are tiny.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

# In about a minute: no fits, nothing that takes seconds, and each test in the first of its cases.
quick: $(INSTALLED)
	$(PYTEST) -m "not (slow or fits or long)" --first-cases tests

# The rest: half a minute and more each.
slow: $(INSTALLED)
	$(PYTEST) -m slow

# What looks at a trainer, in the trainer of the other package.
test-pytorch-lightning: $(INSTALLED)
	LIGHTNING=pytorch_lightning $(PYTEST) -m "fits and not slow" --ignore tests/callback/monitor/test_third_party.py

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

bench: .venv/.peers
	$(BIN)/python -m benchmarks

check: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in `site/`; a link that leads nowhere is an error, and so is an argument that a docstring leaves out.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

examples: $(patsubst %,example-%,merged_categories digits threes)

example-%: $(INSTALLED)
	$(BIN)/python examples/$*.py

# All experiments of docs/claims in full size. Two of them need packages without which their tests are skipped.
claims: .venv/.claims
	$(BIN)/python -m examples.claims

install: $(INSTALLED)

third-party: .venv/.third-party

# torch first and pinned: another package that asks for it would bring the newest build, with gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(INSTALLED)

.venv/.third-party: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[third-party]'
	touch $@

.venv/.claims: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[claims]'
	touch $@

.venv/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/.peers: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	# A peer asks for torchvision and none needs it; one that does not fit torch breaks `import lightning`.
	$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf .venv logs site
