"""Machines that are network namespaces of this one: joined by switches, each cable with a speed of its own."""

import ctypes
import json
import os
import shutil
import subprocess

CLONE_NEWNET = 0x40000000


class NotPermitted(Exception):
    """This system, or this user, may not make namespaces or shape traffic."""


def ip(*args: str) -> str:
    return command("ip", *args)


def command(*args: str) -> str:
    done = subprocess.run(args, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(args)}`: {done.stderr.strip() or done.returncode}")
    return done.stdout


class Network:
    """`with Network(["a", "b"], {"slow": "50mbit"}) as net`: each machine has an interface of each cable's name, 10.77.1.1 and so on."""

    def __init__(self, machines: list[str], cables: dict[str, str]):
        self.prefix = f"mlxc{os.getpid()}-"
        self.machines, self.cables = machines, cables
        self.made: list[str] = []
        self.own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    def address(self, machine: str, cable: str) -> str:
        return f"10.77.{1 + list(self.cables).index(cable)}.{1 + self.machines.index(machine)}"

    def namespace(self, machine: str) -> str:
        return self.prefix + machine

    def inside(self, machine: str) -> list[str]:
        """What to put before a command so that it runs there."""
        return ["ip", "netns", "exec", self.namespace(machine)]

    def enter(self, machine: str) -> None:
        """Moves this thread there."""
        with open(f"/var/run/netns/{self.namespace(machine)}") as namespace:
            self._set(namespace.fileno())

    def set_cable(self, machine: str, cable: str, state: str) -> None:
        """Plugs a cable in (`up`) or out (`down`)."""
        ip("-n", self.namespace(machine), "link", "set", cable, state)

    def sent_bytes(self, machine: str, cable: str) -> int:
        links = json.loads(ip("-n", self.namespace(machine), "-s", "-j", "link", "show", cable))
        return links[0]["stats64"]["tx"]["bytes"]

    def _set(self, descriptor: int) -> None:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise RuntimeError(f"setns: {os.strerror(ctypes.get_errno())}")

    def _add(self, name: str) -> str:
        ip("netns", "add", self.prefix + name)
        self.made.append(self.prefix + name)
        ip("-n", self.prefix + name, "link", "set", "lo", "up")
        return self.prefix + name

    def _make(self) -> None:
        missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
        if missing:
            raise NotPermitted(f"no `{missing[0]}` on this machine (Debian: apt-get install iproute2)")
        switches = self._add("switches")
        for cable in self.cables:
            ip("-n", switches, "link", "add", cable, "type", "bridge")
            ip("-n", switches, "link", "set", cable, "up")
        for machine in self.machines:
            there = self._add(machine)
            for cable, rate in self.cables.items():
                port = f"{machine}-{cable}"
                ip("-n", there, "link", "add", cable, "type", "veth", "peer", "name", port, "netns", switches)
                ip("-n", switches, "link", "set", port, "master", cable, "up")
                ip("-n", there, "address", "add", f"{self.address(machine, cable)}/24", "dev", cable)
                ip("-n", there, "link", "set", cable, "up")
                # `netem` is not in every kernel; a token bucket is. A small bucket: what fits into it passes unshaped.
                command("tc", "-n", there, "qdisc", "add", "dev", cable, "root", "tbf", "rate", rate, "burst", "4kb", "latency", "400ms")

    def __enter__(self):
        try:
            self._make()
        except BaseException as error:
            self.__exit__()
            raise NotPermitted(error) if isinstance(error, RuntimeError) else error
        return self

    def __exit__(self, *_):
        self._set(self.own)
        os.close(self.own)
        # With a namespace its interfaces go.
        for name in self.made:
            ip("netns", "del", name)
