"""Tasks: the shell game, questions with answers, the lm-evaluation-harness, intervals."""
