"""The package is a house: a module imports from floors below its own only, and CONTRIBUTING.md shows the same house."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dataplane"

# A name is a module or a subpackage (one room, whose own modules may import each other). __init__ is on no floor.
TABLE = """
10  __main__
9   cli
8   demo doctor web top
7   agent mode_switch netlink_ipvs counters_text kube_proxy_leftovers
6   ipvs_guard nft_tables iptables_restore manifest_files reconciler health_responder testing looks show_text prober
6   explain_text trace_text web_child kube_source healthz_server
5   ipvs_ledger nft_chains nft_skeleton iptables_books run_iptables configuration netlink_conntrack rows nft_path
5   ipvs_path explanation netlink_trace procfs_ipvs kube_watch http_answer
4   backend netlink_node netlink_delivery nft_layout ipvsadm_text ipvs_proc_text netlink_nftables manifest_content
4   iptables_reading iptables_script iptables_path nft_trace kube_store kube_proxy_rules kube_place
3   ipvs_messages nftables_messages nft_clients netlink_route iptables_chains iptables_save
3   kubernetes_objects kubernetes_nodes manifest_text sightings kube_events kube_proxy_configuration
2   desired plan drain counters control_server staleness procfs_sockets netlink_socket iptables_text
2   kubernetes_reading kubernetes_wire kubernetes_fields bpf walk procfs_recent figures kube_transport dns
1   model nlattr run_tool journal safe_yaml control_socket tcp_listener systemd_notify
0   errors printable procfs_sysctl stable_file directory_watch libc_malloc
"""


def parse(table: str) -> dict[str, int]:
    """The floor of each name."""
    floors: dict[str, int] = {}
    for line in table.strip().splitlines():
        floor, *names = line.split()
        for name in names:
            assert name not in floors, f"{name} is in the table twice"
            floors[name] = int(floor)
    return floors


FLOORS = parse(TABLE)


def room(path: Path) -> str:
    """The table's name for a file of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room(path) != "__init__")


def imported_rooms(path: Path) -> set[tuple[str, int]]:
    """What a file imports of the package, with line numbers; imports in functions and for types count as well."""
    package = ("dataplane", *path.relative_to(PACKAGE).parts[:-1])
    found: set[tuple[str, int]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            modules = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            modules = [(*base, alias.name) for alias in node.names]
        # `from dataplane import __version__` names no module: __init__ is open to all
        found |= {
            (module[1], node.lineno)
            for module in modules
            if isinstance(node, ast.stmt)
            and module[0] == "dataplane"
            and len(module) > 1
            and (module[1] in FLOORS or not module[1].startswith("__"))
        }
    return found


def test_every_module_is_on_a_floor_and_every_name_is_a_module() -> None:
    assert {room(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_come_from_floors_below(path: Path) -> None:
    own = room(path)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {own} (floor {FLOORS.get(own)}) imports {other} (floor {FLOORS.get(other)})"
        for other, line in sorted(imported_rooms(path), key=lambda each: each[1])
        if other != own and not FLOORS.get(other, 99) < FLOORS.get(own, -1)
    ]
    assert not wrong, "\n".join(wrong)


def test_contributing_shows_the_same_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^```\w*\n((?:\d+ +\S.*\n)+)```$", text, re.MULTILINE)
    assert [parse(block) for block in blocks] == [FLOORS]
