"""What `verify` expects of an artifact: a module for each format that we know, and one for all others."""
