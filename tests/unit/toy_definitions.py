"""Definitions for the toy board: good ones, and wrong ones with all that is wrong about them."""

from __future__ import annotations

IMAGE = {"kind": "image", "path": "/f", "format": "raw"}

GOOD_ONES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "nothing at all": ({}, {}),
    "everything": (
        {
            "accel": "kvm",
            "cpu": {"count": 4, "topology": {"cores": 2, "threads": 2}, "model": "toy-cpu-v2", "features": {"x": True}},
            "memory_mib": 128,
            "kernel": {"image": "/e", "initrd": "/f", "dtb": "/g"},
            "firmware": {"kind": "pflash", "code": "/f", "vars": "/g"},
            "boot_order": ["network", "disk", "cdrom"],
            "disks": [IMAGE, {"kind": "image", "path": "/g", "format": "raw", "media": "cdrom", "bus": "cd"}],
            "nics": [{"kind": "user", "forwards": [{"guest_port": 22}, {"guest_port": 23}]}],
            "rng": True,
            "watchdog": {},
            "tpm": {},
            "serial_ports": [{"kind": "none"}, {"kind": "console"}],
            "display": {"kind": "vnc", "device": "vga-old"},
            "devices": [{"driver": "isa-debugcon", "id": "debug", "list": [1, 2.5, None, {"deep": "er"}]}],
            "extra_args": ["-rtc", "base=utc"],
        },
        {},
    ),
    "one image twice, read only": ({"disks": [{**IMAGE, "read_only": True}, {**IMAGE, "media": "cdrom", "bus": "slot"}]}, {}),
    "a disk that halts its guest": ({"disks": [{**IMAGE, "on_error": "stop"}]}, {"disks": {"pci": {"device": "virtio-blk-pci"}}}),
    "host CPU": ({"cpu": {"model": "host"}}, {}),
    "an ELF kernel where a device tree is needed": (
        {"kernel": {"image": "/e"}},
        {"kernel": {"formats": ["ELF"], "dtb": "required"}},
    ),
    "firmware instead of the kernel": (
        {"firmware": {"kind": "bios", "path": "/f"}},
        {"kernel": {"formats": ["ELF"], "required": True}},
    ),
    "no firmware": ({"firmware": {"kind": "none"}}, {"firmware": {"default": "required"}}),
    "the word for VGA": ({"display": {"kind": "vnc"}}, {"display": {"vnc_vga": "std"}}),
    "a display on the board": ({"display": {"kind": "vnc"}}, {"display": {"on_board": True}}),
    "a bus that only newer QEMUs lack": ({"disks": [IMAGE]}, {"disks": {"pci": {"drive_interface": "mtd", "gone_in": 8}}}),
    "a card of the right size": ({"disks": [{"kind": "blank", "size_mib": 64, "bus": "card"}]}, {}),
    "a card image whose real size only QEMU knows": ({"disks": [{**IMAGE, "path": "/q", "format": "qcow2", "bus": "card"}]}, {}),
}


#: The definition, what is different about the board, and what is told.
WRONG: dict[str, tuple[dict[str, object], dict[str, object], list[str]]] = {
    "machine type": (
        {"machine": "toybored"},
        {},
        ["$.machine: /usr/bin/qemu-system-toy (7.2.0) has no machine type 'toybored'; it has toyboard, toyboard-7.2"],
    ),
    "machine type of the board": (
        {},
        {"machine": "zzz"},
        ["$.board: /usr/bin/qemu-system-toy (7.2.0) has no machine type 'zzz'; it has toyboard, toyboard-7.2"],
    ),
    "KVM elsewhere": (
        {"accel": "kvm"},
        {"kvm_hosts": ["toy", "toy64"]},
        ["$.accel: KVM runs board 'toy' on toy, toy64; this host is x86_64"],
    ),
    "KVM nowhere": ({"accel": "kvm"}, {"kvm_hosts": []}, ["$.accel: KVM runs board 'toy' on no host at all; this host is x86_64"]),
    "CPU model": (
        {"cpu": {"model": "toy-cpu-v3"}},
        {},
        ["$.cpu.model: /usr/bin/qemu-system-toy has no CPU model 'toy-cpu-v3'; it has toy-cpu-v2, toy-cpu"],
    ),
    "host CPU on TCG": ({"cpu": {"model": "host"}, "accel": "tcg"}, {}, ["$.cpu.model: 'host' needs KVM, and accel is 'tcg'; use 'max'"]),
    "features of no CPU": (
        {"cpu": {"features": {"x": False}}},
        {"cpu": None},
        ["$.cpu.features: features need a model, and this board has no default one: set cpu.model"],
    ),
    "too many CPUs": ({"cpu": {"count": 5}}, {}, ["$.cpu.count: 5 vCPUs asked for; board 'toy' takes 1 to 4"]),
    "too few CPUs": ({"cpu": {"count": 1}}, {"min_cpus": 2}, ["$.cpu.count: 1 vCPUs asked for; board 'toy' takes 2 to 4"]),
    "more CPUs than the machine type takes": (
        {"cpu": {"count": 9}},
        {"max_cpus": 99},
        ["$.cpu.count: 9 vCPUs asked for; board 'toy' takes 1 to 8"],
    ),
    "topology": ({"cpu": {"topology": {"cores": 2}}}, {}, ["$.cpu.topology: sockets x cores x threads is 2, but cpu.count is 1"]),
    "fixed memory": (
        {"memory_mib": 32},
        {"memory": {"default_mib": 64, "fixed": True}},
        ["$.memory_mib: board 'toy' always has 64 MiB; leave memory_mib out"],
    ),
    "too little memory": ({"memory_mib": 12}, {}, ["$.memory_mib: 12 MiB is less than the 16 MiB board 'toy' needs"]),
    "too much memory": ({"memory_mib": 132}, {}, ["$.memory_mib: 132 MiB is more than the 128 MiB board 'toy' takes"]),
    "odd memory": ({"memory_mib": 18}, {}, ["$.memory_mib: 18 MiB is not a multiple of the 4 MiB board 'toy' needs"]),
    "firmware file": (
        {"firmware": {"kind": "bios", "path": "/f"}},
        {"firmware": {"bios": False}},
        ["$.firmware.kind: board 'toy' takes no firmware file"],
    ),
    "no firmware": (
        {"firmware": {"kind": "none"}},
        {"firmware": {"bios": False}},
        ["$.firmware.kind: board 'toy' takes no firmware option"],
    ),
    "flash": (
        {"firmware": {"kind": "pflash", "code": "/f", "vars": "/x"}},
        {"firmware": {}},
        ["$.firmware.kind: board 'toy' has no flash for firmware", "$.firmware.vars: /x: no such file"],
    ),
    "no default firmware": (
        {},
        {"firmware": {"default": "required"}},
        ["$.firmware: board 'toy' has no firmware of its own in this QEMU: name one (kind = 'bios'), or kind = 'none'"],
    ),
    "no kernel": (
        {"firmware": {"kind": "none"}},
        {"kernel": {"formats": ["ELF"], "required": True}},
        ["$.kernel: board 'toy' starts only with a kernel: give kernel.image"],
    ),
    "kernel where there is none": (
        {"kernel": {"image": "/x"}},
        {"kernel": None},
        ["$.kernel: board 'toy' cannot boot a kernel directly; boot it from firmware or a disk"],
    ),
    "kernel files": (
        {"kernel": {"image": "/x", "initrd": "/y", "dtb": "/z"}},
        {},
        ["$.kernel.image: /x: no such file", "$.kernel.initrd: /y: no such file", "$.kernel.dtb: /z: no such file"],
    ),
    "device tree": (
        {"kernel": {"image": "/f", "dtb": "/f"}},
        {"kernel": {"formats": ["ELF"]}},
        ["$.kernel.dtb: board 'toy' takes no device tree"],
    ),
    "no device tree": (
        {"kernel": {"image": "/f"}},
        {"kernel": {"formats": ["zImage"], "dtb": "required"}},
        ["$.kernel.dtb: a kernel on board 'toy' needs a device tree: give kernel.dtb"],
    ),
    "boot order": (
        {"boot_order": ["disk", "disk", "network"]},
        {},
        [
            "$.boot_order[0]: there is no disk to boot from",
            "$.boot_order[1]: 'disk' is listed twice",
            "$.boot_order[2]: there is no NIC to boot from",
        ],
    ),
    "boot order of slots": (
        {
            "boot_order": ["cdrom", "network"],
            "disks": [{**IMAGE, "media": "cdrom", "bus": "slot"}],
            "nics": [{"kind": "none", "model": "soldered"}],
        },
        {},
        [
            "$.boot_order: disks[0] is in the board's own 'slot' slot, whose place in the boot order cannot be set",
            "$.boot_order: nics[0] is the board's own 'soldered', whose place in the boot order cannot be set",
        ],
    ),
    "no bus": (
        {"disks": [IMAGE]},
        {"default_disk": None, "disks": {}},
        ["$.disks[0].bus: board 'toy' has no disk bus 'by default'; it has none at all"],
    ),
    "another bus": (
        {"disks": [{**IMAGE, "bus": "pcie"}]},
        {},
        ["$.disks[0].bus: board 'toy' has no disk bus 'pcie'; it has card, cd, pci, slot"],
    ),
    "full bus": (
        {"disks": [{"kind": "blank", "size_mib": 1}] * 3},
        {},
        ["$.disks[2].bus: bus 'pci' of board 'toy' takes at most 2 disk(s)"],
    ),
    "CD-ROM": ({"disks": [{**IMAGE, "media": "cdrom"}]}, {}, ["$.disks[0].media: bus 'pci' of board 'toy' takes no CD-ROM"]),
    "not qcow2": (
        {"disks": [{**IMAGE, "format": "qcow2"}]},
        {},
        ["$.disks[0].format: /f is not a qcow2 image; state format = 'raw' if it is a raw one"],
    ),
    "odd card": (
        {"disks": [{"kind": "blank", "size_mib": 3, "bus": "card"}]},
        {},
        ["$.disks[0]: an SD card must have a power of two as its size, and this one has 3145728 bytes; enlarge it with qemu-img resize"],
    ),
    "a bus of older QEMUs": (
        {"disks": [IMAGE]},
        {"disks": {"pci": {"drive_interface": "mtd", "gone_in": 7}}},
        ["$.disks[0].bus: /usr/bin/qemu-system-toy (7.2.0) has bus 'pci' of board 'toy' with default devices only, which qmpd leaves out"],
    ),
    "one image twice": (
        {"disks": [{**IMAGE, "read_only": True}, IMAGE]},
        {},
        ["$.disks[1].path: /f is already disks[0]; both must be read_only for that"],
    ),
    "NIC model": (
        {"nics": [{"kind": "none", "model": "nut"}]},
        {},
        ["$.nics[0].model: board 'toy' has no NIC model 'nut'; it has net, soldered"],
    ),
    "no NIC": (
        {"nics": [{"kind": "none"}]},
        {"default_nic": None, "nics": {}},
        ["$.nics[0].model: board 'toy' has no NIC model 'by default'; it has none at all"],
    ),
    "too many NICs": ({"nics": [{"kind": "none"}] * 2}, {}, ["$.nics[1].model: board 'toy' takes at most 1 NIC(s) of model 'net'"]),
    "addresses": (
        {"nics": [{"kind": "none", "mac": "01:00:00:00:00:01"}, {"kind": "none", "mac": "01:00:00:00:00:01", "model": "soldered"}]},
        {},
        [
            "$.nics[0].mac: 01:00:00:00:00:01 is a multicast address",
            "$.nics[1].mac: 01:00:00:00:00:01 is a multicast address",
            "$.nics[1].mac: 01:00:00:00:00:01 is already the address of nics[0]",
        ],
    ),
    "forwards": (
        {
            "nics": [
                {
                    "kind": "user",
                    "forwards": [{"guest_port": 1, "host_port": 80, "host_address": "1.2.3.4.5"}, {"guest_port": 2, "host_port": 80}],
                }
            ]
        },
        {},
        [
            "$.nics[0].forwards[0].host_address: '1.2.3.4.5' is not an IPv4 address",
            "$.nics[0].forwards[1].host_port: tcp port 80 is already taken by nics[0].forwards[0]",
        ],
    ),
    "serial ports": (
        {"serial_ports": [{"kind": "none"}]},
        {"console": {"serial_index": 1}},
        ["$.serial_ports: the console of board 'toy' is serial port 1: list at least 2 ports"],
    ),
    "no watchdog": ({"watchdog": {}}, {"watchdogs": []}, ["$.watchdog: no watchdog can be attached to board 'toy'"]),
    "another board's watchdog": (
        {"watchdog": {"model": "cat"}},
        {},
        ["$.watchdog.model: board 'toy' takes no watchdog 'cat'; it takes isa-debugcon, old-dog"],
    ),
    "a watchdog that the emulator lacks": (
        {"watchdog": {"model": "old-dog"}},
        {},
        ["$.watchdog.model: /usr/bin/qemu-system-toy has no device 'old-dog'; close to it: isa-debugcon, vga, vga-old"],
    ),
    "no TPM": ({"tpm": {}}, {"tpms": []}, ["$.tpm: no TPM can be attached to board 'toy'"]),
    "another board's TPM": (
        {"tpm": {"version": "2.0", "model": "tpm-cat"}},
        {},
        ["$.tpm.model: board 'toy' takes no TPM 'tpm-cat'; it takes isa-debugcon, old-tpm"],
    ),
    "a TPM that the emulator lacks": (
        {"tpm": {"model": "old-tpm"}},
        {},
        ["$.tpm.model: /usr/bin/qemu-system-toy has no device 'old-tpm'; close to it: isa-debugcon, vga, vga-old"],
    ),
    "an id of the TPM's": ({"devices": [{"driver": "vga", "id": "tpm0"}]}, {}, ["$.devices[0].id: id 'tpm0' is one qmpd uses itself"]),
    "actions that the emulator lacks": (
        {"actions": {"panic": "exit-failure", "watchdog": "inject-nmi"}},
        {},
        [
            "$.actions.panic: /usr/bin/qemu-system-toy (7.2.0) does not know 'exit-failure'",
            "$.actions.watchdog: /usr/bin/qemu-system-toy (7.2.0) does not know 'inject-nmi'",
        ],
    ),
    "a disk that cannot halt its guest": (
        {"disks": [{**IMAGE, "on_error": "stop"}]},
        {},
        ["$.disks[0].on_error: bus 'pci' of board 'toy' gives every error to the guest; leave on_error out"],
    ),
    "entropy": ({"rng": True}, {"rng": None}, ["$.rng: no random number generator can be attached to board 'toy'"]),
    "no display": (
        {"display": {"kind": "vnc"}},
        {"display": {}},
        ["$.display: board 'toy' has no display device; name one with display.device"],
    ),
    "display device": (
        {"display": {"kind": "vnc", "device": "vga-oldest"}},
        {},
        ["$.display.device: /usr/bin/qemu-system-toy has no device 'vga-oldest'; close to it: vga-old and 2 more"],
    ),
    "devices": (
        {
            "devices": [
                {"id": 7},
                {"driver": "vga", "id": "disk0"},
                {"driver": "vga", "id": "a"},
                {"driver": "vga", "id": "a"},
                {"driver": "sound"},
            ]
        },
        {},
        [
            "$.devices[0].driver: a device needs a driver (a string)",
            "$.devices[0].id: an id starts with a letter and has letters, digits, '.', '_' and '-' only",
            "$.devices[1].id: id 'disk0' is one qmpd uses itself",
            "$.devices[3].id: id 'a' is already devices[2]",
            "$.devices[4].driver: /usr/bin/qemu-system-toy has no device 'sound'; close to it: isa-debugcon, vga, vga-old",
        ],
    ),
    "values JSON does not have": (
        {"devices": [{"driver": "vga", "a": [float("nan")], "b": {"c": b""}, "d": {1: 2}, "e": 2**64}]},
        {},
        [
            "$.devices[0].a[0]: nan is not a number QEMU takes",
            "$.devices[0].b.c: a bytes cannot be given to QEMU",
            "$.devices[0].d: has the name 1, and only strings are names",
            "$.devices[0].e: 18446744073709551616 does not fit into 64 bits",
        ],
    ),
    "options": (
        {"extra_args": ["-daemonize", "-qmp", "stdio", "-fda", "/f"]},
        {},
        ["$.extra_args: -daemonize is set by qmpd and cannot be given", "$.extra_args: -qmp is set by qmpd and cannot be given"],
    ),
    "machine options": (
        {"machine_options": {"kernel": "/etc/shadow", "accel": "kvm", "note": "a\nb", "odd": "\x7f", "fine": "a,b"}},
        {},
        [
            "$.machine_options.kernel: is set by qmpd, or has a field of its own",
            "$.machine_options.accel: is set by qmpd, or has a field of its own",
            "$.machine_options.note: control characters cannot be given to QEMU",
            "$.machine_options.odd: control characters cannot be given to QEMU",
        ],
    ),
    "stray value": (
        {"extra_args": ["/f"]},
        {},
        ["$.extra_args: '/f' belongs to no option: every value must follow an option that starts with '-'"],
    ),
    "options twice": (
        {"extra_args": ["-m", "1G", "-rtc", "base=utc"]},
        {},
        ["$.extra_args: -m can be given once only, and is already set"],
    ),
}
