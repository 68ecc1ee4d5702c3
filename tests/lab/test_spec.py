"""What a lab's file may say, and how layers are split evenly under caps."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from bench.lab import lab
from bench.lab.compare import equal_split
from bench.lab.spec import DeviceSpec, LabSpec, LinkSpec, read_spec

from shoal import planner
from shoal.engine.errors import NoPlanError, ShoalError
from shoal.planner.cost import range_ram_bytes


def test_the_phones_are_those_that_the_results_refer_to(labs: Path) -> None:
    spec = read_spec(labs / "phones.toml")
    assert [(d.speed, d.cap_layers) for d in spec.devices] == [(0.8, 16), (0.5, 12), (0.2, 8), (0.2, 8)]
    assert {d.link for d in spec.devices} == {LinkSpec(0.002, 0.0005, 10e6)}
    assert (spec.coordinator, spec.devices[2].slow) == ("flagship", 5.0)


@pytest.mark.parametrize("name", ["phones", "pis", "laptop+phones"])
def test_every_lab_that_comes_with_the_project_reads(labs: Path, name: str) -> None:
    assert len(read_spec(labs / f"{name}.toml").devices) >= 3


def test_a_device_may_have_a_link_of_its_own(labs: Path) -> None:
    spec = read_spec(labs / "laptop+phones.toml")
    assert [d.link.bytes_per_s for d in spec.devices] == [117.5e6, 10e6, 10e6]
    assert [d.link.jitter_s for d in spec.devices] == [0.0, 0.0005, 0.0005]


DEVICE = '[[device]]\nname = "a"\nspeed = 0.5\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"at least one \[\[device\]\]"),
        (DEVICE + DEVICE, "each name once"),
        (DEVICE + "cpu = 3\n", "unknown key 'cpu'"),
        (DEVICE.replace("0.5", "1.5"), "speed must be a number from 0.001 to 1"),
        (DEVICE.replace("0.5", "true"), "speed must be a number"),
        (DEVICE + "cap_mb = 5\ncap_layers = 5\n", "not both"),
        (DEVICE + "cap_mb = 0\n", "cap_mb must be a number from 1"),
        (DEVICE.replace('"a"', '"a b"'), "a name is letters"),
        ("turns = 1\n" + DEVICE, "turns must be true or false"),
        ("turns = true\n" + DEVICE.replace("0.5", "0.95"), "0.95 cores, and beyond 0.9"),
        ('coordinator = "b"\n' + DEVICE, "the coordinator is on 'b'"),
        ("[link]\ndelay_ms = 1\njitter_ms = 2\n" + DEVICE, "the jitter exceeds the delay"),
        ("[link]\ndelay_ms = -1\n" + DEVICE, "delay_ms must be a number from 0"),
        ("[[device", "Expected"),
    ],
)
def test_a_file_that_makes_no_lab_is_named_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "some.toml"
    path.write_text(text)
    with pytest.raises(ShoalError, match=rf"some\.toml: .*{words}"):
        read_spec(path)


def test_devices_that_take_more_than_the_machine_has_are_refused() -> None:
    devices = tuple(DeviceSpec(name, 0.6, LinkSpec()) for name in "abc")
    with pytest.raises(ValueError, match=r"1\.80 cores"):
        LabSpec(devices)
    assert len(LabSpec(devices[:2]).devices) == 2


def layers(count: int, caps: tuple[int, ...]) -> list[int]:
    """Layers per device of the equal split, where a layer is 10 bytes, a table 15, and a cap in bytes."""
    table = planner.Unit("table", 15, 1, 1, 0, 0, 8)
    layer = planner.Unit("layer", 10, 10, 1, 0, 0, 8)
    model = planner.ModelCosts((table, *[layer] * count, table))
    devices = tuple(planner.Device(f"d{i}", cap, 1e9, 1e9) for i, cap in enumerate(caps))
    cluster = planner.Cluster(devices, {}, "d0")
    stages = equal_split(model, cluster, planner.Workload(64))
    assert [stage.first for stage in stages] == [0, *[stage.last for stage in stages[:-1]]]
    return [min(s.last, count + 1) - max(s.first, 1) for s in stages]


def test_layers_are_split_evenly_as_far_as_the_caps_allow() -> None:
    assert layers(8, (1000, 1000, 1000, 1000)) == [2, 2, 2, 2]
    assert layers(10, (1000, 1000, 1000, 1000)) == [3, 3, 2, 2]
    assert layers(8, (15, 1000, 1000, 1000)) in ([0, 3, 3, 2], [0, 3, 2, 3], [0, 2, 3, 3])
    assert layers(12, (1000, 20, 1000, 25)) == [5, 2, 4, 1] or layers(12, (1000, 20, 1000, 25)) == [
        4,
        2,
        5,
        1,
    ]
    with pytest.raises(NoPlanError, match="no split"):
        layers(12, (40, 40, 20, 20))


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("context", [100, 128])
def test_a_cap_in_layers_has_room_for_them_and_either_end(
    monkeypatch: pytest.MonkeyPatch, context: int, sequences: int
) -> None:
    """Each sequence has pages of its own, and the LM head may work on more than a layer does."""
    table = planner.Unit("table", 10**7, 10, 0, 0, 0, 1000, workspace_bytes=3 * 10**6)
    layer = planner.Unit("layer", 10**7, 10**7, 10**6, 10**5, 5 * 10**6, 1000, workspace_bytes=10**6)
    model = planner.ModelCosts((table, *[layer] * 6, table), 0, 64)
    monkeypatch.setattr(lab, "Model", SimpleNamespace(open=lambda path: None))
    monkeypatch.setattr(lab, "planner_model", lambda *_: model)
    monkeypatch.setattr(lab, "bare_node_bytes", lambda path: 60 * 10**6)
    spec = LabSpec(
        (DeviceSpec("a", 0.4, LinkSpec(), cap_layers=4), DeviceSpec("b", 0.4, LinkSpec(), cap_mb=9))
    )
    device = planner.Device("a", 10**9, 1e9, 1e9, base_bytes=60 * 10**6)
    load = planner.Workload(context, sequences=sequences)
    need = range_ram_bytes(model, device, load, 3, 8)
    assert need == range_ram_bytes(model, device, load, 0, 5)
    assert lab.caps_mb(spec, Path("model"), context, sequences) == [-(-need // 10**6), 9]
