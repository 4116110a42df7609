"""What is read of the processor."""

import platform

import pytest

from opt_core import processor

LINUX = """processor\t: 0
vendor_id\t: AuthenticAMD
flags\t\t: fpu avx2 avx512f
processor\t: 1
vendor_id\t: another
"""


@pytest.fixture
def about(monkeypatch, tmp_path):
    """The file that describes it, and nothing remembered."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "_ABOUT", path)
    processor._line.cache_clear()
    yield path
    processor._line.cache_clear()


def test_linux_names_maker_and_instructions(about):
    about.write_text(LINUX)
    assert processor.maker() == "AuthenticAMD"
    assert processor.instructions() == "fpu avx2 avx512f"


def test_arm_has_features(about):
    about.write_text("processor : 0\nFeatures : fp asimd\n")
    assert processor.instructions() == "fp asimd"


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
    assert processor.maker() == maker
    assert processor.instructions() == ""
