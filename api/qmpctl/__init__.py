"""qmpctl: the command line of qmpd. It uses only the public API."""
