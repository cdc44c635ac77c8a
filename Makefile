# SpotGuard's commands. Everything runs inside the node image, which the first call builds (about two minutes).
#   make drill            a node is interrupted, its containers move: story on the terminal, report in build/drill/
#   make test             linters, types and all tests that this machine can run
#   make shell            a shell inside the node image
#   make image            the product's container image: build/image/spotguard-agent.tar
#   make drill ARGS="--workload redis --memory 1GiB"      options: make drill ARGS=--help
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help drill test lint unit shell image rootfs clean
ARGS ?=
ENTER = deploy/rootfs/enter.sh "$$(deploy/rootfs/build.sh)"

help:
	@sed -n 's/^#   //p' Makefile

rootfs:
	@deploy/rootfs/build.sh >/dev/null

drill: rootfs
	@$(ENTER) python -m spotguard drill --output build/drill $(ARGS)

test: lint unit

lint: rootfs
	@$(ENTER) deploy/lint.sh

unit: rootfs
	@$(ENTER) pytest $(ARGS)

shell: rootfs
	@$(ENTER) bash

image:
	@deploy/image/build.sh

clean:
	rm -rf build
