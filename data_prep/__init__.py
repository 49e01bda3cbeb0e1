"""From a publisher's files to the prepared format that every script reads: `python -m data_prep.NAME --help`."""
