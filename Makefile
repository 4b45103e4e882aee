.DEFAULT_GOAL := help
.PHONY: help setup demo world tour test check vm bench docs release-check vagrant-check lock clean
MAKEFLAGS += --no-print-directory
PYTHON := .venv/bin/python
OUT := bench-results
ROOT := $(if $(filter 0,$(shell id -u)),,sudo -E)

# Runs a command on a kernel that has IPVS: this one, or else the micro-VM's.
define on_ipvs_kernel
	@if $(ROOT) vagrant/has-ipvs.sh; then exec $(ROOT) $(1); \
	else exec $(ROOT) vagrant/microvm.sh $(2) -c 2 -m 4096 -t 3600 -- $(1); fi
endef

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

setup: ## install system packages, kernel modules and .venv (quick when all is there)
	@vagrant/provision.sh

demo: setup ## Services, endpoints and connections through them, on a kernel with IPVS
	$(call on_ipvs_kernel,.venv/bin/dataplane demo $(ARGS))

world: setup ## a shell among the demo's machines, to walk the guided tour (docs/tour.md)
	@if $(ROOT) vagrant/has-ipvs.sh; then exec $(ROOT) .venv/bin/dataplane demo --shell; \
	else exec $(ROOT) vagrant/microvm.sh -c 2 -m 4096 -i -- .venv/bin/dataplane demo --shell; fi

tour: setup ## run the commands of docs/tour.md again, and write their output into it where it differs
	@$(ROOT) $(PYTHON) -m tests.tour

# KERNEL: a version that is installed, or a folder from vagrant/kernel.sh; the ipvs tests then run in the micro-VM anyway
test: setup ## every test, a missing kernel feature being a failure (ARGS=... for pytest, KERNEL=... for the micro-VM)
	@vagrant/provision.sh --no-venv --tests
	@$(ROOT) env DATAPLANE_REQUIRE_KERNEL=1 $(if $(KERNEL),DATAPLANE_VM_FORCE=1 DATAPLANE_VM_KERNEL=$(KERNEL)) \
		$(PYTHON) -m pytest $(ARGS)

check: setup ## what needs neither root nor a special kernel: lint, types, fast tests
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy --strict dataplane tests release $(wildcard bench)
	@$(PYTHON) -m pytest -q -m "not root and not ipvs and not slow" $(ARGS)

# Unexpanded, so that CMD='echo $HOME' is the guest's; exact exit statuses come from vagrant/microvm.sh itself, since make
# turns every failure into 2.
vm: export VM_COMMAND = $(value CMD)
vm: setup ## run CMD='...' in the micro-VM; without CMD a shell there
	@if [ -n "$$VM_COMMAND" ]; then exec $(ROOT) vagrant/microvm.sh -c 2 -m 4096 -t 3600 -- bash -c "$$VM_COMMAND"; \
	else exec $(ROOT) vagrant/microvm.sh -c 2 -m 4096 -i; fi

bench: setup ## all modes and the usual tools, on a kernel with IPVS (OUT=bench-results, ARGS=... for python -m bench)
	@mkdir -p $(OUT)
	$(call on_ipvs_kernel,$(PYTHON) -m bench --out $(OUT) $(ARGS),-o $(OUT))

docs: setup ## docs/reference.md from --help, and the documentation as a site in build/site
	@$(PYTHON) -m release.reference
	@.venv/bin/mkdocs -q build --strict

release-check: setup ## build wheel, sdist and bill of materials into dist/, twice, and try the wheel
	@$(PYTHON) -m release.build dist
	@$(PYTHON) -m pytest -q tests/test_release.py

vagrant-check: ## a real `vagrant up` under emulation, with a box built here (minutes; Debian 12, root)
	@$(ROOT) vagrant/check.sh

lock: ## resolve the locks again: everything's, and the container's (needs uv)
	@uv pip compile -q --universal --generate-hashes --python-version 3.11 --extra dev --extra bench --extra docs --upgrade \
		--custom-compile-command 'make lock' pyproject.toml -o requirements.lock
	@uv pip compile -q --universal --generate-hashes --python-version 3.11 -c requirements.lock \
		--custom-compile-command 'make lock' pyproject.toml -o deploy/container/requirements.lock

clean: ## remove what the other targets made in this folder
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
