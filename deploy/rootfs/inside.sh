#!/bin/bash
# The inner half of enter.sh, in the new namespaces: mounts what a machine has, enters the image, becomes the command.
set -euo pipefail
root=$1
shift
for group in $SPOTGUARD_GROUPS; do echo 0 >"$group/cgroup.procs"; done
if [ -z "${SPOTGUARD_IN_CGROUP_NAMESPACE:-}" ]; then
  SPOTGUARD_IN_CGROUP_NAMESPACE=1 exec unshare --cgroup "$0" "$root" "$@"
fi

mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
cd "$root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
# A group that gives controllers to others must have no process of its own (cgroups(7), no internal processes).
mkdir -p sys/fs/cgroup/init
echo 0 >sys/fs/cgroup/init/cgroup.procs
mount -t tmpfs -o mode=755 dev dev
mkdir dev/pts dev/shm dev/net
device() { mknod -m 666 "dev/$1" c "$2" "$3"; }
device null 1 3
device zero 1 5
device full 1 7
device random 1 8
device urandom 1 9
device kmsg 1 11
device tty 5 0
device net/tun 10 200
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 tmp tmp
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 shm dev/shm
# On a cgroup v1 machine the memory controller is not in the unified tree: offer it beside.
if ! grep -qw memory sys/fs/cgroup/cgroup.controllers; then
  mkdir -p run/cgroup1/memory
  mount -t cgroup -o memory memory run/cgroup1/memory || rmdir run/cgroup1/memory
fi
mount --bind "$SPOTGUARD_SRC" src
mount -o remount,bind,ro src
mount --bind "$SPOTGUARD_SRC/build" src/build
ip link set lo up
hostname spotguard-lab
pivot_root . oldroot
umount -l oldroot
cd /src
exec env -i PATH=/opt/spotguard/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LANG=C.UTF-8 TERM="${TERM:-dumb}" \
  ${CI:+CI="$CI"} PYTHONPATH=/src PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
  RUFF_CACHE_DIR=/tmp/ruff MYPY_CACHE_DIR=/tmp/mypy HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis \
  tini -s -g -- "$@"
