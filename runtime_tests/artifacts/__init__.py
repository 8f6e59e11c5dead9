"""What `verify` expects of an artifact, one file a format."""
