"""The operations of all modes, of their floors and of the usual tools, in one run: `python -m bench --only modes`.

For each number of Services the contenders take turns. Each has a process, a network namespace and, as far as it works
in one process, a processor of its own. Full programming goes into an empty namespace; the other operations are done and
undone among all Services, which of them is drawn with a seed. What is measured of ours is `take`, plan and commit, of a
full programming plan and commit; of a tool the time from its start to its end.
"""

import gc
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dataplane.model import ObjectName, Update

from . import workload
from .contenders import CONTENDERS, Contender, Driver, Ours, Replay, empty
from .extrapolation import mark, predict
from .isolation import RunFailed, isolated, pin
from .records import Key, Records
from .stopwatch import Spent, measured

FULL, ADD, REMOVE = "full programming", "add a Service", "remove a Service"
REPLACE, SCALE_UP, SCALE_DOWN = "replace one endpoint", "scale 3 → 30", "scale 30 → 3"
ROLL, RESTART, CHURN = "rolling update of 1 %", "restart, nothing changed", "churn"
OPERATIONS = (FULL, ADD, REMOVE, REPLACE, SCALE_UP, SCALE_DOWN, ROLL, RESTART, CHURN)
SCALED = 30
SINGLE = ((ADD, REMOVE), (REPLACE, REPLACE))
"""What is measured with one process for each line: more would say the same and take hours."""
FEW = (5, 20)
"""Services with which it is found out how slow the slow ones are."""
LEAST = 3
"""Repetitions of an operation, however long they take; of slow contenders one."""
USUAL_SIZE = 10_000
"""Other numbers of endpoints than three are measured with as many Services, or with the most below."""
WARM_UP = 10
"""Repetitions that do not count, if they are quick."""


class Task(NamedTuple):
    """What is measured: `most` repetitions of an operation, in `patience` seconds; `rate` changes a second of churn."""

    size: int
    endpoints: int = 3
    seed: int = 1
    most: int = 200
    patience: float = 3.0
    rate: float = 100.0
    churn: float = 3.0

    def everything(self) -> Update:
        """All Services."""
        return Update({name(each): workload.sized(each, self.endpoints) for each in range(self.size)})


Samples = dict[str, list[Spent]]


def name(number: int) -> ObjectName:
    """Of a Service."""
    return ObjectName("bench", f"service-{number}")


def changes(task: Task) -> dict[tuple[str, str], Callable[[int, random.Random], tuple[Update, Update]]]:
    """Operations that are done and undone, by the names of both; each draws what it changes."""
    ends, size = task.endpoints, task.size

    def one(number: int, endpoints: int, replaced: int = 0) -> Update:
        return Update({name(number): workload.sized(number, endpoints, replaced)})

    def add(turn: int, _: random.Random) -> tuple[Update, Update]:
        number = size + turn
        return one(number, ends), Update({name(number): None})

    def replace(turn: int, draw: random.Random) -> tuple[Update, Update]:
        number = draw.randrange(size)
        return one(number, ends, 1 + turn % 500), one(number, ends)

    def scale(_: int, draw: random.Random) -> tuple[Update, Update]:
        number = draw.randrange(size)
        return one(number, SCALED), one(number, ends)

    def roll(turn: int, draw: random.Random) -> tuple[Update, Update]:
        numbers = draw.sample(range(size), max(1, min(size, size * ends // 100)))
        there = {name(each): workload.sized(each, ends, 1 + turn % 500) for each in numbers}
        return Update(there), Update({name(each): workload.sized(each, ends) for each in numbers})  # type: ignore[arg-type]

    found = {(ADD, REMOVE): add, (REPLACE, REPLACE): replace, (ROLL, ROLL): roll}
    return found | ({(SCALE_UP, SCALE_DOWN): scale} if ends == workload.ENDPOINTS else {})


def run(contender: Contender, task: Task, *, only_load: bool = False) -> Samples:
    """Samples of every operation that a contender has."""

    def work() -> Samples:
        pinned = contender.mechanism.mode != "iptables"  # whose tool reads while its text is being made
        if pinned:
            pin(-1)
        driver = contender.driver(contender.mechanism)
        everything = task.everything()
        if isinstance(driver, Replay):
            driver.expect(everything)
        load = driver.load(everything)
        gc.collect()
        gc.freeze()
        samples: Samples = {FULL: [measured(load)]}
        driver.check(everything)
        if not only_load:
            for operations, make in changes(task).items():
                if contender.single and operations not in SINGLE:
                    continue
                for operation, spent in _repeat(driver, operations, make, task, contender):
                    samples.setdefault(operation, []).append(spent)
            if isinstance(driver, Ours):
                driver.check(everything)
                samples[CHURN] = _churn(driver, task)
                driver.reconciler.backend.close()
                samples[RESTART] = _restarts(driver, everything, task)
            driver.check(everything)
        empty(contender.mechanism)
        return samples

    return isolated(work, timeout=1800)


def _repeat(
    driver: Driver,
    operations: tuple[str, str],
    make: Callable[[int, random.Random], tuple[Update, Update]],
    task: Task,
    contender: Contender,
) -> Iterator[tuple[str, Spent]]:
    draw = random.Random(f"{task.seed} {operations[0]}")
    warm_up, least = (0, 1) if contender.slow else (WARM_UP if contender.ours else 1, LEAST)
    began, counted = time.perf_counter(), 0
    for turn in range(warm_up + task.most):
        found = []
        for operation, work in zip(operations, driver.pair(*make(turn, draw)), strict=True):
            found.append((operation, measured(work)))
        took = time.perf_counter() - began
        if turn >= warm_up or took > task.patience:
            counted += 1
            yield from found
        if counted >= least and took > task.patience:
            break


def _restarts(ours: Ours, everything: Update, task: Task) -> list[Spent]:
    """A new agent finds everything as it should be: look, decide, compare; nothing is written."""
    samples = []
    began = time.perf_counter()

    def restart() -> None:
        again = ours.variant.reconciler()
        again.take(everything)
        if again.sync("bench").result != "unchanged":
            raise RunFailed("a restart with nothing changed wrote something")
        again.backend.close()

    for _ in range(10):
        samples.append(measured(restart))
        if len(samples) > 1 and time.perf_counter() - began > task.patience:
            break
    return samples


def _churn(ours: Ours, task: Task) -> list[Spent]:
    """Endpoints replaced at a fixed rate: from the moment when each was due to the ACK.

    What has become due while the last sync ran becomes one sync, as in the agent; nothing is left out because it came
    late. Processor time is that of a sync, divided by its changes.
    """
    draw = random.Random(f"{task.seed} churn")
    total = max(LEAST, int(task.rate * task.churn))
    numbers = [draw.randrange(task.size) for _ in range(total)]
    samples: list[Spent] = []
    began, done = time.perf_counter(), 0
    while done < total:
        now = time.perf_counter() - began
        due = min(total, int(now * task.rate) + 1)
        if due == done:
            time.sleep(max(0.0, done / task.rate - now))
            continue
        changed = {
            name(number): workload.sized(number, task.endpoints, 1 + turn % 500)
            for turn, number in enumerate(numbers[done:due], done)
        }
        spent = measured(lambda changed=changed: ours.apply(Update(changed)))  # type: ignore[misc]
        ended = time.perf_counter() - began
        samples += [Spent(ended - turn / task.rate, spent.cpu / (due - done)) for turn in range(done, due)]
        done = due
    back = {name(number): workload.sized(number, task.endpoints) for number in set(numbers)}
    ours.apply(Update(back))  # type: ignore[arg-type]
    return samples


# ------------------------------------------------------------------------------------------------------ the case


class Plan(NamedTuple):
    """How much is measured. `patience`: a full programming that would take longer is calculated."""

    sizes: Sequence[int]
    endpoints: Sequence[int]
    rounds: int
    patience: float
    task: Task
    contenders: Sequence[str] = ()


def part(operation: str, endpoints: int) -> str:
    """How an operation is called in the records."""
    return operation if endpoints == workload.ENDPOINTS else f"{operation}, × {endpoints}"


def chosen(plan: Plan, variants: Sequence[str]) -> list[Contender]:
    """The contenders that this kernel can have and that are wanted."""
    here = [each for each in CONTENDERS if each.mechanism.name in variants]
    return [each for each in here if not plan.contenders or each.name in plan.contenders]


def measure(
    plan: Plan, variants: Sequence[str], records: Records, say: Callable[[str], None], step: Callable[[], None]
) -> None:
    """Everything into the records."""
    known: dict[tuple[str, str], dict[int, float]] = {}
    for endpoints in plan.endpoints:
        few_enough = [each for each in plan.sizes if each <= USUAL_SIZE]
        sizes = plan.sizes if endpoints == workload.ENDPOINTS else [max(few_enough or plan.sizes)]
        for size in sizes:
            task = plan.task._replace(size=size, endpoints=endpoints)
            for turn in range(plan.rounds):
                for contender in chosen(plan, variants):
                    if contender.slow and turn == 0:
                        for few in FEW:
                            if few < size and few > max(known.get((contender.name, FULL)) or {0: 0}):
                                _turn(contender, task._replace(size=few, endpoints=3), 0, plan, known, records, say)
                    if endpoints == workload.ENDPOINTS or contender.ours:
                        _turn(contender, task, turn, plan, known, records, say)
                    step()


def _turn(
    contender: Contender,
    task: Task,
    turn: int,
    plan: Plan,
    known: dict[tuple[str, str], dict[int, float]],
    records: Records,
    say: Callable[[str], None],
) -> None:
    size, usual = task.size, task.endpoints == workload.ENDPOINTS
    loads = known.setdefault((contender.name, FULL), {})
    expected = predict(loads, size) * task.endpoints / workload.ENDPOINTS
    if (size not in loads or not usual) and expected > plan.patience:
        for (who, operation), seen in known.items():
            if who == contender.name and seen and turn == 0 and (usual or operation == FULL):
                key = Key("modes", size, part(operation, task.endpoints), mark(who, seen))
                share = 1 if usual else task.endpoints / workload.ENDPOINTS
                records.add(key, predict(seen, size) * share, calculated=True)
        return
    if turn > 0 and (contender.slow or expected * (plan.rounds - 1) > plan.patience):
        return
    say(f"modes: {size:,} Services × {task.endpoints}, round {turn + 1}, {contender.name}")
    records.calibrate()
    try:
        samples = run(contender, task, only_load=turn > 0)
    except RunFailed as error:
        records.fail(f"modes, {size}, {contender.name}: {error}")
        return
    for operation, spent in samples.items():
        key = Key("modes", size, part(operation, task.endpoints), contender.name)
        records.add_all(key, [each.wall for each in spent])
        records.add_all(key._replace(part=f"{key.part}, processor time"), [each.cpu for each in spent])
        if usual and spent:
            middle = sorted(each.wall for each in spent)[len(spent) // 2]
            known.setdefault((contender.name, operation), {})[size] = middle


def most_memory() -> float:
    """MiB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
