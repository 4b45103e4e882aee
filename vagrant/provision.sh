#!/bin/bash
# provision.sh [--no-venv] [--lab] [--tests] [--persist]
# Makes a Debian 12/13 or Ubuntu 24.04 machine ready for dataplane: system packages, kernel modules, .venv in the clone.
# Safe to run again: it looks before it acts, and takes well under a second when there is nothing to do.
#   --no-venv   packages and modules only
#   --lab       install the micro-VM's packages even though this kernel has IPVS
#   --tests     install what only tests need: a browser, and Vagrant to validate its file
#   --persist   load the modules at every boot too (writes /etc/modules-load.d/dataplane.conf)
# Not root: it uses sudo for packages and modules, and the virtual environment belongs to you.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

BASE_PACKAGES=(
  python3 python3-venv python3-pip python3-bpfcc python3-nftables # the last two are no PyPI packages: see pyproject.toml
  nftables iptables ipvsadm ipset conntrack iproute2 iputils-ping kmod procps mount strace
  curl ca-certificates git make
)
TEST_PACKAGES=(bind9-dnsutils ruby vagrant)
BROWSER_PACKAGES=(chromium fonts-dejavu-core)
MODULES=(
  ip_vs ip_vs_rr ip_vs_wrr ip_vs_lc ip_vs_wlc ip_vs_sh ip_vs_mh ip_vs_sed ip_vs_nq ip_vs_dh
  ip_vs_lblc ip_vs_lblcr ip_vs_fo ip_vs_ovf ip_vs_twos dummy nf_conntrack
)

venv=1 lab= tests= persist=
for arg in "$@"; do
  case $arg in
    --no-venv) venv= ;;
    --lab) lab=1 ;;
    --tests) tests=1 ;;
    --persist) persist=1 ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "provision: unknown option $arg (try --help)" >&2; exit 2 ;;
  esac
done

say() { echo "provision: $*"; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# prints those of the named packages that are not installed
missing() {
  local name status
  declare -A have=()
  while read -r name status; do
    if [ "$status" = installed ]; then have[$name]=1; fi
  done < <(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null)
  for name in "$@"; do
    if [ -z "${have[$name]:-}" ]; then echo "$name"; fi
  done
}

no_backports=/run/dataplane-no-backports # do not try at every start what failed since the machine booted
updated=
install_packages() {
  local wanted log
  mapfile -t wanted < <(missing "$@")
  if [ ${#wanted[@]} = 0 ]; then return; fi
  say "installing ${wanted[*]}"
  log=$(mktemp)
  # Without a boot loader nothing here boots from /boot, so building an initramfs for a lab kernel is a wasted minute.
  if {
    { [ -n "$updated" ] || as_root apt-get -qq -o Acquire::Retries=3 update; } &&
      as_root env DEBIAN_FRONTEND=noninteractive $(command -v update-grub >/dev/null || echo INITRD=No) \
        apt-get -qq -y -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 --no-install-recommends install "${wanted[@]}"
  } >"$log" 2>&1 </dev/null; then
    updated=1
    rm -f "$log"
  else
    cat "$log" >&2
    say "apt-get failed (its output is above)" >&2
    exit 1
  fi
}

# QEMU before 8.1 may go on running machine code that another processor of the guest has just changed ("accel/tcg: Always
# lock pages before translation" ended that): a probe that is attached while packets flow can hang the guest. Debian 12 has
# a newer one in its backports. They are not added to the machine's sources; without them the micro-VM has one processor.
install_qemu() {
  local have sources site
  have=$(dpkg-query -W -f '${Version}' qemu-system-x86 2>/dev/null || true)
  if dpkg --compare-versions "${have:-0}" ge 1:8.1; then return; fi
  if [ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = bookworm ] && [ ! -e "$no_backports" ]; then
    sources=$(mktemp --suffix=.list)
    chmod 644 "$sources"
    site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Codename: bookworm' | head -n 1)
    cat /etc/apt/sources.list 2>/dev/null >"$sources" || true
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${site:-http://deb.debian.org/debian} bookworm-backports main" >>"$sources"
    say "installing qemu-system-x86 of Debian's backports"
    if {
      as_root apt-get -qq -o Acquire::Retries=3 -o Dir::Etc::SourceList="$sources" update &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 \
          -o Dir::Etc::SourceList="$sources" -t bookworm-backports --no-install-recommends install qemu-system-x86
    } >"$sources.log" 2>&1 </dev/null; then
      updated=1
    else
      cat "$sources.log" >&2
      say "Debian's backports cannot be had (apt-get's output is above): the micro-VM will have one processor" >&2
      as_root touch "$no_backports"
    fi
    rm -f "$sources" "$sources.log"
  fi
  install_packages qemu-system-x86
}

# best effort: a kernel without loadable modules has what it has, and has-ipvs.sh decides afterwards
load_modules() {
  if [ -d "/lib/modules/$(uname -r)" ]; then as_root modprobe -qa "${MODULES[@]}" || true; fi
}

distribution=$(. /etc/os-release && echo "${ID:-unknown} ${ID_LIKE:-}")
case $distribution in
  *ubuntu*) kernel_package=linux-image-generic ;;
  *debian*) kernel_package=linux-image-amd64 ;;
  *) say "this is not Debian or Ubuntu ($distribution); install these yourself: ${BASE_PACKAGES[*]}" >&2; exit 1 ;;
esac

install_packages "${BASE_PACKAGES[@]}"
if [ -n "$tests" ]; then
  # Ubuntu has Chromium as a snap only; the browser tests are skipped there
  if [[ $distribution != *ubuntu* ]]; then TEST_PACKAGES+=("${BROWSER_PACKAGES[@]}"); fi
  install_packages "${TEST_PACKAGES[@]}"
fi
load_modules
if ! as_root vagrant/has-ipvs.sh && [[ $distribution == *ubuntu* ]]; then
  # Ubuntu's cloud images leave part of the modules out; they come in a package for just this kernel.
  extra=linux-modules-extra-$(uname -r)
  if apt-cache show "$extra" >/dev/null 2>&1; then install_packages "$extra"; load_modules; fi
fi
if [ -n "$persist" ] && [ "$(cat /etc/modules-load.d/dataplane.conf 2>/dev/null)" != "$(printf '%s\n' "${MODULES[@]}")" ]; then
  say "writing /etc/modules-load.d/dataplane.conf"
  printf '%s\n' "${MODULES[@]}" | as_root tee /etc/modules-load.d/dataplane.conf >/dev/null
fi

if [ -n "$lab" ] || ! as_root vagrant/has-ipvs.sh; then
  if [ "$(uname -m)" = x86_64 ]; then
    install_qemu
    install_packages busybox-static xz-utils zstd "$kernel_package"
  else
    say "this kernel has no IPVS, and the micro-VM knows x86_64 only: ipvs mode cannot run here" >&2
  fi
fi

if [ -n "$venv" ]; then
  # pip reads all of these, and an editable install holds the clone's path
  state=$( (pwd -P; /usr/bin/python3 -V; cat pyproject.toml requirements.lock) | sha256sum)
  if [ "$(cat .venv/.provisioned 2>/dev/null)" != "$state" ]; then
    say "preparing .venv ($(/usr/bin/python3 -V))"
    # The distribution's own Python, because python3-bpfcc and python3-nftables serve no other.
    here=$(pwd -P)
    running=$(.venv/bin/python -c 'import sys; print(sys.version, sys.prefix)' 2>/dev/null || true)
    if [ "$running" != "$(/usr/bin/python3 -c 'import sys; print(sys.version, sys.argv[1])' "$here/.venv")" ]; then
      /usr/bin/python3 -m venv --system-site-packages --clear .venv
    fi
    .venv/bin/pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock
    .venv/bin/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
    echo "$state" >.venv/.provisioned
  fi
fi
