"""Pieces of the web app, built from the registry."""
