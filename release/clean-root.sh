#!/bin/bash
# clean-root.sh SUITE [FOLDER]
# The installation of docs/install.md in a machine's files that hold nothing else: debootstrap of a Debian suite (bookworm,
# trixie), the wheel of dist/ by venv and by pipx, then Services in the demo's world and `doctor`. Its kernel is this
# machine's. Needs root, debootstrap, and a wheel (make release-check). FOLDER (default: a temporary one) is used again.
#   HOST_CA=1   trust the certificates that this machine trusts by hand, where packages come through a private authority
set -euo pipefail
suite=${1:?usage: clean-root.sh SUITE [FOLDER]}
here=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
wheel=$(ls "$here"/dist/dataplane-*.whl)
root=${2:-}
if [ -z "$root" ]; then
  root=$(mktemp -d)
  trap 'rm -rf --one-file-system "$root"' EXIT
fi
root=$(realpath -m "$root")
site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -n 1)
if [ ! -e "$root/etc/debian_version" ]; then
  debootstrap --variant=minbase --include=ca-certificates,curl "$suite" "$root" "${site:-http://deb.debian.org/debian}" >"$root.log" 2>&1 ||
    { tail -n 5 "$root.log" >&2; exit 1; }
fi
cp /etc/resolv.conf "$root/etc/resolv.conf"
if [ -n "${HOST_CA:-}" ]; then
  mkdir -p "$root/usr/local/share/ca-certificates"
  cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
fi
mkdir -p "$root/srv/dist"
rm -f "$root"/srv/dist/*
cp "$wheel" "$root/srv/dist/"
cat >"$root/srv/inside.sh" <<'INSIDE'
set -euo pipefail
cd /srv
update-ca-certificates >/dev/null 2>&1
export PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export DEBIAN_FRONTEND=noninteractive
echo "== $(. /etc/os-release && echo "$PRETTY_NAME")"
apt-get -qq update
apt-get -qq -y --no-install-recommends install python3-venv python3-bpfcc python3-nftables nftables iptables ipvsadm conntrack \
  iproute2 kmod pipx >/dev/null 2>&1
python3 -V
rm -rf /opt/dataplane /opt/pipx
python3 -m venv --system-site-packages /opt/dataplane
/opt/dataplane/bin/pip install -q dist/dataplane-*.whl
/opt/dataplane/bin/dataplane --version
for mode in nftables iptables; do
  echo "dataplane apply -f hostnames.yaml --mode $mode && client curl -sS -m 10 10.0.1.175"
done | /opt/dataplane/bin/dataplane demo --shell
echo "== pipx"
PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/usr/local/bin pipx install --system-site-packages dist/dataplane-*.whl 2>&1 | grep -v WARNING
/usr/local/bin/dataplane --version
/usr/local/bin/dataplane doctor --mode nftables
INSIDE
unshare -m bash -c "
  mount --bind '$root' '$root' && mount -t proc proc '$root/proc' && mount --rbind /sys '$root/sys' &&
  mount --rbind /dev '$root/dev' &&
  exec chroot '$root' /usr/bin/env -i HOME=/root LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin bash /srv/inside.sh"
