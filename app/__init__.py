"""The service around `clasp_core`: HTTP, the command line, and the life of processes."""
