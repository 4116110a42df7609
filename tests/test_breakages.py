"""The breakages that the fast tests are tried with still fit the sources."""

import pytest

from tests.support.breakages import BREAKAGES, ROOT


def test_there_are_many_all_over_the_packages():
    assert len({breakage.name for breakage in BREAKAGES}) == len(BREAKAGES) == 25
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert {b.file.partition("/")[0] for b in BREAKAGES} >= packages - {"benchmarks", "tests"}


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name)
def test_the_place_is_there_once(breakage):
    assert (ROOT / breakage.file).read_text("utf-8").count(breakage.right) == 1
    assert breakage.right != breakage.wrong
    assert all((ROOT / path).exists() for path in breakage.tests)
