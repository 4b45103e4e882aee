#!/bin/bash
# kernel.sh SUITE [FOLDER]
# Fetches the newest kernel of a Debian suite (bookworm, bookworm-backports, trixie, trixie-backports, sid) by apt, checks its
# signatures as ever, and unpacks it into FOLDER/SUITE (default: /var/cache/dataplane-vm/kernels) without installing it: this
# machine goes on booting what it boots. Prints that folder, for microvm.sh -k and for make test KERNEL=.
set -euo pipefail
suite=${1:?usage: kernel.sh SUITE [FOLDER]}
folder=$(realpath -m "${2:-/var/cache/dataplane-vm/kernels}")/$suite
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Codename: bookworm' | head -n 1)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keyring] ${site:-http://deb.debian.org/debian} $suite main" >"$work/list"
mkdir -p "$work/lists/partial" "$work/archives/partial"
options=(-qq -o Acquire::Retries=3 -o Dir::Etc::SourceList="$work/list" -o Dir::Etc::SourceParts=/dev/null
  -o Dir::State::Lists="$work/lists" -o Dir::Cache::Archives="$work/archives" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update >&2
package=$(apt-cache "${options[@]}" depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | sort -V | tail -n 1)
[ -n "$package" ] || { echo "kernel: $suite has no linux-image-amd64" >&2; exit 1; }
# Debian 13 has the modules and the image in packages of their own
packages=("$package")
while read -r name; do packages+=("$name"); done < <(
  apt-cache "${options[@]}" depends "$package" | sed -n 's/.*Depends: \(linux-\(binary\|modules\|base\)-[0-9].*\)/\1/p' | sort -u)
(cd "$work" && apt-get "${options[@]}" download "${packages[@]}" >&2)
rm -rf "$folder"
mkdir -p "$folder/lib"
for file in "$work"/*.deb; do dpkg -x "$file" "$folder"; done
if [ -d "$folder/usr/lib/modules" ]; then rmdir "$folder/lib/modules" 2>/dev/null || true; ln -sfn ../usr/lib/modules "$folder/lib/modules"; fi
for version in "$folder"/lib/modules/*; do depmod -b "$folder" "$(basename "$version")"; done
echo "$folder"
