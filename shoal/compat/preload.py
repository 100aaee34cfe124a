"""Imported by the workers of a job whose driver runs under the hook, before anything else of that job."""

from shoal.compat.hook import install

install()
