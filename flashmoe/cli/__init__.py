"""typer commands: parse, call, print. The only package that prints."""
