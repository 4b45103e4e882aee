#!/bin/bash
# measure.sh [native|vm|report]: makes what is in this folder again, about a quarter of an hour each.
# native: nftables and iptables on this machine's kernel. vm: all modes on one kernel, in the micro-VM, with sizes that fit
# its speed; processes started line by line are left to the native run there. report: one page of both.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."
python=.venv/bin/python out=docs/bench
common=(--rounds 1 --patience 25)
# what is measured goes before whatever else this machine does
first=()
if nice -n -19 true 2>/dev/null; then first=(nice -n -19); fi
vm_contenders=(
  "ipvs: raw replay" "nftables: raw replay" "iptables-legacy: iptables-restore by hand"
  "iptables-nft: iptables-restore by hand" "ipvs" "ipvs, routes" "nftables" "iptables-legacy" "iptables-nft"
  "ipvs: ipvsadm -R" "ipvs: ipvsadm, one by one" "ipvs: pyroute2" "nftables: nft -f, same rules"
  "nftables: libnftables, same rules" "nftables: nft -f, kube-proxy's layout"
)
for what in "${@:-native vm report}"; do
  for one in $what; do
    case $one in
      native)
        "${first[@]}" $python -m bench "${common[@]}" --sizes 100,1000,10000 --agent-sizes 1000,10000 --endpoints 3 \
          --seconds 2 --out "$out/native"
        "${first[@]}" $python -m bench "${common[@]}" --only modes --sizes 40000 --endpoints 3 --seconds 2 \
          --out "$out/native-40000" \
          --contenders "nftables: raw replay" nftables "nftables: nft -f, same rules" "nftables: libnftables, same rules"
        ;;
      vm)
        mkdir -p "$out/vm"
        "${first[@]}" vagrant/microvm.sh -o "$out/vm" -c 2 -m 4096 -t 3600 -- $python -m bench "${common[@]}" \
          --sizes 100,1000,10000 --agent-sizes 100,1000 --endpoints 3 --seconds 1 --changes 100 \
          --contenders "${vm_contenders[@]}" --out "$out/vm"
        ;;
      report)
        $python -m bench report "$out/native,$out/native-40000" "$out/vm" --out "$out"
        gzip -f9n "$out"/*/bench-*.jsonl # what is kept: the page, a picture of each kernel, every sample
        find "$out" -type f ! -name '*.sh' ! -name '*.jsonl.gz' ! -name report.html ! -name '*-latency.png' -delete
        ;;
      *) sed -n '2,4s/^# //p' "$0"; exit 2 ;;
    esac
  done
done
