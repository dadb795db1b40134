"""The Dockerfile language: text in, data out. Pure; touches no file system."""
