"""Service DNS: answers a second of one processor, how long one takes under load, memory, and what a change costs.

The server has a processor to itself, dnsperf (Debian: dnsperf) and the prober share another one. dnsperf asks for A and
AAAA of every Service, in an order drawn anew, as fast as it is answered; then at the rate of the target, while the
prober's single queries are timed: under as many as it will bear every queue is full by design, and a percentile says
how long that is.
"""

import asyncio
import gc
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dataplane.desired import Desired
from dataplane.dns.answers import Answers
from dataplane.dns.records import Rules
from dataplane.dns.server import DnsServer, Limits
from dataplane.tcp_listener import Listen

from . import workload
from .isolation import RunFailed, isolated, pin

PORT = 5300
RATE = 30_000
"""Queries a second of the timed load: the target."""
PROBES = 2000
Found = dict[str, tuple[list[float], str]]

PROBER = """
import socket, sys, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.connect(("127.0.0.1", int(sys.argv[1])))
one.settimeout(1)
query = bytes.fromhex(sys.argv[2])
for number in range(int(sys.argv[3])):
    started = time.perf_counter()
    one.send(number.to_bytes(2, "big") + query[2:])
    try:
        one.recv(4096)
    except TimeoutError:
        print("lost")
        continue
    print(time.perf_counter() - started)
    time.sleep(0.0005)
"""


class Log:
    """Nobody reads it."""

    def info(self, event: str, **fields: Any) -> None: ...
    def warning(self, event: str, **fields: Any) -> None: ...


def run(size: int, seconds: float) -> Found:
    """Every figure by name, with its unit."""
    if shutil.which("dnsperf") is None:
        raise RunFailed("dnsperf is not installed (apt-get install dnsperf)")
    return isolated(lambda: _memory(size)) | isolated(lambda: asyncio.run(_load(size, seconds)))


def question(number: int, qtype: int = 1) -> bytes:
    """A query without an id."""
    labels = (f"service-{number}", "bench", "svc", "cluster", "local")
    name = b"".join(bytes((len(label),)) + label.encode() for label in labels)
    return bytes(2) + b"\1\0\0\1\0\0\0\0\0\0" + name + b"\0" + qtype.to_bytes(2) + b"\0\1"


def _resident() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def _memory(size: int) -> Found:
    """What names need beside what the agent has: all records, and every A and AAAA answered once."""
    update = workload.update(size)
    desired = Desired(workload.RULES)
    desired.update(update)
    before = _resident()
    answers = Answers(Rules())
    answers.update(update.changed)
    taken = _resident()
    started = time.perf_counter()
    for number in range(size):
        answers.answer(question(number))
        answers.answer(question(number, 28))
    first = (time.perf_counter() - started) / (2 * size)
    found: Found = {
        "memory of the records": ([taken - before], "MiB"),
        "memory with A and AAAA of all prepared": ([_resident() - before], "MiB"),
        "first answer, A or AAAA": ([first], "s"),
    }
    changes, afters = [], []
    for turn in range(200):
        number = turn * 37 % size
        name = next(iter(workload.update(1).changed))._replace(name=f"service-{number}")
        view = workload.view(number, replaced=1)
        started = time.perf_counter()
        answers.update({name: view})
        between = time.perf_counter()
        answers.answer(question(number))
        changes.append(between - started)
        afters.append(time.perf_counter() - between)
    return found | {"change of one Service": (changes, "s"), "first answer after it": (afters, "s")}


async def _load(size: int, seconds: float) -> Found:
    update = workload.update(size)
    answers = Answers(Rules())
    answers.update(update.changed)
    chance = random.Random(1)
    names = [f"service-{number}.bench.svc.cluster.local {qtype}" for number in range(size) for qtype in ("A", "AAAA")]
    chance.shuffle(names)
    pin(0)
    gc.freeze()
    server = DnsServer(answers, [Listen("127.0.0.1", PORT)], Log(), Limits(rate=10_000_000))
    await server.start()
    with TemporaryDirectory() as folder:
        file = Path(folder, "queries")
        file.write_text("\n".join(names) + "\n")
        await _dnsperf(file, "-n", "1")  # every name once: prepared
        before, started = time.process_time(), time.perf_counter()
        queries = server.queries["udp"]
        text = await _dnsperf(file, "-l", str(seconds))
        cpu, queries = time.process_time() - before, server.queries["udp"] - queries
        wall = time.perf_counter() - started
        found: Found = {
            "answers a second, wall": ([_figure(text, "Queries per second")], "/s"),
            "answers a second of the server's processor time": ([queries / cpu], "/s"),
            "share of its processor": ([100 * cpu / wall], "%"),
            "lost of them": ([_figure(text, "Queries lost")], ""),
        }
        timed = asyncio.create_task(_dnsperf(file, "-l", str(max(seconds, 3.0)), "-Q", str(RATE)))
        await asyncio.sleep(0.5)
        latencies = await _probe(size // 2)
        text = await timed
    await server.close()
    latencies.sort()
    return found | {
        f"one query among {RATE} a second": (latencies, "s"),
        f"its 99th percentile, at {RATE} a second": ([latencies[int(len(latencies) * 0.99)]], "s"),
        "the rate meanwhile": ([_figure(text, "Queries per second")], "/s"),
    }


def _away() -> None:
    """On another processor than the server."""
    pin(1)


async def _dnsperf(file: Path, *words: str) -> str:
    command = ["dnsperf", "-s", "127.0.0.1", "-p", str(PORT), "-d", str(file), "-c", "8", "-q", "400", *words]
    return await _output(command)


async def _probe(number: int) -> list[float]:
    text = await _output([sys.executable, "-c", PROBER, str(PORT), question(number).hex(), str(PROBES)])
    return [float(line) if line != "lost" else 1.0 for line in text.split()]


async def _output(command: list[str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_away, env=os.environ
    )
    output, _ = await process.communicate()
    text: str = output.decode()
    if process.returncode:
        raise RunFailed(f"{command[0]} ended with {process.returncode}: {text[-500:]}")
    return text


def _figure(text: str, name: str) -> float:
    found = re.search(rf"{name}:\s+([\d.]+)", text)
    if found is None:
        raise RunFailed(f"dnsperf tells no {name!r}: {text[-500:]}")
    return float(found[1])
