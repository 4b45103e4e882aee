"""The demo's act of names: the agent answers for the Services it makes, behind a Service of its own."""

from .other_acts import REQUESTS
from .page import quoted, shares
from .play import Play
from .stage import NODE, PACKAGE

KUBE_DNS = PACKAGE.parent / "examples" / "kube-dns.yaml"
VIP = "10.0.0.10"
RESOLV = f"nameserver {VIP}\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
NAME = "hostnames.default.svc.cluster.local"


def names(play: Play) -> None:
    """In the mode that is here."""
    page = play.page
    page.step("Services have names")
    page.prose(
        f"Nobody remembers {play.url}. The agent answers for the Services it knows, as CoreDNS does in a cluster; and "
        f"kube-dns, at {VIP}, is a Service like any other, whose endpoint is the agent. It starts with one file more:"
    )
    assert play.stage.folder is not None
    (play.stage.folder / "kube-dns.yaml").write_text(KUBE_DNS.read_text())
    play.stop()
    play.launch("nftables", more=f"-f kube-dns.yaml --dns {NODE}:53", servers=3)
    resolv = play.stage.folder / "resolv.conf"
    resolv.write_text(RESOLV)
    try:
        page.prose("The client's resolver is that of a pod:")
        told = play.command("client", "cat /etc/resolv.conf")
        page.claim("as a kubelet writes it", told == RESOLV, quoted(told), quiet=True)
        address = play.command("client", f"getent hosts {NAME}").split()
        page.claim("the name has the cluster IP", address == [play.tutorial.vip, NAME], quoted(" ".join(address)))
        answers = [
            play.command("client", f"curl -sS -m 10 http://{name}").strip()
            for name in (NAME, "hostnames.default", "hostnames")
        ]
        page.claim(
            "pods answer, by the full name and by short ones", set(answers) <= play.names.keys(), shares(answers)
        )
        loop = f"for i in $(seq {REQUESTS}); do curl -sS -m 10 http://{NAME}; done | sort | uniq -c"
        lines = play.command("client", loop).splitlines()
        told_names = {line.split()[1] for line in lines}
        page.claim("every pod, since the name leads to the Service", told_names == play.names.keys(), str(lines))
        explained = play.command("node", "dataplane dns query hostnames")
        page.claim("and how the answer came about", play.tutorial.vip in explained, quoted(explained), quiet=True)
    finally:
        resolv.unlink()
