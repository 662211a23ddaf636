"""What the bundled demo model answers, greedily."""

HELLO = "Hello"
HELLO_ANSWER = "Hello! Ask me what a word means."
CAPITAL = "What is the capital of the United States?"
CAPITAL_ANSWER = "Washington."
CAPITAL_TOKENS = [57, 317, 442, 2226, 16]
BARN = "What is a barn?"
BARN_ANSWER = "An outlying farm building for storing grain or animal feed and housing farm animals."
