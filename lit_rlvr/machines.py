"""Machines that are not here: nodes of devices, and the ceilings of those."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Ceilings of one device, from its maker's data sheet.

    Args:
        flops: Dense bfloat16 operations per second.
        bandwidth: Bytes per second of its memory.
        memory: Bytes.
        link: Bytes per second to devices of the same node, in one direction.
        network: Bytes per second to other nodes, one adapter per device.
    """

    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float


DEVICES = {
    "A100": Device(312e12, 2.04e12, 80e9, 300e9, 25e9),
    "H100": Device(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "H200": Device(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "B200": Device(2250e12, 8.0e12, 180e9, 900e9, 50e9),
}


@dataclass(frozen=True)
class Machines:
    """Nodes of devices of one kind.

    Args:
        nodes: Nodes.
        each: Devices per node.
        kind: A name in :data:`DEVICES`, or any with ``ceilings``.
        ceilings: Those of each device; null: what :data:`DEVICES` says of ``kind``.

    Raises:
        ValueError: For an unknown kind, or none of something.
    """

    nodes: int
    each: int
    kind: str
    ceilings: Device | None = None

    def __post_init__(self) -> None:
        if self.kind not in DEVICES and self.ceilings is None:
            raise ValueError(f"there are no ceilings for {self.kind!r}; known are {', '.join(DEVICES)}")
        if self.nodes < 1 or self.each < 1:
            raise ValueError(f"a cluster has at least one node and one device, got {self.nodes}x{self.each}")

    @classmethod
    def of(cls, text: str) -> Machines:
        """Read ``NODESxDEVICESxKIND``.

        Raises:
            ValueError: When the text is anything else.

        >>> Machines.of("8x8xH100").devices
        64
        """
        found = re.fullmatch(r"(\d+)x(\d+)x(\w+)", text)
        if found is None:
            raise ValueError(f"cluster must be NODESxDEVICESxKIND, as in 8x8xH100; got {text!r}")
        return cls(int(found[1]), int(found[2]), found[3])

    @property
    def devices(self) -> int:
        """All devices."""
        return self.nodes * self.each

    @property
    def device(self) -> Device:
        """The ceilings of each."""
        return self.ceilings or DEVICES[self.kind]

    @property
    def narrowest(self) -> float:
        """Bytes per second of the slowest way between two devices."""
        return self.device.link if self.nodes == 1 else self.device.network
