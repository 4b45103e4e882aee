"""What each of the demo's modes shows of its traffic: hits per pod, live, and together in the end."""

import json
from typing import Any

from ..prober import COMPILING
from .play import Play, dataplane
from .stage import ended

REQUESTS = 60
PROBE_SECONDS = 120
"""How long a probe may take to be compiled; two seconds are the rule, but an emulated machine is slow."""


def show(play: Play, mode: str) -> None:
    """The client asks, the node looks, and both must have counted the same."""
    page = play.page
    page.prose(
        "Who gets the traffic? Where the kernel allows it, the agent has put a BPF probe on the kernel's own function "
        "that chooses a pod; otherwise the mode's own counters count. The client keeps asking, and we look twice:"
    )
    play.wait(" ".join(dataplane("counters -o json")), lambda text: COMPILING not in text, "a probe", PROBE_SECONDS)
    before = _hits(play)
    asking = f"for i in $(seq {REQUESTS}); do curl -sS -m 10 {play.url}; sleep 0.05; done | sort | uniq -c"
    page.command("client", f"({asking}) &")
    client = play.stage.start("client", ["sh", "-c", asking])
    with ended(client):
        play.command("node", "dataplane counters -n 2 --interval 1")
        answers = client.communicate(timeout=PROBE_SECONDS)[0]
    page.text(answers)
    tally = {play.names[name]: int(count) for count, name in (line.split() for line in answers.splitlines())}
    look = _look(play)
    hits = {server: count - before.get(server, 0) for server, count in _by_server(look).items()}
    page.claim("every connection was counted, each at its pod", hits == tally, f"{hits}, and the client says {tally}")
    missed = sum(look["counts"]["missed"].values())
    page.claim("and nothing was missed", missed == 0, str(look["counts"]), quiet=True)
    play.hits[mode] = (look["counts"]["source"], hits)


def sum_up(play: Play) -> None:
    """The three modes beside each other."""
    page = play.page
    page.prose(f"The {REQUESTS} requests that each mode was watched at, pod by pod, and who counted them:")
    lines = [["mode", "counted by", *play.names.values()]]
    for mode, (source, hits) in play.hits.items():
        lines.append([mode, source, *(str(hits.get(server, 0)) for server in play.names.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    page.text("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines))
    whole = all(sum(hits.values()) == REQUESTS for _, hits in play.hits.values())
    page.claim("all of them, in all three modes", len(play.hits) == 3 and whole, str(play.hits))


def _look(play: Play) -> Any:
    return json.loads(play.look(" ".join(dataplane("counters -o json"))))


def _by_server(look: Any) -> dict[str, int]:
    return {each["backend"]: each["hits"] or 0 for service in look["services"] for each in service["backends"]}


def _hits(play: Play) -> dict[str, int]:
    return _by_server(_look(play))
