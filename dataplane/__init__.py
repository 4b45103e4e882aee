"""dataplane: Kubernetes-style Services in the Linux kernel, and a way to see through them."""

__version__ = "0.1.0"
