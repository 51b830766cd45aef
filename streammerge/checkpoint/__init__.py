"""What is on disk: headers, shards, byte sources, output files, the manifest. No torch."""
