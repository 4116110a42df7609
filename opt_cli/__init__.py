"""The `opt-lm` command: thin, and importing a backend only when a command needs one."""
