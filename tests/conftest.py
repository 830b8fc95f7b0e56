"""One thread a worker, a cache of its own, no network and no display for every test."""

import functools
import os
import shutil
import socket
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

_OWN_CACHE = None
if "NETWRIGHT_TEST_CACHE" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="netwright-tests-")
    os.environ["NETWRIGHT_TEST_CACHE"] = _OWN_CACHE  # the workers of pytest-xdist inherit it and share the folder
os.environ["NETWRIGHT_CACHE"] = os.environ["NETWRIGHT_TEST_CACHE"]

import pytest  # noqa: E402
import typer.testing  # noqa: E402

# Its runner makes all verbs and their options anew for every command, which takes longer than most commands do.
typer.testing._get_command = functools.cache(typer.testing._get_command)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in netwright reaches for the network unless asked: a stream to another machine fails the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        outside = self.family in {socket.AF_INET, socket.AF_INET6} and self.type & socket.SOCK_STREAM
        if outside and not _is_local(str(address[0])):  # type: ignore[index]
            raise AssertionError(f"a test tried to reach the network: {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def even(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor of one pace: sleeping, unlike work, takes no longer on a slow one."""
    from netwright.cost.pace import PACE

    monkeypatch.setattr(PACE, "now", lambda: 1.0)


def _is_local(host: str) -> bool:
    if host in {"localhost", "::1", "0.0.0.0", socket.gethostname()} or host.startswith("127."):
        return True
    try:
        return host in socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        return False
