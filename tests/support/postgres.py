"""A PostgreSQL server of the test's own, from what Debian's packages install."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.network_hosts import Host

_START_S = 60


def why_not() -> str | None:
    """Why no server can be started here; None where one can."""
    if _programs() is None:
        return "PostgreSQL's initdb and postgres are not installed (Debian: apt install postgresql)"
    if os.getuid() == 0 and _owner() is None:
        return "PostgreSQL refuses to run as root, and there is no user postgres or nobody"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "the driver psycopg is not installed (pip install 'psycopg[binary]')"
    return None


@contextmanager
def server(host: Host | None = None) -> Iterator[str]:
    """The URL of an empty database that any process of this machine may write; on a socket, with no port open.

    Args:
        host: runs the server too, with a port that is open to its network: `url_at`.
    """
    programs, owner = _programs(), _owner()
    assert programs is not None
    as_owner: dict[str, Any] = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path is at most 107 characters
    try:
        if owner:
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        data = folder / "data"
        initdb = [programs / "initdb", "-D", data, "-A", "trust", "-U", "fastpeft", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **as_owner)
        listen = host.address if host else ""
        command = [programs / "postgres", "-D", data, "-k", folder, "-c", f"listen_addresses={listen}"]
        command += ["-c", "fsync=off"]
        if host:
            with (data / "pg_hba.conf").open("a") as file:
                file.write("host all all samenet trust\n")
            assert owner is not None, "only root has hosts"
            user = ("setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups")
            command, as_owner = [*host.inside, *user, *command], {}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **as_owner)
        try:
            _wait(folder, process)
            yield f"postgresql+psycopg://fastpeft@/postgres?host={folder}"
        finally:
            process.send_signal(signal.SIGINT)  # fast: waits for no client
            process.wait(_START_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def url_at(host: Host) -> str:
    """The same database, for the hosts on the server's network."""
    return f"postgresql+psycopg://fastpeft@{host.address}/postgres"


def _wait(folder: Path, process: subprocess.Popen) -> None:
    import psycopg

    until = time.monotonic() + _START_S
    while True:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            psycopg.connect(f"host={folder} user=fastpeft dbname=postgres").close()
            return
        except psycopg.OperationalError:
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.1)


def _programs() -> Path | None:
    """Debian keeps them beside each version and not on the path."""
    on_path = shutil.which("initdb")
    found = [
        *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True),
        *([Path(on_path)] if on_path else []),
    ]
    return next((path.parent for path in found if (path.parent / "postgres").exists()), None)


def _owner() -> pwd.struct_passwd | None:
    """Whom the server runs as, where this is root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None
