"""The AgentConfiguration file: what it says, what is wrong with it and where, and what wins over what."""

from pathlib import Path

import pytest
from msgspec import structs

from dataplane import configuration
from dataplane.configuration import (
    EXPECTED,
    Configuration,
    default_node_name,
    metrics_listen,
    read_configuration,
    schema,
    with_overrides,
)
from dataplane.errors import InputError, UsageError
from dataplane.model import parse_network
from dataplane.show_text import structured

HEAD = "apiVersion: dataplane/v1alpha1\nkind: AgentConfiguration\n"


def write(folder: Path, text: str, name: str = "config.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def faults(folder: Path, text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_configuration(write(folder, text))
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_every_field_is_read(tmp_path: Path) -> None:
    text = HEAD + (
        "mode: ipvs\nmanifests: [services.d, /srv/one.yaml]\nnodeName: n1\nzone: z1\nscheduler: wlc\ndrainSeconds: 60\n"
        "masqueradeAll: true\nclusterCIDRs: [10.244.0.0/16, 'fd00::/64']\nvipBinding: routes\nstrictARP: true\n"
        "ipvsTimeouts: {tcp: 900, tcpFin: 120, udp: 300}\nresyncSeconds: 5\nallowMassDelete: true\nlogFormat: json\n"
    )
    read = read_configuration(write(tmp_path, text))
    assert read.manifests == (str(tmp_path / "services.d"), "/srv/one.yaml")
    options, rules = read.options(), read.rules()
    assert (options.masquerade_all, options.vip_binding, options.strict_arp) == (True, "routes", True)
    assert options.cluster_cidrs == (parse_network("10.244.0.0/16"), parse_network("fd00::/64"))
    assert options.timeouts == (900, 120, 300)
    assert (rules.node_name, rules.zone, rules.scheduler, rules.drain_seconds) == ("n1", "z1", "wlc", 60)
    assert (read.resync_seconds, read.allow_mass_delete, read.log_format) == (5.0, True, "json")


def test_where_metrics_are_served(tmp_path: Path) -> None:
    assert str(metrics_listen(Configuration().metrics_bind_address)) == "127.0.0.1:10249"
    assert (
        metrics_listen(read_configuration(write(tmp_path, HEAD + 'metricsBindAddress: ""\n')).metrics_bind_address)
        is None
    )
    text = HEAD + "metricsBindAddress: '1.2.3:80'\nmetricsMaxSeries: -1\n"
    assert faults(tmp_path, text) == [
        "config.yaml:3: AgentConfiguration: metricsBindAddress: '1.2.3' does not appear to be an IPv4 or IPv6 address",
        "config.yaml:4: AgentConfiguration: metricsMaxSeries: expected int >= 0 (it is -1)",
    ]


def test_json_is_read_too(tmp_path: Path) -> None:
    text = '{\n\t"apiVersion": "dataplane/v1alpha1",\n\t"kind": "AgentConfiguration",\n\t"zone": "z"\n}'
    assert read_configuration(write(tmp_path, text, "config.json")).zone == "z"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            HEAD + "drainSecond: 3\n",
            ["config.yaml:3: AgentConfiguration: drainSecond: no such field; did you mean drainSeconds?"],
        ),
        (
            HEAD + "strictArp: yes\n",
            ["config.yaml:3: AgentConfiguration: strictArp: no such field; did you mean strictARP?"],
        ),
        (
            HEAD + "strictARP: yes\n",
            ['config.yaml:3: AgentConfiguration: strictARP: expected bool, got str (it is "yes")'],
        ),
        (
            HEAD + "zone: z\nipvsTimeouts:\n  tcp: 1\n  tcpfin: 2\n",
            ["config.yaml:6: AgentConfiguration: ipvsTimeouts.tcpfin: no such field; did you mean tcpFin?"],
        ),
        (
            HEAD + "ipvsTimeouts:\n  tcp: -1\n",
            ["config.yaml:4: AgentConfiguration: ipvsTimeouts.tcp: expected int >= 0"],
        ),
        (
            HEAD + "clusterCIDRs:\n- 10.0.0.0/8\n- x/9\n",
            ["config.yaml:5: AgentConfiguration: clusterCIDRs[1]: 'x' is not an IP address"],
        ),
        (
            HEAD + "mode: bpf\ndrainSeconds: -1\n",
            [
                "config.yaml:3: AgentConfiguration: mode: invalid enum value 'bpf' (it is \"bpf\")",
                "config.yaml:4: AgentConfiguration: drainSeconds: expected int >= 0 (it is -1)",
            ],
        ),
        (
            "mode: ipvs\n",
            [
                "config.yaml:1: AgentConfiguration: apiVersion: missing; it must be dataplane/v1alpha1",
                "config.yaml:1: AgentConfiguration: kind: missing; it must be AgentConfiguration",
            ],
        ),
        ("a: [\n", ["config.yaml:2: not YAML: while parsing a flow node, did not find expected node content"]),
        ("a: &x 1\n", ["config.yaml:1: anchors are not allowed"]),
        ("", [f"config.yaml: {EXPECTED}"]),
        ("[]\n", [f"config.yaml: {EXPECTED}"]),
        (HEAD + "---\n" + HEAD, [f"config.yaml: {EXPECTED}"]),
    ],
)
def test_faults_are_named_by_line_and_field(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert faults(tmp_path, text) == expected


def test_active_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, HEAD + '"x\\e[2J": 1\n')
    assert "\x1b" not in fault
    assert r"x\x1b[2J" in fault


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no such file"):
        read_configuration("/nowhere/config.yaml")


def test_the_command_line_wins_over_the_file() -> None:
    base = Configuration(scheduler="wlc", drain_seconds=60, strict_arp=True)
    merged = with_overrides(base, {"scheduler": "sh", "drain_seconds": None, "cluster_cidrs": (), "strict_arp": None})
    assert (merged.scheduler, merged.drain_seconds, merged.strict_arp) == ("sh", 60, True)


def test_zero_on_the_command_line_is_a_value() -> None:
    assert with_overrides(Configuration(), {"drain_seconds": 0}).drain_seconds == 0


def test_a_bad_value_on_the_command_line() -> None:
    with pytest.raises(UsageError, match="--scheduler"):
        with_overrides(Configuration(), {"scheduler": "r r\x1b"})


def test_the_node_name_is_the_host_name_in_lower_case() -> None:
    assert Configuration().rules().node_name == default_node_name() == default_node_name().strip().lower() != ""


def test_the_schema_names_the_fields_that_the_reader_knows() -> None:
    made = schema()
    assert made["required"] == ["apiVersion", "kind"]
    assert made["additionalProperties"] is False
    assert set(made["properties"]) == {each.encode_name for each in structs.fields(Configuration)}
    assert all(each.get("description") for each in made["properties"].values())
    assert made["properties"]["ipvsTimeouts"]["$ref"] == "#/$defs/IpvsTimeouts"
    assert set(made["$defs"]["IpvsTimeouts"]["properties"]) == {"tcp", "tcpFin", "udp"}


def test_the_schema_that_is_shipped_is_the_one_that_is_made() -> None:
    """To make it anew: `dataplane check --print-schema > dataplane/configuration.schema.json`."""
    shipped = Path(configuration.__file__).with_name("configuration.schema.json")
    assert shipped.read_text() == structured(schema(), "json")
