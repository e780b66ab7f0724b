"""Hosts of one machine: each a network, a host name and process numbers of its own, on one switch. Linux, as root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_NEEDED = ("ip", "unshare", "setpriv")
_NETWORK = "10.231.7"


@dataclass(frozen=True)
class Host:
    name: str
    space: str
    """Name of its network namespace."""
    address: str
    switch: str
    port: str
    """The switch's end of its cable."""

    @property
    def inside(self) -> tuple[str, ...]:
        """What runs a command in its network."""
        return ("ip", "netns", "exec", self.space)

    def start(self, command: Sequence[object], log: IO[str], env: dict[str, str]) -> subprocess.Popen:
        """Run `command` as on a machine that is switched on for it: whoever ends the process with SIGKILL switches off
        the machine, and all that runs on it ends."""
        name_first = ("sh", "-c", f'hostname {self.name} && exec "$@"', "sh")
        machine = ("unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
        words = [*self.inside, *machine, *name_first, *map(str, command)]
        return subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | env)

    def unplug(self) -> None:
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def plug_in(self) -> None:
        _ip("-n", self.switch, "link", "set", self.port, "up")


def why_not() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} is not installed (Debian: apt install iproute2 util-linux)"
    if os.getuid() != 0:
        return "network namespaces need root"
    try:
        with hosts("probe") as (probe,):
            probe.unplug()
            subprocess.run(["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"], check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        return f"this machine gives no network namespaces: {said.decode(errors='replace').strip() or error}"
    return None


@contextmanager
def hosts(*names: str) -> Iterator[tuple[Host, ...]]:
    """Hosts that reach each other. The networks are taken away afterwards; processes end with whoever started them."""
    key = uuid.uuid4().hex[:6]
    switch = f"fp-{key}-switch"
    made = [switch]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        found = []
        for number, name in enumerate(names, 1):
            host = Host(name, f"fp-{key}-{name}", f"{_NETWORK}.{number}", switch, f"port{number}")
            _ip("netns", "add", host.space)
            made.append(host.space)
            peer = ("peer", "name", "eth0", "netns", host.space)
            _ip("-n", switch, "link", "add", host.port, "type", "veth", *peer)
            _ip("-n", switch, "link", "set", host.port, "master", "br0", "up")
            _ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.space, "link", "set", device, "up")
            found.append(host)
        yield tuple(found)
    finally:
        for space in reversed(made):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, timeout=30)


def switch_off(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def is_left(folder: Path) -> bool:
    """Whether any process was started with `folder` among its arguments and still runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
