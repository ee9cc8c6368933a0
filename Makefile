# Everything runs in .venv, which is made on first use and reused until pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test check bench test-oldest clean

demo: $(VENV)/demo.stamp
	$(BIN)/phantomgrad demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.gradients
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.peers

# The oldest supported torch, in an environment of its own.
test-oldest: .venv-oldest/dev.stamp
	.venv-oldest/bin/python -m pytest tests/plugin tests/hub

# A stamp and not bin/python: an environment that was left half made has that too.
%/venv.stamp:
	@$*/bin/python -c '' 2>/dev/null || { rm -rf $*; $(PYTHON) -c 'import sys; \
		sys.exit("phantomgrad needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'; }
	@$*/bin/python -m pip --version >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv $* && $*/bin/python -m pip --version >/dev/null; } || { rm -rf $*; \
		echo "$(PYTHON) cannot make the environment $*; on Debian and Ubuntu run: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/venv.stamp
	@echo "Installing phantomgrad with its demo into $(VENV); the first time takes a few minutes."
	$(PIP) install -e '.[demo]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/venv.stamp
	@echo "Installing phantomgrad with its development tools into $(VENV); the first time takes a few minutes."
	$(PIP) install -e '.[dev]'
	@touch $@

.venv-oldest/dev.stamp: pyproject.toml | .venv-oldest/venv.stamp
	.venv-oldest/bin/python -m pip --disable-pip-version-check -q install -e '.[dev]' 'torch==2.11.*' 'torchvision==0.26.*'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest dist .pytest_cache .ruff_cache .hypothesis
