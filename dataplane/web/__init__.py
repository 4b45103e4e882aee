"""The web server beside the agent: Prometheus metrics and a page to watch, on loopback (`dataplane web`).

agent ◀── control socket ── viewing ──▶ metrics   what Prometheus reads
      one look a second at most     └──▶ page      what a browser is told, by server-sent events
                                          ▲
                    application: routes, and who may ask; serving: the process
"""
