"""Ways to execute an artifact's programs, one a file. Programs, buffers and arrays in; buffers out."""
