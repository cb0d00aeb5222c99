"""Two network namespaces as two hosts, with a cable between them that can be cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

DEVICE = "wire0"
"""Name of the network device on each host."""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Host:
    """A host with a network of its own; disks and processes are shared."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """Return a command that runs on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def limit_tcp_retries(self, retries: int) -> None:
        """Close connections after some retries; the default of 15 takes a quarter of an hour."""
        write = f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2"
        subprocess.run(self.command("sh", "-c", write), check=True, capture_output=True)

    def cut(self) -> None:
        """Take the device down: packets are lost, and neither side is told."""
        _ip("-n", self.name, "link", "set", DEVICE, "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts that reach each other; skip the test if that is not permitted."""
    if shutil.which("ip") is None:
        pytest.skip("`ip` is missing: install the Debian package iproute2")
    # Only these two see the addresses, so other tests may use the same ones.
    one, other = (Host(f"regraft-{os.getpid()}-{i}", f"10.77.0.{i}") for i in (1, 2))
    made = []
    try:
        for host in (one, other):
            try:
                _ip("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here ({error.stderr.strip()}): run this test as root")
            made.append(host)
            _ip("-n", host.name, "link", "set", "lo", "up")
        peer = ["peer", "name", DEVICE, "netns", other.name]
        _ip("-n", one.name, "link", "add", DEVICE, "type", "veth", *peer)
        for host in (one, other):
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", DEVICE)
            _ip("-n", host.name, "link", "set", DEVICE, "up")
        yield one, other
    finally:
        for host in made:
            _ip("netns", "del", host.name)
