"""Making data sets: importers of published corpora, synthetic ones from text and voices, augmentation.

Everything here ends in one form, the manifest of `clasp_core.manifest`, which training and evaluation read.
"""
