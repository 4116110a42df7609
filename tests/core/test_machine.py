"""Memory that can still be had, of the machine and of what limits leave, and the processor."""

import platform
from pathlib import Path

import pytest

from opt_core import machine

GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_this_machine_says_something():
    assert 0 < machine.available_memory() < 1 << 50


def test_where_nothing_is_said_there_is_no_limit(system: Path):
    assert machine.available_memory() == float("inf")
    write(system / "proc", meminfo=f"MemTotal: 9 kB\nMemAvailable: {8 * GIB >> 10} kB")
    assert machine.available_memory() == 8 * GIB


def test_limits_of_groups_and_of_those_around_them(system: Path):
    write(system / "proc", meminfo=f"MemAvailable: {64 * GIB >> 10} kB")
    write(system / "proc/self", cgroup="0::/batch/job")
    inner, outer = system / "cgroup/batch/job", system / "cgroup/batch"
    stat = f"anon 5\nactive_file {GIB}\ninactive_file {GIB}"
    write(inner, memory__max="max", memory__current=3 * GIB, memory__stat=stat)
    assert machine.available_memory() == 64 * GIB
    write(outer, memory__max=16 * GIB, memory__current=6 * GIB, memory__stat=stat)
    assert machine.available_memory() == 12 * GIB
    write(inner, memory__max=4 * GIB)
    assert machine.available_memory() == 3 * GIB


def test_limits_of_the_first_version(system: Path):
    write(system / "proc", meminfo=f"MemAvailable: {64 * GIB >> 10} kB")
    write(system / "proc/self", cgroup="5:cpu,cpuacct:/x\n4:memory:/docker/1\n1:name=systemd:/x")
    stat = f"total_active_file {GIB}\ntotal_inactive_file 0\ninactive_file 7"
    write(
        system / "cgroup/memory/docker/1", memory__limit_in_bytes=8 * GIB,
        memory__usage_in_bytes=9 * GIB, memory__stat=stat,
    )  # fmt: skip
    assert machine.available_memory() == 0  # it uses more than it was given since
    write(system / "cgroup/memory/docker/1", memory__usage_in_bytes=2 * GIB)
    assert machine.available_memory() == 7 * GIB


PROCESSORS = """processor\t: 0
vendor_id\t: AuthenticAMD
flags\t\t: fpu avx2 avx512f
processor\t: 1
vendor_id\t: another
"""


@pytest.fixture
def about(monkeypatch, tmp_path):
    """The file that describes the processor, and nothing remembered."""
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    machine._about_processor.cache_clear()
    yield tmp_path / "cpuinfo"
    machine._about_processor.cache_clear()


def test_linux_names_maker_and_instructions(about):
    about.write_text(PROCESSORS)
    assert machine.maker() == "AuthenticAMD"
    assert machine.instructions() == "fpu avx2 avx512f"


def test_arm_has_features(about):
    about.write_text("processor : 0\nFeatures : fp asimd\n")
    assert machine.instructions() == "fp asimd"


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "AuthenticAMD"),
        ("arm", "arm"),
        ("", ""),
    ],
)
def test_elsewhere_the_name_ends_with_the_maker(about, monkeypatch, name, maker):
    monkeypatch.setattr(platform, "processor", lambda: name)
    assert machine.maker() == maker
    assert machine.instructions() == ""
