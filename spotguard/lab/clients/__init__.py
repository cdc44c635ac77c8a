"""Clients of the drill's workloads; each keeps a ledger of what was acknowledged."""
