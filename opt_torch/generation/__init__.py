"""Generation: prompts, decode steps, the choice of tokens, and the searches."""
