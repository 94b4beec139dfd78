"""The pretrained networks in plain torch: samples or words in, features out.

Each module owns one network, how its weights file is read, and nothing else; which network serves
which model, and what is trained on top, is `clasp_core.models`.
"""
