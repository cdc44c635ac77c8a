#!/bin/bash
# Runs a command inside the node image, in namespaces of its own. Usage: enter.sh ROOT COMMAND...
#
# The command sees: this checkout at /src (writable only below /src/build), an empty /tmp and /run, cgroup v2 at
# /sys/fs/cgroup, and a network of its own with nothing but loopback. Everything it leaves running ends with it.
set -euo pipefail
root=$1
shift
top=$(cd "$(dirname "$0")/../.." && pwd)
[ "$(id -u)" = 0 ] || { echo "enter.sh: must run as root (namespaces, CRIU); try sudo" >&2; exit 1; }
[ -x "$root/usr/bin/python3" ] || { echo "enter.sh: '$root' is no node image; build one with deploy/rootfs/build.sh" >&2; exit 1; }
mkdir -p "$top/build"
# CRIU refuses files that it cannot reopen: what this shell inherited must not reach the containers.
for fd in /proc/self/fd/*; do n=${fd##*/}; [ "$n" -gt 2 ] && eval "exec $n>&-" 2>/dev/null; done
export SPOTGUARD_SRC=$top
# shellcheck disable=SC2016  # expanded by the inner shell
exec unshare --mount --pid --net --uts --ipc --fork --kill-child --propagation private bash -euc '
  root=$0
  mount --bind "$root" "$root"; cd "$root"
  mount -t proc proc proc
  mount -t sysfs sysfs sys
  mount -t cgroup2 cgroup2 sys/fs/cgroup
  mount -t tmpfs -o mode=755 dev dev; mkdir dev/pts dev/shm dev/net
  for d in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0" "net/tun 10 200" "kmsg 1 11"; do
    set -- $d "$@"; mknod -m 666 "dev/$1" c "$2" "$3"; shift 3
  done
  ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
  ln -s /proc/self/fd/0 dev/stdin; ln -s /proc/self/fd/1 dev/stdout; ln -s /proc/self/fd/2 dev/stderr
  mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
  mount -t tmpfs -o mode=1777 tmp tmp; mount -t tmpfs -o mode=755 run run; mount -t tmpfs -o mode=1777 shm dev/shm
  # On a cgroup v1 machine the memory controller is not in the unified tree: offer it beside.
  if ! grep -qw memory sys/fs/cgroup/cgroup.controllers; then
    mkdir -p run/cgroup1/memory; mount -t cgroup -o memory memory run/cgroup1/memory || rmdir run/cgroup1/memory
  fi
  mount --bind "$SPOTGUARD_SRC" src; mount -o remount,bind,ro src; mount --bind "$SPOTGUARD_SRC/build" src/build
  ip link set lo up
  hostname spotguard-lab
  pivot_root . oldroot; umount -l oldroot
  cd /src
  exec env -i PATH=/opt/spotguard/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" \
    ${CI:+CI="$CI"} ${SPOTGUARD_LAB_ARGS:+SPOTGUARD_LAB_ARGS="$SPOTGUARD_LAB_ARGS"} \
    PYTHONPATH=/src RUFF_CACHE_DIR=/tmp/ruff MYPY_CACHE_DIR=/tmp/mypy HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 tini -s -g -- "$@"
' "$root" "$@"
