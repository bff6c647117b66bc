"""Live migration: what moves a machine to another host, so that exactly one of both owns it at every instant.

`phases` is the theory: two tables, one for each side. `ledger` writes down every step before it is taken. `source` and `destination`
take the steps, `settlement` goes on with them after a restart. QEMU's own part is in `outgoing`, `incoming` and `mirror`.
"""
