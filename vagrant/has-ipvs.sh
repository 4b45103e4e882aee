#!/bin/bash
# Exit 0 when the running kernel can hold IPVS services and dummy devices here, 1 when it cannot (-v says which is missing).
# Decided by trying: versions, /proc/modules and kernel configs all lie (built-in, modules not installed, containers).
set -u
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
say() { if [ "${1:-}" != -v ]; then return; fi; shift; echo "has-ipvs: $*" >&2; }
[ "$(id -u)" = 0 ] || { say "${1:-}" "not root"; exit 1; }
modprobe -qa ip_vs dummy 2>/dev/null || true # a built-in or a namespace's kernel needs none, so the tries below decide
unshare -n ip link add dataplane-try type dummy 2>/dev/null || { say "${1:-}" "no dummy device"; exit 1; }
unshare -n genl ctrl get name IPVS >/dev/null 2>&1 || { say "${1:-}" "no IPVS netlink family"; exit 1; }
