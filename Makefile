# `make help` lists the targets.
SHELL := /bin/bash
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ai-assistant
VENV := $(CACHE)/venv-$(shell cat requirements/check.txt 2>/dev/null | sha256sum | cut -c1-12)
PROFILE ?= developer
TOOLBOX := image/toolbox

.DEFAULT_GOAL := help
.PHONY: help run test test-long check image boot flash shell bench model lock mirror reproduce keys clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: image ## from a fresh machine to an answer out of the booted appliance
	@$(TOOLBOX) python3 -m image.container run --image "$$(image/build --print $(PROFILE))"

test: ## everything: lint, types, unit, bus, appliance, one virtual machine
	@tests/run

test-long: ## every story in a virtual machine, and the power cuts: hours; goes on where it was stopped (SEED=1)
	@tests/run-long

check: $(VENV)/.ready ## lint, types and unit tests, in seconds
	@tests/check $(VENV)

image: ## build the image (PROFILE=developer, production or test)
	@image/build $(PROFILE)

boot: image ## boot the image in a virtual machine, its console here
	@$(TOOLBOX) python3 -m image.vm boot --image "$$(image/build --print $(PROFILE))"

flash: $(if $(DEVICE),image) ## write the image to a stick or disk (DEVICE=/dev/sdX; without it, list them)
	@image/flash $(if $(DEVICE),--profile $(PROFILE) $(DEVICE),--list)

shell: image ## a root shell in the appliance, with this checkout's Python
	@$(TOOLBOX) python3 -m image.container shell --image "$$(image/build --print $(PROFILE))"

bench: image ## measure the claims (BENCH=name for one; soak only so)
	@image/build production
	@tests/overlay bench $(BENCH)

model: ## train the built-in model again (under an hour on two cores)
	@models/make

lock: ## renew every lock: packages of the last builds, Python artifacts (UPGRADE=1: build with the newest first)
	@requirements/lock
	@image/packages lock

mirror: ## fetch everything locked into a folder (MIRROR_FOLDER=, default in the cache), for builds without a network
	@image/packages mirror $(MIRROR_FOLDER)

reproduce: ## build twice in two environments and compare every byte (PROFILES="developer production")
	@image/reproduce $(PROFILES)

keys: ## make the keys that sign images, once (test keys; docs/signing.md)
	@image/keys

clean: ## remove build/; the caches in $XDG_CACHE_HOME/ai-assistant stay
	rm -rf build

$(VENV)/.ready: requirements/check.txt
	@requirements/venv $(VENV) requirements/check.txt
