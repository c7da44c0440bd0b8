"""Datasets to WebDataset shards, and the stream that reads them back. Imports nothing of
harness.
"""
