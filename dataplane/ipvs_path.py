"""The way of a packet in the words of ipvs mode: sets of the guard table, and the IPVS server that decides. Pure."""

from collections.abc import Iterator, Mapping

from .ipvsadm_text import server_rule
from .model import Kind, Masquerade, Protocol, VirtualAddress, VirtualServer, format_address
from .nft_clients import Clients
from .walk import Detection, Stage, Walk


def objects(
    walked: Walk, marks: Mapping[VirtualAddress, int], detection: Detection, device: str
) -> dict[Stage, tuple[str, ...]]:
    """What decides at each stage. `marks`: firewall marks of servers for clients inside; `device`: what binds VIPs."""
    question = walked.question
    at, outer, server = question.at, walked.outer, walked.server
    node = question.client.node
    suffix = 4 if len(at.address) == 4 else 6
    key = f"{format_address(at.address)} . {Protocol(at.protocol).name.lower()} . {at.port}"
    first, second = ("output_vips", "output_vips") if node else ("prerouting_external", "input_ipvs")
    found: dict[Stage, tuple[str, ...]] = {}
    if outer is not None and outer.allowed:
        found[Stage.SOURCES] = (
            f"chain {first}: ranged{suffix} {{ {key} }}",
            *(f"chain {first}: allowed{suffix} {{ {key} . {each} }}" for each in outer.allowed),
        )
    if server is None:
        found[Stage.SERVER] = (f"IPVS has no server {Protocol(at.protocol).name} {key.partition(' ')[0]}:{at.port}",)
    else:
        found[Stage.SERVER] = tuple(_server(server, outer, key, suffix, first, device))
        if server.at.inside:
            mark = marks.get(server.at, 0)
            found[Stage.INSIDE] = (
                f"chain {second}: inside{suffix} {{ {key} }}{'' if node else f', jump insiders{suffix}'}",
                f"chain lookup_inside{suffix}: inside_marks{suffix} {{ {key} : {mark:#010x} }}",
                f"IPVS server by mark: {_without_verb(server_rule('-A', server, mark))}",
            )
        else:
            found[Stage.INSIDE] = (f"chain {second}: inside{suffix} {{ {key} }}, which comes back",)
        found[Stage.NO_ENDPOINTS] = tuple(_empty(walked, server, key, suffix, first, second))
        found[Stage.CHOICE] = (f"IPVS scheduler {server.scheduler}",)
        found[Stage.AFFINITY] = ("IPVS persistence (templates in /proc/net/ip_vs_conn)",)
        found[Stage.MASQUERADE] = tuple(_masquerade(walked, server, key, suffix, detection))
    found[Stage.CLOSED] = (
        f"chain input_vips: vips{suffix} {{ {format_address(at.address)} }}, goto closed_ports",
        f"chain closed_ports: servers{suffix} has no such key",
    )
    hook = "output_vips" if node else "forward_unallocated"
    found[Stage.UNALLOCATED] = tuple(
        f"chain {hook}: {rule.partition(' comment')[0]}" for rule in Clients.of(detection).unallocated()
    )
    return {stage: texts for stage, texts in found.items() if stage in walked.stages()}


def _without_verb(rule: str) -> str:
    return rule.partition(" ")[2]


def _server(
    server: VirtualServer, outer: VirtualServer | None, key: str, suffix: int, first: str, device: str
) -> Iterator[str]:
    """How the packet gets to IPVS, and the server there."""
    if server.bound:
        yield f"{device} holds {format_address(server.at.address)}"
        yield f"chain closed_ports: servers{suffix} {{ {key} }}, on to IPVS"
    elif server.kind is not Kind.NODE_PORT:
        yield f"chain {first}: external{suffix} {{ {key} }}, mark 0xda600000, delivered by ip rule 86"
    if outer is not None:
        yield f"IPVS server {_without_verb(server_rule('-A', outer, 0))}"


def _empty(walked: Walk, server: VirtualServer, key: str, suffix: int, first: str, second: str) -> Iterator[str]:
    external = not server.bound and server.kind is not Kind.NODE_PORT
    if walked.verdict.value == "dropped":
        yield f"chain {second}: dropped{suffix} {{ {key} }}"
    elif external:
        yield f"chain {first}: refused{suffix} {{ {key} }}"
    else:
        yield "IPVS has no real server for it, and says so (ICMP)"


def _masquerade(walked: Walk, server: VirtualServer, key: str, suffix: int, detection: Detection) -> Iterator[str]:
    yield f"chain postrouting_vips: servers{suffix} {{ {key} }}, goto masquerade_clients"
    client = walked.question.client.address
    if any(target.real.address == client and target.masquerade for target in walked.targets):
        yield f"chain masquerade_clients: hairpin{suffix} {{ {format_address(client)} . {format_address(client)} }}"
    if server.masquerade is Masquerade.DETECT:
        for rule in Clients.of(detection).masquerade():
            yield f"chain masquerade_clients: {rule.partition(' comment')[0]}"
    else:
        chain = "masquerade_always" if server.masquerade is Masquerade.ALWAYS else "masquerade_node"
        yield f"chain masquerade_clients: exceptions{suffix} {{ {key} : goto {chain} }}"
