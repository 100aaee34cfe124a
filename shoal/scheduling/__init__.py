"""Where work goes: pure decisions over a view of the cluster.

This room owns the arithmetic of resources (`resources`), the values decisions read (`views`) and the choice of a node
(`policy`). Agents ask it about leases, control about actors. It asks nobody: no IO, no clock, no asyncio; time and
chance come in as arguments.
"""
