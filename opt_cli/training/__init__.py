"""`opt-lm train` and `opt-lm plot`: runs, their settings, progress, trackers and pictures."""
