"""Read a captured graph: its linears, all that belongs to each call, and the names of its parameters."""
