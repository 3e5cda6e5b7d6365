"""The vocabulary of the project: ops, problems, matches, reports. Knows no concrete op or kernel."""
