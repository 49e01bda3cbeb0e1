"""What is in the papers but is not the lesson of a script: python -m results.NAME --help."""
