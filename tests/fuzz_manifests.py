"""Mutated manifests: from a seed to a hostile text, and what the reader must still promise for it.

A case is one number; the same number always gives the same text:

    python -m tests.fuzz_manifests 4711        prints the text of case 4711 and checks it alone
"""

import copy
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dataplane.manifest_files import ManifestFiles
from dataplane.model import Cluster, ObjectName

META = {
    "name": "web",
    "namespace": "shop",
    "labels": {"app": "web"},
    "annotations": {"dataplane.io/weights": "10.0.0.1=2"},
}
SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {
        **META,
        "creationTimestamp": "2024-05-01T10:00:00Z",
        "annotations": {
            "dataplane.io/scheduler": "mh",
            "dataplane.io/scheduler-flags": "mh-port",
            "dataplane.io/drain-seconds": "15m",
        },
    },
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.10",
        "clusterIPs": ["10.96.0.10", "fd00::a"],
        "ports": [
            {"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080, "targetPort": 8080},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
        "externalIPs": ["192.0.2.1"],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "internalTrafficPolicy": "Local",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 32000,
        "loadBalancerSourceRanges": ["10.0.0.0/8", "fd00::/8"],
        "publishNotReadyAddresses": True,
    },
    "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9", "ipMode": "VIP"}, {"hostname": "lb.example"}]}},
}
SLICE: dict[str, Any] = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {**META, "name": "web-abc", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "", "port": 53, "protocol": "UDP"}],
    "endpoints": [
        {
            "addresses": [f"10.244.0.{i}"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": "node-1",
            "zone": "z1",
            "hostname": f"web-{i}",
            "hints": {"forZones": [{"name": "z1"}], "forNodes": [{"name": "node-1"}]},
        }
        for i in range(3)
    ],
}
ENDPOINTS: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Endpoints",
    "metadata": META,
    "subsets": [
        {
            "addresses": [{"ip": "10.244.0.1", "nodeName": "node-1", "hostname": "a"}, {"ip": "fd00::1"}],
            "notReadyAddresses": [{"ip": "10.244.0.2"}],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        }
    ],
}
LIST = {"apiVersion": "v1", "kind": "List", "items": [SERVICE, SLICE, ENDPOINTS]}
OTHER = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": META, "data": {"key": "line\nline\n"}}
OBJECTS = (SERVICE, SLICE, ENDPOINTS, LIST, OTHER)
HEALTHY = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "healthy"},
    "spec": {"clusterIP": "10.96.255.1", "ports": [{"port": 443}]},
}
YAML_TEXTS = tuple(yaml.safe_dump(each, sort_keys=False).encode() for each in OBJECTS)
JSON_TEXTS = tuple(json.dumps(each, indent=indent).encode() for each in OBJECTS for indent in (None, 1))

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 65536, 10**18, 10**30, -(10**30), 1.5, 1e308, "", " ", "x",
    "None", "no", "1:30", [], {}, [[]],
    [None], {"": None}, [1, 2], {"a": {"b": {"c": []}}}, "\x1b[31m", "\u202e", "\u2028", "\ufeff",
    "\x00", "ä" * 300, "a" * 5000,
    "127.0.0.1", "::ffff:127.0.0.1", "0.0.0.0", "010.1.1.1", "999.1.1.1", "fe80::1%eth0",
    "10.0.0.0/99", "1" * 400, "99999999h",
    "10.0.0.1=2," * 50, "List", "Service", "v1", "discovery.k8s.io/v1",
)  # fmt: skip
TOKENS = (
    b"---\n", b"...\n", b"- ", b": ", b"? ", b"|\n", b">-\n", b"'", b'"', b"[", b"]", b"{", b"}",
    b",", b"&a ", b"*a", b"!!str ",
    b"!<tag> ", b"<<: *a\n", b"<<: {a: 1}\n", b"%YAML 1.2\n", b"%TAG ! x\n", b"# ", b"\t", b"\r",
    b"\r\n", b"\n", b"\0", b"\x1b[2J",
    b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\xc2\x85", b"\xef\xbb\xbf",
    b"\\ud800", b"\\x", b"1e999", b"0x" + b"f" * 50,
    b".nan", b"-.inf", b"9" * 5000, b"NaN", b"true", b"null", b"kind: List\n", b"items:\n", b"@",
    b"`", b"\\", b"/*", b"=",
)  # fmt: skip
BOMBS = (
    lambda n: b"[" * n,
    lambda n: b"{a: " * n,
    lambda n: b"- " * n + b"x",
    lambda n: b"? " * n + b"x",
    lambda n: b"".join(b" " * i + b"a:\n" for i in range(min(n, 300))),
    lambda n: b'{"a":' * n + b"1" + b"}" * n,
    lambda n: b"a: &a [x]\n" + b"".join(b"b%d: &b%d [*a, *a, *a]\n" % (i, i) for i in range(min(n, 50))),
    lambda n: b"a: &a {x: 1}\n" + b"".join(b"m%d: &m%d\n  <<: [*a, *a]\n" % (i, i) for i in range(min(n, 50))),
    lambda n: b"a: 1\n" * n,
    lambda n: b"".join(b"x%d: {}\n" % i for i in range(min(n, 3000))),
    lambda n: b'"' + b"\\u0041" * n,
    lambda n: b"x" * n,
    lambda n: b"[" + b"1," * min(n, 5000) + b"1]",
    lambda n: b"---\n" * min(n, 300),
    lambda n: b"{}\n" * min(n, 300),
    lambda n: b"#" * n,
    lambda n: b" " * n + b"a",
    lambda n: b"\n" * n,
    lambda n: b"key: |9\n" + b" " * n,
    lambda n: b": " * min(n, 2000),
)


def base_text(seed: int) -> tuple[bytes, bool]:
    """The unharmed text a case starts from, and whether it is JSON."""
    rng = random.Random(seed)
    is_json = rng.random() < 0.35
    return rng.choice(JSON_TEXTS if is_json else YAML_TEXTS), is_json


def mutated(seed: int, is_json: bool) -> bytes:
    """The text of a case."""
    rng = random.Random(seed * 2 + is_json)
    texts = JSON_TEXTS if is_json else YAML_TEXTS
    if rng.random() < 0.4:
        text = _odd_field(rng, is_json)
        if rng.random() < 0.7:
            return text
    else:
        text = rng.choice(texts)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        text = _damaged(rng, text, texts)
    return text


def _odd_field(rng: random.Random, is_json: bool) -> bytes:
    """A well-formed text with a value of the wrong kind in any place of any object."""
    document = json.loads(json.dumps(rng.choice(OBJECTS)))
    for _ in range(rng.choice((1, 1, 2, 5))):
        node, key = {"": document}, ""
        places: list[tuple[Any, Any]] = [(node, key)]
        for parent, name in places:
            value = parent[name]
            places += [(value, k) for k in (value if isinstance(value, dict) else range(len(value)))] if isinstance(
                value, (dict, list)) else []  # fmt: skip
        parent, name = rng.choice(places[1:] or places)
        action = rng.random()
        if action < 0.15:
            del parent[name]
        elif action < 0.25 and isinstance(parent, dict):
            parent[str(rng.choice(ODD_VALUES))[:50]] = parent.pop(name)
        else:
            parent[name] = copy.deepcopy(rng.choice(ODD_VALUES))  # or an odd value would get into itself
        document = node.get("", {})
        if not isinstance(document, dict | list):
            break
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    return text.encode("utf-8", "surrogatepass")


def _damaged(rng: random.Random, text: bytes, texts: tuple[bytes, ...]) -> bytes:
    at = rng.randrange(len(text) + 1)
    match rng.randrange(9):
        case 0:  # flip bits
            damaged = bytearray(text)
            for _ in range(rng.randrange(1, 9)):
                if damaged:
                    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            return bytes(damaged)
        case 1:  # half written
            return text[:at]
        case 2:  # the end of one on the beginning of another
            other = rng.choice(texts)
            return text[:at] + other[rng.randrange(len(other)) :]
        case 3 | 4:
            return text[:at] + rng.choice(TOKENS) + text[at:]
        case 5:  # a line twice, a line less, lines in another order
            lines = text.splitlines(keepends=True) or [b""]
            index = rng.randrange(len(lines))
            moved = lines.pop(index)
            for _ in range(rng.randrange(3)):
                lines.insert(rng.randrange(len(lines) + 1), moved)
            return b"".join(lines)
        case 6:  # indentation
            lines = text.splitlines(keepends=True) or [b""]
            index = rng.randrange(len(lines))
            lines[index] = b" " * rng.randrange(9) + lines[index].lstrip(b" ")
            return b"".join(lines)
        case 7:
            bomb = rng.choice(BOMBS)(rng.choice((5, 33, 400, 400, 5000, 50_000 if rng.random() < 0.2 else 50)))
            return rng.choice((bomb, text + bomb, text[:at] + bomb + text[at:]))
        case _:  # a number or a word becomes something else
            return text.replace(rng.choice((b"80", b"web", b"v1", b"10", b"true", b":", b"  ")), rng.choice(TOKENS), 1)


class Tally(NamedTuple):
    """Figures of a run of cases: how many, seconds and bytes of the worst, cases with problems, failures."""

    cases: int
    slowest: float
    growth_kb: int
    reported: int
    failures: tuple[str, ...]


def memory_kb(name: str) -> int:
    """A figure of /proc/self/status: VmRSS, or VmHWM for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def run(first: int, count: int) -> Tally:
    """Cases `first` to `first + count`, one after another against the same two files of one source.

    One file holds a healthy object alone, the other the hostile text and a healthy object after it.
    """
    before = memory_kb("VmRSS")
    # The peak counts from here (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    slowest, reported = 0.0, 0
    failures: list[str] = []
    is_json = base_text(first)[1]
    with tempfile.TemporaryDirectory(prefix="fuzz-manifests-") as name:
        alone, shared = Path(name, "alone.yaml"), Path(name, "shared.json" if is_json else "shared.yaml")
        beside = (
            b"\n" + (b"" if is_json else b"---\n") + json.dumps(HEALTHY).encode().replace(b"healthy", b"beside") + b"\n"
        )
        alone.write_text(json.dumps(HEALTHY))
        shared.write_bytes(base_text(first)[0] + beside)
        files = ManifestFiles([name])
        files.read()
        expected = healthy(files.cluster())
        assert len(expected) == 2, (first, files.problems)
        for seed in range(first, first + count):
            shared.write_bytes(mutated(seed, is_json) + beside)
            begin = time.perf_counter()
            try:
                update = files.read()
            except BaseException as error:
                failures.append(f"case {seed}: {error!r}")
                break
            slowest = max(slowest, time.perf_counter() - begin)
            reported += bool(update.problems)
            if healthy(files.cluster()) != expected or healthy(dict.fromkeys(update.changed)):  # type: ignore[arg-type]
                failures.append(f"case {seed}: a healthy object was affected: {sorted(map(str, update.changed))}")
            for problem in update.problems:
                text = str(problem)
                if not text.isprintable() or "internal error" in text or len(text) > 5000:
                    failures.append(f"case {seed}: {text!r}")
                if problem.line > shared.read_bytes().count(b"\n") + 2 and b"\xe2\x80" not in shared.read_bytes():
                    failures.append(f"case {seed}: line {problem.line} is not in the file: {text!r}")
    growth = memory_kb("VmHWM") - before
    return Tally(count, slowest, growth, reported, tuple(failures[:5]))


def healthy(cluster: Cluster) -> Cluster:
    """The two objects that no mutation may touch."""
    names = (ObjectName("default", "healthy"), ObjectName("default", "beside"))
    return {name: cluster[name] for name in names if name in cluster}


if __name__ == "__main__":
    case = int(sys.argv[1])
    for kind in (False, True):
        sys.stdout.write(f"{'JSON' if kind else 'YAML'}: {mutated(case, kind)[:2000]!r}\n")
    sys.stdout.write(f"{run(case, 1)}\n")
