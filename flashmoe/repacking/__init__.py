"""Offline: a checkpoint becomes a store. Plan first (pure), then execute in bounded memory."""
