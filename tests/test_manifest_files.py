"""Manifest files on disk: what counts, what stays when something is wrong, and how changes arrive."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import pytest

from dataplane.manifest_files import ManifestFiles
from dataplane.model import ObjectName, ServiceView, Update, format_address
from dataplane.safe_yaml import Limits


def service(name: str, ip: str = "10.96.0.1", port: object = 80) -> str:
    return f"""---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIP: {ip}
  ports:
  - port: {port}
"""


def slice_of(name: str, *ips: str) -> str:
    ends = ", ".join(f"{{addresses: [{ip}]}}" for ip in ips)
    return f"""---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{ends}]
"""


def standing(files: ManifestFiles) -> dict[str, str]:
    """Name -> cluster IP and endpoints of everything that counts."""
    return {name.name: told(view) for name, view in files.cluster().items()}


def told(view: ServiceView | None) -> str:
    if view is None:
        return "gone"
    ips = [format_address(ip) for ip in view.service.cluster_ips] if view.service else ["-"]
    return " ".join(ips + [format_address(end.address) for part in view.slices for end in part.endpoints])


def news(update: Update) -> dict[str, str]:
    return {name.name: told(view) for name, view in update.changed.items()}


def problems(files: ManifestFiles, directory: Path) -> list[str]:
    return [str(problem).replace(f"{directory}/", "") for problem in files.problems]


# ------------------------------------------------------------------------------------------------------- reading


def test_files_and_directories_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text(service("b", "10.96.0.2"))
    (tmp_path / "a.yaml").write_text(service("a") + slice_of("a", "10.244.0.1", "10.244.0.2"))
    (tmp_path / "c.json").write_text(
        '{"apiVersion":"v1","kind":"Service","metadata":{"name":"c"},'
        '"spec":{"clusterIP":"10.96.0.3","ports":[{"port":80}]}}'
    )
    for ignored in (".hidden.yaml", ".#a.yaml", "a.yaml~", "a.yaml.swp", "README.md", "#a.yaml#"):
        (tmp_path / ignored).write_text(service("ignored"))
    (tmp_path / "dir.yaml").mkdir()
    files = ManifestFiles([tmp_path])
    update = files.read()
    assert news(update) == {"a": "10.96.0.1 10.244.0.1 10.244.0.2", "b": "10.96.0.2", "c": "10.96.0.3"}
    assert update.problems == ()
    assert files.read() == Update({})
    assert ObjectName("default", "a") in files.cluster()


def test_a_named_file_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(service("a"))
    (tmp_path / ".two").write_text(' {"apiVersion":"v1","kind":"List","items":[]}')
    assert standing(read(tmp_path / "one", tmp_path / ".two")) == {"a": "10.96.0.1"}


def read(*paths: Path, limits: Limits = Limits()) -> ManifestFiles:  # noqa: B008 (frozen)
    files = ManifestFiles(paths, limits)
    files.read()
    return files


@pytest.mark.parametrize("kind_last", [False, True])
def test_items_of_lists_are_objects_of_their_own(tmp_path: Path, kind_last: bool) -> None:
    items = "items:\n- {apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 0}]}}\n"
    items += "- {metadata: {name: b}, spec: {clusterIP: 10.96.0.2, ports: [{port: 1}]}}\n"
    head = "apiVersion: v1\nkind: ServiceList\n"
    (tmp_path / "a.yaml").write_text(items + head if kind_last else head + items)
    files = read(tmp_path)
    assert standing(files) == {"b": "10.96.0.2"}
    assert problems(files, tmp_path) == [
        f"a.yaml:{2 if kind_last else 4}: Service default/a: spec.ports[0].port: 0 is not a number from 1 to 65535"
    ]


def test_problems_name_file_line_object_field_and_reason(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# head\n" + service("ok") + service("bad", port="eighty"))
    (tmp_path / "b.json").write_text(
        '{"apiVersion": "v1", "kind": "List", "items": [\n{"apiVersion": "v1", "kind": "Service",\n'
        ' "metadata": {"name": "c"}, "spec": {\n  "ports": [{"port": true}]}},\n {"kind": 5}]}'
    )
    assert problems(read(tmp_path), tmp_path) == [
        'a.yaml:17: Service default/bad: spec.ports[0].port: "eighty" is not a whole number',
        "b.json:4: Service default/c: spec.ports[0].port: true is not a whole number",
        "b.json:5: kind: 5 is not text (put it in quotes)",
    ]


def test_of_two_objects_with_one_identity_the_first_counts_until_it_goes(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text(service("a", "10.96.0.1"))
    second.write_text("\n" + service("a", "10.96.0.2"))
    files = read(tmp_path)
    assert standing(files) == {"a": "10.96.0.1"}
    assert problems(files, tmp_path) == [
        "2.yaml:3: Service default/a: defined already at 1.yaml:2; this one does not count"
    ]
    first.unlink()
    assert news(files.read()) == {"a": "10.96.0.2"}
    assert files.problems == ()


def test_endpoints_count_only_without_slices(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        service("a")
        + "---\n{apiVersion: v1, kind: Endpoints, metadata: {name: a}, subsets: [{addresses: [{ip: 10.244.9.9}]}]}\n"
    )
    files = read(tmp_path)
    assert standing(files) == {"a": "10.96.0.1 10.244.9.9"}
    (tmp_path / "b.yaml").write_text(slice_of("a", "10.244.0.1"))
    assert news(files.read()) == {"a": "10.96.0.1 10.244.0.1"}


# ------------------------------------------------------------------------------------------- what stays when wrong


def test_an_invalid_object_keeps_its_last_good_version_and_harms_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a", "10.96.0.1") + service("b", "10.96.0.2"))
    files = read(tmp_path)
    file.write_text(service("a", "10.96.0.1", port=0) + service("b", "10.96.0.3") + service("c", "10.96.0.4"))
    assert news(files.read()) == {"b": "10.96.0.3", "c": "10.96.0.4"}
    assert standing(files)["a"] == "10.96.0.1"
    assert files.stale
    assert problems(files, tmp_path) == [
        (
            "a.yaml:8: Service default/a: spec.ports[0].port: 0 is not a number from 1 to 65535;"
            " its last good version stays"
        )
    ]
    file.write_text(service("b", "10.96.0.3"))
    assert news(files.read()) == {"a": "gone", "c": "gone"}
    assert not files.stale


def test_while_an_object_has_no_name_nothing_counts_as_removed(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a", "10.96.0.1") + service("b", "10.96.0.2"))
    files = read(tmp_path)
    file.write_text(service('""') + service("b", "10.96.0.3"))
    assert news(files.read()) == {"b": "10.96.0.3"}
    assert standing(files) == {"a": "10.96.0.1", "b": "10.96.0.3"}
    assert problems(files, tmp_path) == [
        "a.yaml:4: Service: metadata.name: required; until it says who it is nothing of this file counts as removed"
    ]


BROKEN = [
    ("a: [", "not YAML: while parsing a flow node, did not find expected node content"),
    ("a: 1\na: 2", "duplicate key"),
    ("a: &x 1\nb: *x", "anchors are not allowed"),
    ("[" * 100_000, "nested deeper than 32"),
    ("- " * 40 + "x", "nested deeper than 32"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_a_broken_document_keeps_the_whole_file_as_it_was(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a") + service("b", "10.96.0.2"))
    (tmp_path / "other.yaml").write_text(service("other", "10.96.0.9"))
    files = read(tmp_path)
    before = standing(files)
    file.write_text(service("a", "10.96.0.7") + "---\n" + text)
    (tmp_path / "other.yaml").write_text(service("other", "10.96.0.8"))
    assert news(files.read()) == {"other": "10.96.0.8"}
    assert standing(files) == {**before, "other": "10.96.0.8"}
    assert files.stale
    (problem,) = files.problems
    assert problem.reason == f"{reason}; the file's last content stays"
    file.write_text(service("a", "10.96.0.7"))
    assert news(files.read()) == {"a": "10.96.0.7", "b": "gone"}
    assert (files.problems, files.stale) == ((), False)


def test_a_file_never_read_in_one_piece_gives_what_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a") + "---\nx: [\n" + service("b", "10.96.0.2"))
    files = read(tmp_path)
    assert standing(files) == {"a": "10.96.0.1", "b": "10.96.0.2"}
    assert files.stale
    file.write_text(service("a", "10.96.0.7") + "---\nx: [\n")
    assert news(files.read()) == {"a": "10.96.0.7", "b": "gone"}


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_emptied_file_is_taken_for_half_written(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    files = read(tmp_path)
    file.write_text(text)
    assert news(files.read()) == {}
    assert problems(files, tmp_path) == [
        "a.yaml: the file is empty (to mean no objects, delete it or leave a comment in it); its last content stays"
    ]
    file.write_text("# nothing any more\n")
    assert news(files.read()) == {"a": "gone"}


def test_a_file_open_for_writing_is_left_alone_until_closed(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a") + service("b", "10.96.0.2"))
    files = read(tmp_path)
    with file.open("w") as half:
        half.write(service("a", "10.96.0.7"))
        half.flush()
        assert news(files.read()) == {}
        assert files.stale
    assert news(files.read()) == {"a": "10.96.0.7", "b": "gone"}
    assert not files.stale


def test_limits_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    limits = Limits(file_bytes=1000, objects=3)
    files = read(tmp_path, limits=limits)
    file.write_text(service("b") + "#" * 1000)
    assert news(files.read()) == {}
    assert problems(files, tmp_path) == ["a.yaml: larger than 1000 bytes; its last content stays"]
    file.write_text("---\na\n" * 4)
    files.read()
    assert problems(files, tmp_path) == ["a.yaml:7: more than 3 objects in one file; the file's last content stays"]


def test_missing_paths_and_odd_ones(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    files = read(tmp_path / "none.yaml", tmp_path / "fifo")
    assert problems(files, tmp_path) == ["none.yaml: no such file or directory", "fifo: not a regular file"]
    assert files.missing == (str(tmp_path / "none.yaml"),)


def test_a_file_gone_takes_its_objects_a_directory_gone_does_not(tmp_path: Path) -> None:
    inside = tmp_path / "d"
    inside.mkdir()
    (inside / "a.yaml").write_text(service("a"))
    (tmp_path / "b.yaml").write_text(service("b", "10.96.0.2"))
    files = read(inside, tmp_path / "b.yaml")
    (tmp_path / "b.yaml").unlink()
    inside.rename(tmp_path / "elsewhere")
    assert news(files.read()) == {"b": "gone"}
    assert standing(files) == {"a": "10.96.0.1"}
    assert files.stale
    assert problems(files, tmp_path) == [
        "d: no such file or directory; its last content stays",
        "b.yaml: no such file or directory",
    ]
    (tmp_path / "elsewhere").rename(inside)
    assert news(files.read()) == {}
    assert not files.stale


def test_names_from_outside_reach_nobody_raw(tmp_path: Path) -> None:
    (tmp_path / "\x1b[2J.yaml").write_text("kind: [\x1b")
    (tmp_path / "b.yaml").write_text(
        'apiVersion: v1\nkind: "\\e]0;x\\a"\nmetadata: {name: "\\r\\n\\u202ex"}\n---\n'
        'apiVersion: v1\nkind: Service\nmetadata: {name: "\\e[31m"}\n'
    )
    text = "".join(map(str, read(tmp_path).problems))
    assert text
    assert text.isprintable()


def test_only_the_changed_document_of_a_large_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    texts = [service(f"s{i}", f"10.96.{i // 250}.{i % 250 + 1}") for i in range(500)]
    file.write_text("".join(texts))
    # The nodes allowed are enough for a few documents of each reading, not for all of them twice.
    files = read(tmp_path, limits=Limits(file_nodes=9_000))
    before = files.cluster()
    assert len(before) == 500
    texts[7] = service("s7", "10.97.0.1")
    file.write_text("# moved down\n\n" + "".join(texts))
    assert news(files.read()) == {"s7": "10.97.0.1"}
    after = files.cluster()
    same = [after[name].service is before[name].service for name in before]
    assert same.count(False) == 1


# ------------------------------------------------------------------------------------------------------ watching


Script = Callable[[ManifestFiles, AsyncIterator[Update]], Coroutine[None, None, None]]


def watch(files: ManifestFiles, script: Script) -> None:
    """Run a script against the updates of a source that has been read once; everything within ten seconds."""

    async def main() -> None:
        async with asyncio.timeout(10), contextlib.aclosing(files.updates(debounce_ms=20)) as updates:
            await script(files, updates)

    asyncio.run(main())


async def until(updates: AsyncIterator[Update], expected: dict[str, str]) -> None:
    """Updates arrive until they have told exactly this, in one or several parts."""
    seen: dict[str, str] = {}
    while seen != expected:
        seen |= news(await anext(updates))
        assert seen.items() <= expected.items()


def test_the_first_update_holds_everything(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))

    async def script(files: ManifestFiles, updates: AsyncIterator[Update]) -> None:
        assert news(await anext(updates)) == {"a": "10.96.0.1"}
        (tmp_path / "b.yaml").write_text(service("b"))
        await until(updates, {"b": "10.96.0.1"})

    watch(ManifestFiles([tmp_path]), script)


def test_an_empty_directory_says_so_once(tmp_path: Path) -> None:
    async def script(files: ManifestFiles, updates: AsyncIterator[Update]) -> None:
        assert await anext(updates) == Update({})

    watch(ManifestFiles([tmp_path]), script)


@pytest.mark.parametrize("named", ["file", "directory"])
def test_writes_renames_and_deletions_are_seen(tmp_path: Path, named: str) -> None:
    file = tmp_path / "a.yaml"

    async def script(files: ManifestFiles, updates: AsyncIterator[Update]) -> None:
        await anext(updates)
        file.write_text(service("a", "10.96.0.1"))
        await until(updates, {"a": "10.96.0.1"})
        file.write_text(service("a", "10.96.0.2"))
        await until(updates, {"a": "10.96.0.2"})
        (tmp_path / "a.tmp").write_text(service("a", "10.96.0.3"))
        (tmp_path / "a.tmp").rename(file)
        await until(updates, {"a": "10.96.0.3"})
        file.write_text(service("a", "10.96.0.4")[:-20])
        update = await anext(updates)
        assert (news(update), len(update.problems), files.stale) == ({}, 1, True)
        file.write_text(service("a", "10.96.0.4"))
        await until(updates, {"a": "10.96.0.4"})
        file.unlink()
        await until(updates, {"a": "gone"})

    watch(ManifestFiles([file if named == "file" else tmp_path]), script)


@pytest.mark.parametrize("named", ["file", "directory"])
def test_a_config_map_volume_swaps_all_its_files_at_once(tmp_path: Path, named: str) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()

    def publish(version: int, ip: str) -> None:
        """As kubelet does (atomic_writer.go): a new directory, then one rename of the `..data` link."""
        data = volume / f"..2024_{version}"
        data.mkdir()
        (data / "a.yaml").write_text(service("a", ip))
        (volume / "..data_tmp").symlink_to(data.name)
        (volume / "..data_tmp").rename(volume / "..data")
        if not (volume / "a.yaml").is_symlink():
            (volume / "a.yaml").symlink_to("..data/a.yaml")

    async def script(files: ManifestFiles, updates: AsyncIterator[Update]) -> None:
        publish(1, "10.96.0.1")
        await until(updates, {"a": "10.96.0.1"})
        for version in range(2, 5):
            publish(version, f"10.96.0.{version}")
            await until(updates, {"a": f"10.96.0.{version}"})

    files = ManifestFiles([volume / "a.yaml" if named == "file" else volume])
    files.read()
    watch(files, script)


def test_a_slow_writer_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a") + service("b", "10.96.0.2"))

    async def script(files: ManifestFiles, updates: AsyncIterator[Update]) -> None:
        with file.open("w") as slow:
            for text in (service("a", "10.96.0.5"), service("b", "10.96.0.6")):
                slow.write(text)
                slow.flush()
                await asyncio.to_thread(files.read)
                assert standing(files) == {"a": "10.96.0.1", "b": "10.96.0.2"}
        await until(updates, {"a": "10.96.0.5", "b": "10.96.0.6"})

    files = ManifestFiles([file])
    files.read()
    watch(files, script)


def test_a_directory_made_later_and_made_again_is_watched(tmp_path: Path) -> None:
    inside = tmp_path / "later" / "manifests"

    async def script(files: ManifestFiles, updates: AsyncIterator[Update]) -> None:
        await anext(updates)
        inside.mkdir(parents=True)
        (inside / "a.yaml").write_text(service("a"))
        await until(updates, {"a": "10.96.0.1"})
        inside.rename(tmp_path / "old")
        inside.mkdir()
        (inside / "b.yaml").write_text(service("b"))
        await until(updates, {"a": "gone", "b": "10.96.0.1"})
        (inside / "b.yaml").write_text(service("b", "10.96.0.2"))
        await until(updates, {"b": "10.96.0.2"})

    watch(ManifestFiles([inside]), script)


def test_what_events_miss_the_rescan_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))

    async def deaf(*_: object, **__: object) -> AsyncIterator[set[object]]:
        await asyncio.sleep(3600)
        yield set()

    monkeypatch.setattr("dataplane.directory_watch.awatch", deaf)

    async def main() -> None:
        files = ManifestFiles([tmp_path])
        updates = files.updates(rescan_seconds=0.05)
        await anext(updates)
        (tmp_path / "a.yaml").write_text(service("a", "10.96.0.2"))
        async with asyncio.timeout(10):
            await until(updates, {"a": "10.96.0.2"})

    asyncio.run(main())


def test_without_a_watch_the_files_are_looked_at_every_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: object, **__: object) -> AsyncIterator[set[object]]:
        for _attempt in range(1):
            raise OSError(28, "OS file watch limit reached")
        yield set()

    monkeypatch.setattr("dataplane.directory_watch.awatch", refused)
    monkeypatch.setattr("dataplane.manifest_files._UNWATCHED_SECONDS", 0.05)

    async def script(files: ManifestFiles, updates: AsyncIterator[Update]) -> None:
        first = await anext(updates)
        assert "cannot be watched" in str(first.problems)
        (tmp_path / "a.yaml").write_text(service("a"))
        await until(updates, {"a": "10.96.0.1"})

    watch(ManifestFiles([tmp_path]), script)
