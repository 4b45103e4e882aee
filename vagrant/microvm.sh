#!/bin/bash
# microvm.sh [-k KVER] [-o OUTDIR] [-m MiB] [-c CPUS] [-t SECONDS] [-n] [-i] [--] [COMMAND...]
# Runs COMMAND as root under a stock distribution kernel: for machines whose own kernel has no IPVS or dummy devices.
# It is QEMU without acceleration, and its root is this machine's own root, read-only, with writes kept in memory: the
# clone and its .venv are at the same path, and the working directory stays the same. A boot takes about four seconds.
#   -k KVER     kernel version (default: the newest that is in /boot and in /lib/modules), or a folder with boot/ and
#               lib/modules/ of one that is not installed (see kernel.sh)
#   -o OUTDIR   a folder that is shared with the guest for reading and writing
#   -m -c -t    memory (2048 MiB), processors (1), time limit (300 seconds; none with -i; 0: none)
#   -n          a user-mode network as eth0; this machine's loopback is 10.0.2.2
#   -i          a terminal: COMMAND (default: a login shell) gets the serial console
#   -V          print the kernel version that would be booted, and end
# Output is streamed (stdout and stderr as one), and COMMAND's exit status is this script's.
# 125: the guest never finished (panic, time limit, nothing to boot); the end of its console is printed.
# In the guest DATAPLANE_GUEST=1 is set, and DATAPLANE_*, HYPOTHESIS_*, CI, TERM and NO_COLOR are passed on.
set -euo pipefail
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

die() { echo "microvm: $*" >&2; exit 125; }

kernel= out= memory=2048 cpus=1 limit= network= interactive= show_version=
while getopts k:o:m:c:t:niV option; do
  case $option in
    k) kernel=$OPTARG ;;
    o) out=$OPTARG ;;
    m) memory=$OPTARG ;;
    c) cpus=$OPTARG ;;
    t) limit=$OPTARG ;;
    n) network=1 ;;
    i) interactive=1 ;;
    V) show_version=1 ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
if [ $# = 0 ] && [ -z "$interactive" ]; then set -- true; fi
limit=${limit:-$([ -n "$interactive" ] && echo 0 || echo 300)}

if [ -z "$kernel" ]; then
  for image in $(printf '%s\n' /boot/vmlinuz-* | sort -V); do
    if [ -e "$image" ] && [ -d "/lib/modules/${image#/boot/vmlinuz-}/kernel" ]; then kernel=${image#/boot/vmlinuz-}; fi
  done
fi
kernel_root=
if [ -d "$kernel" ]; then
  kernel_root=$(realpath "$kernel")
  image=$(printf '%s\n' "$kernel_root"/boot/vmlinuz-* | sort -V | tail -n 1)
  kernel=${image##*/vmlinuz-}
fi
[ -n "$kernel" ] && [ -e "$kernel_root/boot/vmlinuz-$kernel" ] || die "no kernel to boot is installed: run make setup"
if [ -n "$show_version" ]; then echo "$kernel"; exit; fi
for tool in qemu-system-x86_64 busybox modprobe; do
  command -v $tool >/dev/null || die "$tool is not installed: run make setup"
done
[ "$(id -u)" = 0 ] || die "needs root, to show all of this machine's files to the guest"

version=$(qemu-system-x86_64 --version | sed -n '1s/.*version \([0-9.]*\).*/\1/p')
if [ "$cpus" -gt 1 ] && dpkg --compare-versions "$version" lt 8.1; then
  echo "microvm: one processor: QEMU $version may hang with more (8.1 does not; see vagrant/provision.sh)" >&2
  cpus=1
fi

work=$(mktemp -d)
pids=()
cleanup() {
  local pid
  trap - EXIT INT TERM HUP
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

out=${out:-$work/out}
mkdir -p "$out"
out=$(realpath "$out")
cache=
for candidate in /var/cache/dataplane-vm "${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/dataplane-vm" "$work/cache"; do
  if mkdir -p "$candidate" 2>/dev/null && [ -w "$candidate" ]; then cache=$candidate; break; fi
done

# 1. The kernel, unpacked once: unpacking itself under emulation takes it seconds. QEMU boots an ELF image by PVH; what we
# cannot unpack here is booted packed, which is slower and also right.
vmlinux=$cache/vmlinux-$kernel
if [ ! -s "$vmlinux" ] || [ "$kernel_root/boot/vmlinuz-$kernel" -nt "$vmlinux" ]; then
  /usr/bin/python3 - "$kernel_root/boot/vmlinuz-$kernel" >"$vmlinux.$$" <<'PYTHON'
import struct, subprocess, sys

image = open(sys.argv[1], "rb").read()
setup_sectors = image[0x1F1] or 4
offset, length = struct.unpack_from("<II", image, 0x248)  # the boot protocol's payload_offset and payload_length
start = (setup_sectors + 1) * 512 + offset
payload = image[start : start + length - 4]  # the last four bytes are the unpacked size
unpackers = {b"\xfd7zX": ["xz", "-dc"], b"\x28\xb5\x2f\xfd": ["zstd", "-dcq"], b"\x1f\x8b\x08\x00": ["gzip", "-dc"]}
command = unpackers.get(payload[:4])
try:
    unpacked = subprocess.run(command, input=payload, capture_output=True).stdout if command else b""
except FileNotFoundError:
    unpacked = b""
sys.stdout.buffer.write(unpacked if unpacked.startswith(b"\x7fELF") else image)
PYTHON
  mv "$vmlinux.$$" "$vmlinux"
fi

# 2. An initramfs of busybox and the few modules that it takes to reach the root.
initrd=$cache/initrd-$kernel
self=$(readlink -f "$0")
if [ ! -s "$initrd" ] || [ "$self" -nt "$initrd" ]; then
  tree=$work/initrd
  mkdir -p "$tree"/{bin,modules,proc,dev,lower,upper,root}
  cp -L "$(command -v busybox)" "$tree/bin/busybox"
  for applet in sh mount insmod switch_root mkdir reboot; do ln -s busybox "$tree/bin/$applet"; done
  number=100
  while read -r module; do
    target=$tree/modules/$((number++)).ko
    case $module in
      *.xz) xz -dc "$module" >"$target" ;;
      *.zst) zstd -dcq "$module" >"$target" ;;
      *) cp "$module" "$target" ;;
    esac
  done < <(
    for name in virtio_pci 9p 9pnet_virtio overlay virtio_console virtio_rng virtio_net; do
      modprobe -q --show-depends ${kernel_root:+-d "$kernel_root"} -S "$kernel" $name | awk '$1 == "insmod" { print $2 }'
    done | awk '!seen[$0]++'
  )
  cat >"$tree/init" <<'INIT'
#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod $module; done
options=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o ro,cache=loose,$options root /lower || reboot -f
mount -t tmpfs -o mode=755 upper /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root
mkdir -p /root/run/dataplane-vm
mount -t 9p -o cache=none,$options control /root/run/dataplane-vm
for folder in proc dev; do mount -o move /$folder /root/$folder; done
mount -t sysfs sys /root/sys
exec switch_root /root /bin/bash /run/dataplane-vm/init
INIT
  chmod +x "$tree/init"
  (cd "$tree" && find . | busybox cpio -o -H newc 2>/dev/null) >"$initrd.$$"
  mv "$initrd.$$" "$initrd"
fi

# 3. What runs as PID 1 on the real root. It comes by a 9p share of its own, so nothing is left in this machine's files.
control=$work/control
mkdir "$control"
{
  printf 'kernel_root=%q kernel=%q\n' "$kernel_root" "$kernel"
  printf 'cwd=%q out=%q network=%q interactive=%q\n' "$PWD" "$out" "$network" "$interactive"
  printf 'terminal_size=%q\n' "$(if [ -t 0 ]; then stty size; else echo 24 80; fi)"
  printf 'command=('
  if [ $# -gt 0 ]; then printf '%q ' "$@"; fi
  printf ')\n'
  for name in $(compgen -e); do
    case $name in
      DATAPLANE_* | HYPOTHESIS_* | CI | TERM | NO_COLOR) printf 'export %s=%q\n' "$name" "${!name}" ;;
    esac
  done
} >"$control/settings"
cat >"$control/init" <<'INIT'
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 DATAPLANE_GUEST=1
control=/run/dataplane-vm
: >$control/booted
. $control/settings
mkdir -p /dev/pts /dev/shm /run/netns
mount -t devpts -o mode=600,ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
if [ -n "$kernel_root" ]; then # in the overlay only
  mkdir -p "/lib/modules/$kernel"
  mount --bind "$kernel_root/lib/modules/$kernel" "/lib/modules/$kernel"
fi
mount -t tmpfs tmpfs /run/netns # the machine's named network namespaces are dead files in here
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
ln -sf /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -sf "fd/${n%:*}" "/dev/${n#*:}"; done
mkdir -p "$out"
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none out "$out"
echo microvm >/proc/sys/kernel/hostname
ip link set lo up
if [ -n "$network" ]; then
  ip link set eth0 up
  ip address add 10.0.2.15/24 dev eth0
  ip route add default via 10.0.2.2
  rm -f /etc/resolv.conf # in the overlay only; it may be a link into a folder that does not exist here
  echo nameserver 10.0.2.3 >/etc/resolv.conf
fi
cd "$cwd" 2>/dev/null || cd /
if [ -n "$interactive" ]; then
  [ ${#command[@]} -gt 0 ] || command=(bash -i)
  stty -F /dev/ttyS0 sane rows ${terminal_size% *} cols ${terminal_size#* }
  setsid -cw "${command[@]}" </dev/ttyS0 >/dev/ttyS0 2>&1
  echo $? >$control/status
else
  # A virtio port, as the serial line moves 30 kB/s only. It opens just once, so one process holds it and reads a FIFO:
  # /dev/stdout can be opened again, and a daemon that the command leaves behind does not hold the guest up for long.
  port=$(echo /dev/vport*p1)
  mkfifo /run/microvm-output
  cat </run/microvm-output >"$port" &
  "${command[@]}" </dev/null >/run/microvm-output 2>&1
  echo $? >$control/status
  for _ in {1..20}; do kill -0 $! 2>/dev/null || break; sleep 0.1; done
fi
sync
busybox reboot -f
INIT

arguments=(
  -name dataplane -M q35,sata=off,smbus=off,i8042=off,hpet=off -accel tcg,thread=multi -cpu Nehalem
  -smp "$cpus" -m "$memory" -nodefaults -no-user-config -display none -no-reboot
  # remap: file systems that are mounted below / on this machine are in the share too, with inode numbers of their own
  -fsdev local,id=root,path=/,security_model=none,readonly=on,multidevs=remap
  -device virtio-9p-pci,fsdev=root,mount_tag=root
  -fsdev "local,id=control,path=$control,security_model=none" -device virtio-9p-pci,fsdev=control,mount_tag=control
  -fsdev "local,id=out,path=$out,security_model=none,multidevs=remap" -device virtio-9p-pci,fsdev=out,mount_tag=out
  -device virtio-rng-pci -kernel "$vmlinux" -initrd "$initrd"
  -append "console=ttyS0 quiet loglevel=${interactive:-5} panic=-1 softlockup_panic=1 watchdog_thresh=60 mitigations=off audit=0 net.ifnames=0 no_timer_check random.trust_cpu=on"
)
if [ -n "$network" ]; then arguments+=(-netdev user,id=net -device virtio-net-pci,netdev=net); fi
# Each link of the chain gets a signal when the one above it dies, so not even kill -9 of this script leaves a QEMU behind.
runner=(setpriv --pdeathsig TERM timeout --foreground -k 5 "$limit" setpriv --pdeathsig KILL qemu-system-x86_64)
if [ -n "$interactive" ]; then
  saved=$(stty -g 2>/dev/null || true)
  "${runner[@]}" "${arguments[@]}" -chardev stdio,id=tty,signal=off -serial chardev:tty <&0 &
  pids=($!)
  wait $! || true
  if [ -n "$saved" ]; then stty "$saved" || true; fi
else
  mkfifo "$work/output"
  for boot_limit in 60 120 0; do
    # Through a pipe always: QEMU opens its output anew, which would start a file over from its beginning.
    cat <"$work/output" &
    printer=$!
    "${runner[@]}" "${arguments[@]}" -serial "file:$work/console" -device virtio-serial-pci \
      -chardev file,id=output,path=/proc/self/fd/1,append=on -device virtserialport,chardev=output,name=output,nr=1 \
      </dev/null >"$work/output" &
    pids=($!)
    # A kernel under emulation sometimes spins for ever before its first line. Nothing of COMMAND has run then: boot again.
    stuck=
    for ((tick = 0; boot_limit > 0; tick++)); do
      if [ -e "$control/booted" ] || ! kill -0 "${pids[0]}" 2>/dev/null; then break; fi
      if [ $tick -ge $((boot_limit * 10)) ]; then stuck=1; break; fi
      sleep 0.1
    done
    if [ -n "$stuck" ]; then
      echo "microvm: not booted after $boot_limit s, trying again" >&2
      kill "${pids[0]}" 2>/dev/null || true
    fi
    wait "${pids[0]}" || true
    wait $printer || true
    [ -n "$stuck" ] || break
  done
fi
pids=()

if [ -s "$control/status" ]; then exit "$(cat "$control/status")"; fi
echo "microvm: the guest did not finish (a panic, or the time limit of $limit s); the end of its console:" >&2
tail -n 100 "$work/console" >&2 2>/dev/null || true
exit 125
