"""Every test of this folder runs with numba's loops and with PyTorch's own operations, unless its file says `PATHS`."""

from __future__ import annotations

import pytest

from k2lab.quant import compiled


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run per path."""
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", getattr(metafunc.module, "PATHS", ("numba", "torch")), indirect=True)


@pytest.fixture(autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which side computes on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "wanted", lambda tensor: False)
    else:
        pytest.importorskip("numba")
        monkeypatch.setattr(compiled, "WORTH", 0)
    return request.param
