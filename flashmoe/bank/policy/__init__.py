"""Which resident expert gives way when a slot is needed. Knows expert numbers, no memory."""
