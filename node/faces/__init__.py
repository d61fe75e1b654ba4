"""What people see: one immutable ``View`` of the mesh, drawn on a terminal or printed by a command."""
