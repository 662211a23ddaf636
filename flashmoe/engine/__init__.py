"""The public API: what a run will be (decide), making it (build), and owning it."""
