"""`opt-lm eval paper`: the command, its picture, and classifiers of toxicity."""
