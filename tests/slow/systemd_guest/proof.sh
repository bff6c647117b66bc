# Runs in the guest under systemd, once per boot, and prints one line per thing that holds. Anything that fails ends it.
set -eu

proven() { echo "PROVEN $*"; }

tell() {
    status=$?
    [ "$status" -eq 0 ] && return
    set +e
    systemctl --no-pager status qmpd.service qmpd.socket qmpd-machines.service rootd.service
    journalctl --no-pager -n 60 -u qmpd.service -u qmpd-machines.service -u rootd.service
    echo "PROOF FAILED with status $status"
}
trap tell EXIT

emulator() { pgrep -f '^/usr/bin/qemu-system-riscv64 .*-name .*lab'; }
daemon() { systemctl show --property MainPID --value qmpd.service; }
state() { qmpctl list | awk '$1 == "lab" { print $2 }'; }
is() { [ "$1" = "$2" ] || { echo "is '$1', not '$2'"; return 1; }; }

place() { qmpctl --json show "$1" | sed -n 's/.*"cgroup": *"\([^"]*\)".*/\1/p'; }

# What the definition `held` and its copy for root ask for, as the kernel has it, for all of QEMU and nothing else.
held_in() {
    [ -n "$1" ]
    is "$(cat "$1/memory.max")" 419430400
    is "$(cat "$1/cpu.max")" "50000 100000"
    is "$(cat "$1/io.weight")" "default 50"
    is "$(cat "$1/pids.max")" 256
    is "$(cat "$1/cgroup.procs")" "$2"
}

# The machine is the same process, in the daemon's hands, and answers over QMP.
same() {
    is "$(state)" running
    is "$(emulator)" "$machine"
    qmpctl qmp lab query-status >/dev/null
    proven "$1"
}

# A second daemon, which belongs to root and is in nobody's unit file. systemd ends what is left in its cgroup with it.
root_daemon() {
    systemctl reset-failed rootd.service 2>/dev/null || true
    systemd-run --quiet --unit rootd --service-type=notify qmpd serve --config /proof/rootd.toml
}

first_boot() {
    systemctl is-active qmpd.service qmpd.socket qmpd-guests-shutdown.service qmpd-machines.service
    is "$(ps -o user= -p "$(daemon)")" qmpd
    proven "units are active"

    qmpctl create --start /proof/lab.toml
    qmpctl expect lab --from-start --timeout 600 'OpenSBI v[0-9]'
    machine=$(emulator)
    is "$(ps -o user= -p "$machine")" qmpd
    is "$(awk '$1 == "NoNewPrivs:" { print $2 }' "/proc/$machine/status")" 1
    is "$(awk '$1 == "CapBnd:" { print $2 }' "/proc/$machine/status")" 0000000000000000
    proven "a machine runs, held by unit and sandbox"

    qmpctl create --start /proof/held.toml
    held=$(pgrep -f '^/usr/bin/qemu-system-riscv64 .*-name .*held')
    is "$(place held)" /sys/fs/cgroup/qmpd.slice/qmpd-machines.service/held
    held_in "$(place held)" "$held"
    is "$(ps -o user= -p "$held")" qmpd
    systemctl restart qmpd.service
    qmpctl wait held --state running --timeout 600
    is "$(place held)" /sys/fs/cgroup/qmpd.slice/qmpd-machines.service/held
    held_in "$(place held)" "$held"
    qmpctl stop held
    [ ! -e /sys/fs/cgroup/qmpd.slice/qmpd-machines.service/held ]
    proven "a machine is held to its limits until it ends"

    root_daemon
    qmpctl --socket /run/rootd/qmpd.sock create --start /proof/held.toml
    scoped=$(pgrep -f '^/usr/bin/qemu-system-riscv64 .*-name .*held')
    held_in /sys/fs/cgroup/qmpd.slice/qmpd-held.scope "$scoped"
    systemctl show --property Before --value qmpd-held.scope | grep -q qmpd-guests-shutdown.service
    systemctl kill --kill-who=main --signal=KILL rootd.service
    while systemctl is-active rootd.service; do sleep 1; done
    root_daemon
    qmpctl --socket /run/rootd/qmpd.sock wait held --state running --timeout 600
    is "$(QMPD_SOCKET=/run/rootd/qmpd.sock place held)" /sys/fs/cgroup/qmpd.slice/qmpd-held.scope
    held_in /sys/fs/cgroup/qmpd.slice/qmpd-held.scope "$scoped"
    qmpctl --socket /run/rootd/qmpd.sock stop held
    qmpctl --socket /run/rootd/qmpd.sock start held
    qmpctl --socket /run/rootd/qmpd.sock stop held
    systemctl stop rootd.service
    while [ -e /sys/fs/cgroup/qmpd.slice/qmpd-held.scope ]; do sleep 1; done
    proven "a daemon of root makes a scope that outlives it"

    QMPD_SOCKET=/run/qmpd/qmpd.sock setpriv --reuid nobody --regid qmpd --clear-groups qmpctl list | grep -q lab
    if QMPD_SOCKET=/run/qmpd/qmpd.sock setpriv --reuid nobody --regid nogroup --clear-groups qmpctl list 2>/dev/null; then false; fi
    proven "the group may use the API and others may not"

    before=$(daemon)
    systemctl restart qmpd.service
    [ "$(daemon)" != "$before" ]
    same "the machine outlives a restart"

    before=$(daemon)
    systemctl kill --kill-who=main --signal=KILL qmpd.service
    # No wait: systemd holds the socket, and this request waits for the next daemon.
    qmpctl version >/dev/null
    [ "$(daemon)" != "$before" ]
    same "the machine outlives kill -9"

    systemctl stop qmpd.service qmpd.socket
    is "$(emulator)" "$machine"
    systemctl start qmpd.socket qmpd.service
    same "the machine outlives a stop"

    before=$(daemon)
    kill -STOP "$before"
    while [ "$(daemon)" = "$before" ]; do sleep 1; done
    qmpctl version >/dev/null
    same "a daemon that hangs is replaced by the watchdog"

    date > /proof/first-boot-done
    sync
    proven "first boot"
    systemctl reboot
}

second_boot() {
    qmpctl wait lab --state running --timeout 600
    proven "the machine is started with the host"

    # SIGTERM from the host's last moments would be as clean, but by then there is no daemon to see it.
    qmpctl events --json --since 0 --machine lab | grep '"state":"stopped"' | tail -n 1 | grep -q '"clean":true'
    proven "the machine was ended in order with the host"
    proven "second boot"
    systemctl poweroff
}

if [ -e /proof/first-boot-done ]; then second_boot; else first_boot; fi
