#!/bin/bash
# check.sh [FOLDER]
# A real `vagrant up` of the Vagrantfile beside this script, as it stands, under emulation: validate, up with provisioning,
# a demo over ssh, rsync, halt, destroy. One line for each phase, with its seconds. FOLDER (default: build/vagrant-check)
# keeps the box and Vagrant's home; it takes 2 GB, and without a box some minutes more. Needs root and Debian 12.
#   HOST_CA=1   see build-box.sh
#   PROVISION=0 boot only: no packages and no demo in the machine
# libvirt is one of its own, in a network namespace of its own; only what was started here is ended. Not beside other
# virtual machines: above a load of ten, units of systemd time out.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
lab=$(realpath -m "${1:-$here/../build/vagrant-check}")
name=dataplane-vagrant
mkdir -p "$lab/home" "$lab/run"
export VAGRANT_HOME=$lab/home VAGRANT_CHECKPOINT_DISABLE=1 VAGRANT_DEFAULT_PROVIDER=libvirt VAGRANT_NO_COLOR=1
export VAGRANT_DOTFILE_PATH=$lab/dot
[ "$(id -u)" = 0 ] || { echo "vagrant-check: needs root" >&2; exit 1; }

begun=$SECONDS phase_begun=$SECONDS
phase() { echo "== $1: $((SECONDS - phase_begun)) s"; phase_begun=$SECONDS; }
inside() { ip netns exec $name "$@"; }
vagrant_here() { (cd "$here" && inside vagrant "$@" </dev/null 2>&1 | sed -u 's/\r$//; s/.*\r\x1b\[K//; s/\x1b\[K//g'); }

apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install vagrant vagrant-libvirt libvirt-daemon \
  libvirt-daemon-driver-qemu libvirt-clients dnsmasq-base slirp4netns mmdebstrap qemu-utils qemu-system-x86 fdisk grub-common \
  grub-pc-bin rsync iptables >/dev/null
phase packages
box=$lab/bookworm.box
[ -s "$box" ] || "$here/build-box.sh" "$box"
phase box

# A libvirtd without systemd and polkit, whose NAT network lives in the namespace; slirp4netns is the way out.
pids=()
cleanup() {
  trap - EXIT
  vagrant_here destroy -f >/dev/null || true
  for network in $(inside virsh -c qemu:///system net-list --name 2>/dev/null); do
    inside virsh -c qemu:///system net-destroy "$network" >/dev/null 2>&1 || true
  done
  if [ -s "$lab/run/libvirtd.pid" ]; then kill "$(cat "$lab/run/libvirtd.pid")" 2>/dev/null || true; fi
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  sleep 1
  ip netns delete $name 2>/dev/null || true
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP
mkdir -p /etc/libvirt /var/lib/libvirt/{images,qemu,dnsmasq} /run/libvirt /var/log/libvirt/qemu /var/cache/libvirt/qemu
getent group libvirt-qemu >/dev/null || groupadd --system libvirt-qemu
getent group kvm >/dev/null || groupadd --system kvm
getent passwd libvirt-qemu >/dev/null ||
  useradd --system --no-create-home --home /var/lib/libvirt -g libvirt-qemu -s /usr/sbin/nologin libvirt-qemu
printf '%s\n' 'user = "root"' 'group = "root"' 'dynamic_ownership = 0' 'remember_owner = 0' 'security_driver = "none"' \
  'cgroup_controllers = []' 'namespaces = []' 'stdio_handler = "file"' >/etc/libvirt/qemu.conf
printf '%s\n' 'auth_unix_ro = "none"' 'auth_unix_rw = "none"' "log_outputs = \"3:file:$lab/run/libvirtd.log\"" \
  >"$lab/run/libvirtd.conf"
ip netns add $name
ip -n $name link set lo up
slirp4netns --configure --mtu=65520 --disable-host-loopback --netns-type=path /run/netns/$name tap0 >"$lab/run/slirp.log" 2>&1 &
pids+=($!)
for _ in $(seq 50); do if ip -n $name addr show tap0 2>/dev/null | grep -q 'inet '; then break; fi; sleep 0.1; done
inside libvirtd -d -f "$lab/run/libvirtd.conf" -p "$lab/run/libvirtd.pid"
for _ in $(seq 100); do if inside virsh -c qemu:///system version >/dev/null 2>&1; then break; fi; sleep 0.1; done
phase libvirtd

# What an emulated machine takes stands in Vagrant's home, which is merged below the project's file.
cat >"$VAGRANT_HOME/Vagrantfile" <<'HOME'
Vagrant.configure("2") do |config|
  config.vm.boot_timeout = 900
  config.ssh.insert_key = false
  config.vm.provider :libvirt do |machine|
    machine.driver = "qemu"
    machine.cpu_mode = "custom"
    machine.cpu_model = "Nehalem"
    machine.machine_type = "q35"
    machine.graphics_type = "none"
    machine.video_type = "none"
    machine.disk_driver cache: "unsafe"
    machine.random model: "random"
  end
end
HOME
version=12.$(date -u -r "$box" +%Y%m%d.%H%M%S)
printf '{"name":"debian/bookworm64","versions":[{"version":"%s","providers":[{"name":"libvirt","url":"file://%s"}]}]}\n' \
  "$version" "$box" >"$lab/box.json"
if [[ $(vagrant_here box list) != *"(libvirt, $version)"* ]]; then vagrant_here box add "$lab/box.json" | tail -n 1; fi
phase "box add"

vagrant_here validate
if [ "${PROVISION:-1}" = 1 ]; then vagrant_here up | grep -v -- ' -- '; else vagrant_here up --no-provision | grep -v -- ' -- '; fi
phase up
vagrant_here ssh -c 'uname -r; nproc'
if [ "${PROVISION:-1}" = 1 ]; then
  vagrant_here ssh -c 'dataplane --version && sudo dataplane demo' | tee "$lab/demo.txt" | grep -E '^ok|^[0-9]+/' || true
  grep -q 'the namespaces of the demo are gone too' "$lab/demo.txt"
fi
phase ssh
vagrant_here rsync | tail -n 1
phase rsync
vagrant_here halt
phase halt
vagrant_here destroy -f
phase destroy
echo "== all: $((SECONDS - begun)) s"
