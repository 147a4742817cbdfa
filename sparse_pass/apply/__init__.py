"""Edit a captured graph by a plan. Nothing here measures or decides."""
