"""`opt-lm serve`: an HTTP server that speaks OpenAI's API, and a page to try a model on."""
