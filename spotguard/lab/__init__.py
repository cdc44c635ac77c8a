"""The lab: two nodes on one machine, an interruption, clients with ledgers, a report."""
