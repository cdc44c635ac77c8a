#!/bin/bash
# Makes the product's container image and tries it: build/image/spotguard-agent.tar, an OCI image archive.
#
# Two layers: Debian and the Python packages, as deploy/rootfs makes them for the agent, and SpotGuard itself. The same
# node image and the same checkout make the same bytes. Nothing is downloaded beside what the node images need; the
# second of them, the drill's, compiles, packs and unpacks.
set -euo pipefail
umask 022
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
rootfs=$top/deploy/rootfs
out=$top/build/image
archive=$out/spotguard-agent.tar
packages="spotguard handlers criu_transfer"
site=opt/spotguard/venv/lib/python3.13/site-packages
path=/opt/spotguard/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
entrypoint=(/opt/spotguard/venv/bin/python -m spotguard)
say() { echo "image: $*" >&2; }
die() { say "error: $*"; exit 1; }
pyproject() { sed -n "s/^$1 = \"\(.*\)\"$/\1/p" "$top/pyproject.toml" | head -n 1; }
git() { command git -c safe.directory="$top" -C "$top" "$@" 2>/dev/null; }

[ "$(id -u)" = 0 ] || die "must run as root, as the node image must; try: sudo make image"
agent=$("$rootfs/build.sh" agent)
drill=$("$rootfs/build.sh" drill)
mkdir -p "$out"
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
in_drill() { "$rootfs/enter.sh" "$drill" "$@"; }
seen=/src/build/image/${work##*/} # $work as the node image sees it

debian_layer() {
  cp -a --reflink=auto "$agent" "$work/debian"
  cd "$work/debian"
  # What only served the making, caches, and what tells of the machine that this was made on.
  rm -rf opt/spotguard/uv opt/spotguard/lock "$site"/pip "$site"/pip-*.dist-info opt/spotguard/venv/bin/{pip*,[aA]ctivate*} \
    dev/* run/* tmp/* src oldroot var/log/* var/cache/* var/backups/* var/lib/apt/* \
    var/lib/dpkg/{*-old,available,lock*} etc/{hostname,resolv.conf,machine-id,.pwd.lock,passwd-,group-,shadow-,gshadow-} \
    etc/apt/sources.list etc/apt/sources.list.d/* etc/apt/preferences.d/* \
    usr/share/{locale,man,info,lintian,python-wheels}/*
  find usr/share/doc -mindepth 2 ! -type d ! -name copyright -delete
  find usr/share/doc -type d -empty -delete
  find . -name __pycache__ -type d -prune -exec rm -rf {} +
  # The day on which the accounts were made.
  sed -i -E 's/^([^:]*:[^:]*):[0-9]+:/\1::/' etc/shadow
  cd "$top"
}

spotguard_layer() {
  local to=$work/spotguard/$site version
  version=$(pyproject version)
  mkdir -p "$to/spotguard-$version.dist-info" "$work/spotguard/opt/spotguard/venv/bin"
  # shellcheck disable=SC2086  # a list of packages
  (cd "$top" && cp -r $packages "$to")
  find "$to" -name __pycache__ -type d -prune -exec rm -rf {} +
  cp "$top/LICENSE" "$to/spotguard-$version.dist-info/"
  printf '%s\n' "Metadata-Version: 2.4" "Name: spotguard" "Version: $version" "Summary: $(pyproject description)" \
    "License-Expression: $(pyproject license)" "License-File: LICENSE" >"$to/spotguard-$version.dist-info/METADATA"
  printf '#!/bin/sh\nexec %s "$@"\n' "${entrypoint[*]}" >"$work/spotguard/opt/spotguard/venv/bin/spotguard"
  chmod 755 "$work/spotguard/opt/spotguard/venv/bin/spotguard"
  # The image has no compiler: what the agent would compile at its start is put beside its source.
  in_drill python -c 'import sys; from pathlib import Path; from criu_transfer import checkpoint
checkpoint.build_library(Path(sys.argv[1])); checkpoint.build_in_cgroup(Path(sys.argv[1]))' \
    "$seen/spotguard/$site/criu_transfer/native"
  local source
  for source in "$to"/criu_transfer/native/*.c; do
    compgen -G "${source%.c}-*" >/dev/null || die "${source##*/} was not compiled"
  done
}

pack() {
  local created revision
  created=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct || echo 0)}
  revision=$(git describe --always --abbrev=40 --exclude='*' --dirty || true)
  in_drill python /src/deploy/image/oci.py pack "$seen/image.tar" "$seen/debian" "$seen/spotguard" \
    --name "spotguard-agent:$(pyproject version)" --created "$created" "${entrypoint[@]/#/--entrypoint=}" \
    --env "PATH=$path" --env LANG=C.UTF-8 --env PYTHONUNBUFFERED=1 \
    --label "org.opencontainers.image.title=spotguard-agent" \
    --label "org.opencontainers.image.description=$(pyproject description)" \
    --label "org.opencontainers.image.version=$(pyproject version)" \
    --label "org.opencontainers.image.licenses=$(pyproject license)" \
    --label "org.opencontainers.image.created=$(date -u -d "@$created" +%Y-%m-%dT%H:%M:%SZ)" \
    ${revision:+--label "org.opencontainers.image.revision=$revision"}
}

# What the image finds out about this machine must be what the node image finds out, which the tests run in.
moves() { sed -n 's/^  "moves": "\(.*\)",$/\1/p'; }
check() {
  local root=$work/check found expected
  mkdir "$root"
  in_drill python /src/deploy/image/oci.py unpack "$seen/image.tar" "$seen/check"
  mkdir "$root/src" "$root/oldroot" # enter.sh mounts there
  in_image() { "$rootfs/enter.sh" "$root" env --unset=PYTHONPATH --chdir=/ PATH="$path" "$@"; }
  [ "$(in_image "${entrypoint[@]}" --version)" = "spotguard $(pyproject version)" ] || die "the entry point does not run"
  [ "$(in_image spotguard --version)" = "spotguard $(pyproject version)" ] || die "the command does not run"
  in_image python -c 'import os, subprocess, sys; from pathlib import Path; from criu_transfer import checkpoint
library, program = (build(Path("/nowhere")) for build in (checkpoint.build_library, checkpoint.build_in_cgroup))
assert sys.argv[1] in str(library), library
done = subprocess.run(["criu", "--version"], env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, check=True)
assert not done.stderr, done.stderr
assert b"usage" in subprocess.run([program], capture_output=True).stderr' "$site" || die "what was compiled does not run"
  expected=$(in_drill python -m spotguard doctor --output json | moves || true)
  found=$(in_image spotguard doctor --output json | moves || true)
  [ "${found:-nothing}" = "$expected" ] || die "in the image, doctor says '$found'; in the node image, '$expected'"
  if [ "$found" = live ]; then
    in_image python -m criu_transfer.tracker.selftest >"$work/selftest" || { cat "$work/selftest"; die "the self-test fails"; }
    say "$(tail -n 1 "$work/selftest")"
  fi
  say "tried: it runs; containers on this machine: $found"
}

say "layers"
debian_layer
spotguard_layer
say "packing"
pack
say "trying it"
check
mv "$work/image.tar" "$archive"
say "unpacked: $(du -sm "$work/debian" "$work/spotguard" | awk '{printf "%s%s MB", n++ ? " + " : "", $1}')"
say "${archive#"$top/"}: $(du -m --apparent-size "$archive" | cut -f1) MB"
