# The words a newcomer types. `make demo` and `make test` need Python 3.11 (or 3.12, 3.13), make and git; nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9

# pip's own setting for a folder of wheels (such as CPU builds of torch) holds for uv too.
FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
ifneq ($(strip $(FIND_LINKS)),)
export UV_FIND_LINKS := $(strip $(FIND_LINKS))
endif

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "DeltaFerry needs Python 3.11, 3.12 or 3.13; name one, as in: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: install
install: $(VENV)/.installed ## make .venv from pinned versions (once)

.PHONY: demo
demo: install ## play the whole story on real photographs, six to seven minutes
	$(BIN)/ferry demo

WHEELHOUSE := build/wheelhouse
# What the two small wheels need, as wheels, so that tests can install them without an index.
SMALL := ota/pyproject.toml ota/delta/pyproject.toml
$(WHEELHOUSE)/.filled: $(SMALL) constraints.txt | $(VENV)/.installed
	mkdir -p $(WHEELHOUSE)
	$(BIN)/python -c "import sys, tomllib; \
	  print(*sorted({d for name in sys.argv[1:] for d in tomllib.load(open(name, 'rb'))['project']['dependencies']}), sep='\n')" \
	  $(SMALL) > $(WHEELHOUSE)/requirements.txt
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --only-binary :all: --dest $(WHEELHOUSE) \
	  --constraint constraints.txt --requirement $(WHEELHOUSE)/requirements.txt
	@touch $@

.PHONY: wheelhouse
wheelhouse: $(WHEELHOUSE)/.filled ## fetch what the two small wheels need, for the tests that install each alone

# One thread for each of the two workers: more would wait for each other, and take twice the processor time.
PYTEST := env OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
TESTS ?= tests

.PHONY: test
test: install wheelhouse ## the quick suite, on two cores (TESTS=path for a part of it)
	$(PYTEST) $(TESTS)

.PHONY: test-slow
test-slow: $(VENV)/.docs wheelhouse ## real schedules, real kills, minutes
	$(PYTEST) -m slow $(TESTS)

$(VENV)/.postgres: $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,postgres]'
	@touch $@

.PHONY: test-servers
test-servers: $(VENV)/.postgres ## the same loop on Prefect's and MLflow's servers, PostgreSQL (where installed) and S3; minutes
	$(BIN)/python -m pytest -m servers tests/test_servers.py tests/test_gateway.py tests/test_fleet_servers.py

ATTACKS := agent_attacks agent_crash agent_graph agent_turns agent_update catalog data_folder delegation delta delta_safety fleet fleet_store flows gateway gateway_files \
  git hostile_strings ledger overlay owner_only policy2 promotion release reports_http transport trust_drills
.PHONY: attacks
attacks: install wheelhouse ## the threat list with all its inputs: a test for each row, which ends with what did not change; ten minutes
	$(PYTEST) -m "not servers and not chaos and not crash" $(ATTACKS:%=tests/test_%.py)

.PHONY: crash-states
crash-states: install ## every state that a power cut can leave of an agent's directory, ten minutes (CRASH=all goes on from each)
	env OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m crash tests/test_agent_crash.py

.PHONY: chaos
chaos: install ## the real agent killed before, or failed at, its file calls, ten minutes (needs strace; CHAOS_SECONDS=n, CHAOS=all for every call)
	$(BIN)/python -m pytest -m chaos tests/test_chaos.py

$(VENV)/.fuzz: $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,fuzz]'
	@touch $@

.PHONY: fuzz
fuzz: $(VENV)/.fuzz ## made-up documents, deltas and requests, five minutes (FUZZ_SECONDS=n); what was found stays in build/fuzz
	$(BIN)/python -m tests.fuzz

.PHONY: conformance
conformance: install ## the agent's metadata layer under the TUF conformance suite (TUF_CONFORMANCE=its checkout, with a venv of its own)
	$(BIN)/python -m tests.conformance "$(TUF_CONFORMANCE)"

.PHONY: check-arm
check-arm: install ## apply deltas of every kind here and, under qemu-user, on aarch64: the bytes must be equal; three minutes (Debian or Ubuntu on x86-64)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.aarch64

.PHONY: bench-gate
bench-gate: install ## how often the gate is wrong, and good and bad models before it, 20 minutes (FULL=1: all rows, hours; goes on where it was cut); tables to tests/bench/results
	$(BIN)/python -m tests.bench.gate
	$(BIN)/python -m tests.bench.library

.PHONY: mutants
mutants: install wheelhouse ## mistakes in the code that a test must notice, an hour and a half (MUTANTS_SECONDS=n, MUTANTS=word of a file or harm); table to build/bench/mutants.json
	$(BIN)/python -m tests.bench.mutants

.PHONY: test-offline
test-offline: install wheelhouse ## the quick suite again with the network cut off (Linux, needs user namespaces or root)
	$(BIN)/python -m tests.offline $(PYTEST) $(TESTS)

.PHONY: lint
lint: install ## ruff, mypy strict, import contracts, docstrings that begin with a verb
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.docstrings

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

# The variable turns off the theme's announcement that its support ends in 2027.
.PHONY: docs
docs: $(VENV)/.docs ## build the documentation into build/docs, to be read without a server or network; fails on a broken link or anchor
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.PHONY: fix
fix: install ## let ruff mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: prove-demo
prove-demo: install ## play the demo, check every claim against the stores; figures to build/bench/prove-demo.json
	$(BIN)/python -m tests.bench.demo

.PHONY: base
base: install ## train the base that the demo adopts, half an hour of one core; weights and recipe to flows/bases (goes on where it was cut)
	OMP_NUM_THREADS=1 $(BIN)/python -m infra.base.train

.PHONY: believable
believable: install ## whether a judge that learnt from real patches names the base's pictures by their captions, minutes (DEMO=folder of a finished demo); figures to build/bench/believable.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.believable $(DEMO)

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

.PHONY: bench-timer
bench-timer: install ## which timer lets devices look that are on for an hour a day; seconds; figures to build/bench/timer.json
	$(BIN)/python -m tests.bench.timer

.PHONY: bench-commands
bench-commands: install ## processor time of the emergency stop and of refusals; a minute; figures to build/bench/commands.json
	$(BIN)/python -m tests.bench.commands

.PHONY: bench-gateway
bench-gateway: install ## the gateway under load, killed and traced, at most 20 minutes (SHORT=1: memory for one minute); needs strace; table to tests/bench/results/, figures to build/bench/gateway.json
	$(BIN)/python -m tests.bench.gateway

.PHONY: bench-fleet
bench-fleet: install ## what 10,000 devices with 100 reports each cost the factory's commands and the store; two minutes; figures to build/bench/fleet.json
	$(BIN)/python -m tests.bench.fleet

.PHONY: bench-data
bench-data: install ## time and memory of ferry data with 5,000 and 50,000 images, ten minutes; table to tests/bench/results/, figures to build/bench/data.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.data

.PHONY: bench-model
bench-model: $(VENV)/.bench ## the network beside its peers: two hours of one core; table to tests/bench/results/, figures to build/bench/bench-model.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.model

.PHONY: bench-gpu
bench-gpu: install ## training on this machine's GPU beside its processor: ten minutes; a table for tests/bench/results/gpu.md
	$(BIN)/python -m tests.bench.gpu

.PHONY: bench-variants
bench-variants: install ## solvers and students at 56 to 1 evaluations, from the demo's base; 20 minutes of one core; table to tests/bench/results/, figures to build/bench/variants.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.variants

.PHONY: bench-devices
bench-devices: install ## 200 real agents update by delta through one gateway over TLS, agents of the version before beside them; ten minutes (DEVICES=n); table to tests/bench/results/, figures to build/bench/devices.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.devices

.PHONY: bench-update
bench-update: install ## how small an update may be at which share of a retraining's gain, beside other tools; resumes (FULL=1: four products, hours, needs Debian's dataset-fashion-mnist); figures to build/bench/update.json
	OMP_NUM_THREADS=1 FULL=$(FULL) $(BIN)/python -m tests.bench.update

.PHONY: bench-delta
bench-delta: $(VENV)/.bench ## our delta beside other tools: half an hour of one core (PAIRS=folder of NAME/old.*, new.* for others' files; PAIRS='--estimates FOLDER' for the forecasts)
	$(BIN)/python -m tests.bench.delta $(PAIRS)

.PHONY: device-wheel
device-wheel: install ## build deltaferry-agent into dist/
	cd ota && ../$(BIN)/python -m hatchling build -t wheel -d ../dist

.PHONY: delta-wheel
delta-wheel: install ## build deltaferry-delta into dist/
	cd ota/delta && ../../$(BIN)/python -m hatchling build -t wheel -d ../../dist

.PHONY: former
former: install ## renew the fixtures of the version before, minutes (COMMIT=the last commit of that version)
	$(BIN)/python -m tests.former.make "$(COMMIT)"

.PHONY: clean
clean: ## remove build results and demo folders, keep .venv
	rm -rf build dist ferry-demo ferry-demo-* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
