"""Whether hits per backend can be counted by the probe: it is attached, for a moment, in a child process."""

import time
from collections.abc import Iterator

from ..bpf.probe_start import ProbeStart
from ..configuration import Configuration
from ..errors import ProbeUnavailable
from .check import Check

OWN_COUNTERS = {
    "ipvs": "the connection counters of IPVS",
    "nftables": "the counters of the endpoints' map elements",
    "iptables": "the packet counters of the endpoints' rules",
}
"""By mode: what is shown in place of the probe's counts."""


def try_probe(settings: Configuration) -> Iterator[Check]:
    """Which hooks attach, and how; or why none does, and what is shown then. No failure: traffic needs no probe."""
    began = time.monotonic()
    instead = f"hits are {OWN_COUNTERS[settings.mode]}"
    try:
        with ProbeStart() as start, start.finish() as hits:
            attached, refusals, enough = ", ".join(hits.hooks), hits.refusals, hits.counts(settings.mode)
    except ProbeUnavailable as error:
        fix = "apt-get install python3-bpfcc" if "python3-bpfcc" in error.reason else ""
        yield Check("probe", "warn", f"cannot be attached, so {instead}: {error.reason}", fix)
        return
    detail = f"{attached}; compiled and attached in {time.monotonic() - began:.1f} s"
    lacks = f"; not {'; '.join(refusals)}" if refusals else ""
    if not enough:
        yield Check("probe", "warn", f"{detail}{lacks}, so {instead}")
    elif "kretprobe" in attached:
        yield Check("probe", "warn", f"{detail}{lacks}; kretprobes may lose hits beside other tracers")
    else:
        yield Check("probe", "ok", detail + lacks)
