#!/bin/bash
# Runs a command inside the node image, in namespaces of its own. Usage: enter.sh ROOT COMMAND...
#
# The command sees: this checkout at /src (writable only below /src/build), an empty /tmp and /run, cgroup v2 at
# /sys/fs/cgroup, and a network of its own with nothing but loopback. Everything it leaves running ends with it.
set -euo pipefail
root=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
[ "$(id -u)" = 0 ] || { echo "enter.sh: must run as root (namespaces, CRIU); try sudo" >&2; exit 1; }
[ -x "$root/usr/bin/python3" ] || { echo "enter.sh: '$root' is no node image; build one with deploy/rootfs/build.sh" >&2; exit 1; }
mkdir -p "$top/build"
# CRIU refuses files that it cannot reopen: what this shell inherited must not reach the containers.
for fd in /proc/self/fd/*; do n=${fd##*/}; [ "$n" -gt 2 ] && eval "exec $n>&-" 2>/dev/null; done

# A control group of our own in each hierarchy that is used, as the root of a cgroup namespace: two calls at a time do
# not meet, and what is left over goes with it.
mounted() { awk -v type="$1" -v option="$2" '$3==type && ("," $4 ",") ~ ("," option ",") {print $2; exit}' /proc/mounts; }
unified=$(mounted cgroup2 rw)
if [ -z "$unified" ]; then
  unified=/run/spotguard-cgroup2
  mkdir -p "$unified"
  mount -t cgroup2 cgroup2 "$unified"
fi
memory=$(mounted cgroup memory)
group=spotguard-$(od -An -N6 -tx1 /dev/urandom | tr -d ' \n')
groups=$unified/$group${memory:+ $memory/$group}
leave() {
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    # shellcheck disable=SC2086  # a list of directories
    find $groups -depth -type d -exec rmdir {} + 2>/dev/null && return
    sleep 0.1
  done
}
trap leave EXIT
# shellcheck disable=SC2086
mkdir $groups

SPOTGUARD_SRC=$top SPOTGUARD_GROUPS=$groups \
  unshare --mount --pid --net --uts --ipc --fork --kill-child --propagation private "$here/inside.sh" "$root" "$@"
