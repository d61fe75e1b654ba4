"""Where blocks lie in the mesh, who holds which, and what must move: pure cores, no I/O, no clock."""
