"""Compose files: several services, their networks and volumes, described in YAML and brought up together."""
