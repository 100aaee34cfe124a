"""Helpers on the public API whose form may still change."""
