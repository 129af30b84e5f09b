"""Test files that run beside all the others, on the second core: by themselves, python -m pytest
tests/test_hostile.py runs one of them as usual."""

import pytest

from conftest import BESIDE, ROOT


PYTEST = "-m", "pytest", "-q", "-p", "no:cacheprovider"


@pytest.mark.parametrize("file", [
    pytest.param(file, marks=pytest.mark.background(*PYTEST, ROOT / "tests" / file))
    for file in BESIDE])
def test_beside_the_others(finished, file):
    print(finished.stdout.strip().splitlines()[-1])
    assert finished.returncode == 0, finished.stdout[-10_000:] + finished.stderr[-2_000:]
