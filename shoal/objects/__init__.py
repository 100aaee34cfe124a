"""Values and the room they take: ids, serialization, the shared-memory arena and its allocator.

Owned here: how a value becomes flat bytes and comes back without a copy (`serialization`, `diagnose`), which bytes of
the arena are free (`allocator`, pure), and the arena itself as every process of a node sees it (`arena`, `memory`).
Asked by the agent (allocator, arena, warming) and by drivers and workers (serialization, arena). It asks nobody but
`shoal.exceptions`: who holds an object, and where its copies are, is the business of the rooms above.
"""
