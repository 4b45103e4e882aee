"""The demo's tour of ipvs mode: the tutorial's tables, requests, easily forgotten cases, a pod that drains."""

import re
import subprocess
import time
from collections import Counter
from typing import NamedTuple

from . import live_hits
from .page import difference, number, quoted, shares
from .play import REACTION_SECONDS, Play
from .stage import CLIENT, NODE, ended
from .tutorial import without_endpoint


class RealLine(NamedTuple):
    """One real server in `ipvsadm -ln`."""

    weight: int
    active: int
    inactive: int


def real_lines(table: str) -> dict[str, RealLine]:
    """Real servers in the output of `ipvsadm -ln`, by address:port."""
    rows = re.findall(r"^  -> (\S+:\d+)\s+Masq\s+(\d+)\s+(\d+)\s+(\d+)", table, re.MULTILINE)
    return {server: RealLine(int(weight), int(active), int(inactive)) for server, weight, active, inactive in rows}


def show_machines(play: Play) -> None:
    page, pods = play.page, play.tutorial.pods
    page.step(f"A node, {number(len(pods))} pods and a client")
    page.prose(
        "Each pod runs a web server that answers with the pod's own name. The client is outside of the cluster, "
        "and the node is its gateway. Asked directly, every pod answers."
    )
    page.text(
        "\n".join(
            [
                f"client {CLIENT} ---- {NODE} node ---+--- pod1 {pods[0].address}:{pods[0].port}",
                *(
                    f"{'':{len(f'client {CLIENT} ---- {NODE} node ---')}}+--- pod{number} {pod.address}:{pod.port}"
                    for number, pod in enumerate(pods[1:], 2)
                ),
            ]
        )
    )
    for pod in pods:
        answer = play.command("client", f"curl -sS -m 10 {pod.address}:{pod.port}")
        page.claim(f"it is {pod.hostname}", answer.strip() == pod.hostname, f"it said {quoted(answer)}", quiet=True)
    page.ok("all of them answer")


def show_manifest(play: Play) -> None:
    page, tutorial = play.page, play.tutorial
    page.step("The Service, as Kubernetes writes it")
    page.prose(
        f"A Service is a promise: who connects to {tutorial.vip}:{tutorial.port} reaches one of the pods. The "
        "EndpointSlice lists them. No machine has that address yet, so for now nobody can reach it."
    )
    play.manifest.write_text(tutorial.text)
    play.command("node", "grep -v '^#' hostnames.yaml")
    play.command("client", f"curl -sS -m 5 {play.url}", status=7)
    page.ok("nobody can")


def start_agent(play: Play) -> None:
    page, vip = play.page, play.tutorial.vip
    page.step("The agent writes it into the kernel")
    page.prose(
        "The agent reads the manifest, watches it from now on, and programs IPVS, the load balancer inside Linux. "
        "It carries no traffic itself. First it makes the address the node's own, on a dummy device that stays "
        "DOWN: enough for the kernel to take the packets in."
    )
    play.launch("ipvs")
    links = play.command("node", "ip addr show kube-ipvs0")
    page.claim(
        f"kube-ipvs0 holds {vip}, and is DOWN",
        f"inet {vip}/32 scope global kube-ipvs0" in " ".join(links.split()) and "state DOWN" in links,
        "the output above says otherwise",
    )
    page.prose(
        "Then it adds a virtual server with a scheduler (rr: round robin, each in turn) and the pods as its real "
        "servers. Masq: the packet's destination address is replaced by the pod's, and back in the answer."
    )
    table = play.command("node", "ipvsadm -ln")
    page.claim(
        f"one virtual server with {number(len(play.names))} real servers of weight 1",
        f"TCP  {vip}:{play.tutorial.port} rr\n" in table
        and real_lines(table) == dict.fromkeys(play.names.values(), RealLine(1, 0, 0)),
        "the table above is another one",
    )


def spread_requests(play: Play) -> None:
    page = play.page
    count = 3 * len(play.names)
    page.step("Requests are spread")
    page.prose(
        f"The client asks the Service {number(count)} times. The scheduler takes the next pod for each new "
        "connection; within a connection every packet goes to the same pod."
    )
    answers = play.ask("client", count)
    page.claim(
        f"{' + '.join(['3'] * len(play.names))}: every pod got the same share",
        Counter(answers) == dict.fromkeys(play.names, 3),
        shares(answers),
    )
    live_hits.show(play, "ipvs")


def other_ways(play: Play) -> None:
    page, vip = play.page, play.tutorial.vip
    page.step("Three cases that are easily forgotten")
    page.prose(
        f"A port that no Service has. Without care the node itself would answer, as {vip} is its own address now; "
        "the agent's nftables table refuses it at once."
    )
    play.command("client", f"curl -v -m 5 {vip}:81 2>&1 | grep failed", ends_with="failed: Connection refused")
    page.ok("refused at once, not left waiting")
    page.prose("A process on the node itself, whose packets never arrive from outside:")
    answers = play.ask("node", 1)
    page.claim("the node reaches a pod", answers[0] in play.names, quoted(answers[0]))
    page.prose(
        "And a pod that meets itself behind the Service (hairpin). Its source address has to be replaced, or it "
        "would answer itself directly and never recognise the connection."
    )
    answers = play.ask("pod1", len(play.names))
    page.claim(
        f"pod1 reaches every pod, itself ({play.tutorial.pods[0].hostname}) included",
        sorted(answers) == sorted(play.names),
        shares(answers),
    )


def drain(play: Play) -> None:
    page = play.page
    page.step("A pod leaves while somebody is connected to it")
    page.prose("The client starts a download that does not stop by itself, and IPVS gives it to a pod:")
    command = f"curl -sN {play.url}/stream"
    page.command("client", f"{command} &")
    download = play.stage.start("client", command.split())
    with ended(download):
        assert download.stdout is not None
        first = download.stdout.readline()
        page.text(first)
        pod = first.split(" ")[0]
        page.claim("a pod answers", pod in play.names, quoted(first), quiet=True)
        _drain(play, pod, download)


def _drain(play: Play, pod: str, download: "subprocess.Popen[str]") -> None:
    page, server = play.page, play.names[pod]
    others = [name for name in play.names if name != pod]
    page.prose(
        f"Now this very pod, {server}, is taken out of the file. The agent sees the file change and sets the pod's "
        "weight to 0: no new connections, and those it has may go on."
    )
    edited = without_endpoint(play.tutorial.text, server.partition(":")[0])
    page.command("node", "editor hostnames.yaml")
    page.text(difference(play.tutorial.text, edited))
    play.manifest.write_text(edited)
    removed = time.monotonic()
    play.wait("ipvsadm -ln", lambda table: real_lines(table)[server].weight == 0, f"{server} gets weight 0")
    table = play.command("node", "ipvsadm -ln")
    lines = real_lines(table)
    page.claim("weight 0, and its connection is still there", lines[server][:2] == (0, 1), "the table differs")
    answers = play.ask("client", 3 * len(others))
    page.claim("new requests avoid it", Counter(answers) == dict.fromkeys(others, 3), shares(answers))
    more = fresh_lines(download, play.stage.lines_sent)
    page.text("".join(more[-2:]))
    page.claim("the download goes on", more[-1].startswith(f"{pod} line "), quoted("".join(more)))
    page.prose(
        "The download ends. IPVS remembers a closed connection for two minutes (InActConn), in case packets are "
        f"late, and the agent lets it; but not for longer than --drain-seconds, which is {play.drain_seconds} here "
        "(and 900 otherwise). Then the real server goes."
    )
    play.stage.curtain.set()
    rest = download.communicate(timeout=REACTION_SECONDS)[0]
    page.text(rest.splitlines()[-1])
    page.claim("the download was complete", rest.endswith(f"{pod} end\n") and not download.returncode, quoted(rest))
    play.wait("ipvsadm -ln", lambda table: server not in real_lines(table), f"{server} goes", play.drain_seconds)
    waited = time.monotonic() - removed
    table = play.command("node", "ipvsadm -ln")
    page.claim(
        f"{server} is gone, {waited:.0f} s after it left the file",
        real_lines(table).keys() == {play.names[name] for name in others},
        "the table differs",
    )


def show_own_view(play: Play) -> None:
    page = play.page
    page.step("The agent's own view")
    page.prose(
        "The same from the kernel, with the names that IPVS does not know. They, and the proof that a virtual "
        "server is ours, stand in the agent's nftables table; other people's servers are left alone."
    )
    shown = play.command("node", "dataplane show")
    left = [server for server in play.names.values() if server in real_lines(play.look("ipvsadm -ln"))]
    page.claim(
        "the Service is named, with the pods that are left",
        "hostnames" in shown and all(server in shown for server in left) and len(left) == len(play.names) - 1,
        "the output above says otherwise",
    )


def fresh_lines(download: "subprocess.Popen[str]", sent: int) -> list[str]:
    """Lines of the download up to the second that the pod sends from now on, `sent` being what it sent so far."""
    assert download.stdout is not None
    lines: list[str] = []
    while not lines or (lines[-1] and int(lines[-1].split()[-1]) < sent + 2):
        lines.append(download.stdout.readline())
    return lines
