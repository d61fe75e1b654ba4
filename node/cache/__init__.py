"""This node's part of the mesh's cache: what it gives others, what it reads of them, what moves meanwhile.

share ◀─ puts, gets ─ bulk server         mesh_cache ─ reads ─▶ bulk client
  │                                           ▲
  └─ what is held ─▶ sharding core ─ ring, catalogues ─▶ rounds ─ moves ─▶ bulk client
"""
