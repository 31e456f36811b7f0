"""Commands that print a table; their numbers go to LOG.md and to the READMEs."""
