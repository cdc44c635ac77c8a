#!/bin/bash
# Builds the node image as a directory and prints its path. Usage: build.sh [agent|drill]
#
# Two layers, each named by the hash of what made it, kept in $SPOTGUARD_CACHE (default /var/cache/spotguard):
#   base-HASH  Debian trixie with the packages of packages.txt; CRIU and runc come from sid, for trixie's CRIU 4.1
#              does not run on kernels >= 6.16
#   node-HASH  the base and, under /opt/spotguard/venv, the Python packages that uv.lock pins
# A layer is built beside its final name and renamed when whole, so an interrupted build is never taken for a good one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
variant=${1:-drill}
cache=${SPOTGUARD_CACHE:-/var/cache/spotguard}/rootfs
suite=trixie
say() { echo "rootfs: $*" >&2; }
die() { say "error: $*"; exit 1; }

[ "$(id -u)" = 0 ] || die "must run as root (it makes device nodes and chroots); try: sudo make drill"
case $variant in agent) sections=agent ;; drill) sections=agent\|drill ;; *) die "unknown variant '$variant': agent or drill" ;; esac

packages=$(awk -v want="^($sections)$" '/^\[/{gsub(/[][]/,"");on=($0~want);next} on&&!/^#/&&NF{print $1}' "$here/packages.txt")
base_hash=$( { echo "$variant $suite $(dpkg --print-architecture 2>/dev/null || uname -m)"; echo "$packages"; cat "$0"; } | sha256sum | cut -c1-16)
node_hash=$( { echo "$base_hash"; cat "$top/pyproject.toml" "$top/uv.lock"; } | sha256sum | cut -c1-16)
base=$cache/base-$base_hash
node=$cache/node-$node_hash
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

build_base() {
  local tmp=$base.partial
  if ! command -v debootstrap >/dev/null; then
    say "installing debootstrap"
    command -v apt-get >/dev/null || die "debootstrap is missing and this is no apt system: install debootstrap and run again"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq debootstrap; } >"$cache/host-apt.log" 2>&1 \
      || die "could not install debootstrap, see $cache/host-apt.log"
  fi
  # On Ubuntu the keys of Debian's archive are a package of their own.
  if [ ! -e /usr/share/keyrings/debian-archive-keyring.gpg ]; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq debian-archive-keyring >>"$cache/host-apt.log" 2>&1 \
      || die "could not install debian-archive-keyring, see $cache/host-apt.log"
  fi
  rm -rf --one-file-system "$tmp"
  local plain newer
  plain=$(grep -v / <<<"$packages" | paste -sd,)
  newer=$(grep /sid <<<"$packages" | sed 's,/sid,,' | paste -sd' ')
  say "1/2 Debian $suite, about two minutes (log: $base.log)"
  debootstrap --variant=minbase --include="$plain" "$suite" "$tmp" >"$base.log" 2>&1 || die "debootstrap failed, see $base.log"
  # The mirror is the one that debootstrap used.
  awk '$1=="deb"{print "deb " $2 " sid main"; exit}' "$tmp/etc/apt/sources.list" >"$tmp/etc/apt/sources.list.d/sid.list"
  printf 'Package: *\nPin: release n=sid\nPin-Priority: 100\n' >"$tmp/etc/apt/preferences.d/sid"
  cp -L /etc/resolv.conf "$tmp/etc/resolv.conf"
  # shellcheck disable=SC2086  # a list of packages
  chroot "$tmp" sh -c 'export DEBIAN_FRONTEND=noninteractive
    apt-get -o Acquire::Check-Valid-Until=false update -qq
    apt-get install -y -qq --no-install-recommends -t sid "$@"
    apt-get clean; rm -rf /var/lib/apt/lists/*' sh $newer >>"$base.log" 2>&1 || die "apt failed, see $base.log"
  mkdir -p "$tmp/src" "$tmp/oldroot" "$tmp/etc/spotguard" "$tmp/var/lib/spotguard"
  mv "$tmp" "$base"
}

build_node() {
  local tmp=$node.partial
  rm -rf --one-file-system "$tmp"
  say "2/2 Python packages of uv.lock (log: $node.log)"
  cp -a --reflink=auto "$base" "$tmp"
  mkdir -p "$tmp/opt/spotguard/lock"
  cp "$top/pyproject.toml" "$top/uv.lock" "$tmp/opt/spotguard/lock/"
  # A host behind a TLS-inspecting proxy trusts more roots than Debian ships: use the host's own, for this step only.
  if [ -s /etc/ssl/certs/ca-certificates.crt ]; then cp -L /etc/ssl/certs/ca-certificates.crt "$tmp/opt/spotguard/lock/ca.crt"
  else cp -L "$tmp/etc/ssl/certs/ca-certificates.crt" "$tmp/opt/spotguard/lock/ca.crt"; fi
  local extra=()
  [ "$variant" = drill ] && extra=(--group dev)
  # shellcheck disable=SC2016  # expanded by the inner shell
  chroot "$tmp" sh -ec 'cd /opt/spotguard/lock
    export HOME=/opt/spotguard/lock/home SSL_CERT_FILE=$PWD/ca.crt PIP_CERT=$PWD/ca.crt UV_PROJECT_ENVIRONMENT=/opt/spotguard/venv UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
    python3 -m venv /opt/spotguard/uv
    /opt/spotguard/uv/bin/python -m pip install --quiet "uv==$(sed -n "s/^required-version = \"==\(.*\)\"/\1/p" pyproject.toml)"
    python3 -m venv --system-site-packages /opt/spotguard/venv
    /opt/spotguard/uv/bin/uv sync --frozen --no-install-project --no-default-groups "$@"
    rm -rf home ca.crt' sh "${extra[@]}" >"$node.log" 2>&1 || die "installing the Python packages failed, see $node.log"
  mv "$tmp" "$node"
}

[ -d "$base" ] || build_base
[ -d "$node" ] || build_node
touch "$base" "$node"
# What no call has asked for in a fortnight is of older recipes.
find "$cache" -mindepth 1 -maxdepth 1 -type d -mtime +14 -exec rm -rf --one-file-system {} +
echo "$node"
