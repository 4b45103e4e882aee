"""Hits per backend, counted in the kernel by BPF programs, in every mode.

`ProbeStart` (probe_start.py) compiles and attaches the programs in a child process; what it hands over, descriptors, is
a `DnatHits` (dnat_hits.py), which reads counters out of memory shared with the kernel. All of it dies with its process.
Nothing is imported here: the child loads only what it needs.
"""
