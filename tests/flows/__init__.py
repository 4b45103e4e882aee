"""Conformance by packets: `python -m tests.flows --mode nftables FILE…` plays cases and compares what packets do.

One network namespace is the node. Two TUN devices lead out of it, and the runner holds their other ends: `pods0` with
all endpoints and pods behind it, and `world0`, the default route. So it sends raw packets with any source address and
sees each packet exactly as it left the node, without neighbours, timing or sockets of the protocol (SCTP). Packets of
the node itself come from raw sockets, and raw sockets see what is delivered on the node.

What counts as what:

* dnat: it came out with another destination. Each endpoint seen then answers, and the client must get that answer from
  the address that it asked. masquerade: it came out with a source of the node's own in place of its own.
* none: it came out as it went in, routed on or delivered on the node (also where the node's kernel then refuses it for
  want of a listener: that is no rule's doing).
* reject: it came out nowhere, and the sender got a TCP reset, an SCTP abort or an ICMP error that means it: port
  unreachable, administratively prohibited. Other ICMP errors (no route) are never right.
* drop: it came out nowhere, and nobody said anything; a packet sent behind it on the same way did come out. The node's
  own `send` fails with EPERM whenever netfilter ends a packet on the output hook, silently or with a refusal, so that
  is no news: whether the node heard a refusal tells reject from drop.

    cases ──▶ running ──▶ agent     (the objects as a manifest file, through Reconciler and Backend)
                     ├──▶ world     (packets out and in, on the real kernel)
                     ├──▶ judging   (expected against seen)
                     └──▶ facts     (health checks, conntrack, metrics, affinity, chain names)
"""
