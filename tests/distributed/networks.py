"""Two network namespaces as two hosts, with a cable between them that can be cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

DEVICE = "wire0"
"""The name of each host's end."""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _missing() -> str | None:
    """Return a sentence on why there can be no namespaces here, or None."""
    if shutil.which("ip") is None:
        return "no `ip` here: install the Debian package iproute2"
    if os.geteuid() != 0:
        return "network namespaces are root's to make: run this test as root"
    tried = f"regraft-{os.getpid()}"
    try:
        _ip("netns", "add", tried)
        _ip("netns", "del", tried)
    except subprocess.CalledProcessError as error:
        return f"this machine permits no network namespaces ({' '.join(error.stderr.split())}): it takes CAP_SYS_ADMIN"
    return None


@dataclass(frozen=True)
class Host:
    """A machine, as far as the network goes; disks and processes are shared with all."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """Return a command that runs on it."""
        return ["ip", "netns", "exec", self.name, *words]

    def give_up_after(self, retries: int) -> None:
        """Have its kernel give a connection up after so many retries; a kernel's own 15 take a quarter of an hour."""
        write = f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2"
        subprocess.run(self.command("sh", "-c", write), check=True, capture_output=True)

    def cut(self) -> None:
        """Pull its cable: what is sent is lost, and nobody is told."""
        _ip("-n", self.name, "link", "set", DEVICE, "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts that reach each other; skips the test where that cannot be."""
    missing = _missing()
    if missing is not None:
        pytest.skip(missing)
    # The addresses are seen by these two alone, so that tests beside this one may have the same.
    hosts = tuple(Host(f"regraft-{os.getpid()}-{i}", f"10.77.0.{i}") for i in (1, 2))
    made = []
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            made.append(host)
            _ip("-n", host.name, "link", "set", "lo", "up")
        one, other = hosts
        peer = ["peer", "name", DEVICE, "netns", other.name]
        _ip("-n", one.name, "link", "add", DEVICE, "type", "veth", *peer)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", DEVICE)
            _ip("-n", host.name, "link", "set", DEVICE, "up")
        yield one, other
    finally:
        for host in made:
            _ip("netns", "del", host.name)
