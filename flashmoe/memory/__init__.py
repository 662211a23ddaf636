"""Who gets how many bytes: the budget before a run, the governor and the balance during it."""
