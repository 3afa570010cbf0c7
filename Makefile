# Everything there is to type; `make help` lists it. Python 3.11-3.13, a POSIX shell and GNU make 3.81 are enough:
# each target first makes .venv from the lock files, and makes it anew only when something it came from has changed.
#
#   ARGS="stage=sft seed=1"     passed on to mlxchat
#   TESTS="tests/model -k rope" which tests, passed on to pytest
#   DEVICE=cpu|cuda12|cuda13    MLX's backend on Linux; .venv remembers it (a Mac always computes on Metal)
#   PYTHON=python3.12           the interpreter of a new .venv (`make clean` first); default: the newest that fits

SWEEP ?= experiment=quickstart model=d2,d4 optimizer=muon_oct2025,adamw

BIN := .venv/bin
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)
# "<device> <folder>", written last; empty if .venv is missing, unfinished, or its interpreter has gone.
MADE_FOR := $(shell $(BIN)/python -c '' 2>/dev/null && cat .venv/made-for 2>/dev/null)
DEVICE := $(or $(DEVICE),$(firstword $(MADE_FOR)),cpu)

LOCKS := requirements.lock
ifneq ($(DEVICE),cpu)
ifeq ($(filter $(DEVICE),cuda12 cuda13),)
$(error DEVICE is "$(DEVICE)"; expected cpu, cuda12 or cuda13)
endif
# CUDA's wheel and the CPU's both bring mlx/lib/libmlx.so, so they must never meet in one environment.
LOCKS += requirements-$(DEVICE).lock
LEAVE_OUT := /^mlx-cpu==/,/[^\\]$$/d
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' Makefile

setup: .venv/installed ## make .venv with everything in it (NVIDIA: make setup DEVICE=cuda13)
	@test '$(MAKECMDGOALS)' != setup || printf '%s\n' "Ready. Next: make run    (trains a small model), then: make chat"

run: setup ## run the pipeline, as far as it is not done yet
	$(BIN)/mlxchat $(ARGS)

chat: setup ## talk to the latest model
	$(BIN)/mlxchat chat $(ARGS)

serve: setup ## serve the latest model over HTTP, with a page to chat in
	$(BIN)/mlxchat serve $(ARGS)

report: setup ## write the report of the latest run
	$(BIN)/mlxchat report $(ARGS)

CHROMIUM ?= chromium
pictures: setup ## the README's pictures: report of the latest run, chat page, terminal (needs Chromium)
	$(BIN)/mlxchat report --out .venv/report $(ARGS)
	$(CHROMIUM) --headless=new --no-sandbox --hide-scrollbars --window-size=1100,960 \
	  --screenshot=docs/pictures/report.png file://$(CURDIR)/.venv/report/report.html
	cp $(addprefix .venv/report/report/,pretrain-loss.svg pretrain-val_bpb.svg rl-pass.svg) docs/pictures/
	$(BIN)/python docs/pictures.py docs/pictures --chromium $(CHROMIUM) $(ARGS)

course-pictures: setup ## the course's pictures, from small trainings of their own (some minutes)
	$(BIN)/python docs/course_pictures.py .venv/course docs/pictures/course

sweep: setup ## run every combination of SWEEP="experiment=quickstart model=d2,d4 ..."
	$(BIN)/mlxchat -m $(SWEEP) $(ARGS)

scaling-laws: setup ## five sizes at four budgets on bundled text: parabolas, best sizes, exponents
	$(BIN)/mlxchat -m experiment=scaling_laws_cpu $(ARGS)

miniseries: setup ## nanochat's models of many depths, best tokens per parameter each (a GPU)
	$(BIN)/mlxchat -m experiment=miniseries $(ARGS)

rehearsal: setup ## everything that the speedrun does, once and small, with its real data
	$(BIN)/mlxchat experiment=speedrun_rehearsal $(ARGS)

evening: setup ## a d6 to talk to, in about two hours on a Mac with 36 GB (other: ARGS=machine=mac_16gb)
	$(BIN)/mlxchat experiment=mac_evening machine=mac_36gb $(ARGS)

speedrun: setup ## nanochat's published run, d20 (hours on a large GPU)
	$(BIN)/mlxchat experiment=speedrun_d20 $(ARGS)

speedrun-d12: setup ## the same, small enough for a good Mac
	$(BIN)/mlxchat experiment=speedrun_d12 $(ARGS)

# One thread of BLAS each: threads of several processes that wait for one another double the time.
check: lint type ## lint, types and the fast tests: what every change must pass
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses=auto --maxprocesses=4 --dist=loadfile $(TESTS)

test: check ## the same as check

test-slow: setup ## the tests that take minutes or install packages
	$(BIN)/python -m pytest -m slow $(TESTS)

lint: setup ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup ## mypy, strict
	$(BIN)/mypy

test-clusters: setup ## steps and sweeps on a private SLURM and Ray, where they are installed (tests/clusters)
	$(BIN)/python -m pytest tests/clusters/slurm_cluster.py tests/clusters/ray_cluster.py $(TESTS)

wheel-check: setup ## install the wheel in a fresh environment and run it from another folder
	$(BIN)/python -m pytest -m slow tests/test_packaging.py

dist: setup ## build the sdist, and from it the wheel, into dist/
	rm -rf dist && $(BIN)/python -m build --no-isolation

docs: .venv/docs ## build the site into site/, every link checked, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: .venv/docs ## show the site at http://127.0.0.1:8001 and rebuild it as files change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8001

# Versions already locked stay; ARGS=--upgrade takes the newest. The other locks hold what is added to the first.
COMPILE = uv pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 \
	--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' $(ARGS)
lock: ## resolve pyproject.toml into the lock files anew (needs uv)
	$(if $(UV),,$(error `make lock` needs uv; install it with: pip install uv))
	$(COMPILE) pyproject.toml --extra test -o requirements.lock
	$(COMPILE) pyproject.toml --extra docs -c requirements.lock -o docs.tmp \
	  $$(sed -n "/win32/d; s/^\([a-z0-9._-]*\)==.*/--no-emit-package \1/p" requirements.lock)
	sed '/^# The following packages were excluded/,$$d' docs.tmp > requirements-docs.lock && rm docs.tmp
	for device in cuda12 cuda13; do \
	  echo "mlx[$$device]" | $(COMPILE) - -c requirements.lock -o requirements-$$device.lock \
	    $$(sed -n 's/^\([a-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements.lock) && \
	  sed '/^# The following packages were excluded/,$$d' requirements-$$device.lock > lock.tmp && \
	  mv lock.tmp requirements-$$device.lock || exit 1; \
	done

clean: ## remove .venv, caches and build output, never outputs/
	rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find conf src stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,OPTIONS): by uv where it works, else by pip. Building without isolation keeps to the locked setuptools.
pip = { $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null; } && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 --no-build-isolation $(1)
ifdef UV
install = uv pip install --quiet --python $(BIN)/python --no-build-isolation $(1) || \
	{ echo "uv failed, trying pip"; $(pip); }
else
install = $(pip)
endif

# Interpreters are tried, not looked up: a pyenv shim is on PATH even where it cannot run. The base executable is
# used because the first on PATH may be that of the .venv about to be removed.
CANDIDATES = $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3)
PROBE = import sys, venv$(if $(UV),,, ensurepip); \
	(3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit(1); print(sys._base_executable)

.venv/made-for: $(LOCKS)
	@for candidate in $(CANDIDATES); do \
	  python=$$("$$candidate" -c '$(PROBE)' 2>/dev/null) && break; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: none of these is a working Python 3.11, 3.12 or 3.13 with its venv module:" $(CANDIDATES) >&2; \
	  echo "       Install one (Debian and Ubuntu: python3-venv too), or name it: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	echo "Making .venv for $(DEVICE) with $$python: some 180 MB to download the first time (CUDA: gigabytes)"; \
	rm -rf .venv && "$$python" -m venv --without-pip .venv
	@sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > .venv/build.lock
	@sed '$(LEAVE_OUT)' $(LOCKS) > .venv/all.lock
	@$(call install,--require-hashes -r .venv/build.lock)
	@$(call install,--require-hashes -r .venv/all.lock)
	@printf '%s\n' "$(DEVICE) $(CURDIR)" > $@

.venv/installed: .venv/made-for pyproject.toml src/mlxchat/__init__.py
	@$(call install,--no-deps --force-reinstall -e .)
	@touch $@

.venv/docs: .venv/installed requirements-docs.lock
	@$(call install,--require-hashes --no-deps -r requirements-docs.lock)
	@touch $@

ifneq ($(MADE_FOR),$(DEVICE) $(CURDIR))
.venv/made-for: FORCE
endif

.PHONY: test-clusters help setup run chat serve report pictures course-pictures sweep scaling-laws miniseries rehearsal evening speedrun speedrun-d12 check test test-slow lint type wheel-check dist docs docs-serve lock clean FORCE
