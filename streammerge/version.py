"""The version, as manifests and model cards state it."""

VERSION = "0.1.0"
