#!/bin/bash
# build-box.sh OUT.box
# Makes a libvirt box of Debian 12 out of Debian's packages only, for machines that cannot fetch the published one: systemd,
# sshd, the user vagrant with Vagrant's well-known key, the stock kernel. It needs no loop device and no mount.
#   HOST_CA=1   trust the certificates that this machine trusts by hand (registries behind a private authority); such a box
#               is not to be given away
set -euo pipefail
out=$(realpath -m "${1:?usage: build-box.sh OUT.box}")
mkdir -p "$(dirname "$out")"
work=$(mktemp -d "$(dirname "$out")/box.XXXXXX")
trap 'rm -rf "$work"' EXIT
begun=$SECONDS
say() { echo "box: $((SECONDS - begun)) s: $*" >&2; }

site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Codename: bookworm' | head -n 1)
site=${site:-http://deb.debian.org/debian}
cat "$(find /usr/share -name vagrant.pub -path '*keys*' | head -n 1)" >"$work/key"

cat >"$work/customize" <<'CUSTOMIZE'
set -e
root=$1
echo dataplane >"$root/etc/hostname"
printf '127.0.0.1 localhost dataplane\n' >"$root/etc/hosts"
echo 'LABEL=root / ext4 noatime,errors=remount-ro 0 1' >"$root/etc/fstab"
mkdir -p "$root/etc/systemd/network"
printf '[Match]\nName=eth0\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\n' >"$root/etc/systemd/network/10-eth0.network"
chroot "$root" systemctl -q enable systemd-networkd systemd-resolved ssh
ln -sf /run/systemd/resolve/resolv.conf "$root/etc/resolv.conf"
chroot "$root" useradd -m -s /bin/bash vagrant
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/vagrant"
install -d -m 700 "$root/home/vagrant/.ssh"
mv "$root/key" "$root/home/vagrant/.ssh/authorized_keys"
chmod 600 "$root/home/vagrant/.ssh/authorized_keys"
chroot "$root" chown -R vagrant:vagrant /home/vagrant/.ssh
printf 'UseDNS no\n' >"$root/etc/ssh/sshd_config.d/vagrant.conf"
# an emulated machine takes minutes for what nobody waits for here
chroot "$root" systemctl -q mask systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer man-db.timer \
  fstrim.timer e2scrub_all.timer e2scrub_reap.service dpkg-db-backup.timer getty@tty1.service
printf 'virtio_pci\nvirtio_blk\nvirtio_net\next4\ncrc32c_generic\n' >>"$root/etc/initramfs-tools/modules"
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=lz4/' "$root/etc/initramfs-tools/initramfs.conf"
rm -f "$root/etc/initramfs-tools/conf.d/driver-policy"
chroot "$root" update-initramfs -u
version=$(basename "$(ls "$root"/boot/vmlinuz-*)" | sed 's/^vmlinuz-//')
mkdir -p "$root/boot/grub"
cat >"$root/boot/grub/grub.cfg" <<GRUB
set timeout=0
linux /boot/vmlinuz-$version root=LABEL=root ro net.ifnames=0 biosdevname=0 console=ttyS0,115200 quiet mitigations=off audit=0 systemd.default_timeout_start_sec=900 systemd.service_watchdogs=0
initrd /boot/initrd.img-$version
boot
GRUB
if [ -n "${HOST_CA:-}" ]; then
  cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
  chroot "$root" update-ca-certificates >/dev/null
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
fi
chroot "$root" apt-get clean
CUSTOMIZE

packages=linux-image-amd64,systemd,systemd-sysv,systemd-resolved,udev,dbus,libpam-systemd,initramfs-tools,lz4,openssh-server
packages+=,sudo,rsync,iproute2,kmod,procps,netbase,ca-certificates
mmdebstrap --quiet --variant=minbase --mode=root --format=directory --include="$packages" \
  --customize-hook="upload $work/key /key" --customize-hook="sh $work/customize \"\$1\"" \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
  bookworm "$work/root" "deb $site bookworm main" "deb $site bookworm-updates main"
say "$(du -sh "$work/root" | cut -f1) of files"

# one partition at 1 MiB, filled without a mount; GRUB's core fits into the gap in front of it
truncate -s 8G "$work/disk"
printf 'label: dos\nstart=2048, type=83, bootable\n' | sfdisk -q "$work/disk"
sectors=$(($(stat -c %s "$work/disk") / 512 - 2048))
mke2fs -q -t ext4 -L root -O ^metadata_csum_seed -E offset=$((2048 * 512)),lazy_itable_init=1,nodiscard \
  -d "$work/root" "$work/disk" $((sectors / 2))k
printf 'search.fs_label root root\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n' >"$work/early"
grub-mkimage -O i386-pc -p /boot/grub -c "$work/early" -o "$work/core" \
  biosdisk part_msdos ext2 search search_label configfile normal linux serial terminal echo boot
[ "$(stat -c %s "$work/core")" -le $((2047 * 512)) ]
dd if=/usr/lib/grub/i386-pc/boot.img of="$work/disk" bs=440 count=1 conv=notrunc status=none
dd if="$work/core" of="$work/disk" bs=512 seek=1 conv=notrunc status=none
qemu-img convert -c -O qcow2 -o compression_type=zstd "$work/disk" "$work/box.img"
echo '{"provider":"libvirt","format":"qcow2","virtual_size":8}' >"$work/metadata.json"
printf 'Vagrant.configure("2") do |config|\n  config.vm.provider(:libvirt) { |machine| machine.disk_bus = "virtio" }\nend\n' >"$work/Vagrantfile"
tar -C "$work" -cf "$out" metadata.json Vagrantfile box.img
say "$(du -h "$out" | cut -f1) in $out"
