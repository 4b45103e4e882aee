"""Service DNS: names of the Services and endpoints the agent knows (Kubernetes DNS specification 1.1.0).

    objects ──▶ records ──▶ wire ──▶ answers ──▶ server
    Services    what a      bytes,   prepared    UDP in batches, TCP, limits,
    by name     name has    once     bytes       upstreams

`records` is pure and decides everything; `answers` keeps the bytes of what was asked, so that the codec (dnspython)
runs once for each name and change, and a query costs a look into a dictionary.
"""
