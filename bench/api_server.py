"""A Kubernetes API server for the agent that is measured, as a process of its own: `python -m bench.api_server SIZE`.

It holds SIZE Services with their EndpointSlices, as a real server gives them (with uid, ownerReferences, managedFields,
targetRef: what a client has to read past), lists them in pages and watches. Every answer is made beforehand, so that
its time is not measured for the agent's. It prints its port; a line `N M` on its input replaces the first endpoint of
Service N for the Mth time and answers with the moment of CLOCK_MONOTONIC at which the event was sent; `N` Services
with `all` before it: one change of each of the first N, in as few packets as it takes.
"""

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dataplane.model import format_address

from . import workload

SERVICES, SLICES = "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices"
OTHERS = {
    "/api/v1/nodes": ("NodeList", "v1"),
    "/apis/networking.k8s.io/v1/servicecidrs": ("ServiceCIDRList", "networking.k8s.io/v1"),
}
CREATED = "2026-05-07T09:12:44Z"
FIRST = 1_000_000
"""resourceVersion of the lists."""


def metadata(name: str, number: int, version: int, manager: str, owned: object) -> dict[str, Any]:
    """What an API server adds."""
    return {
        "name": name,
        "namespace": "bench",
        "uid": f"6f1d8e0a-3c1b-4d55-9f4e-{number:012x}",
        "resourceVersion": str(version),
        "generation": 1,
        "creationTimestamp": CREATED,
        "managedFields": [
            {
                "manager": manager,
                "operation": "Update",
                "apiVersion": "v1",
                "time": CREATED,
                "fieldsType": "FieldsV1",
                "fieldsV1": owned,
            }
        ],
    }


def service(number: int) -> dict[str, Any]:
    """A Service as `kubectl get -o json` prints it."""
    name, address = f"service-{number}", format_address(workload.vip(number))
    owned: dict[str, Any] = {
        "f:spec": {"f:ports": {".": {}, 'k:{"port":80,"protocol":"TCP"}': {".": {}}}, "f:selector": {}}
    }
    return {
        "metadata": metadata(name, number, number + 1, "kubectl-create", owned) | {"labels": {"app": name}},
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
            "selector": {"app": name},
            "clusterIP": address,
            "clusterIPs": [address],
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(number: int, replaced: int = 0, version: int = 0) -> dict[str, Any]:
    """Its EndpointSlice."""
    name = f"service-{number}"
    (piece,) = workload.view(number, replaced=replaced).slices
    owned: dict[str, Any] = {
        "f:addressType": {},
        "f:endpoints": {},
        "f:metadata": {"f:labels": {".": {}}},
        "f:ports": {},
    }
    meta = metadata(piece.name.name, number, version or number + 1, "kube-controller-manager", owned)
    return {
        "metadata": {
            **meta,
            "generateName": f"{name}-",
            "labels": {
                "app": name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": name,
            },
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": CREATED},
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "Service", "name": name, "uid": meta["uid"], "controller": True}
            ],
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [format_address(each.address)],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "targetRef": {"kind": "Pod", "namespace": "bench", "name": f"{name}-{index}", "uid": meta["uid"]},
                "nodeName": each.node,
                "zone": "zone-a",
            }
            for index, each in enumerate(piece.endpoints)
        ],
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
    }


class Server:
    """Lists that stay as they were, and events."""

    def __init__(self, size: int) -> None:
        self._lists = {
            SERVICES: ("ServiceList", "v1", [json.dumps(service(each)).encode() for each in range(size)]),
            SLICES: (
                "EndpointSliceList",
                "discovery.k8s.io/v1",
                [json.dumps(endpoint_slice(each)).encode() for each in range(size)],
            ),
        }
        self._lists |= {path: (*kind, []) for path, kind in OTHERS.items()}
        self._version = FIRST
        self._sent: list[tuple[int, bytes]] = []
        """All events, by version."""
        self._watcher: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                split = urlsplit(head.split(" ", 2)[1])
                query = {name: values[0] for name, values in parse_qs(split.query).items()}
                if split.path not in self._lists:
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    return
                if "watch" in query:
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                    )
                    if split.path == SLICES:
                        self._watcher = writer
                        since = int(query["resourceVersion"])
                        writer.write(b"".join(chunk for version, chunk in self._sent if version > since))
                    await asyncio.sleep(float(query["timeoutSeconds"]))
                    writer.write(b"0\r\n\r\n")
                else:
                    body = self._page(split.path, int(query.get("limit", "0")), int(query.get("continue", "0")))
                    length = f"Content-Length: {len(body)}\r\n\r\n".encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + length + body)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _page(self, path: str, limit: int, start: int) -> bytes:
        kind, version, items = self._lists[path]
        end = start + limit if limit else len(items)
        meta: dict[str, object] = {"resourceVersion": str(FIRST)}
        if end < len(items):
            meta |= {"continue": str(end), "remainingItemCount": len(items) - end}
        head = json.dumps({"kind": kind, "apiVersion": version, "metadata": meta})[:-1].encode()
        return head + b', "items": [' + b",".join(items[start:end]) + b"]}\n"

    def change(self, changes: list[tuple[int, int]]) -> float:
        """Send events; the moment at which that begins."""
        assert self._watcher is not None, "nobody watches"
        chunks = []
        for number, replaced in changes:
            self._version += 1
            made = endpoint_slice(number, replaced, self._version)
            event = {
                "type": "MODIFIED",
                "object": {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1"} | made,
            }
            line = json.dumps(event).encode() + b"\n"
            chunks.append((self._version, f"{len(line):x}\r\n".encode() + line + b"\r\n"))
        self._sent += chunks
        text = b"".join(chunk for _, chunk in chunks)
        sent = time.monotonic()
        self._watcher.write(text)
        return sent


async def main(size: int) -> None:
    """Serve until the input ends."""
    server = Server(size)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    print(listener.sockets[0].getsockname()[1], flush=True)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := (await commands.readline()).split():
        first, second = line[0], int(line[1])
        changes = [(each, 1) for each in range(second)] if first == b"all" else [(int(first), second)]
        print(server.change(changes), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
