"""Subcommands that are more than a call: options, and what is said. What is heavy is imported when one runs."""
