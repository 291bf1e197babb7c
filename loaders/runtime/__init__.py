"""Ways to execute an artifact's programs, one file each, behind the interface in `interface`."""
