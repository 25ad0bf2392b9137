"""The command `embedq`: click commands, printing, exit codes."""
