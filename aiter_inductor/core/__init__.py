"""The vocabulary of the project: ops, problems, matches, reports. Knows no op and no kernel."""
