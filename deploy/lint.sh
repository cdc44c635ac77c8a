#!/bin/sh
# Linters and types, inside the node image; every one runs, then the first failure decides.
status=0
run() { echo "== $*"; "$@" || status=1; }
cd "$(dirname "$0")/.." || exit 1
run ruff check .
run ruff format --check .
run mypy
run mypy --strict deploy/image/oci.py
run lint-imports --no-cache
run shellcheck -x deploy/lint.sh deploy/rootfs/build.sh deploy/rootfs/enter.sh deploy/rootfs/inside.sh deploy/image/build.sh
run sh -c 'gcc -fsyntax-only -std=gnu17 -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror criu_transfer/native/*.c'
exit $status
