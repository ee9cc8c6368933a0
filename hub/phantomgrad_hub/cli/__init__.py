"""The command line: one file per subcommand, each parses its arguments and calls the library."""
