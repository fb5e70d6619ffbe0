"""The machine: processes, files, commands, and what is read from files that may be a stranger's."""
