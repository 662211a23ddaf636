"""What this machine and its disk can do, measured on a store's own files."""
