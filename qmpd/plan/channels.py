"""Fragments for everything that leads out of the machine: monitors, serial ports, display, entropy, further devices."""

from __future__ import annotations

from typing import Final

from qmpd.argv import Option, document, escape, parse
from qmpd.plan.launch import Listening, SerialPipe
from qmpd.plan.resolution import Resolved, on_bus, serial_ports, watchdog_model
from qmpd.spec import SerialConsole, VncDisplay

#: The others are on ISA, or on no bus at all.
PCI_WATCHDOG: Final = "i6300esb"


def monitors(machine: Resolved) -> list[Option | Listening]:
    """Two QMP monitors: the one for commands and events, and a rescue line for out-of-band commands."""
    paths = machine.world.paths
    return [
        Listening(id="qmp", path=paths.socket("qmp")),
        Option("qmp", "chardev:qmp"),
        Listening(id="rescue", path=paths.socket("rescue")),
        Option("qmp", "chardev:rescue"),
    ]


def serial(machine: Resolved) -> list[Option | SerialPipe]:
    """The serial ports. QEMU itself writes every byte of a kept port to its log, whoever is there."""
    paths = machine.world.paths
    options: list[Option | SerialPipe] = []
    for index, port in enumerate(serial_ports(machine.spec, machine.board)):
        if not isinstance(port, SerialConsole):
            options.append(Option("serial", "null"))
            continue
        name = f"serial{index}"
        options += [SerialPipe(id=name, path=f"{paths.run}/{name}", log=paths.log(name)), Option("serial", f"chardev:{name}")]
    return options


def display(machine: Resolved) -> list[Option]:
    """No window ever; with VNC a private Unix socket and the display device."""
    chosen = machine.spec.display
    hints = machine.board.display
    options = [Option("display", "none")]
    if not isinstance(chosen, VncDisplay):
        return [*options, Option("vga", hints.vga)] if hints.vga is not None else options
    options.append(Option("vnc", f"unix:{escape(machine.world.paths.socket('vnc'))}"))
    if chosen.device is None and hints.vnc_vga is not None:
        return [*options, Option("vga", hints.vnc_vga)]
    driver = chosen.device or hints.device
    if driver is not None:
        options.append(document("device", {"driver": driver, "id": "display0", **on_bus(machine.board)}))
    return options


def entropy(machine: Resolved) -> list[Option]:
    """A random number generator fed by QEMU's own (`rng-builtin`)."""
    if not machine.spec.rng:
        return []
    return [
        document("object", {"qom-type": "rng-builtin", "id": "rng0-source"}),
        document("device", {"driver": machine.board.rng, "id": "rng0", "rng": "rng0-source", **on_bus(machine.board)}),
    ]


def watchdog(machine: Resolved) -> list[Option]:
    """The watchdog. Of the models there are, PCI's alone needs to be told its bus."""
    model = watchdog_model(machine.spec, machine.board)
    if model is None:
        return []
    bus = on_bus(machine.board) if model == PCI_WATCHDOG else {}
    return [document("device", {"driver": model, "id": "watchdog0", **bus})]


def devices(machine: Resolved) -> list[Option]:
    """The definition's further devices, as they are."""
    return [document("device", device) for device in machine.spec.devices]


def extra(machine: Resolved) -> list[Option]:
    """The definition's further options, as they are."""
    return list(parse(machine.spec.extra_args))
