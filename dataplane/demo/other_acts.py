"""The demo's acts of nftables and iptables mode: each takes over while a client downloads, and shows its rules."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import live_hits
from .ipvs_act import fresh_lines, real_lines
from .page import quoted
from .play import REACTION_SECONDS, Play
from .stage import ended
from .tutorial import without_endpoint

REQUESTS = 40
"""That a pod gets none of them happens once in three million plays."""
CHAIN = "KUBE-SVC-NWV5X2332I4OT4T3"
"""Of default/hostnames in every tutorial: a hash of its name and protocol."""
ENDPOINTS = "nft list map inet dataplane-nftables endpoints4"
STEPS = "grep -o switch.* agent.log"


def nftables(play: Play) -> None:
    """From ipvs, which has to drain."""
    page = play.page
    page.step("Another way: nftables mode takes over")
    page.prose(
        "Everything so far was IPVS. The agent can do the same with netfilter alone, by the maps of an nftables table. "
        "All pods are back in the file, a client downloads, and the agent is replaced by one in another mode:"
    )
    play.manifest.write_text(play.tutorial.text)
    names = set(play.names.values())
    play.wait(
        "ipvsadm -ln",
        lambda table: {name for name, line in real_lines(table).items() if line.weight} == names,
        "all pods are back",
    )
    with _download(play) as (download, pod):
        play.stop()
        play.launch("nftables")
        play.wait("cat agent.log", lambda text: "draining" in text, "ipvs mode drains")
        steps = play.command("node", STEPS)
        places = [steps.find(word) for word in ("found", "verified", "draining")]
        page.claim("first the new mode, then the old one: at no time none", places == sorted(places), quoted(steps))
        _goes_on(play, download, pod, "the download goes on, through IPVS, which takes no new connections")
    tally = play.tally(REQUESTS)
    page.claim("every pod answers; the choice is random now", tally.keys() == play.names.keys(), str(tally))
    page.prose("The rules of the table are constant. A Service is elements of maps, each with a counter:")
    listed = play.command("node", ENDPOINTS)
    counted = {f"{address}:{port}": int(packets) for packets, address, port in _ELEMENT.findall(listed)}
    page.claim("they counted what the client was told", counted == _by_server(play, tally), str(counted))
    live_hits.show(play, "nftables")
    _leaves_and_returns(play, ENDPOINTS, lambda server: server.replace(":", " . "))
    page.prose(
        "IPVS remembers the download's closed connection for a while; at the latest after --drain-seconds "
        f"({play.drain_seconds}) its servers and kube-ipvs0 go."
    )
    play.wait("cat agent.log", lambda text: "step=removed" in text, "ipvs mode goes", play.drain_seconds)
    play.command("node", "ip addr show kube-ipvs0", ends_with="does not exist.", status=1)
    page.ok("ipvs mode is gone")


_RULE = re.compile(r"^\[(\d+):\d+\] -A KUBE-SEP-.* --to-destination (\S+)$", re.MULTILINE)
_ELEMENT = re.compile(r"counter packets (\d+) bytes \d+ : (\S+) \. (\d+)")


def iptables(play: Play) -> None:
    """From nftables, whose connections conntrack keeps."""
    page = play.page
    page.step("And the oldest way: iptables mode")
    page.prose(
        "Once more, with the chains of the tutorials. What nftables rewrote conntrack goes on rewriting, so the old "
        "mode can go at once."
    )
    with _download(play) as (download, pod):
        play.stop()
        play.launch("iptables")
        play.wait("cat agent.log", lambda text: "step=removed" in text, "nftables mode goes")
        play.command("node", STEPS)
        page.claim("nftables mode is gone", "dataplane" not in play.look("nft list tables"), "its table is still there")
        _goes_on(play, download, pod, "the download goes on")
    rules = play.command("node", "iptables-save -t nat | grep hostnames")
    page.claim(
        f"the tutorial's {CHAIN}, with a third, a half of the rest, and the rest",
        rules.count(f"-A {CHAIN} ") == 3 and "probability 0.3333" in rules and "probability 0.5000" in rules,
        "the rules above are others",
    )
    tally = play.tally(REQUESTS)
    page.claim("every pod answers", tally.keys() == play.names.keys(), str(tally))
    shown = play.command("node", "iptables-save -c -t nat | grep DNAT")
    counted = {server: int(count) for count, server in _RULE.findall(shown)}
    page.claim("and the rules counted the same", counted == _by_server(play, tally), str(counted))
    live_hits.show(play, "iptables")
    _leaves_and_returns(play, "iptables-save -t nat", str)


def _by_server(play: Play, tally: dict[str, int]) -> dict[str, int]:
    return {play.names[name]: count for name, count in tally.items()}


@contextmanager
def _download(play: Play) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A client downloads; the download has to be complete in the end. Yields it and the pod that it is from."""
    page = play.page
    play.stage.curtain.clear()
    command = f"curl -sN {play.url}/stream"
    page.command("client", f"{command} &")
    download = play.stage.start("client", command.split())
    with ended(download):
        assert download.stdout is not None
        first = download.stdout.readline()
        page.text(first)
        pod = first.split(" ")[0]
        page.claim("a pod answers", pod in play.names, quoted(first), quiet=True)
        yield download, pod
        play.stage.curtain.set()
        rest = download.communicate(timeout=REACTION_SECONDS)[0]
        whole = rest.endswith(f"{pod} end\n") and not download.returncode
        page.claim("the download was complete", whole, quoted(rest[-200:]))


def _goes_on(play: Play, download: "subprocess.Popen[str]", pod: str, claim: str) -> None:
    more = fresh_lines(download, play.stage.lines_sent)
    play.page.text(more[-1])
    play.page.claim(claim, more[-1].startswith(f"{pod} line "), quoted("".join(more)))


def _leaves_and_returns(play: Play, look: str, printed: Callable[[str], str]) -> None:
    """One pod leaves the file and comes back; `printed`: how `look` prints a server."""
    page, pod = play.page, play.tutorial.pods[0]
    server = play.names[pod.hostname]
    page.prose(f"{server} leaves the file, and comes back:")
    play.manifest.write_text(without_endpoint(play.tutorial.text, pod.address))
    play.wait(look, lambda text: printed(server) not in text, f"{server} goes")
    tally = play.tally(REQUESTS // 2)
    page.claim("new requests avoid it", tally.keys() == play.names.keys() - {pod.hostname}, str(tally))
    play.manifest.write_text(play.tutorial.text)
    play.wait(look, lambda text: printed(server) in text, f"{server} comes back")
    page.ok("it is back")
