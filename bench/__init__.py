"""Benchmarks: what this program costs beside the least the kernel asks for, and beside the usual tools.

`python -m bench` measures; see README.md for what is compared with what, and how to read the table.
"""
