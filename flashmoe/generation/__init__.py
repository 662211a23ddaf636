"""Tokens out: prompts, the step loop, sessions. Knows no files."""
