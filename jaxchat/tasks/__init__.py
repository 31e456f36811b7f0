"""Tasks: conversations to learn from, questions to be judged on.

One module a data set; base.py says what a task is. Importing this package imports nothing.
"""
