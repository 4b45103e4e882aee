"""How the demo ends: the agent stops, traffic goes on, and what is cleaned up leaves nothing."""

import contextlib
import signal
import time
from pathlib import Path

from . import live_hits
from .page import shares
from .play import Play


def stop_and_clean(play: Play) -> None:
    page = play.page
    live_hits.sum_up(play)
    page.step("The agent stops, traffic goes on, and cleaning up")
    page.prose(
        "The kernel does the work, so it goes on without the agent: an update or a crash of the agent cuts nobody."
    )
    play.stop()
    answers = play.ask("client", 2)
    page.claim("the Service works without it", all(answer in play.names for answer in answers), shares(answers))
    page.prose("Only `dataplane cleanup` takes everything away, and no more than what is ours.")
    play.command("node", "dataplane cleanup --all")
    play.command("node", "iptables-save | grep KUBE-", status=1)
    page.ok("no chain of ours is left")
    play.command("node", "ip addr show kube-ipvs0", ends_with="does not exist.", status=1)
    table = play.command("node", "ipvsadm -ln")
    page.claim("IPVS is empty", "->" not in table.partition("ActiveConn")[2], "the table above is not empty")
    play.command("node", "nft list tables | grep dataplane", status=1)
    page.ok("no nftables table of ours is left")


def stay(play: Play) -> None:
    """Until a signal comes."""
    prefix = play.stage.prefix
    play.page.prose(
        f"Everything keeps running until Ctrl-C. From another terminal: `ip netns exec {prefix}-client curl "
        f"{play.url}`, `ip netns exec {prefix}-node ipvsadm -ln`; the manifest is {play.manifest}."
    )
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


def gone(play: Play) -> None:
    """The stage is down: say so, if it is so."""
    left = [each.name for each in Path("/run/netns").glob(f"{play.stage.prefix}-*")]
    play.page.claim("the namespaces of the demo are gone too", not left, ", ".join(left))
    play.page.prose(
        f"That was all, in {time.monotonic() - play.started:.0f} seconds. Next: `dataplane doctor` checks this "
        "machine, `dataplane diff -f FILE` shows what a manifest would change, `dataplane run -f FILE` does it."
    )
