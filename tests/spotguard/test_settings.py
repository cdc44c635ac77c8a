"""Settings: precedence, all mistakes at once, and the manual."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import pytest

from spotguard import kinds, settings
from spotguard.config import Kind, add_arguments, fields_of, load
from spotguard.errors import ConfigError, ExitCode, Unsupported
from spotguard.settings import AgentSettings, OwnerStoreSettings, check_runtime_dir

NEEDED = """
[node]
name = "node-a"
address = "10.0.0.1"
[tls]
cert = "/etc/a.crt"
key = "/etc/a.key"
ca = "/etc/ca.crt"
[owner_store]
url = "https://10.0.0.9:9713/"
"""


def read(tmp_path: Path, text: str, env: Mapping[str, str] | None = None, *flags: str) -> AgentSettings:
    file = tmp_path / "agent.toml"
    file.write_text(text)
    parser = argparse.ArgumentParser()
    add_arguments(parser, AgentSettings)
    return load(AgentSettings, parser.parse_args(["--config", str(file), *flags]), env or {})


def test_defaults_and_required_values(tmp_path: Path) -> None:
    agent = read(tmp_path, NEEDED)
    assert agent.node.name == "node-a"
    assert agent.owner_store.url == "https://10.0.0.9:9713"
    assert agent.transfer.mode == "auto"
    assert (agent.control.port, agent.metrics.port) == (9711, 9712)
    assert 9739 in agent.control.stream_ports
    assert len(agent.control.stream_ports) == 20
    assert agent.peers == {}


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    text = NEEDED + '[transfer]\nmax_rounds = 1\nreserve_s = 1\nstore_memory_max = "1GiB"\n'
    env = {"SPOTGUARD_TRANSFER__MAX_ROUNDS": "2", "SPOTGUARD_TRANSFER__RESERVE_S": "2.5"}
    agent = read(tmp_path, text, env, "--transfer-max-rounds", "3", "--transfer-fault-double-run", "yes")
    assert agent.transfer.max_rounds == 3
    assert agent.transfer.reserve_s == 2.5
    assert agent.transfer.store_memory_max == 1 << 30
    assert agent.transfer.fault_double_run is True


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(NEEDED)
    parser = argparse.ArgumentParser()
    add_arguments(parser, AgentSettings)
    assert load(AgentSettings, parser.parse_args([]), {"SPOTGUARD_CONFIG": str(file)}).node.name == "node-a"


def test_peers_as_a_table_and_as_text(tmp_path: Path) -> None:
    table = read(tmp_path, NEEDED + '[peers]\nnode-b = "10.0.0.2"\nnode-c = "10.0.0.3:9800"\n').peers
    text = read(tmp_path, NEEDED, {}, "--peers", "node-b=10.0.0.2, node-c=10.0.0.3:9800").peers
    assert dict(table) == dict(text) == {"node-b": "10.0.0.2", "node-c": "10.0.0.3:9800"}


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = """
    colour = 1
    metrics = 7
    [node]
    name = "Node A"
    adress = "10.0.0.1"
    [tls]
    cert = "relative.crt"
    [transfer]
    mode = "fast"
    store_memory_max = "4GB"
    [control]
    stream_ports = "9739-9720"
    """
    env = {"SPOTGUARD_TRANSFER__MAX_ROUND": "1", "SPOTGUARD_CONTROL_PORT": "tcp://10.0.0.1:9711"}
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, env, "--transfer-target-freeze-ms", "soon", "--transfer-fault-double-run", "maybe")
    text = str(caught.value)
    for expected in [
        "colour (in ",
        "metrics (in ",
        "expected a table [metrics]",
        "node.name (set by ",
        "is 'Node A'; expected a DNS name",
        "node.adress (in ",
        "did you mean node.address?",
        "node.address is not set; expected an IP address (by --node-address, SPOTGUARD_NODE__ADDRESS or",
        "tls.cert (set by ",
        "tls.key is not set",
        "is 'fast'; expected one of auto, live, stop-and-copy",
        "is '4GB'; expected bytes, or a number with KiB",
        "is '9739-9720'; expected FIRST-LAST",
        "SPOTGUARD_TRANSFER__MAX_ROUND (environment) is no setting; did you mean SPOTGUARD_TRANSFER__MAX_ROUNDS?",
        "transfer.target_freeze_ms (set by --transfer-target-freeze-ms) is 'soon'; expected a whole number from 1",
        "is 'maybe'; expected true or false",
    ]:
        assert expected in text
    assert len(caught.value.problems) == 15
    assert caught.value.exit_code is ExitCode.CONFIG


def test_a_file_that_is_not_there_or_no_toml_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path, "[node\n")
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path, NEEDED, {}, "--config", str(tmp_path / "none.toml"))


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    text = NEEDED + '[control]\nport = 9725\n[transfer]\nstore_memory_max = "1MiB"\n[peers]\nnode-a = "10.0.0.1"\n'
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        (kinds.SIZE, "512 MiB", 512 << 20),
        (kinds.SIZE, 7, 7),
        (kinds.BOOLEAN, "No", False),
        (kinds.BOOLEAN, True, True),
        (kinds.number(0), 3, 3.0),
        (kinds.IP, "2001:DB8::1", "2001:db8::1"),
        (kinds.PEERS, "b=[::1]:1", {"b": "[::1]:1"}),
        (kinds.PEERS, "b=::1", {"b": "::1"}),
    ],
)
def test_values_that_are_read(kind: Kind[object], raw: object, value: object) -> None:
    assert kind.convert(raw) == value


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (kinds.SIZE, "-1"),
        (kinds.SIZE, -1),
        (kinds.SIZE, True),
        (kinds.SIZE, "1.5GiB"),
        (kinds.BOOLEAN, 1),
        (kinds.PORT, "0"),
        (kinds.PORT, True),
        (kinds.PORT, 80.0),
        (kinds.number(0), "nan"),
        (kinds.number(0), "inf"),
        (kinds.number(0, 5), 6),
        (kinds.PATH, "a/b"),
        (kinds.PATH, "/a/../b"),
        (kinds.IP, "localhost"),
        (kinds.url("https"), "http://x"),
        (kinds.url("https"), "https://user:pw@x"),
        (kinds.url("https"), "https://x:port"),
        (kinds.PORT_RANGE, "1-70000"),
        (kinds.PEERS, "b=1.2.3.4,b=1.2.3.5"),
        (kinds.PEERS, "b"),
        (kinds.PEERS, "b=1.2.3.4:0"),
        (kinds.PEERS, ["b"]),
        (kinds.PEERS, {"b": 1}),
    ],
)
def test_values_that_are_refused(kind: Kind[object], raw: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        kind.convert(raw)


def test_sizes_are_shown_as_they_are_typed() -> None:
    for text in ["0", "1", "3KiB", "256MiB", "4GiB", "1TiB", "1025"]:
        assert kinds.show_size(kinds.SIZE.convert(text)) == text


@pytest.mark.parametrize("cls", [AgentSettings, OwnerStoreSettings])
def test_every_default_can_be_typed_and_says_its_unit(cls: type) -> None:
    for field in fields_of(cls):
        assert field.meaning.endswith(".")
        if not field.required:
            assert field.kind.convert(field.kind.show(field.default)) == field.default
        for suffix, unit in (("_s", "s"), ("_ms", "ms"), ("_bytes", "bytes")):
            if field.name.endswith(suffix):
                assert field.unit == unit


def test_images_of_memory_stay_in_memory(tmp_path: Path) -> None:
    mounts = (
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:2 / /run rw shared:5 - tmpfs tmpfs rw\n"
        "3 2 0:3 / /run/with\\040space rw - xfs /dev/sdb rw\n"
        "4 1 0:4 / /mnt rw - tmpfs tmpfs rw\n"
        "5 1 0:5 / /mnt rw - ext4 /dev/sdc rw\n"
    )
    check_runtime_dir(Path("/run/spotguard"), mounts)
    for path in ["/var", "/runner", "/run/with space/x", "/mnt/x"]:
        with pytest.raises(Unsupported, match="hold secrets"):
            check_runtime_dir(Path(path), mounts)
    check_runtime_dir(Path("/dev/shm"))
    with pytest.raises(Unsupported):
        check_runtime_dir(Path("/proc/self"))


def test_the_manual_is_up_to_date() -> None:
    manual = Path(__file__).parents[2] / "docs" / "settings.md"
    assert manual.read_text() == settings.reference(), "run: python -m spotguard.settings > docs/settings.md"
