"""What README.md and docs/ promise exists: commands, options, statuses, settings, annotations, targets, examples."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
import yaml
from click.testing import CliRunner

from dataplane.backend import MODES
from dataplane.cli import cli
from dataplane.configuration import Configuration, read_configuration
from dataplane.desired import Desired, Rules
from dataplane.errors import DataplaneError
from dataplane.kubernetes_wire import Annotations
from dataplane.manifest_files import ManifestFiles
from dataplane.model import Protocol
from dataplane.procfs_sysctl import IPVS_SYSCTLS, STRICT_ARP_SYSCTLS
from dataplane.run_tool import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(path for path in (ROOT / "docs").glob("*.md") if not path.name.startswith(("tour", "reference")))
README = "\n".join(path.read_text() for path in (ROOT / "README.md", *DOCS))
"""What a person reads: the README and the pages behind it; the tour and the reference have tests of their own."""
MAKEFILE = (ROOT / "Makefile").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
CONTEXT = click.Context(cli)
COMMANDS = {name: command for name in cli.list_commands(CONTEXT) if (command := cli.get_command(CONTEXT, name))}
FOREIGN_ANNOTATIONS = {"endpointslice.kubernetes.io/skip-mirror", "control-plane.alpha.kubernetes.io/leader"}


def code(text: str = README) -> Iterator[str]:
    """Inline code and the lines of code blocks."""
    for block in re.findall(r"^```(?:sh|text|yaml)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def command_lines(text: str = README) -> Iterator[list[str]]:
    """Words behind every `dataplane` that is called."""
    for line in code(text):
        found = re.search(r"(?:^|[\s/])dataplane ([a-z].*)$", line.split(" #")[0])
        if found and not line.startswith("git "):
            yield shlex.split(found[1].strip().rstrip("'"))


def options_of(command: click.Command) -> set[str]:
    return {each for parameter in command.params for each in (*parameter.opts, *parameter.secondary_opts)} | {
        "-h",
        "--help",
    }


def table_rows(head: str) -> list[list[str]]:
    """Cells of the table that starts with the given line."""
    lines = README[README.index(head) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_there_are_command_lines_to_check() -> None:
    assert len(list(command_lines())) > 15


@pytest.mark.parametrize("words", list(command_lines()), ids=" ".join)
def test_commands_and_their_options_exist(words: list[str]) -> None:
    command = COMMANDS.get(words[0])
    assert command is not None, words
    options = {word.split("=")[0] for word in words if word.startswith("-")}
    assert options <= options_of(command), words


def test_every_command_is_in_the_table() -> None:
    told = {re.match(r"`dataplane (\w+)", row[0]).group(1) for row in table_rows("| command |")}  # type: ignore[union-attr]
    assert told == {name for name, command in COMMANDS.items() if not command.hidden}


def test_every_option_named_anywhere_exists() -> None:
    known = set[str]().union(*(options_of(command) for command in COMMANDS.values()))
    foreign = {"--version", "--system-site-packages", "--require-hashes", "--no-deps"}  # of nft, venv and pip
    named = {option for line in code() for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    assert named - foreign <= known


def test_exit_statuses_are_those_of_the_help_and_of_the_errors() -> None:
    told = {int(row[0]): row[1].replace("`", "") for row in table_rows("| exit status |")}
    epilog = dict(re.findall(r"^  (\d)  (.*)$", cli.epilog or "", re.MULTILINE))
    assert told == {int(status): text for status, text in epilog.items()}

    def statuses(kind: type[DataplaneError]) -> set[int]:
        return {kind.exit_code}.union(*(statuses(each) for each in kind.__subclasses__()))

    assert statuses(DataplaneError) <= told.keys()


def test_the_annotations_are_those_the_code_reads() -> None:
    told = {row[0].strip("`") for row in table_rows("| annotation |")}
    read = {field.encode_name for field in msgspec.structs.fields(Annotations)}
    assert told == read - FOREIGN_ANNOTATIONS


def test_the_configuration_is_complete_and_shows_the_defaults(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(apiVersion: dataplane.*?)^```$", README, re.MULTILINE | re.DOTALL)
    file = tmp_path / "config.yaml"
    file.write_text(block)
    assert list(yaml.safe_load(block)) == [field.encode_name for field in msgspec.structs.fields(Configuration)]
    shown = read_configuration(str(file))
    examples = {"manifests": (), "cluster_cidrs": ()}
    assert msgspec.structs.replace(shown, **examples) == Configuration()


def test_the_settings_that_are_touched_are_all_named() -> None:
    for wanted in (*IPVS_SYSCTLS, *STRICT_ARP_SYSCTLS):
        name = wanted.name if wanted.name in README else wanted.name.rpartition(".")[2]
        assert f"`{name}`" in README, wanted.name


def test_make_targets_exist() -> None:
    named = {
        target
        for text in (README, (ROOT / "CONTRIBUTING.md").read_text())
        for line in code(text)
        for target in re.findall(r"^make (?:-C \S+ )?([a-z-]+)", line.strip())
    }
    assert {"demo", "check", "test", "setup", "vm"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def test_contributings_command_lines_exist() -> None:
    for words in command_lines((ROOT / "CONTRIBUTING.md").read_text()):
        assert words[0] in COMMANDS


def test_files_that_are_linked_or_named_exist() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
    for name in re.findall(r"`(\w+\.(?:py|nft))`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert name == "mechanism_subject.py" or list((ROOT / "dataplane").rglob(name)), name
    for name in re.findall(r"`((?:examples|deploy|bench|vagrant)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_the_modes_are_told_as_they_are() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README.split("| `--mode` |")[1].split("\n\n")[0], re.M)) == set(MODES)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ("check -f {folder}/nowhere", 3, "no such file or directory"),
        ("check -f {folder}/bad.yaml", 3, 'Service default/web: spec.clusterIP: "127.0.0.1" is a loopback address'),
    ],
)
def test_messages_under_troubleshooting_are_the_programs(tmp_path: Path, words: str, status: int, told: str) -> None:
    assert told in README
    (tmp_path / "bad.yaml").write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  clusterIP: 127.0.0.1\n  ports: [{port: 80}]\n"
    )
    result = CliRunner().invoke(cli, words.format(folder=tmp_path).split())
    assert result.exit_code == status
    assert told in result.output


def texts_of_the_program() -> str:
    """Every string of the source, and the scripts."""
    texts = [path.read_text() for path in (ROOT / "vagrant").glob("*.sh")]
    for path in (ROOT / "dataplane").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


FOREIGN_TEXTS = {"127.0.0.1:10249: address already in use"}  # the system's own words
PLAYED_TEXTS = {'bad.yaml:5: Service default/web: spec.clusterIP: "127.0.0.1" is a loopback address'}  # the test above


def test_literal_texts_under_troubleshooting_stand_in_the_source() -> None:
    told = set[str]()
    for path in (ROOT / "README.md", ROOT / "docs" / "troubleshooting.md"):
        told |= set(re.findall(r"^- \*\*`([^`]+)`\*\*", path.read_text(), re.MULTILINE))
    assert len(told) >= 15
    source = texts_of_the_program()
    for text in told - FOREIGN_TEXTS - PLAYED_TEXTS:
        for piece in re.sub("^microvm: ", "", text).split("…"):
            assert piece.strip() in source, text


def test_the_tools_of_the_requirements_are_called() -> None:
    assert {"nft", "modprobe"} <= PACKAGES.keys()


def test_there_are_no_paths_of_one_machine() -> None:
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").glob("*.md"),
        *EXAMPLES,
    ):
        assert not re.search(r"(?<![\w.])/(work|home|root)/", path.read_text()), path


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_examples_load_without_problems(path: Path) -> None:
    update = ManifestFiles([path]).read()
    assert update.problems == ()
    assert update.changed
    desired = Desired(Rules())
    desired.update(update)
    assert desired.conflicts == ()
    assert all(view and view.service and view.slices for view in update.changed.values())


def test_examples_can_be_loaded_together() -> None:
    desired = Desired(Rules(node_name="node-a"))
    desired.update(ManifestFiles([ROOT / "examples"]).read())
    assert desired.conflicts == ()
    assert {at.protocol for at in desired.servers} == set(Protocol)
    assert {len(at.address) for at in desired.servers} == {4, 16}
    assert all(server.real_servers for server in desired.servers.values())


def test_the_tutorials_service_is_the_tutorials() -> None:
    desired = Desired(Rules())
    desired.update(ManifestFiles([ROOT / "examples" / "hostnames.yaml"]).read())
    ((at, server),) = desired.servers.items()
    assert str(at) == "TCP 10.0.1.175:80"
    assert list(map(str, server.real_servers)) == ["10.244.1.7:9376", "10.244.2.3:9376", "10.244.3.6:9376"]
    assert (server.label, server.scheduler) == ("default/hostnames", "rr")
